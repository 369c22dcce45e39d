"""Results of an evaluation on disk, row by row, so that one that was interrupted goes on where it was.

RUN/scores/KEY.csv holds the settings, a header, and one line for each row scored, in blocks. A block ends with a line
that says which rows it holds and their checksum; what is damaged, or was cut off by a crash, is scored again. KEY is a
hash of the settings: whatever could change a number (the weights of the model, the data, K, the seed, versions, ...)
makes another file. It is an ordinary table: `pandas.read_csv(path, comment="#")`.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyrovae.errors import OutputError
from pyrovae.inference.checkpoint import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.log_marginal import LogMarginal
    from pyrovae.inference.simulated import Simulated

    Check = TypeVar("Check", Sandwich, Simulated)

FOLDER = "scores"


class Scores:
    """A `pyrovae.inference.log_marginal.Store` in a file.

    Args:
        directory: The run's.
        settings: Everything that the results depend on, as plain values.

    Attributes:
        path: The file.
        found: How many rows it held when it was opened.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.path = directory / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv"
        self.header = f"# {text}\n"
        self.settings = settings
        self.blocks = self.read()
        self.found = len({row for start, rows in self.blocks for row in range(start, start + rows)})

    def read(self) -> "dict[tuple[int, int], LogMarginal]":
        """The whole blocks in the file, by first row and number of rows."""
        try:
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        blocks: dict[tuple[int, int], LogMarginal] = {}
        held: list[str] = []
        names = heading(self.settings["K"]).count(",")
        for line in lines:
            if end := re.match(r"# rows (\d+) to (\d+), ", line):
                block = held[-(int(end[2]) - int(end[1]) + 1) :]
                if block and line == closing(block) and block[0].count(",") == names:
                    blocks[int(end[1]), len(block)] = self.parse(block)
                held = []
            elif line[0].isdigit():
                held.append(line)
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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
            kept = json.loads(path.read_text())
            tensors = {name: torch.tensor(kept[name], dtype=torch.float64) for name in names}
        except (OSError, ValueError, KeyError, TypeError):
            made = make()
            write_atomically(path, json.dumps({name: getattr(made, name).tolist() for name in names}))
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
        if self.path.read_text(errors="replace") != text:
            write_atomically(self.path, text)

    @staticmethod
    def body(start: int, result: "LogMarginal") -> str:
        """A block as text."""
        rows = result.columns().T.tolist()
        lines = [f"{start + i},{','.join(map(repr, values))}\n" for i, values in enumerate(rows)]
        return "".join(lines) + closing(lines)

    def parse(self, lines: list[str]) -> "LogMarginal":
        """A block's lines as results."""
        import torch

        from pyrovae.inference.log_marginal import LogMarginal

        values = torch.tensor([list(map(float, line.split(",")[1:])) for line in lines], dtype=torch.float64)
        return LogMarginal.from_columns(values.T, self.settings["K"], self.settings["estimator"])


def heading(num_particles: int) -> str:
    """The names of the columns, as a line."""
    from pyrovae.inference.log_marginal import PER_ROW, curve_sizes

    names = ["log_marginal" if name == "estimate" else name for name in PER_ROW]
    return ",".join(["row", *names, *(f"L_{k}" for k in curve_sizes(num_particles))]) + "\n"


def closing(lines: list[str]) -> str:
    """The line that ends a block."""
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return f"# rows {lines[0].split(',')[0]} to {lines[-1].split(',')[0]}, sha256 {digest}\n"
