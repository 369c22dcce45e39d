"""Where a run's bound is lost: the values of gaps.json, and the table that says them."""

import textwrap
from typing import TYPE_CHECKING

from pyrovae.errors import NumericalError
from pyrovae.processors import pick_device
from pyrovae.runs.directory import Run
from pyrovae.runs.progress import Say, rows_done, silent
from pyrovae.runs.report import Report
from pyrovae.runs.scoring import rows_of
from pyrovae.runs.tables import heading, number

if TYPE_CHECKING:
    from pyrovae.data import Rows
    from pyrovae.inference.individual import Family
    from pyrovae.inference.suboptimality import Gaps


def analyse(
    run: Run,
    num_particles: int = 2000,
    limit: int | None = 200,
    split: str = "test",
    seed: int = 0,
    chunk_size: int | None = None,
    device: str = "auto",
    family: "Family | None" = None,
    say: Say | None = None,
) -> Report:
    """Split the gap of a run, and write its gaps.json.

    Raises:
        NumericalError: log p(x) or an ELBO of some row is not a number.
    """
    import torch

    from pyrovae.inference.suboptimality import QUANTITIES, gaps

    place = pick_device(device)
    rows = run.rows()
    batch = rows_of(rows, split, limit).to(place)
    model = run.model(place)
    for notice in run.notices:
        (say or silent)(f"note: {notice}")
    with rows_done(len(batch), f"log p(x) and the best approximation of each row, K = {num_particles}", say) as done:
        result = gaps(
            model.model,
            model.guide,
            batch.x,
            num_particles,
            family,
            chunk_size=chunk_size,
            progress=done,
            seed=seed,
            given=batch.given,
        )
    finite = torch.stack([getattr(result, name).values.isfinite() for name in QUANTITIES]).all(0)
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise NumericalError(
            f"invalid: log p(x) or an ELBO is not a finite number for {len(bad)} of {len(batch)} rows, the first being "
            f"{', '.join(map(str, bad[:5]))}: some weights are zero, NaN or infinite under this model"
        )
    values = report(result, rows, split, seed, place.type) | {"notices": run.notices}
    run.keep("gaps.json", values, say)
    return values


def report(result: "Gaps", rows: "Rows", split: str, seed: int, device: str) -> Report:
    """Everything that is said of the gaps, as plain values. Nats per datum."""
    from pyrovae.inference.suboptimality import QUANTITIES
    from pyrovae.inference.units import KL_SHARE
    from pyrovae.inference.verdicts import verdict
    from pyrovae.version import __version__

    p, units, information = result.log_marginal, result.units, result.information
    judgement = verdict(p)
    estimates = {name: getattr(result, name) for name in QUANTITIES}
    estimates |= {"kl": information.kl, "mutual_information": information.mutual_information}
    if information.aggregate_kl is not None:
        estimates["aggregate_kl"] = information.aggregate_kl
    means = {
        name: {"mean": e.mean, "error_over_rows": e.error_over_rows, "monte_carlo_error": e.monte_carlo_error}
        for name, e in {"log_marginal": p, **estimates}.items()
    }
    return {
        "unit": "nats per datum",
        "measure": rows.measure.description,
        "binarize": rows.binarize,
        "split": split,
        "rows": len(p.estimate),
        "rows_in_split": len(getattr(rows, split)),
        "K": result.num_particles,
        "family": result.family,
        "guide_family": result.guide_family,
        "estimator": p.estimator,
        "draws": p.num_particles,
        "verdict": judgement.kind,
        "reason": judgement.reason,
        **means,
        "mutual_information_limit": information.limit,
        "mutual_information_at_limit": information.at_limit,
        "active_units": {
            "variance": units.active_by_variance,
            "kl": units.active_by_kl,
            "of": len(units.names),
        },
        "kl_dimensions": {"share": KL_SHARE, "count": units.carrying},
        "dimensions": [
            {"name": name, "kl": kl, "kl_error": error, "variance": variance}
            for name, kl, error, variance in zip(
                units.names, units.kl.tolist(), units.kl_error.tolist(), units.variance.tolist(), strict=True
            )
        ],
        "seed": seed,
        "device": device,
        "data_hash": rows.hash,
        "version": __version__,
        "per_row": {"log_marginal": p.estimate.tolist(), **{name: e.values.tolist() for name, e in estimates.items()}},
    }


