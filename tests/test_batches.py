"""Batches reach the training loop in order, whole, on its device, and leave nothing behind."""

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrovae.data import load_data
from pyrovae.inference.training.batches import AHEAD, ANNOUNCED, gather


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pyrovae")]


class Watched:
    """Rows elsewhere than in memory, which tell who read them, and fail where they are told to."""

    def __init__(self, rows: Tensor, broken: int | None = None) -> None:
        self.rows, self.broken = rows, broken
        self.read: list[list[int]] = []
        self.announced: list[list[int]] = []
        self.readers: set[str] = set()

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        if self.broken is not None and self.broken in index:
            raise OSError(f"row {self.broken} cannot be read")
        self.read.append(index.tolist())
        self.readers.add(threading.current_thread().name)
        return self.rows[index]

    def announce(self, index: Tensor) -> None:
        self.announced.append(index.tolist())


ROWS = torch.arange(300).reshape(100, 3)
KINDS = {
    "uint8": np.random.default_rng(0).integers(0, 256, (60, 4), dtype=np.uint8),
    "images": np.random.default_rng(1).integers(0, 256, (60, 5, 4, 3), dtype=np.uint8),
    "bool": np.random.default_rng(2).integers(0, 2, (60, 4)).astype(bool),
    "float32": np.random.default_rng(3).standard_normal((60, 4)).astype(np.float32),
    "float64": np.random.default_rng(4).standard_normal((60, 4)),
}


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_gathering_is_indexing(tmp_path: Path, kind: str, stream: str) -> None:
    np.save(tmp_path / "x.npy", KINDS[kind])
    expected = load_data(tmp_path / "x.npy").train
    data = load_data(tmp_path / "x.npy", stream=stream).train
    batches = torch.randperm(len(data)).split(7)
    labels = torch.arange(len(data))
    gathered = list(gather(data, batches, "cpu", (labels,)))
    assert len(gathered) == len(batches)
    for batch, rows in zip(gathered, batches, strict=True):
        assert torch.equal(batch.x, expected[rows])
        assert torch.equal(*batch.given, rows)
    assert not threads()


@pytest.mark.parametrize("count", range(AHEAD + 3))
def test_any_number_of_batches(count: int) -> None:
    batches = [torch.tensor([i, 3 * i]) for i in range(count)]
    gathered = list(gather(Watched(ROWS), batches, "cpu"))
    assert [batch.x.tolist() for batch in gathered] == [ROWS[rows].tolist() for rows in batches]


def test_rows_in_memory_need_no_thread() -> None:
    batches = gather(ROWS, torch.arange(100).split(10), "cpu")
    next(batches)
    assert not threads()


def test_batches_are_read_ahead_by_one_thread_in_order() -> None:
    data = Watched(ROWS)
    batches = torch.arange(100).split(10)
    for done, _ in enumerate(gather(data, batches, "cpu"), start=1):
        assert done <= len(data.read) <= done + AHEAD
        assert len(data.announced) >= min(len(batches), done + ANNOUNCED)
    assert data.read == data.announced == [rows.tolist() for rows in batches]
    assert len(data.readers) == 1
    assert threading.current_thread().name not in data.readers


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    for _ in gather(Watched(ROWS), torch.arange(100).split(10), "cpu"):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_stopping_early_leaves_no_thread() -> None:
    batches = torch.arange(100).split(1)
    with closing(gather(Watched(ROWS), batches, "cpu")) as gathered:
        for number, _ in enumerate(gathered):
            assert threads()
            if number == 3:
                break
    assert not threads()

    def fail() -> None:
        with closing(gather(Watched(ROWS), batches, "cpu")) as gathered:
            next(gathered)
            raise ArithmeticError("the loss is NaN")

    with pytest.raises(ArithmeticError):
        fail()
    assert not threads()


def test_what_goes_wrong_in_reading_is_raised_when_its_batch_is_due() -> None:
    gathered = gather(Watched(ROWS, broken=42), torch.arange(100).split(10), "cpu")
    for _ in range(4):
        next(gathered)
    with pytest.raises(OSError, match="row 42 cannot be read"):
        next(gathered)
    assert not threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["memory", "elsewhere", "cuda"])
def test_batches_on_a_gpu(where: str) -> None:
    rows = torch.randint(256, (5000, 3072), dtype=torch.uint8)
    data = {"memory": rows, "elsewhere": Watched(rows), "cuda": rows.cuda()}[where]
    batches = torch.randperm(5000).split(100)
    for batch, index in zip(gather(data, batches, "cuda"), batches, strict=True):
        assert batch.x.device.type == "cuda"
        assert torch.equal(batch.x.cpu(), rows[index])
