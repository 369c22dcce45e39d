"""Hierarchies that hand down a state: against linear Gaussian ones of several layers, and where q is tied to p."""

import itertools
import math
from pathlib import Path

import pyro
import pytest
import torch
import yaml
from conftest import EXACT, assert_mean
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, fit, log_weights
from pyrovae.inference.diagnostics import measure
from pyrovae.models import MLP, Bernoulli, Gaussian, LadderVAE, MeanFieldNormal, StandardNormal
from pyrovae.models.guides import SCALE_FLOOR
from pyrovae.models.states import State
from pyrovae.runs.build import build_model
from pyrovae.runs.recipe import Recipe

L, W, S0 = 4, 3, 0.75
X = torch.tensor([[0.3, -1.0, 0.7], [2.0, 0.4, -0.1]], dtype=torch.float64)


def set_linear(part: MeanFieldNormal, weight: Tensor, scale: float) -> MeanFieldNormal:
    """Make a part over the identity N(weight input, scale^2)."""
    size = part.latent_dim
    with torch.no_grad():
        part.head.weight.zero_()
        part.head.weight[:size] = weight
        part.head.bias[:size] = 0
        part.head.bias[size:] = math.log(math.expm1(scale - SCALE_FLOOR))
    return part


class Linear:
    """z_i ~ N(a_i h_i, s_i^2), h_{i-1} = h_i + v_i z_i from h_L = 0, x ~ N(h_0, S0^2 I), each z_i a number.

    All of it is Gaussian: (z_1, ..., z_L, x) = M e with independent e ~ N(0, I), so that every conditional is a
    solution of linear equations.
    """

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.a, self.v = torch.randn(L, W).double(), torch.randn(L, W).double()
        self.s = [0.7, 1.2, 0.5, 1.0]
        h = torch.zeros(W, L + W, dtype=torch.float64)
        self.z, self.h = [], []  # rows of M, from the top down
        for i in reversed(range(L)):
            self.h.append(h)
            own = torch.zeros(L + W, dtype=torch.float64)
            own[i] = self.s[i]
            z = own + (self.a[i] @ h if i < L - 1 else 0.0)
            self.z.append(z)
            h = h + torch.outer(self.v[i], z)
        noise = torch.zeros(W, L + W, dtype=torch.float64)
        noise[:, L:] = S0 * torch.eye(W)
        self.x = h + noise

    def log_p(self, x: Tensor) -> Tensor:
        return MultivariateNormal(x.new_zeros(W), self.x @ self.x.T).log_prob(x)

    def given(self, level: int) -> tuple[Tensor, Tensor, float]:
        """Of q(z_i|z_above, x) the weights of z_above, top first, and of x, and its standard deviation."""
        above = self.z[: L - 1 - level]
        seen, z = torch.cat([torch.stack([*above, *self.x])]), self.z[L - 1 - level]
        weight = torch.linalg.solve(seen @ seen.T, seen @ z)
        return weight[: len(above)], weight[len(above) :], (z @ z - weight @ (seen @ z)).sqrt().item()

    def pair(self, merge: str) -> LadderVAE:
        """The ladder whose guide is the posterior: the state holds the sum of v_i z_i, and behind it each z_i."""
        states, conditionals, guides = [], [], []
        for i in range(L):
            state = State((1,), (W + L,)).double()
            state.blocks = nn.Flatten()
            with torch.no_grad():
                state.added.bias.zero_()
                state.added.weight.zero_()
                state.added.weight[:W, 0] = self.v[i]
                state.added.weight[W + i, 0] = 1.0
            states.append(state)
            of_above, of_x, deviation = self.given(i)
            read = torch.zeros(1, W + L, dtype=torch.float64)
            read[0, W + i + 1 :] = of_above.flip(0)
            of_x = of_x.unsqueeze(0)
            if i == L - 1:
                guides.append(set_linear(MeanFieldNormal(MLP(W, hidden=()), 1).double(), of_x, deviation))
                continue
            model = torch.cat([self.a[i], torch.zeros(L).double()]).unsqueeze(0)
            conditionals.append(set_linear(MeanFieldNormal(MLP(W + L, hidden=()), 1).double(), model, self.s[i]))
            if merge == "relative":
                read, of_x, deviation = (read - model) / self.s[i], of_x / self.s[i], deviation / self.s[i]
            guide = MeanFieldNormal(MLP(W + L + W, hidden=()), 1).double()
            guides.append(set_linear(guide, torch.cat([read, of_x], 1), deviation))
        decoder = MLP(W + L, W, hidden=()).double()
        with torch.no_grad():
            (last,) = (m for m in decoder.modules() if isinstance(m, nn.Linear))
            last.weight.zero_()
            last.weight[:, :W] = torch.eye(W)
            last.bias.zero_()
        likelihood, features = Gaussian(decoder, scale=S0), [MLP(W, hidden=()) for _ in range(L)]
        return LadderVAE(
            StandardNormal(1), conditionals, likelihood, features, guides, merge=merge, above="state", states=states
        ).double()


