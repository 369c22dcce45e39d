"""Time of one training step: pyrovae, the same model written by hand in torch, and Pyro's own objectives in SVI.

    python benchmarks/step_time.py [--device cuda] [--threads N] [--repeats N]

The model is 784-200-200-50 with tanh and a Bernoulli likelihood, in single precision. All are timed in one run, taken
in turn, and the median of many steps is printed in milliseconds, with ratios to the hand-written step. Every step
includes the optimiser (Adam, fused for pyrovae and the hand-written step, Pyro's own for SVI).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyrovae.inference import ELBO, IWAE
from pyrovae.models import MLP, VAE, Bernoulli, MeanFieldNormal, StandardNormal

Z, D, H = 50, 784, 200


def layers(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, after))


def by_pyrovae(x: Tensor, k: int) -> Callable[[], object]:
    vae = VAE(StandardNormal(Z), Bernoulli(MLP(Z, D)), MeanFieldNormal(MLP(D), Z)).to(x.device)
    loss = (IWAE(k) if k > 1 else ELBO())(vae.model, vae.guide)
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(x).backward()
        optimizer.step()

    return step


def by_hand(x: Tensor, k: int) -> Callable[[], object]:
    encoder, decoder = layers(D, 2 * Z).to(x.device), layers(Z, D).to(x.device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loc, raw = encoder(x).chunk(2, -1)
        scale = softplus(raw)
        noise = torch.randn(k, *loc.shape, device=x.device)
        z = loc + scale * noise
        log_likelihood = -binary_cross_entropy_with_logits(decoder(z), x.expand(k, *x.shape), reduction="none").sum(-1)
        if k == 1:
            kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
            bound = log_likelihood[0] - kl
        else:
            log_w = log_likelihood - 0.5 * z.square().sum(-1) + (0.5 * noise.square() + scale.log()).sum(-1)
            bound = torch.logsumexp(log_w, 0)
        (-bound.sum()).backward()
        optimizer.step()

    return step


def by_pyro(x: Tensor, k: int) -> Callable[[], object]:
    encoder, decoder = layers(D, 2 * Z).to(x.device), layers(Z, D).to(x.device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), x.new_ones(Z)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))

    pyro.clear_param_store()
    loss = Trace_ELBO() if k == 1 else RenyiELBO(0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    return lambda: svi.step(x)


def medians(steps: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of each step, taken in turn after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 5):
        for name, step in steps.items():
            if device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= 5:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for batch in (20, 100):
        for k in (1, 5, 50):
            x = (torch.rand(batch, D, device=options.device) < 0.3).float()
            makers = {"by hand": by_hand, "pyrovae": by_pyrovae, "Pyro SVI": by_pyro}
            result = medians({name: make(x, k) for name, make in makers.items()}, options.repeats, options.device)
            ratios = {f"{name} / by hand": result[name] / result["by hand"] for name in ("pyrovae", "Pyro SVI")}
            records.append({"batch": batch, "K": k, **{f"{n}, ms": t for n, t in result.items()}, **ratios})
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, median of {options.repeats}")
    print(pd.DataFrame(records).round(2).to_string(index=False))
