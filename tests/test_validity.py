"""Whether a pair's log-weights are of log p(x): what is refused by name, and that what is accepted is right."""

import functools
import math
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import assert_mean
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as T
from torch.nn import functional as F
from torch.testing import assert_close

import pyrovae
from pyrovae.errors import DataError, NumericalError, PairError, UsageError
from pyrovae.inference import (
    ELBO,
    IWAE,
    Individual,
    fit,
    gaps,
    log_marginal,
    log_weights,
    sandwich,
    to_inference_data,
)
from pyrovae.inference.batch import Batch
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.validity import check_pair, examine
from pyrovae.models import (
    MLP,
    VAE,
    AuxiliaryVAE,
    Bernoulli,
    ConvDecoder,
    ConvEncoder,
    FullCovarianceNormal,
    Gaussian,
    HierarchicalVAE,
    LadderVAE,
    LowRankNormal,
    MeanFieldNormal,
    MixtureOfGaussians,
    Network,
    StandardNormal,
    VampPrior,
)

# z ~ N(0, 1), x ~ N(z, S^2): log p(x) and the posterior in closed form.
S = 0.1
VARIANCE = 1 + S * S
SPREAD = S / math.sqrt(VARIANCE)


def data(n: int = 12) -> Tensor:
    return torch.randn(n) * math.sqrt(VARIANCE)


def truth(x: Tensor) -> Tensor:
    return dist.Normal(0.0, math.sqrt(VARIANCE)).log_prob(x).double()


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def plane(x: Tensor) -> None:
    """x ~ N(z_1 + z_2, 1), with z ~ N(0, I) in two dimensions."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def in_plate(sites: Callable) -> Callable:
    """A guide of what `sites(x)` samples inside the data plate."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            sites(x)

    return guide


def near(x: Tensor, width: float = 1.5) -> Tensor:
    """z around its posterior mean, wider than the posterior."""
    return pyro.sample("z", dist.Normal(x / VARIANCE, width * SPREAD))


def noise(x: Tensor, width: float = 1.5) -> Tensor:
    """The same draw, at an auxiliary site."""
    return pyro.sample("a", dist.Normal(x / VARIANCE, width * SPREAD), infer={"is_auxiliary": True})


ENTRIES: dict[str, Callable] = {
    "log_marginal": lambda m, g, x: log_marginal(m, g, x, 10),
    "gaps": lambda m, g, x: gaps(m, g, x, 10),
    "sandwich": lambda m, g, x: sandwich(m, g, x, 2),
    "to_inference_data": lambda m, g, x: to_inference_data(m, g, x, 2, 10),
    "fit": lambda m, g, x: fit(m, g, x, epochs=1, batch_size=len(x), progress=False),
}


def refused(message: str, m: Callable, g: Callable, x: Tensor, error: type[Exception] = PairError) -> None:
    with pytest.raises(error, match=message) as caught:
        check_pair(Pair(m, g), Batch(x))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Densities


def delta_of(f: Callable, log_density: Callable, width: float = 1.5) -> Callable:
    """z a Delta at f(a), with that log_density."""

    def sites(x: Tensor) -> None:
        a = noise(x, width)
        pyro.sample("z", dist.Delta(f(a), log_density(a)))

    return in_plate(sites)


def observing(x: Tensor) -> None:
    pyro.sample("seen", dist.Normal(0.0, 3.0), obs=x)
    near(x)


def through_a_flow(x: Tensor) -> None:
    base = dist.Normal(x / VARIANCE, 0.8 * SPREAD)
    pyro.sample("z", dist.TransformedDistribution(base, [T.AffineTransform(0.01, -1.7), T.AffineTransform(0.0, -1.0)]))


def with_a_constant(x: Tensor) -> None:
    pyro.sample("constant", dist.Delta(torch.zeros(())), infer={"is_auxiliary": True})
    near(x)


def flagged(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x / VARIANCE, 1.5 * SPREAD), infer={"is_auxiliary": True})


def beside_a_note(x: Tensor) -> None:
    pyro.deterministic("twice", 2 * near(x))


# Guides with a density: what they are, and the guide.
ACCEPTED = {
    "plain": in_plate(near),
    "an observed site": in_plate(observing),
    "a transformed distribution": in_plate(through_a_flow),
    "a constant": in_plate(with_a_constant),
    "a latent that says it is auxiliary": in_plate(flagged),
    "a deterministic site": in_plate(beside_a_note),
    "a Delta at a": delta_of(lambda a: a, torch.zeros_like),
    "a Delta at a, mirrored and shifted": delta_of(lambda a: 0.6 / VARIANCE - a, torch.zeros_like),
    "a Delta at 1.01 a": delta_of(lambda a: 1.01 * a, lambda a: torch.full_like(a, -math.log(1.01))),
    "poutine.mask that leaves all": poutine.mask(in_plate(near), mask=torch.tensor(True)),
}


@pytest.mark.parametrize("guide", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_accepted_gives_log_p_of_x(guide: Callable) -> None:
    """E exp(L_K - log p(x)) = 1, which any guide with a density gives, and one without does not."""
    x = 0.3 * torch.ones(2000)
    result = log_marginal(model, guide, x, 40, seed=1)
    assert_mean((result.estimate - truth(x)).exp(), 1.0, least=0.05)


def a_factor(x: Tensor) -> None:
    near(x)
    pyro.factor("penalty", torch.full((len(x),), -3.0))


def an_unit(x: Tensor) -> None:
    near(x)
    pyro.sample("unit", dist.Unit(torch.full((len(x),), -3.0)), infer={"is_auxiliary": True})


def an_auxiliary_site(x: Tensor) -> None:
    pyro.sample("extra", dist.Normal(0.0, 3.0), infer={"is_auxiliary": True})
    near(x)


def a_mixture_over_a_site(x: Tensor) -> None:
    c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5)), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Normal(x / VARIANCE + 0.1 * c, SPREAD))


