"""Vector quantisation: codes, their priors, and the bound that a VQ-VAE states."""

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, LeaveOneOut, fit, log_marginal, verdict
from pyrovae.inference.pair import Pair
from pyrovae.inference.training.moving import MovingAverages
from pyrovae.models import (
    MLP,
    VAE,
    Bernoulli,
    ConvDecoder,
    ConvEncoder,
    ExPostVAE,
    MaskedConvolutions,
    TransformerCodes,
    UniformCodes,
    UnigramCodes,
    VampPrior,
    VectorQuantiser,
)
from pyrovae.models.code_networks import CausalAttention, GatedConvolutions
from pyrovae.models.codes import KnownCodes, nearest, vectors
from pyrovae.models.quantiser import usage

SHAPE = (1, 4, 4)
PRIORS = {
    "uniform": UniformCodes,
    "unigram": lambda q: UnigramCodes(q, "by-place"),
    "convolutions": lambda q: MaskedConvolutions(q, 2, 8, 1),
    "transformer": lambda q: TransformerCodes(q, 1, 8, 2),
}


def quantiser(codes: int = 4, code_dim: int = 2, channels: int = 6, **settings: float) -> VectorQuantiser:
    """On a grid of 2 x 2, of images of 4 x 4."""
    encoder = ConvEncoder(SHAPE, channels=(channels,), hidden=0)
    return VectorQuantiser(encoder, 4 * code_dim, codes=codes, code_dim=code_dim, **settings)


