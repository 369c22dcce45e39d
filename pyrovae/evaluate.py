"""python -m pyrovae.evaluate RUN: the log p(x) of a trained run, with its error and a verdict.

Prints a report and writes it to RUN/evaluation.json; the rows' own results go to RUN/scores/ as they are made.
"""

import copy
import hashlib
import math
import os
import platform
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.command import add_choices, add_option, given, main, parser
from pyrovae.errors import NumericalError, OutputError, UsageError
from pyrovae.files import inside
from pyrovae.runs.build import build_proposal
from pyrovae.runs.config import refuse
from pyrovae.runs.directory import Run, begins, open_run
from pyrovae.runs.options import PROPOSALS, SETTINGS, one_of, option, thread_count, when, whole
from pyrovae.runs.scores import Scores

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.marginal import LogMarginal
    from pyrovae.inference.proposals import Proposal
    from pyrovae.inference.simulation import Simulated
    from pyrovae.runs.build import Model

Report = dict[str, Any]
# Data simulated to check a setting of annealed importance sampling.
CHECKED_ROWS = 50
# Draws of each row in a netCDF file, and the bytes that they may take.
SAVED_DRAWS = 100
MOST_SAVED = 2 * 10**9
SPLITS = ("test", "validation", "train")
# Lines printed at most for the rows of an evaluation whose output is no terminal.
ROW_LINES = 10


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
    from torch import Tensor

    from pyrovae.seeding import seeded

    if split != "train":
        return getattr(rows, split)[:limit]
    if limit is None and not isinstance(rows.train, Tensor):
        raise UsageError("--rows: say how many of the training rows, which are streamed from a file; all may not fit")
    with seeded("training rows for evaluation"):
        return rows.transform(rows.train[:limit])


