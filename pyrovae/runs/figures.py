"""The figures of a run, in its plots/."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.files import inside
from pyrovae.runs.directory import Run
from pyrovae.runs.recipe import Recipe
from pyrovae.runs.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.training.trainer import Fit
    from pyrovae.models import ConditionalVAE, LatentLayers
    from pyrovae.models.two_stage import SecondStage
    from pyrovae.plots import Style
    from pyrovae.runs.build import Model

DRAWS = 11  # of x, beside a row


def save_figure(figure: "Figure", directory: Path, name: str) -> Path:
    """Write a figure to directory/name.png.

    Raises:
        OutputError: it cannot be written.
    """
    from pyrovae.files import write_atomically

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    path = directory / f"{name}.png"
    write_atomically(path, picture.getvalue())
    return path


def style_of(recipe: Recipe, rows: "Rows") -> "Style":
    """How these rows are drawn: handwriting as ink on paper, other images as photographs, tables by their columns."""
    from pyrovae.data import Standardize, find_source
    from pyrovae.plots import Style

    source = find_source(recipe.data)
    seen = rows.test[~rows.test.isnan()]
    low, high = seen.min().item(), seen.max().item()
    inside = (low >= 0 and high <= 1) or low == high
    return Style(
        ink=source is not None and source.handwriting,
        limits=(0.0, 1.0) if inside else (low, high),
        columns=rows.columns,
        unit="standardised" if isinstance(rows.transform, Standardize) else "",
    )


def named_labels(rows: "Rows", count: int) -> Any:
    """The labels of the first test rows: names where they have some, and few enough to be told apart."""
    from pyrovae.plots import MAX_CLASSES

    labels = rows.labels["test"]
    if labels is None or rows.classes is None or len(rows.classes) > MAX_CLASSES:
        return None if labels is None else labels[:count]
    return [rows.classes[label] for label in labels[:count].tolist()]


def write_plots(
    recipe: Recipe, model: "Model", rows: "Rows", directory: Path, fitted: "Fit", values: dict[str, Any]
) -> None:
    """Draw what there is to see of a run into its plots/."""
    import torch

    from pyrovae import plots
    from pyrovae.models import ConditionalVAE, LabelledVAE, LatentLayers, Reconstruction
    from pyrovae.models.two_stage import SecondStage
    from pyrovae.seeding import seeded

    name, folder, style = directory.name, inside(directory, "plots"), style_of(recipe, rows)
    if not recipe.is_closed_form:
        save_figure(plots.training_curves(fitted.metrics, title=name), folder, "training_curves")
    device = next(model.parameters()).device
    # Of pictures the means are shown, without the noise of single pixels; points and profiles need their noise.
    pictures = not recipe.is_exact and len(rows.event_shape) > 1
    with torch.no_grad(), seeded(recipe.seed, "plots", device=device):
        if isinstance(model, ConditionalVAE):
            write_conditional(model, rows, folder, name, style, pictures)
            save_curve(Run(directory, recipe), values)
            return
        drawn = "means of p(x|z), z from the prior" if pictures else "draws from p(x)"
        drawn = "codes drawn from an ex-post density, decoded: no p(x)" if recipe.is_reconstruction else drawn
        points = rows.event_shape == (2,)
        x = model.sample(1000 if points else 64, mean=pictures)
        save_figure(plots.samples(x, f"{name}, {drawn}", style), folder, "samples")
        if points and not recipe.is_reconstruction:
            write_density(model, rows, folder, name, style)
        if isinstance(model, LabelledVAE):
            names = list(rows.given.examples) or [f"y = {c}" for c in range(model.num_classes)]
            each = torch.eye(model.num_classes, device=device)
            x = torch.stack([model.sample(500 if points else 16, y, mean=pictures) for y in each])
            save_figure(plots.conditional_samples(x, names, f"{name}, {drawn}", style), folder, "samples")
        if not isinstance(model, LatentLayers | LabelledVAE | Reconstruction):
            return
        x = rows.test[:1000].to(device)
        codes = model.encode(x)
        some = slice(500 if points else 32)
        figure = plots.reconstructions(x[some], model.decode(codes[some]), name, style)
        save_figure(figure, folder, "reconstructions")
        if not isinstance(model, Reconstruction):
            spread = model.posterior(x[:8]).sample((12,)).transpose(0, 1)
            save_figure(plots.neighbourhood(x[:8], model.decode(spread), name, style), folder, "neighbourhood")
            if isinstance(model, LatentLayers) and pictures and len(model.latent_sites) > 1:
                write_layers(model, x[:1], folder, name, style)
        save_figure(plots.latent_map(codes, named_labels(rows, len(codes)), name), folder, "latent_map")
        dims = codes.var(0).argsort(descending=True)[:10].tolist()
        if isinstance(model, SecondStage) and len(dims) > 1:
            write_codes(model, x, dims[:2], folder, name)
        steps = torch.linspace(-2.5, 2.5, 11, device=device)
        paths = codes.mean(0).repeat(len(dims), len(steps), 1)
        for row, dim in enumerate(dims):
            paths[row, :, dim] += steps * codes[:, dim].std()
        heading = f"{name}; offsets in standard deviations of the codes"
        save_figure(plots.traversals(model.decode(paths), steps.tolist(), dims, heading, style), folder, "traversals")

    if values.get("K") is not None:
        save_curve(Run(directory, recipe), values)


def write_layers(model: "LatentLayers", x: "Tensor", folder: Path, name: str, style: "Style") -> None:
    """Draw what is drawn while more and more upper layers are held at those of a row x, (1, *event)."""
    import torch

    from pyrovae import plots

    layers = dict(reversed(model.drawn(x).items()))
    held = [dict(list(layers.items())[:count]) for count in range(len(layers) + 1)]
    pictures = torch.stack([model.sample(DRAWS, mean=True, held=values) for values in held])
    rows = ["none held", *(f"{list(values)[-1]} and above" for values in held[1:])]
    columns = ["x", *map(str, range(1, DRAWS + 1))]
    pictures = torch.cat([x.expand(len(held), 1, *x.shape[1:]), pictures], 1)
    caption = "Means of p(x|z): layers held at those of x, the others drawn from the model"
    save_figure(plots.named_rows(pictures, rows, columns, caption, name, style), folder, "layers")


def write_codes(model: "SecondStage", x: "Tensor", dims: list[int], folder: Path, name: str) -> None:
    """Draw the codes of rows x beside draws of the first stage's p(z) and of this model's, in two dimensions of z."""
    from pyrovae import plots

    z = {
        "q(z): codes of test rows": model.posterior(x).sample(),
        "p(z) of the first stage": model.first.prior().sample((len(x),)),
        "p(z) of the second stage": model.draw_codes(len(x)),
    }
    names = [f"z[{dim}]" for dim in dims]
    save_figure(plots.clouds({title: values[:, dims] for title, values in z.items()}, names, name), folder, "codes")


def write_density(model: "Model", rows: "Rows", folder: Path, name: str, style: "Style") -> None:
    """Draw p(x) of a model of the plane over test rows: exact where it is, else by a hundred draws for each point."""
    from pyrovae import plots
    from pyrovae.inference import log_marginal
    from pyrovae.models import Exact, GaussianMixture

    x = rows.test[:1000]
    if isinstance(model, Exact):
        components = {name: (model.means, model.covariances)} if isinstance(model, GaussianMixture) else None
        figure = plots.densities(x, {name: model.log_prob}, components, style=style)
    else:
        device, title = next(model.parameters()).device, "log p(x) by 100 draws from the guide for each point"

        def log_prob(points: "Tensor") -> "Tensor":
            return log_marginal(model.model, model.guide, points.to(device), 100, seed=0).estimate

        figure = plots.densities(x, {name: log_prob}, title=title, style=style, size=60)
    save_figure(figure, folder, "density")


def write_conditional(
    model: "ConditionalVAE", rows: "Rows", folder: Path, name: str, style: "Style", pictures: bool
) -> None:
    """Draw samples given each of some y, such as each class, and reconstructions given their own."""
    import torch

    from pyrovae import plots

    device = next(model.parameters()).device
    drawn = "means of p(x|z, y), z from the prior" if pictures else "draws from p(x|y)"
    number, each = 500 if rows.event_shape == (2,) else 16, rows.given.examples
    x = torch.stack([model.sample(number, y.to(device), mean=pictures) for y in each.values()])
    figure = plots.conditional_samples(x, list(each), f"{name}, {drawn}", style)
    save_figure(figure, folder, "samples")
    some = slice(500 if rows.event_shape == (2,) else 32)
    x, y = rows.test[some].to(device), rows.given["test"][0][some].to(device)
    save_figure(plots.reconstructions(x, model.reconstruct(x, y), name, style), folder, "reconstructions")
    codes = model.encode(rows.test[:1000].to(device), rows.given["test"][0][:1000].to(device))
    save_figure(plots.latent_map(codes, named_labels(rows, len(codes)), name), folder, "latent_map")


def save_curve(run: Run, values: Report) -> Path:
    """Draw the K-curve into the run's plots."""
    from pyrovae import plots

    points = values["curve"]
    figure = plots.k_curve(
        [point["K"] for point in points],
        [point["log_marginal"] for point in points],
        [point["error_over_rows"] for point in points],
        paired_error=[point["to_last_error"] for point in points],
        elbo=values["elbo"],
        title=f"{run.name}, {values['rows']} {values['split']} rows; {values['verdict']}",
    )
    return save_figure(figure, inside(run.directory, "plots"), "k_curve")


