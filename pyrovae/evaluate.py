"""python -m pyrovae.evaluate RUN: the log p(x) of a trained run, with its error.

Prints a report and writes it to RUN/evaluation.json.
"""

import copy
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.command import add_option, given, main, parser
from pyrovae.config import option, refuse, whole
from pyrovae.errors import NumericalError, UsageError
from pyrovae.run import Run, open_run

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.config import Model
    from pyrovae.data import Rows
    from pyrovae.inference.log_marginal import LogMarginal

Report = dict[str, Any]
SPLITS = ("test", "validation", "train")


def pick_device(name: str) -> "torch.device":
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        UsageError: there is no such device. Never a silent CPU.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name}: not available here; use cpu or auto") from None
    return device


def rows_of(rows: "Rows", split: str, limit: int | None = None) -> "Tensor":
    """The first rows of a split as x; training rows are transformed with fixed noise."""
    from pyrovae.inference.seeding import seeded

    if split != "train":
        return getattr(rows, split)[:limit]
    with seeded("training rows for evaluation"):
        return rows.transform(rows.train[:limit])


def score(
    model: "Model",
    x: "Tensor",
    num_particles: int,
    seed: int = 0,
    chunk_size: int | None = None,
    progress: bool = False,
) -> "LogMarginal":
    """log p(x) of rows under a model: exact for a mixture, else importance-sampled from its guide.

    Raises:
        NumericalError: some row's estimate is not a number; the rows are named and nothing is averaged without them.
    """
    import torch
    from tqdm import tqdm

    from pyrovae.inference.log_marginal import exact, log_marginal
    from pyrovae.inference.seeding import seeded
    from pyrovae.models.mixture import Mixture

    if isinstance(model, Mixture):
        # In double precision, which costs little here: rows far from every component lose digits in single.
        model = copy.deepcopy(model).double()
        with torch.no_grad():
            result = exact(torch.cat([model.log_prob(block) for block in x.split(1000)]))
    else:
        with (
            seeded(seed, "evaluation", device=x.device),
            tqdm(total=len(x), unit="row", disable=None if progress else True, leave=False) as bar,
        ):
            result = log_marginal(
                model.model, model.guide, x, num_particles, chunk_size, lambda done: bar.update(done - bar.n)
            )
    if result.invalid:
        shown = ", ".join(f"{i} ({result.estimate[i].item()})" for i in result.invalid[:5])
        raise NumericalError(
            f"invalid: log p(x) is not a finite number for {len(result.invalid)} of {len(x)} rows, the first being "
            f"{shown}; their weights are all zero, NaN or infinite under this model"
        )
    return result