def score(
    model: "Model",
    x: "Tensor",
    num_particles: int,
    seed: int = 0,
    chunk_size: int | None = None,
    progress: bool = False,
    proposal: "Proposal | None" = None,
    store: "Scores | None" = None,
) -> "LogMarginal":
    """log p(x) of rows under a model: exact for a mixture, else importance-sampled, by default from its guide.

    Rows without a finite estimate stay in it: see `LogMarginal.invalid`.
    """
    import torch

    from pyrovae.inference.marginal import FROM_GUIDE, exact, log_marginal
    from pyrovae.inference.tracing.draws import CompileWarning
    from pyrovae.models.mixture import Mixture

    if isinstance(model, Mixture):
        # In double precision, which costs little here: rows far from every component lose digits in single.
        model = copy.deepcopy(model).double()
        values: list[Tensor] = []
        with torch.no_grad(), rows_done(len(x), "log p(x) in closed form", progress) as done:
            for block in x.split(1000):
                values.append(model.log_prob(block))
                done(min(1000 * len(values), len(x)))
        return exact(torch.cat(values))
    proposal = proposal or FROM_GUIDE
    with (
        warnings.catch_warnings(record=True) as caught,
        rows_done(len(x), f"log p(x) by {proposal.name}, K = {num_particles}", progress) as done,
    ):
        warnings.simplefilter("always", CompileWarning)
        result = log_marginal(
            model.model,
            model.guide,
            x,
            num_particles,
            chunk_size,
            progress=done,
            proposal=proposal,
            seed=seed,
            store=store,
        )
    if store is not None:
        store.tidy(len(x))
    for warning in caught:
        if issubclass(warning.category, CompileWarning):
            print(f"note: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result


@contextmanager
def rows_done(total: int, what: str, progress: bool = True) -> "Iterator[Callable[[int], object]]":
    """What is called with the number of rows done: a bar on a terminal, elsewhere a few plain lines that say it."""
    from tqdm import tqdm

    if not progress:
        yield lambda done: None
        return
    if sys.stderr is not None and sys.stderr.isatty():
        with tqdm(total=total, unit="row", leave=False) as bar:
            yield lambda done: bar.update(done - bar.n)
        return
    started, told = time.perf_counter(), 0
    print(f"{what}: {total} rows", flush=True)

    def tell(done: int) -> None:
        nonlocal told
        if done < total and done * ROW_LINES // total > told:
            told = done * ROW_LINES // total
            print(f"  {done} of {total} rows in {time.perf_counter() - started:.0f} s", flush=True)

    yield tell


def repaired(model: "Model", x: "Tensor", result: "LogMarginal", progress: bool = False) -> "LogMarginal":
    """The estimate with its unreliable rows scored again from a better proposal."""
    from pyrovae.inference.repairs import repair

    bad = int(result.unreliable.sum())
    with rows_done(bad, "unreliable rows again", progress and bad > 0) as done:
        return repair(model.model, model.guide, x, result, progress=done)


def check_of(
    model: "Model",
    x: "Tensor",
    num_particles: int,
    seed: int,
    proposal: "Proposal | None",
    store: "Scores | None" = None,
    chunk_size: int | None = None,
    repair: "Proposal | None" = None,
    progress: bool = False,
) -> "Sandwich | Simulated | None":
    """The check of an estimate on simulated data, kept beside the scores; None where log p(x) is exact."""
    import torch

    from pyrovae.inference.annealed import Annealed, Sandwich, sandwich
    from pyrovae.inference.marginal import FROM_GUIDE
    from pyrovae.inference.simulation import SIMULATED_ROWS, Simulated, like, simulated
    from pyrovae.models.mixture import Mixture

    if isinstance(model, Mixture):
        return None
    pair = (model.model, model.guide)
    if isinstance(proposal, Annealed):
        count, names = CHECKED_ROWS, ("forward", "reverse", "acceptance")
        make: Callable[[], Any] = partial(sandwich, *pair, like(x, count), num_particles, proposal, seed)
        build: Callable[..., Any] = partial(Sandwich, x=torch.empty(0), num_particles=num_particles, annealed=proposal)
    else:
        # The weights of rows are not kept: of the models that runs hold, all latents are continuous.
        count, names = SIMULATED_ROWS, ("lower", "upper", "jackknife")
        drawn_from = proposal or FROM_GUIDE
        make = partial(simulated, *pair, like(x, count), num_particles, drawn_from, seed, chunk_size, repair)
        build = partial(Simulated, num_particles=num_particles, estimator=drawn_from.name)

    def checked() -> Any:
        if progress:
            print(f"checking on {count} simulated rows", flush=True)
        return make()

    return checked() if store is None else store.check(names, checked, build, repaired=repair is not None)


def compile_draws(
    model: "Model", x: "Tensor", num_particles: int, proposal: "Proposal | None", mode: str, precision: str
) -> "Proposal | None":
    """The proposal with its draws compiled, where that is asked for, or pays.

    Raises:
        UsageError: it cannot be compiled, and --compile on or --precision bf16 asks for it.
    """
    from pyrovae.inference.marginal import FROM_GUIDE
    from pyrovae.inference.tracing.draws import Compiled, worth_compiling
    from pyrovae.models.mixture import Mixture

    if mode == "off" and precision == "bf16":
        raise UsageError("--precision bf16: is for compiled draws; leave --compile off away")
    if isinstance(model, Mixture) or mode == "off":
        return proposal
    try:
        compiled = Compiled(proposal or FROM_GUIDE, precision)
    except UsageError as error:
        if mode == "on" or precision == "bf16":
            asked = "--precision bf16" if precision == "bf16" else "--compile on"
            raise UsageError(f"{asked}: {error}") from None
        return proposal
    forced = mode == "on" or precision == "bf16"
    return compiled if forced or worth_compiling(model.model, model.guide, x, num_particles) else proposal


def open_scores(
    run: Run,
    model: "Model",
    rows: "Rows",
    x: "Tensor",
    num_particles: int,
    seed: int = 0,
    chunk_size: int | None = None,
    proposal: "Proposal | None" = None,
    split: str = "test",
) -> "Scores | None":
    """Where the scores of these rows are kept as they are made, and found again.

    None for a mixture, which is quick, and where nothing can be kept.
    """
    import pyro
    import torch

    from pyrovae import __version__
    from pyrovae.inference.marginal import FROM_GUIDE
    from pyrovae.models.mixture import Mixture

    if isinstance(model, Mixture) or not run.writable:
        return None
    proposal = proposal or FROM_GUIDE
    settings = {
        "estimator": proposal.name,
        "proposal": repr(proposal),
        "K": num_particles,
        "seed": seed,
        "chunk_size": chunk_size,
        "split": split,
        "device": x.device.type,
        "data": rows.hash,
        "model": hash_of(model),
        "versions": [__version__, torch.__version__, pyro.__version__],
    }
    return Scores(run.directory, settings)


def hash_of(model: "Model") -> str:
    """SHA-256 of a pair's parameters and buffers."""
    from pyrovae.inference.pair import Pair

    digest = hashlib.sha256()
    for name, tensor in sorted(Pair(model.model, model.guide).tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
    proposal: "Proposal | None" = None,
    store: "Scores | None" = None,
    particle_chunk: int | None = None,
    repair: bool = False,
) -> Report:
    """Everything that is said of a model on some rows, as plain values. Nats per datum unless the name says bits."""
    import pyro
    import torch

    from pyrovae import __version__
    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.bootstrap import interval
    from pyrovae.inference.diagnostics import KL_SHARE, kl_dimensions, measure
    from pyrovae.inference.marginal import FROM_GUIDE, standard_error
    from pyrovae.inference.modules import evaluating
    from pyrovae.inference.objectives import kl_terms
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.simulation import Simulated
    from pyrovae.inference.tracing.draws import Compiled
    from pyrovae.inference.verdicts import verdict, worst_rows
    from pyrovae.inference.weights import draw
    from pyrovae.seeding import seeded

    result = score(model, x, num_particles, seed, chunk_size, progress, proposal, store)
    exact = result.num_particles == 0
    if repair:
        result = repaired(model, x, result, progress)
    better = None if result.origin is None else result.origin.repair
    check = check_of(model, x, num_particles, seed, proposal, store, chunk_size, better, progress)
    judgement = verdict(result, check)
    with seeded(seed, "terms", device=x.device), evaluating(model.model, model.guide):
        terms = measure(model.model, model.guide, x.split(200), objective, particle_chunk)
        forms = {} if exact else kl_terms(draw(Pair(model.model, model.guide), Batch(x[:1])))[1]
    values: Report = {
        "verdict": judgement.kind,
        "reason": judgement.reason,
        "estimator": result.estimator,
        "K": None if exact else result.num_particles,
        "unit": "nats per datum",
        "measure": rows.measure.description,
        "binarize": rows.binarize,
        "split": split,
        "rows": len(x),
        "rows_in_split": len(getattr(rows, split)),
        "log_marginal": result.mean,
        "error_over_rows": result.error_over_rows,
        "bootstrap_interval": interval(result.estimate, seed=seed),
        "monte_carlo_error": result.monte_carlo_error,
        "bits_per_dimension": rows.measure.bits_per_dimension(result.mean),
        "test_bound" if split == "test" else f"{split}_bound": terms["bound"],
    }
    if not exact:
        k_hat = result.pareto_k
        known = k_hat[~k_hat.isnan()]
        # The mean log-weight is the guide's ELBO only where the draws are.
        of_guide = result.elbo if result.estimator.startswith(FROM_GUIDE.name) else None
        compiled = isinstance(proposal, Compiled) and any(proposal.programs.values())
        bias = proposal.bias if isinstance(proposal, Compiled) and proposal.precision == "bf16" else None
        each = {name.removeprefix("kl_"): value for name, value in terms.items() if name.startswith("kl_")}
        elbo = terms["elbo"] if of_guide is None else of_guide.mean().item()
        values |= {
            "jackknife": result.jackknife.mean().item(),
            "excess": {"nats": result.excess(), "probability": 1e-6},
            "elbo": elbo,
            "elbo_error_over_rows": None if of_guide is None else standard_error(of_guide),
            "gap": result.mean - elbo,
            "gap_error_over_rows": None if of_guide is None else standard_error(result.estimate - of_guide),
            "reconstruction": terms["reconstruction"],
            "kl": terms["kl"],
            "kl_forms": forms,
            "active_units": int(terms["active_units"]),
            "latent_dimensions": int(terms["latent_dimensions"]),
            # Of all dimensions or of none: their shares are of the whole.
            "kl_dimensions": {
                "share": KL_SHARE,
                "count": kl_dimensions(list(each.values())) if len(each) == terms["latent_dimensions"] else None,
            },
            "kl_per_dimension": each,
            "ess": summary(result.ess),
            "pareto_k": {
                **summary(known),
                "threshold": result.k_threshold,
                "share_over_threshold": result.over_threshold.double().mean().item() if len(known) else None,
                "rows_without_tail_diagnostic": len(k_hat) - len(known),
            },
            "rows_without_finite_estimate": len(result.invalid),
            "zero_weights": int(result.zero_weights.sum()),
            "rows_with_zero_weights": int((result.zero_weights > 0).sum()),
            "stated_bias": judgement.bias,
            # Of chains there are too few for an effective sample size or a k-hat to tell.
            "unreliable_rows": [] if isinstance(check, Sandwich) else result.unreliable.nonzero().flatten().tolist(),
            "repaired_rows": None if result.repaired is None else list(result.repaired),
            "simulated": None
            if not isinstance(check, Simulated)
            else {
                "lower": check.weighted(check.lower).mean().item(),
                "upper": check.weighted(check.upper).mean().item(),
                "width": check.width,
                "width_error": check.error,
                "validated": check.validated,
                "rows": len(check.lower),
            },
            "sandwich": None
            if not isinstance(check, Sandwich)
            else {
                "forward": check.forward.mean().item(),
                "reverse": check.reverse.mean().item(),
                "width": check.width,
                "width_error": check.error,
                "validated": check.validated,
                "simulated_data": len(check.forward),
                "acceptance": check.acceptance.mean().item(),
            },
            "compiled": compiled,
            "precision": proposal.precision if isinstance(proposal, Compiled) else "fp32",
            "precision_bias": None if bias is None else {"nats": bias[0], "error": bias[1]},
            "worst_rows": [
                {
                    "row": row,
                    "log_marginal": result.estimate[row].item(),
                    "standard_error": result.standard_error[row].item(),
                    "ess": result.ess[row].item(),
                    "pareto_k": result.pareto_k[row].item(),
                }
                for row in worst_rows(result)
            ],
            "curve": [
                {
                    "K": k,
                    "log_marginal": v.mean().item(),
                    "error_over_rows": standard_error(v),
                    # On the same rows: other rows would move all of the curve together.
                    "to_last": (v - result.estimate).mean().item(),
                    "to_last_error": standard_error(v - result.estimate),
                }
                for k, v in result.curve.items()
            ],
        }
    values |= {
        "seed": seed,
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device.type,
        "data_hash": rows.hash,
        "rows_hash": hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "model_hash": hash_of(model),
        "versions": {
            "pyrovae": __version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
        },
    }
    return values


def refuse_invalid(values: Report) -> None:
    """End a command whose report is not of numbers.

    Raises:
        NumericalError: the verdict is "invalid"; the rows are named, and nothing is averaged without them.
    """
    if values["verdict"] == "invalid":
        raise NumericalError(f"invalid: {values['reason']}")


def summary(values: "Tensor") -> dict[str, float | None]:
    """Least, quartiles and largest of some numbers."""
    import torch

    names = ("min", "q25", "median", "q75", "max")
    if not len(values):
        return dict.fromkeys(names)
    quantiles = torch.quantile(values, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype))
    return dict(zip(names, quantiles.tolist(), strict=True))


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


