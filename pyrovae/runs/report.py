"""Everything that is said of a model on some rows, as plain values: what evaluation.json holds."""

import hashlib
import platform
import re
from typing import TYPE_CHECKING, Any

from pyrovae.errors import NumericalError
from pyrovae.runs.features import of_frechet
from pyrovae.runs.progress import Say
from pyrovae.runs.quality import of_reconstructions
from pyrovae.runs.scoring import Scoring, check_of, hash_of, repaired, score
from pyrovae.runs.units import of_units

if TYPE_CHECKING:
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.annealed import Sandwich
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.marginal import LogMarginal
    from pyrovae.inference.simulation import Simulated
    from pyrovae.inference.verdicts import Verdict
    from pyrovae.models import Reconstruction
    from pyrovae.runs.build import Model
    from pyrovae.runs.features import Features
    from pyrovae.runs.scores import Scores

Report = dict[str, Any]
# Draws of z for each row, and of the latents above z for each of those, for a distance to the prior.
AGGREGATE_DRAWS, PRIOR_DRAWS = 5, 100
NO_DENSITY = "reconstruction only"  # what stands for a verdict on log p(x) where there is no p(x)


def report_on(
    model: "Model",
    batch: "Batch",
    rows: "Rows",
    how: Scoring,
    *,
    objective: "PyroELBO",
    split: str = "test",
    particle_chunk: int | None = None,
    store: "Scores | None" = None,
    features: "Features | None" = None,
    say: Say | None = None,
) -> Report:
    """Everything that is said of a model on some rows, as plain values. Nats per datum unless the name says bits."""
    from pyrovae.inference.bootstrap import interval
    from pyrovae.inference.diagnostics import measure
    from pyrovae.inference.kl import kl_terms
    from pyrovae.inference.modules import evaluating
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.verdicts import verdict
    from pyrovae.inference.weights import draw
    from pyrovae.models import Exact, Reconstruction
    from pyrovae.seeding import seeded

    if isinstance(model, Reconstruction):
        return reconstruction_only(model, batch, rows, how, split, features)
    result = score(model, batch, how, store, say)
    exact, guided = result.num_particles == 0, not isinstance(model, Exact)
    if how.repair:
        result = repaired(model, batch, result, say)
    again = None if result.origin is None else result.origin.repair
    check = None if exact else check_of(model, batch, how, store, again, say)
    judgement = verdict(result, check)
    with seeded(how.seed, "terms", device=batch.x.device), evaluating(model.model, model.guide):
        terms = measure(model.model, model.guide, batch.split(200), objective, particle_chunk)
        forms = kl_terms(draw(Pair(model.model, model.guide), batch[:1]))[1] if guided else {}
    values: Report = {
        "verdict": judgement.kind.value,
        "reason": judgement.reason,
        "estimator": result.estimator,
        "K": None if exact else result.num_particles,
        "unit": "nats per datum",
        "measure": rows.measure.description,
        "binarize": rows.binarize,
        "split": split,
        "rows": len(batch),
        "rows_in_split": len(getattr(rows, split)),
        "log_marginal": result.mean,
        "error_over_rows": result.error_over_rows,
        "bootstrap_interval": interval(result.estimate, seed=how.seed),
        "monte_carlo_error": result.monte_carlo_error,
        "bits_per_dimension": rows.measure.bits_per_dimension(result.mean),
        "units": of_units(model, batch, rows, result.estimate),
        "test_bound" if split == "test" else f"{split}_bound": terms["bound"],
    }
    if guided:
        values |= {**of_terms(result, terms), "kl_forms": forms, **of_stages(model, batch, how.seed)}
    if not exact:
        values |= of_draws(result, check, judgement, how)
    values["reconstruction_quality"] = of_reconstructions(model, batch, rows)
    values["frechet"] = None if features is None else of_frechet(model, batch, features, how.seed)
    return values | provenance(model, batch, rows, how.seed)


def reconstruction_only(
    model: "Reconstruction", batch: "Batch", rows: "Rows", how: Scoring, split: str, features: "Features | None"
) -> Report:
    """What can be said of a model that reconstructs and has no p(x)."""
    density = "" if model.codes is None else model.codes.description
    draws = density and f"; draws are decoded from an ex-post density of its codes, a {density}"
    return {
        "verdict": NO_DENSITY,
        "reason": f"no p(x): its guide is a point, without a density{draws}",
        "measure": f"rows as for a {rows.measure.description}",
        "binarize": rows.binarize,
        "split": split,
        "rows": len(batch),
        "rows_in_split": len(getattr(rows, split)),
        "reconstruction_quality": of_reconstructions(model, batch, rows),
        "frechet": None if features is None else of_frechet(model, batch, features, how.seed),
        **provenance(model, batch, rows, how.seed),
    }


def of_terms(result: "LogMarginal", terms: dict[str, float]) -> Report:
    """The ELBO and its parts, and what the latent dimensions carry."""
    from pyrovae.inference.estimate import standard_error
    from pyrovae.inference.units import KL_SHARE, kl_dimensions

    # The mean log-weight is the guide's ELBO only where the draws are.
    of_guide = result.elbo if result.of_guide else None
    each = {name.removeprefix("kl_"): value for name, value in terms.items() if re.fullmatch(r"kl_.+\[\d+\]", name)}
    elbo = terms["elbo"] if of_guide is None else of_guide.mean().item()
    return {
        "elbo": elbo,
        "elbo_error_over_rows": None if of_guide is None else standard_error(of_guide),
        "gap": result.mean - elbo,
        "gap_error_over_rows": None if of_guide is None else standard_error(result.estimate - of_guide),
        "reconstruction": terms["reconstruction"],
        "kl": terms["kl"],
        "layers": of_layers(terms),
        "active_units": int(terms["active_units"]),
        "latent_dimensions": int(terms["latent_dimensions"]),
        # Of all dimensions or of none: their shares are of the whole.
        "kl_dimensions": {
            "share": KL_SHARE,
            "count": kl_dimensions(list(each.values())) if len(each) == terms["latent_dimensions"] else None,
        },
        "kl_per_dimension": each,
    }


