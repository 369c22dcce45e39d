"""What a run says of the classes of rows: p(y|x), by Bayes and by the guide, and what it is worth against labels.

Of a run given labels p(y|x) is by Bayes from log p(x|y), with p(y) the shares of the training rows. A run with classes
(m2, gmvae) has a p(y) of its own, and a guide q(y|x) besides. What no label was seen of are clusters, whose numbers
mean nothing: each stands for the label that most of its rows have, one for one, by these same rows.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING

from pyrovae.errors import NumericalError, UsageError
from pyrovae.processors import pick_device
from pyrovae.runs.directory import Run
from pyrovae.runs.progress import Say, rows_done, silent
from pyrovae.runs.report import Report
from pyrovae.runs.scoring import rows_of
from pyrovae.runs.tables import heading, number

if TYPE_CHECKING:
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.classification import Classification
    from pyrovae.inference.reliability import Measured
    from pyrovae.models import ConditionalVAE, LabelledVAE

BAYES, GUIDE = "by Bayes, from log p(x|y)", "by the guide q(y|x)"


def classify(
    run: Run,
    num_particles: int = 500,
    limit: int | None = 500,
    split: str = "test",
    seed: int = 0,
    chunk_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
) -> Report:
    """p(y|x) of rows under a run, against their labels; writes its classification.json and a figure.

    Args:
        run: Of a pair given labels, or with classes.
        num_particles: K, for each row and class.
        limit: Only so many rows, the first; what the guide says is of all rows of the split.
        split: "test", "validation" or "train".
        seed: Of the draws.
        chunk_size: Particles evaluated at once; bounds memory.
        device: "auto", "cpu", "cuda", ...
        say: Called with each line that a user should read.

    Raises:
        UsageError: the run has no classes, or its rows no labels.
        NumericalError: log p(x|y) of some row is no number for any class.
    """
    import torch

    from pyrovae.inference.classification import classify as by_bayes
    from pyrovae.models import ConditionalVAE, LabelledVAE
    from pyrovae.runs.figures import save_reliability

    tell = say or silent
    check_classes(run)
    rows, place = run.rows(), pick_device(device)
    model = run.model(place)
    for notice in run.notices:
        tell(f"note: {notice}")
    assert isinstance(model, ConditionalVAE | LabelledVAE)
    x = rows_of(rows, split, limit).x.to(place)
    labels, names = labels_of(rows, split)
    log_prior = prior_of(model, rows)
    programs = (
        (model.model_of_class, model.guide_of_class) if isinstance(model, LabelledVAE) else (model.model, model.guide)
    )
    count = len(log_prior)
    with rows_done(
        len(x) * count, f"log p(x|y), {len(x)} rows times {count} classes, K = {num_particles}", say
    ) as done:
        found = by_bayes(
            *programs,
            x,
            torch.eye(count, device=place),
            log_prior,
            num_particles,
            seed=seed,
            chunk_size=chunk_size,
            progress=lambda classes: done(classes * len(x)),
        )
    clusters = not rows.given.columns
    values = report(found, labels[: len(x)], clusters) | {
        "of": "clusters" if clusters else "labels",
        "classes": [str(i) for i in range(count)] if clusters else names,
        "measure": rows.measure.description,
        "binarize": rows.binarize,
        "split": split,
        "rows": len(x),
        "rows_in_split": len(labels),
        "K": num_particles,
        "seed": seed,
        "data_hash": rows.hash,
        "notices": run.notices,
    }
    if isinstance(model, LabelledVAE):
        every = rows_of(rows, split, None if split != "train" else limit).x
        log_q = torch.cat([model.classify(block.to(place)).cpu() for block in every.split(1000)])
        values["guide"] = judged(log_q, labels[: len(every)], clusters) | {"rows": len(every)}
    run.keep("classification.json", values, say)
    if run.writable and not clusters:
        save_reliability(run, values)
    return values


def check_classes(run: Run) -> None:
    """Refuse a run that says nothing of classes.

    Raises:
        UsageError: it has none.
    """
    from pyrovae.runs.options import PARTS

    with_classes = "classifier" in PARTS["model"][run.recipe.model.name].classes[0].takes
    if run.recipe.condition != "label" and not with_classes:
        what = "nothing" if run.recipe.condition is None else run.recipe.condition
        raise UsageError(
            f"{run.directory}: is given {what}, and so says nothing of classes; train it with `condition=label`, "
            "`model=m2` or `model=gmvae`",
            settings=("condition=label", "model=m2", "model=gmvae"),
        )


def labels_of(rows: "Rows", split: str) -> "tuple[Tensor, list[str]]":
    """The class of each row of a split, from 0 on, as training rows have them in order; and the names of the classes.

    Raises:
        UsageError: there are no labels.
    """
    import torch

    labels, training = rows.labels[split], rows.labels["train"]
    if labels is None or training is None:
        raise UsageError("labels: the rows have none, and so there is nothing to compare p(y|x) with")
    known = training.unique()
    names = [str(i) if rows.classes is None else rows.classes[i] for i in known.tolist()]
    return torch.searchsorted(known, labels), names


def prior_of(model: "ConditionalVAE | LabelledVAE", rows: "Rows") -> "Tensor":
    """log p(y), shape (C,): the model's own, or of a model that has none the shares of the training rows."""
    import torch

    from pyrovae.models import ConditionalVAE

    if isinstance(model, ConditionalVAE):
        return rows.given["train"][0].double().mean(0).log()
    each = torch.eye(model.num_classes, device=next(model.parameters()).device)
    with torch.no_grad():
        log_prior: torch.Tensor = model.class_prior().log_prob(each)
    return log_prior