def in_words(forms: dict[str, str]) -> str:
    """How the KL of each site was taken: "analytic", "sampled", or site by site."""
    kinds = set(forms.values())
    return kinds.pop() if len(kinds) == 1 else ", ".join(f"{site} {form}" for site, form in forms.items())


def units_in_words(values: Report) -> list[tuple[str, str, str]]:
    """How many latent dimensions are used at all, and how few carry the KL: label, number and note of each line."""
    from pyrovae.inference.diagnostics import ACTIVE_VARIANCE

    total, carrying = values["latent_dimensions"], values["kl_dimensions"]
    lines = [("active units", f"{values['active_units']} of {total}", f"variance of E[z|x] over {ACTIVE_VARIANCE}")]
    if carrying["count"] is not None:
        share = f"{100 * carrying['share']:g} % of the KL"
        lines.append((f"{share} in", f"{carrying['count']} of {total}", "latent dimensions, those with the largest"))
    return lines


def heading(name: str, values: Report) -> list[str]:
    """What a report is about, in two lines: the rows, and what log p(x) is of them."""
    split = values["split"]
    which = f"{'all' if values['rows'] == values['rows_in_split'] else 'the first'} {values['rows']} {split} rows"
    return [
        f"{name}: {which}{' (the rows it was trained on)' if split == 'train' else ''}",
        f"{values['measure']}{', binarisation ' + values['binarize'] if values['binarize'] else ''}; nats per datum",
    ]


