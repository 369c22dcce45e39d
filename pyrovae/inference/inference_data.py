r"""A pair and its data as ArviZ sees them: posterior draws, importance weights, predictive draws.

Per datum, K draws z_k ~ q(z|x) with weights w_k = p(x, z_k) / q(z_k|x) are resampled with replacement,

    P(draw = z_k) = w_k / sum_j w_j,

and S such draws are draws from p(z|x) as K grows. They are no better than the weights: `ess` tells among how many of
the K the posterior mass is shared, and a k-hat over min(1 - 1/log10 K, 0.7) that the guide misses part of it.

    group                   variables, and their dimensions
    posterior               each latent site                        chain, draw, datum, ...
    log_likelihood          log p(x|z) of each observed site        chain, draw, datum
    sample_stats            particle, log_weight: which of the K    chain, draw, datum
    posterior_predictive    each observed site, x ~ p(x|z)          chain, draw, datum, ...
    prior                   each latent site, z ~ p(z)              chain, draw, datum, ...
    prior_predictive        each observed site                      chain, draw, datum, ...
    observed_data           each observed site                      datum, ...
    constant_data           what is given: given_0, given_1, ...    datum, ...
    state_probability       each discrete latent: p(state | x)      datum, ..., state
    importance              log_weight                              particle, datum
                            log_marginal, standard_error, ess, pareto_k      datum

Where all latents are discrete and their joint states are affordable, every state is a particle, weighted by p(x, z):
posterior draws are exact then, and so are log_marginal and p(state | x), the share of the weight of each state. Else
that share is estimated by the same draws as the rest. It is of each number of a vector by itself; `SITE_state` are the
states. A guide may leave out what is discrete (`pyrovae.inference.enumeration`).

Every datum has latents of its own, so `draw` s of one datum has nothing to do with draw s of another.

To compare models, use `elpd`. ArviZ's `loo` and `compare` run on these data too, but their estimate is a bad one:
leaving out datum n, whose latents are its own, means averaging 1/p(x_n|z) over p(z|x_n), and 1/E[1/p(x_n|z)] = p(x_n),
the harmonic mean estimator of what `elpd` holds. Its variance is infinite for most models, its k-hat says so, and what
it gives is far too high.

References:
    Rubin 1988, Using the SIR Algorithm to Simulate Posterior Distributions, Bayesian Statistics 3
    Newton and Raftery 1994, Approximate Bayesian Inference with the Weighted Likelihood Bootstrap, JRSS B 56
    Kumar et al. 2019, ArviZ, https://doi.org/10.21105/joss.01143
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyrovae.checks import check_count
from pyrovae.errors import NumericalError
from pyrovae.inference.batch import Batch
from pyrovae.inference.enumeration import Joint, summation
from pyrovae.inference.marginal import LogMarginal, block_of, check_result, summarise
from pyrovae.inference.modules import evaluating
from pyrovae.inference.pair import Pair
from pyrovae.inference.precision import in_single_precision
from pyrovae.inference.proposals import FROM_GUIDE, Proposal, check_proposal
from pyrovae.inference.validity import check_pair
from pyrovae.inference.weights import At, draw, log_prob, run, sample_sites
from pyrovae.seeding import seeded

Groups = dict[str, dict[str, Tensor]]

# States that take the place of draws: as many latents are kept.
MOST_PARTICLES = 2**13

DATUM, PARTICLES, DRAWS = ("datum",), ("particle", "datum"), ("draw", "datum")


@in_single_precision
def to_inference_data(
    model: Callable,
    guide: Callable,
    x: Tensor,
    num_draws: int = 100,
    num_particles: int = 1000,
    *,
    seed: int = 0,
    predictive: bool = True,
    measure: str | None = None,
    proposal: Proposal = FROM_GUIDE,
    given: Sequence[Tensor] = (),
    most_states: int = MOST_PARTICLES,
) -> Any:
    """Posterior, prior and predictive draws of a pair, with the importance weights behind them.

    Args:
        model: Pyro model, called as model(x, *given), that uses x as observations only; any latent and observed sites.
        guide: Pyro guide, called as guide(x, *given).
        x: Data, shape (N, *event).
        num_draws: Draws of each datum's latents, resampled with replacement by weight.
        num_particles: K, draws from the proposal that they are resampled from.
        seed: Of all draws; the caller's random state is left as it was.
        predictive: Whether to draw data, which takes num_draws * N events of memory for the prior, and for the
            posterior.
        measure: What log p(x) is, for the attributes: "mass on {0,1}^784".
        proposal: Where the K draws come from: `FromGuide`, or `Individual`, a Gaussian fitted to each datum.
        given: What everything is conditioned on, tensors of shape (N, ...): prior and predictive draws of a datum are
            given theirs.
        most_states: Joint states of discrete latents that may take the place of draws; 0: they are drawn.

    Returns:
        `arviz.InferenceData` under ArviZ 0.x, `xarray.DataTree` from 1.0 on, of the groups above; log-probabilities in
        nats; the settings and versions are its attributes. `.to_netcdf(path)` saves it, and `arviz.from_netcdf(path)`
        reads it.

    Raises:
        UsageError: num_draws or num_particles < 1, x is no tensor with rows, something in `given` has not as many, or
            the proposal's latents cannot be drawn.
        PairError: the log-weights of the pair are not of log p(x), see `pyrovae.inference.validity`, or it has no
            latent site.
        NumericalError: a row has a weight that is not a number, or all its weights are zero; it is named.
    """
    for name, value in (("num_draws", num_draws), ("num_particles (K)", num_particles)):
        check_count(name, value)
    check_proposal(proposal)
    check_count("most_states", most_states, 0)
    batch = Batch.of(x, given)
    sums = summation(Pair(model, guide), batch, num_particles, most_states)
    pair, states = sums.pair, None
    if sums.is_exact and proposal.summing(sums) is not None and sums.joint.count <= most_states:
        states, num_particles = sums.joint, sums.joint.count
    # A block of rows keeps the latents of its K draws; a chunk of them is decoded at once.
    rows, chunk = block_of(batch, num_particles)
    check_pair(pair, batch, rows).by_parts("to_inference_data")
    blocks = []
    with evaluating(pair), torch.no_grad():
        for start, data in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
            with seeded(seed, "inference data", start, device=x.device):
                drawn_from = Pair(model, proposal.as_guide(pair, data))
                block = Block(drawn_from, data, start, num_particles, chunk, states)
                blocks.append(block.groups(num_draws, predictive) | block.of_states(sums.joint))
    settings = {"num_particles": num_particles, "num_draws": num_draws, "seed": seed}
    of = {} if measure is None else {"measure": measure}
    estimator = proposal.name if states is None else f"exact: {sums.words}"
    attributes = {"estimator": estimator, **settings, "unit": "nats", **of, **versions(x)}
    groups = {group: datasets(group, [block[group] for block in blocks]) for group in blocks[0]}
    if sums.joint:
        groups["state_probability"] = with_states(groups["state_probability"], sums.joint)
    return as_arviz(groups, attributes)


class Block:
    """K weighted draws for some rows of the data.

    Attributes:
        latents: z by site, shape (K, N, *event).
        log_likelihood: log p(x|z) by observed site, shape (K, N).
        log_weights: shape (K, N), in double precision.
        observed: x by site, shape (N, *event).
    """

    def __init__(
        self, pair: Pair, batch: Batch, start: int, num_particles: int, chunk: int, states: Joint | None = None
    ) -> None:
        self.pair, self.batch, self.chunk = pair, batch, chunk
        latents: list[dict[str, Tensor]] = []
        log_likelihood: list[dict[str, Tensor]] = []
        log_weights: list[Tensor] = []
        for size in self.sizes(num_particles):
            done = sum(len(part) for part in log_weights)
            particles = draw(pair, batch, size, None if states is None else states_of(states, batch, done, size))
            shape = (size, len(batch))
            sites = observed_sites(particles.model_trace)
            latents.append({name: latent.value for name, latent in particles.latents.items()})
            log_likelihood.append(
                {name: log_prob(site, f"model site '{name}'", shape).expand(shape) for name, site in sites.items()}
            )
            log_w = particles.log_weights.double()
            if states is not None:  # each once, so that the mean weight is p(x)
                log_w = (particles.log_likelihood + particles.log_prior).double() + math.log(num_particles)
            log_weights.append(log_w)
            self.observed = {name: value_per_datum(site, len(batch)) for name, site in sites.items()}
        self.latents, self.log_likelihood = concatenated(latents), concatenated(log_likelihood)
        self.log_weights = torch.cat(log_weights)
        bad = (~torch.logsumexp(self.log_weights, 0).isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NumericalError(
                f"row {start + bad[0]}: its importance weights are all zero, NaN or infinite under this model, so that "
                "there is nothing to resample; leave it out of x, or correct the model"
            )

    def sizes(self, total: int) -> list[int]:
        """How many draws to take at once."""
        return [min(self.chunk, total - done) for done in range(0, total, self.chunk)]

    def groups(self, num_draws: int, predictive: bool) -> Groups:
        """All variables by group: shape (S or K, N, *event) with draws or particles, else (N, *event)."""
        weights = torch.softmax(self.log_weights, 0)
        chosen = torch.multinomial(weights.T, num_draws, replacement=True).T
        rows = torch.arange(len(self.batch), device=chosen.device)
        posterior = {name: z[chosen, rows] for name, z in self.latents.items()}
        result = summarise(self.log_weights.cpu())
        groups = {
            "posterior": posterior,
            "log_likelihood": {name: value[chosen, rows] for name, value in self.log_likelihood.items()},
            "sample_stats": {"particle": chosen, "log_weight": self.log_weights[chosen, rows]},
            "observed_data": self.observed,
            "importance": {
                "log_weight": self.log_weights,
                "log_marginal": result.estimate,
                "standard_error": result.standard_error,
                "ess": result.ess,
                "pareto_k": result.pareto_k,
            },
        }
        if self.batch.given:
            groups["constant_data"] = {f"given_{i}": value for i, value in enumerate(self.batch.given)}
        prior = self.generate({}, num_draws, [*self.latents, *(self.observed if predictive else ())])
        groups["prior"] = {name: prior[name] for name in self.latents}
        if predictive:
            groups["prior_predictive"] = {name: prior[name] for name in self.observed}
            groups["posterior_predictive"] = self.generate(posterior, num_draws, list(self.observed))
        return groups

    def of_states(self, joint: Joint) -> Groups:
        """p(state | x) of each number of the discrete latents, shape (N, *numbers, S), as a group; none without any."""
        weights = torch.softmax(self.log_weights, 0)
        found = {}
        for name, states in joint.items():
            shares = []
            for state in states.support:
                same = self.latents[name] == state
                same = same.flatten(same.ndim - state.ndim).all(-1) if state.ndim else same
                shares.append(torch.einsum("kn,kn...->n...", weights, same.to(weights)))
            found[name] = torch.stack(shares, -1)
        return {"state_probability": found} if found else {}

    def generate(self, latents: dict[str, Tensor], num_draws: int, names: list[str]) -> dict[str, Tensor]:
        """Draw sites from the model, given latents of shape (num_draws, N, *event) or none."""
        program, parts, done = poutine.uncondition(self.pair.model), [], 0
        for size in self.sizes(num_draws):
            with At({name: z[done : done + size] for name, z in latents.items()}):
                trace = run(program, "model", self.batch, size)
            parts.append({name: trace.nodes[name]["value"] for name in names})
            done += size
        return concatenated(parts)


def states_of(joint: Joint, batch: Batch, first: int, size: int) -> dict[str, Tensor]:
    """Joint states from a number on as particles, each of shape (size, N, *event)."""
    values = joint.at(torch.arange(first, first + size, device=batch.x.device))
    return {name: v.unsqueeze(1).expand(size, len(batch), *v.shape[1:]) for name, v in values.items()}


def with_states(dataset: Any, joint: Joint) -> Any:
    """The probabilities of states with a last dimension SITE_state, whose coordinates are the states."""
    last = {f"{name}_dim_{len(states.numbers)}": f"{name}_state" for name, states in joint.items()}
    dataset = dataset.drop_vars(list(last)).rename_dims(last)
    words = {f"{name}_state": as_words(states.support) for name, states in joint.items()}
    return dataset.assign_coords(words)


def as_words(support: Tensor) -> np.ndarray:
    """States as coordinates: numbers, or for one-hot vectors the number of the category."""
    return as_numpy(support if support.ndim == 1 else support.flatten(1).argmax(-1))


def observed_sites(trace: Trace) -> dict[str, dict]:
    """The sites of a model that hold data: observed, and no `pyro.factor`."""
    sites = sample_sites(trace)
    return {name: s for name, s in sites.items() if s["is_observed"] and not isinstance(s["fn"], dist.Unit)}


def value_per_datum(site: dict, count: int) -> Tensor:
    """An observed value, shape (N, *event), whether or not it was expanded over particles."""
    event = len(site["fn"].event_shape)
    value = site["value"]
    while value.ndim > event + 1:
        value = value[0]
    return value.expand(count, *value.shape[value.ndim - event :])


def concatenated(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Dictionaries of tensors joined along dimension 0."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def datasets(group: str, blocks: list[dict[str, Tensor]]) -> Any:
    """The variables of one group, from blocks of rows, as an `xarray.Dataset`."""
    import xarray

    variables: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name in blocks[0]:
        of_datum = ("observed_data", "constant_data", "importance", "state_probability")
        leading: tuple[str, ...] = DATUM if group in of_datum else DRAWS
        if (group, name) == ("importance", "log_weight"):
            leading = PARTICLES
        values = as_numpy(torch.cat([block[name] for block in blocks], leading.index("datum")))
        if leading == DRAWS:
            leading, values = ("chain", *DRAWS), values[None]
        dims = (*leading, *(f"{name}_dim_{i}" for i in range(values.ndim - len(leading))))
        nats = group == "log_likelihood" or name in ("log_weight", "log_marginal", "standard_error")
        variables[name] = (dims, values, {"units": "nats"} if nats else {})
        sizes |= dict(zip(dims, values.shape, strict=True))
    return xarray.Dataset(variables, coords={dim: np.arange(size) for dim, size in sizes.items()})


def as_numpy(values: Tensor) -> np.ndarray:
    """An array of a type that netCDF knows."""
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def as_arviz(groups: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """What the installed ArviZ calls its data: `InferenceData` before 1.0, `DataTree` since."""
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its own refactoring at import
        try:
            from arviz.data.inference_data import InferenceData
        except ImportError:
            tree = xarray.DataTree.from_dict(groups)
            tree.attrs = attributes
            return tree
    return InferenceData(attrs=attributes, **groups)


def versions(x: Tensor) -> dict[str, str]:
    """Versions of what computed, and the type of numbers."""
    from importlib.metadata import version

    from pyrovae.version import __version__

    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "inference_library": "pyrovae",
        "inference_library_version": __version__,
        "torch_version": str(torch.__version__),  # netCDF takes no subclass of str
        "pyro_version": pyro.__version__,
        "arviz_version": version("arviz"),
    }


def elpd(result: LogMarginal) -> Any:
    """Estimates of log p(x) as ArviZ's `ELPDData`, for `arviz.compare({"a": elpd(a), ...})` and `arviz.plot_khat`.

    On rows that were not trained on, log p(x_n) is a log predictive density as it is, and their sum what ArviZ calls an
    ELPD: nothing is left out, and nothing need be. ArviZ labels it "elpd_loo", having no name for held-out rows. Its
    effective number of parameters, p_loo, is NaN: it is about rows that were trained on.

    ArviZ's numbers are sums over the rows, not means, and its errors those over rows; compare only results on the same
    rows, of the same measure. Its stacking weights take exp(log p(x)), in double precision 0 or infinite beyond 700
    nats: use `arviz.compare(..., method="BB-pseudo-BMA")` there.

    Args:
        result: log p(x) of N rows; exact ones have a k-hat of 0.

    Returns:
        `ELPDData`: pointwise log p(x_n) and k-hat along "datum", in nats, their sum and its standard error over rows,
        and the k-hat above which the estimate of a row is a lower bound only. No k-hat where K is too small to tell.

    Raises:
        UsageError: the argument is no such result.
        NumericalError: a row's estimate is not a finite number; it is named.
    """
    import xarray

    check_result(result)
    if result.invalid:
        row = result.invalid[0]
        raise NumericalError(f"row {row}: log p(x) is {result.estimate[row].item()}; an ELPD needs all rows finite")
    values = result.estimate.numpy()
    count = len(values)
    datum = {"datum": np.arange(count)}
    known = not bool(result.pareto_k.isnan().all())
    fields = {
        "se": math.sqrt(count * values.var()),
        "n_samples": result.num_particles,
        "n_data_points": count,
        "scale": "log",
        "warning": bool((result.pareto_k > result.k_threshold).any()),
        "good_k": result.k_threshold if result.num_particles else 0.7,
    }
    pointwise = xarray.DataArray(values, dims="datum", coords=datum, name="elpd_i")
    pareto_k = xarray.DataArray(result.pareto_k.numpy(), dims="datum", coords=datum, name="pareto_k") if known else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its own refactoring at import
        try:
            from arviz_stats import utils
        except ImportError:
            from arviz.stats.stats_utils import ELPDData

            # A pandas Series, in the order that it prints.
            entries: dict[str, Any] = {"elpd_loo": values.sum(), "se": fields.pop("se"), "p_loo": math.nan, **fields}
            entries |= {"loo_i": pointwise} | ({"pareto_k": pareto_k} if known else {})
            return ELPDData(data=list(entries.values()), index=list(entries))
    fields |= {"elpd": values.sum(), "p": math.nan, "elpd_i": pointwise, "pareto_k": pareto_k}
    if hasattr(utils, "ELPDDataLOO"):
        return utils.ELPDDataLOO(**fields)
    return utils.ELPDData(kind="loo", **fields)  # before 1.2