def fewer_dimensions(x: Tensor) -> None:
    pyro.sample("z", dist.Delta(noise(x), 0.0))
    pyro.sample("more", dist.Delta(x * 0))


def two_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("more", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, S), obs=x)


REFUSED: dict[str, tuple[str, Callable]] = {
    "a Delta": (
        "'z' is a Delta, which gives the latent one value",
        in_plate(lambda x: pyro.sample("z", dist.Delta(x))),
    ),
    "an expanded Delta": (
        "'z' is a Delta, which gives",
        in_plate(lambda x: pyro.sample("z", dist.Delta(torch.zeros(())).expand((len(x),)).mask(True))),
    ),
    "a factor": ("'penalty' is a pyro.factor", in_plate(a_factor)),
    "a unit": ("'unit' is a pyro.factor", in_plate(an_unit)),
    "an auxiliary site": ("'extra' is auxiliary, and nothing integrates it out", in_plate(an_auxiliary_site)),
    "a site that is mixed over": ("'c' is auxiliary, and nothing integrates", in_plate(a_mixture_over_a_site)),
    "a log_density of another map": ("not log .da/dz., by up to 0.693", delta_of(lambda a: 2 * a, torch.zeros_like)),
    "a log_density that is forgotten": ("not log .da/dz.", delta_of(torch.exp, torch.zeros_like)),
    "a map that folds": ("not one to one", delta_of(lambda a: (a - 0.3).abs(), torch.zeros_like)),
    "a square": ("not one to one", delta_of(lambda a: (a - 0.3) ** 2, lambda a: -(2 * (a - 0.3).abs()).log())),
    "a value that ignores the noise": ("does not depend on it", delta_of(lambda a: a.detach() * 0, torch.zeros_like)),
    "a masked guide": ("'z' is masked differently", poutine.mask(in_plate(near), mask=torch.tensor(False))),
    "a masked distribution": (
        "'z' is masked differently",
        in_plate(lambda x: pyro.sample("z", dist.Normal(x, 1.0).mask(x > 0))),
    ),
    "a scaled guide": (r"'z' is scaled by 0.5 \(poutine.scale\)", poutine.scale(in_plate(near), 0.5)),
    "an observed latent": (
        "'z' is latent in the model, but observed or deterministic in the guide",
        in_plate(lambda x: pyro.sample("z", dist.Normal(x, 1.0), obs=x)),
    ),
    "a deterministic latent": (
        "'z' is latent in the model, but observed or deterministic in the guide",
        in_plate(lambda x: pyro.deterministic("z", x)),
    ),
    "a hidden latent": ("'z' is latent but not in the guide", poutine.block(in_plate(near), hide=["z"])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_guide_without_a_density_is_refused_by_name(case: str) -> None:
    refused(REFUSED[case][0], model, REFUSED[case][1], data() + 0.3)


def test_fewer_noises_than_latents_have_no_density() -> None:
    refused("2 numbers at functions of 1 have no density", two_latents, in_plate(fewer_dimensions), data())


def test_a_map_that_takes_two_values_to_one_is_refused() -> None:
    """(u + iv)^2 has the stretch that it says, of one sign, but (-u, -v) has it too."""

    def sites(x: Tensor, power: int) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True})
        u, v = a.unbind(-1)
        z = torch.stack([u * u - v * v, 2 * u * v] if power == 2 else [2 * u - v, v + torch.sinh(u)], -1)
        log_density = -(4 * (u * u + v * v) if power == 2 else 2 + torch.cosh(u)).log()
        pyro.sample("z", dist.Delta(z, log_density, event_dim=1))

    check_pair(Pair(plane, in_plate(lambda x: sites(x, 1))), Batch(data()))
    refused("not one to one", plane, in_plate(lambda x: sites(x, 2)), data())


@pytest.mark.parametrize("entry", [name for name in ENTRIES if name != "fit"])
@pytest.mark.parametrize("case", ["a Delta", "a factor", "an auxiliary site"])
def test_every_entry_that_reports_log_p_refuses_them(entry: str, case: str) -> None:
    message, guide = REFUSED[case]
    with pytest.raises(PairError, match=message):
        ENTRIES[entry](model, guide, data())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "use",
    [
        lambda *pair_and_x: log_marginal(*pair_and_x, 50),
        lambda *pair_and_x: gaps(*pair_and_x, 50),
        lambda *pair_and_x: fit(*pair_and_x, ELBO(), epochs=1, batch_size=10),
    ],
)
def test_numbers_too_coarse_for_log_densities_are_refused(use: Callable, dtype: torch.dtype) -> None:
    """In bfloat16 log-densities near -110 are 0.5 apart. Data may be: what is computed with them is looked at."""
    vae = VAE(StandardNormal(2), Bernoulli(MLP(2, 3, (4,))), MeanFieldNormal(MLP(3, None, (4,)), 2))
    x = torch.ones(20, 3, dtype=dtype)
    use(lambda x: vae.model(x.float()), lambda x: vae.guide(x.float()), x)
    with pytest.raises(PairError, match=f"log-density is in {dtype}, whose digits are too few .* Pass x.float"):
        use(vae.to(dtype).model, vae.guide, x)