def describe(name: str, values: Report) -> str:
    """The report as a table to read."""
    lines = [*heading(name, values), ""]

    def line(label: str, value: str, note: str = "") -> None:
        lines.append(f"  {label:<26}{value:>18}{'   ' + note if note else ''}".rstrip())

    how = "exact" if values["K"] is None else f"K = {values['K']}"
    line("log p(x)", number(values["log_marginal"], values["error_over_rows"]), f"{how}; ± error over rows")
    line("  95 % interval", between(values["bootstrap_interval"]), "bootstrap over rows")
    if values["bits_per_dimension"] is not None:
        line("  in bits per dimension", f"{values['bits_per_dimension']:.4f}")
    if values["K"] is not None:
        line("  Monte Carlo error", short(values["monte_carlo_error"]), "of the mean, for these rows")
        excess = values["excess"]
        line("  too high by at most", f"{excess['nats']:.2g}", f"except with probability {excess['probability']:.0e}")
        if (bias := values["precision_bias"]) is not None:
            line("  bias of bfloat16", number(bias["nats"], bias["error"]), "measured on the same noise, and left in")
        line("  jackknife", number(values["jackknife"]), "without the bias of order 1/K; no bound")
    lines += ["", *textwrap.wrap(f"verdict: {values['verdict']}, {values['reason']}", 100, **INDENT), ""]
    if values["K"] is not None:
        lines += [*textwrap.wrap(values["estimator"], 100, **INDENT)]
        error = values["elbo_error_over_rows"]
        line("ELBO", number(values["elbo"], error), "of the guide" + (", same draws" if error is not None else ""))
        line("gap, log p(x) - ELBO", number(values["gap"], values["gap_error_over_rows"]))
        line("reconstruction", number(values["reconstruction"]), "E log p(x|z)")
        line("KL(q(z|x) || p(z))", number(values["kl"]), in_words(values["kl_forms"]))
        for label, count, note in units_in_words(values):
            line(label, count, note)
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
        lines += ["", f"  {'K-curve, from the same draws':<44}   less the last, on the same rows"]
        for point in values["curve"]:
            last = point["K"] == values["K"]
            paired = "" if last else number(point["to_last"], point["to_last_error"])
            line(f"  L_{point['K']}", number(point["log_marginal"], point["error_over_rows"]), paired)
        lines += ["", "  worst rows      log p(x)   Monte Carlo error      ess    k-hat"]
        for row in values["worst_rows"]:
            k_hat = "-" if math.isnan(row["pareto_k"]) else f"{row['pareto_k']:.2f}"
            error, ess = short(row["standard_error"]), f"{row['ess']:.1f}"
            lines.append(f"  {row['row']:>10}{row['log_marginal']:>14.2f}{error:>20}{ess:>9}{k_hat:>9}")
    return "\n".join(lines)


