"""Pairs drawn at random from a grammar, each a function of its number alone.

A pair has one to three latent sites and a likelihood, joined by small networks that are written in as many ways as
there are to write a matrix: views, transposes, sums, shared and frozen tensors, `pyro.param` in plain functions. All
of them act on each row by itself, so that every pair is a valid one.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

# How an (i, o) matrix W is made of parameters t(name, *shape), for z @ W.
WEIGHTS: dict[str, Callable[[Any, int, int], Tensor]] = {
    "plain": lambda t, i, o: t("w", i, o),
    "transposed": lambda t, i, o: t("w", o, i).T,
    "stored transposed": lambda t, i, o: t("strided", i, o),
    "view": lambda t, i, o: t("w", i * o).view(i, o),
    "copied from a transpose": lambda t, i, o: t("w", o, i).T.reshape(-1).view(i, o),
    "softmax of a transpose": lambda t, i, o: t("w", o, i).T.softmax(0),
    "rows of a transpose": lambda t, i, o: torch.stack([t("w", o, i).T[k] for k in range(i)]),
    "expanded row": lambda t, i, o: t("w", 1, o).expand(i, o),
    "expanded column": lambda t, i, o: t("w", i, 1).expand(i, o),
    "sum of all": lambda t, i, o: t("w", 2, 3).sum() * t.buffer("fixed", i, o),
    "sum over the first": lambda t, i, o: t("w", 3, i, o).sum(0),
    "mean over the last": lambda t, i, o: t("w", i, o, 2).mean(-1),
    "permuted": lambda t, i, o: t("w", o, 2, i).permute(2, 1, 0).sum(1),
    "joined": lambda t, i, o: torch.cat([t("v", i, 1), t("w", o, i).T], 1)[:, :o],
    "diagonal": lambda t, i, o: t("w", i, i).diagonal()[:, None] * t.buffer("fixed", i, o),
    "indexed": lambda t, i, o: t("w", o + 1, i)[torch.arange(o, 0, -1)].T,
    "outer": lambda t, i, o: t("v", i)[:, None] * t("w", o),
    "triangle": lambda t, i, o: t("w", max(i, o), max(i, o)).tril()[:i, :o] + 0.1,
    "flipped": lambda t, i, o: t("w", o, i).flip(0).T,
    "halves": lambda t, i, o: torch.mul(*t("w", 2 * i, o).chunk(2)),
    "normalised": lambda t, i, o: t("w", o, i).T / t("w", o, i).norm(),
    "used twice": lambda t, i, o: t("w", i, o) + t("w", i, o).roll(1, 0),
    "tied": lambda t, i, o: t(f"tied_{i}_{o}", i, o) if i <= o else t(f"tied_{o}_{i}", o, i).T,
    "frozen": lambda t, i, o: t.frozen("fixed", i, o) * t("w", o),
    "scaled buffer": lambda t, i, o: t.buffer("fixed", i, o) * t("w"),
}
# How z (..., i) becomes (..., o) other than by z @ W.
MAPS: dict[str, Callable[[Any, Tensor, int, int], Tensor]] = {
    "linear": lambda t, z, i, o: t.module("linear", lambda: nn.Linear(i, o))(z),
    "einsum": lambda t, z, i, o: torch.einsum("...i,oi->...o", z, t("w", o, i)),
    "einsum of two": lambda t, z, i, o: torch.einsum("...i,ji,oj->...o", z, t("v", 2, i), t("w", o, 2)),
    "functional": lambda t, z, i, o: F.linear(z, t("w", o, i), t("b", o)),
    "row by matrix": lambda t, z, i, o: (z.unsqueeze(-2) @ t("w", i, o)).squeeze(-2),
    "matrix by column": lambda t, z, i, o: (t("w", o, i) @ z.unsqueeze(-1)).squeeze(-1),
    "product and sum": lambda t, z, i, o: (z.unsqueeze(-1) * t("w", i, o)).sum(-2),
    "convolution": lambda t, z, i, o: F.conv1d(z.reshape(-1, 1, i), t("w", o, 1, i)).reshape(*z.shape[:-1], o),
    "tensordot": lambda t, z, i, o: torch.tensordot(z, t("w", o, i), ([-1], [1])),
}
BIASES: dict[str, Callable[[Any, int], Tensor]] = {
    "two of one gradient": lambda t, o: t("b", o) + t("c", o, 1).view(o),
    "vector": lambda t, o: t("b", o),
    "expanded": lambda t, o: t("b", 1).expand(o),
    "scalar": lambda t, o: t("b"),
    "sum": lambda t, o: t("b", o, 2).sum(),
}
ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tanh": lambda t, h: h.tanh(),
    "relu": lambda t, h: h.relu(),
    "sigmoid": lambda t, h: h.sigmoid(),
    "softplus": lambda t, h: F.softplus(h),
    "elu": lambda t, h: F.elu(h),
    "layer norm": lambda t, h: F.layer_norm(h, h.shape[-1:], 1 + t("gain", h.shape[-1])),
    "dropout": lambda t, h: F.dropout(h.tanh(), 0.3, t.pair.training),
    "none": lambda t, h: h,
}


class Here:
    """A place in a pair: `t(name, *shape)` is the parameter of that name there, made when it is first asked for."""

    def __init__(self, pair: "RandomPair", where: str) -> None:
        self.pair, self.where = pair, where

    def pick(self, what: str, *options: Any) -> Any:
        """One of the options, always the same one."""
        return random.Random(f"{self.pair.number} {self.where} {what}").choice(options)

    def value(self, name: str, *shape: int) -> Tensor:
        """What a tensor starts as: a function of the pair's number and the name."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.pair.number} {name}".encode()))
        spread = 0.5 / max(1, shape[0] if len(shape) > 1 else 1) ** 0.5
        return spread * torch.randn(shape, dtype=torch.float64, generator=generator).to(self.pair.dtype)

    def __call__(self, name: str, *shape: int) -> Tensor:
        name = name if name.startswith("tied") else f"{self.where}_{name}"
        if self.pair.stored:
            if name not in self.pair.initial:
                self.pair.initial[name] = self.value(name, *shape)
            return pyro.param(name, self.pair.initial[name])
        if name not in self.pair.own:
            value = self.value(name, *shape)
            self.pair.own[name] = nn.Parameter(value.T.contiguous().T if name.endswith("strided") else value)
        return self.pair.own[name]

    def positive(self, name: str, *shape: int) -> Tensor:
        """A parameter above 0."""
        if not self.pair.stored:
            return self(name, *shape).exp()
        name = f"{self.where}_{name}"
        if name not in self.pair.initial:
            self.pair.initial[name] = self.value(name, *shape).exp()
        return pyro.param(name, self.pair.initial[name], constraint=constraints.positive)

    def frozen(self, name: str, *shape: int) -> Tensor:
        """A parameter that is not trained."""
        name = f"{self.where}_{name}"
        if name not in self.pair.own:
            self.pair.own[name] = nn.Parameter(self.value(name, *shape), requires_grad=False)
        return self.pair.own[name]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """A tensor that is no parameter."""
        name = f"{self.where}_{name}"
        if name not in dict(self.pair.named_buffers()):
            self.pair.register_buffer(name, self.value(name, *shape))
        return getattr(self.pair, name)

    def module(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """A module, whose parameters start as any others."""
        name = f"{self.where}_{name}"
        if name not in self.pair.modules_made:
            module = make().to(self.pair.dtype)
            for key, parameter in module.named_parameters():
                parameter.data = self.value(f"{name}_{key}", *parameter.shape)
            self.pair.modules_made[name] = module
        return self.pair.modules_made[name]


class RandomPair(nn.Module):
    """The pair of a number; `model` and `guide` are its methods, or plain functions of `pyro.param`.

    Attributes:
        dtype: Of its parameters and data, single or double precision.
        event_shape: Of x.
        kind: "bits", "counts" or "reals": what x is.
        moments: Whether it normalises over the batch in training.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        t = Here(self, "pair")
        self.dtype = t.pick("dtype", torch.float64, torch.float64, torch.float64, torch.float32)
        self.stored = t.pick("stored", True, False, False)
        self.event_shape = t.pick("event", (3,), (5,), (2, 3), (1,))
        self.kind = t.pick("kind", "bits", "reals", "reals", "counts")
        self.moments = t.pick("moments", True, *[False] * 5)
        self.dims = [t.pick(f"dim {i}", 1, 2, 3) for i in range(t.pick("latents", 1, 1, 2, 2, 3))]
        self.families = [
            t.pick(f"family {i}", "normal", "normal", "normal", "lognormal") for i in range(len(self.dims))
        ]
        self.size = torch.Size(self.event_shape).numel()
        self.own, self.modules_made = nn.ParameterDict(), nn.ModuleDict()
        self.initial: dict[str, Tensor] = {}
        if t.pick("idle", True, *[False] * 5):
            self.own["idle"] = nn.Parameter(torch.ones(2, dtype=self.dtype))
        if self.moments:
            self.normalise = nn.BatchNorm1d(self.size, dtype=self.dtype)
        self.make()

    def make(self) -> None:
        """Run the programs once, so that everything they ask for is there."""
        self.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self.programs()[1](self.data(2))
            self.programs()[0](self.data(2))
        self.train()
        if self.stored:  # as before the first run of a plain function
            for name in self.initial:
                del pyro.get_param_store()[name]

    def programs(self) -> tuple[Callable, Callable]:
        """Model and guide: methods of this module, or plain functions that refer to it."""
        if not self.stored:
            return self.model, self.guide
        return (lambda x: RandomPair.model(self, x)), (lambda x: RandomPair.guide(self, x))

    def data(self, n: int) -> Tensor:
        """n rows of data."""
        generator = torch.Generator().manual_seed(self.number)
        draws = torch.rand(n, *self.event_shape, dtype=torch.float64, generator=generator)
        x = {"bits": draws.round(), "counts": (3 * draws).floor(), "reals": 2 * draws - 0.5}[self.kind]
        return x.to(self.dtype)

    # -- Networks

    def map(self, where: str, z: Tensor, size: int) -> Tensor:
        """A linear map of z's last dimension, and a bias."""
        t = Here(self, where)
        if t.pick("is a map", True, False):
            out = MAPS[t.pick("map", *MAPS)](t, z, z.shape[-1], size)
        else:
            out = z @ WEIGHTS[t.pick("weight", *WEIGHTS)](t, z.shape[-1], size)
        return out + BIASES[t.pick("bias", *BIASES)](t, size)

    def net(self, where: str, z: Tensor, size: int) -> Tensor:
        """One or two maps with what is between them."""
        t = Here(self, where)
        if t.pick("deep", True, True, False):
            z = ACTIVATIONS[t.pick("activation", *ACTIVATIONS)](
                t, self.map(f"{where}_first", z, t.pick("hidden", 2, 4))
            )
        return self.map(f"{where}_last", z, size)

    def scale(self, where: str, z: Tensor, size: int) -> Tensor:
        """A scale above 0, of the rows' own or of all."""
        t = Here(self, where)
        form = t.pick("scale", "rows", "vector", "scalar", "fixed")
        if form == "rows":
            return F.softplus(self.net(where, z, size)) + 0.2
        return (
            0.1
            + {"vector": lambda: t.positive("sd", size), "scalar": lambda: t.positive("sd")}.get(
                form, lambda: t.buffer("sd", size).exp()
            )()
        )

    # -- Programs

    def model(self, x: Tensor) -> None:
        """p(z_1) p(z_2 | z_1) ... p(x | z)."""
        values: list[Tensor] = []
        with pyro.plate("data", len(x)):
            for i, dim in enumerate(self.dims):
                values.append(pyro.sample(f"z{i}", self.prior(i, values, dim, x)))
            t = Here(self, "likelihood")
            z = torch.cat(values, -1) if t.pick("of all", True, False) else values[-1]
            out = self.net("likelihood_out", z, self.size)
            pyro.sample("x", self.likelihood(t, z, out), obs=x)

    def prior(self, i: int, above: list[Tensor], dim: int, x: Tensor) -> Any:
        """The distribution of a latent site given those above it."""
        where, family = f"prior{i}", self.families[i]
        t = Here(self, where)
        normal = dist.Normal if family == "normal" else dist.LogNormal
        if above:
            return normal(
                self.net(f"{where}_loc", above[-1], dim), self.scale(f"{where}_scale", above[-1], dim)
            ).to_event(1)
        form = t.pick("form", "standard", "learned", "mixture", "student")
        if form == "learned":
            return normal(t("loc", dim), t.positive("sd", dim)).to_event(1)
        if form == "mixture" and family == "normal":
            parts = dist.Normal(t("loc", 3, dim), t.positive("sd", 3, dim)).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(logits=t("logits", 3)), parts)
        if form == "student" and family == "normal":
            return dist.StudentT(5.0, t("loc", dim), t.positive("sd", dim)).to_event(1)
        return normal(x.new_zeros(dim), x.new_ones(dim)).to_event(1)

    def likelihood(self, t: Here, z: Tensor, out: Tensor) -> Any:
        """The distribution of x given z, from what the network says."""
        shape = (*out.shape[:-1], *self.event_shape)
        if self.kind == "bits":
            form: Any = dist.Bernoulli(logits=out.reshape(shape))
        elif self.kind == "counts":
            form = dist.Poisson((F.softplus(out) + 0.1).reshape(shape))
        else:
            scale = self.scale("likelihood_scale", z, self.size).expand_as(out).reshape(shape)
            form = t.pick("form", dist.Normal, dist.Normal, dist.Laplace)(out.reshape(shape), scale)
        return form.to_event(len(self.event_shape))

    def guide(self, x: Tensor) -> None:
        """q(z_i | x and, perhaps, the site drawn before it), in the model's order or against it."""
        t = Here(self, "guide")
        h = x.flatten(1)
        h = self.normalise(h) if self.moments else h
        order = list(range(len(self.dims)))
        before: Tensor | None = None
        with pyro.plate("data", len(x)):
            for i in reversed(order) if t.pick("against", True, False) else order:
                where, dim = f"guide{i}", self.dims[i]
                inputs = h
                if before is not None and Here(self, where).pick("given the one before", True, False):
                    inputs = torch.cat([h.expand(*before.shape[:-1], -1), before], -1)
                loc = self.net(f"{where}_loc", inputs, dim)
                before = pyro.sample(f"z{i}", self.posterior(i, loc, inputs, dim))

    def posterior(self, i: int, loc: Tensor, inputs: Tensor, dim: int) -> Any:
        """The guide's distribution of a latent site."""
        where = f"guide{i}_scale"
        t = Here(self, where)
        if self.families[i] == "lognormal":
            return dist.LogNormal(loc, self.scale(where, inputs, dim)).to_event(1)
        form = t.pick("form", "factorised", "factorised", "full", "low rank")
        if form == "full":
            tril = t("tril", dim, dim).tril(-1) + t.positive("diagonal", dim).diag()
            return dist.MultivariateNormal(loc, scale_tril=tril)
        if form == "low rank":
            return dist.LowRankMultivariateNormal(
                loc, t("factor", dim, 1), self.scale(where, inputs, dim).expand_as(loc)
            )
        return dist.Normal(loc, self.scale(where, inputs, dim)).to_event(1)