def test_other_kinds_of_numbers_are_refused() -> None:
    """A probability is not weighed against a density, nor anything against an improper prior."""

    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    relaxed = dist.RelaxedBernoulliStraightThrough(torch.tensor(1.0), probs=torch.tensor(0.5))
    refused(
        "'z' is discrete in the model and continuous in the guide",
        discrete,
        in_plate(lambda x: pyro.sample("z", relaxed)),
        data(),
    )

    def improper(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    refused("model site 'z' is ImproperUniform", improper, in_plate(near), data())


def test_masks_that_agree_are_fine() -> None:
    """A latent that is masked on both sides is none: log p(x) of rows without one is that of x alone."""
    x = data()
    kept = x > 0

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(x > 0))
            pyro.sample("x", dist.Normal(torch.where(x > 0, z, torch.zeros(())), S), obs=x)

    guide = in_plate(lambda x: pyro.sample("z", dist.Normal(x / VARIANCE, SPREAD).mask(x > 0)))
    wanted = torch.where(kept, truth(x), dist.Normal(0.0, S).log_prob(x).double())
    assert_close(log_marginal(masked, guide, x, 50).estimate, wanted, rtol=0, atol=1e-4)


def test_a_masked_latent_that_still_matters_is_refused() -> None:
    """Masked alike in both, but x depends on it: the weights are those of no density."""
    leaving = functools.partial(poutine.mask, mask=torch.tensor(False))

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with leaving():
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, S), obs=x)

    refused("'z' is masked, but what is masked still matters", masked, leaving(in_plate(near)), data())


def test_a_latent_that_is_a_function_in_model_and_guide_is_fine() -> None:
    """A Delta site of the model has to be one of the guide as well, and its density is 1 in both."""

    def with_a_function(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            same = pyro.sample("same", dist.Delta(z))
            pyro.sample("x", dist.Normal(same, S), obs=x)

    x = data()
    guide = in_plate(lambda x: pyro.sample("same", dist.Delta(near(x, 1.0))))
    assert_close(log_marginal(with_a_function, guide, x, 20).estimate, truth(x), rtol=0, atol=1e-4)
    dense = in_plate(lambda x: pyro.sample("same", dist.Delta(near(x, 1.0), torch.ones(len(x)))))
    refused("'same' is a Delta with a log_density", with_a_function, dense, x)


def test_transforms_with_a_stretch_of_their_own() -> None:
    """Latents on the simplex and the half-line as functions of unconstrained noise, as automatic guides write them."""

    def constrained(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            s = pyro.sample("s", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(p[..., 0] * s, 1.0), obs=x)

    def guide(x: Tensor, factor: float = 1.0) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 2.0).to_event(1), infer={"is_auxiliary": True})
            v = pyro.sample("v", dist.Normal(0.0, 1.2), infer={"is_auxiliary": True})
            simplex, positive = biject_to(constraints.simplex), biject_to(constraints.positive)
            p, s = simplex(u), positive(v)
            pyro.sample("p", dist.Delta(p, -factor * simplex.log_abs_det_jacobian(u, p), event_dim=1))
            pyro.sample("s", dist.Delta(s, -positive.log_abs_det_jacobian(v, s)))

    x = torch.zeros(5)
    check_pair(Pair(constrained, guide), Batch(x))
    refused("not log .da/dz.", constrained, functools.partial(guide, factor=0.9), x)
    with torch.no_grad():  # against draws from the prior
        s, p = dist.Gamma(2.0, 2.0).sample((400_000,)), dist.Dirichlet(torch.ones(3)).sample((400_000,))[:, 0]
        direct = dist.Normal(p * s, 1.0).log_prob(torch.zeros(())).exp().mean().log().item()
    assert log_marginal(constrained, guide, x, 20_000, seed=1).mean == pytest.approx(direct, abs=0.01)


def test_a_fitted_gaussian_s_guide_is_accepted() -> None:
    """Our own guide of the kind, a Gaussian fitted to each row, is looked at like anybody's."""
    x = data(6)
    fitted = Individual(steps=50).fit(Pair(model, in_plate(near)), Batch(x))
    assert_close(log_marginal(model, fitted.guide, x, 100, seed=0).estimate, truth(x), rtol=0, atol=0.01)


def test_training_by_a_delta_goes_on_under_another_name() -> None:
    """It finds the posterior's mode, and what it reports is called neither bound nor KL."""
    x = data()
    loc = nn.Parameter(torch.zeros(len(x)))

    class Mode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = loc

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(self.loc))

    result = fit(
        model,
        Mode(),
        x,
        epochs=300,
        batch_size=len(x),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        progress=False,
    )
    assert_close(loc.detach(), x / VARIANCE, rtol=0, atol=1e-3)
    assert any("'z' is a Delta" in notice and "no bound" in notice for notice in result.notices)
    assert "train_objective" in result.history[-1]
    assert not any("bound" in name or "kl" in name or "elbo" in name for name in result.history[-1])


