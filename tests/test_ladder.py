"""Guides from the top down: against linear Gaussian hierarchies, quadrature, and the model's own draws."""

import math

import pytest
import torch
from conftest import EXACT, assert_mean
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, log_marginal, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.diagnostics import measure
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import draw
from pyrovae.models import (
    MLP,
    Bernoulli,
    FullCovarianceNormal,
    Gaussian,
    HierarchicalVAE,
    LadderVAE,
    MeanFieldNormal,
    ResidualMLP,
    StandardNormal,
)
from pyrovae.models.guides import SCALE_FLOOR, Guide
from pyrovae.models.networks import Network

# A linear Gaussian hierarchy: z2 ~ N(0, 1), z1 | z2 ~ N(A z2, S1^2 I), x | z1 ~ N(B z1, S0^2 I), B diagonal.
EYE = torch.eye(2, dtype=torch.float64)
A = torch.tensor([[1.5], [-1.2]], dtype=torch.float64)
B = torch.tensor([0.9, -1.2], dtype=torch.float64)
S1, S0 = 0.6, 1.1
X = torch.tensor([[0.3, -1.0], [2.0, 0.4], [-1.5, -2.5]], dtype=torch.float64)


def set_linear(part: Guide, weight: Tensor, scale: Tensor | float) -> Guide:
    """Make a guide over the identity N(weight input, scale^2)."""
    size = len(weight)
    with torch.no_grad():
        part.head.weight.zero_()
        part.head.weight[:size] = weight
        scales = torch.as_tensor(scale, dtype=weight.dtype).expand(size)
        part.head.bias[:size] = 0
        part.head.bias[size:] = (scales - SCALE_FLOOR).expm1().log()
    return part


def linear(inputs: int, weight: Tensor, scale: Tensor | float) -> Guide:
    return set_linear(MeanFieldNormal(MLP(inputs, hidden=()), len(weight)).double(), weight, scale)


def decoder(skip: bool) -> Gaussian:
    """p(x|z1): with skip connections z2 is there, and has no weight."""
    network = MLP(3 if skip else 2, 2, hidden=()).double()
    with torch.no_grad():
        (last,) = (m for m in network.modules() if isinstance(m, nn.Linear))
        last.weight.zero_()
        last.weight[:, :2] = B.diag()
        last.bias.zero_()
    return Gaussian(network, scale=S0).double()


def covariance() -> Tensor:
    return B.diag() @ (A @ A.T + S1**2 * EYE) @ B.diag() + S0**2 * EYE


