"""A run directory, and the pair that it holds.

config.yaml          every option, as --config takes it, with the hash of the rows
metrics.csv          one row per epoch
tensorboard/         the same
checkpoints/         see `pyrovae.inference.training.checkpoint`
codes.safetensors    of a model without a p(x): see `pyrovae.runs.codes`
starts.json          command line, host and versions of each start, see `pyrovae.runs.starts`
evaluation.json      log p(x), its diagnostics and verdict
scores/              log p(x) row by row, see `pyrovae.runs.scores`
gaps.json            where the bound is lost
classification.json  p(y|x), and what it is worth: see `pyrovae.runs.classifying`
plots/
"""

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pyrovae.errors import CheckpointError, DataError, OutputError, UsageError, one_line
from pyrovae.files import inside, is_writable, read_bytes, read_yaml, refuse_links, write_atomically, write_json
from pyrovae.inference.pair import Pair
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.runs import build
from pyrovae.runs.codes import read_codes
from pyrovae.runs.options import DERIVED, PARTS
from pyrovae.runs.recipe import Recipe
from pyrovae.seeding import seeded

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from pyrovae.data import Rows
    from pyrovae.inference.training.checkpoint import Checkpoint
    from pyrovae.runs.build import Model

PLOTS = (
    "training_curves", "samples", "reconstructions", "neighbourhood", "latent_map", "traversals", "k_curve", "gaps",
    "codes", "density", "reliability",
)  # fmt: skip
# What commands write into a run beside config.yaml and the lock: files by name, and how those begin whose names others
# may use as well.
WRITTEN = {
    r"metrics\.csv": b"epoch,",
    r"evaluation(-train|-validation)?\.json": b"",
    r"gaps\.json": b"",
    r"starts\.json": b"{",
    r"classification\.json": b"",
    r"codes\.safetensors": b"",
    rf"plots/({'|'.join(PLOTS)})\.png": b"\x89PNG",
    r"scores/[0-9a-f]{16}\.csv": b"# {",
    r"scores/[0-9a-f]{16}(-repaired)?\.json": b"{",
    r"tensorboard/events\.out\.tfevents\.[^/]+": b"",
    r"checkpoints/step-\d{9,18}/(weights\.safetensors|training\.safetensors|training\.json|manifest\.json)": b"",
}
MOST_LEVELS = 2**16  # of grey, that a configuration may claim
FOLDERS = ("checkpoints", "scores", "plots", "tensorboard")
# What a command that was killed left under a temporary name: .NAME.PID
LEFTOVER = re.compile(r"(^|/)\.([^/]+)\.\d+(?=/|$)")


