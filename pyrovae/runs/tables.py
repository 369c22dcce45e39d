"""Reports and configurations in words, as tables to read."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyrovae.runs.options import GRADIENTS, OBJECTIVES
from pyrovae.runs.parts import shown
from pyrovae.runs.recipe import Recipe, first
from pyrovae.runs.report import NO_DENSITY, Report
from pyrovae.runs.units import units_in_words as by_units

if TYPE_CHECKING:
    import pandas as pd

    from pyrovae.inference.training.trainer import Fit

WIDTH = 26  # of a name in a printed table
INDENT: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}


def number(value: float | None, error: float | None = None) -> str:
    """A value with its error, to the digits the error allows."""
    if value is None or not math.isfinite(value):
        return "-"
    if error is None or not math.isfinite(error):
        return f"{value:.2f}"
    digits = 2 if error <= 0 else max(0, min(4, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def short(value: float) -> str:
    """Two digits of an error, or a dash where there is none."""
    return f"{value:.2g}" if math.isfinite(value) else "-"


def aligned(frame: "pd.DataFrame") -> str:
    """A table of strings: the first column to the left and wrapped, the others to the right."""
    names = {name: textwrap.wrap(name, WIDTH) for name in frame.iloc[:, 0]}
    left = max(len(part) for parts in [[frame.columns[0]], *names.values()] for part in parts)
    widths = [max(map(len, [name, *frame[name]])) for name in frame.columns[1:]]

    def line(first: str, cells: Sequence[str]) -> str:
        return "  ".join(["", first.ljust(left), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip()

    lines = [line(frame.columns[0], list(frame.columns[1:]))]
    lines.append("  " + "-" * (len(lines[0]) - 2))
    for name, *cells in frame.itertuples(index=False):
        first, *rest = names[name]
        lines += [line(first, cells), *(f"  {part}" for part in rest)]
    return "\n".join(lines)


def in_words(forms: dict[str, str]) -> str:
    """How the KL of each site was taken: "analytic", "sampled", or site by site."""
    kinds = set(forms.values())
    return kinds.pop() if len(kinds) == 1 else ", ".join(f"{site} {form}" for site, form in forms.items())


def layers_in_words(values: Report) -> list[tuple[str, str, str]]:
    """KL and active units of each latent site, where there are several: label, number and note of each line."""
    lines = []
    for site, found in values["layers"].items():
        active, of = found["active_units"], found["latent_dimensions"] or "an unknown number"
        note = f"E log q({site}) - log r({site})" if active is None else f"active units: {active} of {of}"
        lines.append((f"  of {site}{', auxiliary' if active is None else ''}", number(found["kl"]), note))
    return lines


def units_in_words(values: Report) -> list[tuple[str, str, str]]:
    """How many latent dimensions are used at all, and how few carry the KL: label, number and note of each line."""
    from pyrovae.inference.units import ACTIVE_VARIANCE

    total, carrying = values["latent_dimensions"], values["kl_dimensions"]
    lines = [("active units", f"{values['active_units']} of {total}", f"variance of E[z|x] over {ACTIVE_VARIANCE}")]
    if carrying["count"] is not None:
        share = f"{100 * carrying['share']:g} % of the KL"
        lines.append((f"{share} in", f"{carrying['count']} of {total}", "latent dimensions, those with the largest"))
    return lines


def quality_in_words(quality: Report) -> list[tuple[str, str, str]]:
    """How near reconstructions are to their rows: label, number and note of each line."""
    from pyrovae.quality import QUALITIES

    lines = []
    for q in QUALITIES:
        if (found := quality.get(q.word)) is not None:
            notes = [q.unit, f"data range {quality['data_range']:g}" if q.images else "", f"{q.better} is better"]
            value = number(found["mean"], found["error_over_rows"])
            lines.append((q.title, value, "; ".join(note for note in notes if note)))
    return lines


def stages_in_words(values: Report) -> list[tuple[str, str, str]]:
    """How far q(z) is from p(z) before and after a second stage: label, number and note of each line; none without."""
    lines = []
    for stage, label, note in (
        ("first", "KL(q(z) || p(z)), before", "to the first stage's prior"),
        ("joined", "KL(q(z) || p(z)), after", "to the second stage's, or to the prior fitted afterwards"),
    ):
        if (found := values.get("aggregate_kl")) is not None:
            upper, lower = found[stage]["upper"], found[stage]["lower"]
            value = number(upper["mean"], upper["error_over_rows"])
            if math.isfinite(lower["mean"]):  # codes that no other row has are nowhere in the q(z) of the others
                note += f"; {lower['mean']:.3f} with each row left out of q(z)"
            lines.append((label, value, note))
    return lines


def heading(name: str, values: Report) -> list[str]:
    """What a report is about, in two lines: the rows, and what log p(x) is of them."""
    split = values["split"]
    which = f"{'all' if values['rows'] == values['rows_in_split'] else 'the first'} {values['rows']} {split} rows"
    return [
        f"{name}: {which}{' (the rows it was trained on)' if split == 'train' else ''}",
        f"{values['measure']}{', binarisation ' + values['binarize'] if values['binarize'] else ''}"
        f"{'' if values['verdict'] == NO_DENSITY else '; nats per datum'}",
    ]


def describe_log_marginal(values: Report) -> list[str]:
    """What a report says of log p(x), and of its estimate where it is one."""
    lines: list[str] = []

    def line(*cells: str) -> None:
        lines.append(aligned_line(*cells))

    how = "exact" if values["K"] is None else f"K = {values['K']}"
    line("log p(x)", number(values["log_marginal"], values["error_over_rows"]), f"{how}; ± error over rows")
    line("  95 % interval", between(values["bootstrap_interval"]), "bootstrap over rows")
    if values["bits_per_dimension"] is not None:
        line("  in bits per dimension", f"{values['bits_per_dimension']:.4f}")
    for label, value, note in by_units(values.get("units"), number):
        line(f"  {label}", value, note)
    if values["K"] is not None:
        line("  Monte Carlo error", short(values["monte_carlo_error"]), "of the mean, for these rows")
        excess = values["excess"]
        line("  too high by at most", f"{excess['nats']:.2g}", f"except with probability {excess['probability']:.0e}")
        if (bias := values["precision_bias"]) is not None:
            line("  bias of bfloat16", number(bias["nats"], bias["error"]), "measured on the same noise, and left in")
        line("  jackknife", number(values["jackknife"]), "without the bias of order 1/K; no bound")
    lines += ["", *textwrap.wrap(f"verdict: {values['verdict']}, {values['reason']}", 100, **INDENT), ""]
    if "elbo" in values:
        lines += [*textwrap.wrap(values["estimator"], 100, **INDENT)]
        error = values["elbo_error_over_rows"]
        line("ELBO", number(values["elbo"], error), "of the guide" + (", same draws" if error is not None else ""))
        line("gap, log p(x) - ELBO", number(values["gap"], values["gap_error_over_rows"]))
        line("reconstruction", number(values["reconstruction"]), "E log p(x|z)")
        line("KL(q(z|x) || p(z))", number(values["kl"]), in_words(values["kl_forms"]))
        for label, count, note in [*layers_in_words(values), *stages_in_words(values), *units_in_words(values)]:
            line(label, count, note)
    if values["K"] is not None:
        ess, k_hat = values["ess"], values["pareto_k"]
        line("effective sample size", f"{ess['median']:.1f}", f"median; least {ess['min']:.1f}, of K = {values['K']}")
        if k_hat["median"] is not None and values["sandwich"] is None:
            share = f"{100 * k_hat['share_over_threshold']:.1f} % of rows over {k_hat['threshold']:.2f}"
            line("Pareto k-hat", f"{k_hat['median']:.2f}", f"median; largest {k_hat['max']:.2f}; {share}")
        if (check := values["simulated"]) is not None:
            note = f"log p(x) from both sides on {check['rows']} simulated rows; " + (
                "narrow enough" if check["validated"] else "too wide"
            )
            line("sandwich's width", number(check["width"], check["width_error"]), note)
        if (check := values["sandwich"]) is not None:
            simulated = f"on {check['simulated_data']} simulated data; acceptance {check['acceptance']:.2f}"
            line("sandwich, below", number(check["forward"]), simulated)
            line("sandwich, above", number(check["reverse"]))
            line("  its width", number(check["width"], check["width_error"]), "validated" if check["validated"] else "")
        if values["repaired_rows"]:
            line("repaired rows", str(len(values["repaired_rows"])), listed(values["repaired_rows"]))
        if values["unreliable_rows"]:
            bad = values["unreliable_rows"]
            again = "" if values["repaired_rows"] is not None else "; --repair scores them again"
            line("unreliable rows", str(len(bad)), listed(bad) + again)
        if values["zero_weights"]:
            line("weights of zero", f"{values['zero_weights']}", f"in {values['rows_with_zero_weights']} rows")
    return lines


def describe(name: str, values: Report) -> str:
    """The report as a table to read."""
    lines = [*heading(name, values), ""]

    if values["verdict"] != NO_DENSITY:
        lines += describe_log_marginal(values)
    else:
        lines += textwrap.wrap(f"{values['verdict']}, {values['reason']}", 100, **INDENT)
    lines += describe_pictures(values)
    if values.get("K") is not None:
        lines += describe_rows(values)
    return "\n".join(lines)


def aligned_line(label: str, value: str, note: str = "") -> str:
    """A line of a report."""
    return f"  {label:<26}{value:>18}{'   ' + note if note else ''}".rstrip()


def describe_pictures(values: Report) -> list[str]:
    """What is no likelihood: how near reconstructions are to their rows, and draws to all rows."""
    lines: list[str] = []
    if quality := values["reconstruction_quality"]:
        lines += ["", f"  {quality['about']}", *(aligned_line(*cells) for cells in quality_in_words(quality))]
    if found := values["frechet"]:
        distance, (most, *fewer) = number(found["extrapolated"], found["error"]), found["by_rows"]
        plain = ", ".join(f"{point['distance']:.2f} from {point['rows']}" for point in fewer)
        lines += ["", f"  {found['about']}", *textwrap.wrap(f"on {found['features']}", 100, **INDENT)]
        lines.append(aligned_line("Frechet distance", distance, "extrapolated to infinitely many; smaller is better"))
        lines.append(aligned_line(f"  from {most['rows']} of each", f"{most['distance']:.2f}", f"too high; {plain}"))
    return lines


def describe_rows(values: Report) -> list[str]:
    """The K-curve and the worst rows."""
    lines = ["", f"  {'K-curve, from the same draws':<44}   less the last, on the same rows"]
    for point in values["curve"]:
        last = point["K"] == values["K"]
        paired = "" if last else number(point["to_last"], point["to_last_error"])
        label, bound = f"  L_{point['K']}", number(point["log_marginal"], point["error_over_rows"])
        lines.append(f"  {label:<26}{bound:>18}{'   ' + paired if paired else ''}".rstrip())
    lines += ["", "  worst rows      log p(x)   Monte Carlo error      ess    k-hat"]
    for row in values["worst_rows"]:
        k_hat = "-" if math.isnan(row["pareto_k"]) else f"{row['pareto_k']:.2f}"
        error, ess = short(row["standard_error"]), f"{row['ess']:.1f}"
        lines.append(f"  {row['row']:>10}{row['log_marginal']:>14.2f}{error:>20}{ess:>9}{k_hat:>9}")
    return lines


def listed(rows: list[int], most: int = 10) -> str:
    """Row numbers, the first ones of many."""
    return ", ".join(map(str, rows[:most])) + (", ..." if len(rows) > most else "")


def between(interval: list[float]) -> str:
    """An interval, to the digits its width allows."""
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return "-"
    digits = max(0, min(6, 2 - math.floor(math.log10(high - low)))) if high > low else 2
    return f"{low:.{digits}f} to {high:.{digits}f}"


def describe_model(recipe: Recipe) -> str:
    """The parts in words."""
    if recipe.is_exact:
        return f"{recipe.model.name} with {', '.join(f'{k} {v}' for k, v in recipe.model.settings.items())}"
    latent = ", ".join(map(str, recipe.latent_dim))
    used = () if recipe.is_closed_form else (recipe.prior, recipe.guide, recipe.likelihood, recipe.network)
    parts = [part.name for part in used if part]
    given = "" if recipe.condition is None else f", given {recipe.condition}: {len(recipe.classes)} columns"
    if recipe.condition == "label":
        given = f", given the label: {len(recipe.classes)} classes"
    clean = recipe.corruption.name in ("", first("corruption"))
    corrupted = "" if clean else f", input corrupted: {recipe.corruption.name}"
    made = ", ".join([*parts, f"latent dimensions {latent}"])
    return f"{recipe.model.name} with {made}{given}{corrupted}"


def describe_bound(recipe: Recipe) -> str:
    """The objective in words."""
    words = reported_bound(recipe) + (f", beta = {recipe.beta}" if recipe.beta not in (None, 1) else "")
    if recipe.elbo.settings:
        chosen = ", ".join(f"{key} {shown(value)}" for key, value in recipe.elbo.settings.items())
        words += f"; trained by {recipe.elbo.name} with {chosen}"
    usual = recipe.gradient.name in ("", next(iter(GRADIENTS)))
    return words if usual else f"{words}, {recipe.gradient.name} gradient"


def reported_bound(recipe: Recipe) -> str:
    """The bound that is reported, in words: what is maximised may weigh the KL otherwise."""
    if recipe.is_exact:
        return "exact log p(x), latents summed out"
    if recipe.is_reconstruction:
        return "reconstruction only: no p(x)"
    constants = OBJECTIVES[recipe.elbo.name].constants
    if "maximised" in constants:  # less a penalty, without which it is reported
        constants = OBJECTIVES[next(iter(OBJECTIVES))].constants
    words = f"{constants['title']}, K = {recipe.K}"
    if recipe.M != 1:
        words += f", M = {recipe.M}"
    if recipe.alpha is not None:
        words += f", alpha = {recipe.alpha:g}"
    if recipe.partitions is not None:
        words += f", {recipe.partitions} partitions"
    return words


def epochs_in_words(recipe: Recipe, fitted: "Fit") -> str:
    """Which of its epochs a training run kept, and how fast they were."""
    kept = "the last is kept" if recipe.keeps_last else f"the best {fitted.best_epoch}"
    words = f"{kept}; {fitted.metrics['rows_per_second'].median():,.0f} rows/s"
    if fitted.compile_seconds:
        words += f"; {fitted.compile_seconds:.1f} s of the training went into compiling"
    return words + ("; stopped early" if fitted.stopped == "early" else "")


def log_marginal_in_words(recipe: Recipe, values: Report) -> list[tuple[str, str, str]]:
    """log p(x) and what belongs to it: label, number and note of each line."""
    from pyrovae.inference.verdicts import Kind

    exact = values["K"] is None
    lines = [
        (
            "log p(x)",
            number(values["log_marginal"], values["error_over_rows"]),
            "nats per datum, exact; ± error over rows",
        )
        if exact
        else (
            f"log p(x), K = {values['K']}",
            number(values["log_marginal"], values["error_over_rows"]),
            f"nats per datum, ± error over rows; Monte Carlo error {short(values['monte_carlo_error'])}",
        ),
    ]
    if "elbo" in values:  # not a model in closed form
        reason, *more = textwrap.wrap(values["reason"], 80) if values["verdict"] != Kind.OK else [""]
        lines += [("verdict", values["verdict"], reason), *(("", "", part) for part in more)]
        lines.insert(0, (f"bound, {reported_bound(recipe)}", number(values["test_bound"]), "nats per datum"))
        lines.append(("KL(q(z|x) || p(z))", number(values["kl"]), f"nats per datum, {in_words(values['kl_forms'])}"))
        lines += [*layers_in_words(values), *stages_in_words(values), *units_in_words(values)]
    lines += by_units(values.get("units"), number)
    if values["bits_per_dimension"] is not None:
        lines.append(("bits per dimension", f"{values['bits_per_dimension']:.4f}", ""))
    return lines


def short_table(recipe: Recipe, values: dict[str, Any], fitted: "Fit", seconds: dict[str, float]) -> str:
    """What a run ends with; `seconds` are those of each stage."""
    which = "all" if values["rows"] == values["rows_in_split"] else "the first"
    lines = [(f"test rows: {which} {values['rows']} of {recipe.data}, {values['measure']}", "", "")]
    if values["verdict"] == NO_DENSITY:
        lines += [(part, "", "") for part in textwrap.wrap(f"{values['verdict']}, {values['reason']}", 100)]
    else:
        lines += log_marginal_in_words(recipe, values)
    if quality := values["reconstruction_quality"]:
        lines += [(f"reconstruction {label}", value, note) for label, value, note in quality_in_words(quality)]
        lines.append(("", "", "of one reconstruction of each row: no likelihood"))
    if not recipe.is_closed_form:
        lines.append(("epochs", f"{len(fitted.history)}", epochs_in_words(recipe, fitted)))
        if "codes_used" in fitted.metrics:
            used, perplexity = (fitted.metrics[name].iloc[-1] for name in ("codes_used", "code_perplexity"))
            lines.append(("codes used", f"{int(used)}", f"over the last epoch; perplexity {perplexity:.1f}"))
    stages = {name: round(value, 1) for name, value in seconds.items()}  # rounded first, so that the line adds up
    parts = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
    lines.append(("time", f"{sum(stages.values()):.1f} s", parts))
    head, *rest = lines
    return "\n".join([head[0], *(f"  {label:<26}{value:>18}   {note}".rstrip() for label, value, note in rest)])
