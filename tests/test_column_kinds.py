"""Columns of more kinds: each density integrates to 1 in the column's own units; what made one is recovered."""

import itertools
import math

import pandas as pd
import pytest
import torch
from conftest import EXACT, assert_mean
from scipy import stats
from torch import Tensor, nn
from torch.testing import assert_close

import pyrovae
from pyrovae.columns import measure_of, parse, written
from pyrovae.data import load_data
from pyrovae.errors import DataError
from pyrovae.models import MLP, Columns, MixtureOfProducts
from pyrovae.models.ordinal import Ordinal
from pyrovae.models.tables import OfTable

KINDS = parse("income=positive,error=heavy,share=fraction,grade=ordinal:4,age=continuous")
SPEC = "income=positive,error=heavy,share=fraction,grade=ordinal,age=continuous"


def made(rows: int = 3000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Columns of a known model of one number z, and z: shapes (N, 5) and (N, 1)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 1, generator=generator)
    noise = torch.randn(rows, 1, generator=generator)
    income = (10 + 0.8 * z + 0.5 * noise).exp()
    heavy = torch.from_numpy(stats.t(4).rvs((rows, 1), random_state=seed)).float()
    error = 1000 + 300 * z + 100 * heavy
    total, mean = 12.0, (0.7 * z - 0.5).sigmoid()
    share = torch.from_numpy(stats.beta(total * mean, total * (1 - mean)).rvs(random_state=seed)).float()
    logistic = torch.rand(rows, 1, generator=generator).clamp(1e-6, 1 - 1e-6).logit()
    grade = torch.bucketize(1.5 * z + logistic, torch.tensor([-2.0, 0.0, 1.0])).float()
    age = 40 + 10 * z + 5 * torch.randn(rows, 1, generator=generator)
    return torch.cat([income, error, share.clamp(1e-4, 1 - 1e-4), grade, age], 1), z


def part_of(x: Tensor) -> Columns:
    """A likelihood that is linear in z, started at x."""
    torch.manual_seed(0)
    part = Columns(MLP(1, Columns.decoder_shape((5,), columns=KINDS), hidden=()), KINDS)
    part.initialise(x)
    return part


def test_each_column_is_a_density_in_its_own_units_or_a_mass() -> None:
    """Quadrature over one column at a time, the others held: the total of p is that of the others alone."""
    x, _ = made()
    part = part_of(x).double()
    with torch.no_grad():
        elements = part(torch.zeros(1, 1).double()).base_dist
        row = x[:1].double()
        at = row.repeat(40_001, 1)
        grids = {
            0: torch.linspace(3, 17, 40_001).double().exp(),
            1: 1000 + 100 * torch.linspace(-12, 12, 40_001).double().sinh(),
            2: torch.linspace(-30, 30, 40_001).double().sigmoid(),
            4: torch.linspace(-200, 280, 40_001).double(),
        }
        for column, grid in grids.items():
            density = elements.log_prob(at.index_copy(1, torch.tensor([column]), grid[:, None]))[:, column].exp()
            assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4), KINDS[column]
        levels = row.repeat(4, 1).index_copy(1, torch.tensor([3]), torch.arange(4.0)[:, None].double())
        assert elements.log_prob(levels)[:, 3].exp().sum().item() == pytest.approx(1, abs=1e-12)
        means = elements.mean[0]
        assert means[3].isnan()
        draws = elements.expand((20_000, 5)).sample()
        assert_mean(draws[:, [2, 4]], means[[2, 4]])
        assert (draws[:, 0] > 0).all()
        assert set(draws[:, 3].unique().tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_ordered_classes_are_intervals_of_a_logistic_number() -> None:
    """By hand, and it sums to 1 far from all thresholds; its start has the frequencies of the classes."""
    part = Ordinal(MLP(2, 3, hidden=(4,)), 5).double()
    with torch.no_grad():
        part.first.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        part.raw_gaps.copy_(torch.randn(3, 3))
    z = 30 * torch.randn(7, 2).double()
    log_p = torch.stack([part(z).base_dist.log_prob(torch.full((7, 3), float(level))) for level in range(5)], -1)
    assert log_p.isfinite().all()
    assert_close(log_p.exp().sum(-1), torch.ones(7, 3).double(), **EXACT)
    gaps = 1e-3 + nn.functional.softplus(part.raw_gaps)
    thresholds = torch.cat([part.first[:, None], part.first[:, None] + gaps.cumsum(1)], 1)
    below = (thresholds - part.decoder(z).unsqueeze(-1)).sigmoid()
    edges = torch.cat([torch.zeros(7, 3, 1), below, torch.ones(7, 3, 1)], -1)
    assert_close(log_p.exp(), edges.diff(dim=-1), rtol=0, atol=1e-12)
    x = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 1]).double()[:, None].expand(10, 3)
    for parameter in part.decoder.parameters():
        nn.init.zeros_(parameter)
    part.initialise(x)
    shares = torch.tensor([2, 2, 3, 1, 2]).double() + 1
    at_start = part(torch.zeros(1, 2).double()).base_dist.probs[0]
    assert_close(at_start, (shares / shares.sum()).expand(3, 5), rtol=0, atol=1e-6)
    with pytest.raises(DataError, match="classes from 0 to 4, got 3 other values"):
        part.check_support(x[:1] + 5)


