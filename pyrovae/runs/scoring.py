"""log p(x) of a trained pair on rows: the estimate, its check on simulated data, and where both are kept."""

import copy
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from pyrovae.errors import UsageError
from pyrovae.inference.enumeration import MOST_STATES
from pyrovae.inference.proposals import FROM_GUIDE, Proposal
from pyrovae.runs.directory import Run
from pyrovae.runs.progress import Say, rows_done
from pyrovae.runs.scores import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.annealed import Annealed, Sandwich
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.marginal import LogMarginal
    from pyrovae.inference.simulation import Simulated
    from pyrovae.runs.build import Model

# Data simulated to check a setting of annealed importance sampling.
CHECKED_ROWS = 50
SPLITS = ("test", "validation", "train")


def rows_of(rows: "Rows", split: str, limit: int | None = None) -> "Batch":
    """The first rows of a split, with what they are given; training rows are transformed with fixed noise."""
    from torch import Tensor

    from pyrovae.inference.batch import Batch
    from pyrovae.seeding import seeded

    given = tuple(value[:limit] for value in rows.given[split])
    if split != "train":
        return Batch(getattr(rows, split)[:limit], given)
    if limit is None and not isinstance(rows.train, Tensor):
        raise UsageError(
            "rows: say how many of the training rows, which are streamed from a file; all may not fit",
            settings=("rows",),
        )
    with seeded("training rows for evaluation"):
        return Batch(rows.transform(rows.train[:limit]), given)


@dataclass(frozen=True)
class Scoring:
    """How log p(x) is estimated.

    Attributes:
        num_particles: K.
        seed: Of the draws.
        proposal: Where they come from.
        chunk_size: Particles evaluated at once; changes nothing but the memory.
        repair: Score unreliable rows again, from a Gaussian fitted to each.
        most_states: Joint states of a row's discrete latents that are summed out; 0: they are drawn.
    """

    num_particles: int
    seed: int = 0
    proposal: Proposal = FROM_GUIDE
    chunk_size: int | None = None
    repair: bool = False
    most_states: int = MOST_STATES