def test_observed_sites_of_a_guide_are_no_part_of_its_density() -> None:
    """In log-weights and in every bound alike."""
    x = data()
    for objective in (ELBO(), IWAE(3)):
        torch.manual_seed(1)
        bare = objective.loss(model, in_plate(near), x)
        torch.manual_seed(1)
        assert objective.loss(model, in_plate(observing), x) == pytest.approx(bare, rel=1e-6)
    torch.manual_seed(1)
    bare = log_weights(model, in_plate(near), x, 4)
    torch.manual_seed(1)
    assert_close(log_weights(model, in_plate(observing), x, 4), bare)


# ---------------------------------------------------------------------------------------------------------------------
# Rows and particles


class Topics(nn.Module):
    """Counts of V words in N documents, from z through a decoder that `finish` turns into probabilities."""

    def __init__(self, finish: Callable[[Tensor], Tensor], words: int = 6) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, words), nn.Linear(words, 4)
        self.finish, self.words = finish, words
        if isinstance(finish, nn.Module):
            self.inner = finish

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            probabilities = self.finish(self.decoder(z))
            pyro.sample("x", dist.Multinomial(total_count=8, probs=probabilities, validate_args=False), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def documents(n: int = 9, words: int = 6) -> Tensor:
    return dist.Multinomial(8, probs=torch.ones(n, words)).sample()


def soft(h: Tensor) -> Tensor:
    return torch.softmax(h, -1)


OVER_ROWS = {
    "softmax(dim=1)": lambda h: torch.softmax(h, dim=1),
    "nn.Softmax(1)": nn.Softmax(1),
    "F.normalize": lambda h: soft(F.normalize(h)),
    "log_softmax(1)": lambda h: F.log_softmax(h, 1).exp(),
    "layer norm over rows": lambda h: soft(F.layer_norm(h, h.shape[1:])),
    "mean of rows": lambda h: soft(h - h.mean(-2, keepdim=True)),
    "cumulative": lambda h: soft(h.cumsum(-2)),
    "shifted": lambda h: soft(h.roll(1, -2)),
    "the first row": lambda h: soft(h[:, :1].expand_as(h)),
    "batch statistics": lambda h: soft(
        F.batch_norm(h.flatten(0, 1), None, None, training=True).unflatten(0, h.shape[:2])
    ),
}


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("finish", OVER_ROWS.values(), ids=OVER_ROWS)
def test_rows_that_depend_on_each_other_are_refused(finish: Callable, n: int) -> None:
    pair = Topics(finish)
    refused("log-density of a row depends on the other rows", pair.model, pair.guide, documents(n))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_rows_that_depend_on_each_other(entry: str) -> None:
    pair = Topics(OVER_ROWS["F.normalize"])
    with pytest.raises(PairError, match="depends on the other rows"):
        ENTRIES[entry](pair.model, pair.guide, documents())


def test_particles_that_depend_on_each_other_are_refused() -> None:
    for finish in (lambda h: torch.softmax(h, 0), lambda h: soft(h - h.mean(0))):
        pair = Topics(finish)
        refused("log-density of a particle depends on the other particles", pair.model, pair.guide, documents())


def test_places_of_rows_are_refused() -> None:
    """A row's log-density by its place in the batch would change with every batch."""
    offset = torch.randn(50, 6)
    pair = Topics(lambda h: soft(h + offset[: h.shape[-2]]))
    refused("depends on its place in the batch", pair.model, pair.guide, documents())
    sized = Topics(lambda h: soft(h * h.shape[-2]))
    refused("or on how many rows there are", sized.model, sized.guide, documents())


def test_batch_normalisation_over_rows_is_refused_with_its_cause() -> None:
    """N rows of N features: (K, N, N) fits, with the rows for features."""
    norm = nn.BatchNorm1d(6)
    pair = Topics(nn.Sequential(norm, nn.Softmax(-1)))
    refused(
        r"BatchNorm1d\(6\) was given \(K, N, features\), where it takes rows for features",
        pair.model,
        pair.guide,
        documents(6),
    )
    flat = Topics(Network(nn.Sequential(nn.BatchNorm1d(6), nn.Softmax(-1)), 6, 6))
    before = flat.inner.body[0].running_mean.clone()
    check_pair(Pair(flat.model, flat.guide), Batch(documents(6)))
    assert torch.equal(flat.inner.body[0].running_mean, before)


@pytest.mark.parametrize(
    "input_of",
    [
        lambda x: x.mean(0, keepdim=True).expand(len(x), -1),
        lambda x: x[:1].expand(len(x), -1),
        lambda x: x - x.mean(0),
        lambda x: (x - x.mean()) / x.std(),
        lambda x: x.flip(0),
    ],
    ids=["mean", "size 1", "centred", "standardised", "flipped"],
)
def test_guides_that_look_at_other_rows_are_refused(input_of: Callable) -> None:
    pair = Topics(soft)

    def guide(x: Tensor) -> None:
        pair.guide(input_of(x))

    refused("guide site 'z': the log-density of a row depends on the other rows", pair.model, guide, documents())


def test_a_batch_axis_of_one_that_the_plate_expands_is_refused() -> None:
    pair = Topics(soft)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = pair.encoder(x.mean(0, keepdim=True)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    refused("depends on the other rows", pair.model, guide, documents())


def test_rows_are_looked_at_all_over_x() -> None:
    """A hundred blank documents at the start, each like their mean, do not hide what the others do."""
    pair = Topics(soft)
    x = torch.cat([torch.zeros(100, documents().shape[1]), documents()])

    def guide(x: Tensor) -> None:
        pair.guide(x - x.mean(0))

    with pytest.raises(PairError, match="guide site 'z': the log-density of a row depends on the other rows"):
        log_marginal(pair.model, guide, x, 10)


def test_a_flow_whose_inverse_rounds_is_accepted() -> None:
    """Its own draws need no inverse, while latents that are held fixed do: that is rounding and not noise."""
    there_and_back = [T.AffineTransform(1e4, 1.0, cache_size=1), T.AffineTransform(-1e4, 1.0, cache_size=1)]

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal((x / 3).unsqueeze(-1).expand(-1, 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, there_and_back))

    found = examine(Pair(plane, guide), Batch(2 * data(40)), 20)
    assert found.no_density is None
    assert not found.whole


def test_a_model_that_uses_what_the_guide_kept_of_x_is_refused() -> None:
    """A skip connection past the latents: its log p(x|z) of N(0.5 z + 0.5 x, S) is above any of z alone."""
    kept = {}

    def guide(x: Tensor) -> None:
        kept["x"] = x
        with pyro.plate("data", len(x)):
            near(x)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(0.5 * z + 0.5 * kept["x"], S), obs=x)

    for entry in ("log_marginal", "fit"):
        with pytest.raises(PairError, match=r"log p\(x\|z\) of the model: the model uses what the guide kept of x"):
            ENTRIES[entry](model, guide, data())


# ---------------------------------------------------------------------------------------------------------------------
# Noise that is no site, and where networks are kept


@dataclass
class Kept:
    net: nn.Module


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net


class OfTheClass:
    net: nn.Module


class Callable_:
    def __init__(self, net: nn.Module) -> None:
        self.inner = [{"net": (net,)}]

    def __call__(self, h: Tensor) -> Tensor:
        return self.inner[0]["net"][0](h)


def closed_over(kept: object, get: Callable) -> Callable:
    return lambda h: get(kept)(h)


def nested_closures(net: nn.Module) -> Callable:
    def outer() -> Callable:
        def inner(h: Tensor) -> Tensor:
            return net(h)

        return lambda h: inner(h)

    return outer()


def of_the_class(net: nn.Module) -> Callable:
    OfTheClass.net = net
    return lambda h: OfTheClass.net(h)


def cached(net: nn.Module) -> Callable:
    @functools.lru_cache
    def get() -> nn.Module:
        return net

    return lambda h: get()(h)


def through_a_property(net: nn.Module) -> Callable:
    class Holder:
        def __init__(self) -> None:
            self._net = Kept(net)

        @property
        def apply(self) -> Callable:
            return self._net.net

    holder = Holder()
    return lambda h: holder.apply(h)


def in_a_list_of_a_module(net: nn.Module) -> Callable:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [net]

        def forward(self, h: Tensor) -> Tensor:
            return self.layers[0](h)

    return Forgetful()


PLACES: dict[str, Callable[[nn.Module], Callable]] = {
    "list of dicts": lambda net: lambda h, nets=[{"a": [net]}]: nets[0]["a"][0](h),
    "ordered dict": lambda net: lambda h, nets=OrderedDict(a=(net,)): nets["a"][0](h),
    "dataclass": lambda net: closed_over(Kept(net), lambda kept: kept.net),
    "slots": lambda net: closed_over(Slotted(net), lambda kept: kept.net),
    "namespace": lambda net: closed_over(SimpleNamespace(a=SimpleNamespace(b=net)), lambda kept: kept.a.b),
    "callable object": Callable_,
    "nested closures": nested_closures,
    "class attribute": of_the_class,
    "partial of a partial": lambda net: functools.partial(functools.partial(lambda n, h: n[0](h), [net])),
    "cached function": cached,
    "property": through_a_property,
    "list of a module": in_a_list_of_a_module,
    "bound method": lambda net: Kept(net).__class__(net).net.forward,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_networks_are_found_wherever_they_are_kept(place: Callable) -> None:
    """Dropout is off in evaluation and on again after it; parameters are found for training."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    decoder, encoder, apply = nn.Linear(2, 6), nn.Linear(6, 4), place(net)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(apply(decoder(z)), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    found = {id(p) for p in Pair(model, guide).parameters()}
    assert {id(p) for p in net.parameters()} <= found
    with evaluating(model, guide):
        assert not net[1].training
    x = torch.randn(7, 6)
    torch.manual_seed(1)
    dropped = log_marginal(model, guide, x, 5, seed=1).estimate
    assert net[1].training
    net[1].p = 0.0
    assert_close(log_marginal(model, guide, x, 5, seed=1).estimate, dropped)


HIDDEN: list[nn.Module] = []


@pytest.mark.parametrize(
    "noisy",
    [
        F.dropout,
        lambda h: h + 0.1 * torch.randn_like(h),
        lambda h: h * random.random(),
        lambda h: globals()["HID" + "DEN"][0](h),
    ],
    ids=["F.dropout", "torch.randn", "python's random", "a module out of sight"],
)
@pytest.mark.parametrize("n", [1, 8])
def test_random_numbers_that_are_no_site_are_refused(noisy: Callable, n: int) -> None:
    HIDDEN[:] = [nn.Dropout(0.5)]
    pair = Topics(lambda h: soft(noisy(h)))
    refused("two runs at the same latents give different log-densities", pair.model, pair.guide, documents(n))


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_random_numbers_that_are_no_site(entry: str) -> None:
    pair = Topics(lambda h: soft(F.dropout(h)))
    with pytest.raises(PairError, match="two runs at the same latents"):
        ENTRIES[entry](pair.model, pair.guide, documents())


def test_a_look_leaves_everything_as_it_was() -> None:
    """Random state, modes, buffers, parameters, and Pyro's store."""
    pair = Topics(Network(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Softmax(-1)), 6, 6))
    before = {name: t.clone() for name, t in pair.state_dict().items()}
    pair.inner.body[0].eval()
    modes, x = [module.training for module in pair.modules()], documents()
    state = torch.get_rng_state()
    examine(Pair(pair.model, pair.guide), Batch(x), total=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in pair.modules()]
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_a_look_is_cheap() -> None:
    """It runs the pair on less than 1 % of what a thousand particles for these rows are."""
    pair, x, evaluated = Topics(soft), documents(100), []

    def guide(x: Tensor) -> None:
        pair.guide(x)
        with pyro.plate("again", len(x)):
            evaluated.append(pyro.sample("k", dist.Delta(torch.zeros(())), infer={"is_auxiliary": True}).numel())

    check_pair(Pair(pair.model, guide), Batch(x))
    assert 0 < sum(evaluated) < 0.01 * 1000 * len(x)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters for each row


def per_row(x: Tensor, size: int | None = None) -> None:
    n = size or len(x)
    loc = pyro.param("loc", lambda: torch.zeros(n))
    scale = pyro.param("scale", lambda: torch.ones(n), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


def train(guide: Callable, x: Tensor, batch_size: int, epochs: int = 300, **options) -> None:
    fit(
        model,
        guide,
        x,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        schedule=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.98),
        progress=False,
        **options,
    )


@pytest.mark.parametrize("n", [12, 130])
@pytest.mark.parametrize("kind", ["AutoNormal", "pyro.param", "pyro.param, size given"])
def test_guides_with_parameters_for_each_row_train_on_all_rows(kind: str, n: int) -> None:
    """On all rows together, each row keeps its own parameters, and log p(x) comes out right, in one block."""
    x = data(n)
    guides = {
        "AutoNormal": AutoNormal(model),
        "pyro.param": per_row,
        "pyro.param, size given": functools.partial(per_row, size=n),
    }
    guide = guides[kind]
    train(guide, x, n)
    result = log_marginal(model, guide, x, 400, seed=0)
    assert_close(result.estimate, truth(x), rtol=0, atol=0.5)
    assert result.ess.mean() > 100


@pytest.mark.parametrize("guide", [AutoNormal(model), per_row, functools.partial(per_row, size=12)])
def test_guides_with_parameters_for_each_row_are_refused_on_parts_of_them(guide: Callable) -> None:
    """With the true cause; nothing stays declared, so that the next run is not spoilt."""
    x = data()
    with pytest.raises(PairError, match=r"batch_size: .*parameters for each row; use batch_size=12"):
        train(guide, x, 5)
    assert len(pyro.get_param_store()) == 0
    with pytest.raises(UsageError, match=r"validation: .*parameters for each row.*leave validation out"):
        train(guide, x, 12, validation=data(3))
    assert len(pyro.get_param_store()) == 0
    train(guide, x, 12, epochs=2)
    with pytest.raises(PairError):
        log_marginal(model, guide, x[:5], 10)
    for call in (gaps, to_inference_data, sandwich):
        with pytest.raises(PairError, match="works on all of its rows together only"):
            call(model, guide, x)


def test_an_automatic_guide_is_made_for_all_rows() -> None:
    """Not for those of the first block."""
    guide = AutoNormal(model)
    assert log_marginal(model, guide, data(130), 10).estimate.isfinite().all()
    assert guide.locs.z.shape == (130,)


def test_parameters_by_place_are_refused_before_they_differ() -> None:
    """A guide that takes the first parameters for whatever rows come, all alike before training."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(12))[: len(x)]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(PairError, match="parameters for each row"):
        train(guide, data(), 4)
    with pytest.raises(PairError, match="depends on its place"):
        train(guide, data(), 12)


@pytest.mark.parametrize(
    "auto", [AutoMultivariateNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoIAFNormal, AutoGaussian]
)
def test_automatic_guides_of_all_rows_at_once_are_refused_with_their_cause(auto: type) -> None:
    """Pyro's own objective trains them."""
    x, guide = data(), auto(plane)
    for call in (ENTRIES["fit"], ENTRIES["log_marginal"]):
        with pytest.raises(PairError, match=rf"{auto.__name__}\w* draws the latents of all rows as one,"):
            call(plane, guide, x)
    assert len(pyro.get_param_store()) == 0
    if auto is not AutoGaussian:
        fit(plane, guide, x, Trace_ELBO(), epochs=2, batch_size=12, progress=False)


@pytest.mark.parametrize(
    ("auto", "objective"), [(AutoDelta, ELBO()), (AutoDelta, Trace_ELBO()), (AutoLaplaceApproximation, Trace_ELBO())]
)
def test_automatic_guides_of_modes_claim_no_bound(auto: type, objective) -> None:
    result = fit(model, auto(model), data(), objective, epochs=2, batch_size=12, progress=False)
    assert "train_objective" in result.history[-1]
    assert "MAP" in " ".join(result.notices)


# ---------------------------------------------------------------------------------------------------------------------
# Raw errors


def global_latent(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0).expand((2,)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] + shift, 1.0), obs=x)


