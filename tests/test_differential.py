"""Training and log p(x) against plain loops, on pairs drawn at random from a grammar.

    python tests/test_differential.py [--pairs 2000] [--start 0] [--compiler]

trains and scores as many pairs, and says what differed. The reference shares nothing with the library but the seeds of
its noise: `.backward()`, torch's plainest optimiser, bounds written out below, and one particle of one row at a time.
With --compiler, graphs go through torch's compiler, which takes seconds each; otherwise they are run as they are.
"""

import argparse
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from random_pairs import RandomPair
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae.inference import ELBO, IWAE, Capacity, Cyclical, LinearWarmup, Renyi, fit, log_marginal
from pyrovae.inference.tracing import compiler
from pyrovae.seeding import derive_seed

# Sums in another order, and what a few steps make of them.
ROUNDING = {torch.float64: {"rtol": 1e-8, "atol": 1e-8}, torch.float32: {"rtol": 1e-3, "atol": 1e-3}}
# Eager and compiled, in one go and resumed; in the script, every so many pairs, since tracing takes longest.
MODES = [("off", False), ("off", True), ("on", False), ("on", True)]
EVERY = (1, 1, 4, 16)
MOST = 1000.0  # nats per datum of a pair that diverges by itself, and makes differences of rounding large
MOVED = 1e-3  # how far training moves some parameter at least, to be worth a comparison