@pytest.mark.parametrize("merge", ["learned", "relative"])
def test_a_ladder_with_a_state_may_be_the_posterior_of_four_linear_layers(merge: str) -> None:
    """Every log-weight is log p(x), so that no bound has a gap, or any noise; a wrong guide has both."""
    linear = Linear()
    pair = linear.pair(merge)
    log_w = log_weights(pair.model, pair.guide, X, 6)
    assert_close(log_w, linear.log_p(X).expand(6, -1), rtol=0.0, atol=1e-8)
    assert_close(pair.encode(X)[:, -1:], X @ linear.given(L - 1)[1].unsqueeze(1), **EXACT)
    with torch.no_grad():
        pair.guides[1].head.bias += 0.3
    wrong = log_weights(pair.model, pair.guide, X, 40_000)
    assert_mean((wrong - linear.log_p(X)).exp(), 1.0, least=0.1)
    assert (wrong.mean(0) < linear.log_p(X) - 0.01).all()


def deep(merge: str = "relative", network: str = "residual", **settings: object) -> LadderVAE:
    """Five layers and bits, with random weights, in double precision."""
    torch.manual_seed(3)
    small = {"residual": {"width": 6, "blocks": 1}, "residual-conv": {"channels": "3,4", "blocks": 1}}[network]
    model = {"name": "ladder", "above": "state", "merge": merge}
    recipe = Recipe(
        model=model, network={"name": network, **small}, latent_dim="2,1,1,1,1", likelihood="bernoulli", **settings
    )
    pair = build_model(recipe, (1, 6, 4)).double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pair


def bits(rows: int) -> Tensor:
    return (torch.rand(rows, 1, 6, 4, generator=torch.Generator().manual_seed(1)) < 0.4).double()


@pytest.mark.parametrize("network", ["residual", "residual-conv"])
def test_layers_whose_guide_is_tied_to_the_model_have_no_kl(network: str) -> None:
    """Where the relative guide says N(0, 1), q is p to the last bit, and its KL 0; the others keep theirs."""
    pair, x = deep(network=network), bits(5)
    tied = (1, 3)
    with torch.no_grad():
        for i in tied:
            for parameter in pair.guides[i].head.parameters():
                parameter.zero_()
            size = pair.guides[i].latent_dim // pair.guides[i].encoder.places
            pair.guides[i].head.bias[size:] = math.log(math.expm1(1 - SCALE_FLOOR))
    found = measure(pair.model, pair.guide, [x], ELBO(3))
    for i in range(5):
        assert found[f"kl_z{i + 1}"] == pytest.approx(0, abs=1e-12) if i in tied else found[f"kl_z{i + 1}"] > 0.01
    assert sum(found[f"kl_z{i}"] for i in range(1, 6)) == pytest.approx(found["kl"], abs=1e-9)