def of_two(x: Tensor) -> None:
    pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def subsampled(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def subsampled_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        pyro.sample("z", dist.Normal(x[rows], 1.0))


def chosen(x: Tensor) -> None:
    with pyro.plate("data", 100, subsample=torch.arange(len(x))):
        pyro.sample("z", dist.Normal(x, 1.0))


def undeclared(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def undeclared_rows(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0))


def over_features(x: Tensor) -> None:
    with pyro.plate("features", 3):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))


def pixels(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.plate("pixels", 3, dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def pixels_by_themselves(x: Tensor) -> None:
    with pyro.plate("data", len(x)), pyro.plate("pixels", 3):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def indexing(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[:, 1], 1.0), obs=x)


def concatenating(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([x[:, None], z], -1).sum(-1), 1.0), obs=x)


def two(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


RAW = {
    "a global latent": ("site 'shift' must be inside exactly one plate.*its plates: none", global_latent, of_two),
    "a subsampling plate": ("'z' is in a subsampling plate.*pass minibatches as x", subsampled, subsampled_guide),
    "subsample=": ("'z' is in a subsampling plate.*pass minibatches as x", model, chosen),
    "an undeclared event": (r"'z': its batch shape has 3 at dim -1.*\.to_event\(\)", undeclared, undeclared),
    "an undeclared event of rows": (r"'z': its batch shape has .*\.to_event\(\)", model, undeclared_rows),
    "a plate over features": (
        r"'z' must be inside exactly one plate.*'features' \(dim -1, size 3\)",
        model,
        over_features,
    ),
    "pixels at dim -2": ("plates .* collide at dim -2; have one plate", model, pixels),
    "pixels": (r"exactly one plate.*'pixels' \(dim -3, size 3\)", model, pixels_by_themselves),
    "an index of an axis": ("model: it runs by itself, but not for several particles", indexing, two),
    "a concatenation": ("model: it runs by itself, but not for several particles", concatenating, two),
}


@pytest.mark.parametrize("entry", ["log_marginal", "fit"])
@pytest.mark.parametrize("case", RAW)
def test_errors_of_torch_and_pyro_are_explained(case: str, entry: str) -> None:
    message, m, g = RAW[case]
    with pytest.raises(PairError, match=message) as caught:
        ENTRIES[entry](m, g, data(7))
    assert "\n" not in str(caught.value)


def test_a_user_s_own_error_stays_theirs() -> None:
    """What fails without particles too is not explained away."""

    def broken(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z @ torch.zeros(3, 3), 1.0), obs=x)

    with pytest.raises(RuntimeError) as caught:
        log_marginal(broken, in_plate(near), data(), 10)
    assert not isinstance(caught.value, PairError)
    assert any("raised by the model for x of shape (12,)" in note for note in caught.value.__notes__)