@dataclass
class Run:
    """A trained run: its directory and recipe; the rest is loaded when asked for."""

    directory: Path
    recipe: Recipe
    notices: list[str] = field(default_factory=list)  # what `model` found: damaged checkpoints, an unfinished run
    unfinished: str = ""  # how far its training has come, where `model` found that it has not ended

    @property
    def name(self) -> str:
        """How tables call it: the name of its directory."""
        return one_line(self.directory.resolve().name)

    @cached_property
    def writable(self) -> bool:
        """Whether results can be kept in it: it may be another user's, or on a disk that is read-only."""
        return is_writable(self.directory)

    def keep(self, name: str, values: dict[str, Any], say: Callable[[str], object] | None = None) -> None:
        """Write results to a JSON file of that name, or say that they are not kept."""
        if self.writable:
            write_json(self.directory / name, values)
        elif say is not None:
            say(f"note: {self.directory} cannot be written to, so that neither {name} nor scores and figures are kept")

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What evaluation.json says of the test rows, in nats per datum; None before there is one.

        Raises:
            CheckpointError: it is damaged.
        """
        return self.stored("evaluation.json", json.loads)

    @property
    def history(self) -> "pd.DataFrame | None":
        """One row of measurements for each epoch, as in metrics.csv; None before there is one.

        Raises:
            CheckpointError: it is damaged.
        """
        import pandas as pd

        return self.stored("metrics.csv", lambda content: pd.read_csv(io.BytesIO(content)))

    def stored(self, name: str, parse: Callable[[bytes], Any]) -> Any:
        """The content of one of its files; None if there is none."""
        try:
            return parse(read_bytes(inside(self.directory, name)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory / name}: cannot be read ({error})") from error

    def rows(self) -> "Rows":
        """The rows it was trained on and is scored on, which are here already: nothing is downloaded.

        Raises:
            DataError: they are not those of the training any more.
        """
        rows = build.build_rows(self.recipe)
        if rows.hash != self.recipe.data_hash:
            raise DataError(
                f"{self.directory}: the data has changed since the training: hash {rows.hash[:12]} now, "
                f"{self.recipe.data_hash[:12]} then ({self.recipe.data}); restore the data, or train anew"
            )
        return rows

    def model(self, device: "torch.device | str" = "cpu") -> "Model":
        """The pair with the weights of its best epoch, in evaluation mode."""
        from pyrovae.models import Reconstruction

        latest = checkpoints.load_latest(self.directory)
        self.notices = list(latest.notices)
        epoch, best_epoch, best_step = position(latest, self.directory)
        planned, patience = self.recipe.epochs, self.recipe.patience
        if epoch < planned and (patience is None or epoch - best_epoch < patience):
            self.unfinished = f"{self.directory}: trained for {epoch} of {planned} epochs so far"
            self.notices.append(self.unfinished)
        saved = latest if best_step in (None, latest.step) else checkpoints.load(self.directory, best_step)
        model = self.pair_with(saved)
        if isinstance(model, Reconstruction):
            read_codes(model, self.directory)
        return model.to(device).eval()

    def pair_with(self, saved: "Checkpoint") -> "Model":
        """The pair that the configuration declares, with a checkpoint's weights.

        Raises:
            CheckpointError: they do not fit. Sizes that the weights do not have are never allocated.
        """
        import torch

        for device in ("meta", "cpu"):  # first without memory
            try:
                with seeded("build"), torch.device(device):
                    model = build.build_model(self.recipe, self.recipe.event_shape)
            except (UsageError, RuntimeError, TypeError, ArithmeticError) as error:
                raise CheckpointError(f"{self.directory / 'config.yaml'}: declares no model ({error})") from error
            tensors = Pair(model.model, model.guide).tensors()
            checkpoints.assign(tensors, saved.weights, f"{self.directory}, step {saved.step}")
        return model


def position(saved: "Checkpoint", directory: Path) -> tuple[int, int, int | None]:
    """How far a checkpoint is trained: epochs finished, the best of them, and its step if there is one.

    Raises:
        CheckpointError: it does not say.
    """
    progress = saved.training.get("progress")
    found: list[Any] = (
        [progress.get(key) for key in ("epoch", "best_epoch", "best_step")] if isinstance(progress, dict) else [""]
    )
    counts = [type(value) is int and value >= 0 for value in found]
    if not all(counts[:2]) or not (counts[2:] == [True] or found[2:] == [None]):
        raise CheckpointError(f"{directory}, step {saved.step}: its training.json says no epoch and best step")
    epoch, best_epoch, best_step = found
    return epoch, best_epoch, best_step


def open_run(directory: str | Path) -> Run:
    """Read a run directory's configuration.

    Raises:
        CheckpointError: there is no run, or its configuration is damaged.
    """
    path = Path(directory)
    if not os.path.isdir(path):
        raise CheckpointError(f"{directory}: no such run directory ({path.absolute()})")
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{directory}: not a run directory, it has no config.yaml ({path.absolute()})")
    run = Run(path, read_recipe(path))
    refuse_links(path)
    return run


def read_recipe(directory: Path) -> Recipe:
    """The recipe of a run, checked.

    Raises:
        CheckpointError: there is none, or it is not as pyrovae.fit writes it.
    """
    file = inside(directory, "config.yaml")
    try:
        content = read_yaml(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); it is not a run's config.yaml") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); it is not a run's config.yaml") from error
    derived = ("data_hash", "event_shape")
    if not isinstance(content, dict) or any(content.get(key) is None for key in (*derived, "likelihood", "version")):
        raise CheckpointError(f"{file}: not written by pyrovae.fit: {' and '.join(derived)} are missing")
    shape, digest = content["event_shape"], content["data_hash"]
    if not isinstance(shape, list) or any(type(size) is not int or size < 1 for size in shape):
        raise CheckpointError(f"{file}: event_shape: expected a list of whole numbers, got {shape!r}")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CheckpointError(f"{file}: data_hash: expected a SHA-256, got {digest!r}")
    classes = content.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{file}: classes: expected a list of words, got {classes!r}")
    levels = content.get("levels", 0)
    if type(levels) is not int or not 0 <= levels <= MOST_LEVELS:
        raise CheckpointError(f"{file}: levels: expected a whole number up to {MOST_LEVELS}, got {levels!r}")
    try:
        recipe = Recipe(**{k: v for k, v in content.items() if k not in DERIVED})
    except (UsageError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if bool(classes) != (recipe.condition is not None or recipe.labels is not None):
        raise CheckpointError(f"{file}: classes: expected those of the condition, {recipe.condition}, got {classes!r}")
    if not recipe.likelihood:
        raise CheckpointError(f"{file}: likelihood: expected one by its name, got {content['likelihood']!r}")
    if bool(levels) != ("levels" in PARTS["likelihood"][recipe.likelihood.name].classes[0].takes):
        raise CheckpointError(f"{file}: levels: expected those of a {recipe.likelihood.name}, got {levels}")
    return recipe.settled(data_hash=digest, event_shape=tuple(shape), classes=tuple(classes), levels=levels)


def load(directory: str | Path) -> "Model":
    """The trained pair of a run directory, with the weights of its best epoch.

    Nothing stored is executed: the configuration is YAML, the weights are safetensors, both verified.

    Args:
        directory: A directory written by `python -m pyrovae.fit`.

    Returns:
        A `VAE`, `HierarchicalVAE` or exact model with `.model(x)` and `.guide(x)`, or a `ConditionalVAE` with
        `.model(x, y)` and `.guide(x, y)`; in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the directory is no run, or all its checkpoints are damaged.
    """
    run = open_run(directory)
    model = run.model()
    for notice in run.notices:
        warnings.warn(notice, stacklevel=2)
    return model


def claim(directory: Path, recipe: Recipe, overwrite: bool) -> None:
    """Make sure that a new run may be written to a directory.

    Raises:
        UsageError: something is there, and it is not certainly a run, which may be replaced.
        CheckpointError: it is a run with a link in it.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UsageError(f"directory {directory}: is a file; choose another", settings=("out",))
    names = [path.name for path in directory.iterdir()]
    if "config.yaml" not in names:
        if all(name == "lock" or LEFTOVER.fullmatch(name) for name in names):
            return
        raise UsageError(f"directory {directory}: is not empty and holds no run; choose another", settings=("out",))
    try:
        theirs = read_recipe(directory)
        refuse_links(directory)
        list(written(directory))
    except UsageError as error:
        raise UsageError(f"directory {directory}: {error}; choose another", settings=("out",)) from error
    if overwrite:
        return
    # A seed that was drawn differs by itself.
    keys = [key for key in theirs.plain() | recipe.plain() if key != "seed" or "seed" in recipe.given]
    other = differences(theirs, recipe, keys)
    what = f"a run of another configuration ({'; '.join(other)})" if other else "a run of this configuration"
    raise UsageError(
        f"directory {directory}: holds {what}; continue it with `resume=True`, replace it with `overwrite=True`, or "
        "choose another directory",
        settings=("resume=True", "overwrite=True", "out"),
    )


