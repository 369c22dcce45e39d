"""Speed and memory of log p(x): pyrovae eager, compiled and with bf16 products, a loop by hand, and Pythae's `get_nll`.

    python benchmarks/log_marginal.py [RUN] [--rows 100] [--K 5000] [--repeats 7] [--threads N] [--environment DIR]

The model is 784-200-200-50 with tanh, a Bernoulli likelihood and a mean-field guide. RUN, a run of `pyrovae.fit` on
MNIST, gives weights and test rows; without it both are random, which is as fast, but says nothing about the bias of
bf16. All are timed in one run, taken in turn, in image-samples per second (rows x K / median seconds); pyrovae's times
include its diagnostics. Peak memory (on Linux) is that of a process of its own for each, at the given
rows and twice as many.

Pythae is installed into DIR (by default a temporary one), an environment of its own that sees this one's torch. It
gets the same weights and rows through files. `--environment none` leaves it out.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyrovae.inference import log_marginal
from pyrovae.inference.tracing.draws import Compiled
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal

Z, D, H = 50, 784, 200
PARTICLES_AT_ONCE = 50
EAGER, COMPILED, BF16 = "pyrovae, eager", "pyrovae, compiled", "pyrovae, compiled, bf16"
BY_HAND, IN_CACHE, PYTHAE = "by hand, 100 rows x 50", "by hand, 10 rows x 100", "Pythae get_nll"

# Reads weights and rows from argv[1], then for each line on its input writes [seconds, mean log p(x), peak MB].
WORKER = """
import json, sys, time
import numpy as np, torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder

data = {k: torch.from_numpy(v) for k, v in np.load(sys.argv[1]).items()}
k, threads = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)

def layers(name):
    modules = []
    for i in range(3):
        w, b = data[f"{name}{i}.weight"], data[f"{name}{i}.bias"]
        linear = torch.nn.Linear(w.shape[1], w.shape[0])
        linear.weight.data, linear.bias.data = w, b
        modules += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules[:-1])

class Encoder(BaseEncoder):
    def __init__(self):
        super().__init__()
        self.net = layers("encoder")
    def forward(self, x):
        loc, raw = self.net((x - data["shift"]) * data["rescale"]).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=2 * torch.nn.functional.softplus(raw).log())

class Decoder(BaseDecoder):
    def __init__(self):
        super().__init__()
        self.net = layers("decoder")
    def forward(self, z):
        return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))

x = data["x"]
config = VAEConfig(input_dim=(x.shape[1],), latent_dim=data["decoder0.weight"].shape[1], reconstruction_loss="bce")
vae = VAE(config, Encoder(), Decoder()).eval()
for line in sys.stdin:
    rows = x[: int(line)]
    started = time.perf_counter()
    with torch.no_grad():
        value = float(vae.get_nll(rows, n_samples=k, batch_size=100))  # log p, whatever its name
    seconds = time.perf_counter() - started
    # Not ru_maxrss, which a process inherits from the one that started it.
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    print(json.dumps([seconds, value, peak]), flush=True)
"""


def fresh() -> tuple[VAE, Tensor]:
    """A model of random weights, and rows as dark as MNIST's."""
    torch.manual_seed(0)
    vae = VAE(StandardNormal(Z), Bernoulli(MLP(Z, D, hidden=(H, H))), MeanFieldNormal(MLP(D, hidden=(H, H)), Z))
    return vae.eval(), (torch.rand(10_000, D) < 0.13).float()


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


class ByHand:
    """log p(x) as one writes it in torch: blocks of rows, particles along a leading dimension, one logsumexp."""

    def __init__(self, vae: VAE) -> None:
        guide = vae.guides[0]
        self.shift, self.rescale = guide.shift.flatten(), guide.rescale
        first, second, last = *linears(guide.encoder), guide.head
        self.encoder = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        first, second, last = linears(vae.likelihood)
        self.decoder = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

    def chunk(self, loc: Tensor, scale: Tensor, x: Tensor, k: int) -> Tensor:
        noise = torch.randn(k, *loc.shape)
        z = loc + scale * noise
        x = x.expand(k, *x.shape)
        log_likelihood = -binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        return log_likelihood - 0.5 * z.square().sum(-1) + (0.5 * noise.square() + scale.log()).sum(-1)

    @torch.no_grad()
    def __call__(self, x: Tensor, k: int, rows: int, at_once: int) -> float:
        total = 0.0
        for block in x.flatten(1).split(rows):
            loc, raw = self.encoder((block - self.shift) * self.rescale).chunk(2, -1)
            scale = softplus(raw)
            log_w = [self.chunk(loc, scale, block, min(at_once, k - done)) for done in range(0, k, at_once)]
            total += (torch.logsumexp(torch.cat(log_w), 0) - math.log(k)).sum().item()
        return total / len(x)


def contestants(vae: VAE, k: int) -> dict[str, Callable[[Tensor], float]]:
    """Mean log p(x) of rows, in five ways."""

    def ours(x: Tensor, **options: object) -> float:
        return log_marginal(vae.model, vae.guide, x, k, **options).mean  # type: ignore[arg-type]

    by_hand = ByHand(vae)
    return {
        BY_HAND: partial(by_hand, k=k, rows=100, at_once=PARTICLES_AT_ONCE),
        IN_CACHE: partial(by_hand, k=k, rows=10, at_once=100),
        EAGER: ours,
        COMPILED: partial(ours, proposal=Compiled()),
        BF16: partial(ours, proposal=Compiled(precision="bf16")),
    }