# An optimiser by its name, with the form that `fit` runs; eps is as large as to keep rounding from becoming a step.
FUSED, FOREACH = {"fused": True}, {"foreach": True}
OPTIMISERS: dict[str, tuple[type, dict, dict]] = {
    "Adam": (torch.optim.Adam, FUSED, {"lr": 0.03, "eps": 1e-2}),
    "AMSGrad": (torch.optim.Adam, FUSED, {"lr": 0.03, "eps": 1e-2, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, FUSED, {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, FOREACH, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
    "SGD": (torch.optim.SGD, FUSED, {"lr": 2e-3, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, FUSED, {"lr": 0.03, "eps": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {}, {"lr": 0.01, "eps": 1e-1, "momentum": 0.5}),
    "NAdam": (torch.optim.NAdam, {}, {"lr": 0.03, "eps": 1e-2}),
}


class Training:
    """What a pair is trained by: a function of its number."""

    def __init__(self, number: int, pair: RandomPair) -> None:
        pick = random.Random(f"training {number}").choice
        self.pair, self.seed = pair, number
        self.name = pick([*OPTIMISERS])
        self.particles, self.averages = pick([1, 2, 3]), pick([1, 1, 2])
        self.objective_name = pick(
            ["elbo", "elbo", "sampled", "warmup", "cyclical", "capacity", "iwae", "renyi", "pyro"]
        )
        self.chunk = pick([None, 1, 2]) if self.objective_name != "pyro" and not pair.moments else None
        self.batch_size, self.rows, self.epochs = (*pick([(3, 8), (4, 8), (5, 7)]), 2)
        self.decays, self.binarises = pick([True, False, False]), pair.kind == "bits" and pick([True, False])
        self.stop = pick([1, 2, 3])

    def objective(self) -> ELBO:
        """The objective, to be given to `fit`."""
        k, m = self.particles, self.averages
        return {
            "elbo": lambda: ELBO(k, num_averages=m),
            "sampled": lambda: ELBO(k, num_averages=m, kl="sampled", beta=0.5),
            "warmup": lambda: ELBO(k, num_averages=m, beta=LinearWarmup(2.0, steps=5)),
            "cyclical": lambda: ELBO(k, num_averages=m, beta=Cyclical(1.0, period=3, rise=0.5)),
            "capacity": lambda: ELBO(k, num_averages=m, beta=Capacity(2.0, steps=3, gamma=3.0)),
            "iwae": lambda: IWAE(k, m),
            "renyi": lambda: Renyi(0.4, k, m),
            "pyro": lambda: Trace_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
        }[self.objective_name]()

    def optimiser(self, parameters: list[Tensor], plainest: bool = False) -> torch.optim.Optimizer:
        """The optimiser in its form, or in a loop over parameters."""
        kind, form, options = OPTIMISERS[self.name]
        return kind(parameters, **options, **({"foreach": False} if plainest else form))

    def schedule(self, optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The rate of each epoch."""
        return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda epoch: 1 / (1 + epoch))

    def transform(self, x: Tensor) -> Tensor:
        """Rows, or bits drawn with their values as probabilities."""
        return torch.bernoulli(0.2 + 0.6 * x) if self.binarises else x

    @property
    def chunks(self) -> list[int]:
        """Particles at a time."""
        total = self.particles * self.averages
        parts = math.ceil(total / (self.chunk or total))
        return [len(range(i, total, parts)) for i in range(parts)]


# ----------------------------------------------------------------------------------------------------- the plain loops


def trained_plainly(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Tensors of a pair before and after training, and the mean loss of each epoch."""
    pyro.clear_param_store()
    pair = RandomPair(number)
    how = Training(number, pair)
    model, guide = pair.programs()
    moments = {name: b.clone() for name, b in pair.named_buffers()}
    with poutine.trace(param_only=True), torch.random.fork_rng(devices=[]):
        loss_of(how, model, guide, how.transform(pair.data(2)), 0)  # declares what `pyro.param` does
    pair.load_state_dict(moments, strict=False)
    declared = [p for _, p in pyro.get_param_store().named_parameters()]
    optimiser = how.optimiser([p for p in pair.parameters() if p.requires_grad] + declared, plainest=True)
    schedule = how.schedule(optimiser)
    rows, before, losses, step = pair.data(how.rows), tensors(pair), [], 0
    for epoch in range(how.epochs):
        total = 0.0
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive_seed(number, "order", epoch)))
        for batch in order.split(how.batch_size):
            torch.manual_seed(derive_seed(number, "step", step, 0))
            loss = loss_of(how, model, guide, how.transform(rows[batch]), step)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total, step = total + loss.item(), step + 1
        losses.append(total / len(rows))
        if not abs(losses[-1]) < MOST:
            raise ValueError(f"a loss of {losses[-1]:g} nats")
        if how.decays:
            schedule.step()
    return before, tensors(pair), losses


def tensors(pair: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a pair holds, in Pyro's store too."""
    store = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
    return {name: t.detach().clone() for name, t in pair.state_dict().items()} | store


def loss_of(how: Training, model: Callable, guide: Callable, x: Tensor, step: int) -> Tensor:
    """-bound, summed over the rows of x."""
    if how.objective_name == "pyro":
        return how.objective().differentiable_loss(model, guide, x)
    if len(how.chunks) == 1:
        return -bound(how, [traces(model, guide, x, how.chunks[0])], step).sum()
    seed, found = int(torch.randint(2**62, ()).item()), []
    for i, size in enumerate(how.chunks):
        torch.manual_seed(seed + i)
        found.append(traces(model, guide, x, size))
    return -bound(how, found, step).sum()


def traces(model: Callable, guide: Callable, x: Tensor, particles: int) -> tuple[poutine.Trace, poutine.Trace]:
    """Traces of draws of the guide, and of the model at them."""
    with pyro.plate("draws", particles, dim=-2):
        q = poutine.trace(guide).get_trace(x)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob()
    return p, q


def bound(how: Training, found: list[tuple[poutine.Trace, poutine.Trace]], step: int) -> Tensor:
    """The objective of each row, written out."""
    names = [name for name in found[0][1].stochastic_nodes if name in found[0][0]]
    names = [name for name in names if name.startswith("z")]
    of_x = torch.cat([p.nodes["x"]["log_prob"] for p, _ in found])
    priors = {name: torch.cat([p.nodes[name]["log_prob"] for p, _ in found]) for name in names}
    guides = {name: torch.cat([q.nodes[name]["log_prob"] for _, q in found]) for name in names}
    log_w = of_x + sum(priors.values()) - sum(guides.values())
    if how.objective_name in ("iwae", "renyi"):
        power = 1.0 if how.objective_name == "iwae" else 0.6
        groups = [log_of_mean(power * group) / power for group in log_w.split(how.particles)]
        return sum(groups) / len(groups)
    if how.objective_name == "sampled":
        return (of_x + 0.5 * (log_w - of_x)).mean(0)
    kl = torch.zeros_like(of_x)
    for name in names:
        # The sites above it in the model are drawn before it in the guide: the KL has a closed form given them.
        above = [f"z{i}" for i in range(int(name[1:]))]
        first = set(above) <= set(names[: names.index(name)])
        exact = [gaussian_kl(q.nodes[name]["fn"], p.nodes[name]["fn"]) for p, q in found] if first else [None]
        sampled = guides[name] - priors[name]
        kl = kl + (
            sampled
            if exact[0] is None
            else torch.cat([k.expand(len(q_), -1) for k, q_ in zip(exact, sampled.split(how.chunks), strict=True)])
        )
    mean = kl.mean(0)
    if how.objective_name == "capacity":
        return of_x.mean(0) - 3.0 * (mean.mean() - 2.0 * min(1, step / 3)).abs()
    beta = {"elbo": 1.0, "warmup": 2.0 * min(1, step / 5), "cyclical": min(1, (step % 3) / 1.5)}[how.objective_name]
    return of_x.mean(0) - beta * mean


def log_of_mean(values: Tensor) -> Tensor:
    """log of the mean of exp(values) along the first dimension."""
    largest = values.detach().max(0).values
    return largest + (values - largest).exp().mean(0).log()


def gaussian(fn: dist.Distribution) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of a Gaussian, or of the logarithm of a log-normal."""
    if isinstance(fn, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
        return fn.mean, fn.covariance_matrix
    base = fn.base_dist if isinstance(fn, dist.Independent) else None
    base = base.base_dist if isinstance(base, dist.LogNormal) else base
    return (base.loc, torch.diag_embed(base.scale.square())) if isinstance(base, dist.Normal) else None


def gaussian_kl(q: dist.Distribution, p: dist.Distribution) -> Tensor | None:
    """KL(q || p) of two Gaussians by their covariances; None where one is something else."""
    of_q, of_p = gaussian(q), gaussian(p)
    if of_q is None or of_p is None:
        return None
    (m, s), (n, t) = of_q, of_p
    precision, d = torch.linalg.inv(t), (m - n).unsqueeze(-1)
    squared = (d.mT @ precision @ d).squeeze(-1).squeeze(-1)
    trace = (precision @ s).diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (trace + squared - m.shape[-1] + torch.logdet(t) - torch.logdet(s))


@torch.no_grad()
def scored_plainly(model: Callable, guide: Callable, x: Tensor, chunks: list[int], seed: int) -> Tensor:
    """log p(x) of each row from the draws of all rows together, then one particle of one row at a time."""
    torch.manual_seed(derive_seed(seed, "log_marginal", 0))
    drawn = []
    for size in chunks:
        with pyro.plate("draws", size, dim=-2):
            q = poutine.trace(guide).get_trace(x)
        drawn.append({name: q.nodes[name]["value"] for name in q.stochastic_nodes if name.startswith("z")})
    result = []
    for n in range(len(x)):
        weights = []
        for z, size in zip(drawn, chunks, strict=True):
            for k in range(size):
                here = {name: value[k, n : n + 1] for name, value in z.items()}
                one = [poutine.trace(poutine.condition(f, here)).get_trace(x[n : n + 1]) for f in (model, guide)]
                p, q = (trace.log_prob_sum().double() for trace in one)
                weights.append(p - q)
        result.append(log_of_mean(torch.stack(weights)))
    return torch.stack(result)


# ----------------------------------------------------------------------------------------------------- what is compared


class Refused(AssertionError):
    """The numbers are right, but by the pair itself, since what compiled code gave was not."""


def check(number: int, compiled: str, resumed: bool, directory: Path, wanted: tuple | None = None) -> tuple:
    """Train and score the pair of a number both ways; what the reference gave, for the next mode."""
    wanted = wanted or trained_plainly(number)
    before, after, losses = wanted
    assert max((after[name] - before[name]).abs().max() for name in after) > MOVED, "nothing was trained"
    pyro.clear_param_store()
    pair = RandomPair(number)
    how, options = Training(number, pair), {}
    if resumed:
        steps = iter(range(1, 1000))
        train(pair, how, compiled, directory=directory, should_stop=lambda: next(steps) >= how.stop)
        pyro.clear_param_store()
        pair, options = RandomPair(number), {"directory": directory, "resume": True}
    result = train(pair, how, compiled, **options)
    rounding = ROUNDING[pair.dtype]
    assert_close([-epoch["train_bound"] for epoch in result.history], losses, **rounding)
    got = tensors(pair)
    assert_close(got, after, **rounding)
    if result.compiled != (compiled == "on"):
        raise Refused("; ".join(result.notices))
    return wanted


def train(pair: RandomPair, how: Training, compiled: str, **options):
    """`fit`, as the reference trains."""
    return fit(
        *pair.programs(),
        pair.data(how.rows),
        how.objective(),
        epochs=how.epochs,
        batch_size=how.batch_size,
        optimizer=how.optimiser,
        schedule=how.schedule if how.decays else None,
        transform=how.transform,
        seed=how.seed,
        compile=compiled,
        particle_chunk=how.chunk,
        **options,
    )


def check_scores(number: int) -> None:
    """log p(x) of a pair, all rows and particles together, and one by one."""
    pyro.clear_param_store()
    pair = RandomPair(number)
    model, guide = pair.programs()
    pick = random.Random(f"scores {number}").choice
    x, k, chunk = pair.data(pick([1, 3, 5])), pick([2, 3, 5]), pick([1, 2, 10])
    got = log_marginal(model, guide, x, k, chunk, seed=number).estimate
    pair.eval()
    chunks = [min(chunk, k - done) for done in range(0, k, chunk)]
    with torch.random.fork_rng(devices=[]):
        wanted = scored_plainly(model, guide, x, chunks, number)
    assert_close(got, wanted, **ROUNDING[pair.dtype])


@contextmanager
def uncompiled() -> Iterator[None]:
    """Graphs are traced, rewritten and run as they are, not through torch's compiler, which takes seconds."""
    with patch.object(compiler, "inductor", lambda graph, inputs: graph):
        yield


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("number", [*range(9), 21])
def test_training_is_that_of_a_plain_loop(number: int, tmp_path: Path) -> None:
    wanted = None
    for compiled, resumed in MODES if number < 3 else MODES[:2]:
        with uncompiled():
            wanted = check(number, compiled, resumed, tmp_path / f"{compiled} {resumed}", wanted)


def test_log_marginal_is_that_of_a_loop_over_rows_and_particles() -> None:
    for number in range(40):
        check_scores(number)


# ----------------------------------------------------------------------------------------------------------- the script


def main() -> None:
    """Try many pairs, and say which differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="number of the first pair")
    parser.add_argument("--compiler", action="store_true", help="compiled steps alone, through torch's compiler")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, counts, differing = time.time(), Counter(), set()

    def attempt(number: int, what: str, run: Callable[[], object]) -> None:
        try:
            run()
            counts[what] += 1
        except Refused as error:  # torch's compiler is not always right, and is not believed
            counts[f"{what}, refused"] += 1
            print(f"pair {number}: {error}", flush=True)
        except Exception as error:
            differing.add(number)
            print(f"pair {number}, {what}: {type(error).__name__}: {error}", flush=True)

    for number in range(options.start, options.start + options.pairs):
        modes = [("on", False)] if options.compiler else [m for i, m in enumerate(MODES) if number % EVERY[i] == 0]
        with tempfile.TemporaryDirectory() as directory, nullcontext() if options.compiler else uncompiled():
            try:
                wanted = trained_plainly(number)
            except ValueError as error:  # of Pyro, too: it refuses the parameters that a step too long has left
                print(f"pair {number} diverges by itself: {str(error).splitlines()[0]}", flush=True)
                counts["diverging by itself"] += 1
                continue
            for compiled, resumed in modes:
                what = ("compiled" if compiled == "on" else "eager") + ", resumed" * resumed
                attempt(number, what, partial(check, number, compiled, resumed, Path(directory) / what, wanted))
        attempt(number, "scored", partial(check_scores, number))
    print(f"{dict(counts)}; differing: {sorted(differing)}; {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
