"""How a training loop gets its batches: on its device, in order, and before it has to wait for them."""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyrovae.inference.batch import Batch

AHEAD = 2  # batches that are read, or waiting, while the caller works on another
ANNOUNCED = 4  # batches that their source is told of before they are read


class RowSource(Protocol):
    """Rows that are elsewhere than in memory: `source[index]` reads some of them.

    `source.announce(index)` says that some will be read soon, and returns at once.
    """

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor | slice, /) -> Tensor: ...

    def announce(self, index: Tensor, /) -> None: ...


def gather(
    data: Tensor | RowSource,
    batches: Sequence[Tensor],
    device: str | torch.device,
    given: Sequence[Tensor] = (),
) -> Generator[Batch, None, None]:
    """Yield data[rows] and given[rows], on the device, for each tensor of row numbers in `batches`.

    A tensor on the device is indexed. What has to be read from a file or copied to a GPU is read ahead by one thread,
    which ends when the iteration does, also early: close the iterator (`contextlib.closing`) where an exception could
    keep it alive. The thread draws no random numbers.

    Args:
        data: Rows, or an object that gives rows on the host when indexed, such as `pyrovae.data.streaming.MappedRows`.
        batches: Row numbers of each batch, best on the host.
        device: Where the batches are wanted.
        given: What is given beside each row, in memory.

    Raises:
        Exception: whatever reading raises, when its batch is due.
    """
    device = torch.device(device)
    if isinstance(data, Tensor) and (data.device.type != "cpu" or device.type == "cpu"):
        # All row numbers at once: a GPU would be waited for at every batch.
        order = torch.cat(list(batches)).to(data.device) if batches else torch.zeros(0, dtype=torch.long)
        for rows in order.split([len(rows) for rows in batches]):
            yield Batch(data[rows], tuple(value[rows.to(value.device)] for value in given)).to(device)
        return

    def announce(numbers: range) -> None:
        if not isinstance(data, Tensor):
            for rows in batches[numbers.start : numbers.stop]:
                data.announce(rows.cpu())

    def read(number: int) -> Batch:
        announce(range(number + ANNOUNCED, number + ANNOUNCED + 1))
        rows = batches[number].cpu()
        batch = Batch(data[rows], tuple(value[rows.to(value.device)] for value in given))
        return batch.pinned() if device.type == "cuda" else batch

    reader = ThreadPoolExecutor(1, "pyrovae-batches")
    try:
        reader.submit(announce, range(ANNOUNCED))
        coming = deque(reader.submit(read, number) for number in range(min(AHEAD, len(batches))))
        for number in range(len(batches)):
            batch = coming.popleft().result()
            if number + AHEAD < len(batches):
                coming.append(reader.submit(read, number + AHEAD))
            yield batch.to(device, non_blocking=device.type == "cuda")
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Data:
    """What a run is trained on, see `fit`; `validation` with what is given beside it."""

    rows: Tensor | RowSource
    given: tuple[Tensor, ...]
    transform: Callable[[Tensor], Tensor]
    validation: Batch | None


def unchanged(rows: Tensor) -> Tensor:
    """x as the rows are."""
    return rows


class Source:
    """Where a run's batches come from: its rows, on the device where they fit, and what is made of them."""

    def __init__(self, data: Data, device: torch.device) -> None:
        self.rows, self.transform, self.device = data.rows, data.transform, device
        if isinstance(self.rows, Tensor) and fits(self.rows, device):
            self.rows = self.rows.detach().to(device)  # else batches are copied there as they come
        self.given = tuple(value.detach().to(device) for value in data.given)

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, batches: Sequence[Tensor]) -> Generator[Batch, None, None]:
        """Rows and what is given beside them, for each tensor of row numbers, see `gather`."""
        return gather(self.rows, batches, self.device, self.given)

    def transformed(self, raw: Batch) -> Batch:
        """A batch of rows as x, with what is given beside them."""
        return Batch(self.transform(raw.x), raw.given)

    def batch(self, rows: Tensor) -> Batch:
        """The batch that some rows make."""
        return self.transformed(next(self.raw([rows])))

    @property
    def fingerprint(self) -> str:
        """What a resumed run compares."""
        return fingerprint((self.rows, *self.given))


def fingerprint(tensors: Sequence[Tensor | RowSource]) -> str:
    """A hash of a thousand rows of what has a row for each datum."""
    every = slice(None, None, max(1, len(tensors[0]) // 1000))
    sampled = (t[every].cpu().contiguous().view(torch.uint8) for t in tensors)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in sampled)).hexdigest()[:16]


def fits(data: Tensor, device: torch.device) -> bool:
    """Whether a device has room for all rows and as much again."""
    return device.type != "cuda" or data.device == device or 2 * data.nbytes <= torch.cuda.mem_get_info(device)[0]
