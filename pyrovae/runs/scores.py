"""Results of an evaluation on disk, row by row, so that one that was interrupted goes on where it was.

RUN/scores/KEY.csv holds the settings, a header, and one line for each row scored, in blocks. A block ends with a line
that says which rows it holds and their checksum; what is damaged, or was cut off by a crash, is scored again. KEY is a
hash of the settings: whatever could change a number (the weights of the model, the data, K, the seed, versions, ...)
makes another file. It is an ordinary table: `pandas.read_csv(path, comment="#")`.

Everybody can compute a checksum. So that scores that somebody else made up are not believed, a block also bears a seal:
a code of its lines and settings under a key that is the user's own. Blocks without it are scored again.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyrovae.errors import OutputError
from pyrovae.files import inside, open_own, opened, read_bytes, read_json, user_cache, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.marginal import LogMarginal
    from pyrovae.inference.simulation import Simulated

    Check = TypeVar("Check", Sandwich, Simulated)

FOLDER = "scores"
# What is read of a file: lines of fewer bytes, blocks of fewer rows.
LONGEST_LINE, LARGEST_BLOCK = 2**16, 1000


class Scores:
    """A `pyrovae.inference.marginal.Store` in a file.

    Args:
        directory: The run's.
        settings: Everything that the results depend on, as plain values.

    Attributes:
        path: The file.
        found: How many rows it held when it was opened.
        strange: How many whole blocks it held then that this user did not write.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.path = inside(directory, FOLDER) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv"
        self.header = f"# {text}\n"
        self.settings = settings
        self.strange = 0
        self.blocks = self.read()
        self.found = len({row for start, rows in self.blocks for row in range(start, start + rows)})

    def read(self) -> "dict[tuple[int, int], LogMarginal]":
        """The whole blocks in the file that this user wrote, by first row and number of rows."""
        blocks: dict[tuple[int, int], LogMarginal] = {}
        held: deque[str] = deque(maxlen=LARGEST_BLOCK)
        block: list[str] = []  # one that is whole, and has yet to show its seal
        try:
            with opened(self.path) as file:
                while line := file.readline(LONGEST_LINE).decode(errors="replace"):
                    if len(line) >= LONGEST_LINE:
                        break
                    if block and hmac.compare_digest(line.encode(), self.seal(block).encode()):
                        self.strange -= 1
                        if (result := self.parse(block)) is not None:
                            blocks[first_row(block), len(block)] = result
                    block = []
                    if end := re.match(r"# rows (\d{1,15}) to (\d{1,15}), ", line, re.A):
                        count = int(end[2]) - int(end[1]) + 1
                        if 0 < count <= len(held) and line == closing(lines := list(held)[-count:]):
                            block = lines
                            self.strange += 1
                        held.clear()
                    elif line[0].isdigit():
                        held.append(line)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        return blocks

    def get(self, start: int, rows: int) -> "LogMarginal | None":
        """The block of so many rows that begins at that row, if it was scored."""
        return self.blocks.get((start, rows))

    def put(self, start: int, result: "LogMarginal") -> None:
        """Append a block.

        Raises:
            OutputError: the disk refused; what was written before is intact.
        """
        text = self.body(start, result)
        try:
            inside(self.path.parent.parent, FOLDER).mkdir(parents=True, exist_ok=True)
            descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                # A line that a crash cut off is ended first. One write: processes side by side do not mix their lines.
                end = os.fstat(descriptor).st_size
                first = self.header + heading(self.settings["K"]) if end == 0 else "\n"
                data = (first + text).encode()
                if os.write(descriptor, data) != len(data):
                    raise OSError(None, "the disk is full")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"{self.path}: could not be written ({error.strerror or error})") from error

    def clear(self) -> None:
        """Forget what was scored."""
        for path in (self.path, self.check_path(), self.check_path(repaired=True)):
            path.unlink(missing_ok=True)
        self.blocks, self.found = {}, 0

    def check_path(self, repaired: bool = False) -> Path:
        """Where the check of an estimate on simulated data is kept."""
        return self.path.with_name(f"{self.path.stem}{'-repaired' * repaired}.json")

    def check(
        self,
        names: "Sequence[str]",
        make: "Callable[[], Check]",
        build: "Callable[..., Check]",
        repaired: bool = False,
    ) -> "Check":
        """A check on simulated data: build(**tensors) of the one that is kept here, or a new one, by make().

        Args:
            names: Its tensors, each of shape (N,), which are kept.
            make: Makes it.
            build: Makes it of these tensors.
            repaired: It is of estimates whose unreliable rows were scored again.
        """
        import torch

        path = self.check_path(repaired)
        try:
            kept = read_json(path)
            if not hmac.compare_digest(self.seal([path.name, json.dumps(kept["values"])]), kept["seal"]):
                raise ValueError("another user's")
            tensors = {name: torch.tensor(kept["values"][name], dtype=torch.float64) for name in names}
        except (OSError, ValueError, KeyError, TypeError):
            made = make()
            values = {name: getattr(made, name).tolist() for name in names}
            seal = self.seal([path.name, json.dumps(values)])
            write_atomically(path, json.dumps({"values": values, "seal": seal}))
            return made
        return build(**tensors)

    def tidy(self, rows: int) -> None:
        """When all rows are scored, write each once, without what a crash or a process beside this one left.

        Raises:
            OutputError: the disk refused; the earlier file is intact.
        """
        text, start = self.header + heading(self.settings["K"]), 0
        blocks = self.read()
        while start < rows:
            lengths = [n for first, n in blocks if first == start]
            if not lengths:
                return
            text += self.body(start, blocks[start, max(lengths)])
            start += max(lengths)
        if self.path.stat().st_size != len(text) or read_bytes(self.path, len(text)) != text.encode():
            write_atomically(self.path, text)

    def body(self, start: int, result: "LogMarginal") -> str:
        """A block as text."""
        rows = result.columns().T.tolist()
        lines = [f"{start + i},{','.join(map(repr, values))}\n" for i, values in enumerate(rows)]
        return "".join(lines) + closing(lines) + self.seal(lines)

    def seal(self, lines: list[str]) -> str:
        """The line by which this user's blocks under these settings are known."""
        text = self.header + "".join(lines)
        return f"# sealed {hmac.digest(own_key(), text.encode(), 'sha256').hex()}\n"

    def parse(self, lines: list[str]) -> "LogMarginal | None":
        """A block's lines as results; None if they are none of this setting."""
        import torch

        from pyrovae.inference.marginal import LogMarginal

        names = heading(self.settings["K"]).rstrip().split(",")
        try:
            values = torch.tensor([list(map(float, line.split(","))) for line in lines], dtype=torch.float64).T
        except ValueError:
            return None
        if len(values) != len(names):
            return None
        row, zeros = values[0], values[names.index("zero_weights")]
        counted = ((zeros == zeros.round()) & (zeros >= 0) & (zeros <= self.settings["K"])).all()
        if not counted or not torch.equal(row, row[0] + torch.arange(len(row))):
            return None
        return LogMarginal.from_columns(values[1:], self.settings["K"], self.settings["estimator"])


@cache
def own_key() -> bytes:
    """The user's key, made when it is first asked for; where it cannot be kept, one for this process alone."""
    folder = user_cache()
    path, new = folder / "key", folder / f".key.{secrets.token_hex(8)}"
    key = secrets.token_bytes(32)
    with suppress(OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key)
            with suppress(FileExistsError):  # another process was first
                os.link(new, path)
            new.unlink()
        if len(stored := read_bytes(path, 32)) == 32:
            return stored
    return key


def first_row(lines: list[str]) -> int:
    """The number of a block's first row."""
    return int(lines[0].split(",")[0])


def heading(num_particles: int) -> str:
    """The names of the columns, as a line."""
    from pyrovae.inference.marginal import PER_ROW, curve_sizes

    names = ["log_marginal" if name == "estimate" else name for name in PER_ROW]
    return ",".join(["row", *names, *(f"L_{k}" for k in curve_sizes(num_particles))]) + "\n"


def closing(lines: list[str]) -> str:
    """The line that ends a block."""
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return f"# rows {lines[0].split(',')[0]} to {lines[-1].split(',')[0]}, sha256 {digest}\n"
