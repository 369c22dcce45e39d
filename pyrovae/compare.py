"""python -m pyrovae.compare RUN RUN ...: trained runs on the same rows, beside an exact mixture baseline.

One table per measure: a mass and a density never meet. Differences are paired, row by row, against the best. Unless
told not to, each table has a mixture of the same measure, fit by EM on the same training rows with its number of
components chosen on the validation rows, its log p(x) exact.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.command import add_option, given, main, parser
from pyrovae.errors import UsageError
from pyrovae.evaluate import whole_option
from pyrovae.run import Run, open_run

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from pyrovae.data import Rows
    from pyrovae.inference.log_marginal import LogMarginal
    from pyrovae.models.mixture import Mixture

# Numbers of components tried for the baseline, until the validation rows say that more are no better.
COMPONENTS = (1, 2, 5, 10, 20, 50, 100, 200)
COLUMNS = ("name", "log_marginal", "error", "difference", "difference_error", "K", "monte_carlo_error", "exact", "elbo")


@dataclass
class Scored:
    """A model's log p(x) on the rows of a table."""

    name: str
    result: "LogMarginal"

    @property
    def exact(self) -> bool:
        """Whether log p(x) is exact, not estimated."""
        return self.result.num_particles == 0


def fit_baseline(
    rows: "Rows",
    components: Sequence[int] = COMPONENTS,
    seed: int = 0,
    device: "torch.device | str" = "cpu",
    say: Callable[[str], object] = print,
) -> "tuple[str, Mixture]":
    """The mixture with the best validation log p(x), fit by EM on the training rows.

    Args:
        rows: Data of either measure. Training rows that are drawn anew at each use are drawn once.
        components: Numbers of components to try, increasing; the search ends when one is worse than the one before.
        seed: Of the draw and of k-means.
        device: Where to compute.
        say: Called with a line for each mixture tried.

    Returns:
        A name, and the mixture, in double precision: covariances of images are too ill-conditioned for single.
    """
    import torch

    from pyrovae.inference.seeding import seeded
    from pyrovae.models.mixture import BernoulliMixture, GaussianMixture

    binary = rows.measure.kind == "mass"
    with seeded(seed, "baseline rows"):
        train = rows.transform(rows.train).to(device)
    # Nats per datum gained by an iteration below which EM ends: far below what models of so many dimensions differ by.
    # Those of full covariances are dearer, and densities spread more widely than masses.
    tolerance = rows.measure.dimensions * (1e-5 if binary else 1e-4)
    best, best_bound, best_count = None, -float("inf"), 0
    for count in components:
        if count > len(train):
            break
        mixture = BernoulliMixture(rows.event_shape, count) if binary else GaussianMixture(rows.event_shape, count)
        mixture = mixture.to(device).double()
        mixture.initialise(train, seed=seed)
        iterations = len(mixture.em(train, max_iterations=50, tolerance=tolerance)) - 1
        with torch.no_grad():
            bound = torch.cat([mixture.log_prob(block) for block in rows.validation.split(1000)]).mean().item()
        kind = "Bernoullis" if binary else "Gaussians"
        say(f"baseline: {count:>3} {kind}, validation log p(x) {bound:.2f} nats after {iterations} iterations of EM")
        if bound <= best_bound:
            break
        best, best_bound, best_count = mixture, bound, count
    if best_count == max(components) and len(components) > 1:
        say(f"baseline: {best_count} components are the most that are tried; more may be better")
    if best is None:
        raise UsageError(f"baseline: none of {list(components)} components can be fit to {len(train)} rows")
    return f"mixture of {best_count} {'Bernoullis' if binary else 'Gaussians, full covariance'}", best.eval()


def table(scored: Sequence[Scored]) -> "pd.DataFrame":
    """One row per model, the best first: means over rows in nats per datum.

    `difference` is to the best model, paired row by row; its error is that of the mean of the differences.
    """
    import pandas as pd

    from pyrovae.inference.log_marginal import standard_error

    ranked = sorted(scored, key=lambda s: s.result.mean, reverse=True)
    best = ranked[0].result.estimate
    records = []
    for entry in ranked:
        result = entry.result
        difference = result.estimate - best
        records.append(
            {
                "name": entry.name,
                "log_marginal": result.mean,
                "error": result.error_over_rows,
                "difference": difference.mean().item(),
                "difference_error": standard_error(difference),
                "K": None if entry.exact else result.num_particles,
                "monte_carlo_error": result.monte_carlo_error,
                "exact": entry.exact,
                "elbo": None if entry.exact else result.elbo.mean().item(),
            }
        )
    return pd.DataFrame(records, columns=list(COLUMNS)).astype({"K": "Int64"})


def readable(frame: "pd.DataFrame", rows: "Rows") -> "pd.DataFrame":
    """The table as strings, with its errors."""
    import pandas as pd

    from pyrovae.evaluate import number

    records = []
    for entry in frame.to_dict("records"):
        best = entry["difference"] == 0 and entry["difference_error"] == 0
        bits = rows.measure.bits_per_dimension(entry["log_marginal"])
        records.append(
            {
                "model": entry["name"],
                "log p(x)": number(entry["log_marginal"], entry["error"]),
                "to the best": "best" if best else number(entry["difference"], entry["difference_error"]),
                "how": "exact" if entry["exact"] else f"K = {int(entry['K'])} (± {entry['monte_carlo_error']:.1g})",
                "ELBO": "-" if entry["exact"] else number(entry["elbo"]),
                **({} if bits is None else {"bits/dim": f"{bits:.4f}"}),
            }
        )
    return pd.DataFrame(records)