@pytest.mark.parametrize("network", ["residual", "residual-conv"])
def test_weights_of_a_state_on_vectors_and_grids_are_of_log_p(network: str) -> None:
    """Draws of a guide near the model's own, weighed, and draws of the model: two estimates of p(x) that agree."""
    pair, x = deep(network=network), bits(2)
    with torch.no_grad():
        pair.likelihood.decoder.output_bias.mul_(0.1)
        for guide in pair.guides:
            size = guide.latent_dim // guide.encoder.places
            for parameter in guide.head.parameters():
                parameter.mul_(0.3)
            guide.head.bias[size:] = math.log(math.expm1(1))
        log_w = log_weights(pair.model, pair.guide, x, 4000)
        with pyro.plate("draws", 4000):
            drawn = pair.likelihood(pair.latent()).log_prob(x.unsqueeze(1)).T
    middle = log_w.logsumexp(0) - math.log(4000)
    assert (log_w - drawn).abs().max() > 1
    assert_mean((log_w - middle).exp() - (drawn - middle).exp(), 0.0, least=0.6)


def test_what_a_code_hands_down_is_what_was_handed_down_when_it_was_drawn() -> None:
    """`decode` of all layers is the mean of p(x|z) where these were drawn; on grids as with vectors."""
    for network in ("residual", "residual-conv"):
        pair = deep(network=network)
        with torch.no_grad(), pyro.poutine.trace() as found, pyro.plate("draws", 4):
            given = pair.latent()
        values = [found.trace.nodes[site]["value"] for site in pair.code]
        assert [value.shape[-1] for value in values] == pair.sizes
        assert_close(pair.decode(torch.cat(values, -1)), pair.likelihood(given).mean, **EXACT)
        with torch.no_grad():
            moved = pair.decode(torch.cat([*values[:-1], values[-1] + 1], -1))  # the top layer reaches x
        assert (moved - pair.likelihood(given).mean).abs().max() > 1e-4


def test_the_state_is_added_to() -> None:
    """h + W z, then blocks; the first one starts from W z alone; on a grid a next one of twice its size is reached."""
    state = State((2,), (5,), blocks=2).double()
    z, h = torch.randn(3, 4, 2).double(), torch.randn(4, 5).double()
    assert_close(state(z, h), state.blocks((state.added(z) + h).flatten(0, 1)).reshape(3, 4, 5), **EXACT)
    assert_close(state(z, None), state(z, torch.zeros(4, 5).double()), **EXACT)
    grid = State((2, 3, 2), (5, 3, 2), (4, 5, 4)).double()
    assert (grid.in_size, grid.latent_dim, grid.out_size) == (30, 12, 80)
    with torch.no_grad():
        out = grid(torch.randn(3, 12).double(), torch.randn(3, 30).double())
        assert out.shape == (3, 80)
    with pytest.raises(UsageError, match="is not on the grid of"):
        State((2, 3, 3), (5, 3, 2))


def test_parts_of_a_state_that_do_not_fit_are_refused() -> None:
    def parts(**changes: object) -> dict:
        made = {
            "prior": StandardNormal(2),
            "conditionals": [MeanFieldNormal(MLP(5), 3)],
            "likelihood": Bernoulli(MLP(5, 4)),
            "features": [MLP(4, hidden=(6,)), MLP(6, hidden=(7,))],
            "guides": [MeanFieldNormal(MLP(11), 3), MeanFieldNormal(MLP(7), 2)],
            "above": "state",
            "states": [State((3,), (5,)), State((2,), (5,))],
        }
        return {**made, **changes}

    LadderVAE(**parts())
    for changes, message in (
        ({"states": []}, "states: of 2 layers, above='state' does not go with 0"),
        ({"above": "all"}, "states: of 2 layers, above='all' does not go with 2"),
        ({"states": [State((3,), (6,)), State((2,), (5,))]}, r"what is handed down is \(6,\), the decoder's input is"),
        ({"states": [State((3,), (5,)), State((1,), (5,))]}, r"a layer of the model is \(2,\), that of its state is"),
        ({"conditionals": [MeanFieldNormal(MLP(2), 3)]}, r"what is above is \(5,\), a conditional's input is \(2,\)"),
        ({"guides": [MeanFieldNormal(MLP(9), 3), MeanFieldNormal(MLP(7), 2)]}, r"both is \(11,\), a guide's input is"),
    ):
        with pytest.raises(UsageError, match=message):
            LadderVAE(**parts(**changes))
    recipe = {"model": {"name": "ladder", "above": "state"}, "likelihood": "bernoulli", "latent_dim": [1, 1]}
    with pytest.raises(UsageError, match=r"3 stages of `network.channels` need as many layers at least, got 2"):
        build_model(Recipe(**recipe, network={"name": "residual-conv", "channels": "2,2,2"}), (1, 6, 4))