def written(directory: Path) -> Iterator[Path]:
    """What commands have written into a run beside its config.yaml, and may remove again.

    Raises:
        UsageError: a file has a name that they use, and is none of theirs.
    """
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        name = LEFTOVER.sub(r"\1\2", relative)
        head = next((head for pattern, head in WRITTEN.items() if re.fullmatch(pattern, name, re.A)), None)
        if path.is_dir():
            continue
        if name == relative and (
            re.match(r"checkpoints/step-\d{9,18}/", name, re.A) if head is None else not begins(path, head)
        ):
            raise UsageError(f"{path} was not written by pyrovae, so the directory is not certainly a run")
        if head is not None or name == "config.yaml" != relative:
            yield path


def of_a_run(path: Path) -> bool:
    """Whether a file has a name that commands write, in a directory with a configuration beside it."""
    path = path.resolve()
    return any(
        (folder / "config.yaml").is_file()
        and any(re.fullmatch(pattern, path.relative_to(folder).as_posix(), re.A) for pattern in WRITTEN)
        for folder in path.parents[:3]
    )


def begins(path: Path, head: bytes) -> bool:
    """Whether a file begins with these bytes, or has none at all, as after a crash."""
    with path.open("rb") as file:
        return file.read(len(head)) in (head, b"")


def clear(directory: Path) -> None:
    """Remove an older run from a directory, and nothing else; its config.yaml is left to be replaced.

    Raises:
        OutputError: something cannot be removed.
    """
    try:
        for path in [*written(directory)]:
            path.unlink()
        for folder in FOLDERS:
            for path in [*sorted((directory / folder).glob("*")), directory / folder]:
                if path.is_dir():
                    with suppress(OSError):  # something else is in it
                        path.rmdir()
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed ({error.strerror})", settings=("overwrite",)) from error


def differences(
    theirs: Recipe, ours: Recipe, keys: Iterable[str], there: str = "there", here: str = "here"
) -> list[str]:
    """What differs between two recipes in some fields, by their settings, with both values."""
    old, new = theirs.options(), ours.options()
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    return [
        f"{name}: {old.get(name)} {there}, {new.get(name)} {here}"
        for name in changed
        # The settings of another choice are no difference of their own.
        if (part := name.split(".")[0]) in keys and (name == part or part not in changed)
    ]


def check_folders(directory: Path) -> None:
    """Refuse a directory in which a file has the name of a folder of runs.

    Raises:
        UsageError: there is one.
    """
    for name in FOLDERS:
        if os.path.lexists(directory / name) and not (directory / name).is_dir():
            raise UsageError(f"{directory / name}: is a file, and runs have a folder of that name; move it away")


def fresh_directory(name: str, parent: Path = Path("runs")) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that does not exist."""
    candidates = (parent / (name if i == 1 else f"{name}-{i}") for i in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


def write_recipe(directory: Path, recipe: Recipe) -> None:
    """Write config.yaml."""
    from pyrovae.version import __version__

    text = yaml.safe_dump({"version": __version__, **recipe.plain()}, sort_keys=False, allow_unicode=True)
    write_atomically(directory / "config.yaml", text)
