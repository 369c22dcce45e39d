"""Speed of training: pyrovae, the same model by hand in torch, and what else there is, in one run and taken in turn.

    python benchmarks/speed.py [--mnist ROOT] [--cifar10 FILE.npz] [--batch 20,100] [--K 1,5,50] [--quick]
    python benchmarks/speed.py --cost        how the cost of a step of pyrovae grows with K and the batch, alone

Contestants (each a process of its own, see `peers/`; `--only` chooses among these names):

    by-hand            torch as most people write it: Adam as it comes, a DataLoader
    by-hand-compiled   torch written for speed: the loss compiled, Adam fused, denormal numbers flushed to zero
    pyro               Pyro as its VAE example has it, with RenyiELBO(alpha=0) for K > 1
    numpyro            NumPyro as its VAE example has it: jitted steps, an epoch as one fori_loop
    pythae             Pythae's trainer: VAE for K = 1, IWAE for K > 1
    pyrovae-eager      pyrovae without compiling
    pyrovae            pyrovae, compiled

Models, in single precision with Adam at 1e-3: "dense" is 784-200-200-50 with tanh and a Bernoulli likelihood,
"convolutional" is for 3x32x32 with channels 32 and 64 and a Gaussian likelihood of fixed scale. All have the same
layers and number of parameters, which is checked, and all are given the same rows.

What is measured:

    step         One training step, update included, on rows in memory; the median of many. Contestants take turns of
                 a few steps in an order drawn anew for every round, of which the first two do not count.
    epoch        One pass over the 55,000 training rows of MNIST at batch 100, pixels drawn anew at every step,
                 loading of batches included, reading of the file not. One epoch each, in turn; the first is not
                 counted, for in it some compile. Needs --mnist.
    start-up     From the start of the process until it is ready for the first step: imports and building.
    compiling    The first step less a later one, in a process that finds the caches of the compiler empty; and again
                 in one that finds them filled.
    memory       Peak resident memory of the process after its steps; on CUDA, what torch has allocated.
    share        Of the rate of single-precision matrix products of this machine, which is the best of square products
                 of 512 to 2048 with as many threads, measured in the same run. The operations of a step are counted
                 from the layers, not measured: 2 per multiplication and addition, forwards once and backwards twice
                 (for inputs and weights), without the first layer's gradient for x. Only dense layers and
                 convolutions count.

NumPyro and Pythae are installed once into virtual environments under --environments; Pythae's sees the torch of this
one. A contestant that cannot be had is left out, with one line that says why. All have the same number of threads, and
on the CPU are confined to as many cores. For Linux.

Results are written to --out: speed.csv (every figure), speed.md (tables) and speed.png.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
BATCHES = 20  # different batches that steps take in turn
UNTIMED = 2  # steps at the start of a turn
TURN = 0.3  # seconds that a turn of steps should take


@dataclass(frozen=True)
class Contestant:
    label: str
    file: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None


CONTESTANTS = {
    "by-hand": Contestant("by hand", "by_hand.py", ("eager",)),
    "by-hand-compiled": Contestant("by hand, compiled", "by_hand.py", ("compiled",)),
    "pyro": Contestant("Pyro", "pyro_example.py"),
    "numpyro": Contestant("NumPyro", "numpyro_jit.py", environment="numpyro"),
    "pythae": Contestant("Pythae", "pythae_trainer.py", environment="pythae"),
    "pyrovae-eager": Contestant("pyrovae, eager", "by_pyrovae.py", ("eager",)),
    "pyrovae": Contestant("pyrovae, compiled", "by_pyrovae.py", ("compiled",)),
}
BY_HAND, COMPILED, PYROVAE = (CONTESTANTS[name].label for name in ("by-hand", "by-hand-compiled", "pyrovae"))


@dataclass(frozen=True)
class Setting:
    model: str
    batch: int
    K: int

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, K = {self.K}"


@dataclass
class Results:
    """Every figure, and what has to be said about them."""

    records: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, setting: Setting, quantity: str, unit: str, values: Sequence[float]) -> None:
        low, median, high = np.percentile(values, [25, 50, 75])
        self.records.append(
            {
                "contestant": CONTESTANTS[name].label,
                "model": setting.model,
                "batch": setting.batch,
                "K": setting.K,
                "quantity": quantity,
                "unit": unit,
                "median": median,
                "lower_quartile": low,
                "upper_quartile": high,
                "n": len(values),
            }
        )

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.notes.append(text)

    def table(self, quantity: str, model: str | None = None) -> pd.DataFrame:
        """Medians of one quantity: a row per setting, a column per contestant."""
        frame = pd.DataFrame(self.records)
        frame = frame[(frame.quantity == quantity) & (frame.model == (model or frame.model))]
        index = ["model", "batch", "K"]
        wide = frame.pivot_table(index=index, columns="contestant", values="median", aggfunc="median")
        order = [c.label for c in CONTESTANTS.values() if c.label in wide.columns]
        return wide.sort_index(ascending=[False, True, True])[order]

    def write(self, path: Path) -> None:
        pd.DataFrame(self.records).to_csv(path, index=False)


class ContestantError(Exception):
    """A contestant cannot be had, or broke down."""


class Worker:
    """A contestant in its process; it computes only while it is asked something."""

    def __init__(self, python: Path, contestant: Contestant, threads: int, caches: Path) -> None:
        caches.mkdir(exist_ok=True)
        self.started = time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `close`
        counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
        self.process = subprocess.Popen(
            [python, "-W", "ignore", HERE / "peers" / contestant.file, *contestant.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **counts, "TORCHINDUCTOR_CACHE_DIR": str(caches), "TMPDIR": str(caches)},
        )

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """The answer to one request, see `peers/worker.py`."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": self.last_words()}
        if "error" in reply:
            raise ContestantError(reply["error"])
        return reply

    def last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else "the process ended"

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.log.close()


