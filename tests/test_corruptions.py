r"""What a guide sees while it is trained may be corrupted; what it explains may not.

For noise e of the corruption, x~ = c(x, e):  E_q(z|x~) log p(x, z) / q(z|x~)  =  log p(x) - KL(q(z|x~) || p(z|x)).
"""

import json
from collections.abc import Callable

import pytest
import torch
from conftest import EXACT, assert_mean, sigma_points
from test_linear_gaussian import LinearGaussian, Q, linear_guide
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

import pyrovae
from pyrovae import Recipe
from pyrovae.errors import PairError, UsageError
from pyrovae.inference import ELBO, IWAE, StickingTheLanding, fit, log_marginal, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.training import gradients as parts
from pyrovae.inference.training.step import Step
from pyrovae.inference.weights import draw
from pyrovae.models import (
    MLP,
    VAE,
    ConvDecoder,
    ConvEncoder,
    Corruption,
    FullCovarianceNormal,
    Gaussian,
    Masking,
    MeanFieldNormal,
    Noise,
    SaltAndPepper,
    StandardNormal,
    VampPrior,
)
from pyrovae.models.corruptions import CORRUPTIONS
from pyrovae.runs.build import build_model

SHAPES = {"MLP": (6,), "Conv": (1, 4, 4)}


def pair(corruption: Corruption | None = None, kind: str = "MLP", vamp: bool = False) -> VAE:
    """A small pair in double precision, always the same one."""
    torch.manual_seed(0)
    shape = SHAPES[kind]
    encoder = MLP(shape, hidden=(5,)) if kind == "MLP" else ConvEncoder(shape, (3,), 6)
    decoder = MLP(2, shape, hidden=(5,)) if kind == "MLP" else ConvDecoder(2, shape, (3,), 6)
    guide = MeanFieldNormal(encoder, 2)
    prior = VampPrior(guide, shape, 3) if vamp else StandardNormal(2)
    return VAE(prior, Gaussian(decoder), guide, corruption).double()


def rows(n: int = 23, kind: str = "MLP") -> Tensor:
    return 1 + torch.randn(n, *SHAPES[kind], dtype=torch.float64, generator=torch.Generator().manual_seed(3))


every = pytest.mark.parametrize("make", CORRUPTIONS[1:], ids=lambda cls: cls.word)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_draws_while_training_and_never_in_evaluation(make: Callable[[], Corruption], dtype: torch.dtype) -> None:
    """Other draws each time, the same from the same random state, of the shape and type of x; x itself else."""
    corruption, x = make(), rows().to(dtype)
    before = x.clone()
    first, second = corruption(x), corruption(x)
    assert first.shape == x.shape
    assert first.dtype == dtype
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    third = corruption(x)
    torch.manual_seed(4)
    assert torch.equal(corruption.eval().corrupt(x), third)
    assert corruption(x) is x
    assert torch.equal(x, before)


def test_elements_are_drawn_with_the_share_and_each_by_itself() -> None:
    """Masked to 0, or to the least and the greatest value of the data, half and half; the others are as they were."""
    x = 2 + torch.rand(400, 10, dtype=torch.float64)
    for corruption in (Masking(0.2), SaltAndPepper(0.2)):
        corruption.initialise(x)
        seen = corruption(x)
        hit = seen != x
        assert_mean(hit.double().flatten(), 0.2, least=0.05)
        pairs = hit[:, :-1].double() * hit[:, 1:]
        assert_mean(pairs.flatten(), 0.04, least=0.03)
        if isinstance(corruption, Masking):
            assert (seen[hit] == 0).all()
        else:
            low, high = x.min().float().double(), x.max().float().double()
            assert ((seen[hit] == low) | (seen[hit] == high)).all()
            assert_mean((seen[hit] == high).double(), 0.5, least=0.15)