def score(
    model: "Model", batch: "Batch", how: Scoring, store: "Scores | None" = None, say: Say | None = None
) -> "LogMarginal":
    """log p(x) of rows under a model: exact where the model has it, else importance-sampled, by default from its guide.

    Rows without a finite estimate stay in it: see `LogMarginal.invalid`.

    Raises:
        UsageError: another proposal than the guide is asked for, where log p(x) is a sum without a draw.
    """
    import torch

    from pyrovae.inference.marginal import exact, log_marginal
    from pyrovae.inference.tracing.draws import CompileWarning
    from pyrovae.models.exact import Exact

    if isinstance(model, Exact):
        # In double precision, which costs little here: rows far from every component lose digits in single.
        model = copy.deepcopy(model).double()
        values: list[Tensor] = []
        with torch.no_grad(), rows_done(len(batch), "log p(x) in closed form", say) as done:
            for block in batch.split(1000):
                values.append(model.log_prob(block.x))
                done(min(1000 * len(values), len(batch)))
        return exact(torch.cat(values))
    proposal = how.proposal
    with (
        warnings.catch_warnings(record=True) as caught,
        rows_done(len(batch), announced(model, batch, how), say) as done,
    ):
        warnings.simplefilter("always", CompileWarning)
        result = log_marginal(
            model.model,
            model.guide,
            batch.x,
            how.num_particles,
            how.chunk_size,
            progress=done,
            proposal=proposal,
            seed=how.seed,
            store=store,
            given=batch.given,
            most_states=how.most_states,
        )
    if store is not None and result.num_particles:
        store.tidy(len(batch))
    for warning in caught:
        if say is not None and issubclass(warning.category, CompileWarning):
            say(f"note: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result


def announced(model: "Model", batch: "Batch", how: Scoring) -> str:
    """What is about to be done to rows, in words: a sum over discrete latents where that leaves nothing to be drawn.

    Raises:
        UsageError: as for `score`.
    """
    from pyrovae.inference.enumeration import summation
    from pyrovae.inference.pair import Pair

    sums = summation(Pair(model.model, model.guide), batch, how.num_particles, how.most_states)
    summed = how.proposal.summing(sums)
    if not sums.is_exact:
        by = how.proposal if sums.model is None or summed is None else summed
        return f"log p(x) by {by.name}, K = {how.num_particles}"
    if summed is None:
        raise UsageError(
            f"proposal: {how.proposal.name} is not used, since log p(x) is an exact sum over {', '.join(sums.joint)}; "
            "leave it out, or draw with `most_states=0`",
            settings=("proposal", "most_states=0"),
        )
    return f"log p(x) as {sums.words}, exact"


def repaired(model: "Model", batch: "Batch", result: "LogMarginal", say: Say | None = None) -> "LogMarginal":
    """The estimate with its unreliable rows scored again from a better proposal."""
    from pyrovae.inference.repairs import repair

    bad = int(result.unreliable.sum())
    with rows_done(bad, "unreliable rows again", say if bad else None) as done:
        return repair(model.model, model.guide, batch.x, result, progress=done, given=batch.given)


def check_of(
    model: "Model",
    batch: "Batch",
    how: Scoring,
    store: "Scores | None" = None,
    repair: Proposal | None = None,
    say: Say | None = None,
) -> "Sandwich | Simulated | None":
    """The check of an estimate on simulated data, kept beside the scores; None where log p(x) is exact.

    `repair` is what its unreliable rows were scored again from, if they were.
    """
    import torch

    from pyrovae.inference.annealed import Sandwich, sandwich
    from pyrovae.inference.simulation import SIMULATED_ROWS, Simulated, like, simulated
    from pyrovae.models.exact import Exact

    if isinstance(model, Exact):
        return None
    pair, k, proposal = (model.model, model.guide), how.num_particles, how.proposal
    if proposal.of_chains:
        count, names = CHECKED_ROWS, ("forward", "reverse", "acceptance")
        few = like(batch, count)
        chains = cast("Annealed", proposal)
        make: Callable[[], Any] = partial(sandwich, *pair, few.x, k, chains, how.seed, few.given)
        build: Callable[..., Any] = partial(Sandwich, x=torch.empty(0), num_particles=k, annealed=chains)
    else:
        # The weights of rows are not kept: of the models that runs hold, all latents are continuous.
        count, names = SIMULATED_ROWS, ("lower", "upper", "jackknife")
        few = like(batch, count)
        make = partial(simulated, *pair, few.x, k, proposal, how.seed, how.chunk_size, repair, few.given)
        build = partial(Simulated, num_particles=k, estimator=proposal.name)

    def checked() -> Any:
        if say is not None:
            say(f"checking on {count} simulated rows")
        return make()

    return checked() if store is None else store.check(names, checked, build, repaired=repair is not None)


def compile_draws(model: "Model", batch: "Batch", how: Scoring, mode: str = "auto", precision: str = "fp32") -> Scoring:
    """The same with its draws compiled, where that is asked for, or pays.

    Raises:
        UsageError: it cannot be compiled, and compile=on or precision=bf16 asks for it.
    """
    from pyrovae.inference.tracing.draws import Compiled, worth_compiling
    from pyrovae.models import Exact, Reconstruction

    if mode == "off" and precision == "bf16":
        raise UsageError(
            "precision=bf16: is for compiled draws; leave `compile=off` away",
            settings=("precision=bf16", "compile=off"),
        )
    if isinstance(model, Exact | Reconstruction) or mode == "off":
        return how
    try:
        compiled = replace(how, proposal=Compiled(how.proposal, precision))
    except UsageError as error:
        if mode == "on" or precision == "bf16":
            asked = "precision=bf16" if precision == "bf16" else "compile=on"
            raise UsageError(f"{asked}: {error}", settings=(asked,)) from None
        return how
    forced = mode == "on" or precision == "bf16"
    repaid = forced or worth_compiling(model.model, model.guide, batch.x, how.num_particles, batch.given)
    return compiled if repaid else how


def open_scores(
    run: Run, model: "Model", rows: "Rows", batch: "Batch", how: Scoring, split: str = "test"
) -> "Scores | None":
    """Where the scores of these rows are kept as they are made, and found again.

    None for an exact model, which is quick, and where nothing can be kept.
    """
    import pyro
    import torch

    from pyrovae.models import Exact, Reconstruction
    from pyrovae.version import __version__

    if isinstance(model, Exact | Reconstruction) or not run.writable:
        return None
    settings = {
        "estimator": how.proposal.name,
        "proposal": repr(how.proposal),
        "K": how.num_particles,
        "seed": how.seed,
        "chunk_size": how.chunk_size,
        "split": split,
        "device": batch.x.device.type,
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
