r"""Pairs with a class y beside z, against sums over y and quadrature over z.

log p(x) = log sum_y p(y) int p(z|y) p(x|z, y) dz
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.functional import one_hot
from torch.testing import assert_close

import pyrovae
from pyrovae import evaluate
from pyrovae.classify import command as classify_command
from pyrovae.data import load_data
from pyrovae.data.labels import drawn_labels
from pyrovae.errors import DataError, PairError, UsageError
from pyrovae.inference import ELBO, Enumerated, FromPrior, SemiSupervised, classify, fit, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.models import (
    MLP,
    VAE,
    Bernoulli,
    CategoricalGuide,
    CategoricalPrior,
    ConditionalVAE,
    Gaussian,
    GaussianMixtureVAE,
    LabelledVAE,
    MeanFieldNormal,
    MixtureOfGaussians,
    SemiSupervisedVAE,
    StandardNormal,
    UnconditionalPrior,
)

D, C, Z, F = 6, 3, 1, 5
EACH = torch.eye(C, dtype=torch.float64)


def spread(pair: LabelledVAE) -> LabelledVAE:
    """Parameters that differ, in double precision."""
    pair = pair.double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.normal_(std=0.7)
        pair.given_class.head.weight.mul_(0.2)
        pair.given_class.head.bias.copy_(torch.tensor([0.0] * Z + [1.5] * Z))  # wide enough for any posterior
    return pair


def m2() -> SemiSupervisedVAE:
    prior = UnconditionalPrior(StandardNormal(Z))
    likelihood = Bernoulli(MLP(Z + C, (D,), hidden=(4,)))
    guides = (CategoricalGuide(MLP(F, hidden=()), C), MeanFieldNormal(MLP(C + F, hidden=(4,)), Z))
    return spread(SemiSupervisedVAE(CategoricalPrior(C), prior, likelihood, MLP((D,), hidden=(F,)), *guides))


def mixture() -> GaussianMixtureVAE:
    guides = (CategoricalGuide(MLP(F, hidden=()), C), MeanFieldNormal(MLP(C + F, hidden=(4,)), Z))
    prior, likelihood = MixtureOfGaussians(Z, components=C), Bernoulli(MLP(Z, (D,), hidden=(4,)))
    return spread(GaussianMixtureVAE(prior, likelihood, MLP((D,), hidden=(F,)), *guides))


BOTH = pytest.mark.parametrize("make", [m2, mixture])


def bits(rows: int = 8) -> Tensor:
    return torch.randint(2, (rows, D)).double()


@torch.no_grad()
def by_quadrature(pair: LabelledVAE, x: Tensor) -> Tensor:
    """log p(x, y) for each y, shape (N, C): a loop over classes, the trapezoid rule over z."""
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64).unsqueeze(1)
    columns = []
    for c, y in enumerate(EACH):
        if isinstance(pair, SemiSupervisedVAE):
            log_y, p_z = pair.classes.logits.log_softmax(0)[c], torch.distributions.Normal(0.0, 1.0)
            log_x = pair.likelihood(torch.cat([grid, y.expand(len(grid), C)], 1)).log_prob(x[:, None])
        else:
            log_y = pair.prior.logits.log_softmax(0)[c]
            p_z = torch.distributions.Normal(pair.prior.loc[c], pair.prior.scale[c])
            log_x = pair.likelihood(grid).log_prob(x[:, None])
        log_z = p_z.log_prob(grid).squeeze(1)
        columns.append(log_y + torch.logsumexp(log_z + log_x, 1) + math.log(24 / 4000))
    return torch.stack(columns, 1)


@BOTH
def test_log_p_of_x_is_the_sum_over_classes(make) -> None:
    """Unseen, log p(x); seen, log p(x, y); both by the one estimate, with y summed out, within its error."""
    pair, x = make(), bits()
    each = by_quadrature(pair, x)
    result = log_marginal(pair.model, pair.guide, x, 4000, seed=1)
    assert "a sum over 3 joint states of y" in result.estimator
    assert (result.standard_error < 0.1).all(), "no power"
    assert ((result.estimate - torch.logsumexp(each, 1)).abs() < 5 * result.standard_error + 1e-6).all()
    labels = torch.arange(len(x)) % C
    seen = log_marginal(pair.model, pair.guide, x, 4000, seed=1, given=(EACH[labels],))
    wanted = each.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert ((seen.estimate - wanted).abs() < 5 * seen.standard_error + 1e-6).all()
    none = log_marginal(pair.model, pair.guide, x, 50, seed=1, given=(torch.zeros(len(x), C, dtype=torch.float64),))
    assert_close(none.estimate, log_marginal(pair.model, pair.guide, x, 50, seed=1).estimate)


@BOTH
def test_log_p_of_x_is_that_of_its_own_parts(make) -> None:
    """log sum_y p(y) p(x|y) from the pair given y is log p(x), and p(y|x) is exact Bayes, within their errors."""
    pair, x = make(), bits()
    each = by_quadrature(pair, x)
    log_prior = pair.class_prior().log_prob(EACH).detach()
    found = classify(pair.model_of_class, pair.guide_of_class, x, EACH, log_prior, 4000, seed=2)
    assert ((found.log_marginal - torch.logsumexp(each, 1)).abs() < 5 * found.log_marginal_error + 1e-6).all()
    away = (found.probability - each.softmax(1)).abs()
    assert (away < 5 * found.probability_error + 1e-6).all()
    together = log_marginal(pair.model, pair.guide, x, 4000, seed=3)
    error = (together.standard_error.square() + found.log_marginal_error.square()).sqrt()
    assert ((together.estimate - found.log_marginal).abs() < 5 * error).all()


def terms(pair: LabelledVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """log q(y|x) and L(x, y), (N, C), of a pair whose decoder sees nothing of z."""
    (d,) = pair.features(x)
    log_q, bounds = pair.classifier(d).logits.log_softmax(1), []
    for y in EACH:
        rows = y.expand(len(x), C)
        q_z, p_z = pair.given_class(torch.cat([rows, d], 1)), pair.latent_prior(rows)
        log_x = pair.likelihood(pair.code_of(q_z.mean, rows)).log_prob(x)
        p_z = p_z.expand(q_z.batch_shape)
        bounds.append(pair.class_prior().log_prob(y) + log_x - kl_divergence(q_z, p_z))
    return log_q, torch.stack(bounds, 1)


def blind(pair: LabelledVAE) -> LabelledVAE:
    """The pair with a decoder that sees nothing of z, so that a bound has no noise."""
    with torch.no_grad():
        pair.likelihood.decoder.body[1].weight[:, :Z] = 0
    return pair


@BOTH
def test_the_bound_is_the_sum_of_brute_force(make) -> None:
    """Of rows without a label sum_y q(y|x) (L(x, y) - log q(y|x)), of those with one L(x, y) and alpha log q(y|x)."""
    pair, x = blind(make()), bits()
    labels = torch.arange(len(x)) % C
    y = EACH[labels].clone()
    y[::2] = 0  # every second row has none
    log_q, bounds = terms(pair, x)
    without = (log_q.exp() * (bounds - log_q)).sum(1)
    pick = labels.unsqueeze(1)
    seen = bounds.gather(1, pick).squeeze(1)
    wanted = torch.where(y.sum(1) > 0, seen, without)
    both = Pair(pair.model, pair.guide)
    bound = ELBO(gradient=Enumerated()).bound_of(both, Batch.of(x, (y,)))
    assert_close(bound, wanted)
    assert_close(ELBO(gradient=Enumerated()).bound_of(both, Batch.of(x)), without)
    alpha = 7.0
    of_labels = alpha * log_q.gather(1, pick).squeeze(1) * (y.sum(1) > 0)
    trained = SemiSupervised(weight=alpha, gradient=Enumerated()).bound_of(both, Batch.of(x, (y,)))
    assert_close(trained, wanted + of_labels)
    of_z = pair.likelihood.decoder.body[1].weight  # whose gradient is by draws
    parameters = [p for p in pair.parameters() if p is not of_z]
    got = torch.autograd.grad(trained.sum(), parameters, allow_unused=True)
    by_hand = torch.autograd.grad((wanted + of_labels).sum(), parameters, allow_unused=True)
    for a, b in zip(got, by_hand, strict=True):
        assert_close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, check_dtype=False)
    assert all(each is not None and each.isfinite().all() for each in got if each is not None)


def test_a_label_trains_the_classifier_by_the_classification_term_alone() -> None:
    pair, x = m2(), bits()
    y = EACH[torch.arange(len(x)) % C]
    both, batch = Pair(pair.model, pair.guide), Batch.of(x, (y,))
    head = pair.classifier.head.weight
    for weight, wanted in ((0.0, False), (1.0, True)):
        bound = SemiSupervised(weight=weight, gradient=Enumerated()).bound_of(both, batch)
        (gradient,) = torch.autograd.grad(bound.sum(), head)
        assert bool(gradient.abs().max() > 1e-6) == wanted
    with pytest.raises(PairError, match="the guide observes no label"):
        SemiSupervised(gradient=Enumerated()).bound_of(both, Batch.of(x))


def test_a_gaussian_mixture_vae_is_a_vae_with_a_mixture_for_its_prior() -> None:
    """The same prior, likelihood: the same log p(x), whether the component is a latent or summed in the prior."""
    pair, x = mixture(), bits()
    vae = VAE(pair.prior, pair.likelihood, MeanFieldNormal(MLP((D,), hidden=(4,)), Z).double())
    with torch.no_grad():
        vae.guides[0].head.bias.copy_(torch.tensor([0.0, 3.0]))  # wide: z is drawn where all components are
    ours, theirs = (log_marginal(p.model, p.guide, x, 20_000, seed=1) for p in (pair, vae))
    error = (ours.standard_error.square() + theirs.standard_error.square()).sqrt()
    assert (error < 0.1).all(), "no power"
    assert ((ours.estimate - theirs.estimate).abs() < 5 * error).all()
    x = pair.sample(20_000, mean=True)
    assert_close(x.mean(0), vae.sample(20_000, mean=True).mean(0), atol=0.02, rtol=0.0)


def test_compiled_steps_are_those_of_the_pair() -> None:
    """Labels that are seen in part, the sum over y and the classification term, in a graph."""
    x, y = bits(40).float(), one_hot(torch.arange(40) % C, C).float()
    y[::3] = 0
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        pair = m2().float()
        objective = SemiSupervised(weight=2.0, gradient=Enumerated())
        fit(pair.model, pair.guide, x, objective, given=(y,), epochs=2, batch_size=20, compile=mode, progress=False)
        found.append([p.detach().clone() for p in pair.parameters()])
    for eager, compiled in zip(*found, strict=True):
        assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Labels that are seen


def test_labels_are_drawn_alike_everywhere_and_as_many_of_each_class() -> None:
    labels = torch.arange(60) % 4
    drawn = drawn_labels(labels, 4, 10, 3, "rows")
    assert labels[drawn].bincount().tolist() == [3, 3, 2, 2]
    assert drawn.tolist() == [32, 52, 4, 21, 17, 1, 26, 46, 27, 7]
    assert drawn.tolist() != drawn_labels(labels, 4, 10, 4, "rows").tolist()
    with pytest.raises(UsageError, match="labels: expected at least one of each of 4 classes, got 3"):
        drawn_labels(labels, 4, 3, 0, "rows")
    with pytest.raises(DataError, match="rows: 15 training rows are of class 0, and 20 labels"):
        drawn_labels(labels, 4, 80, 0, "rows")


def test_rows_with_labels_make_a_tenth_and_the_others_say_nothing() -> None:
    data = load_data("digits")
    whole, partly = data.rows("mass"), data.rows("mass", labels=20, seed=1)
    (y,) = partly.given["train"]
    seen = y.sum(1) > 0
    assert abs(seen.double().mean().item() - 0.1) < 0.01
    assert torch.equal(y[seen].argmax(1), partly.labels["train"][seen])
    assert len(partly.train[seen].unique(dim=0)) == 20
    assert len(partly.train) - seen.sum() == len(whole.train) - 20
    # It is scored as rows of p(x): the same rows, by the same hash, given nothing.
    assert partly.hash == whole.hash
    assert partly.given["test"] == ()
    assert partly.measure == whole.measure
    assert list(partly.given.examples) == [str(i) for i in range(10)]


SMALL = {"data": "digits", "latent_dim": [3], "network": {"name": "mlp", "hidden": [8]}, "epochs": 1, "seed": 2}
SMALL |= {"eval_rows": 20, "eval_K": 20, "device": "cpu", "compile": "off"}


def test_an_m2_run_is_trained_scored_classified_and_loaded(tmp_path: Path, capsys) -> None:
    run = pyrovae.train({**SMALL, "model": "m2", "labels": 30}, tmp_path / "m2")
    assert run.recipe.elbo.name == "semi-supervised"
    assert run.recipe.gradient.name == "enumerated"
    values = run.evaluation
    assert values["measure"] == "mass on {0,1}^64"
    assert "joint states of y" in values["estimator"]
    assert (tmp_path / "m2/plots/samples.png").exists()
    classify_command([str(tmp_path / "m2"), "--K", "20", "--rows", "30"])
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "m2/classification.json").read_text())
    rows = run.rows()
    model = run.model()
    right = (model.classify(rows.test).argmax(1) == rows.labels["test"]).double().mean().item()
    assert found["guide"]["accuracy"]["value"] == pytest.approx(right)
    assert f"{right:.4f}" in told
    assert found["guide"]["rows"] == len(rows.test)
    assert (tmp_path / "m2/plots/reliability.png").exists()
    assert evaluate.command([str(tmp_path / "m2"), "--K", "20", "--rows", "10"]) == 0


def test_a_gmvae_run_has_clusters(tmp_path: Path, capsys) -> None:
    pyrovae.train({**SMALL, "model": "gmvae", "prior": {"components": 4}}, tmp_path / "run", plots=False)
    classify_command([str(tmp_path / "run"), "--K", "10", "--rows", "20"])
    assert "accuracy of clusters" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/classification.json").read_text())
    assert found["of"] == "clusters"
    assert len(found["classes"]) == 4


def test_a_run_given_labels_is_classified_by_bayes(tmp_path: Path, capsys) -> None:
    run = pyrovae.train({**SMALL, "condition": "label"}, tmp_path / "run", plots=False)
    classify_command([str(tmp_path / "run"), "--K", "10", "--rows", "20"])
    found = json.loads((tmp_path / "run/classification.json").read_text())
    shares = run.rows().given["train"][0].double().mean(0)
    assert_close(torch.tensor(found["log_prior"], dtype=torch.float64).exp(), shares)
    assert "guide" not in found
    pyrovae.train(SMALL, tmp_path / "plain", plots=False)
    with pytest.raises(UsageError, match="is given nothing, and so says nothing of classes"):
        classify_command([str(tmp_path / "plain")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 100}, "labels: not used, since a vae sees none; use `model=m2`"),
        ({"model": "m2", "condition": "label"}, "condition: not used, since a m2 model is given nothing"),
        ({"elbo": "semi-supervised"}, "elbo=semi-supervised: is of labels that are seen, and a vae sees none"),
        ({"model": "m2", "prior": "vamp"}, "prior=VampPrior: is made of a guide"),
        ({"model": "gmvae", "prior": "vamp"}, "the components of a gmvae are its classes; use `prior=Mixture"),
        ({"model": "m2", "elbo": "iwae"}, "gradient=enumerated: is not of `elbo=iwae`"),
    ],
)
def test_what_makes_no_sense_with_classes_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        pyrovae.Recipe(**SMALL, **options)
    assert message in str(error.value)


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(("name", "word"), [("m2-mnist", "m2"), ("gmvae-digits", "gmvae")])
def test_recipes_declare_what_they_say(name: str, word: str) -> None:
    recipe = pyrovae.Recipe(**yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    assert recipe.model.name == word
    assert recipe.gradient.name == "enumerated"
    assert recipe.labels == (100 if word == "m2" else None)


# ---------------------------------------------------------------------------------------------------------------------
# Regression: a column is modelled, the others are given


def test_a_column_given_the_others_is_linear_regression_where_everything_is_linear() -> None:
    """p(y|x) = N(y; w'x + b, v^2 + s^2) of a linear decoder, and trained as good on new rows as least squares."""
    x = torch.randn(400, 2, dtype=torch.float64)
    y = x @ torch.tensor([[1.5], [-0.7]], dtype=torch.float64) + 0.3 + 0.5 * torch.randn(400, 1, dtype=torch.float64)
    likelihood = Gaussian(MLP(1 + 2, 1, hidden=()), scale="learned")
    guide = MeanFieldNormal(MLP(1 + 2, hidden=()), 1)
    pair = ConditionalVAE(UnconditionalPrior(StandardNormal(1)), likelihood, guide).double()
    pair.initialise(y[:300], x[:300])

    def exact(rows: slice) -> Tensor:
        at = [likelihood(torch.cat([torch.full_like(y[rows], z), x[rows]], 1)).base_dist for z in (0.0, 1.0)]
        total = ((at[1].loc - at[0].loc).square() + at[0].scale.square()).sqrt()
        return torch.distributions.Normal(at[0].loc, total).log_prob(y[rows]).squeeze(1).detach()

    new = slice(300, 400)
    before = log_marginal(pair.model, pair.guide, y[new], 5000, seed=0, given=(x[new],), proposal=FromPrior())
    assert before.standard_error.median() < 0.05, "no power"
    assert ((before.estimate - exact(new)).abs() < 5 * before.standard_error + 1e-6).all()
    fit(
        *(pair.model, pair.guide, y[:300], ELBO()),
        given=(x[:300],),
        epochs=60,
        batch_size=50,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        compile="off",
        progress=False,
    )
    ones = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(ones[:300], y[:300]).solution
    sd = (y[:300] - ones[:300] @ solved).square().mean().sqrt()
    least_squares = torch.distributions.Normal(ones[new] @ solved, sd).log_prob(y[new]).mean()
    trained = log_marginal(pair.model, pair.guide, y[new], 500, seed=0, given=(x[new],))
    assert abs(trained.mean - least_squares.item()) < 0.03
    assert trained.mean == pytest.approx(exact(new).mean().item(), abs=0.01)
