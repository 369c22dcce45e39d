"""Codes of runs beside the factors of their rows: scores, as a table, a CSV and a figure.

Scores are of the rows of all splits: of how codes follow factors, and not of how a model does on new rows, which log
p(x) of the test rows says. Rows are in the order test, validation, train, and those of each split in a random one, so
that the first of them are a fair part of all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.errors import DataError, UsageError
from pyrovae.runs.comparison import Scored, score_run
from pyrovae.runs.directory import Run, begins
from pyrovae.runs.grouping import check_same_rows, load_rows, name_pools, pools
from pyrovae.runs.looking import Looked
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.scoring import Scoring, rows_of
from pyrovae.runs.tables import aligned

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch
    from pyrovae.quality import Supervised

NAME = "disentanglement"  # of the table and the figure
BLOCK = 500  # rows that are encoded at a time
# Of the CSV, by the heads of the two printed tables. Units: nats for log p(x), TC and I; all else are shares of 1.
BY_FACTORS = {
    "MIG": "mig", "SAP": "sap", "D": "dci_disentanglement", "C": "dci_completeness", "I": "dci_informativeness",
    "beta-VAE": "beta_vae", "FactorVAE": "factor_vae", "modularity": "modularity",
}  # fmt: skip
BY_THEMSELVES = {"TC": "total_correlation", "I(z;z)": "mutual_information", "UDR": "udr"}


@dataclass(frozen=True)
class Asked:
    """What is scored.

    Attributes:
        codes: The mean of q(z|x) of each row, or one sample of it.
        factors: Names of those that count; None: all.
        bins: Of each dimension over its range, for mutual information.
        rows: At most so many, of all splits.
        seed: Of samples and votes.
    """

    codes: str = "mean"
    factors: tuple[str, ...] | None = None
    bins: int = 20
    rows: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Codes:
    """The codes of one run.

    Attributes:
        values: Shape (N, Z).
        active: Which dimensions have a variance of E[z|x] over 0.01, shape (Z,).
    """

    values: "np.ndarray"
    active: "np.ndarray"


def score_runs(
    runs: Sequence[Run],
    asked: Asked,
    how: Scoring,
    out: Path,
    *,
    limit: int | None = None,
    device: "torch.device | str" = "cpu",
    say: Say = silent,
) -> "pd.DataFrame":
    """Score runs on the same rows, say two tables, and write one line of a CSV for each run, and a figure.

    Args:
        runs: On the same rows, of known factors.
        asked: What is scored.
        how: How log p(x) is estimated.
        out: The directory of the table and the figure.
        limit: Estimate log p(x) of only so many test rows, the first.
        device: Where to compute.
        say: Called with each line that a user should read.

    Returns:
        The CSV.

    Raises:
        UsageError: rows differ or have no known factors, fewer than two of them are asked for, or a run has no codes.
        DataError: the codes of a run are the same in all rows.
    """
    import pandas as pd

    from pyrovae.files import write_atomically
    from pyrovae.runs.figures import save_figure

    check_same_rows(runs)
    rows = load_rows(runs)[runs[0].directory]
    names, factors, ordered = factors_of(runs[0], rows, asked)
    batch = rows_of(rows, "test", limit).to(device)
    together = pools(runs)
    records: list[dict[str, Any]] = []
    pictured: dict[str, Supervised] = {}
    for name, seeds in zip(name_pools(together), together, strict=True):
        entry = Scored(name, *zip(*(score_run(run, rows, batch, how, say) for run in seeds), strict=True))
        codes = [codes_of(run, rows, asked, str(device)) for run in seeds]
        found = [scored(run, code, factors, ordered, asked) for run, code in zip(seeds, codes, strict=True)]
        agreement = agreements(codes)
        pictured[name] = found[0][0]
        for run, judged, mean, (by_factors, rest), udr in zip(
            seeds, entry.judgements, entry.means, found, agreement, strict=True
        ):
            about = {
                "model": name,
                "run": run.name,
                "seed": run.recipe.seed,
                "log_marginal": mean,
                "K": how.num_particles,
            }
            records.append({**about, "verdict": judged.kind.value, **flat(by_factors, names), **rest, "udr": udr})
    frame = pd.DataFrame(records).assign(
        codes=asked.codes, bins=asked.bins, factors=" ".join(names), rows=len(factors), test_rows=len(batch),
        measure=rows.measure.description,
    )  # fmt: skip
    describe(frame, runs[0].recipe.data, say)
    write_atomically(out / f"{NAME}.csv", frame.to_csv(index=False))
    from pyrovae import plots

    tables = {name: score.information / score.entropies for name, score in pictured.items()}
    title = f"{runs[0].recipe.data}, {len(factors)} rows, {asked.codes} of q(z|x), {asked.bins} bins"
    save_figure(plots.information(tables, names, title), out, NAME)
    say(f"table and figure in {out}")
    return frame


def factors_of(run: Run, rows: "Rows", asked: Asked) -> "tuple[tuple[str, ...], np.ndarray, list[bool]]":
    """The factors that count: names, values of the rows that are scored, shape (N, F), and which are ordered.

    Raises:
        UsageError: the rows have no known factors, or not those that are named, or fewer than two.
    """
    import torch

    known = rows.factors
    if known is None:
        raise UsageError(
            f"{run.directory}: its rows ({run.recipe.data}) have no known factors to score codes by; train with "
            "`data=sprites`",
            settings=("data=sprites",),
        )
    names = known.names if asked.factors is None else asked.factors
    for i, name in enumerate(names):
        if name not in known.names or name in names[:i]:
            what = "is named twice" if name in names[:i] else f"is none of {', '.join(known.names)}"
            raise UsageError(f"factors: {name!r} {what}", settings=("factors",))
    if len(names) < 2:
        raise UsageError(
            f"factors: expected at least two, to be told apart, got {', '.join(names) or 'none'}", settings=("factors",)
        )
    at = [known.names.index(name) for name in names]
    values = torch.cat([known.values[split] for split in ("test", "validation", "train")])[: asked.rows, at]
    if len(values) < asked.bins:
        raise UsageError(
            f"bins: {asked.bins} are more than the {len(values)} rows that are scored; use fewer", settings=("bins",)
        )
    return tuple(names), values.numpy(), [known.each[i].ordered for i in at]


def codes_of(run: Run, rows: "Rows", asked: Asked, device: str) -> Codes:
    """The codes of a run, in the order of `factors_of`.

    Raises:
        UsageError: the model has no q(z|x).
    """
    import torch

    from pyrovae.inference.units import ACTIVE_VARIANCE
    from pyrovae.models.moments import moments_of
    from pyrovae.seeding import seeded

    looked = Looked(run, device=device)
    model = looked.inferred("a score of codes")
    means, drawn, left = [], [], asked.rows
    with torch.no_grad(), seeded(asked.seed, "codes", device=looked.place):
        for split in ("test", "validation", "train"):
            whole: Batch = rows_of(rows, split, min(left, len(getattr(rows, split)))).to(looked.place)
            left -= len(whole)
            for block in whole.split(BLOCK) if len(whole) else ():
                q = model.posterior(*block.tensors)
                means.append(moments_of(q, looked.place).mean)
                drawn.append(q.sample() if asked.codes == "sample" else means[-1])
    mean, values = torch.cat(means).double().cpu(), torch.cat(drawn).double().cpu()
    return Codes(values.numpy(), (mean.var(0, correction=0) > ACTIVE_VARIANCE).numpy())


def scored(
    run: Run, codes: Codes, factors: "np.ndarray", ordered: Sequence[bool], asked: Asked
) -> "tuple[Supervised, dict[str, Any]]":
    """All scores of one run: by factors, and the others.

    Raises:
        DataError: its codes are the same in all rows.
    """
    from pyrovae.quality import supervised, unsupervised

    try:
        by_factors = supervised(codes.values, factors, ordered, codes.active, asked.bins, asked.seed)
    except DataError as error:
        raise DataError(f"{run.directory}: {error}") from None
    alone = unsupervised(codes.values, asked.bins)
    return by_factors, {
        "total_correlation": alone.total_correlation,
        "mutual_information": alone.mutual_information,
        "active_units": int(codes.active.sum()),
        "dimensions": codes.values.shape[1],
    }


def agreements(codes: Sequence[Codes]) -> list[float]:
    """UDR of each of some seeds; NaN of a single one."""
    from pyrovae.quality import udr

    if len(codes) < 2:
        return [math.nan]
    return udr([code.values for code in codes], [code.active for code in codes])


def flat(found: "Supervised", names: Sequence[str]) -> dict[str, float]:
    """Scores by factors as a line of the CSV: the means over factors, and MIG of each."""
    return {
        "mig": found.mig.mean(), "sap": found.sap.mean(),
        "dci_disentanglement": found.disentanglement, "dci_completeness": found.completeness,
        "dci_informativeness": found.informativeness.mean(),
        "beta_vae": found.beta_vae, "factor_vae": found.factor_vae, "modularity": found.modularity,
        **{f"mig_{name}": gap for name, gap in zip(names, found.mig, strict=True)},
    }  # fmt: skip


def describe(frame: "pd.DataFrame", data: str, say: Say) -> None:
    """Say the tables: the mean over the seeds of each model, ± their standard deviation."""
    import pandas as pd

    first = frame.iloc[0]
    say(f"\n{data}, {first['rows']} rows of all splits; factors: {', '.join(first['factors'].split())}")
    say(f"codes: {first['codes']} of q(z|x); {first['bins']} bins of equal width; ± standard deviation over seeds\n")
    lines: dict[str, list[dict[str, str]]] = {"by factors": [], "by themselves": []}
    for name, seeds in frame.groupby("model", sort=False):
        bound = "" if (seeds["verdict"] == "exact").all() else "≥ "
        log_p = {"model": str(name), "log p(x)": bound + with_spread(seeds["log_marginal"])}
        lines["by factors"].append(log_p | {head: with_spread(seeds[key]) for head, key in BY_FACTORS.items()})
        others = {head: with_spread(seeds[key]) for head, key in BY_THEMSELVES.items()}
        others["active"] = f"{seeds['active_units'].mean():.3g} of {seeds['dimensions'].iloc[0]}"
        lines["by themselves"].append({"model": str(name), **others, "verdict": ", ".join(seeds["verdict"].unique())})
    for records in lines.values():
        say(aligned(pd.DataFrame(records)) + "\n")
    say(
        f"  log p(x): nats per datum of {first['test_rows']} test rows, {first['measure']}, K = {first['K']}; ≥: a "
        "lower bound in expectation\n  MIG, SAP, DCI (D, C, I), modularity: from 0 to 1; beta-VAE, FactorVAE: "
        f"accuracies, chance {1 / len(first['factors'].split()):.2f}\n  TC: total correlation of a Gaussian with the "
        "codes' covariance; I(z;z): mean mutual information of two\n    dimensions; both in nats\n  UDR: agreement of "
        "seeds, at most 1; active: dimensions with a variance of E[z|x] over 0.01\n"
    )


def with_spread(values: "pd.Series") -> str:
    """A mean and the standard deviation over seeds, where there are several."""
    if values.isna().any():
        return "-"
    digits = 1 if abs(values.mean()) >= 10 else 2
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def check_out(out: Path) -> None:
    """Refuse a directory in which a file has the name of the table or the figure, and is none of ours.

    Raises:
        UsageError: there is one, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"out {out}: is a file; choose a directory", settings=("out",))
    table, figure = out / f"{NAME}.csv", out / f"{NAME}.png"
    ours = not table.exists() or begins(table, b"model,run,seed,")
    # The figure is known by the table beside it.
    if not ours or (figure.exists() and not table.exists()):
        raise UsageError(
            f"{figure if ours else table}: was not written by pyrovae.disentangle; choose another directory",
            settings=("out",),
        )