def listed(rows: list[int], most: int = 10) -> str:
    """Row numbers, the first ones of many."""
    return ", ".join(map(str, rows[:most])) + (", ..." if len(rows) > most else "")


INDENT: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": "    "}


def between(interval: list[float]) -> str:
    """An interval, to the digits its width allows."""
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)):
        return "-"
    digits = max(0, min(6, 2 - math.floor(math.log10(high - low)))) if high > low else 2
    return f"{low:.{digits}f} to {high:.{digits}f}"


def evaluate(
    run: Run,
    num_particles: int,
    limit: int | None,
    split: str,
    seed: int,
    chunk_size: int | None,
    device: str,
    proposal: "Proposal | None" = None,
    anew: bool = False,
    netcdf: Path | None = None,
    compile_mode: str = "auto",
    precision: str = "fp32",
    repair: bool = False,
) -> Report:
    """Score a run, going on where an interrupted evaluation was; print and write the report and the K-curve."""
    from pyrovae.runs.build import build_objective

    started = time.perf_counter()
    place = pick_device(device)
    rows = run.rows()
    x = rows_of(rows, split, limit).to(place)
    model = run.model(place)
    if netcdf is not None:
        check_netcdf(netcdf, model, x, num_particles, proposal)
    drawn_from = compile_draws(model, x, num_particles, proposal, compile_mode, precision)
    scores = open_scores(run, model, rows, x, num_particles, seed, chunk_size, drawn_from, split)
    if scores is not None and anew:
        scores.clear()
    for notice in run.notices:
        print(f"note: {notice}")
    if scores is not None and scores.strange:
        print(f"note: {scores.path}: has scores that another user or a version before wrote; they are not used")
    if scores is not None and scores.found:
        print(f"note: {scores.found} rows were scored before with these settings, see {scores.path}; --anew repeats it")
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
        proposal=drawn_from,
        store=scores,
        particle_chunk=run.config["particle_chunk"],
        repair=repair,
    ) | {"notices": run.notices}
    name = "evaluation.json" if split == "test" else f"evaluation-{split}.json"
    run.keep(name, values)
    refuse_invalid(values)
    print(describe(run.name, values))
    print(f"\n  {'time':<26}{time.perf_counter() - started:>16.1f} s")
    if values["K"] is not None and run.writable:
        save_curve(run, values)
    if netcdf is not None:
        save_draws(netcdf, model, x, rows, num_particles, seed, proposal)
    return values