def test_values_outside_a_support_are_told() -> None:
    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            with poutine.mask(mask=~x.isnan()):
                pyro.sample("x", dist.Normal(z, S), obs=x)

    x = data()
    for entry in ("log_marginal", "fit"):
        with pytest.raises(PairError, match="model site 'z': the guide draws values outside its support") as caught:
            ENTRIES[entry](positive, in_plate(near), x)
        assert "\n" not in str(caught.value)
    x[3] = math.nan
    guide = in_plate(lambda x: pyro.sample("z", dist.HalfNormal(torch.ones(len(x)))))
    with pytest.raises(DataError, match=r"model site 'x': x has values, such as nan, outside.*nan_to_num") as caught:
        log_marginal(positive, guide, x, 10)
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_numbers_are_named() -> None:
    x = data()
    x[3] = math.nan
    with pytest.raises(DataError, match=r"x: 1 rows are not finite, the first being \[3\]") as caught:
        log_marginal(model, in_plate(near), x, 10)
    assert "\n" not in str(caught.value)
    with pytest.raises(NumericalError, match=r"x is not finite in rows \[3\]"):
        ENTRIES["fit"](model, in_plate(near), x)


def test_types_of_numbers_are_told() -> None:
    linear = nn.Linear(3, 2)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = linear(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc[..., 0], raw[..., 0].exp()))

    def of_vectors(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 3), 1.0).to_event(1), obs=x)

    for x in (torch.randn(5, 3).double(), torch.ones(5, 3, dtype=torch.int64)):
        for entry in ("log_marginal", "fit"):
            with pytest.raises(UsageError, match=rf"x: expected torch.float32, .* got {x.dtype}; pass x.to"):
                ENTRIES[entry](of_vectors, guide, x)