def test_noise_is_a_share_of_the_spread_of_the_data() -> None:
    """Mean 0 and variance (scale * sd)^2 with the sd about each element's own mean; sd 1 until it is started."""
    x = torch.tensor([5.0, -5.0]) + 3 * torch.randn(4000, 2, dtype=torch.float64)
    for start, sd in ((False, 1.0), (True, (x - x.mean(0)).square().mean().sqrt().item())):
        corruption = Noise(0.25).double()
        if start:
            corruption.initialise(x)
        noise = (corruption(x) - x).flatten()
        assert_mean(noise, 0.0, least=0.15 * sd)
        assert_mean(noise.square(), (0.25 * sd) ** 2, least=0.05 * sd**2)


@every
def test_the_bound_is_below_log_p_of_the_clean_row_by_the_kl_of_what_the_guide_saw(make, noise: Callable) -> None:
    """Exactly, whatever was drawn: E log w = log p(x) - KL(q(z|x~) || p(z|x)), all particles under one draw."""
    exact = LinearGaussian()
    vae, x = exact.vae(linear_guide(FullCovarianceNormal), "fixed"), exact.sample(7)
    vae.corruption = make().double()
    vae.corruption.initialise(x)
    noise(sigma_points(Q))
    torch.manual_seed(5)
    seen = vae.corruption.corrupt(x)
    torch.manual_seed(5)
    weights = log_weights(vae.model, vae.guide, x, 2 * Q)
    posterior = MultivariateNormal((x - exact.mu) @ exact.gain.T, exact.covariance)
    kl = kl_divergence(vae.posterior(seen), posterior)
    assert_close(weights.mean(0), exact.log_prob(x) - kl, **EXACT)
    assert (kl - kl_divergence(vae.posterior(x), posterior)).abs().max() > 0.01
    torch.manual_seed(5)
    clean = log_weights(vae.eval().model, vae.guide, x, 2 * Q)
    assert_close(clean.mean(0), exact.log_prob(x) - kl_divergence(vae.posterior(x), posterior), **EXACT)


@every
def test_neither_target_nor_prior_sees_it(make: Callable[[], Corruption]) -> None:
    """In training mode: what the model explains is x, and a prior made of the guide is that of evaluation mode."""
    vae, x = pair(make(), vamp=True), rows()
    particles = draw(Pair(vae.model, vae.guide), Batch(x), 3)
    assert torch.equal(particles.model_trace.nodes["x"]["value"].expand_as(x), x)
    z = torch.randn(9, 2, dtype=torch.float64)
    now = vae.prior().log_prob(z)
    assert torch.equal(vae.prior().log_prob(z), now)
    assert torch.equal(vae.eval().prior().log_prob(z), now)
    assert torch.equal(pair(vamp=True).prior().log_prob(z), now)


@every
@pytest.mark.parametrize("kind", SHAPES)
def test_log_p_and_codes_are_of_clean_rows_in_training_mode_too(make: Callable[[], Corruption], kind: str) -> None:
    """Everything that is reported is that of the same pair without a corruption, to the last bit."""
    corrupted, clean, x = pair(make(), kind), pair(None, kind), rows(kind=kind)
    assert corrupted.training
    estimates = []
    for vae in (corrupted, clean):
        torch.manual_seed(2)
        estimates.append(log_marginal(vae.model, vae.guide, x, 50).estimate)
    assert torch.equal(*estimates)
    assert torch.equal(corrupted.encode(x), clean.encode(x))
    assert torch.equal(corrupted.reconstruct(x), clean.reconstruct(x))