def log_p(x: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(x.new_zeros(2), covariance()).log_prob(x)


def exact_ladder(merge: str, above: str) -> LadderVAE:
    """The ladder whose guide is the posterior, by the textbook's formulas."""
    identity = [MLP(2, hidden=()).double() for _ in range(2)]
    top = A.T @ B.diag() @ torch.linalg.inv(covariance())  # E z2 | x = top x
    top_scale = (1 - (top @ B.diag() @ A)).sqrt().squeeze()
    message = linear(2, (1 / B).diag(), S0 / B.abs())  # p(x|z1) as a Gaussian of z1
    precision = S1**-2 + (B / S0) ** 2
    both = torch.cat([A * S1**-2 / precision[:, None], (B / S0**2 / precision).diag()], 1)  # of (z2, x)
    lower = message if merge == "precision" else linear(3, both, precision.rsqrt())
    guides = [lower, linear(2, top, top_scale)]
    conditional = linear(1, A, S1)
    return LadderVAE(
        StandardNormal(1).double(), [conditional], decoder(above == "all"), identity, guides, merge=merge, above=above
    ).double()


@pytest.mark.parametrize("above", ["next", "all"])
@pytest.mark.parametrize("merge", ["precision", "learned"])
def test_a_ladder_may_be_the_posterior_of_a_linear_hierarchy(merge: str, above: str) -> None:
    """Every log-weight is log p(x), so that no bound has a gap, or any noise."""
    pair = exact_ladder(merge, above)
    log_w = log_weights(pair.model, pair.guide, X, 6)
    assert_close(log_w, log_p(X).expand(6, -1), rtol=0.0, atol=1e-8)


def test_a_guide_of_the_same_gaussians_from_the_data_upwards_cannot() -> None:
    """With the best q(z1|x) of diagonal covariance and the exact q(z2|z1), the gap is that of mean field.

    The precision L of p(z1|x) is that of z1 ~ N(0, AA' + S1^2 I) under x ~ N(B z1, S0^2 I); the best factors have
    precisions L_ii and the exact mean, and leave (sum log L_ii - log det L) / 2.
    """
    prior = A @ A.T + S1**2 * EYE
    precision = torch.linalg.inv(prior) + (B / S0).square().diag()
    mean = torch.linalg.inv(precision) @ (B / S0**2).diag()
    first = linear(2, mean, precision.diagonal().rsqrt())
    gain = A.T @ torch.linalg.inv(prior)
    second = linear(2, gain, (1 - gain @ A).sqrt().squeeze())
    pair = HierarchicalVAE(StandardNormal(1), [linear(1, A, S1)], decoder(False), [first, second]).double()
    gap = (precision.diagonal().log().sum() - torch.logdet(precision)) / 2
    assert gap > 0.05
    torch.manual_seed(0)
    assert_mean(log_weights(pair.model, pair.guide, X, 40_000), log_p(X) - gap, least=0.03)


def random_ladder(merge: str, above: str, network: type[Network] = MLP) -> LadderVAE:
    """Three layers of 1, 2 and 1 elements, networks with random weights, and bits as data."""
    torch.manual_seed(2)
    small = {"hidden": (5,)} if network is MLP else {"width": 5, "blocks": 1}
    sizes = [1, 2, 1]
    conditionals, guides = [], []
    for i, size in enumerate(sizes):
        given = sum(sizes[i + 1 :]) if above == "all" else sum(sizes[i + 1 : i + 2])
        inputs = 5 + given if merge == "learned" and given else 5
        guides.append(MeanFieldNormal(network(inputs, **small), size))
        if given:
            conditionals.append(MeanFieldNormal(network(given, **small), size))
    likelihood = Bernoulli(network(4 if above == "all" else 1, 3, **small))
    features = [network(3, **small), network(5, **small), network(5, **small)]
    pair = LadderVAE(StandardNormal(1), conditionals, likelihood, features, guides, merge=merge, above=above).double()
    with torch.no_grad():
        for name, p in pair.named_parameters():
            p.mul_(0.5 if "guides" in name else 1.4)  # what is drawn matters
        for guide in pair.guides:
            guide.head.bias[guide.latent_dim :] = 1.0  # and the guide is wide
    return pair


def by_quadrature(pair: LadderVAE, x: Tensor, points: int = 24) -> Tensor:
    """log p(x), each element of z1, z2, z3 by Gauss-Hermite quadrature given those above."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    nodes = torch.tensor(nodes, dtype=x.dtype)
    log_weight = torch.tensor(np.log(weights / weights.sum()), dtype=x.dtype)
    above, total = nodes[:, None], log_weight
    for conditional in reversed(list(pair.conditionals)):
        q = conditional(above)
        grid = torch.cartesian_prod(*[nodes] * q.event_shape[0]).reshape(-1, q.event_shape[0])
        logs = torch.cartesian_prod(*[log_weight] * q.event_shape[0]).reshape(len(grid), -1).sum(-1)
        z = (q.mean[:, None] + q.stddev[:, None] * grid).flatten(0, 1)
        repeated = above.repeat_interleave(len(grid), 0)
        above = torch.cat([z, repeated], -1) if pair.above == "all" else z
        total = (total[:, None] + logs).flatten()
    return torch.logsumexp(total[:, None] + pair.likelihood(above[:, None]).log_prob(x), 0)


@pytest.mark.parametrize(
    ("merge", "above", "network"),
    [("precision", "next", MLP), ("precision", "all", MLP), ("learned", "next", MLP), ("learned", "all", ResidualMLP)],
)
@torch.no_grad()
def test_weights_of_three_layers_are_of_log_p(merge: str, above: str, network: type[Network]) -> None:
    """E exp(log w - log p(x)) = 1 by quadrature of the four latent numbers; the bound is below."""
    pair = random_ladder(merge, above, network)
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    exact = by_quadrature(pair, x)
    assert_close(exact, by_quadrature(pair, x, 17), rtol=0.0, atol=1e-3)
    log_w = log_weights(pair.model, pair.guide, x, 40_000)
    assert_mean((log_w - exact).exp(), 1.0, least=0.1)
    assert (log_w.mean(0) < exact - 0.01).all()
    found = log_marginal(pair.model, pair.guide, x, 5000)
    assert ((found.estimate - exact).abs() < 5 * found.standard_error + 1e-3).all()


def test_the_model_is_what_is_drawn_of_it() -> None:
    """`sample` and `model` agree: the mean of draws is that of p(x) by quadrature, with all layers reaching x."""
    pair = random_ladder("learned", above="all")
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    with torch.no_grad():
        probabilities = by_quadrature(pair, every).exp()
    assert_close(probabilities.sum(), torch.ones((), dtype=torch.float64), rtol=0.0, atol=1e-6)
    torch.manual_seed(0)
    assert_mean(pair.sample(20_000), probabilities @ every, least=0.03)


def test_the_pass_over_the_data_is_run_once_for_each_datum() -> None:
    """Whatever the number of particles, features are of (N, *event), and of nothing that was drawn."""
    pair, x = random_ladder("learned", above="all"), torch.ones(4, 3, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []
    for network in pair.features.networks:
        network.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    log_weights(pair.model, pair.guide, x, 9)
    assert seen == [(4, 5)] * 3


def test_the_kl_of_each_layer_is_reported_and_they_sum_to_the_kl() -> None:
    pair, x = random_ladder("precision", above="all"), torch.tensor([[1.0, 0.0, 1.0]] * 7, dtype=torch.float64)
    found = measure(pair.model, pair.guide, [x], ELBO(2000))
    layers = [found[f"kl_z{i}"] for i in (1, 2, 3)]
    assert sum(layers) == pytest.approx(found["kl"], abs=1e-9)
    top = torch.distributions.kl_divergence(pair.guides[-1](pair.features(x)[-1]), pair.prior())
    assert found["kl_z3"] == pytest.approx(top.mean().item(), abs=1e-9)  # in closed form, without noise
    assert min(layers) > 0
    single = HierarchicalVAE(
        StandardNormal(1), [MeanFieldNormal(MLP(1), 2)], Bernoulli(MLP(2, 3)), [MeanFieldNormal(MLP(3), 2),
                                                                              MeanFieldNormal(MLP(2), 1)]
    ).double()  # fmt: skip
    assert {"kl_z1", "kl_z2"} <= measure(single.model, single.guide, [x], IWAE(3)).keys()


def test_a_code_has_the_layers_that_x_is_given() -> None:
    """`posterior` draws what the guide draws, z1 first; its mean goes through the means of the layers above."""
    pair, x = random_ladder("learned", above="all"), torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    assert pair.code == {"z1": 1, "z2": 2, "z3": 1}
    q = pair.posterior(x)
    torch.manual_seed(0)
    drawn = draw(Pair(pair.model, pair.guide), Batch(x), 20_000).latents
    guided = torch.cat([drawn[f"z{i}"].value for i in (1, 2, 3)], -1)[:, 0]
    codes = q.sample((20_000,))[:, 0]
    for f in (lambda v: v, torch.square):
        assert_mean(f(codes) - f(guided), 0.0, least=0.2)
    d1, d2, d3 = pair.features(x)
    top = pair.guides[2](d3)
    middle = pair.guides[1](torch.cat([top.mean, d2], -1))
    lower = pair.guides[0](torch.cat([middle.mean, top.mean, d1], -1))
    assert_close(q.mean, torch.cat([lower.mean, middle.mean, top.mean], -1), **EXACT)
    assert_close(q.stddev, torch.cat([lower.stddev, middle.stddev, top.stddev], -1), **EXACT)
    assert_close(pair.reconstruct(x), pair.likelihood(pair.encode(x)).mean, **EXACT)
    below = random_ladder("learned", above="next")
    assert below.code == {"z1": 1}
    assert_close(below.reconstruct(x), below.likelihood(below.posterior(x).mean).mean.detach(), **EXACT)


def test_parts_of_a_ladder_that_do_not_fit_are_refused() -> None:
    def parts(**changes: object) -> dict:
        made = {
            "prior": StandardNormal(2),
            "conditionals": [MeanFieldNormal(MLP(2), 3)],
            "likelihood": Bernoulli(MLP(5, 4)),
            "features": [MLP(4, hidden=(6,)), MLP(6, hidden=(7,))],
            "guides": [MeanFieldNormal(MLP(8), 3), MeanFieldNormal(MLP(7), 2)],
        }
        return {**made, **changes}

    LadderVAE(**parts())
    for changes, message in (
        ({"likelihood": Bernoulli(MLP(3, 4))}, r"what is handed down is \(5,\), the decoder's input is \(3,\)"),
        ({"above": "next"}, r"what is handed down is \(3,\), the decoder's input is \(5,\)"),
        ({"merge": "precision"}, r"what there is of both is \(6,\), a guide's input is \(8,\)"),
        ({"features": [MLP(4, hidden=(6,))]}, "1 conditionals need 2 of each, got 2 and 1"),
        ({"features": [MLP(4, hidden=(6,)), MLP(5)]}, r"output is \(6,\), the next one's input is \(5,\)"),
        ({"features": [MLP(9, hidden=(6,)), MLP(6, hidden=(7,))]}, r"output is \(4,\), the features' input is \(9,\)"),
        ({"conditionals": [MeanFieldNormal(MLP(1), 3)]}, r"what is above is \(2,\), a conditional's input is \(1,\)"),
        (
            {"guides": [MeanFieldNormal(MLP(8), 3), MeanFieldNormal(MLP(7), 9)]},
            r"layer of the model is \(2,\), the guide's latent_dim is \(9,\)",
        ),
        ({"merge": "sum"}, "merge: expected one of learned, precision, relative, got 'sum'"),
    ):
        with pytest.raises(UsageError, match=message):
            LadderVAE(**parts(**changes))
    full = [FullCovarianceNormal(MLP(6), 3), MeanFieldNormal(MLP(7), 2)]
    with pytest.raises(UsageError, match="Gaussians of diagonal covariance, got FullCovarianceNormal; choose"):
        LadderVAE(**parts(guides=full, merge="precision"))


def test_a_residual_network_adds_to_what_it_is_given() -> None:
    """h + W act(V act(h)) block by block; with W = 0 it is its first map."""
    network, x = ResidualMLP(3, 2, width=4, blocks=2, activation="softplus").double(), torch.randn(5, 3).double()
    first, a, b, c, d, last = (m for m in network.modules() if isinstance(m, nn.Linear))
    h = first(x)
    h = h + b(softplus(a(softplus(h))))
    h = h + d(softplus(c(softplus(h))))
    assert_close(network(x), last(softplus(h)), **EXACT)
    assert network.output_bias is last.bias
    assert ResidualMLP(3, width=4).output_bias is None
    with torch.no_grad():
        for layer in (b, d):
            layer.weight.zero_()
            layer.bias.zero_()
    assert_close(network(x), last(softplus(first(x))), **EXACT)
    assert math.prod(ResidualMLP(3, width=4).out_shape) == 4