def environment(name: str, directory: Path) -> Path:
    """The interpreter of a virtual environment with what `peers/requirements-NAME.txt` names, made if need be."""
    wanted = (HERE / "peers" / f"requirements-{name}.txt").read_text()
    home = (directory / name).resolve()
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = home / "requirements.txt"  # written last: an environment without it is not whole
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(wanted.split())} into {home.name} ...", flush=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        venv.create(home, with_pip=True, clear=True)
        if name == "pythae":  # it is to have this environment's torch
            where = "import sysconfig; print(sysconfig.get_path('purelib'))"
            site = subprocess.check_output([python, "-c", where], text=True).strip()
            Path(site, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        requirements = HERE / "peers" / f"requirements-{name}.txt"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            raise ContestantError(f"not installed: {lines[-1] if lines else 'pip failed'}")
        stamp.write_text(wanted)
    return python


class Race:
    """The contestants that can be had, and what they are given."""

    def __init__(self, options: argparse.Namespace, scratch: Path, results: Results) -> None:
        self.options, self.scratch, self.results = options, scratch, results
        self.pythons: dict[str, Path] = {}
        for name in options.only:
            contestant = CONTESTANTS[name]
            try:
                if contestant.environment == "numpyro" and options.device != "cpu":
                    raise ContestantError("measured on the CPU only")
                home = contestant.environment
                self.pythons[name] = environment(home, options.environments) if home else Path(sys.executable)
            except (ContestantError, OSError, subprocess.SubprocessError) as error:
                results.note(f"{contestant.label}: left out: {getattr(error, 'strerror', None) or error}")
        self.rows = self.training_rows()

    def training_rows(self) -> Path | None:
        """A file of MNIST's training rows (N, 784), uint8, as pyrovae splits them; None where it is not given."""
        if self.options.mnist is None:
            return None
        from pyrovae.data import load_data

        path = self.scratch / "rows.npy"
        np.save(path, load_data("mnist", self.options.mnist, download=False).train.flatten(1).numpy())
        return path

    def batches_of(self, setting: Setting) -> Path:
        """A file of the batches of x that steps take in turn."""
        path = self.scratch / f"{setting.model}-{setting.batch}.npy"
        if path.exists():
            return path
        generator = np.random.default_rng(0)
        number = BATCHES * setting.batch
        if setting.model == "dense":
            p = np.full((number, 784), 0.13) if self.rows is None else np.load(self.rows)[:number] / 255
            x = generator.random(p.shape) < p
        elif self.options.cifar10:
            levels = np.load(self.options.cifar10)["x_train"][:number]
            x = (levels.transpose(0, 3, 1, 2) if levels.shape[-1] == 3 else levels) / 255
        else:
            x = generator.random((number, 3, 32, 32))
        np.save(path, x.astype(np.float32).reshape(-1, setting.batch, *x.shape[1:]))
        return path

    @contextlib.contextmanager
    def unless_it_fails(self, workers: dict[str, Worker], key: str, setting: Setting) -> Iterator[None]:
        """Go on without a contestant that fails, after saying so."""
        try:
            yield
        except ContestantError as error:
            self.results.note(f"{CONTESTANTS[key.split('|')[0]].label}: left out of {setting}: {error}")
            workers.pop(key, None)

    @contextlib.contextmanager
    def workers(self, settings: dict[str, Setting], caches: str) -> Iterator[dict[str, Worker]]:
        """Contestants, started one after another, for the settings of each.

        Args:
            settings: By key, which is a contestant's name, or a name, "|" and what else tells it from others.
            caches: What compilers keep is shared with processes of the same key that are given the same word here.
        """
        started: list[Worker] = []
        workers: dict[str, Worker] = {}
        given = {"rows": str(self.rows) if self.rows else None, "device": self.options.device}
        x = {key: str(self.batches_of(setting)) for key, setting in settings.items()}
        try:
            for key, setting in settings.items():
                name = key.split("|")[0]
                directory = self.scratch / f"{caches}-{key}"
                worker = Worker(self.pythons[name], CONTESTANTS[name], self.options.threads, directory)
                started.append(worker)
                with self.unless_it_fails(workers, key, setting):
                    answer = worker.ask("build", **vars(setting), x=x[key], **given)
                    ready = time.perf_counter() - worker.started
                    workers[key] = worker
                    self.results.add(name, setting, "start-up", "s", [ready])
                    self.results.add(name, setting, "parameters", "", [answer["parameters"]])
                    self.results.versions |= answer["versions"]
            yield workers
        finally:
            for worker in started:
                worker.close()

    def steps(self, settings: dict[str, Setting], caches: str) -> None:
        """Time steps, in turn; record times, compiling, memory and losses. Arguments as for `workers`."""
        with self.workers(settings, caches) as workers:
            first: dict[str, float] = {}
            number: dict[str, int] = {}
            times: dict[str, list[float]] = {}
            loss: dict[str, float] = {}
            for key in list(workers):
                with self.unless_it_fails(workers, key, settings[key]):
                    [first[key]] = workers[key].ask("steps", number=1)["seconds"]
                    about = statistics.median(workers[key].ask("steps", number=5)["seconds"])
                    number[key] = min(100, max(4, round(TURN / about)))
                    times[key] = []
            for i in range(self.options.repeats):
                for key in random.Random(i).sample(list(workers), len(workers)):
                    with self.unless_it_fails(workers, key, settings[key]):
                        answer = workers[key].ask("steps", number=UNTIMED + number[key])
                        times[key] += answer["seconds"][UNTIMED:]
                        loss[key] = answer["loss"]
            for key, worker in workers.items():
                name, setting = key.split("|")[0], settings[key]
                later = statistics.median(times[key])
                self.results.add(name, setting, "step", "ms", [1e3 * t for t in times[key]])
                self.results.add(name, setting, "compiling", "s", [first[key] - later])
                self.results.add(name, setting, "memory", "MiB", [worker.ask("memory")["MiB"]])
                self.results.add(name, setting, "loss", "nats/row", [loss[key]])
                print(f"{setting}: {CONTESTANTS[name].label}: {1e3 * later:.2f} ms", flush=True)

    def compile_again(self, settings: dict[str, Setting], caches: str) -> None:
        """The first step, less a later one, of processes that find the compiler's caches filled."""
        for key, setting in settings.items():
            with contextlib.suppress(ContestantError), self.workers({key: setting}, caches) as workers:
                for name, worker in workers.items():
                    [first] = worker.ask("steps", number=1)["seconds"]
                    later = statistics.median(worker.ask("steps", number=5)["seconds"])
                    self.results.add(name, setting, "compiling again", "s", [first - later])

    def epochs(self, setting: Setting) -> None:
        """Time epochs, in turn."""
        with self.workers(dict.fromkeys(self.pythons, setting), f"epochs-{setting.K}") as workers:
            times: dict[str, list[float]] = {name: [] for name in workers}
            for i in range(1 + self.options.epochs):
                for name in random.Random(i).sample(list(workers), len(workers)):
                    with self.unless_it_fails(workers, name, setting):
                        seconds = workers[name].ask("epoch")["seconds"]
                        times[name] += [seconds] if i else []
            for name in workers:
                self.results.add(name, setting, "epoch", "s", times[name])
                median = statistics.median(times[name])
                print(f"{setting}: {CONTESTANTS[name].label}: {median:.2f} s per epoch", flush=True)

    def check_parameters(self) -> None:
        """All contestants train the same number of parameters, or this says so."""
        for model, counts in self.results.table("parameters").groupby("model"):
            found = {int(c) for c in counts.to_numpy().ravel() if not math.isnan(c)}
            words = f"{model}: {found.pop():,} parameters in all of them" if len(found) == 1 else ""
            self.results.note(words or f"{model}: the numbers of parameters DIFFER: {sorted(found)}")


def operations(setting: Setting) -> int:
    """Floating-point operations of the dense layers and convolutions of one step."""
    if setting.model == "dense":
        encoder = [784 * 200, 200 * 200, 200 * 100]
        decoder = [50 * 200, 200 * 200, 200 * 784]
    else:  # of a convolution: kernel x channels before x channels after x pixels after
        encoder = [9 * 3 * 32 * 16**2, 9 * 32 * 64 * 8**2, 4096 * 256, 256 * 100]
        decoder = [50 * 256, 256 * 4096, 9 * 64 * 32 * 16**2, 9 * 32 * 3 * 32**2]
    per_row = 6 * sum(encoder) - 2 * encoder[0]
    return setting.batch * (per_row + setting.K * 6 * sum(decoder))


def product_rate(device: str, threads: int) -> float:
    """Operations per second of the best of square single-precision matrix products."""
    import torch

    torch.set_num_threads(threads)
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size, device=device)
        for _ in range(10):
            started = time.perf_counter()
            torch.mm(a, b)
            if device != "cpu":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def markdown(frame: pd.DataFrame, digits: int = 2) -> str:
    """A table with its index as the first columns."""
    frame = frame.reset_index()
    cells = [
        ["–" if v is None or v != v else f"{v:,.{digits}f}" if isinstance(v, float) else str(v) for v in row]
        for row in frame.to_numpy(dtype=object)
    ]
    rule = ["---" if isinstance(v, str) else "---:" for v in frame.iloc[0]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[str(c) for c in frame.columns], rule, *cells])