def report(found: "Classification", labels: "Tensor", clusters: bool) -> Report:
    """What p(y|x) by Bayes says and is worth, as plain values. Nats per datum.

    Raises:
        NumericalError: some row has no p(x|y) for any class.
    """
    from pyrovae.inference.bootstrap import interval
    from pyrovae.inference.estimate import standard_error
    from pyrovae.inference.verdicts import Kind

    log_p, words = found.log_marginal, found.verdicts()
    if bad := (~log_p.isfinite()).nonzero().flatten().tolist():
        raise NumericalError(f"invalid: log p(x|y) is no number for any class in {len(bad)} rows, such as {bad[:5]}")
    chosen, kinds = found.log_probability.argmax(1, keepdim=True), [v.kind for v in words if v is not None]
    return {
        "verdict": max(kinds, key=list(Kind).index).value,
        "verdicts": [None if v is None else {"kind": v.kind.value, "reason": v.reason} for v in words],
        "unit": "nats per datum",
        "log_prior": found.log_prior.tolist(),
        "log_marginal": log_p.mean().item(),
        "error_over_rows": standard_error(log_p),
        "bootstrap_interval": interval(log_p),
        "monte_carlo_error": found.log_marginal_error.square().sum().sqrt().item() / len(log_p),
        "largest_probability_error": found.probability_error.max().item(),
        "undecided_rows": int(found.undecided.sum()),
        "rows_with_unreliable_class": int(found.unreliable.any(1).sum()),
        "rows_with_unreliable_choice": int(found.unreliable.gather(1, chosen).sum()),
        "bayes": judged(found.log_probability, labels, clusters) | {"rows": len(labels)},
        "per_row": {
            "log_probability": found.log_probability.tolist(),
            "error": found.probability_error.tolist(),
            "label": labels.tolist(),
        },
    }


def judged(log_probability: "Tensor", labels: "Tensor", clusters: bool) -> Report:
    """What probabilities of classes, or of clusters, are worth against labels."""
    from pyrovae.inference.reliability import calibration, clustering_accuracy

    if clusters:
        chosen = log_probability.argmax(1)
        return {"accuracy": plain(clustering_accuracy(chosen, labels)), "used": len(chosen.unique())}
    found = calibration(log_probability, labels)
    return {
        **{name: plain(getattr(found, name)) for name in ("accuracy", "log_loss", "brier", "ece")},
        "calibrated_ece": found.calibrated_ece,
        "bins": [asdict(each) for each in found.bins],
    }


def plain(value: "Measured") -> dict[str, float]:
    """A measured number as plain values."""
    return asdict(value)


def describe(name: str, values: Report) -> str:
    """The report as a table to read."""
    rows, measure = heading(name, values)
    lines = [rows, f"{measure}, K = {values['K']} for each class", ""]
    found = [v["kind"] for v in values["verdicts"] if v is not None]

    def line(label: str, value: str, note: str = "") -> None:
        lines.append(f"  {label:<34}{value:>26}   {note}".rstrip())

    line(
        "log p(x) = log sum_y p(y) p(x|y)",
        number(values["log_marginal"], values["error_over_rows"]),
        f"nats per datum, ± error over rows; Monte Carlo error {values['monte_carlo_error']:.2g}",
    )
    for key, title in (("bayes", BAYES), ("guide", GUIDE)):
        if key in values:
            lines += ["", f"p(y|x) {title}, {values[key]['rows']} rows"]
            lines += judged_in_words(values[key], values["of"] == "clusters")
    line(
        "verdict",
        values["verdict"],
        ", ".join(f"{kind} for {found.count(kind)}" for kind in dict.fromkeys(found)) + " classes",
    )
    count, least = values["rows"], values["rows_with_unreliable_choice"]
    lines += [
        "",
        f"Monte Carlo: p(y|x) has errors of at most {values['largest_probability_error']:.2g}; in "
        f"{values['undecided_rows']} of {count} rows another class may be the most probable one.",
        f"{values['rows_with_unreliable_class']} of {count} rows have a class whose log p(x|y) may be too low by any "
        f"distance (k-hat over 1, or an effective sample size below 10), {least} of them the chosen one.",
    ]
    return "\n".join(lines)


def judged_in_words(values: Report, clusters: bool) -> list[str]:
    """Lines of a table: label, value and 95% interval."""
    if clusters:
        lines = [
            (
                "accuracy of clusters",
                "accuracy",
                f"{values['used']} clusters used, each named for a label by these rows",
            )
        ]
    else:
        lines = [
            ("accuracy", "accuracy", "share of rows; 95% interval"),
            ("log loss", "log_loss", "nats; smaller is better"),
            ("Brier score", "brier", "from 0 to 2; smaller is better"),
            (
                "expected calibration error",
                "ece",
                f"of calibrated probabilities at most {values['calibrated_ece']:.4f} in 95 of 100 cases",
            ),
        ]
    found = []
    for label, key, note in lines:
        value = values[key]
        text = f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
        found.append(f"  {label:<34}{text:>26}   {note}")
    return found + ([] if clusters else ["", *table(values["bins"])])


def table(bins: list[Report]) -> list[str]:
    """The reliability table."""
    lines = [f"  {'confidence':<14}{'rows':>6}{'mean':>9}{'accuracy':>10}{'95% interval':>20}"]
    for each in bins:
        if each["rows"]:
            right = each["accuracy"]
            lines.append(
                f"  {each['low']:.1f} to {each['high']:.1f}{'':<4}{each['rows']:>6}{each['confidence']:>9.3f}"
                f"{right['value']:>10.3f}{right['low']:>12.3f} to {right['high']:.3f}"
            )
    return lines
