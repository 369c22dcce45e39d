r"""A conditional pair p(x|z, y) where everything is known.

z|y ~ N(Ay, S) with diagonal S, x|z, y ~ N(Wz + By + b, s2 I):

    log p(x|y) = log N(x; W A y + B y + b, C),  C = W S W' + s2 I
    p(z|x, y)  = N(A y + G (x - W A y - B y - b), S - G W S),  G = S W' C^-1
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXACT, assert_mean
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.nn.functional import one_hot
from torch.testing import assert_close

import pyrovae
from pyrovae import Recipe, compare, evaluate
from pyrovae.data import load_data
from pyrovae.data.streaming import MappedRows
from pyrovae.errors import CheckpointError, DataError, UsageError
from pyrovae.inference import Fit, log_marginal, log_weights
from pyrovae.models import (
    MLP,
    AmortisedPrior,
    Bernoulli,
    ConditionalVAE,
    ConvDecoder,
    ConvEncoder,
    FullCovarianceNormal,
    Gaussian,
    MeanFieldNormal,
    StandardNormal,
    UnconditionalPrior,
    VampPrior,
)
from pyrovae.models.conditional import join
from pyrovae.models.guides import SCALE_FLOOR
from pyrovae.runs.build import build_model, build_rows, settle
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.recipe import title
from pyrovae.runs.training import observations

D, Z, C = 5, 2, 3
SCALE = 0.6


def linear_pair() -> ConditionalVAE:
    """The pair, by networks without hidden layers, in double precision."""
    prior = AmortisedPrior(MeanFieldNormal(MLP(C, hidden=()), Z))
    likelihood = Gaussian(MLP(Z + C, D, hidden=()), scale=SCALE)
    pair = ConditionalVAE(prior, likelihood, FullCovarianceNormal(MLP(D + C, hidden=()), Z)).double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.normal_()
        prior.conditional.head.weight[Z:] = 0  # one scale for all y
    return pair


class Closed:
    """What is known of `linear_pair`."""

    def __init__(self, pair: ConditionalVAE) -> None:
        head, output = pair.prior.conditional.head, pair.likelihood.decoder.body[1]
        self.A, self.a = head.weight[:Z].detach(), head.bias[:Z].detach()
        self.S = torch.diag((torch.nn.functional.softplus(head.bias[Z:].detach()) + SCALE_FLOOR).square())
        self.W, self.B = output.weight.detach().split([Z, C], 1)
        self.b = output.bias.detach()
        self.covariance = self.W @ self.S @ self.W.T + SCALE**2 * torch.eye(D, dtype=torch.float64)
        self.gain = self.S @ self.W.T @ torch.linalg.inv(self.covariance)

    def mean(self, y: Tensor) -> Tensor:
        return (y @ self.A.T + self.a) @ self.W.T + y @ self.B.T + self.b

    def log_marginal(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(x|y), shape (N,)."""
        return MultivariateNormal(self.mean(y), self.covariance).log_prob(x)

    def make_exact(self, pair: ConditionalVAE) -> None:
        """Make q(z|x, y) the posterior, which is linear in (x, y) with one covariance."""
        head = pair.encoder.head
        tril = torch.linalg.cholesky(self.S - self.gain @ self.W @ self.S)
        by_y = self.A - self.gain @ (self.W @ self.A + self.B)
        with torch.no_grad():
            head.weight.zero_()
            head.weight[:Z] = torch.cat([self.gain, by_y], 1)
            diagonal = tril.diagonal() - SCALE_FLOOR
            raw = diagonal + torch.log(-torch.expm1(-diagonal))
            head.bias.copy_(
                torch.cat(
                    [
                        self.a - self.gain @ (self.W @ self.a + self.b),
                        raw,
                        tril[pair.encoder.rows, pair.encoder.columns],
                    ]
                )
            )


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """x and one-hot y of 12 rows; each label occurs."""
    return torch.randn(12, D, dtype=torch.float64), one_hot(torch.arange(12) % C, C).double()