def describe(name: str, values: Report) -> str:
    """The report as a table to read."""
    family = values["family"]
    best = family if family in ("mixture", "flow") else f"{family} Gaussian"
    rows, measure = heading(name, values)
    lines = [
        rows,
        f"{measure}, K = {values['K']}",
        "",
        f"  {'':<34}{'mean ± error over rows':>24}{'Monte Carlo error':>20}",
    ]

    def line(label: str, key: str, note: str = "") -> None:
        value = values[key]
        text = number(value["mean"], value["error_over_rows"])
        lines.append(f"  {label:<34}{text:>24}{value['monte_carlo_error']:>20.2g}   {note}".rstrip())

    def remark(text: str) -> None:
        lines.extend(textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    "))

    line("log p(x)", "log_marginal")
    if family != "full":
        line("ELBO, best full Gaussian", "full_elbo", "fitted to each datum")
    line(f"ELBO, best {best}", "best_elbo", "fitted to each datum")
    line("ELBO, guide", "elbo")
    lines.append("")
    line("gap, log p(x) - ELBO", "gap")
    line("  approximation", "approximation", f"log p(x) - ELBO of the best {best}")
    if family in ("diagonal", "low-rank"):
        line("    correlations", "full_gain", "what full covariances would win of it")
        line("    beyond a Gaussian", "full_approximation", "what they would leave")
    if family in ("mixture", "flow"):
        line("    of one Gaussian", "full_approximation", f"what a full covariance, and no {family}, would leave")
    line("  amortisation", "amortisation", f"ELBO of the best {best} - ELBO of the guide")
    lines.append("")
    line("KL(q(z|x) || p(z))", "kl", "the sum of the next two" if "aggregate_kl" in values else "to each row's prior")
    line("  I(x; z)", "mutual_information", f"at most log N = {values['mutual_information_limit']:.2f}")
    if "aggregate_kl" in values:
        line("  KL(q(z) || p(z))", "aggregate_kl", "aggregate posterior of these rows to prior")
    active, carrying = values["active_units"], values["kl_dimensions"]
    for label, count, note in (
        ("active units", active["variance"], "with a variance of E[z|x] over 0.01"),
        ("", active["kl"], "with a mean KL over 0.01 nat"),
        (f"{100 * carrying['share']:g} % of the KL in", carrying["count"], "dimensions, those with the largest"),
    ):
        shown = f"{'-' if count is None else count} of {active['of']}"
        lines.append(f"  {label:<34}{shown:>24}{'':>23}{note}")
    lines.append("")
    remark(f"log p(x): {values['verdict']}, {values['reason']}. {values['draws']} draws, by {values['estimator']}.")
    guide_family = values["guide_family"]
    if guide_family in ("other", "flow") and guide_family != family:
        kind = "a flow" if guide_family == "flow" else "not known to be a Gaussian"
        remark(
            f"The guide is {kind}: it is compared with {family} Gaussians, and may be better than the best of them, "
            "with an amortisation gap below 0."
        )
    elif guide_family == "flow":
        remark("The best flow of each row has the guide's weights, and a mean, scales and features of its own.")
    elif guide_family != family:
        remark(f"The guide is {guide_family}, and compared with the best {best}: not with its own family.")
    if values["mutual_information_at_limit"]:
        remark(
            f"I(x; z) is at its limit, the log of the number of rows: all that it says is that z tells these "
            f"{values['rows']} rows apart. More rows raise it and lower KL(q(z) || p(z)) by as much."
        )
    return "\n".join(lines)
