"""Variational autoencoders: a prior, a likelihood and a guide, declared as a Pyro model/guide pair.

    VAE:              p(x, z) = p(z) p(x|z)                                  q(z|x)
    HierarchicalVAE:  p(x, z) = p(zL) ... p(z1|z2) p(x|z1)                   q(z1|x) q(z2|z1) ... q(zL|zL-1)

Both are `BottomUp`: their guide starts at the data. With the pairs of `ladder` and `auxiliary`, whose guides do not,
they have the top-down path of `LatentLayers` in common.

`model(x)` and `guide(x)` are ordinary Pyro programs: every site is inside one plate over the data, and parameters are
those of torch modules (the Pyro parameter store is not used).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise, repeat
from typing import ClassVar, Literal, Protocol

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import UsageError
from pyrovae.models.corruptions import Clean, Corruption
from pyrovae.models.critic import Critic
from pyrovae.models.descent import Onwards, alone, beside, descend
from pyrovae.models.gaps import completed
from pyrovae.models.guides import Guide, check_by_itself
from pyrovae.models.judges import Judge
from pyrovae.models.likelihood import Likelihood
from pyrovae.models.moments import moments_of
from pyrovae.models.priors import Prior
from pyrovae.models.states import State
from pyrovae.models.temperature import tempered
from pyrovae.settings import Number, Whole, check

Shape = Sequence[int]


class Layer(Protocol):
    """p(zL-1|zL): a module that maps the layer above, of `event_shape`, to a distribution of `latent_dim` elements."""

    @property
    def latent_dim(self) -> int: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def __call__(self, z: Tensor, /) -> dist.Distribution: ...


class LatentLayers(nn.Module, ABC):
    """A model with any number L of latent layers, each given those above, and a guide.

    What x depends on is the `code`: z1, or where all layers are handed down all of them side by side, z1 first.

    Args:
        prior: p(zL).
        conditionals: p(z1|z2), ..., p(zL-1|zL), from the data upwards: each a module that maps the layer above to a
            distribution, such as any guide class over a network from Z_above. Empty for L = 1.
        likelihood: p(x|z1), or of what else is handed down to it.
        corruption: What the guide sees of x while it is trained; None: x.
        above: What each layer, and x, is given of those above it: the next one, all, or a state (see `descent`).
        states: How each layer changes the state, from the data upwards; none, if there is no state.
        judge: What looks at x and at what is decoded while it is trained, for an objective that asks; None: nothing.

    Attributes:
        word: What it is called where it is chosen by name.
        of_any_latents: Its latents may be bits or one-hot vectors too.
        layers: There, how many sizes `latent_dim` may have: from so many to so many, or more.
        code_note: What has to be said where mean and standard deviation of `posterior` are shown.
    """

    word: ClassVar[str]
    code_note: ClassVar[str] = ""
    layers: ClassVar[tuple[int, int | None]] = (1, 1)
    of_any_latents: ClassVar[bool] = False

    @abstractmethod
    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Layer],
        likelihood: Likelihood,
        corruption: Corruption | None = None,
        above: Literal["next", "all", "state"] = "next",
        states: Sequence[State] = (),
        judge: Judge | None = None,
    ) -> None:
        super().__init__()
        self.judge = judge
        self.prior = prior
        self.conditionals: Sequence[Layer] = nn.ModuleList(conditionals)  # type: ignore[arg-type, assignment]
        self.likelihood = likelihood
        self.corruption = Clean() if corruption is None else corruption
        self.above = above
        self.states: Sequence[State] = nn.ModuleList(states)  # type: ignore[assignment]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Event shape of x."""
        return self.likelihood.event_shape

    @property
    def latent_sites(self) -> list[str]:
        """Names of the latent sites, from the data upwards: ["z"], or ["z1", ..., "zL"]."""
        layers = len(self.conditionals) + 1
        return ["z"] if layers == 1 else [f"z{i}" for i in range(1, layers + 1)]

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each latent layer, from the data upwards."""
        return [*(layer.latent_dim for layer in self.conditionals), self.prior.latent_dim]

    @property
    def code(self) -> dict[str, int]:
        """The latent sites that x depends on, in order, and the number of elements of each."""
        every = dict(zip(self.latent_sites, self.sizes, strict=True))
        return dict([next(iter(every.items()))]) if self.above == "next" else every

    @property
    def onwards(self) -> Sequence[Onwards]:
        """How each layer changes what is handed down, from the data upwards."""
        return self.states or [alone if self.above == "next" else beside] * len(self.sizes)

    def handed(self, code: Tensor) -> Tensor:
        """What the likelihood is given of a code (*batch, Z)."""
        sizes, above = list(self.code.values()), None
        for z, onwards in reversed(list(zip(code.split(sizes, -1), self.onwards, strict=False))):
            above = onwards(z, above)
        return code if above is None else above

    def latent(self, temperature: float = 1.0) -> Tensor:
        """Sample the latent layers from the prior down to z1, within the caller's plates; what the likelihood is given.

        Args:
            temperature: Of all layers, see `sample`.
        """
        below = [partial(given_above, layer, temperature) for layer in reversed(list(self.conditionals))]
        *onwards, first = self.onwards
        sites = zip(self.latent_sites[:-1][::-1], below, onwards[::-1], strict=True)
        return descend(sites, first(pyro.sample(self.latent_sites[-1], tempered(self.prior(), temperature)), None))

    def model(self, x: Tensor) -> Tensor:
        """p(x, z) as a Pyro model, for x of shape (N, *event).

        Raises:
            DataError: x has values outside the support of the likelihood.
        """
        if dist.is_validation_enabled():  # as it is not in a trace, where x has no values
            self.likelihood.check_support(x)
        with pyro.plate("data", len(x)):
            z = self.latent()
            p = self.likelihood(z)
            x = pyro.sample("x", p, obs=x)
            self.extend(x, z)
            if self.judge is not None and self.training:
                self.judge(x, p, z, self.prior, self.likelihood)
        return x

    def extend(self, x: Tensor, z: Tensor) -> None:
        """Sample what the guide draws beside the latents, given x and what it was, within the plate. Here: nothing."""

    @abstractmethod
    def guide(self, x: Tensor) -> Tensor:
        """q(z|x) as a Pyro guide, for x of shape (N, *event); in training mode that of x as corrupted."""

    @abstractmethod
    def initialise(self, x: Tensor) -> None:
        """Start what is trained at training data x of shape (N, *event): output bias, input centring, pseudo-inputs."""

    @abstractmethod
    def posterior(self, x: Tensor) -> dist.Distribution:
        """q of the code for x of shape (*batch, *event), never corrupted: batch shape `batch`, event shape (Z,)."""

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        mean: bool = False,
        temperature: float = 1.0,
        held: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Draws of x: z from the prior, then x from p(x|z), with torch's random state.

        Args:
            num_samples: How many, at least 1.
            mean: The mean of p(x|z) at each z in place of a draw: without the noise of x, as pictures are shown.
            temperature: Above 0. The noise of every latent layer is times this (`pyrovae.models.temperature`), that of
                x is not. With any but 1 these are no draws of p(x).
            held: Values of latent layers by their site, (Z,) or (num_samples, Z), in the place of draws, such as those
                of upper layers that `drawn` has for a row; the others are drawn given them. None: all are drawn.

        Returns:
            Shape (num_samples, *event).

        Raises:
            UsageError: num_samples is no whole number of at least 1, temperature no number above 0, or the prior has
                no noise to scale.
        """
        check("num_samples", num_samples, Whole(1))
        check("temperature", temperature, Number(above=0))
        fixed = {site: value.expand(num_samples, value.shape[-1]) for site, value in (held or {}).items()}
        with pyro.poutine.block(), pyro.poutine.condition(data=fixed), pyro.plate("samples", num_samples):
            likelihood = self.likelihood(self.latent(temperature))
            return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def drawn(self, x: Tensor) -> dict[str, Tensor]:
        """A draw of every latent layer from q(z|x) for x of shape (N, *event): by site, each (N, Z)."""
        with pyro.poutine.block(), pyro.poutine.trace() as found:
            self.guide(x)
        return {site: found.trace.nodes[site]["value"] for site in self.latent_sites}

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Mean of `posterior`, the code of x: shape (N, Z); of 256 draws where it has no closed form, as for a flow."""
        return moments_of(self.posterior(x), x.device).mean

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x|z) for codes z of shape (*batch, Z), shape (*batch, *event)."""
        return self.likelihood(self.handed(z)).mean

    @torch.no_grad()
    def remarks(self, x: Tensor) -> list[str]:
        """What a user should know of the trained model on rows x (N, *event), in sentences."""
        return self.likelihood.remarks(self.handed(self.encode(x)))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at the code of x, shape (N, *event)."""
        return self.decode(self.encode(x))


def check_arrows(arrows: Iterable[tuple[str, Shape, str, Shape, str]]) -> None:
    """Refuse parts whose shapes differ on both sides of an arrow.

    Args:
        arrows: What is passed on; the shape and name of the one side, and those of the other.

    Raises:
        UsageError: two shapes differ; both sides are named.
    """
    for name, left, left_name, right, right_name in arrows:
        if tuple(left) != tuple(right):
            raise UsageError(f"{name}: {left_name} is {tuple(left)}, {right_name} is {tuple(right)}; make them equal")


def check_latents(layers: Iterable[tuple[Prior | Guide, Guide]]) -> None:
    """Refuse a layer whose p and q are not of the same kind of latents: a mass is not weighed against a density.

    Raises:
        UsageError: they differ; both are named.
    """
    for p, q in layers:
        if p.latents != q.latents:
            raise UsageError(
                f"z: {type(p).__name__} is a distribution of {p.latents}, {type(q).__name__} one of {q.latents}; "
                "choose a prior and a guide of the same"
            )


class BottomUp(LatentLayers, ABC):
    """Latent layers with a guide from the data upwards, each layer given the one below: q(z1|x) q(z2|z1) ...

    Args:
        prior: p(zL).
        conditionals: p(z1|z2), ..., p(zL-1|zL), from the data upwards.
        likelihood: p(x|z1).
        guides: q(z1|x), q(z2|z1), ..., q(zL|zL-1), from the data upwards.
        corruption: What q(z1|x) sees of x while it is trained; None: x.
        critic: What judges draws of the top layer while it is trained, for an objective that asks one; None: nothing.
        judge: What looks at x and at what is decoded while it is trained, for an objective that asks; None: nothing.

    Raises:
        UsageError: neighbouring parts disagree on the number of latent dimensions; both sides are named.
    """

    @abstractmethod
    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Layer],
        likelihood: Likelihood,
        guides: Sequence[Guide],
        corruption: Corruption | None = None,
        critic: Critic | None = None,
        judge: Judge | None = None,
    ) -> None:
        super().__init__(prior, conditionals, likelihood, corruption, judge=judge)
        self.critic = critic
        self.guides: Sequence[Guide] = nn.ModuleList(guides)  # type: ignore[assignment]
        self.check_shapes()

    def check_shapes(self) -> None:
        """Compare the shapes on both sides of every arrow."""
        if len(self.guides) != len(self.conditionals) + 1:
            raise UsageError(
                f"guides: {len(self.conditionals)} conditionals need {len(self.conditionals) + 1} guides, "
                f"got {len(self.guides)}"
            )
        first, top = self.guides[0], self.guides[-1]
        own, decoded = "the guide's latent_dim", "the likelihood's output"
        arrows: list[tuple[str, Shape, str, Shape, str]] = [
            ("x", self.event_shape, decoded, first.event_shape, "the guide's input"),
            ("z", (first.latent_dim,), own, self.likelihood.latent_shape, "the decoder's input"),
        ]
        for below, above in pairwise(self.guides):
            arrows.append(
                ("z", (below.latent_dim,), "a guide's latent_dim", above.event_shape, "the next guide's input")
            )
        for p, (below, above) in zip(self.conditionals, pairwise(self.guides), strict=True):
            arrows.append(("z", (below.latent_dim,), own, (p.latent_dim,), "the conditional's"))
            arrows.append(("z", (above.latent_dim,), own, p.event_shape, "the conditional's input"))
        arrows.append(("z", (top.latent_dim,), own, (self.prior.latent_dim,), "the prior's"))
        check_arrows(arrows)
        for guide in (guide for guide in self.guides if guide.of_one_layer and len(self.guides) > 1):
            raise UsageError(
                f"guide: {type(guide).__name__} has a codebook of its own, of which no other layer knows, and cannot "
                "be used in a hierarchy; use it in a VAE"
            )
        known = [(p, q) for p, q in zip(self.conditionals, self.guides, strict=False) if isinstance(p, Guide)]
        check_latents([*known, (self.prior, top)])
        if self.likelihood.latents not in (None, first.latents):
            raise UsageError(
                f"z: {type(self.likelihood).__name__} takes {self.likelihood.latents}, {type(first).__name__} is a "
                f"distribution of {first.latents}; choose a prior and a guide of the same"
            )

    def guide(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = descend(zip(self.latent_sites, self.guides, repeat(alone), strict=False), self.corruption(x))
            if self.critic is not None and self.training:
                self.critic(z)
        return z

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(z1|x) for x of shape (*batch, *event), never corrupted: batch shape `batch`, event shape (Z,)."""
        return self.guides[0](x)