def test_with_the_exact_posterior_each_log_weight_is_log_p_of_x_given_y(rows):
    pair = linear_pair()
    closed = Closed(pair)
    closed.make_exact(pair)
    x, y = rows
    log_w = log_weights(pair.model, pair.guide, x, 4, given=(y,))
    assert_close(log_w, closed.log_marginal(x, y).expand(4, -1), rtol=0.0, atol=1e-8)
    result = log_marginal(pair.model, pair.guide, x, 30, chunk_size=7, given=(y,))  # in blocks and chunks
    assert_close(result.estimate, closed.log_marginal(x, y), rtol=0.0, atol=1e-8)
    assert result.standard_error.max() < 1e-7  # the root of rounding


def test_the_average_weight_is_p_of_x_given_y_and_one_draw_is_a_bound_below(rows):
    pair = linear_pair()
    closed = Closed(pair)
    closed.make_exact(pair)
    with torch.no_grad():  # near the posterior, and not it
        pair.encoder.head.weight.add_(0.05 * torch.randn_like(pair.encoder.head.weight))
        pair.encoder.head.bias[Z : 2 * Z] += 0.7
    x, y = rows
    truth = closed.log_marginal(x, y)
    log_w = log_weights(pair.model, pair.guide, x, 20_000, given=(y,)).detach()
    assert_mean((log_w - truth).exp(), 1.0, least=0.1)
    assert (truth - log_w.mean(0) > 5 * log_w.std(0) / math.sqrt(len(log_w))).all()


def test_other_labels_change_log_p_as_the_closed_form_says(rows):
    """The guide is exact for any y: what is left is p(x|y') against p(x|y)."""
    pair = linear_pair()
    closed = Closed(pair)
    closed.make_exact(pair)
    x, y = rows
    swapped = y.roll(1, 0)
    difference = closed.log_marginal(x, swapped) - closed.log_marginal(x, y)
    assert difference.abs().min() > 0.01
    of_pair = [log_weights(pair.model, pair.guide, x, given=(labels,))[0] for labels in (swapped, y)]
    assert_close(of_pair[0] - of_pair[1], difference, rtol=0.0, atol=1e-8)


def test_samples_are_draws_of_x_given_y():
    pair = linear_pair()
    closed = Closed(pair)
    for label in range(C):
        y = one_hot(torch.tensor(label), C).double()
        x = pair.sample(20_000, y)
        assert_mean(x, closed.mean(y), least=0.2)
        centred = x - closed.mean(y)
        assert_mean(centred[:, :, None] * centred[:, None, :], closed.covariance)
    y = one_hot(torch.arange(20_000) % C, C).double()  # one label for each
    assert_mean(pair.sample(20_000, y) - closed.mean(y), 0.0, least=0.2)
    means = pair.sample(20_000, y, mean=True) - closed.mean(y)
    assert_mean(means[:, :, None] * means[:, None, :], closed.covariance - SCALE**2 * torch.eye(D).double())


def test_a_prior_that_is_the_same_for_all_y(rows):
    """Then log p(x|y) = log N(x; By + b, WW' + s2 I)."""
    pair = linear_pair()
    pair.prior = UnconditionalPrior(StandardNormal(Z)).double()
    closed = Closed(linear_pair())
    output = pair.likelihood.decoder.body[1]
    closed.W, closed.B = output.weight.detach().split([Z, C], 1)
    closed.A, closed.a, closed.b, closed.S = (
        torch.zeros(Z, C).double(),
        torch.zeros(Z).double(),
        output.bias.detach(),
        torch.eye(Z).double(),
    )
    closed.covariance = closed.W @ closed.W.T + SCALE**2 * torch.eye(D, dtype=torch.float64)
    closed.gain = closed.W.T @ torch.linalg.inv(closed.covariance)
    closed.make_exact(pair)
    x, y = rows
    assert_close(log_weights(pair.model, pair.guide, x, given=(y,))[0], closed.log_marginal(x, y), rtol=0.0, atol=1e-8)


