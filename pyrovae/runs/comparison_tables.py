"""A comparison to read: as text, LaTeX, CSV and a figure."""

import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.errors import UsageError
from pyrovae.runs.comparison import COLUMNS
from pyrovae.runs.directory import begins
from pyrovae.runs.figures import save_figure
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.quality_tables import QUALITY_HEAD, quality_file
from pyrovae.runs.tables import aligned

if TYPE_CHECKING:
    import pandas as pd

    from pyrovae.data import Rows

# What a difference to the highest number is where it is not that of log p(x), by its `difference_bound`.
DIFFERENCES = {
    "at least": "the model's number is a lower bound: it may be less far below, or above",
    "at most": "the highest number is a lower bound: the model may be further below",
    "open": "both numbers are lower bounds: either model may be the better",
}
RULES = "% needs \\usepackage{booktabs}"  # the first line of a table for LaTeX


def present(
    frame: "pd.DataFrame", rows: "Rows", kind: str, count: int, data: str, out: Path, say: Say = silent
) -> None:
    """Say a table and write it as CSV, LaTeX and a figure."""
    import pandas as pd

    from pyrovae import plots
    from pyrovae.files import write_atomically

    how = f", binarisation {rows.binarize}" if rows.binarize else ""
    which = "all" if count == len(rows.test) else "the first"
    caption = f"{data}, {which} {count} test rows; {rows.measure.description}{how}"
    strings, notes = readable(frame), legend(frame)
    say(f"\n{caption}")
    say("nats per datum, larger is better; 95 % intervals and ranks by bootstrap over rows, differences paired\n")
    say(aligned(strings) + "\n")
    for note in notes:
        say(textwrap.fill(note, 118, initial_indent="  ", subsequent_indent="    "))
    say("")
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


def check_replaced(out: Path, kind: str) -> None:
    """Refuse a directory in which a file has the name of a table or figure, and is none of ours.

    Raises:
        UsageError: there is one.
    """
    table = out / f"{kind}.csv"
    heads = {
        table: f"{','.join(COLUMNS[:2])},".encode(),
        table.with_suffix(".tex"): RULES.encode(),
        table.with_suffix(".png"): b"\x89PNG",
        quality_file(out, kind): QUALITY_HEAD,
    }
    for path, head in heads.items():
        # A figure is known by the table beside it: others draw as well.
        ours = path.is_file() and begins(path, head) and (path.suffix != ".png" or table.is_file())
        if os.path.lexists(path) and not ours:
            raise UsageError(f"{path}: was not written by pyrovae.compare; choose another directory", settings=("out",))


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


def legend(frame: "pd.DataFrame") -> list[str]:
    """What a reader of the table has to know, a line each."""
    from pyrovae.inference.verdicts import Kind
    from pyrovae.plots import SIGNS

    firm = [kind for kind in Kind if kind.is_firm]
    notes = []
    if (~frame["exact"]).any():
        sampled = frame[~frame["exact"]]
        notes.append(
            f"≥: a lower bound in expectation, from K = {sampled['K'].iloc[0]} draws, its Monte Carlo error at most "
            f"{sampled['monte_carlo_error'].max():.1g}"
        )
    ranked = frame[frame["rank_low"].notna()]
    if (~ranked["verdict"].isin(firm)).any():
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
    doubtful = frame[~frame["verdict"].isin(firm)]
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
        RULES,
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
