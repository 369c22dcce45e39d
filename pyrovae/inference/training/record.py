"""What a run shows of itself: its progress, its measurements by epoch, and a bar."""

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.errors import OutputError
from pyrovae.files import inside, write_atomically
from pyrovae.inference.tracing.recording import CompileWarning

if TYPE_CHECKING:
    import pandas as pd

Metrics = dict[str, float]


@dataclass
class Fit:
    """What `fit` returns; the pair itself holds the weights of the best epoch.

    Attributes:
        history: One dictionary of measurements per epoch; `metrics` is the same as a table.
        best_epoch: Epoch (from 1) of the best validation bound, or the last one without validation data.
        stopped: "finished", "early" (patience ran out) or "interrupted".
        step: Gradient steps taken.
        compiled: Whether steps were compiled.
        compile_seconds: What compiling them took; not part of the epochs' `seconds`.
        notices: What the user should read.
    """

    history: list[Metrics] = field(default_factory=list)
    best_epoch: int = 0
    stopped: str = "finished"
    step: int = 0
    compiled: bool = False
    compile_seconds: float = 0.0
    notices: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> "pd.DataFrame":
        """One row per epoch: bounds and terms in nats per datum, rates and counts."""
        import pandas as pd

        return pd.DataFrame(self.history)


@dataclass
class Progress:
    """Where training stands: all that has to be stored beside weights and optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0
    batch: int = 0  # batches done in the current epoch
    total: float = 0.0  # of the current epoch: sum of the objective over rows
    rows: int = 0
    seconds: float = 0.0
    untrained_bound: float | None = None  # of the validation rows, before the first step
    best_bound: float = -math.inf
    best_epoch: int = 0
    best_step: int | None = None
    compiled: list[int] | None = None  # numbers of rows for which steps are compiled, once that is decided
    refused: str | None = None  # why they could not be
    beta: float | None = None  # to which a constraint has adapted it
    losses: list[float] = field(default_factory=list)  # of others than the pair, of the current epoch: sums over rows
    history: list[Metrics] = field(default_factory=list)


class Notices:
    """Sentences for the user, said as they come up if there is somebody to say them to."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self.say, self.texts = say, list[str]()

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        if self.say is not None:
            self.say(text)

    def not_compiled(self, text: str) -> None:
        """A sentence that is a warning where there is nobody to say it to."""
        self(text)
        if self.say is None:
            warnings.warn(text, CompileWarning, stacklevel=2)


def without_bounds(metrics: Metrics) -> Metrics:
    """Measurements of a pair without a density, under names that claim no bound and no KL."""
    named = {name.replace("_bound", "_objective"): value for name, value in metrics.items()}
    return {k: v for k, v in named.items() if k != "validation_elbo" and k != "kl" and not k.startswith("kl_")}


class Record:
    """metrics.csv and TensorBoard records of a run directory; of nothing without one."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.writer: Any = None
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(os.fspath(inside(directory, "tensorboard")))
        except OSError as error:
            raise OutputError(
                f"{error.filename or directory}: cannot be written ({error.strerror or error})"
            ) from error

    def write(self, history: list[Metrics]) -> None:
        """Write the whole table anew, and the last epoch to TensorBoard."""
        if self.directory is None:
            return
        import pandas as pd

        write_atomically(self.directory / "metrics.csv", pd.DataFrame(history).to_csv(index=False))
        for name, value in history[-1].items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name.replace("[", "/").rstrip("]"), value, int(history[-1]["epoch"]))

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is not None:
            self.writer.close()


class Bar:
    """A progress bar over epochs with what is maximised in nats per datum; silent where the output is no terminal."""

    def __init__(self, shown: bool, epochs: int, done: int, name: str = "train_bound") -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=epochs, initial=done, unit="epoch", disable=None if shown else True, leave=False)
        self.drawn, self.label = 0.0, name.replace("_", " ")

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, state: Progress, batches: int) -> None:
        """Show the bound of the current epoch so far."""
        if self.bar.disable or (time.monotonic() - self.drawn < 0.1 and state.batch < batches):
            return
        self.drawn = time.monotonic()
        self.bar.n = round(state.epoch + state.batch / batches, 2)
        last = state.history[-1].get("validation_bound") if state.history else None
        text = f"{self.label} {state.total / state.rows:.2f}" if state.total else "training"
        self.bar.set_postfix_str(text + (f", validation {last:.2f} nats" if last is not None else " nats"))