def of_layers(terms: dict[str, float]) -> Report:
    """KL, active units and size of each latent site, where there are several; the last two of no auxiliary one."""
    sites = [name.removeprefix("kl_") for name in terms if name.startswith("kl_") and not name.endswith("]")]
    return {
        site: {
            "kl": terms[f"kl_{site}"],
            "active_units": None if (active := terms.get(f"active_units_{site}")) is None else int(active),
            "latent_dimensions": sum(name.startswith(f"kl_{site}[") for name in terms) or None,
        }
        for site in sites
    }


def of_draws(result: "LogMarginal", check: "Sandwich | Simulated | None", judgement: "Verdict", how: Scoring) -> Report:
    """What the draws say of the estimate, how they were computed, and what the check on simulated data found."""
    found = {} if check is None else {check.word: check.summary()}
    return {
        **of_weights(result, how.proposal.of_chains),
        **{"stated_bias": judgement.bias, "simulated": None, "sandwich": None, **found},
        **how.proposal.computation(),
        "worst_rows": worst(result),
        "curve": curve(result),
    }


def of_weights(result: "LogMarginal", of_chains: bool) -> Report:
    """What the importance weights say of the estimate."""
    k_hat = result.pareto_k
    known = k_hat[~k_hat.isnan()]
    return {
        "jackknife": result.jackknife.mean().item(),
        "excess": {"nats": result.excess(), "probability": 1e-6},
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
        # Of chains there are too few for an effective sample size or a k-hat to tell.
        "unreliable_rows": [] if of_chains else result.unreliable.nonzero().flatten().tolist(),
        "repaired_rows": None if result.repaired is None else list(result.repaired),
    }


def of_stages(model: "Model", batch: "Batch", seed: int) -> Report:
    """How far the codes of a first stage are from its prior, and from what a second stage made of them.

    KL(q(z) || p(z)) in nats, with q(z) the aggregate posterior of these rows: of all of them for each row's draws
    ("upper", for data at large too high), and of the others ("lower", too low). Nothing for other models, nor where
    q(z|x) was adapted, so that both stages have not one q(z).
    """
    from pyrovae.inference.information import aggregate_kl
    from pyrovae.models.two_stage import SecondStage
    from pyrovae.seeding import seeded

    if not isinstance(model, SecondStage) or model.adapted or len(batch) < 2:
        return {}
    found: Report = {}
    for name, pair, site in (("first", model.first, "z"), ("joined", model, model.latent_sites[0])):
        with seeded(seed, "aggregate posterior", device=batch.x.device):
            distance = aggregate_kl(pair.model, pair.guide, batch.x, site, AGGREGATE_DRAWS, PRIOR_DRAWS)
        found[name] = {
            side: {"mean": e.mean, "error_over_rows": e.error_over_rows, "monte_carlo_error": e.monte_carlo_error}
            for side, e in (("upper", distance.upper), ("lower", distance.lower))
        }
    return {"aggregate_kl": {**found, "draws": AGGREGATE_DRAWS, "draws_of_prior": PRIOR_DRAWS}}


def worst(result: "LogMarginal") -> list[Report]:
    """The rows whose estimates are the least certain."""
    from pyrovae.inference.verdicts import worst_rows

    return [
        {
            "row": row,
            "log_marginal": result.estimate[row].item(),
            "standard_error": result.standard_error[row].item(),
            "ess": result.ess[row].item(),
            "pareto_k": result.pareto_k[row].item(),
        }
        for row in worst_rows(result)
    ]


def curve(result: "LogMarginal") -> list[Report]:
    """The bound of each smaller K, from the same draws."""
    from pyrovae.inference.estimate import standard_error

    return [
        {
            "K": k,
            "log_marginal": v.mean().item(),
            "error_over_rows": standard_error(v),
            # On the same rows: other rows would move all of the curve together.
            "to_last": (v - result.estimate).mean().item(),
            "to_last_error": standard_error(v - result.estimate),
        }
        for k, v in result.curve.items()
    ]


def provenance(model: "Model", batch: "Batch", rows: "Rows", seed: int) -> Report:
    """What the numbers are of, to the last bit."""
    import pyro
    import torch

    from pyrovae.version import __version__

    return {
        "seed": seed,
        "dtype": str(batch.x.dtype).removeprefix("torch."),
        "device": batch.x.device.type,
        "data_hash": rows.hash,
        "rows_hash": hashlib.sha256(
            b"".join(t.cpu().contiguous().numpy().tobytes() for t in batch.tensors)
        ).hexdigest(),
        "model_hash": hash_of(model),
        "versions": {
            "pyrovae": __version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
        },
    }


def refuse_invalid(values: Report) -> None:
    """End a command whose report is not of numbers.

    Raises:
        NumericalError: the verdict is "invalid"; the rows are named, and nothing is averaged without them.
    """
    from pyrovae.inference.verdicts import Kind

    if values["verdict"] == Kind.INVALID:
        raise NumericalError(f"invalid: {values['reason']}")


def summary(values: "Tensor") -> dict[str, float | None]:
    """Least, quartiles and largest of some numbers."""
    import torch

    names = ("min", "q25", "median", "q75", "max")
    if not len(values):
        return dict.fromkeys(names)
    quantiles = torch.quantile(values, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype))
    return dict(zip(names, quantiles.tolist(), strict=True))
