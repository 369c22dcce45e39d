"""Tables with columns of several kinds: a density times a mass, words in and words out, and gaps."""

import importlib
import itertools
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from conftest import EXACT
from torch import Tensor, nn
from torch.testing import assert_close

import pyrovae
from pyrovae.columns import Column, measure_of, parse, written
from pyrovae.data import load_data
from pyrovae.encode import command as encode
from pyrovae.errors import DataError, UsageError
from pyrovae.inference import IWAE, fit, log_marginal
from pyrovae.models import MLP, VAE, Columns, MeanFieldNormal, MixtureOfProducts, PartlySeen, StandardNormal
from pyrovae.runs.comparing import compare_runs
from pyrovae.runs.directory import Run
from pyrovae.runs.scoring import Scoring
from pyrovae.sample import command as sample

KINDS = parse("age=continuous,visits=count,smoker=binary,job=categorical:3,height=continuous")


def made(rows: int = 200, gaps: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """A table of five columns that know of one another, with a share of its cells empty."""
    random = np.random.default_rng(seed)
    z = random.normal(size=rows)
    frame = pd.DataFrame(
        {
            "age": (40 + 10 * z + 3 * random.normal(size=rows)).round(2),
            "visits": random.poisson(np.exp(0.5 + 0.7 * z)),
            "smoker": np.where(random.random(rows) < 1 / (1 + np.exp(-2 * z)), "yes", "no"),
            "job": np.array(["clerk", "nurse", "smith"])[np.digitize(z + random.normal(size=rows), [-0.5, 0.5])],
            "height": (1.7 + 0.05 * z + 0.05 * random.normal(size=rows)).round(3),
        }
    )
    return frame.astype(object).mask(random.random(frame.shape) < gaps)


def saved(frame: pd.DataFrame, path: Path) -> str:
    frame.to_csv(path, index=False)
    return str(path)


def likelihood(scale: str = "per-column", counts: str = "negative-binomial") -> Columns:
    torch.manual_seed(0)
    shape = Columns.decoder_shape((5,), columns=KINDS, scale=scale, counts=counts)
    return Columns(MLP(2, shape, hidden=(7,)), KINDS, scale, counts)


def rows_of(frame: pd.DataFrame, missing: bool = False) -> Tensor:
    return (
        load_data(frame, columns="auto", missing=missing)
        .rows("columns")
        .transform(load_data(frame, columns="auto", missing=missing).train)
    )


def test_the_kinds_are_written_said_and_counted() -> None:
    assert written(KINDS) == "age=continuous,visits=count,smoker=binary,job=categorical:3,height=continuous"
    assert measure_of(KINDS) == "density of 2 columns times mass of 3 (1 binary, 1 count, 1 categorical)"
    assert measure_of(parse("a=count,b=count")) == "mass of 2 columns (2 count)"
    assert measure_of(parse("a=continuous")) == "density of 1 column"
    for wrong in ("age", "age=old", "=count", "age=count:3", "a=count,a=binary", "job=categorical:1"):
        with pytest.raises(UsageError, match=r"^columns: "):
            parse(wrong)


def test_a_product_is_the_sum_of_its_columns_in_the_units_of_each() -> None:
    """By hand: Gaussians in the units of the data, a negative binomial, a Bernoulli and a softmax of three."""
    part, x = likelihood(), rows_of(made())
    part.initialise(x)
    part, x = part.double(), x.double()
    z = torch.randn(len(x), 2).double()
    p = part(z)
    out = dict(
        zip(("continuous", "binary", "count", "categorical"), part.decoder(z).split(part.sizes, -1), strict=True)
    )
    gaussian, bernoulli, binomial, classes = part.parts
    scale = gaussian.unit * (gaussian.floor + nn.functional.softplus(gaussian.raw_scale))
    loc = gaussian.unit * (out["continuous"] + gaussian.decoder.bias)
    ours = {"age": (0, 0), "height": (4, 1)}
    wanted = torch.zeros(len(x), 5).double()
    for column, at in ours.values():
        mean, sd = x[:, column].mean(), x[:, column].std(correction=0)
        normal = dist.Normal(mean + sd * loc[:, at], sd * scale[at])
        wanted[:, column] = normal.log_prob(x[:, column])
    logits = out["binary"] + bernoulli.decoder.bias
    wanted[:, 2] = dist.Bernoulli(logits=logits[:, 0]).log_prob(x[:, 2])
    wanted[:, 1] = binomial(out["count"]).log_prob(x[:, 1:2])
    wanted[:, 3] = (
        (out["categorical"] + classes.decoder.bias.flatten()).log_softmax(-1).gather(1, x[:, 3:4].long())[:, 0]
    )
    assert_close(p.base_dist.log_prob(x), wanted, rtol=1e-4, atol=1e-5)  # m and s are in single precision
    assert_close(p.log_prob(x), p.base_dist.log_prob(x).sum(-1), **EXACT)


@pytest.mark.parametrize("scale", ["per-column", "predicted"])
@pytest.mark.parametrize("counts", ["negative-binomial", "poisson"])
def test_masses_of_columns_sum_to_1_and_draws_have_the_frequencies(scale: str, counts: str) -> None:
    """Of each column by itself, a density by the trapezoid rule; and draws are in the support."""
    part = likelihood(scale, counts)
    part.initialise(rows_of(made()))
    part = part.double()
    p = part(torch.zeros(2).double())
    with torch.no_grad():
        draws = p.sample((20_000,))
        part.check_support(draws)
        for column, values in ((1, range(400)), (2, range(2)), (3, range(3))):
            points = torch.zeros(len(values), 5).double()
            points[:, column] = torch.tensor(list(values)).double()
            mass = p.base_dist.log_prob(points)[:, column].exp()
            assert mass.sum().item() == pytest.approx(1, abs=1e-8)
            share = (draws[:, column, None] == points[:3, column]).double().mean(0)
            assert ((share - mass[:3]).abs() < 5 * (mass[:3] * (1 - mass[:3]) / 20_000).sqrt() + 1e-9).all()
        for column in (0, 4):
            mean, sd = draws[:, column].mean(), draws[:, column].std()
            points = torch.zeros(4001, 5).double()
            points[:, column] = torch.linspace(mean - 9 * sd, mean + 9 * sd, 4001)
            density = p.base_dist.log_prob(points)[:, column].exp()
            assert torch.trapezoid(density, points[:, column]).item() == pytest.approx(1, abs=1e-4)
        assert_close(p.mean[[0, 1, 2, 4]], draws.mean(0)[[0, 1, 2, 4]], rtol=0.1, atol=0.05)
        assert p.mean[3].isnan()


def test_other_units_change_log_p_by_their_logarithm_and_nothing_else() -> None:
    """Height in centimetres: the same bound but for log 100, at the start and after training."""
    x = rows_of(made())
    other = x.clone()
    other[:, 4] *= 100
    found = []
    for rows in (x, other):
        part = likelihood()
        view = part.view((5,))
        vae = VAE(StandardNormal(2), part, MeanFieldNormal(MLP(view.out_shape, hidden=(7,)).seeing(view), 2))
        vae.initialise(rows)
        fit(vae.model, vae.guide, rows, IWAE(3), epochs=3, batch_size=50, seed=0, progress=False)
        found.append(log_marginal(vae.model, vae.guide, rows, 20).estimate)
    assert_close(found[0] - math.log(100), found[1], rtol=0, atol=0.02)


def test_kinds_are_guessed_and_said_and_classes_have_their_words() -> None:
    frame = made().assign(
        flag=[0, 1] * 100, many=np.arange(200) * 1000, truth=[True, False] * 100, label=["u", "v"] * 100
    )
    data = load_data(frame, columns="auto")
    kinds = {column.name: str(column).partition("=")[2] for column in data.table}
    assert kinds == {
        "age": "continuous", "visits": "count", "smoker": "binary", "job": "categorical:3", "height": "continuous",
        "flag": "binary", "many": "continuous", "truth": "binary",
    }  # fmt: skip
    assert any("guessed: age=continuous, visits=count" in notice for notice in data.notices)
    assert next(column for column in data.table if column.name == "job").classes == ("clerk", "nurse", "smith")
    assert data.classes == ("u", "v")
    assert data.rows("columns").measure.description.startswith("density of 3 columns times mass of 5 (3 binary,")
    assert data.rows("columns").measure.bits_per_dimension(-1.0) is None
    said = load_data(frame, columns="flag=categorical,visits=continuous")
    assert {c.name: c for c in said.table}["flag"] == Column("flag", "categorical", ("0", "1"), 2)
    assert {c.name: c.kind for c in said.table}["visits"] == "continuous"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("hight=continuous", r"'hight' is none of .*; did you mean height\?"),
        ("job=continuous", r"'job' is continuous, but has words, such as 'clerk'"),
        ("age=count", r"'age' is count, but has values that are no such numbers"),
        ("job=binary", r"'job' has 3 different values, expected two"),
        ("job=categorical:4", r"'job' has 3 different values, expected 4"),
    ],
)
def test_columns_that_are_not_what_they_are_said_to_be_are_refused(columns: str, words: str) -> None:
    with pytest.raises((DataError, UsageError), match=words):
        load_data(made(), columns=columns)


