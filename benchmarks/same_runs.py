"""Whether a change of the code leaves runs as they were: metrics, weights and log p(x) at a fixed seed.

    python benchmarks/same_runs.py record DIR [--source TREE] [--mnist ROOT]
    python benchmarks/same_runs.py compare BEFORE AFTER

`record` trains and scores each configuration by the code in TREE (this one), on one thread; `compare` says of each
whether the two are the same to the last bit, and if not, by how much they differ. ROOT is where torchvision has MNIST.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

MNIST = ("--data", "mnist", "--epochs", "2", "--eval-K", "200", "--eval-rows", "200")
DIGITS = ("--data", "digits", "--epochs", "8", "--eval-K", "200")
RUNS: dict[str, tuple[str, ...]] = {
    "digits, VAE, ELBO, eager": (*DIGITS, "--elbo", "elbo", "--compile", "off"),
    "digits, VAE, beta warm-up, compiled": (*DIGITS, "--elbo", "elbo", "--beta", "warmup:3", "--compile", "on"),
    "digits, VAE, IWAE, compiled": (*DIGITS, "--elbo", "iwae", "--K", "5", "--compile", "on"),
    "digits, hierarchical, IWAE in chunks, eager": (
        *DIGITS,
        *("--model", "hierarchical", "--latent-dim", "10,5", "--elbo", "iwae", "--K", "6", "--particle-chunk", "2"),
        *("--prior", "MixtureOfGaussians", "--guide", "LowRankNormal", "--compile", "off"),
    ),
    "digits, mixture": (*DIGITS[:4], "--model", "mixture"),
    "pinwheel, Gaussian, full covariance, Renyi": (
        *("--data", "pinwheel", "--epochs", "8", "--eval-K", "200", "--elbo", "renyi", "--K", "5", "--latent-dim", "2"),
        *("--guide", "FullCovarianceNormal", "--likelihood", "Gaussian", "--prior", "MixtureOfGaussians"),
    ),
    "digits, IWAE, two processes": (*DIGITS, "--elbo", "iwae", "--K", "5", "--compile", "on"),
    "MNIST, VampPrior, Renyi, compiled": (
        *MNIST,
        *("--elbo", "renyi", "--K", "3", "--prior", "VampPrior", "--prior.components", "20", "--compile", "on"),
    ),
    "MNIST, hierarchical, capacity, eager": (
        *MNIST,
        *("--model", "hierarchical", "--latent-dim", "20,10", "--beta", "capacity:10:1", "--compile", "off"),
    ),
    "MNIST, mixture": ("--data", "mnist", "--epochs", "1", "--model", "mixture", "--model.components", "5"),
    "MNIST from a file, streamed, IWAE, compiled": (
        *("--data", "FILE", "--binarize", "dynamic", "--stream", "on"),
        *(*MNIST[2:], "--elbo", "iwae", "--K", "5", "--compile", "on"),
    ),
}
CLOCKS = ("seconds", "rows_per_second")


def record(directory: Path, source: Path, mnist: Path | None) -> None:
    """Run every configuration."""
    directory.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"}
    for number, (name, words) in enumerate(RUNS.items()):
        if "MNIST" in name and mnist is None:
            print(f"{name}: passed over, without --mnist")
            continue
        options = list(words)
        if "FILE" in options:
            from torchvision.datasets import MNIST as Images

            options[options.index("FILE")] = file = str(directory / "mnist.npy")
            np.save(file, Images(mnist, train=True).data.numpy()[:20_000])
        elif "mnist" in options:
            options += ["--data-root", str(mnist)]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"] if "processes" in name else []
        out = directory / str(number)
        command = [sys.executable, *launcher, "-m", "pyrovae.fit", *options]
        command += ["--seed", "1", "--threads", "1", "--device", "cpu", "--no-plots", "--out", str(out)]
        started = time.perf_counter()
        ended = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True)
        (directory / f"{number}.log").write_text(ended.stdout + ended.stderr)
        ended.check_returncode()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def numbers(run: Path) -> dict[str, np.ndarray]:
    """Everything that a run came to, by name."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {f"metrics: {key}": [float(row[key] or "nan") for row in rows] for key in rows[0] if key not in CLOCKS}
    evaluation = json.loads((run / "evaluation.json").read_text())
    found |= {f"evaluation: {k}": [v] for k, v in evaluation.items() if isinstance(v, int | float)}
    last = max((run / "checkpoints").iterdir())
    weights = load_file(last / "weights.safetensors")
    return {k: np.asarray(v, dtype=np.float64) for k, v in found.items()} | {
        f"weights: {k}": v for k, v in weights.items()
    }


def compare(before: Path, after: Path) -> bool:
    """Print what differs; whether nothing does."""
    same = True
    for number, name in enumerate(RUNS):
        if not all((directory / str(number) / "evaluation.json").exists() for directory in (before, after)):
            continue
        then, now = (numbers(directory / str(number)) for directory in (before, after))
        differing = {}
        for key in dict.fromkeys([*then, *now]):
            a, b = then.get(key), now.get(key)
            if a is None or b is None or a.shape != b.shape:
                differing[key] = math.inf
            elif not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                differing[key] = float(np.nanmax(np.abs(a.astype(float) - b.astype(float))))
        log_p = then["evaluation: log_marginal"][0]
        print(f"{name}: log p(x) {log_p:.6f}, {len(then)} quantities, ", end="")
        print("the same to the last bit" if not differing else f"{len(differing)} differ")
        for key, difference in differing.items():
            print(f"    {key}: {'only in one, or of another shape' if math.isinf(difference) else f'{difference:.3g}'}")
        same &= not differing
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--mnist", type=Path)
    options = parser.parse_args()
    if options.what == "record":
        record(options.directories[0].resolve(), options.source, options.mnist and options.mnist.resolve())
    elif not compare(*options.directories):
        sys.exit(1)


if __name__ == "__main__":
    main()
