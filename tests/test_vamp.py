"""VampPriors of a hierarchy's guides and of a condition: mixtures against loops, and p(z|y) of the y of each row."""

import copy
import math
from typing import Any

import pytest
import torch
from conftest import EXACT
from torch import Tensor
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, adam, fit
from pyrovae.models import (
    MLP,
    Bernoulli,
    ConditionalVAE,
    ConditionalVampPrior,
    ConvDecoder,
    ConvEncoder,
    Gaussian,
    HierarchicalVAE,
    HierarchicalVampPrior,
    MeanFieldNormal,
    PlanarFlow,
    VampPrior,
)
from pyrovae.models.vamp import centre
from pyrovae.runs.recipe import Recipe

Z1, Z2, D = 3, 2, 4


def hierarchy(components: int = 5) -> HierarchicalVAE:
    """Two layers, whose top prior is of both guides."""
    guides = [MeanFieldNormal(MLP(D, hidden=(6,)), Z1), MeanFieldNormal(MLP(Z1, hidden=(6,)), Z2)]
    prior = HierarchicalVampPrior(guides, D, components)
    likelihood = Gaussian(MLP(Z1, D, hidden=(6,)))
    return HierarchicalVAE(prior, [MeanFieldNormal(MLP(Z2, hidden=(6,)), Z1)], likelihood, guides)


def test_the_top_layer_is_the_mixture_of_what_the_guides_make_of_pseudo_inputs() -> None:
    """(1/C) sum_c q(z2 | E[z1|u_c]), one component at a time."""
    prior = hierarchy().prior.double()
    lower, upper = (guide.double() for guide in prior._guides)
    z = torch.randn(7, Z2, dtype=torch.float64)
    total = torch.zeros(7, dtype=torch.float64)
    for u in prior.pseudo_inputs:
        total = total + upper(lower(u).mean).log_prob(z).exp() / prior.components
    assert_close(prior().log_prob(z), total.log(), **EXACT)
    one = HierarchicalVampPrior([lower], D, 4).double()
    plain = VampPrior(lower, D, 4).double()
    plain.load_state_dict(one.state_dict())
    assert_close(one().log_prob(torch.ones(Z1).double()), plain().log_prob(torch.ones(Z1).double()), **EXACT)


def test_as_lower_guides_narrow_it_is_the_mixture_over_their_draws() -> None:
    """(1/C) sum_c E_q(z1|u_c) q(z2|z1): with z1 all but known, the mean passed on is all that there is."""
    prior = hierarchy().prior.double()
    lower, upper = (guide.double() for guide in prior._guides)
    z = torch.randn(7, Z2, dtype=torch.float64)
    distances = []
    for raw in (0.0, -6.0):
        with torch.no_grad():
            lower.head.weight[Z1:] = 0
            lower.head.bias[Z1:] = raw
            draws = lower(prior.pseudo_inputs).sample((4000,))
            wanted = upper(draws).log_prob(z[:, None, None]).exp().mean((1, 2)).log()
            distances.append((prior().log_prob(z) - wanted).abs().max().item())
    assert distances[1] < 1e-3 < 0.01 < distances[0]


def test_a_flow_passes_on_what_it_makes_of_its_noises_mean() -> None:
    """m + s f(0; h), where a flow has no mean in closed form; a Gaussian its mean."""
    guide, x = PlanarFlow(MLP(D, hidden=(6,)), Z1).double(), torch.randn(5, D, dtype=torch.float64)
    q = guide(x)
    with pytest.raises(NotImplementedError):
        q.mean  # noqa: B018
    assert_close(centre(q), q.loc + q.scale * q.flow(torch.zeros(5, Z1).double(), q.features)[0], **EXACT)
    plain = MeanFieldNormal(MLP(D, hidden=(6,)), Z1).double()(x)
    assert_close(centre(plain), plain.mean, **EXACT)


def test_each_parameter_has_one_name_and_the_copy_of_a_pair_its_own_guides() -> None:
    pair = hierarchy()
    assert len({id(p) for p in pair.parameters()}) == len([*pair.named_parameters(remove_duplicate=False)])
    other = copy.deepcopy(pair)
    assert all(a is b for a, b in zip(other.prior._guides, other.guides, strict=True))


@pytest.mark.slow
def test_compiled_steps_of_a_hierarchy_are_those_of_the_pair() -> None:
    x = torch.randn(300, D)
    pair = hierarchy()
    pair.initialise(x)
    assert_compiles(pair, x)


