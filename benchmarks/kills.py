"""Runs that are killed at random moments and resumed until they end.

    python benchmarks/kills.py [--kills 300] [--only NAME ...] [--seed 0] [--out benchmarks/results/kills.md]

A kill is SIGKILL to a run and all that it has started: launcher, workers, compiler. It falls at a random moment, start,
compiling and evaluation included. The run is then continued (`--resume`, or anew where nothing had been written) and
killed again, until it ends; a run that was never killed says what the end must be. Counted are

    lost        kills after which no checkpoint as new as the newest one before them could be loaded
    unequal     runs whose end is not that of the run never killed, bit for bit: weights, optimiser, history, log p(x)
    unusable    directories that accept neither --resume nor a fresh start

The runs are tiny, and are forked from a process that has imported what they need, so that a kill takes a second and
nearly all of a run is worth killing. Those of several processes are started by torchrun.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from pyrovae import command, fit
from pyrovae.errors import CheckpointError
from pyrovae.inference.training import checkpoint as checkpoints

SMALL = "--latent-dim 2 --network.hidden 8 --epochs 10 --batch-size 40 --eval-K 20 --eval-rows 10 --seed 1 --no-plots"
DEEP = SMALL.replace("--latent-dim 2", "--model hierarchical --latent-dim 3,2")
CONV = SMALL.replace("--network.hidden 8", "--network conv --network.channels 2,4")
MIXTURE = "--model mixture --model.components 3 --epochs 10 --batch-size 40 --eval-rows 10 --seed 1 --no-plots"
COMPILED = "--compile on"

# Options of each configuration; the data are files that `write_data` makes.
CONFIGURATIONS = {
    "elbo": f"--data bits.npy {SMALL}",
    "iwae": f"--data bits.npy --elbo iwae --K 4 {SMALL}",
    "renyi": f"--data bits.npy --elbo renyi --alpha 0.3 --K 4 --M 2 {SMALL}",
    "beta warmup": f"--data bits.npy --beta warmup:4 {SMALL}",
    "beta capacity": f"--data bits.npy --beta capacity:3:4 {SMALL}",
    "dynamic binarisation": f"--data grey.npy {SMALL}",
    "fixed binarisation": f"--data grey.npy --binarize fixed {SMALL}",
    "dequantised grey levels": f"--data grey.npy --likelihood gaussian {SMALL}",
    "scale per dimension": f"--data plane.npy --likelihood.scale per-dimension --likelihood gaussian {SMALL}",
    "scale predicted, standardised": (
        f"--data plane.npy --likelihood gaussian --likelihood.scale predicted --standardize {SMALL}"
    ),
    "prior of a mixture": f"--data bits.npy --prior mixture --prior.components 3 {SMALL}",
    "VampPrior": f"--data bits.npy --prior vamp --prior.components 3 {SMALL}",
    "full covariance": f"--data bits.npy --guide full {SMALL}",
    "low rank": f"--data bits.npy --guide low-rank --guide.rank 1 {SMALL}",
    "hierarchical": f"--data bits.npy {DEEP}",
    "mixture of Bernoullis": f"--data bits.npy {MIXTURE}",
    "mixture of Gaussians": f"--data plane.npy {MIXTURE}",
    "convolutions": f"--data grey.npy {CONV}",
    "schedule staged": f"--data bits.npy --schedule staged {SMALL}",
    "schedule cosine, RMSprop": f"--data bits.npy --schedule cosine --optimizer RMSprop {SMALL}",
    "patience": f"--data bits.npy --patience 2 --lr 0.05 {SMALL.replace('--epochs 10', '--epochs 30')}",
    "particles in chunks": f"--data bits.npy --elbo iwae --K 6 --particle-chunk 2 {SMALL}",
    "rows from the file": f"--data bits.npy --stream on {SMALL}",
    "ragged last batch, dropout": f"--data bits.npy --network.dropout 0.2 {SMALL.replace('size 40', 'size 37')}",
    "two processes": f"--data bits.npy {SMALL}",
    "compiled, cold": f"--data bits.npy {COMPILED} {SMALL}",
    "compiled IWAE in chunks, cold": f"--data grey.npy --elbo iwae --K 4 --particle-chunk 2 {COMPILED} {SMALL}",
    "compiled, warm": f"--data bits.npy {COMPILED} {SMALL}",
}
SEVERAL = ("two processes",)
# What is measured by a clock, and so is not the same twice.
TIMES = ("rows_per_second", "seconds")


@dataclass
class Tally:
    """What became of the runs of one configuration."""

    kills: int = 0
    ended: int = 0
    before_first: int = 0  # kills before there was a checkpoint
    lost: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def write_data(folder: Path) -> None:
    """The three files of the configurations."""
    rng = np.random.default_rng(0)
    centres = rng.random((3, 12))
    np.save(folder / "bits.npy", (rng.random((200, 12)) < centres[rng.integers(3, size=200)]).astype(np.float32))
    np.save(folder / "grey.npy", rng.integers(0, 256, (200, 8, 8), dtype=np.uint8))
    np.save(folder / "plane.npy", (rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3))).astype(np.float32))


def start(words: Sequence[str], folder: Path, log: Path, several: bool) -> int:
    """Start a run in a process group of its own; returns its process."""
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if several:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*launcher, "-m", "pyrovae.fit", *words],
                cwd=folder,
                env=os.environ | settings,
                stdout=output,
                stderr=output,
                start_new_session=True,
            ).pid
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(folder)
    os.environ.update(settings)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        command.main("fit", fit.command, words)
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    finally:
        os._exit(70)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a process, or None if it has not ended in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(pid: int) -> int:
    """Kill a run with all that it has started; returns how it ended, which may have been just before."""
    started = psutil.Process(pid).children(recursive=True)  # launcher and compiler give theirs groups of their own
    os.killpg(pid, signal.SIGKILL)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=30)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest(run: Path) -> int:
    """Step of the newest checkpoint that can be loaded, -1 without one."""
    try:
        return checkpoints.load_latest(run).step
    except CheckpointError:
        return -1


def whole(folder: Path, name: str, run: str, tag: str) -> tuple[Path, float]:
    """A run that is never killed, and the seconds it takes."""
    log = folder / f"{tag}.log"
    begin = time.monotonic()
    pid = start([*CONFIGURATIONS[name].split(), "--out", run], folder, log, name in SEVERAL)
    code = wait(pid, 900)
    if code != 0:
        raise SystemExit(f"{name}: the run that is not killed ended with {code}: {log.read_text()[-2000:]}")
    return folder / run, time.monotonic() - begin


def campaign(name: str, kills: int, folder: Path, rng: random.Random) -> Tally:
    """Kill runs of a configuration so many times, and see each to its end."""
    words, several = CONFIGURATIONS[name].split(), name in SEVERAL
    reference, seconds = whole(folder, name, "reference", "reference")
    if "cold" not in name:
        _, seconds = whole(folder, name, "again", "again")  # what it takes with warm caches
        faults = differences(reference, folder / "again")
        if faults:
            raise SystemExit(f"{name}: two runs that are not killed differ: {faults}")
    tally = Tally()
    run, had, attempt = 0, -1, 0
    while True:
        directory = folder / f"run-{run}"
        log = folder / f"run-{run}.log"
        if "cold" in name:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        continuing = ["--resume", directory.name]
        fresh = [*words, "--out", directory.name]
        begun = attempt > 0 and (directory / "config.yaml").exists()
        pid = start(continuing if begun else fresh, folder, log, several)
        # Most kills before the end of a run; some later, so that evaluation is met as well.
        code = wait(pid, rng.uniform(0.0, 1.1 * seconds)) if tally.kills < kills else wait(pid, 900)
        if code is None:
            code = kill(pid)
            tally.kills += 1
        attempt += 1
        if code == -signal.SIGKILL:
            now = newest(directory)
            tally.before_first += now < 0
            if now < had:
                tally.lost.append(f"run {run}, attempt {attempt}: step {had} before the kill, {now} after it")
            had = max(had, now)
            continue
        if code == 0:
            tally.ended += 1
            if faults := differences(reference, directory):
                tally.unequal.append(f"run {run} after {attempt - 1} kills: {faults}")
            shutil.rmtree(directory)
        else:
            said = log.read_text().strip().splitlines()[-1:]
            tally.unusable.append(f"run {run}, attempt {attempt}: ended with {code}: {said}")
        if tally.kills >= kills:
            return tally
        run, had, attempt = run + 1, -1, 0


def differences(one: Path, other: Path) -> str:
    """In what two runs differ that should be one and the same."""
    first, second = checkpoints.load_latest(one), checkpoints.load_latest(other)
    found = []
    if first.step != second.step:
        found.append(f"steps {first.step} and {second.step}")
    found += [f"weights {key}" for key in unequal(first.weights, second.weights)]
    for key in ("optimizer", "scheduler"):
        found += [f"{key}{path}" for path in unequal(first.training[key], second.training[key])]
    found += [f"progress{path}" for path in unequal(first.training["progress"], second.training["progress"])]
    # One more may be there: of a kill between the writing of a checkpoint and the removal of an older one.
    kept = [{p.name for p in (run / "checkpoints").glob("step-*")} for run in (one, other)]
    if not kept[0] <= kept[1]:
        found.append(f"checkpoints {sorted(kept[0])} and {sorted(kept[1])}")
    scored = [json.loads((run / "evaluation.json").read_text()) for run in (one, other)]
    found += [f"evaluation{path}" for path in unequal(*scored)]
    tables = [(run / "metrics.csv").read_text().splitlines() for run in (one, other)]
    names = tables[0][0].split(",")
    timed = [i for i, column in enumerate(names) if column in TIMES]
    rows = [[[c for i, c in enumerate(line.split(",")) if i not in timed] for line in table] for table in tables]
    if rows[0] != rows[1]:
        found.append("metrics.csv")
    return ", ".join(found[:5])


def unequal(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nested values are not the same, bit for bit; times are left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if key not in TIMES]
        missing = [f"{path}/{key}" for key in keys if key not in one or key not in other]
        return missing + [p for k in keys if k in one and k in other for p in unequal(one[k], other[k], f"{path}/{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [p for i, (a, b) in enumerate(zip(one, other, strict=True)) for p in unequal(a, b, f"{path}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.numpy().tobytes() == other.numpy().tobytes() else [path]
    same = one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other))
    return [] if same else [path]


def table(tallies: dict[str, Tally], seconds: float) -> str:
    """The outcome as a page."""
    total = Tally()
    lines = []
    for name, tally in tallies.items():
        counts = [len(tally.lost), len(tally.unequal), len(tally.unusable)]
        lines.append(
            f"| {name} | {tally.kills} | {tally.before_first} | {tally.ended} | " + " | ".join(map(str, counts))
        )
        for key in ("kills", "ended", "before_first", "lost", "unequal", "unusable"):
            setattr(total, key, getattr(total, key) + getattr(tally, key))
    faults = [f"- {name}: {fault}" for name, t in tallies.items() for fault in t.lost + t.unequal + t.unusable]
    head = (
        f"{total.kills} kills over {len(tallies)} configurations: {len(total.lost)} lost, "
        f"{len(total.unequal)} unequal, {len(total.unusable)} unusable."
    )
    return "\n".join(
        [
            "# Runs that are killed and resumed",
            "",
            head,
            "",
            f"By `benchmarks/kills.py`, torch {torch.__version__}, {seconds / 60:.0f} minutes. Kills before the first "
            "checkpoint are those that left nothing to continue from; every run was then seen to its end.",
            "",
            "| configuration | kills | of them before the first checkpoint | runs ended | lost | unequal | unusable |",
            "|---|---|---|---|---|---|---|",
            *(f"{line} |" for line in lines),
            *(["", *faults] if faults else []),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign, write the page, and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="at least so many kills, over all configurations")
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="where the page is written")
    chosen = parser.parse_args(argv)
    warm_up()
    names = chosen.only or list(CONFIGURATIONS)
    began, tallies = time.monotonic(), {}
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_data(folder)
            rng = random.Random(f"{chosen.seed} {name}")
            tally = tallies[name] = campaign(name, -(-chosen.kills // len(names)), folder, rng)
        print(
            f"{name}: {tally.kills} kills, {tally.ended} runs ended; lost {len(tally.lost)}, "
            f"unequal {len(tally.unequal)}, unusable {len(tally.unusable)}",
            *tally.lost,
            *tally.unequal,
            *tally.unusable,
            sep="\n  ",
            flush=True,
        )
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(table(tallies, time.monotonic() - began))
    return sum(len(t.lost) + len(t.unequal) + len(t.unusable) for t in tallies.values())


def warm_up() -> None:
    """Import in this process what every run imports, so that forked ones need not."""
    import importlib

    torch.set_num_threads(1)
    for module in ("accelerate", "jsonargparse", "pandas", "pyro", "tqdm", "torch._dynamo", "torch.utils.tensorboard"):
        importlib.import_module(module)
    for module in ("evaluate", "models", "inference.training.trainer", "runs.directory", "runs.scores", "plots"):
        importlib.import_module(f"pyrovae.{module}")


if __name__ == "__main__":
    sys.exit(min(main(), 1))