def test_join_puts_y_beside_each_datum():
    y = one_hot(torch.tensor([2, 0]), C).double()
    z = torch.randn(7, 2, Z, dtype=torch.float64)  # K particles of N = 2
    assert_close(join(z, y), torch.cat([z, y.expand(7, 2, C)], -1), **EXACT)
    image = torch.randn(2, 1, 4, 5)
    joined = join(image, y, 3)
    assert joined.shape == (2, 1 + C, 4, 5)
    assert torch.equal(joined[:, :1], image.double())
    assert torch.equal(joined[:, 1:], y[:, :, None, None].expand(2, C, 4, 5))


@pytest.mark.parametrize("dense", [True, False])
def test_images_with_labels_as_channels_or_in_one_vector(dense):
    shape = (1, 8, 8)
    x = (torch.rand(20, *shape) < 0.3).float()
    y = one_hot(torch.arange(20) % C, C).float()
    encoder = MLP(64 + C, hidden=(7,)) if dense else ConvEncoder((1 + C, 8, 8), channels=(4, 6))
    decoder = MLP(Z + C, shape, hidden=(7,)) if dense else ConvDecoder(Z + C, shape, channels=(4, 6))
    guide = MeanFieldNormal(encoder, Z)
    pair = ConditionalVAE(UnconditionalPrior(VampPrior(guide, guide.event_shape, 5)), Bernoulli(decoder), guide)
    pair.initialise(x, y)
    assert log_weights(pair.model, pair.guide, x, 3, given=(y,)).shape == (3, 20)
    assert pair.sample(4, y[0]).shape == pair.sample(4, y[:4]).shape == (4, *shape)
    assert pair.reconstruct(x, y).shape == (20, *shape)
    assert not torch.equal(pair.encode(x, y), pair.encode(x, y.roll(1, 0)))
    with pytest.raises(DataError, match="support"):
        pair.model(x + 0.5, y)


def test_the_encoder_sees_labels_as_large_as_the_data():
    """Of data with a standard deviation of 1000, labels of 0 and 1 would else be rounding."""
    x = 1000 * torch.randn(200, D)
    y = one_hot(torch.arange(200) % C, C).float()
    guide = MeanFieldNormal(MLP(D + C, hidden=(7,)), Z)
    pair = ConditionalVAE(UnconditionalPrior(StandardNormal(Z)), Gaussian(MLP(Z + C, D)), guide)
    pair.initialise(x, y)
    seen = (pair.beside(x, y) - guide.shift) * guide.rescale
    assert 0.3 < seen[:, :D].std() < 2
    assert 0.3 < seen[:, D:].std() < 2


def test_parts_that_do_not_fit_are_named():
    prior, guide = UnconditionalPrior(StandardNormal(Z)), MeanFieldNormal(MLP(D + C), Z)
    likelihood = Gaussian(MLP(Z + C, D))
    with pytest.raises(UsageError, match="the guide's latent_dim is 2, the prior's is 3"):
        ConditionalVAE(UnconditionalPrior(StandardNormal(3)), likelihood, guide)
    with pytest.raises(UsageError, match="too few for"):
        ConditionalVAE(prior, Gaussian(MLP(Z, D)), guide)
    with pytest.raises(UsageError, match=r"the guide's input is \(5,\), expected \(8,\)"):
        ConditionalVAE(prior, likelihood, MeanFieldNormal(MLP(D), Z))
    pair = ConditionalVAE(prior, likelihood, guide)
    with pytest.raises(UsageError, match=r"y: expected shape \(N, 3\), got \(4, 2\)"):
        pair.encode(torch.zeros(4, D), torch.zeros(4, 2))
    with pytest.raises(UsageError, match=r"expected shape \(3,\) or \(5, 3\), got \(4, 3\)"):
        pair.sample(5, torch.zeros(4, 3))


# ------------------------------------------------------------------------------------------------------------- runs