class VAE(BottomUp):
    """One latent layer: a variational autoencoder, with one latent site "z".

    Args:
        prior: p(z).
        likelihood: p(x|z).
        guide: q(z|x).
        corruption: What q(z|x) sees of x while it is trained; None: x.
        critic: What judges draws of z while it is trained, for an objective that asks one; None: nothing.
        judge: What looks at x and at what is decoded while it is trained, for an objective that asks; None: nothing.

    References:
        Kingma and Welling 2014, Auto-Encoding Variational Bayes, https://arxiv.org/abs/1312.6114
    """

    word = "vae"
    of_any_latents = True

    def __init__(
        self,
        prior: Prior,
        likelihood: Likelihood,
        guide: Guide,
        corruption: Corruption | None = None,
        critic: Critic | None = None,
        judge: Judge | None = None,
    ) -> None:
        super().__init__(prior, [], likelihood, [guide], corruption, critic, judge)
        guide.attach(self.log_joint)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) in nats for x (*batch, *event) and z (S, *batch, Z), shape (S, *batch)."""
        log_p: Tensor = self.prior().log_prob(z) + self.likelihood(z).log_prob(x)
        return log_p

    def initialise(self, x: Tensor) -> None:
        start(self, x)


class HierarchicalVAE(BottomUp):
    """Several latent layers: a VAE with latent sites "z1", ..., "zL".

    Args:
        prior: p(zL).
        conditionals: p(z1|z2), ..., p(zL-1|zL), from the data upwards: each a module that maps the layer above to a
            distribution, such as any guide class over a network from Z_above.
        likelihood: p(x|z1).
        guides: q(z1|x), q(z2|z1), ..., q(zL|zL-1), from the data upwards.
        corruption: What q(z1|x) sees of x while it is trained; None: x.

    Raises:
        UsageError: neighbouring parts disagree on the number of latent dimensions; both sides are named.
    """

    word = "hierarchical"
    layers = (2, None)
    of_any_latents = True

    def __init__(
        self,
        prior: Prior,
        conditionals: Sequence[Guide],
        likelihood: Likelihood,
        guides: Sequence[Guide],
        corruption: Corruption | None = None,
    ) -> None:
        super().__init__(prior, conditionals, likelihood, guides, corruption)
        for layer in guides:
            check_by_itself(layer, "a hierarchy")

    def initialise(self, x: Tensor) -> None:
        start(self, x)


def given_above(layer: Layer, temperature: float, above: Tensor) -> dist.Distribution:
    """p(zL-1|zL) at a temperature."""
    return tempered(layer(above), temperature)


def start(model: BottomUp, x: Tensor) -> None:
    """Start the parts of a model that depend on the data at training data x of shape (N, *event)."""
    whole = completed(x)  # x itself, unless it has gaps
    model.corruption.initialise(whole)
    model.guides[0].initialise(x)
    model.likelihood.initialise(x)
    model.prior.initialise(whole)
    if model.judge is not None:
        model.judge.initialise(whole)