def test_guides_that_a_grid_cannot_make_alike_are_refused() -> None:
    with pytest.raises(UsageError, match="which 6 places of a grid cannot make alike"):
        deep("learned", "residual-conv", guide="full-covariance")


@pytest.mark.parametrize("network", ["residual", "residual-conv"])
def test_the_pass_over_the_data_is_run_once_for_each_datum(network: str) -> None:
    """Whatever the number of particles, features are of (N, *event), and of nothing that was drawn."""
    pair, x = deep(network=network), bits(4)
    seen: list[int] = []
    for of_x in pair.features.networks:
        of_x.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0] * (output.ndim == 2)))
    log_weights(pair.model, pair.guide, x, 9)
    assert seen == [4] * 5


@pytest.mark.parametrize(("name", "event", "sizes"), [
    ("deep-mnist", (1, 28, 28), [12, 8, 8, 6, 6]),
    ("deep-cifar10", (3, 32, 32), [512, 512, 512, 256, 256, 256]),
])  # fmt: skip
def test_recipes_declare_what_their_comments_say(name: str, event: tuple[int, ...], sizes: list[int]) -> None:
    """Layers of so many elements, each of which has its KL and reaches x."""
    text = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text()
    assert f"python -m pyrovae.fit --config recipes/{name}.yaml --data-root DIR" in text
    recipe = Recipe(**yaml.safe_load(text)).settled(levels=256)
    pair, x = build_model(recipe, event), torch.ones(2, *event)
    assert pair.sizes == sizes
    found = measure(pair.model, pair.guide, [x], ELBO())
    assert all(found[f"kl_z{i + 1}"] > 0 for i in range(len(sizes)))
    code = pair.encode(x).requires_grad_()
    pair.likelihood(pair.handed(code)).mean.sum().backward()
    assert all(part.abs().max() > 0 for part in code.grad.split(sizes, -1))


def test_layers_that_are_held_stay_and_the_others_are_drawn_given_them() -> None:
    """All held, every draw is p(x|z) at the row's own z; the top layer held, it is that of all and others differ."""
    pair, x = deep(network="residual-conv"), bits(1)
    layers = pair.drawn(x)
    assert list(layers) == list(pair.code)
    code = torch.cat(list(layers.values()), -1)
    assert_close(pair.sample(3, mean=True, held=layers), pair.decode(code).expand(3, *x.shape[1:]), **EXACT)
    some = pair.sample(2000, mean=True, held={"z5": layers["z5"]})
    assert some.std(0).max() > 1e-3
    below = [given(layers["z5"]) for given in (lambda z: pair.conditionals[3](pair.states[4](z, None)),)]
    torch.manual_seed(0)
    z4 = below[0].sample((2000,))[:, 0]
    fourth = {"z5": layers["z5"].expand(2000, -1), "z4": z4}
    assert_mean(pair.sample(2000, mean=True, held=fourth) - some, 0.0, least=0.1)


def test_resumed_equals_never_stopped(tmp_path: Path) -> None:
    """Stopped in the second epoch and gone on with from other weights: every weight as if never stopped."""
    x, taken = bits(40), itertools.count(1)

    def train(pair: LadderVAE, **options: object) -> LadderVAE:
        fit(pair.model, pair.guide, x, ELBO(), epochs=2, batch_size=10, seed=1, progress=False, **options)
        return pair

    never = train(deep())
    train(deep(), directory=tmp_path, should_stop=lambda: next(taken) == 6)
    other = deep()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    last = train(other, directory=tmp_path, resume=True)
    for name, value in last.state_dict().items():
        assert torch.equal(value, never.state_dict()[name]), name