def images(rows: int) -> Tensor:
    """Bits of which rows, and places, differ."""
    return (
        torch.rand(rows, *SHAPE) < torch.rand(rows, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    ).float()


def pair(name: str = "uniform", rows: int = 40, **settings: float) -> tuple[VAE, Tensor]:
    """A VQ-VAE of 4 codes on 2 x 2 places, with parameters away from their start, in double precision."""
    x = images(rows).double()
    guide = quantiser(**settings).double()
    vae = VAE(PRIORS[name](guide), Bernoulli(ConvDecoder(8, SHAPE, channels=(6,), hidden=0)), guide).double()
    vae.initialise(x)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vae, x


def every_grid(guide: VectorQuantiser) -> Tensor:
    """All C^M grids of codes."""
    return torch.tensor(list(itertools.product(range(len(guide.codebook)), repeat=guide.places)))


# ------------------------------------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("name", PRIORS)
def test_the_stated_bound_is_one_term_of_the_sum_over_all_codes(name: str) -> None:
    """log p(x|z(x)) + log p(codes), by hand, is the ELBO, and below the sum over all 256 grids, which is log p(x)."""
    vae, x = pair(name)
    vae.eval()
    guide = vae.guides[0]
    with torch.no_grad():
        grids = every_grid(guide)
        z = vectors(grids, guide.codebook)
        joint = vae.prior().log_prob(z)[:, None] + vae.likelihood(z[:, None]).log_prob(x)  # (256, N)
        e = guide.head(guide.encoder((x - guide.shift) * guide.rescale))
        codes = (e.unsqueeze(-2) - guide.codebook).square().sum(-1).argmin(-1)
        place = (codes * 4 ** torch.arange(3, -1, -1)).sum(-1)
        stated = joint[place, torch.arange(len(x))]
        exact = torch.logsumexp(joint, 0)
    assert vae.prior().log_prob(z).exp().sum().item() == pytest.approx(1, abs=1e-12)
    result = log_marginal(vae.model, vae.guide, x, num_particles=40)
    assert verdict(result).kind == "exact"
    assert_close(result.estimate, exact)
    drawn = log_marginal(vae.model, vae.guide, x, num_particles=40, most_states=0)
    assert_close(drawn.estimate, stated)
    assert verdict(drawn).kind == "lower bound only"
    assert (stated < exact - 1e-3).all()


def test_a_guide_with_a_temperature_has_a_bound_of_its_own() -> None:
    """Its ELBO by the sum over all codes; importance sampling finds log p(x); t -> 0 leaves the stated bound."""
    vae, x = pair("convolutions", rows=10)
    vae.eval()
    guide = vae.guides[0]
    point = log_marginal(vae.model, vae.guide, x, 1, most_states=0).estimate
    exact = log_marginal(vae.model, vae.guide, x, 1).estimate
    z = vectors(every_grid(guide), guide.codebook)
    for temperature in (2.0, 1e-9):
        guide.temperature = temperature
        with torch.no_grad():
            log_q = guide(x).log_prob(z[:, None].expand(-1, len(x), -1))
            joint = vae.prior().log_prob(z)[:, None] + vae.likelihood(z[:, None]).log_prob(x)
        assert_close(log_q.exp().sum(0), torch.ones(len(x)).double())
        elbo = (log_q.exp() * (joint - log_q).nan_to_num(0, 0, 0)).sum(0)
        found = log_marginal(vae.model, vae.guide, x, 500, most_states=0)
        assert (elbo < exact).all()
        if temperature > 1:
            assert ((found.estimate - exact).abs() < 5 * found.standard_error + 0.01).all()
            assert found.standard_error.max() < 0.2
        else:
            assert_close(elbo, point, rtol=1e-6, atol=1e-6)
            assert_close(found.estimate, point, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_straight_through_and_commitment_are_what_they_are_defined_as() -> None:
    """d/de of the ELBO is that of log p(x|z) by z at z = c_k, less 2 beta (e - c_k); values have no commitment."""
    vae, x = pair("unigram", commitment=0.7)
    vae.train()
    guide = vae.guides[0]
    found: list[Tensor] = []
    guide.head.register_forward_hook(lambda module, inputs, out: (out.retain_grad(), found.append(out))[0])
    loss = ELBO().differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    (e,) = found
    codes = nearest(guide(x).mean, guide.codebook)[1]
    z = vectors(codes, guide.codebook).requires_grad_()
    log_p = vae.likelihood(z).log_prob(x)
    (slope,) = torch.autograd.grad(log_p.sum(), z)
    slope = slope.unflatten(-1, (2, 4)).transpose(-1, -2)
    assert_close(e.grad, -slope + 2 * 0.7 * (e - guide.codebook[codes]).detach())
    assert_close(loss, -(log_p + vae.prior().log_prob(z)).sum())
    assert vae.prior.logits.grad.abs().max() > 0  # type: ignore[union-attr, operator]


def test_a_draw_is_the_code_to_the_last_bit_and_other_grids_have_no_mass() -> None:
    e = 3 * torch.randn(5, 4, 2)
    codebook = torch.randn(6, 2)
    codes = torch.cdist(e, codebook).argmin(-1)
    q = KnownCodes(e.requires_grad_(), codes, codebook)
    z = q.rsample()
    assert torch.equal(z, vectors(codes, codebook))
    assert q.support.check(z).all()
    assert not q.support.check(z + 1e-6).any()
    assert torch.equal(q.log_prob(z.clone()), torch.zeros(5))
    assert (q.log_prob(z.roll(1, 0)).isneginf() == (codes != codes.roll(1, 0)).any(-1)).all()


# -------------------------------------------------------------------------------------------------------- the codebook


def test_moving_averages_are_those_of_sums_over_those_of_counts() -> None:
    """Three steps by hand, on the vectors of each batch; dead codes are looked at elsewhere."""
    guide = quantiser(decay=0.9, restart=0.0).double()
    x = images(60).double()
    guide.initialise(x)
    counts, codebook = guide.shares.clone(), guide.codebook.clone()
    sums = counts[:, None] * codebook
    moving = MovingAverages(Pair(guide.forward, guide.forward), True, None)
    guide.train()
    for batch in x.split(20):
        with torch.no_grad():
            e = guide.parameters_of(batch).flatten(0, 1)
        codes = (e[:, None] - codebook).square().sum(-1).argmin(1)
        of_code = nn.functional.one_hot(codes, 4).double()
        counts = 0.9 * counts + 0.1 * of_code.mean(0)
        sums = 0.9 * sums + 0.1 * (of_code.T @ e) / len(e)
        codebook = sums / counts[:, None]
        guide(batch)
        moving.step(absent=False)
        assert_close(guide.codebook, codebook)
        assert_close(guide.shares, counts)


def test_statistics_of_processes_are_summed() -> None:
    """Two halves of a batch, each in its process, move the codebook as the whole batch does."""
    x = images(40).double()
    guide = quantiser(restart=0.0).double()
    guide.initialise(x)
    guide.train()
    begin = guide.codebook.clone()
    guide(x)
    whole = guide.statistics(True)[: guide.noted.numel()]
    halves = []
    for half, leading in zip(x.split(20), (True, False), strict=True):
        guide(half)
        halves.append(guide.statistics(leading))
    total = halves[0] + halves[1]
    assert_close(total[: guide.noted.numel()], whole)
    assert torch.equal(total[guide.noted.numel() :], halves[0][guide.noted.numel() :])
    assert (halves[1][guide.noted.numel() :] == 0).all()
    guide.move(total)
    assert not torch.equal(guide.codebook, begin)
    guide.eval()
    noted = guide.noted.clone()
    guide(x)
    assert torch.equal(guide.noted, noted)  # in evaluation mode nothing is


def blobs(rows: int, code_dim: int = 2) -> tuple[VectorQuantiser, Tensor, Tensor]:
    """A quantiser whose vectors are x itself, on a row of 4 places, and x at four well-parted centres."""
    centres = 10 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    x = centres[torch.randint(4, (rows, 4))] + 0.1 * torch.randn(rows, 4, code_dim)
    guide = VectorQuantiser(MLP((4, code_dim), hidden=()), 8, codes=4, code_dim=code_dim)
    with torch.no_grad():
        guide.head[0].weight.copy_(torch.eye(8))  # type: ignore[index, union-attr, operator]
        guide.head[0].bias.zero_()  # type: ignore[index, union-attr, operator]
    return guide, x, centres


def test_the_codebook_starts_at_the_centres_of_clusters() -> None:
    guide, x, centres = blobs(200)
    guide.initialise(x)
    found = guide.codebook / guide.rescale + guide.shift.mean(0)
    assert torch.cdist(centres, found).min(1).values.max() < 0.5
    assert_close(guide.shares.sum(), torch.tensor(1.0))
    assert (guide.shares - 0.25).abs().max() < 0.1
    # With fewer vectors than codes there are codes left, and with equal vectors no two codes are alike.
    few = VectorQuantiser(MLP((4, 2), hidden=()), 8, codes=9, code_dim=2)
    few.initialise(x[:1].expand(2, -1, -1).contiguous())
    assert len(few.codebook.unique(dim=0)) == 9


def test_a_dead_code_starts_again_where_the_codebook_is_worst() -> None:
    """One code is far from all vectors, and one cluster has none: the code goes there, and lives."""
    guide, x, centres = blobs(50)
    guide.codebook.copy_(torch.cat([centres[:3], torch.tensor([[1e3, 1e3]])]))
    moving = MovingAverages(Pair(guide.forward, guide.forward), True, None)
    guide.train()
    for _ in range(400):
        guide(x)
        moving.step(absent=False)
        if (guide.codebook[3] < 100).all():
            break
    assert (guide.codebook[3] - centres[3]).norm() < 1
    assert guide.shares[3].item() == pytest.approx(0.25)
    moving.record()
    guide(x)
    moving.step(absent=False)
    found = moving.record()
    assert found["codes_used"] == 4
    assert found["code_perplexity"] == pytest.approx(4, abs=0.3)


def test_usage_and_perplexity() -> None:
    assert usage(torch.tensor([3.0, 3.0, 0.0, 3.0])) == pytest.approx({"codes_used": 3, "code_perplexity": 3})
    assert usage(torch.tensor([5.0, 0.0])) == pytest.approx({"codes_used": 1, "code_perplexity": 1})
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert usage(8 * shares)["code_perplexity"] == pytest.approx(2**1.5)


# -------------------------------------------------------------------------------------------------------------- priors


@pytest.mark.parametrize(
    "network",
    [
        lambda: GatedConvolutions(3, (3, 4), layers=3, hidden=6, reach=1),
        lambda: GatedConvolutions(3, (3, 4), layers=2, hidden=6, reach=2),
        lambda: CausalAttention(3, (3, 4), layers=2, hidden=6, heads=2),
    ],
    ids=["reach 1", "reach 2", "transformer"],
)
def test_logits_depend_on_the_codes_before_them_and_on_all_of_these(network) -> None:
    """By autograd through the embedding: nothing of a code itself or a later one, something of every earlier one."""
    net = network().double()
    codes = torch.randint(3, (1, 12))
    seen: list[Tensor] = []
    net.embedding.register_forward_hook(
        lambda module, inputs, out: seen.append(out.detach().requires_grad_()) or seen[-1]
    )
    logits = net(codes)
    reached = torch.zeros(12, 12, dtype=torch.bool)
    for place in range(12):
        (slope,) = torch.autograd.grad(logits[0, place].square().sum(), seen[0], retain_graph=True, allow_unused=True)
        size = slope.abs().sum(-1).flatten()
        if isinstance(net, CausalAttention):  # whose inputs are moved by one place before they are embedded
            size = torch.cat([size[1:], size[:1] * 0])
        reached[place] = size > 0
    later = torch.ones(12, 12, dtype=torch.bool).triu()
    assert not (reached & later).any()
    wide = isinstance(net, CausalAttention)
    row, column = torch.arange(12) // 4, torch.arange(12) % 4
    near = (row[:, None] - row <= 1) & ((column[:, None] - column).abs() <= 1)
    assert reached[~later & (near | wide)].all()
    assert near[~later].any()


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_draws_of_a_prior_are_of_its_mass(name: str) -> None:
    """Frequencies of all 256 grids, by the chi-squared distance: 5 standard deviations."""
    vae, _ = pair(name)
    guide = vae.guides[0]
    draws = nearest(vae.prior().sample((20_000,)), guide.codebook)[1]
    place = (draws * 4 ** torch.arange(3, -1, -1)).sum(-1)
    counts = torch.bincount(place, minlength=256).double()
    wanted = 20_000 * vae.prior().log_prob(vectors(every_grid(guide), guide.codebook)).exp().detach()
    kept = wanted > 5
    distance = ((counts - wanted).square() / wanted)[kept].sum().item()
    assert abs(distance - kept.sum().item()) < 5 * math.sqrt(2 * kept.sum().item())
    assert wanted.std() > 10


def test_a_prior_that_is_fitted_afterwards_gains_what_its_codes_are_cheaper_by() -> None:
    """Reconstruction, codes and codebook stay; the stated bound rises by log p(codes), towards their entropy."""
    vae, x = pair("uniform", rows=100)
    vae.eval()
    before = log_marginal(vae.model, vae.guide, x, 1, most_states=0).estimate
    guide = vae.guides[0]
    kept = {name: value.clone() for name, value in guide.state_dict().items()}
    second = ExPostVAE(vae, UnigramCodes(guide, "by-place").double())
    fit(second.model, second.guide, x, ELBO(), epochs=60, batch_size=100, progress=False, compile="off", seed=1,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))  # fmt: skip
    after = log_marginal(second.model, second.guide, x, 1, most_states=0).estimate
    codes = nearest(guide(x).mean, guide.codebook)[1]
    of_code = nn.functional.one_hot(codes, 4).double()
    entropy = -torch.xlogy(of_code.mean(0), of_code.mean(0)).sum()
    assert (after - before).mean().item() == pytest.approx(4 * math.log(4) - entropy.item(), abs=0.02)
    for key, value in guide.state_dict().items():
        assert torch.equal(value, kept[key]), key


def test_a_prior_that_is_trained_beside_it_leaves_the_networks_as_they_are() -> None:
    """No gradient goes from log p(codes) to what they are codes of."""
    weights = []
    for name in ("uniform", "convolutions"):
        torch.manual_seed(3)
        vae, x = pair(name, rows=30)
        torch.manual_seed(4)
        with torch.no_grad():
            for part in (vae.guides[0], vae.likelihood):
                for parameter in part.parameters():
                    parameter.copy_(torch.randn_like(parameter))
        vae.guides[0].codebook.copy_(torch.randn(4, 2))
        x = images(30).double()
        loss = ELBO().differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        weights.append([p.grad for part in (vae.guides[0], vae.likelihood) for p in part.parameters()])
    for a, b in zip(*weights, strict=True):
        assert_close(a, b)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("temperature", "objective"), [(0.0, ELBO()), (1.0, IWAE(3, gradient=LeaveOneOut()))])
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(tmp_path: Path, temperature: float, objective: ELBO) -> None:
    """Stopped in the middle of an epoch: codebook, shares, usage and restarts are those of a run that was not."""

    def run(directory: Path, stop: int = -1, resume: bool = False) -> VAE:
        torch.manual_seed(0)
        vae, x = pair("unigram", rows=36, temperature=temperature, restart=0.9)
        asked = itertools.count(1)
        fit(
            vae.model, vae.guide, x, objective, epochs=2, batch_size=12, compile="off", progress=False, seed=5,
            directory=directory, resume=resume, should_stop=lambda: next(asked) == stop,
        )  # fmt: skip
        return vae

    whole, halved = tmp_path / "whole", tmp_path / "halved"
    first = run(whole).state_dict()
    run(halved, stop=4)
    second = run(halved, resume=True).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    columns = ["codes_used", "code_perplexity", "train_bound"]
    a, b = (pd.read_csv(path / "metrics.csv")[columns] for path in (whole, halved))
    assert a.equals(b)
    assert (a["code_perplexity"] > 1).all()