def report(
    model: "Model",
    x: "Tensor",
    rows: "Rows",
    *,
    num_particles: int,
    objective: "PyroELBO",
    split: str = "test",
    seed: int = 0,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Report:
    """Everything that is said of a model on some rows, as plain values. Nats per datum unless the name says bits."""
    import pyro
    import torch

    from pyrovae import __version__
    from pyrovae.inference.diagnostics import measure
    from pyrovae.inference.log_marginal import standard_error
    from pyrovae.inference.log_weights import draw
    from pyrovae.inference.objectives import kl_terms
    from pyrovae.inference.pair import evaluating
    from pyrovae.inference.seeding import seeded

    result = score(model, x, num_particles, seed, chunk_size, progress)
    exact = result.num_particles == 0
    with seeded(seed, "terms", device=x.device), evaluating(model.model, model.guide):
        terms = measure(model.model, model.guide, x.split(200), objective)
        forms = {} if exact else kl_terms(draw(model.model, model.guide, x[:1]))[1]
    values: Report = {
        "estimator": "exact" if exact else "importance sampling from the guide",
        "K": None if exact else result.num_particles,
        "unit": "nats per datum",
        "measure": rows.measure.description,
        "binarize": rows.binarize,
        "split": split,
        "rows": len(x),
        "rows_in_split": len(getattr(rows, split)),
        "log_marginal": result.mean,
        "error_over_rows": result.error_over_rows,
        "monte_carlo_error": result.monte_carlo_error,
        "bits_per_dimension": rows.measure.bits_per_dimension(result.mean),
        "test_bound" if split == "test" else f"{split}_bound": terms["bound"],
    }
    if not exact:
        k_hat = result.pareto_k
        known = k_hat[~k_hat.isnan()]
        values |= {
            "elbo": result.elbo.mean().item(),
            "elbo_error_over_rows": standard_error(result.elbo),
            "gap": (result.estimate - result.elbo).mean().item(),
            "gap_error_over_rows": standard_error(result.estimate - result.elbo),
            "reconstruction": terms["reconstruction"],
            "kl": terms["kl"],
            "kl_forms": forms,
            "active_units": int(terms["active_units"]),
            "latent_dimensions": int(terms["latent_dimensions"]),
            "ess": summary(result.ess),
            "pareto_k": {
                **summary(known),
                "threshold": result.k_threshold,
                "share_over_threshold": None if not len(known) else (known > result.k_threshold).double().mean().item(),
                "rows_without_tail_diagnostic": len(k_hat) - len(known),
            },
            "remark": remark(result),
            "curve": [
                {"K": k, "log_marginal": v.mean().item(), "error_over_rows": standard_error(v)}
                for k, v in result.curve.items()
            ],
        }
    values |= {
        "seed": seed,
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device.type,
        "data_hash": rows.hash,
        "versions": {
            "pyrovae": __version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
        },
    }
    return values


def summary(values: "Tensor") -> dict[str, float | None]:
    """Least, quartiles and largest of some numbers."""
    import torch

    names = ("min", "q25", "median", "q75", "max")
    if not len(values):
        return dict.fromkeys(names)
    quantiles = torch.quantile(values, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype))
    return dict(zip(names, quantiles.tolist(), strict=True))


def remark(result: "LogMarginal") -> str:
    """What the tail of the weights says about the estimate."""
    known = result.pareto_k[~result.pareto_k.isnan()]
    if not len(known):
        return f"no tail diagnostic: K = {result.num_particles} is too small for k-hat; read it as a lower bound"
    over = int((known > result.k_threshold).sum())
    if not over:
        return f"k-hat is below {result.k_threshold:.2f} for every row"
    worst = known.argsort(descending=True)[:3].tolist()
    return (
        f"lower bound only for {over} of {len(known)} rows, whose k-hat is over {result.k_threshold:.2f} "
        f"(the largest in rows {', '.join(map(str, worst))}); a larger K raises it"
    )


