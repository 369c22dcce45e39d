r"""python -m pyrovae.compare RUN RUN ...: trained runs on the same rows, beside an exact mixture baseline.

One table per measure: a mass and a density never meet. Unless told not to, each table has a mixture of the same
measure, fit by EM on the same training rows with its number of components chosen on the validation rows, its log p(x)
exact.

Three uncertainties, and where each is told:

    over rows           95 % bootstrap intervals of the mean, of the difference to the best, and of the rank; the same
                        resampled rows for every model, so that what all models find hard cancels in differences
    over seeds          runs that differ in nothing but their seed are one line, the mean over seeds of log p(x) per
                        row; the standard deviation of the runs' own means stands in a column of its own
    of the estimate     log p(x) of a run is a lower bound in expectation, and its verdict says how tight; a mixture's
                        is exact. Monte Carlo noise is part of what differs from row to row, so the intervals hold it

What is only a lower bound may be of a better model than its number says, and ranks leave that open: a model whose
verdict is "lower bound only" may deserve rank 1, and every other may have it above; one that is "ok" may be better by
the bias that its verdict states. They are ranks of these runs: a single seed says nothing of another.

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap
    Goldstein and Spiegelhalter 1996, League Tables and Their Limitations, JRSS A 159
"""

import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.command import add_choices, add_option, given, main, parser
from pyrovae.errors import CheckpointError, NumericalError, UsageError
from pyrovae.evaluate import default_draws, whole_option
from pyrovae.runs.build import build_proposal
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.options import DERIVED, PROPOSALS, SETTINGS, thread_count

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.marginal import LogMarginal
    from pyrovae.inference.proposals import Proposal
    from pyrovae.inference.simulation import Simulated
    from pyrovae.inference.verdicts import Verdict
    from pyrovae.models.mixture import Mixture

# Numbers of components tried for the baseline, until the validation rows say that more are no better.
COMPONENTS = (1, 2, 5, 10, 20, 50, 100, 200)
COLUMNS = (
    *("name", "log_marginal", "error", "low", "high"),
    *("difference", "difference_error", "difference_low", "difference_high", "difference_bound"),
    *("rank_low", "rank_high"),
    *("seeds", "spread", "seed_means"),
    *("verdict", "reason", "exact", "K", "monte_carlo_error", "elbo"),
)
# What a difference to the highest number is where it is not that of log p(x), by its `difference_bound`.
DIFFERENCES = {
    "at least": "the model's number is a lower bound: it may be less far below, or above",
    "at most": "the highest number is a lower bound: the model may be further below",
    "open": "both numbers are lower bounds: either model may be the better",
}
# What two runs of different seeds may differ in and still be the same model: nothing that changes their training.
NOT_THE_MODEL = ("seed", "device", "compile", "particle_chunk", "threads", "stream", "eval_K", "eval_rows", *DERIVED)
# What decides which rows a run is scored on.
DATA_KEYS = ("data", "data_root", "binarize", "standardize")
# From the most to the least that can be said of an estimate.
VERDICTS = ("exact", "ok", "unchecked", "lower bound only", "invalid")
MOST_ROWS = 200_000  # to fit a baseline to, whole in memory
WIDTH = 26  # of a name in a printed table