@pytest.mark.slow
def test_compiled_steps_note_and_restart_as_the_pair_does() -> None:
    """The same bounds, weights and codebook, with dead codes in most steps."""
    ends = []
    for compile in ("off", "on"):
        torch.manual_seed(0)
        vae, x = pair("convolutions", rows=40, restart=0.9)
        done = fit(vae.model, vae.guide, x, ELBO(), epochs=3, batch_size=20, compile=compile, progress=False, seed=2)
        assert done.compiled == (compile == "on")
        ends.append(vae.state_dict())
    for name, value in ends[0].items():
        assert_close(value, ends[1][name], rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_go_together_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="latent_dim: codes of 3 elements on a grid of 2 x 2 take 12, got 10"):
        VectorQuantiser(ConvEncoder(SHAPE, channels=(6,), hidden=0), 10, code_dim=3)
    with pytest.raises(UsageError, match="latent_dim: codes of 3 elements take a multiple of 3, got 10"):
        VectorQuantiser(MLP(5), 10, code_dim=3)
    with pytest.raises(UsageError, match="latent_dim: expected a multiple of the 4 places of a grid of 2 x 2, got 10"):
        ConvDecoder(10, SHAPE, channels=(6,), hidden=0)
    with pytest.raises(UsageError, match="guide: VectorQuantiser has mass on the codes of its own row"):
        VampPrior(quantiser(), SHAPE, 3)
    with pytest.raises(UsageError, match="hidden: expected a multiple of the 3 heads, got 8"):
        TransformerCodes(quantiser(), hidden=8, heads=3)