def test_a_run_needs_a_hierarchy() -> None:
    for options in ({}, {"model": "ladder"}, {"model": "ex-post", "first": "a"}):
        with pytest.raises(UsageError, match="prior=HierarchicalVampPrior: is made of guides from the data upwards"):
            Recipe(prior="hierarchical-vamp", **options)
    assert Recipe(prior="hierarchical-vamp", model="hierarchical").prior.settings == {"components": 500}


# -- Given a condition -------------------------------------------------------------------------------------------------


def conditional(event: tuple[int, ...] = (D,), components: int = 3) -> ConditionalVAE:
    """A pair given one of two classes, of vectors or of images."""
    if len(event) == 1:
        guide = MeanFieldNormal(MLP(D + 2, hidden=(6,)), Z2)
        decoder = MLP(Z2 + 2, event, hidden=(6,))
    else:
        guide = MeanFieldNormal(ConvEncoder((event[0] + 2, *event[1:]), channels=(3,), hidden=5), Z2)
        decoder = ConvDecoder(Z2 + 2, event, channels=(3,), hidden=5)
    prior = ConditionalVampPrior(guide, guide.event_shape, 2, components)
    return ConditionalVAE(prior, Bernoulli(decoder), guide)


@pytest.mark.parametrize("event", [(D,), (1, 4, 6)], ids=str)
def test_the_density_is_the_guides_at_the_pseudo_inputs_beside_the_y_of_the_row(event: tuple[int, ...]) -> None:
    """p(z|y_n) = (1/C) sum_c q(z|u_c, y_n), one row and component at a time, by the pair's own posterior."""
    pair = conditional(event).double()
    x, y = torch.rand(30, *event, dtype=torch.float64).round(), torch.eye(2).double().repeat(15, 1)
    pair.initialise(x, 3 * y)
    assert pair.prior.unit != 1
    z = torch.randn(30, Z2, dtype=torch.float64)
    found = pair.prior(3 * y).log_prob(z)
    for n in range(4):
        total = torch.zeros((), dtype=torch.float64)
        for u in pair.prior.pseudo_inputs:
            of_x = u.reshape(1, *event)
            total = total + pair.posterior(of_x, 3 * y[n : n + 1]).log_prob(z[n]).exp()[0] / pair.prior.components
        assert_close(found[n], total.log(), **EXACT)
    assert_close(pair.prior(3 * y).expand((5, 30)).log_prob(z), found.expand(5, -1), **EXACT)


def test_pseudo_inputs_start_at_rows_of_x_without_their_y() -> None:
    pair = conditional(components=6)
    x, y = torch.rand(6, D).round(), 100 * torch.eye(2).repeat(3, 1)
    pair.initialise(x, y)
    distance = torch.cdist(pair.prior.pseudo_inputs.detach(), x).min(1).values
    assert (distance < 0.2).all()


def test_training_makes_a_prior_for_each_class() -> None:
    """Where x tells the class: its own aggregate posterior is nearer p(z|y) than that of the other class is."""
    torch.manual_seed(0)
    y = torch.eye(2).repeat(60, 1)
    x = torch.bernoulli(0.1 + 0.8 * y[:, :1].expand(-1, D))
    pair = conditional(components=4)
    pair.initialise(x, y)
    settings: dict[str, Any] = {"epochs": 6, "batch_size": 30, "progress": False, "compile": "off", "given": (y,)}
    settings["optimizer"] = lambda parameters: adam(parameters, lr=5e-3)
    bounds = fit(pair.model, pair.guide, x, ELBO(), **settings).metrics["train_bound"].tolist()
    assert bounds[-1] > bounds[0]
    with torch.no_grad():
        z = pair.posterior(x, y).sample((50,))
        gain = (pair.prior(y).log_prob(z) - pair.prior(y.flip(1)).log_prob(z)).flatten()
        assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


@pytest.mark.slow
def test_compiled_steps_given_a_condition_are_those_of_the_pair() -> None:
    x, y = torch.rand(300, D).round(), torch.eye(2).repeat(150, 1)
    pair = conditional()
    pair.initialise(x, y)
    assert_compiles(pair, x, y)


def assert_compiles(pair: HierarchicalVAE | ConditionalVAE, x: Tensor, *given: Tensor) -> None:
    """Compiled steps give the bounds of eager ones."""
    bounds = []
    for compile in ("off", "on"):
        each = copy.deepcopy(pair)
        settings = {"epochs": 2, "seed": 1, "compile": compile, "progress": False, "given": given}
        bounds.append(fit(each.model, each.guide, x, ELBO(), **settings).metrics["train_bound"].tolist())
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-5)
    assert all(math.isfinite(value) for value in bounds[0])