class Pythae:
    """Pythae in a process and an environment of its own."""

    def __init__(self, vae: VAE, x: Tensor, k: int, directory: Path) -> None:
        python = directory / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not python.exists():
            venv.create(directory / "env", with_pip=True)
            site = subprocess.check_output(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            )
            Path(site.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
            subprocess.run([python, "-m", "pip", "install", "--quiet", "pythae==0.1.2"], check=True)
        guide = vae.guides[0]
        arrays = {"x": x.flatten(1), "shift": guide.shift.flatten(), "rescale": guide.rescale}
        for name, found in (("encoder", [*linears(guide.encoder), guide.head]), ("decoder", linears(vae.likelihood))):
            for i, linear in enumerate(found):
                arrays |= {f"{name}{i}.weight": linear.weight, f"{name}{i}.bias": linear.bias}
        np.savez(directory / "pair.npz", **{name: t.detach().numpy() for name, t in arrays.items()})
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-c", WORKER, directory / "pair.npz", str(k), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, rows: int) -> tuple[float, float, float]:
        """Seconds, mean log p(x) and peak MB so far, for the first rows."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{rows}\n")
        self.process.stdin.flush()
        seconds, value, peak = json.loads(self.process.stdout.readline())
        return seconds, value, peak

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def peak_of(name: str, arguments: list[str], rows: int) -> float:
    """Peak MB of a fresh process that runs one contestant on that many rows."""
    command = [sys.executable, __file__, *arguments, "--rows", str(rows), "--only", name]
    return float(subprocess.check_output(command, text=True).splitlines()[-1])


def speed(times: dict[str, list[float]], first: dict[str, float], values: dict[str, list[float]], work: int) -> str:
    """The table of speeds, from the seconds of every run."""
    median = {name: statistics.median(t) for name, t in times.items()}
    table = pd.DataFrame(
        {
            "image-samples/s": {name: f"{work / t:,.0f}" for name, t in median.items()},
            "/ by hand": {name: median[BY_HAND] / t for name, t in median.items()},
            "/ Pythae": {name: median.get(PYTHAE, math.nan) / t for name, t in median.items()},
            "first, s": {name: first[name] - t for name, t in median.items()},
            "mean log p(x)": {name: statistics.mean(v) for name, v in values.items()},
        }
    )
    return table.to_string(float_format="{:.2f}".format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--K", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bias-rows", type=int, default=500)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--environment", metavar="DIR")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run:
        from pyrovae.runs.directory import open_run

        run = open_run(options.run)
        vae, x = run.model().eval(), run.rows().test
    else:
        vae, x = fresh()
    ways = contestants(vae, options.K)
    rows = x[: options.rows]
    if options.only:
        ways[options.only](rows)
        # Not ru_maxrss, which a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
        return

    with tempfile.TemporaryDirectory() as temporary:
        pythae = None
        if options.environment != "none":
            directory = Path(options.environment or temporary)
            directory.mkdir(parents=True, exist_ok=True)
            pythae = Pythae(vae, x[: 2 * options.rows], options.K, directory)
        times: dict[str, list[float]] = {name: [] for name in [*ways, *([PYTHAE] if pythae else [])]}
        values: dict[str, list[float]] = {name: [] for name in times}
        first: dict[str, float] = {}
        for i in range(options.repeats + 1):
            for name in times:
                if pythae and name == PYTHAE:
                    seconds, value, _ = pythae(options.rows)
                else:
                    started = time.perf_counter()
                    value = ways[name](rows)
                    seconds = time.perf_counter() - started
                if i == 0:  # a warm-up, in which two of them compile
                    first[name] = seconds
                else:
                    times[name].append(seconds)
                    values[name].append(value)
        print(f"torch {torch.__version__}, cpu, {options.threads} threads, {options.rows} rows, K = {options.K}")
        print(f"median of {options.repeats}; 'first' is what the first call took more: compiling")
        print(speed(times, first, values, options.rows * options.K), flush=True)
        arguments = [*([options.run] if options.run else []), f"--K={options.K}", f"--threads={options.threads}"]
        memory = {
            name: [peak_of(name, arguments, n * options.rows) for n in (1, 2)] for name in (BY_HAND, EAGER, COMPILED)
        }
        if pythae:
            memory[PYTHAE] = [pythae(n * options.rows)[2] for n in (1, 2)]
            pythae.close()
    peaks = pd.DataFrame(memory, index=[f"{options.rows} rows", f"{2 * options.rows} rows"]).T
    print(f"peak memory, MB\n{peaks.round().astype(int).to_string()}", flush=True)
    if options.run:
        paired = [
            log_marginal(
                vae.model, vae.guide, x[: options.bias_rows], options.K, proposal=Compiled(precision=p), seed=1
            )
            for p in ("fp32", "bf16")
        ]
        difference = paired[1].estimate - paired[0].estimate
        print(
            f"bf16 less fp32 on the same noise, {options.bias_rows} rows: {difference.mean():+.4f} ± "
            f"{difference.std() / math.sqrt(len(difference)):.4f} nats; largest {difference.abs().max():.2f}; "
            f"Monte Carlo error of either {paired[0].monte_carlo_error:.4f}"
        )


if __name__ == "__main__":
    main()