def aligned(frame: "pd.DataFrame") -> str:
    """A table of strings: the first column to the left, the others to the right."""
    columns = {name: [name, *frame[name]] for name in frame.columns}
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    lines = []
    for i in range(len(frame) + 1):
        cells = [
            cells[i].ljust(widths[name]) if j == 0 else cells[i].rjust(widths[name])
            for j, (name, cells) in enumerate(columns.items())
        ]
        lines.append("  " + "   ".join(cells).rstrip())
    return "\n".join([lines[0], "  " + "-" * (max(map(len, lines)) - 2), *lines[1:]])


def check_same_rows(runs: Sequence[tuple[Run, "Rows"]]) -> None:
    """Refuse to put different rows in one table.

    Raises:
        UsageError: two runs of one measure have different data or binarisation.
    """
    (first, rows), *others = runs
    for run, theirs in others:
        if theirs.hash != rows.hash:

            def what(r: Run) -> str:
                return f"{r.directory}: {r.config['data']}" + (
                    f", binarised {b}" if (b := r.config["binarize"]) else ""
                )

            raise UsageError(
                f"cannot compare runs on different rows: {what(first)}; {what(run)}. Compare runs of the same data and "
                "binarisation"
            )


def command(words: Sequence[str]) -> int:
    """Parse the options, score every run, print and write the tables."""
    p = parser(
        "compare",
        "Score trained runs on the same rows, one table per measure, beside an exact mixture baseline.",
        "RUN [RUN ...] [options]",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="directories written by python -m pyrovae.fit")
    add_option(p, "--K", "particles per datum, drawn exactly (default 1000)", "INT")
    add_option(p, "--rows", "score only the first test rows (default: all)", "INT")
    add_option(p, "--seed", "of the draws and of the baseline (default 0)", "INT")
    add_option(p, "--no-baseline", "add no mixture baseline", action="store_true")
    add_option(p, "--components", "components of the baseline (default: chosen on the validation rows)", "INT")
    add_option(p, "--out", "where to write the tables and figures (default: comparison)", "DIR")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    options = given(p.parse_args(words))
    k, seed = whole_option(options, "K", 1000), whole_option(options, "seed", 0)
    limit, components = whole_option(options, "rows", None), whole_option(options, "components", None)
    if options.get("no_baseline") and components:
        raise UsageError("--components: not used, since --no-baseline adds none")
    directories = [Path(name) for name in options["runs"]]
    if len({d.resolve() for d in directories}) < len(directories):
        raise UsageError("RUN: the same directory is named twice")

    out = Path(str(options.get("out", "comparison")))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; choose a directory")

    from pyrovae.evaluate import pick_device, score

    device = pick_device(str(options.get("device", "auto")))
    runs = [open_run(directory) for directory in directories]
    by_measure: dict[str, list[tuple[Run, Rows]]] = {}
    for run in runs:
        rows = run.rows()
        by_measure.setdefault(rows.measure.kind, []).append((run, rows))
    for members in by_measure.values():
        check_same_rows(members)
    names = unique_names(runs)
    for kind, members in by_measure.items():
        rows = members[0][1]
        x = rows.test[:limit].to(device)
        scored = []
        for run, _ in members:
            model = run.model(device)
            for notice in run.notices:
                print(f"note: {notice}")
            scored.append(Scored(names[run.directory], score(model, x, k, seed, progress=True)))
        if not options.get("no_baseline"):
            counts = (components,) if components else COMPONENTS
            name, mixture = fit_baseline(rows, counts, seed, device)
            scored.append(Scored(name, score(mixture, x, k)))
        present(table(scored), rows, kind, len(x), members[0][0].config["data"], out)
    print(f"tables and figures in {out}")
    return 0


def unique_names(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for each run: its directory's, or the whole path where two agree."""
    names = [run.name for run in runs]
    return {run.directory: run.name if names.count(run.name) == 1 else str(run.directory) for run in runs}


def present(frame: "pd.DataFrame", rows: "Rows", kind: str, count: int, data: str, out: Path) -> None:
    """Print a table and write it as CSV, LaTeX and a figure."""
    from pyrovae import plots
    from pyrovae.fit import save_figure
    from pyrovae.inference.checkpoint import write_atomically

    how = f", binarisation {rows.binarize}" if rows.binarize else ""
    which = "all" if count == len(rows.test) else "the first"
    caption = f"{data}, {which} {count} test rows; {rows.measure.description}{how}"
    strings = readable(frame, rows)
    print(f"\n{caption}")
    print("nats per datum, larger is better; ± standard error over rows; 'to the best' are paired differences\n")
    print(aligned(strings) + "\n")
    write_atomically(
        out / f"{kind}.csv", frame.assign(measure=rows.measure.description, rows=count).to_csv(index=False)
    )
    write_atomically(out / f"{kind}.tex", latex(strings, caption))
    figure = plots.comparison(frame, title=f"{data}, {count} test rows, {rows.measure.description}")
    save_figure(figure, out, kind)


def latex(strings: "pd.DataFrame", caption: str) -> str:
    """The table for a paper, with booktabs rules."""

    def escaped(cell: str) -> str:
        for character in "&%#_{}":
            cell = cell.replace(character, "\\" + character)
        return cell.replace("±", "$\\pm$").replace("^", "\\^{}")

    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        f"\\caption{{{escaped(caption)}; nats per datum.}}",
        f"\\begin{{tabular}}{{l{'r' * (len(strings.columns) - 1)}}}",
        "\\toprule",
        " & ".join(escaped(name) for name in strings.columns) + " \\\\",
        "\\midrule",
        *(" & ".join(escaped(cell) for cell in row) + " \\\\" for row in strings.itertuples(index=False)),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main("compare", command, sys.argv[1:])