def check_netcdf(path: Path, model: "Model", x: "Tensor", num_particles: int, proposal: "Proposal | None") -> None:
    """Refuse draws for ArviZ that cannot be made or saved, before anything is.

    Raises:
        UsageError: another proposal, no such directory, another file of that name, or too many rows for memory.
    """
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.individual import Individual
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.weights import draw

    if proposal is not None and not isinstance(proposal, Individual):
        raise UsageError("--netcdf: draws are saved from --proposal guide or individual, not from another")
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK) or not path.resolve().parent.is_dir():
        raise UsageError(f"--netcdf {path}: expected a file in a directory that exists ({path.resolve()})")
    if os.path.lexists(path) and not (path.is_file() and begins(path, b"\x89HDF")):
        raise UsageError(f"--netcdf {path}: is there already and holds no saved draws; choose another name")
    latents = sum(
        latent.value[0, 0].numel() for latent in draw(Pair(model.model, model.guide), Batch(x[:1])).latents.values()
    )
    each = 2 * (x[0].numel() + latents) * x.element_size() * SAVED_DRAWS + 8 * num_particles
    free = shutil.disk_usage(path.resolve().parent).free
    if (size := each * len(x)) > free:
        raise UsageError(
            f"--netcdf {path}: takes {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB; give --rows"
        )
    if size > MOST_SAVED:
        raise UsageError(
            f"--netcdf: {SAVED_DRAWS} draws for each of {len(x)} rows take {size / 1e9:.1f} GB of memory; give --rows "
            f"{max(1, MOST_SAVED // each)} or fewer"
        )


def save_draws(
    path: Path, model: "Model", x: "Tensor", rows: "Rows", num_particles: int, seed: int, proposal: "Proposal | None"
) -> None:
    """Write posterior and predictive draws as netCDF, for ArviZ.

    Raises:
        OutputError: the file cannot be written.
    """
    from pyrovae.inference.individual import Individual
    from pyrovae.inference.inference_data import to_inference_data

    print(f"drawing {SAVED_DRAWS} times from p(z|x) and p(x|z) for each of {len(x)} rows", flush=True)
    data = to_inference_data(
        model.model,
        model.guide,
        x,
        SAVED_DRAWS,
        num_particles,
        seed=seed,
        measure=rows.measure.description,
        proposal=proposal if isinstance(proposal, Individual) else None,
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        data.to_netcdf(str(partial))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"--netcdf {path}: could not be written ({error.strerror or error})") from error