def test_empty_cells_are_refused_unless_they_are_said_to_be_missing(tmp_path: Path) -> None:
    frame = made(gaps=0.2)
    for source in (frame, saved(frame, tmp_path / "x.csv")):
        with pytest.raises(DataError, match=r"NaN, infinite or beyond float32.*`missing`"):
            load_data(source, columns="auto")
        data = load_data(source, columns="auto", missing=True)
        assert any("values are missing" in notice for notice in data.notices)
        assert data.rows("columns").measure.description.endswith(", of what is seen")
    array = np.where(
        np.random.default_rng(0).random((50, 3)) < 0.3, np.nan, np.random.default_rng(1).normal(size=(50, 3))
    )
    np.save(tmp_path / "x.npy", array)
    rows = load_data(tmp_path / "x.npy", missing=True).rows("density", standardize=True)
    x = rows.transform(rows.train)
    assert_close(x.nanmean(0), torch.zeros(3), rtol=0, atol=1e-5)
    np.save(tmp_path / "bits.npy", np.where(np.isnan(array), np.nan, array > 0))
    bits = load_data(tmp_path / "bits.npy", missing=True)
    assert bits.rows("mass").measure.description == "mass on {0,1}^3, of what is seen"
    np.save(tmp_path / "inf.npy", np.where(np.isnan(array), np.inf, array))
    with pytest.raises(DataError, match="infinite"):
        load_data(tmp_path / "inf.npy", missing=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a table with a fifth of its cells empty."""
    folder = tmp_path_factory.mktemp("table")
    options = {
        "data": saved(made(300, 0.2), folder / "x.csv"), "columns": "age=continuous", "missing": True, "elbo": "iwae",
        "latent_dim": [2], "epochs": 3, "eval_K": 50, "seed": 0, "device": "cpu",
    }  # fmt: skip
    return pyrovae.train(options, folder / "run", plots=False)


def test_a_run_of_a_table_keeps_its_columns_and_says_its_measure(run) -> None:
    assert run.recipe.columns == written(KINDS)
    assert run.recipe.likelihood.name == "Columns"
    wanted = "density of 2 columns times mass of 3 (1 binary, 1 count, 1 categorical), of what is seen"
    assert run.evaluation["measure"] == wanted
    assert run.evaluation["bits_per_dimension"] is None
    assert run.evaluation["reconstruction_quality"] is None
    assert run.evaluation["verdict"] in ("ok", "lower bound only")
    assert isinstance(run.model().likelihood, PartlySeen)
    again = pyrovae.train(run.recipe.replace(epochs=3), run.directory.parent / "again", plots=False)
    assert again.evaluation["log_marginal"] == run.evaluation["log_marginal"]


def test_draws_are_a_table_like_that_of_the_data(run, tmp_path: Path) -> None:
    """The same columns, with words where it has words and whole numbers where it has those; and read as such again."""
    assert sample([str(run.directory), "--n", "50", "--out", str(tmp_path / "draws.csv")]) == 0
    drawn = pd.read_csv(tmp_path / "draws.csv")
    assert list(drawn) == [column.name for column in KINDS]
    assert set(drawn["smoker"]) == {"yes", "no"}
    assert set(drawn["job"]) <= {"clerk", "nurse", "smith"}
    assert drawn["visits"].dtype.kind == "i"
    assert encode([str(run.directory), "--data", str(tmp_path / "draws.csv"), "--out", str(tmp_path / "z.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "z.csv")) == 50
    saved(drawn.assign(job="pilot"), tmp_path / "others.csv")
    with pytest.raises(DataError, match="column 'job' has 'pilot', expected clerk, nurse, smith"):
        encode([str(run.directory), "--data", str(tmp_path / "others.csv"), "--out", str(tmp_path / "y.csv")])


def test_what_is_missing_is_imputed_and_what_is_seen_is_kept(run, tmp_path: Path) -> None:
    path = str(tmp_path / "i.csv")
    assert (
        sample([str(run.directory), "--impute", "missing", "--rows", "9", "--n", "3", "--K", "50", "--out", path]) == 0
    )
    made_of = pd.read_csv(path)
    assert len(made_of) == 27
    for column in KINDS:
        there = made_of[f"seen {column.name}"]
        assert made_of[column.name].notna().all()
        assert (made_of[column.name][there] == made_of[f"original {column.name}"][there]).all()
        assert (made_of[f"imputed {column.name}"][there] == made_of[f"original {column.name}"][there]).all()
        assert made_of[f"original {column.name}"][~there].isna().all()
    assert (made_of["ess"] >= 1).all()
    assert "log_prob_missing" not in made_of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": "auto", "likelihood": "gaussian"}, "columns: not used by Gaussian"),
        ({"columns": "auto", "standardize": True}, "standardize: not used"),
        ({"columns": "auto", "prior": "VampPrior"}, "pseudo-inputs have no classes"),
        ({"missing": True, "model": "mixture"}, "missing: not used, since a mixture"),
        ({"missing": True, "corruption": "noise"}, "corruption: is of whole rows"),
        ({"columns": "age"}, "columns: expected NAME=KIND"),
    ],
)
def test_options_that_make_no_sense_with_a_table_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pyrovae.Recipe(data="x.csv", **options)


def mixture_of(x: Tensor, components: int = 3) -> MixtureOfProducts:
    mixture = MixtureOfProducts(5, components, columns=KINDS).double()
    mixture.initialise(x)
    history = mixture.em(x, max_iterations=15)
    assert all(after >= before for before, after in itertools.pairwise(history))
    assert history[-1] > history[0]
    return mixture


def test_a_mixture_of_products_is_the_sum_over_components_of_what_is_seen() -> None:
    """By hand, row by row; EM never loses; p(x) = p(seen) p(missing | seen), whatever is seen."""
    x = rows_of(made(gaps=0.2), missing=True)
    mixture = mixture_of(x)
    at = {"age": 0, "height": 1}
    wanted = []
    for row in x.double():
        total = mixture.weights.log().detach()
        for i, column in enumerate(KINDS):
            if row[i].isnan():
                continue
            if column.kind == "continuous":
                scale = mixture.log_scale[:, at[column.name]].exp()
                part = dist.Normal(mixture.loc[:, at[column.name]], scale)
            elif column.kind == "count":
                part = dist.Poisson(mixture.log_rate[:, 0].exp())
            elif column.kind == "binary":
                part = dist.Bernoulli(logits=mixture.logits[:, 0])
            else:
                part = dist.Categorical(logits=mixture.classes[0])
            total = total + part.log_prob(row[i]).detach()
        wanted.append(total.logsumexp(0))
    assert_close(mixture.log_prob(x).detach(), torch.stack(wanted), **EXACT)
    whole = rows_of(made(60, seed=1))
    seen = torch.rand(len(whole), 5, generator=torch.Generator().manual_seed(0)) < 0.6
    parts = mixture.log_prob_seen(whole, seen) + mixture.log_prob_missing(whole, seen)
    assert_close(parts, mixture.log_prob(whole), rtol=1e-9, atol=1e-9)
    assert_close(
        mixture.log_prob_seen(whole, seen), mixture.log_prob(whole.where(seen, math.nan)), rtol=1e-9, atol=1e-9
    )
    filled = mixture.impute(whole, seen, num_draws=5)
    assert torch.equal(filled[:, seen], whole[seen].expand(5, -1))
    with pytest.raises(DataError, match="the numbers of these columns, or NaN"):
        mixture.log_prob(whole + 0.5)


def test_a_mixture_fit_to_rows_with_gaps_is_near_that_of_whole_rows() -> None:
    """Missing at random: other rows, whole, have about the same log p(x); filled with medians they do not."""
    frame, others = made(2000), rows_of(made(500, seed=3))
    gaps = frame.astype(object).mask(np.random.default_rng(1).random(frame.shape) < 0.3)
    of_whole, of_gaps = mixture_of(rows_of(frame)), mixture_of(rows_of(gaps, missing=True))
    x = rows_of(gaps, missing=True)
    of_filled = mixture_of(x.where(~x.isnan(), x.nanmedian(0).values))
    scores = [model.log_prob(others).mean().item() for model in (of_whole, of_gaps, of_filled)]
    assert abs(scores[0] - scores[1]) < 0.15
    assert scores[0] - scores[2] > 0.3


def test_compare_puts_the_mixture_of_products_beside_a_run(run, tmp_path: Path) -> None:
    """Exact, on the same rows with the same gaps; reconstructions of several kinds have no table."""
    said: list[str] = []
    scored = compare_runs([run], Scoring(50), tmp_path / "out", components=(1, 2), say=said.append)
    assert [s.name for s in scored] == ["run", "mixture of 2 products over columns"]
    assert scored[1].results[0].num_particles == 0
    assert scored[0].estimate.mean() < 0
    assert any("density of 2 columns times mass of 3" in line for line in said)


def test_the_page_on_tables_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks in order: Python as it stands, commands as they are typed."""
    monkeypatch.chdir(tmp_path)
    text = (Path(pyrovae.__file__).parents[1] / "docs" / "tables.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M):
        if kind == "python":
            exec(compile(block, "docs/tables.md", "exec"), names)
            continue
        for line in block.splitlines():
            command, *words = shlex.split(line.removeprefix("python -m "))
            assert importlib.import_module(command).command(words) == 0, line
    assert list(pd.read_csv(tmp_path / "draws.csv")) == ["age", "visits", "smoker", "job"]
    assert names["filled"].mean[:, :3].isfinite().all()
