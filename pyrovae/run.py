"""A run directory, and the pair that it holds.

config.yaml          every option, as --config takes it, with the hash of the rows
metrics.csv          one row per epoch
tensorboard/         the same
checkpoints/         see `pyrovae.inference.checkpoint`
evaluation.json      log p(x), its diagnostics and verdict
scores/              log p(x) row by row, see `pyrovae.scores`
gaps.json            where the bound is lost
plots/
"""

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pyrovae import config as configuration
from pyrovae.errors import CheckpointError, DataError, OutputError, UsageError
from pyrovae.inference import checkpoint as checkpoints
from pyrovae.inference.pair import Pair
from pyrovae.inference.seeding import seeded

if TYPE_CHECKING:
    import torch

    from pyrovae.config import Config, Model
    from pyrovae.data import Rows

CONTENTS = (
    "config.yaml",
    "metrics.csv",
    "tensorboard",
    "checkpoints",
    "evaluation.json",
    "evaluation-validation.json",
    "evaluation-train.json",
    "scores",
    "gaps.json",
    "plots",
)


@dataclass
class Run:
    """A trained run: its directory and configuration; the rest is loaded when asked for."""

    directory: Path
    config: "Config"
    notices: list[str] = field(default_factory=list)  # what `model` found: damaged checkpoints, an unfinished run
    unfinished: str = ""  # how far its training has come, where `model` found that it has not ended

    @property
    def name(self) -> str:
        """How tables call it: the name of its directory."""
        return self.directory.resolve().name

    def rows(self) -> "Rows":
        """The rows it was trained on and is scored on.

        Raises:
            DataError: they are not those of the training any more.
        """
        config = dict(self.config)
        rows = configuration.build_rows(config)
        if rows.hash != self.config["data_hash"]:
            raise DataError(
                f"{self.directory}: the data has changed since the training: hash {rows.hash[:12]} now, "
                f"{self.config['data_hash'][:12]} then ({self.config['data']}); restore the data, or train anew"
            )
        return rows

    def model(self, device: "torch.device | str" = "cpu") -> "Model":
        """The pair with the weights of its best epoch, in evaluation mode."""
        with seeded("build"):
            model = configuration.build_model(self.config, tuple(self.config["event_shape"]))
        latest = checkpoints.load_latest(self.directory)
        self.notices = list(latest.notices)
        progress, patience = latest.training["progress"], self.config["patience"]
        done, planned = progress["epoch"], self.config["epochs"]
        if done < planned and (patience is None or done - progress["best_epoch"] < patience):
            self.unfinished = f"{self.directory}: trained for {done} of {planned} epochs so far"
            self.notices.append(self.unfinished)
        best = latest.training["progress"]["best_step"]
        saved = latest if best in (None, latest.step) else checkpoints.load(self.directory, best)
        pair = Pair(model.model, model.guide)
        checkpoints.assign(pair.tensors(), saved.weights, f"{self.directory}, step {saved.step}")
        return model.to(device).eval()


def open_run(directory: str | Path) -> Run:
    """Read a run directory's configuration.

    Raises:
        CheckpointError: there is no run, or its configuration is damaged.
    """
    path = Path(directory)
    file = path / "config.yaml"
    if not path.is_dir():
        raise CheckpointError(f"{directory}: no such run directory ({path.resolve()})")
    try:
        content: Any = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not a run directory, it has no config.yaml ({path.resolve()})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}); it is not a run's config.yaml"
        ) from error
    derived = ("data_hash", "event_shape")
    if not isinstance(content, dict) or any(key not in content for key in derived):
        raise CheckpointError(f"{file}: not written by pyrovae.fit: {' and '.join(derived)} are missing")
    shape = content["event_shape"]
    if not isinstance(shape, list) or any(not isinstance(size, int) or size < 1 for size in shape):
        raise CheckpointError(f"{file}: event_shape: expected a list of whole numbers, got {shape!r}")
    try:
        config = configuration.resolve({k: v for k, v in content.items() if k not in configuration.DERIVED})
    except UsageError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return Run(path, config | {key: content[key] for key in derived})


def load(directory: str | Path) -> "Model":
    """The trained pair of a run directory, with the weights of its best epoch.

    Nothing stored is executed: the configuration is YAML, the weights are safetensors, both verified.

    Args:
        directory: A directory written by `python -m pyrovae.fit`.

    Returns:
        A `VAE`, `HierarchicalVAE` or mixture with `.model(x)` and `.guide(x)`, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the directory is no run, or all its checkpoints are damaged.
    """
    run = open_run(directory)
    model = run.model()
    for notice in run.notices:
        warnings.warn(notice, stacklevel=2)
    return model


def claim(directory: Path, config: "Config", overwrite: bool) -> None:
    """Make sure that a new run may be written to a directory.

    Raises:
        UsageError: something is there.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise UsageError(f"--out {directory}: is a file; choose a directory")
    file = directory / "config.yaml"
    if not file.exists():
        if {path.name for path in directory.iterdir()} <= {"lock"}:
            return
        raise UsageError(f"--out {directory}: is not empty and holds no run; choose another")
    if overwrite:
        return
    try:
        keys = differences(yaml.safe_load(file.read_text()) or {}, config)
    except (OSError, ValueError, yaml.YAMLError):
        keys = ["config.yaml cannot be read"]
    what = f"a run of another configuration ({'; '.join(keys)})" if keys else "a run of this configuration"
    raise UsageError(
        f"--out {directory}: holds {what}; continue it with --resume {directory}, replace it with --overwrite, or "
        "choose another --out"
    )


def clear(directory: Path) -> None:
    """Remove an older run from a directory, and nothing else.

    Raises:
        OutputError: something cannot be removed.
    """
    try:
        for name in CONTENTS:
            path = directory / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"--overwrite: {error.filename} cannot be removed ({error.strerror})") from error


def differences(theirs: "Config", ours: "Config") -> list[str]:
    """Keys whose values differ, with both."""
    return [
        f"{configuration.option(key)}: {theirs.get(key)} there, {ours.get(key)} here"
        for key in dict.fromkeys([*theirs, *ours])
        if theirs.get(key) != ours.get(key) and key != "version"
    ]


def fresh_directory(name: str, parent: Path = Path("runs")) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that does not exist."""
    candidates = (parent / (name if i == 1 else f"{name}-{i}") for i in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


def write_config(directory: Path, config: "Config") -> None:
    """Write config.yaml."""
    from pyrovae import __version__

    text = yaml.safe_dump({"version": __version__, **config}, sort_keys=False, allow_unicode=True)
    checkpoints.write_atomically(directory / "config.yaml", text)