def test_the_model_that_made_a_table_is_recovered() -> None:
    """z being known, by gradient: slopes, scales, tails, concentrations and thresholds, each near what it was."""
    x, z = made(4000)
    part = part_of(x)
    optimiser = torch.optim.Adam(part.parameters(), 0.03)
    for _ in range(500):
        optimiser.zero_grad()
        (-part(z).log_prob(x).mean()).backward()
        optimiser.step()
    with torch.no_grad():
        at = [part(torch.full((1, 1), value)).base_dist for value in (0.0, 1.0)]
        inner = {type(p).__name__: [q.parts[i] for q in at] for i, p in enumerate(at[0].parts)}
        income = inner["OpenLogNormal"]
        assert_close(torch.cat([p.loc[0] for p in income]), torch.tensor([10.0, 10.8]), rtol=0, atol=0.05)
        assert income[0].scale.item() == pytest.approx(0.5, abs=0.03)
        heavy = inner["ScaledT"]
        assert heavy[0].df.item() == pytest.approx(4, abs=1)
        i = 1  # the column of errors
        locs = torch.cat([part.loc[i] + part.unit[i] * p.loc[0] for p in heavy])
        assert_close(locs, torch.tensor([1000.0, 1300.0]), rtol=0, atol=12)
        assert (part.unit[i] * heavy[0].scale).item() == pytest.approx(100, abs=6)
        share = inner["OpenBeta"]
        assert_close(torch.cat([p.mean[0] for p in share]), torch.tensor([-0.5, 0.2]).sigmoid(), rtol=0, atol=0.02)
        grades = torch.stack([p.probs[0, 0] for p in inner["Categorical"]])
        wanted = torch.tensor([[-2.0, 0, 1], [-3.5, -1.5, -0.5]]).sigmoid()
        assert_close(grades.cumsum(-1)[:, :3], wanted, rtol=0, atol=0.04)


def test_kinds_are_read_from_a_table_and_refused_where_they_do_not_fit() -> None:
    x, _ = made(200)
    frame = pd.DataFrame(x.numpy(), columns=[column.name for column in KINDS])
    rows = load_data(frame, columns=SPEC).rows("columns")
    assert (
        rows.measure.description
        == "density of 4 columns (1 continuous, 1 positive, 1 heavy, 1 fraction) times mass of 1 (1 ordinal)"
    )
    assert (
        measure_of(parse("a=continuous,b=continuous,c=ordinal:3")) == "density of 2 columns times mass of 1 (1 ordinal)"
    )
    assert written(rows.table) == written(KINDS)
    assert rows.table[3].classes == ("0", "1", "2", "3")
    for spec, words in (
        ("error=positive,income=positive,age=fraction", "'age' is fraction, but has values that are no such numbers"),
        ("grade=positive", "'grade' is positive, but has values that are no such numbers"),
        ("grade=ordinal:7", "has 4 different values, expected 7"),
    ):
        with pytest.raises(DataError, match=words):
            load_data(frame, columns=spec)
    words = frame.assign(grade=frame["grade"].map({0: "never", 1: "rarely", 2: "often", 3: "always"}))
    with pytest.raises(
        DataError, match="'grade' is ordinal, but has words, such as 'always', whose order is not known"
    ):
        load_data(words, columns=SPEC)


def test_an_encoder_sees_each_kind_on_a_scale_of_its_own() -> None:
    """Within a few units, whatever the outliers, and every number has another view."""
    x, _ = made()
    x[0, 1] = 1e9
    view = OfTable((5,), KINDS)
    view.initialise(x)
    seen = view(x)
    assert seen[1:].abs().max() < 12
    assert_close(seen.mean(0), torch.zeros(5), rtol=0, atol=1e-3)
    assert_close(seen.std(0), torch.ones(5), rtol=0, atol=1e-2)
    for column in range(5):
        assert len(seen[:, column].unique()) > 0.9 * len(x[:, column].unique())


def test_the_mixture_of_products_takes_them_with_gaps() -> None:
    """EM gains at every step; a positive column's density is that of its logarithm, by hand, and draws are positive."""
    x, _ = made(400)
    x = x.double().masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.2, math.nan)
    torch.manual_seed(0)
    mixture = MixtureOfProducts(5, 3, columns=KINDS).double()
    mixture.initialise(x)
    history = mixture.em(x, max_iterations=15)
    assert all(after >= before for before, after in itertools.pairwise(history))
    assert history[-1] > history[0] + 0.1
    only = torch.full((2, 5), math.nan).double()
    only[:, 0] = torch.tensor([9000.0, 50_000.0])
    log_x = only[:, 0].log()
    each = torch.distributions.Normal(mixture.loc[:, 0], mixture.log_scale[:, 0].exp()).log_prob(log_x[:, None])
    wanted = (mixture.weights.log() + each).logsumexp(1) - log_x
    assert_close(mixture.log_prob(only), wanted, **EXACT)
    assert (mixture.sample(500)[:, 0] > 0).all()
    with pytest.raises(DataError, match="the numbers of these columns, or NaN"):
        mixture.log_prob(-x)


@pytest.mark.slow
def test_a_run_of_such_a_table_is_trained_and_drawn_from(tmp_path) -> None:
    x, _ = made(300)
    frame = pd.DataFrame(x.numpy(), columns=[column.name for column in KINDS])
    frame.assign(grade=frame["grade"].astype(int) + 1).to_csv(tmp_path / "x.csv", index=False)
    options = {"data": str(tmp_path / "x.csv"), "columns": SPEC, "elbo": "iwae", "latent_dim": [2], "epochs": 2}
    run = pyrovae.train({**options, "eval_K": 20, "seed": 0, "device": "cpu"}, tmp_path / "run", plots=False)
    assert math.isfinite(run.evaluation["log_marginal"])
    from pyrovae.sample import command

    assert command([str(run.directory), "--n", "50", "--out", str(tmp_path / "draws.csv")]) == 0
    drawn = pd.read_csv(tmp_path / "draws.csv")
    assert set(drawn["grade"]) <= {1, 2, 3, 4}
    assert (drawn["income"] > 0).all()
    assert drawn["share"].between(0, 1, inclusive="neither").all()