def tables(results: Results, rate: float) -> Iterator[tuple[str, str]]:
    """Headings and tables of the report."""
    step = results.table("step")
    yield "Step, ms", markdown(step)
    for label in (BY_HAND, COMPILED):
        if label in step:
            yield f"Step, relative to {label} (below 1: faster)", markdown(step.div(step[label], axis=0))
    flops = [operations(Setting(*index)) for index in step.index]
    share = pd.DataFrame(np.array(flops)[:, None] / (step.to_numpy() / 1e3) / rate, step.index, step.columns)
    yield f"Share of the rate of matrix products ({rate / 1e9:,.0f} GFLOP/s), %", markdown(100 * share, 1)
    frame = pd.DataFrame(results.records)
    if (frame.quantity == "epoch").any():
        epoch = results.table("epoch")
        yield "Epoch of MNIST at batch 100, s", markdown(epoch)
        for label in ("Pyro", "Pythae", "NumPyro"):
            if label in epoch:
                yield f"Epoch, relative to {label} (below 1: faster)", markdown(epoch.div(epoch[label], axis=0))
    yield "Peak memory, MiB", markdown(results.table("memory"), 0)
    yield "Compiling (first step less a later one, caches empty), s", markdown(results.table("compiling"))
    chosen = frame[frame.quantity.isin(["start-up", "compiling again"])]
    medians = chosen.groupby(["contestant", "quantity"])["median"].median().unstack().reindex(step.columns)
    yield "Start-up, and compiling with caches filled, s", markdown(medians)
    yield "Loss after the steps, nats per row", markdown(results.table("loss"))