def test_arguments_in_the_wrong_places_are_told() -> None:
    vae = VAE(StandardNormal(2), Gaussian(MLP(2, 4)), MeanFieldNormal(MLP(4), 2))
    x = torch.randn(5, 4)
    calls: dict[str, Callable] = {
        "the guide observes x and the model does not; pass the model first": lambda: log_marginal(
            vae.guide, vae.model, x
        ),
        "data: none given; fit takes a model, a guide and rows": lambda: fit(vae, x),
        r"model: VAE cannot be called as model\(x\).*pass .model of it": lambda: fit(vae, vae, x),
        r"model: expected a Pyro program, called as model\(x\), got a tensor": lambda: log_marginal(x, vae.guide, x),
        r"guide: expected a Pyro program, .* got a tensor": lambda: gaps(vae.model, x, x),
        "x: expected a tensor .* got method": lambda: log_marginal(vae.model, vae.guide, vae.model),
        r"x: expected a tensor .* got ndarray of shape \(5, 4\); pass torch.as_tensor\(x\)": lambda: log_marginal(
            vae.model, vae.guide, x.numpy()
        ),
        r"data: expected a tensor .* got ndarray of shape": lambda: fit(vae.model, vae.guide, x.numpy()),
        "model: VAE is a class": lambda: log_marginal(VAE, vae.guide, x),
        "model, guide: the guide observes x": lambda: ELBO().loss(vae.guide, vae.model, x),
        r"objective: expected an object such as ELBO\(\), got the class IWAE": lambda: fit(
            vae.model, vae.guide, x, IWAE, batch_size=5
        ),
        "source: expected the name of a data set .* got NoneType": lambda: pyrovae.load_data(None),
        r"x: expected a tensor of event shape \(4,\), got ndarray": lambda: vae.encode(x.numpy()),
        r"x: expected torch.float32, that of the network, got torch.float64": lambda: vae.encode(x.double()),
        r"x: expected floating-point numbers, got torch.int64": lambda: log_marginal(vae.model, vae.guide, x.long()),
        r"x: expected event shape \(4,\), got": lambda: log_marginal(vae.model, vae.guide, x[:, :3]),
        r"guide: cannot be called as guide\(x\) \(missing a required argument: 'y'\)": lambda: fit(
            vae.model, lambda x, y: vae.guide(x), x
        ),
    }
    for message, call in calls.items():
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_data_frame_is_told_what_to_write() -> None:
    pd = pytest.importorskip("pandas")
    vae = VAE(StandardNormal(2), Gaussian(MLP(2, 4)), MeanFieldNormal(MLP(4), 2))
    with pytest.raises(UsageError, match=r"got DataFrame of shape \(5, 4\); pass torch.as_tensor\(x.to_numpy\(\)\)"):
        log_marginal(vae.model, vae.guide, pd.DataFrame(torch.randn(5, 4).numpy()))