def save_reliability(run: Run, values: Report) -> Path:
    """Draw the reliability tables of classification.json into the run's plots."""
    from pandas import DataFrame

    from pyrovae import plots

    def table(judged: Report) -> "DataFrame":
        ends = {"accuracy": "value", "accuracy_low": "low", "accuracy_high": "high"}
        right = DataFrame([{name: each["accuracy"][end] for name, end in ends.items()} for each in judged["bins"]])
        return DataFrame(judged["bins"]).drop(columns="accuracy").join(right)

    titles = {"bayes": "by Bayes", "guide": "by the guide"}
    tables = {
        f"{title}, {values[key]['rows']} rows": table(values[key]) for key, title in titles.items() if key in values
    }
    figure = plots.reliability(tables, f"{run.name}, p(y|x) of {values['split']} rows")
    return save_figure(figure, inside(run.directory, "plots"), "reliability")


def save_gaps(run: Run, values: Report) -> Path:
    """Draw the gaps into the run's plots."""
    from pandas import DataFrame

    from pyrovae import plots

    family = values["family"]
    parts: list[tuple[str, dict[str, Any]]] = [("amortisation:\nthe guide's network", values["amortisation"])]
    if family in ("full", "mixture", "flow"):
        what = "a Gaussian" if family == "full" else f"a {family}"
        parts.append((f"approximation:\nbeyond {what}", values["approximation"]))
    else:
        parts.append(("approximation:\ncorrelations", values["full_gain"]))
        parts.append(("approximation:\nbeyond a Gaussian", values["full_approximation"]))
    table = DataFrame([{"name": n, "gap": v["mean"], "error": v["error_over_rows"]} for n, v in parts])
    figure = plots.gaps(
        table,
        elbo=values["elbo"]["mean"],
        dimensions=DataFrame(values["dimensions"]),
        title=f"{run.name}, {values['rows']} {values['split']} rows",
    )
    return save_figure(figure, inside(run.directory, "plots"), "gaps")