@dataclass
class Scored:
    """A model's log p(x) on the rows of a table: a result for each of its seeds."""

    name: str
    results: "Sequence[LogMarginal]"
    checks: "Sequence[Sandwich | Simulated | None]" = ()  # on simulated data, one for each result

    @property
    def estimate(self) -> "Tensor":
        """Mean over the seeds of log p(x), shape (N,)."""
        import torch

        return torch.stack([result.estimate for result in self.results]).mean(0)

    @property
    def means(self) -> list[float]:
        """The mean over the rows for each seed."""
        return [result.mean for result in self.results]

    @property
    def spread(self) -> float | None:
        """Standard deviation of `means`; None for a single seed."""
        import torch

        return torch.tensor(self.means, dtype=torch.float64).std().item() if len(self.results) > 1 else None

    @cached_property
    def judgements(self) -> "list[Verdict]":
        """What is said of each seed's estimate."""
        from pyrovae.inference.verdicts import verdict

        checks = self.checks or [None] * len(self.results)
        return [verdict(result, check) for result, check in zip(self.results, checks, strict=True)]

    @property
    def verdict(self) -> "Verdict":
        """The least of them."""
        return max(self.judgements, key=lambda v: VERDICTS.index(v.kind))

    @property
    def slack(self) -> float:
        """How far its log p(x) may be above `estimate`, in nats: by the bias that is stated, or by anything."""
        return sum(math.inf if v.bias is None else v.bias for v in self.judgements) / len(self.judgements)

    @property
    def monte_carlo_error(self) -> float:
        """Of the mean over rows and seeds. Seeds are scored with the same noise, so that averaging reduces nothing."""
        return sum(result.monte_carlo_error for result in self.results) / len(self.results)

    @property
    def num_particles(self) -> int:
        """K; 0 where log p(x) is in closed form."""
        return self.results[0].num_particles


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

    from pyrovae.models.mixture import BernoulliMixture, GaussianMixture
    from pyrovae.seeding import seeded

    binary = rows.measure.kind == "mass"
    with seeded(seed, "baseline rows"):
        train = rows.transform(rows.train[:: -(-len(rows.train) // MOST_ROWS)]).to(device)
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


def table(scored: Sequence[Scored], seed: int = 0) -> "pd.DataFrame":
    """One row per model, the best first: means over rows in nats per datum.

    Intervals are of 95 %, by a bootstrap over rows with this seed. `difference` is to the highest number, paired row by
    row; its error is that of the mean of the differences, and `difference_bound` says what it is of log p(x): itself
    (empty), "at least" or "at most" where one of the two is a lower bound only, "open" where both are. `rank_low` to
    `rank_high` holds the model's rank in 95 % of the resamples, whatever log p(x) is between a model's number and its
    `slack` above. `spread` is over seeds, and in no other number. A model without a finite mean is last, unranked.
    """
    import pandas as pd
    import torch

    from pyrovae.inference.bootstrap import ends, means
    from pyrovae.inference.marginal import FROM_GUIDE, standard_error

    ranked = sorted(scored, key=lambda s: s.estimate.mean().nan_to_num(nan=-float("inf")).item(), reverse=True)
    estimates = torch.stack([entry.estimate for entry in ranked])
    estimates[~estimates.isfinite().all(1)] = math.nan  # else resamples without the bad rows would count
    resampled = means(estimates, seed=seed)
    lows, highs = ends(resampled)
    difference_lows, difference_highs = ends(resampled - resampled[:, :1])
    # Of each model i (dimension 1) the others j (dimension 2) that are better even where i is as good as it may be, and
    # those that are better where they are as good as they may be. NaN is neither.
    slack = torch.tensor([entry.slack for entry in ranked], dtype=torch.float64)
    surely = resampled[:, None] > (resampled + slack)[:, :, None]
    perhaps = ((resampled + slack)[:, None] > resampled[:, :, None]) & ~torch.eye(len(ranked), dtype=torch.bool)
    # Ranks are whole numbers: no interpolation between two.
    rank_lows, _ = ends(1.0 + surely.sum(-1, dtype=torch.float64), interpolation="nearest")
    _, rank_highs = ends(1.0 + perhaps.sum(-1, dtype=torch.float64), interpolation="nearest")
    records = []
    for i, entry in enumerate(ranked):
        judgement, finite = entry.verdict, bool(estimates[i].isfinite().all())
        difference = estimates[i] - estimates[0]
        records.append(
            {
                "name": entry.name,
                "log_marginal": estimates[i].mean().item(),
                "error": standard_error(estimates[i]),
                "low": lows[i],
                "high": highs[i],
                "difference": difference.mean().item(),
                "difference_error": standard_error(difference),
                "difference_low": difference_lows[i],
                "difference_high": difference_highs[i],
                "difference_bound": "" if i == 0 else bound_of(entry.slack, ranked[0].slack),
                "rank_low": int(rank_lows[i]) if finite else None,
                "rank_high": int(rank_highs[i]) if finite else None,
                "seeds": len(entry.results),
                "spread": entry.spread,
                "seed_means": entry.means,
                "verdict": judgement.kind,
                "reason": judgement.reason,
                "exact": judgement.kind == "exact",
                "K": entry.num_particles or None,
                "monte_carlo_error": entry.monte_carlo_error,
                # Of draws from another proposal the mean log-weight is not the pair's ELBO.
                "elbo": sum(r.elbo.mean().item() for r in entry.results) / len(entry.results)
                if all(r.estimator.startswith(FROM_GUIDE.name) for r in entry.results)
                else None,
            }
        )
    whole = {"rank_low": "Int64", "rank_high": "Int64", "K": "Int64"}
    return pd.DataFrame(records, columns=list(COLUMNS)).astype(whole | {"spread": float, "elbo": float})


def bound_of(slack: float, slack_of_best: float) -> str:
    """What the difference of two numbers is of the difference of their log p(x)."""
    if math.isinf(slack):
        return "open" if math.isinf(slack_of_best) else "at least"
    return "at most" if math.isinf(slack_of_best) else ""


def readable(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The table as strings: what is compared, with its intervals; the rest is in the CSV."""
    import pandas as pd

    from pyrovae.plots import SIGNS

    pooled = (frame["seeds"] > 1).any()
    records = []
    for i, entry in enumerate(frame.to_dict("records")):
        bound = "" if entry["exact"] else "≥ "
        invalid = pd.isna(entry["rank_low"])
        ranks = [] if invalid else sorted({int(entry["rank_low"]), int(entry["rank_high"])})
        difference = interval(entry["difference"], entry["difference_low"], entry["difference_high"])
        first = "best" if entry["rank_high"] == 1 else "highest"  # which another may deserve
        records.append(
            {
                "model": entry["name"],
                "rank": "-".join(map(str, ranks)) or "-",
                "log p(x) [95 %]": "-"
                if invalid
                else bound + interval(entry["log_marginal"], entry["low"], entry["high"]),
                "to the best [95 %]": "-"
                if invalid
                else first
                if i == 0
                else SIGNS[entry["difference_bound"]] + difference,
                **({"seeds' sd": spread(entry)} if pooled else {}),
                "verdict": entry["verdict"],
            }
        )
    return pd.DataFrame(records)


def interval(value: float, low: float, high: float) -> str:
    """A value and its interval, to the digits that its width allows; at most 3, since nobody needs more of a nat."""
    half = (high - low) / 2
    digits = 2 if not half > 0 else max(0, min(3, 1 - math.floor(math.log10(half)), 5 - len(f"{abs(value):.0f}")))
    inside = "" if math.isnan(half) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{inside}"


def spread(entry: dict[Any, Any]) -> str:
    """The standard deviation over seeds, to two digits."""
    return "-" if entry["seeds"] == 1 else f"{entry['spread']:.2g}"


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


def usable(directories: Sequence[Path]) -> list[Run]:
    """The finished runs among some directories, as runs/* gives them; what is left out is said, and why.

    Raises:
        CheckpointError: there is none, or a name is not there at all, as one that was mistyped.
    """
    runs: list[Run] = []
    others: list[CheckpointError] = []
    for directory in directories:
        if not os.path.lexists(directory):
            open_run(directory)  # says so
        try:
            runs.append(finished(directory))
        except CheckpointError as error:
            others.append(error)
    if not runs:
        several = f"none of the {len(directories)} named is a finished run; " if len(directories) > 1 else ""
        raise CheckpointError(f"{several}{others[0]}")
    for other in others:
        print(f"note: left out: {other}")
    return runs


def finished(directory: Path) -> Run:
    """The run of a directory, whose weights can be read and whose training has ended.

    Raises:
        CheckpointError: it is not that.
    """
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file, no run directory")
    run = open_run(directory)
    run.model()
    if run.unfinished:
        raise CheckpointError(f"{run.unfinished}; finish it with python -m pyrovae.fit --resume {directory}")
    return run


def run_around(out: Path, named: Sequence[Path]) -> Path | None:
    """The run that a directory is, or lies in; a damaged one, too."""
    runs = [directory.resolve() for directory in named if directory.is_dir()]
    for place in (out.resolve(), *out.resolve().parents):
        if place in runs or ((place / "config.yaml").is_file() and (place / "checkpoints").is_dir()):
            return place
        with suppress(CheckpointError):
            return open_run(place).directory
    return None


def load_rows(runs: Sequence[Run]) -> "dict[Path, Rows]":
    """The rows of each run, by its directory; the same rows are loaded once."""
    loaded: dict[tuple, Rows] = {}
    result = {}
    for run in runs:
        key = (*(run.config[name] for name in DATA_KEYS), measure_of(run))
        if key not in loaded or loaded[key].hash != run.config["data_hash"]:
            loaded[key] = run.rows()
        result[run.directory] = loaded[key]
    return result


def measure_of(run: Run) -> str:
    """Whether a run's log p(x) is of a mass or a density."""
    return "mass" if run.config["likelihood"]["name"] == "Bernoulli" else "density"


def check_same_rows(runs: Sequence[Run]) -> None:
    """Refuse to put different rows in one table.

    Raises:
        UsageError: two runs of one measure have different data, binarisation or split.
    """
    first, *others = runs
    for run in others:
        if run.config["data_hash"] == first.config["data_hash"]:
            continue
        same = all(run.config[key] == first.config[key] for key in DATA_KEYS)
        raise UsageError(
            f"cannot compare runs on different rows: {described(first, same)}; {described(run, same)}. Compare runs of "
            "the same data, binarisation and split"
        )


def described(run: Run, with_hash: bool) -> str:
    """Which rows a run is of, in words."""
    config = run.config
    words = [f"{run.directory}: {config['data']}"]
    words += [f"binarised {config['binarize']}"] if config["binarize"] else []
    words += ["standardised"] if config["standardize"] else []
    words += [f"hash {config['data_hash'][:12]}"] if with_hash else []
    return ", ".join(words)


def pools(runs: Sequence[Run], pool: bool = True) -> list[list[Run]]:
    """Runs that differ in nothing but their seed, together; in the order in which they were named.

    Runs of one configuration and one seed are repetitions, not seeds: such a group stays apart.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = {key: value for key, value in run.config.items() if key not in NOT_THE_MODEL}
        groups.setdefault(repr(sorted(config.items())) if pool else str(run.directory), []).append(run)
    together = []
    for members in groups.values():
        distinct = len({run.config["seed"] for run in members}) == len(members)
        together += [members] if distinct else [[run] for run in members]
    return together


def name_pools(together: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each pool: what its directories' names begin with, or that of the first, and how many seeds."""
    unique = unique_names([run for members in together for run in members])
    names = [common_name([run.name for run in members]) if len(members) > 1 else "" for members in together]
    return [
        unique[members[0].directory]
        if len(members) == 1
        else f"{name if name and names.count(name) == 1 else unique[members[0].directory]} ({len(members)} seeds)"
        for name, members in zip(names, together, strict=True)
    ]


def common_name(names: Sequence[str]) -> str:
    """What names begin with: "iwae" of iwae-s1, iwae-s2, or of iwae, iwae-2; empty where that is nothing."""
    letters = zip(*names, strict=False)  # up to the end of the shortest
    prefix = "".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, letters))
    if any(name[len(prefix) :][:1].isdigit() for name in names):
        prefix = re.sub(r"\d+$", "", prefix)  # cut within a number
    return re.sub(r"[-_. ]+(seed|s)?[-_. =]*$", "", prefix)


def unique_names(runs: Sequence[Run]) -> dict[Path, str]:
    """A name for each run: its directory's, or the whole path where two agree."""
    names = [run.name for run in runs]
    return {run.directory: run.name if names.count(run.name) == 1 else str(run.directory) for run in runs}


def score_run(
    run: Run, rows: "Rows", x: "Tensor", num_particles: int, seed: int, proposal: "Proposal | None"
) -> "tuple[LogMarginal, Sandwich | Simulated | None]":
    """The log p(x) of a trained run, after saying what was found in its directory; kept there as it is made.

    With it, the check on simulated data.
    """
    from pyrovae.evaluate import check_of, compile_draws, open_scores, score

    model = run.model(x.device)
    for notice in run.notices:
        print(f"note: {notice}")
    proposal = compile_draws(model, x, num_particles, proposal, "auto", "fp32")
    print(f"scoring {run.name}", flush=True)
    if not run.writable:
        print(f"note: {run.directory} cannot be written to, so that its scores are not kept")
    store = open_scores(run, model, rows, x, num_particles, seed, proposal=proposal)
    result = score(model, x, num_particles, seed, progress=True, proposal=proposal, store=store)
    return result, check_of(model, x, num_particles, seed, proposal, store)


def command(words: Sequence[str]) -> int:
    """Parse the options, score every run, print and write the tables."""
    p = parser(
        "compare",
        "Score trained runs on the same rows, one table per measure, beside an exact mixture baseline: 95 % bootstrap "
        "intervals of log p(x), of paired differences and of ranks, and a verdict on each estimate.",
        "RUN [RUN ...] [options]",
    )
    p.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directories written by python -m pyrovae.fit, such as runs/*; those that differ only in --seed become "
        "one line; what is no run, damaged or unfinished is named and left out",
    )
    add_option(p, "--K", "particles per datum, drawn exactly (default 1000; 32 chains if annealed)", "INT")
    add_choices(p, "proposal", PROPOSALS)
    add_option(p, "--rows", "score only the first test rows (default: all)", "INT")
    add_option(p, "--seed", "of the draws, the bootstrap and the baseline (default 0)", "INT")
    add_option(p, "--no-pool", "a line for every run, also for those that differ only in --seed", action="store_true")
    add_option(p, "--no-baseline", "add no mixture baseline", action="store_true")
    add_option(p, "--components", "components of the baseline (default: chosen on the validation rows)", "INT")
    add_option(p, "--out", "where to write the tables and figures (default: comparison)", "DIR")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    options = given(p.parse_args(words))
    number = thread_count("threads", options.get("threads", "auto"))
    proposal = build_proposal(options.get("proposal"))
    k, seed = whole_option(options, "K", default_draws(proposal, 1000)), whole_option(options, "seed", 0)
    limit, components = whole_option(options, "rows", None), whole_option(options, "components", None)
    if options.get("no_baseline") and components:
        raise UsageError("--components: not used, since --no-baseline adds none")
    directories = [Path(name) for name in options["runs"]]
    for i, directory in enumerate(directories):
        if directory.resolve() in [other.resolve() for other in directories[:i]]:
            raise UsageError(f"RUN: the same directory is named twice, {directory}; leave one out")

    out = Path(str(options.get("out", "comparison")))
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; choose a directory")
    if holder := run_around(out, directories):
        raise UsageError(f"--out {out}: would write into the run {holder}; choose a directory outside of it")

    from pyrovae.evaluate import pick_device, score
    from pyrovae.processors import threads

    device = pick_device(str(options.get("device", "auto")))
    runs = usable(directories)
    by_measure: dict[str, list[Run]] = {}
    for run in runs:
        by_measure.setdefault(measure_of(run), []).append(run)
    for members in by_measure.values():
        check_same_rows(members)
    together = pools(runs, not options.get("no_pool"))
    names = name_pools(together)
    rows_of = load_rows(runs)
    invalid = []
    with threads(number, lambda text: print(f"note: {text}")):
        for kind, members in by_measure.items():
            rows = rows_of[members[0].directory]
            x = rows.test[:limit].to(device)
            scored = [
                Scored(name, *zip(*(score_run(run, rows, x, k, seed, proposal) for run in pool), strict=True))
                for name, pool in zip(names, together, strict=True)
                if measure_of(pool[0]) == kind
            ]
            if not options.get("no_baseline"):
                counts = (components,) if components else COMPONENTS
                name, mixture = fit_baseline(rows, counts, seed, device)
                scored.append(Scored(name, [score(mixture, x, k)]))
            present(table(scored, seed), rows, kind, len(x), members[0].config["data"], out)
            invalid += [entry for entry in scored if entry.verdict.kind == "invalid"]
    print(f"tables and figures in {out}")
    if invalid:
        raise NumericalError("invalid: " + "; ".join(f"{entry.name}: {entry.verdict.reason}" for entry in invalid))
    return 0


def present(frame: "pd.DataFrame", rows: "Rows", kind: str, count: int, data: str, out: Path) -> None:
    """Print a table and write it as CSV, LaTeX and a figure."""
    import pandas as pd

    from pyrovae import plots
    from pyrovae.fit import save_figure
    from pyrovae.inference.training.checkpoint import write_atomically

    how = f", binarisation {rows.binarize}" if rows.binarize else ""
    which = "all" if count == len(rows.test) else "the first"
    caption = f"{data}, {which} {count} test rows; {rows.measure.description}{how}"
    strings, notes = readable(frame), legend(frame)
    print(f"\n{caption}")
    print("nats per datum, larger is better; 95 % intervals and ranks by bootstrap over rows, differences paired\n")
    print(aligned(strings) + "\n")
    for note in notes:
        print(textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="    "))
    print()
    values = frame.assign(
        seed_means=[" ".join(map(repr, means)) for means in frame["seed_means"]],
        bits_per_dimension=pd.Series([rows.measure.bits_per_dimension(value) for value in frame["log_marginal"]]),
        measure=rows.measure.description,
        rows=count,
    )
    write_atomically(out / f"{kind}.csv", values.to_csv(index=False))
    best = [high == 1 for high in frame["rank_high"].fillna(0)]
    label = f"{Path(data).name}-{kind}"
    write_atomically(out / f"{kind}.tex", latex(strings, caption, label, best, notes))
    figure = plots.comparison(frame, title=f"{data}, {count} test rows, {rows.measure.description}")
    save_figure(figure, out, kind)


def legend(frame: "pd.DataFrame") -> list[str]:
    """What a reader of the table has to know, a line each."""
    from pyrovae.plots import SIGNS

    notes = []
    if (~frame["exact"]).any():
        sampled = frame[~frame["exact"]]
        notes.append(
            f"≥: a lower bound in expectation, from K = {sampled['K'].iloc[0]} draws, its Monte Carlo error at most "
            f"{sampled['monte_carlo_error'].max():.1g}"
        )
    ranked = frame[frame["rank_low"].notna()]
    if (~ranked["verdict"].isin(["exact", "ok"])).any():
        notes.append(
            "rank: by 95 % of the resamples, and a model of which only a lower bound is known may deserve rank 1, so "
            "that any other may have it above"
        )
    kinds = set(ranked["difference_bound"])
    notes += [f"to the best, {SIGNS[kind].strip()}: {words}" for kind, words in DIFFERENCES.items() if kind in kinds]
    if (frame["seeds"] > 1).any():
        notes.append("seeds' sd: standard deviation of the seeds' own means; no interval and no rank holds it")
    single = frame["name"][frame["seeds"] == 1]
    if len(single):
        which = "every model" if len(single) == len(frame) else ", ".join(single)
        notes.append(
            f"one seed: the spread over seeds is unknown of {which}; intervals and ranks are of these runs alone"
        )
    doubtful = frame[~frame["verdict"].isin(["exact", "ok"])]
    return notes + [f"{entry['name']}: {entry['verdict']}, {entry['reason']}" for _, entry in doubtful.iterrows()]


def latex(
    strings: "pd.DataFrame",
    caption: str,
    label: str = "comparison",
    best: Sequence[bool] = (),
    notes: Sequence[str] = (),
) -> str:
    """The table for a paper, with booktabs rules.

    Args:
        strings: Names in the first column, log p(x) in the third; all cells are escaped.
        caption: What the rows are; the unit is added.
        label: For \\ref{tab:...}; what is no letter or digit becomes a hyphen.
        best: Which rows have rank 1 for certain: their numbers are bold.
        notes: Lines below the table.
    """
    rows = []
    for i, (name, *cells) in enumerate(strings.itertuples(index=False)):
        typeset = [for_latex(name), *(numbers_for_latex(for_latex(cell)) for cell in cells)]
        if best and best[i]:
            typeset[2] = f"\\textbf{{{typeset[2]}}}"
        rows.append(" & ".join(typeset) + " \\\\")
    bold_means = " Bold: the best, whatever the rows leave open." if any(best) else ""
    about = "nats per datum, larger is better, with 95 % intervals by bootstrap over rows."
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{for_latex(caption)}; {for_latex('log p(x) in ' + about + bold_means)}}}",
        f"\\label{{tab:{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(strings.columns) - 1)}}}",
        "\\toprule",
        " & ".join(for_latex(name) for name in strings.columns) + " \\\\",
        "\\midrule",
        *rows,
        "\\bottomrule",
        "\\end{tabular}",
        *(f"\\par\\footnotesize {for_latex(note)}" for note in notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def for_latex(text: str) -> str:
    """Text in which nothing is a command to LaTeX; signs and powers as mathematics."""
    signs = {"≥": "$\\ge$", "≤": "$\\le$", "±": "$\\pm$", "<": "$<$", ">": "$>$", "|": "$|$"}
    words = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    table = signs | words | {character: f"\\{character}" for character in "&%#_{}$"}
    escaped = "".join(table.get(character, character) for character in " ".join(text.split()))
    escaped = re.sub(r"(\\\{0,1\\\}|\[0,1\])\\textasciicircum\{\}(\d+)", r"$\1^{\2}$", escaped)
    return escaped.replace("log p(x)", "$\\log p(x)$")


def numbers_for_latex(text: str) -> str:
    """The same with minus signs before numbers and dashes between them, in place of hyphens."""
    return re.sub(r"(?<=\d)-(?=\d)", "--", re.sub(r"(?<![\w.$-])-(?=\d)", "$-$", text))


if __name__ == "__main__":
    main("compare", command, sys.argv[1:])