def describe(options: argparse.Namespace, versions: dict[str, str]) -> str:
    """Machine, versions and date, in one line."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    device = cpu
    if options.device != "cpu":
        import torch

        device = f"{torch.cuda.get_device_name()}, {cpu}"
    found = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    python = platform.python_version()
    return f"{device}; {options.threads} threads; python {python}, {found}; {datetime.date.today()}"


def draw(results: Results, path: Path) -> None:
    """Step time relative to the compiled step by hand: a panel per setting, a line per contestant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    step = results.table("step")
    ratio = step.div(step[COMPILED], axis=0)
    groups = list(dict.fromkeys((model, batch) for model, batch, _ in ratio.index))
    ks = sorted(set(ratio.index.get_level_values("K")))
    labels = list(ratio.columns)[::-1]
    size = (2.2 + 2.6 * len(ks), 0.5 + (0.55 + 0.26 * len(labels)) * len(groups))
    figure, axes = plt.subplots(len(groups), len(ks), sharex=True, sharey=True, figsize=size, squeeze=False)
    low, high = float(np.nanmin(ratio)), float(np.nanmax(ratio))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low / 2 < t < high * 2]
    for (model, batch), row in zip(groups, axes, strict=True):
        for k, axis in zip(ks, row, strict=True):
            if (model, batch, k) not in ratio.index:
                axis.set_visible(False)
                continue
            axis.axvline(1, color="0.6", linewidth=1)
            for y, label in enumerate(labels):
                value = ratio.loc[(model, batch, k), label]
                if value != value:
                    axis.text(1, y, " not measured", va="center", fontsize=8, color="0.5")
                    continue
                colour = "#D55E00" if label == PYROVAE else "#0072B2" if label == COMPILED else "0.35"
                axis.plot([1, value], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
                axis.plot(value, y, "o", color=colour, markersize=5)
                side = 1 if value >= 1 else -1
                axis.annotate(
                    f"{value:.2f}",
                    (value, y),
                    (7 * side, 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    fontsize=8,
                    color=colour,
                )
            axis.set_xscale("log")
            axis.set_xlim(low / 1.6, high * 1.7)
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_yticks(range(len(labels)), labels)
            axis.set_ylim(-0.6, len(labels) - 0.4)
            axis.set_title(f"{model}, batch {batch}, K = {k}", fontsize=9, loc="left")
            axis.tick_params(labelsize=9, left=False, labelbottom=True, labelleft=axis is row[0])
            axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("Time of a training step, relative to the compiled step by hand (log scale)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(options: argparse.Namespace, results: Results, rate: float) -> str:
    lines = ["# Speed of training", "", describe(options, results.versions), ""]
    lines += ["Medians; written by `python benchmarks/speed.py`, whose docstring says what is measured and how.", ""]
    lines += [f"- {note}" for note in results.notes]
    for heading, table in tables(results, rate):
        lines += ["", f"## {heading}", "", table]
    return "\n".join(lines) + "\n"


def cost(options: argparse.Namespace, scratch: Path, results: Results) -> str:
    """How the time of a compiled step of pyrovae grows: its table, with the straight line that fits it best."""
    race = Race(options, scratch, results)
    lines = ["# Cost of a step of pyrovae, compiled", ""]
    ks = (1, 5, 50) if options.quick else (1, 2, 5, 10, 20, 50, 100, 200, 500)
    sizes = (20, 50, 100) if options.quick else (20, 50, 100, 200, 400)
    for variable, settings in (
        ("K", [Setting("dense", 100, k) for k in ks]),
        ("batch", [Setting("dense", batch, 5) for batch in sizes]),
    ):
        before = len(results.records)
        race.steps({f"pyrovae|{i}": setting for i, setting in enumerate(settings)}, f"cost-{variable}")
        found = [r for r in results.records[before:] if r["quantity"] == "step"]
        frame = pd.DataFrame(found)[["batch", "K", "median"]].rename(columns={"median": "step, ms"})
        ms = frame["step, ms"].to_numpy()
        frame["µs per particle and row"] = 1e3 * ms / (frame.batch * frame.K)
        # Least squares of relative errors, so that small steps count as much as large ones.
        design = np.stack([np.ones(len(ms)), frame[variable].to_numpy(float)], 1)
        (start, slope), *_ = np.linalg.lstsq(design / ms[:, None], np.ones(len(ms)), rcond=None)
        frame["line, ms"] = start + slope * frame[variable]
        frame["off the line, %"] = 100 * (ms / frame["line, ms"] - 1)
        worst = frame["off the line, %"].abs().max()
        lines += [f"## By {variable}", "", markdown(frame.set_index(["batch", "K"])), ""]
        verdict = "linear within 10 %" if worst <= 10 else "not linear within 10 %"
        lines += [f"{start:.3g} ms + {slope:.3g} ms x {variable}; at most {worst:.1f} % off: {verdict}.", ""]
    lines[2:2] = [describe(options, results.versions), ""]
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in CONTESTANTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CONTESTANTS)}, got {', '.join(unknown)}")
    return chosen


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--batch", type=numbers, default=[20, 100], help="batch sizes of the dense model")
    parser.add_argument("--K", type=numbers, default=[1, 5, 50], help="numbers of particles of the dense model")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["dense", "convolutional"])
    parser.add_argument("--repeats", type=int, default=20, help="rounds of turns")
    parser.add_argument("--epochs", type=int, default=5, help="epochs that are counted")
    parser.add_argument("--only", type=names, default=list(CONTESTANTS), metavar="NAMES")
    parser.add_argument("--quick", action="store_true", help="the dense model at batch 100 and K = 1, 5; few repeats")
    parser.add_argument("--cost", action="store_true", help="how the cost of a step grows, and nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--mnist", type=Path, metavar="ROOT", help="directory of torchvision's MNIST")
    parser.add_argument("--cifar10", type=Path, metavar="FILE", help=".npz with x_train; random numbers otherwise")
    parser.add_argument("--environments", type=Path, default=HERE / ".environments", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.K, options.models, options.repeats, options.epochs = [100], [1, 5], ["dense"], 3, 3
    if options.cost:
        options.only = ["pyrovae"]
    return options


def main() -> None:
    options = parse()
    if options.device == "cpu":  # contestants inherit this
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if options.cost:
            text = cost(options, scratch, results)
            (options.out / "cost.md").write_text(text)
            results.write(options.out / "cost.csv")
            print(text)
            return
        race = Race(options, scratch, results)
        settings = [Setting("dense", batch, k) for batch in options.batch for k in options.K]
        settings += [Setting("convolutional", 100, k) for k in (1, 5)]
        settings = [setting for setting in settings if setting.model in options.models]
        if not race.pythons or not settings:
            sys.exit("nothing to measure: choose other contestants (--only) or models (--models)")
        rate = 0.0
        for i, setting in enumerate(settings):
            rate = max(rate, product_rate(options.device, options.threads))
            everybody = dict.fromkeys(race.pythons, setting)
            race.steps(everybody, f"steps-{i}")
            if i == 0:
                race.compile_again(everybody, f"steps-{i}")
            results.write(options.out / "speed.csv")
        if race.rows is None:
            results.note("epochs: left out, for want of --mnist; steps of the dense model are on random rows")
        elif "dense" in options.models:
            for k in (1, 5):
                race.epochs(Setting("dense", 100, k))
                results.write(options.out / "speed.csv")
        if options.cifar10 is None and "convolutional" in options.models:
            results.note("steps of the convolutional model are on random rows, for want of --cifar10")
        race.check_parameters()
    results.write(options.out / "speed.csv")
    text = report(options, results, rate)
    (options.out / "speed.md").write_text(text)
    print(text)
    if COMPILED in results.table("step"):
        draw(results, options.out / "speed.png")


if __name__ == "__main__":
    main()