def command(words: Sequence[str]) -> int:
    """Parse the options, evaluate, print."""
    p = parser(
        "evaluate",
        "The log p(x) of a trained run by importance sampling, with its error and a verdict. An evaluation that was "
        "interrupted goes on where it was.",
        "RUN [options]",
    )
    p.add_argument("run", metavar="RUN", help="a directory written by python -m pyrovae.fit")
    add_option(p, "--K", "particles per datum, drawn exactly (default 5000; 32 chains if annealed)", "INT")
    add_option(p, "--rows", "score only the first rows (default: all)", "INT")
    add_option(p, "--split", "test, validation or train (default test)", "NAME")
    add_option(p, "--seed", "of the draws (default 0)", "INT")
    add_choices(p, "proposal", PROPOSALS)
    add_option(
        p,
        "--repair",
        "score rows that may be missed by any distance (k-hat over 1, or an effective sample size below 10) again, "
        "from a Gaussian fitted to each, and state the mean anew",
        action="store_true",
    )
    add_option(p, "--chunk-size", "particles evaluated at once; bounds memory, changes nothing else", "INT")
    drawn = "draws from guide, widened or prior as compiled code: auto, on or off (default auto: where that is repaid)"
    add_option(p, "--compile", drawn, "WHEN")
    add_option(p, "--precision", "fp32, or bf16: matrix products in bfloat16, its bias measured (default fp32)", "NAME")
    add_option(p, "--netcdf", f"save {SAVED_DRAWS} posterior and predictive draws of each row for ArviZ", "FILE")
    add_option(p, "--anew", "forget what was scored before with these settings", action="store_true")
    add_option(p, "--device", "auto, cpu, cuda or cuda:N (default auto)", "NAME")
    add_option(p, "--threads", SETTINGS["threads"].help, "INT|auto")
    options = given(p.parse_args(words))

    from pyrovae.inference.annealed import Annealed
    from pyrovae.inference.individual import Individual
    from pyrovae.processors import threads

    proposal = build_proposal(options.get("proposal"))
    k, seed = whole_option(options, "K", default_draws(proposal, 5000)), whole_option(options, "seed", 0)
    limit, chunk_size = whole_option(options, "rows", None), whole_option(options, "chunk_size", None)
    split = str(options.get("split", "test"))
    if split not in SPLITS:
        raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, got {split}")
    run = open_run(options["run"])
    if run.config["model"]["name"] == "mixture":
        unused = ("K", "chunk_size", "proposal", "repair", "compile", "precision", "netcdf", "anew")
        refuse(options, unused, "the log p(x) of a mixture is exact")
    netcdf = Path(str(options["netcdf"])) if "netcdf" in options else None
    device = str(options.get("device", "auto"))
    if "repair" in options and isinstance(proposal, Annealed | Individual):
        raise UsageError("--repair: is for draws from guide, widened or prior; these are made for each row already")
    mode = when("compile", options.get("compile", "auto"))
    precision = one_of("fp32", "bf16")("precision", options.get("precision", "fp32"))
    anew, repair = bool(options.get("anew")), bool(options.get("repair"))
    number = thread_count("threads", options.get("threads", "auto"))
    with threads(number, lambda text: print(f"note: {text}")):
        evaluate(*(run, k, limit, split, seed, chunk_size, device, proposal, anew, netcdf, mode, precision, repair))
    return 0


def default_draws(proposal: "Proposal | None", otherwise: int) -> int:
    """K when it is not given: few chains, since each takes thousands of gradients."""
    from pyrovae.inference.annealed import Annealed

    return 32 if isinstance(proposal, Annealed) else otherwise


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
        paired_error=[point["to_last_error"] for point in points],
        elbo=values["elbo"],
        title=f"{run.name}, {values['rows']} {values['split']} rows; {values['verdict']}",
    )
    return save_figure(figure, inside(run.directory, "plots"), "k_curve")


if __name__ == "__main__":
    main("evaluate", command, sys.argv[1:])