def number(value: float | None, error: float | None = None) -> str:
    """A value with its error, to the digits the error allows."""
    if value is None or not math.isfinite(value):
        return "-"
    if error is None or not math.isfinite(error):
        return f"{value:.2f}"
    digits = 2 if error <= 0 else max(0, min(6, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def in_words(forms: dict[str, str]) -> str:
    """How the KL of each site was taken: "analytic", "sampled", or site by site."""
    kinds = set(forms.values())
    return kinds.pop() if len(kinds) == 1 else ", ".join(f"{site} {form}" for site, form in forms.items())


def describe(name: str, values: Report) -> str:
    """The report as a table to read."""
    split = values["split"]
    which = f"{'all' if values['rows'] == values['rows_in_split'] else 'the first'} {values['rows']} {split} rows"
    lines = [
        f"{name}: {which}{' (the rows it was trained on)' if split == 'train' else ''}",
        f"{values['measure']}{', binarisation ' + values['binarize'] if values['binarize'] else ''}; nats per datum",
        "",
    ]

    def line(label: str, value: str, note: str = "") -> None:
        lines.append(f"  {label:<26}{value:>18}{'   ' + note if note else ''}".rstrip())

    how = "exact" if values["K"] is None else f"K = {values['K']}, importance sampling"
    line("log p(x)", number(values["log_marginal"], values["error_over_rows"]), f"{how}; ± error over rows")
    if values["bits_per_dimension"] is not None:
        line("  in bits per dimension", f"{values['bits_per_dimension']:.4f}")
    if values["K"] is not None:
        line("  Monte Carlo error", f"{values['monte_carlo_error']:.2g}", "of the mean, for these rows")
        line("ELBO", number(values["elbo"], values["elbo_error_over_rows"]), "same draws")
        line("gap, log p(x) - ELBO", number(values["gap"], values["gap_error_over_rows"]))
        line("reconstruction", number(values["reconstruction"]), "E log p(x|z)")
        line("KL(q(z|x) || p(z))", number(values["kl"]), in_words(values["kl_forms"]))
        line("active units", f"{values['active_units']} of {values['latent_dimensions']}")
        ess, k_hat = values["ess"], values["pareto_k"]
        line("effective sample size", f"{ess['median']:.1f}", f"median; least {ess['min']:.1f}, of K = {values['K']}")
        if k_hat["median"] is not None:
            share = f"{100 * k_hat['share_over_threshold']:.1f} % of rows over {k_hat['threshold']:.2f}"
            line("Pareto k-hat", f"{k_hat['median']:.2f}", f"median; largest {k_hat['max']:.2f}; {share}")
        lines += ["", f"  {values['remark']}", "", "  K-curve, from the same draws"]
        for point in values["curve"]:
            line(f"  L_{point['K']}", number(point["log_marginal"], point["error_over_rows"]))
    return "\n".join(lines)


def evaluate(
    run: Run, num_particles: int, limit: int | None, split: str, seed: int, chunk_size: int | None, device: str
) -> Report:
    """Score a run and write its evaluation.json and K-curve."""
    from pyrovae.config import build_objective
    from pyrovae.inference.checkpoint import write_json

    place = pick_device(device)
    rows = run.rows()
    x = rows_of(rows, split, limit).to(place)
    model = run.model(place)
    for notice in run.notices:
        print(f"note: {notice}")
    values = report(
        model,
        x,
        rows,
        num_particles=num_particles,
        objective=build_objective(run.config),
        split=split,
        seed=seed,
        chunk_size=chunk_size,
        progress=True,
    )
    name = "evaluation.json" if split == "test" else f"evaluation-{split}.json"
    write_json(run.directory / name, values)
    return values


def command(words: Sequence[str]) -> int:
    """Parse the options, evaluate, print."""
    p = parser(
        "evaluate",
        "The log p(x) of a trained run by importance sampling from its guide, with its error.",
        "RUN [options]",
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--K", "particles per datum, drawn exactly (default 5000)", "INT")
    add_option(p, "--rows", "score only the first rows (default: all)", "INT")
    add_option(p, "--split", "test, validation or train (default test)", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_option(p, "--chunk-size", "particles evaluated at once; bounds memory, changes nothing else", "INT")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    options = given(p.parse_args(words))
    k, seed = whole_option(options, "K", 5000), whole_option(options, "seed", 0)
    limit, chunk_size = whole_option(options, "rows", None), whole_option(options, "chunk_size", None)
    split = str(options.get("split", "test"))
    if split not in SPLITS:
        raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, got {split}")
    run = open_run(options["run"])
    if run.config["model"]["name"] == "mixture":
        refuse(options, ("K", "chunk_size"), "the log p(x) of a mixture is exact")
    values = evaluate(
        run,
        k,
        limit,
        split,
        seed,
        chunk_size,
        str(options.get("device", "auto")),
    )
    print(describe(run.name, values))
    if values["K"] is not None:
        save_curve(run, values)
    return 0


def whole_option(options: dict[str, Any], key: str, default: int | None) -> Any:
    """An option that is a whole number: at least 0 for the seed, 1 for all others."""
    return default if key not in options else whole(0 if key == "seed" else 1)(option(key), options[key])


def save_curve(run: Run, values: Report) -> Path:
    """Draw the K-curve into the run's plots."""
    from pyrovae import plots
    from pyrovae.fit import save_figure

    points = values["curve"]
    figure = plots.k_curve(
        [point["K"] for point in points],
        [point["log_marginal"] for point in points],
        [point["error_over_rows"] for point in points],
        elbo=values["elbo"],
        title=f"{run.name}, {values['rows']} {values['split']} rows",
    )
    return save_figure(figure, run.directory / "plots", "k_curve")


if __name__ == "__main__":
    main("evaluate", command, sys.argv[1:])