@every
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_graph_draws_it_as_the_pair_does(
    make: Callable[[], Corruption], kind: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of a traced step are those of the pair on the same noise, and of the next noise others."""
    monkeypatch.setattr(parts, "compile_graph", lambda graph: torch.no_grad()(graph))
    whole, x = (lambda vae: Pair(vae.model, vae.guide))(pair(make(), kind)), Batch(rows(7, kind))
    found = {}
    for compiled in (False, True):
        step = Step(
            IWAE(4), whole, torch.optim.SGD(whole.trainable().values()), compiled=compiled, particle_chunk=chunk
        )
        for seed in (5, 6):
            torch.manual_seed(seed)
            loss, slopes, _ = step.gradient(x, 0)
            found[compiled, seed] = [loss, *slopes]
        assert step.refused is None
    for seed in (5, 6):
        for got, wanted in zip(found[True, seed], found[False, seed], strict=True):
            assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert abs(found[True, 5][0] - found[True, 6][0]) > 1e-3


@every
def test_training_that_was_stopped_goes_on_to_the_same_bits(make: Callable[[], Corruption], tmp_path) -> None:

    def trained(**options) -> tuple[list[float], list[Tensor]]:
        vae, x = pair(make()), rows()
        vae.initialise(x)
        settings = {"epochs": 3, "batch_size": 5, "seed": 7, "compile": "off"} | options
        history = fit(vae.model, vae.guide, x, ELBO(), **settings).history
        return [epoch["train_bound"] for epoch in history], [p.detach().clone() for p in vae.parameters()]

    whole, seen = trained(), iter(range(1, 100))
    trained(directory=tmp_path, should_stop=lambda: next(seen) == 7)
    bounds, weights = trained(directory=tmp_path, resume=True)
    assert bounds == whole[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, whole[1], strict=True))


def test_a_guide_that_is_run_twice_must_see_the_same() -> None:
    vae, x = pair(Masking()), rows()
    with pytest.raises(PairError, match="as with dropout or corruption"):
        IWAE(2, gradient=StickingTheLanding()).bound(vae.model, vae.guide, x)


@pytest.mark.parametrize("options", [{}, {"latent_dim": [3, 2], "model": "hierarchical"}, {"condition": "label"}])
def test_a_recipe_gives_it_to_every_pair(options: dict) -> None:
    """`--corruption masking --corruption.share 0.25`: the first guide alone sees it."""
    chosen = {"name": "masking", "share": "0.25"}
    recipe = Recipe(**options, corruption=chosen, likelihood="gaussian", network={"hidden": "4"}).settled(
        classes=("a", "b") if options.get("condition") else ()
    )
    assert recipe.plain()["corruption"] == {"name": "masking", "share": 0.25}
    model, x = build_model(recipe, (6,)).double(), rows()
    given = (torch.eye(2, dtype=torch.float64)[torch.arange(23) % 2],) if options.get("condition") else ()
    assert [m.share for m in model.modules() if isinstance(m, Masking)] == [0.25]
    model.initialise(x, *given)
    seen = []
    first = model.encoder.encoder if given else model.guides[0].encoder
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., :6]))
    clean = model.posterior(x, *given)
    model.guide(x, *given)
    masked = seen[1] != seen[0]
    assert 0.1 < masked.double().mean() < 0.4
    assert clean.mean.shape[0] == len(x)
    with pytest.raises(UsageError, match=r"^corruption: not used, since a mixture is fit by its exact log p"):
        Recipe(model="mixture", corruption="masking")
    with pytest.raises(UsageError, match=r"^corruption\.share: expected a number of at least 0 and below 1, got 1"):
        Recipe(corruption={"name": "masking", "share": "1"})


def test_a_run_that_denoises(tmp_path) -> None:
    """The command's way: the run says so, is read again, and fills in what is masked better than one that does not."""
    common = {"epochs": 15, "latent_dim": [8], "seed": 1, "eval_rows": 20, "eval_K": 10, "device": "cpu", "K": 1}
    errors = {}
    for corruption, share in (("none", {}), ("masking", {"share": 0.5})):
        run = pyrovae.train({**common, "corruption": {"name": corruption} | share}, tmp_path / corruption, plots=False)
        model, test = run.model(), run.rows().test
        torch.manual_seed(0)
        seen = Masking(0.5).corrupt(test)
        hidden = seen != test
        errors[corruption] = (model.reconstruct(seen) - test)[hidden].square().mean().item()
    assert run.recipe.corruption.name == "masking"
    assert json.loads((tmp_path / "masking" / "evaluation.json").read_text())["log_marginal"] < 0
    assert errors["masking"] < 0.9 * errors["none"]