SMALL = {
    "data": "three-gaussians",
    "condition": "label",
    "latent_dim": 1,
    "network": {"hidden": 8},
    "batch_size": 250,
    "lr": 0.03,
    "epochs": 10,
    "eval_K": 20,
    "eval_rows": 60,
    "seed": 1,
    "device": "cpu",
    "compile": "off",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run given labels that no test may change."""
    return pyrovae.train(Recipe(**SMALL), tmp_path_factory.mktemp("runs") / "run")


def test_a_run_given_labels_says_log_p_of_x_given_the_label(run, capsys):
    values = json.loads((run.directory / "evaluation.json").read_text())
    assert values["measure"] == "density of the data in its own units, 2 dimensions, given the label"
    model, rows = pyrovae.load(run.directory), run.rows()
    given = tuple(y[:60] for y in rows.given["test"])
    result = log_marginal(model.model, model.guide, rows.test[:60], 20, seed=0, given=given)
    assert values["log_marginal"] == pytest.approx(result.mean, abs=1e-5)
    evaluate.command([str(run.directory), "--K", "40", "--rows", "60", "--compile", "off"])
    assert "given the label" in capsys.readouterr().out
    assert {path.stem for path in (run.directory / "plots").glob("*.png")} == {
        *("training_curves", "samples", "reconstructions", "latent_map", "k_curve")
    }


def test_training_given_labels_reaches_log_p_of_x_given_y(run):
    """x|y is one of three Gaussians: which of them is worth more than a nat, and is known."""
    model, rows = run.model(), run.rows()
    x, given = rows.test, rows.given["test"]
    angle = math.pi / 2 + 2 * math.pi * torch.arange(3) / 3
    truth = Normal(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.5).log_prob(x[:, None]).sum(-1)
    known, unknown = (given[0] * truth).sum(1), truth.logsumexp(1) - math.log(3)
    assert known.mean() - unknown.mean() > 1
    found = log_marginal(model.model, model.guide, x, 100, given=given).estimate
    assert abs(found.mean() - known.mean()) < 0.1


def test_a_run_given_labels_draws_each_class_where_its_data_are(run):
    model, rows = pyrovae.load(run.directory), run.rows()
    assert rows.given.columns == run.recipe.classes == ("0", "1", "2")
    centres = torch.stack([rows.test[rows.labels["test"] == label].mean(0) for label in range(3)])
    for label, y in enumerate(torch.eye(3)):
        distance = (model.sample(500, y).mean(0) - centres).norm(dim=1)
        assert distance.argmin() == label


def test_runs_given_labels_are_compared_with_no_model_of_x_alone(run, tmp_path, capsys):
    other = pyrovae.train(Recipe(**{**SMALL, "condition": None, "epochs": 1}), tmp_path / "plain", plots=False)
    words = [str(run.directory), str(other.directory), "--K", "5", "--rows", "30", "--components", "2"]
    compare.command([*words, "--out", str(tmp_path / "tables")])
    tables = {path.stem: path.read_text() for path in (tmp_path / "tables").glob("*.csv")}
    assert set(tables) == {"density", "density-given-label", "density-quality", "density-given-label-quality"}
    assert "mixture" in tables["density"]
    assert "mixture" not in tables["density-given-label"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "mixture"}, "^condition: not used, since a mixture is of p"),
        (
            {"model": "hierarchical"},
            "^condition: not used, since a hierarchical model is given nothing; use `model=vae`",
        ),
        ({"condition": 5}, "^condition: expected a word"),
    ],
)
def test_what_cannot_be_given_labels(options, words):
    with pytest.raises(UsageError, match=words):
        Recipe(**{"condition": "label", **options})


def test_classes_that_a_run_does_not_have_are_refused(run, tmp_path):
    text = (run.directory / "config.yaml").read_text()
    for wrong in (text.replace("- '2'", "- [1]"), text.replace("condition: label", "condition: null")):
        (tmp_path / "config.yaml").write_text(wrong)
        with pytest.raises(CheckpointError, match="classes: expected"):
            open_run(tmp_path)


@pytest.mark.parametrize("network", [{"name": "mlp", "hidden": 9}, {"name": "conv", "channels": "3,4", "hidden": 9}])
def test_recipes_of_images_given_labels(network):
    recipe = Recipe(condition="label", latent_dim=2, network=network, prior={"name": "VampPrior", "components": 4})
    rows = build_rows(recipe)
    recipe = settle(recipe, rows)
    model = build_model(recipe, rows.event_shape)
    x, y = rows.test[:20], rows.given["test"][0][:20]
    model.initialise(x, y)
    assert log_weights(model.model, model.guide, x, 2, given=(y,)).isfinite().all()
    assert model.sample(3, y[:3]).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("condition", ["label", None])
def test_a_scale_at_its_floor_is_said_given_labels_too(condition: str | None) -> None:
    recipe = Recipe(**{**SMALL, "condition": condition})
    rows = build_rows(recipe)
    model = build_model(settle(recipe, rows), rows.event_shape)
    fitted = Fit([{"epoch": 1.0}], 1)
    assert observations(model, fitted, rows, torch.device("cpu")) == []
    model.likelihood.raw_scale.data.fill_(-30.0)
    (said,) = observations(model, fitted, rows, torch.device("cpu"))
    assert said.startswith("the likelihood's scale is at its floor, 0.001 standard deviations of the data, for 1e+02 %")


# --------------------------------------------------------------------------------------------- columns of a table as y


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows: age (30 +- 5), sex (0 or 1), a label of three; x = (a, b), N((age - 30) / 5 + 3 sex, 0.5^2) each."""
    torch.manual_seed(0)
    age, sex, group = 30 + 5 * torch.randn(600), (torch.rand(600) < 0.3).float(), torch.arange(600) % 3
    x = ((age - 30) / 5 + 3 * sex)[:, None] + 0.5 * torch.randn(600, 2)
    path = tmp_path_factory.mktemp("table") / "people.csv"
    lines = [f"{a:.6f},{s:.0f},g{g},{p:.6f},{q:.6f}" for a, s, g, (p, q) in zip(age, sex, group, x, strict=True)]
    path.write_text("\n".join(["age, sex,label,a,b", *lines]))
    return path


def test_columns_leave_x_and_are_given_instead(table: Path) -> None:
    """Standardised by the training rows; zeros and ones as they are; in the order in which they are named."""
    data = load_data(table)
    plain, rows = data.rows("density"), data.rows("density", condition="sex,label,age")
    assert data.columns == ("age", " sex", "a", "b")
    assert rows.columns == ("a", "b")
    assert rows.given.columns == ("sex", "label g0", "label g1", "label g2", "age")
    assert rows.measure.description == ("density of the data in its own units, 2 dimensions, given sex, label, age")
    mean, sd = plain.train[:, 0].double().mean(), plain.train[:, 0].double().std(correction=0)
    for split in ("train", "validation", "test"):
        x, (y,) = getattr(plain, split), rows.given[split]
        assert_close(getattr(rows, split), x[:, 2:], **EXACT)
        assert_close(y[:, 0], x[:, 1], **EXACT)
        assert_close(y[:, 1:4], one_hot(rows.labels[split], 3).float(), **EXACT)
        assert_close(y[:, 4].double(), (x[:, 0].double() - mean) / sd, rtol=0, atol=1e-6)
    assert len({plain.hash, rows.hash, data.rows("density", condition="sex").hash}) == 3


def test_examples_to_draw_for_are_classes_or_ends_of_each_column(table: Path) -> None:
    data = load_data(table)
    by_class = data.rows("density", condition="age,label").given
    assert list(by_class.examples) == ["g0", "g1", "g2"]
    means = by_class["train"][0].mean(0)
    assert_close(torch.stack(list(by_class.examples.values())), torch.cat([means[:1].expand(3, 1), torch.eye(3)], 1))
    by_column = data.rows("density", condition="age,sex").given
    names = list(by_column.examples)
    assert [name.split(" = ")[0] for name in names] == ["age", "age", "sex", "sex"]
    low, high = (float(name.split(" = ")[1]) for name in names[:2])
    assert (low, high) == (pytest.approx(25, abs=1), pytest.approx(35, abs=1))
    share = by_column["train"][0][:, 1].mean()
    assert_close(
        torch.stack(list(by_column.examples.values()))[:2], torch.stack([torch.tensor([-1, 1]), share.expand(2)], 1)
    )


def test_zeros_and_ones_that_are_left_are_binary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bits, age = (torch.rand(50, 3) < 0.5).long(), torch.randn(50)
    path = tmp_path / "bits.csv"
    path.write_text("\n".join(["age,a,b,c", *(f"{a:.5f},{p},{q},{r}" for a, (p, q, r) in zip(age, bits, strict=True))]))
    with pytest.raises(DataError, match="no mass on"):
        load_data(path).rows("mass")
    rows = load_data(path).rows("mass", condition="age")
    assert rows.train.dtype == torch.uint8
    assert rows.measure.description == "mass on {0,1}^3, given age"


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("agee", "condition: 'agee' is none of label, age, sex, a, b, total; did you mean age"),
        ("age,age", "condition: 'age' is named twice"),
        ("age,,sex", "condition: '' is none of"),
        ("b,a,sex,age", "condition: takes all columns, so that no x is left"),
    ],
)
def test_columns_that_cannot_be_given(table: Path, condition: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_data(table).rows("density", condition=condition)
    with pytest.raises(UsageError, match=r"none of label, total$"):
        load_data("three-gaussians").rows("density", condition="age")


def test_a_run_given_columns_reaches_log_p_of_x_given_them(table: Path, tmp_path: Path, capsys) -> None:
    """x|y is Gaussian: from the file to a scored run, with a prior p(z|y) by a network."""
    options = {
        **SMALL,
        "data": str(table),
        "condition": "age,sex",
        "batch_size": 60,
        "epochs": 60,
        "prior": "amortised",
    }
    run = pyrovae.train({**options, "eval_K": 200}, tmp_path / "run")
    model, rows = pyrovae.load(run.directory), run.rows()
    assert type(model.prior) is AmortisedPrior
    plain = load_data(table).rows("density").test
    truth = Normal(((plain[:, 0] - 30) / 5 + 3 * plain[:, 1])[:, None], 0.5).log_prob(rows.test).sum(-1)
    found = log_marginal(model.model, model.guide, rows.test, 200, given=rows.given["test"], seed=0).estimate
    assert abs(found.mean() - truth.mean()) < 0.15
    assert run.evaluation["measure"].endswith("2 dimensions, given age, sex")
    assert (run.directory / "plots" / "samples.png").exists()
    assert title(run.recipe) == "people-elbo-K1-AmortisedPrior-Gaussian-given-age-sex"
    words = [str(run.directory), "--K", "5", "--rows", "30", "--out", str(tmp_path / "tables")]
    compare.command(words)
    assert (tmp_path / "tables" / "density-given-age-sex.csv").exists()


def test_a_prior_given_a_condition_needs_one() -> None:
    with pytest.raises(UsageError, match=r"^prior=AmortisedPrior: is p\(z\|y\), and nothing is given; give `condition"):
        Recipe(prior="amortised")


# --------------------------------------------------------------------------------------------- labels beside a .npy


def test_labels_lie_beside_rows_that_stay_in_their_file(tmp_path: Path) -> None:
    """The same labels, and the same training, whether rows are streamed or in memory."""
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    np.save(tmp_path / "rows.npy", (0.3 * torch.randn(300, 2) + 4 * y[:, None]).numpy())
    with pytest.raises(DataError, match=r"no labels.*NAME\.labels\.npy beside NAME\.npy"):
        load_data(tmp_path / "rows.npy").rows("density", condition="label")
    np.save(tmp_path / "rows.labels.npy", y.numpy())
    options = {**SMALL, "data": str(tmp_path / "rows.npy"), "batch_size": 50, "epochs": 2}
    runs = [pyrovae.train({**options, "stream": how}, tmp_path / how, plots=False) for how in ("on", "off")]
    streamed = load_data(tmp_path / "rows.npy", stream="on").rows("density", condition="label")
    assert isinstance(streamed.train, MappedRows)
    assert torch.equal((streamed.train[:].mean(1) / 4).round().long().clamp(0, 2), streamed.given["train"][0].argmax(1))
    assert any("labels are read from" in notice for notice in streamed.notices)
    weights = [run.model().state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert runs[0].evaluation["log_marginal"] == runs[1].evaluation["log_marginal"]
    np.save(tmp_path / "rows.labels.npy", y[:-1].numpy())
    with pytest.raises(DataError, match="300 rows in train, but labels of shape"):
        load_data(tmp_path / "rows.npy", stream="on")
