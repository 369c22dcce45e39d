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
from typing import TYPE_CHECKING, Any

from pyrovae.errors import OutputError
from pyrovae.inference.checkpoint import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pyrovae.inference.annealed import Annealed, Sandwich
    from pyrovae.inference.log_marginal import LogMarginal

FOLDER = "scores"
SANDWICH = ("forward", "reverse", "acceptance")


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
        self.blocks: dict[tuple[int, int], LogMarginal] = {}
        try:
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        held: list[str] = []
        for line in lines:
            if end := re.match(r"# rows (\d+) to (\d+), ", line):
                block = held[-(int(end[2]) - int(end[1]) + 1) :]
                if block and line == closing(block) and block[0].count(",") == self.columns():
                    self.blocks[int(end[1]), len(block)] = self.parse(block)
                held = []
            elif line[0].isdigit():
                held.append(line)
        self.found = len({row for start, rows in self.blocks for row in range(start, start + rows)})

    def get(self, start: int, rows: int) -> "LogMarginal | None":
        """The block of so many rows that begins at that row, if it was scored."""
        return self.blocks.get((start, rows))

    def put(self, start: int, result: "LogMarginal") -> None:
        """Append a block.

        Raises:
            OutputError: the disk refused; what was written before is intact.
        """
        self.blocks[start, len(result.estimate)] = result
        text = self.body(start, result)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                # A line that a crash cut off is ended first. One write: processes side by side do not mix their lines.
                end = os.fstat(descriptor).st_size
                first = self.header + ",".join(["row", *table_of(result)]) + "\n" if end == 0 else "\n"
                data = (first + text).encode()
                if os.write(descriptor, data) != len(data):
                    raise OSError(None, "the disk is full")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"{self.path}: could not be written ({error.strerror or error})") from error

    def clear(self) -> None:
        """Forget what was scored."""
        for path in (self.path, self.check_path):
            path.unlink(missing_ok=True)
        self.blocks, self.found = {}, 0

    @property
    def check_path(self) -> Path:
        """Where the check of an annealed setting is kept."""
        return self.path.with_suffix(".json")

    def check(self, annealed: "Annealed", make: "Callable[[], Sandwich]") -> "Sandwich":
        """The check of an annealed setting on simulated data: the one that is kept here, or a new one."""
        import torch

        from pyrovae.inference.annealed import Sandwich

        try:
            kept = json.loads(self.check_path.read_text())
            forward, reverse, acceptance = (torch.tensor(kept[name], dtype=torch.float64) for name in SANDWICH)
        except (OSError, ValueError, KeyError, TypeError):
            made = make()
            write_atomically(self.check_path, json.dumps({name: getattr(made, name).tolist() for name in SANDWICH}))
            return made
        return Sandwich(torch.empty(0), forward, reverse, acceptance, self.settings["K"], annealed)

    def columns(self) -> int:
        """How many numbers a row has."""
        from pyrovae.inference.log_marginal import PER_ROW, curve_sizes

        return len(PER_ROW) + len(curve_sizes(self.settings["K"]))

    def tidy(self, rows: int) -> None:
        """When all rows are scored, write each once, without what a crash or a process beside this one left.

        Raises:
            OutputError: the disk refused; the earlier file is intact.
        """
        text, start = "", 0
        while start < rows:
            lengths = [n for first, n in self.blocks if first == start]
            if not lengths:
                return
            text += self.body(start, self.blocks[start, max(lengths)])
            start += max(lengths)
        heading = self.header + ",".join(["row", *table_of(next(iter(self.blocks.values())))]) + "\n"
        if self.path.read_text(errors="replace") != heading + text:
            write_atomically(self.path, heading + text)

    @staticmethod
    def body(start: int, result: "LogMarginal") -> str:
        """A block as text."""
        rows = zip(*(column.tolist() for column in table_of(result).values()), strict=True)
        lines = [f"{start + i},{','.join(map(repr, values))}\n" for i, values in enumerate(rows)]
        return "".join(lines) + closing(lines)

    def parse(self, lines: list[str]) -> "LogMarginal":
        """A block's lines as results."""
        import torch

        from pyrovae.inference.log_marginal import PER_ROW, LogMarginal, curve_sizes

        values = torch.tensor([list(map(float, line.split(",")[1:])) for line in lines], dtype=torch.float64)
        columns: dict[str, Any] = dict(zip(PER_ROW, values.T[: len(PER_ROW)], strict=True))
        columns["zero_weights"] = columns["zero_weights"].long()
        sizes = curve_sizes(self.settings["K"])
        curve = dict(zip(sizes, values.T[len(PER_ROW) :], strict=True))
        return LogMarginal(
            **columns, curve=curve, num_particles=self.settings["K"], estimator=self.settings["estimator"]
        )


def table_of(result: "LogMarginal") -> "dict[str, Tensor]":
    """What is kept of each row, by the name of its column."""
    from pyrovae.inference.log_marginal import PER_ROW

    columns = {"log_marginal" if name == "estimate" else name: getattr(result, name) for name in PER_ROW}
    return columns | {f"L_{k}": values for k, values in result.curve.items()}


def closing(lines: list[str]) -> str:
    """The line that ends a block."""
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return f"# rows {lines[0].split(',')[0]} to {lines[-1].split(',')[0]}, sha256 {digest}\n"