# ---------------------------------------------------------------------------------------------------------------------
# No false alarms


def image_vae(dropout: float = 0.0) -> VAE:
    encoder = ConvEncoder((1, 8, 8), channels=(8, 16))
    return VAE(StandardNormal(4), Bernoulli(ConvDecoder(4, (1, 8, 8), channels=(8, 16))), MeanFieldNormal(encoder, 4))


def built_in() -> dict[str, Callable]:
    def plain(guide: type = MeanFieldNormal, likelihood: Callable = Bernoulli, **options) -> VAE:
        return VAE(StandardNormal(5), likelihood(MLP(5, 64)), guide(MLP(64), 5, **options))

    def vamp() -> VAE:
        guide = MeanFieldNormal(MLP(64), 5)
        return VAE(VampPrior(guide, 64, components=7), Bernoulli(MLP(5, 64)), guide)

    def hierarchical() -> HierarchicalVAE:
        return HierarchicalVAE(
            StandardNormal(2),
            [MeanFieldNormal(MLP(2), 5)],
            Bernoulli(MLP(5, 64)),
            [MeanFieldNormal(MLP(64), 5), MeanFieldNormal(MLP(5), 2)],
        )

    def ladder(merge: str) -> LadderVAE:
        guides = [MeanFieldNormal(MLP(202 if merge == "learned" else 200), 5), MeanFieldNormal(MLP(200), 2)]
        parts = [MeanFieldNormal(MLP(2), 5)], Bernoulli(MLP(7, 64)), [MLP(64), MLP(200)], guides
        return LadderVAE(StandardNormal(2), *parts, merge=merge)

    def auxiliary() -> AuxiliaryVAE:
        guides = MeanFieldNormal(MLP(200), 3), MeanFieldNormal(MLP(203), 5), MeanFieldNormal(MLP(205), 3)
        return AuxiliaryVAE(StandardNormal(5), Bernoulli(MLP(5, 64)), MLP(64), *guides)

    def normalised() -> VAE:
        encoder = Network(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3)), 64, 32)
        decoder = Network(nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64)), 5, 64)
        return VAE(StandardNormal(5), Bernoulli(decoder), MeanFieldNormal(encoder, 5))

    return {
        "mean field": plain,
        "full covariance": lambda: plain(FullCovarianceNormal),
        "low rank": lambda: plain(LowRankNormal),
        "Gaussian": lambda: plain(likelihood=Gaussian),
        "Gaussian, predicted scale": lambda: VAE(
            StandardNormal(5), Gaussian(MLP(5, (2, 64)), scale="predicted"), MeanFieldNormal(MLP(64), 5)
        ),
        "mixture prior": lambda: VAE(MixtureOfGaussians(5, 4), Bernoulli(MLP(5, 64)), MeanFieldNormal(MLP(64), 5)),
        "VampPrior": vamp,
        "hierarchical": hierarchical,
        "ladder": lambda: ladder("learned"),
        "ladder, precision": lambda: ladder("precision"),
        "auxiliary": auxiliary,
        "batch norm and dropout": normalised,
        "convolutions": image_vae,
    }


@pytest.mark.parametrize("n", [1, 2, 3, 100])
@pytest.mark.parametrize("name", list(built_in()))
def test_built_in_parts_pass(name: str, n: int) -> None:
    """In single precision, on one row and on a hundred, before training and with large weights."""
    vae = built_in()[name]()
    x = (torch.rand(n, *vae.event_shape) > 0.5).float()
    assert examine(Pair(vae.model, vae.guide), Batch(x), total=n).no_density is None
    with torch.no_grad():
        for p in vae.parameters():
            p.mul_(2.0)
    findings = check_pair(Pair(vae.model, vae.guide), Batch(x))
    assert (findings.rows, findings.whole) == (n, False)
