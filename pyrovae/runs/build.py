"""From a recipe to objects: rows, a pair, an objective, an optimiser, a proposal."""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pyrovae.errors import UsageError
from pyrovae.runs.options import PROPOSALS
from pyrovae.runs.recipe import Part, Recipe, choose, choose_likelihood, choose_measure

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.proposals import Proposal
    from pyrovae.models.mixture import Mixture
    from pyrovae.models.vae import HierarchicalVAE

    Model = HierarchicalVAE | Mixture


def build_rows(recipe: Recipe) -> "Rows":
    """Load the data and split it, of the measure that the likelihood has, or that suits the data.

    The recipe of a run, which has the hash of its rows, downloads nothing: it may be a stranger's.

    Raises:
        DataError: the data is missing, damaged, or does not suit the likelihood.
    """
    from pyrovae.data import SOURCES, default_measure, find_source, load_data

    source = find_source(recipe.data)
    if recipe.data_root is not None and not (source and source.downloaded):
        having = ", ".join(source.name for source in SOURCES if source.downloaded)
        raise UsageError(f"--data-root: not used by --data {recipe.data}; it is for {having}")
    data = load_data(recipe.data, recipe.data_root, not recipe.data_hash, stream=recipe.stream)
    measure: Literal["mass", "density"]
    if recipe.likelihood:
        measure = "mass" if recipe.likelihood.name == "Bernoulli" else "density"
    else:
        measure = "mass" if recipe.binarize is not None else default_measure(data)
    rows = data.rows(measure, binarize=recipe.binarize, standardize=recipe.standardize)
    if measure == "mass" and recipe.model.settings.get("covariance", "full") != "full":
        raise UsageError("--model.covariance: not used by a mixture of Bernoullis; use --likelihood gaussian")
    if recipe.batch_size > len(rows.train):
        raise UsageError(f"--batch-size: {recipe.batch_size} is more than the {len(rows.train)} training rows")
    return rows


def settle(recipe: Recipe, rows: "Rows") -> Recipe:
    """The recipe with what its rows decide."""
    likelihood, model = recipe.likelihood, recipe.model
    if not likelihood:
        pick = choose_measure if recipe.is_mixture else choose_likelihood
        likelihood = pick("Bernoulli" if rows.measure.kind == "mass" else "Gaussian")
    if rows.measure.kind == "mass":
        # Left out, so that a saved recipe never claims what a mixture of Bernoullis does not have.
        model = Part(model.name, {key: value for key, value in model.settings.items() if key != "covariance"})
    return recipe.settled(
        model=model,
        likelihood=likelihood,
        binarize=rows.binarize,
        data_hash=rows.hash,
        event_shape=tuple(rows.event_shape),
    )


def build_model(recipe: Recipe, event_shape: tuple[int, ...]) -> "Model":
    """The pair that a recipe declares; its parameters are drawn from torch's random state."""
    from pyrovae import models
    from pyrovae.models.mixture import BernoulliMixture, GaussianMixture

    if recipe.is_mixture:
        settings = dict(recipe.model.settings)
        if recipe.likelihood.name == "Bernoulli":
            settings.pop("covariance", None)
            return BernoulliMixture(event_shape, **settings)
        return GaussianMixture(event_shape, **settings)

    latent = recipe.latent_dim
    conv = recipe.network.name == "conv"
    network = recipe.network.settings
    # Layers above the first map vectors to vectors, so they are dense in every architecture.
    dense = {k: v for k, v in network.items() if k in ("activation", "dropout")}
    if not conv:
        dense["hidden"] = network["hidden"]

    predicted = recipe.likelihood.settings.get("scale") == "predicted"
    out_shape = (2, *event_shape) if predicted else event_shape
    decoder = (
        models.ConvDecoder(latent[0], out_shape, **network) if conv else models.MLP(latent[0], out_shape, **network)
    )
    likelihood = getattr(models, recipe.likelihood.name)(decoder, **recipe.likelihood.settings)

    make_guide, guide_settings = getattr(models, recipe.guide.name), recipe.guide.settings
    encoder = models.ConvEncoder(event_shape, **network) if conv else models.MLP(event_shape, **network)
    guides = [make_guide(encoder, latent[0], **guide_settings)]
    conditionals = []
    for below, above in pairwise(latent):
        guides.append(make_guide(models.MLP(below, **dense), above, **guide_settings))
        conditionals.append(models.MeanFieldNormal(models.MLP(above, **dense), below))

    make_prior, prior_settings = getattr(models, recipe.prior.name), recipe.prior.settings
    if make_prior is models.VampPrior:
        prior = models.VampPrior(guides[0], event_shape, **prior_settings)
    else:
        prior = make_prior(latent[-1], **prior_settings)
    if len(latent) == 1:
        return models.VAE(prior, likelihood, guides[0])
    return models.HierarchicalVAE(prior, conditionals, likelihood, guides)


def build_objective(recipe: Recipe, steps_per_epoch: int = 1) -> "PyroELBO":
    """The objective that a recipe trains with."""
    from pyro.infer import TraceEnum_ELBO

    from pyrovae.inference import objectives

    if recipe.is_mixture:
        return TraceEnum_ELBO(max_plate_nesting=1)
    if recipe.elbo == "iwae":
        return objectives.IWAE(num_particles=recipe.K, num_averages=recipe.M)
    if recipe.alpha is not None:
        return objectives.Renyi(recipe.alpha, num_particles=recipe.K, num_averages=recipe.M)
    return objectives.ELBO(num_particles=recipe.K, num_averages=recipe.M, beta=build_beta(recipe.beta, steps_per_epoch))


def build_beta(value: float | str | None, steps_per_epoch: int) -> Any:
    """A number, or the schedule that a string such as warmup:10 names; 1 where there is none."""
    from pyrovae.inference.schedules import Capacity, Cyclical, LinearWarmup

    if not isinstance(value, str):
        return 1.0 if value is None else value
    kind, *numbers = value.split(":")
    steps = int(numbers[-1]) * steps_per_epoch
    if kind == "warmup":
        return LinearWarmup(steps=steps)
    return Cyclical(period=steps) if kind == "cyclical" else Capacity(float(numbers[0]), steps=steps)


def build_proposal(value: Any) -> "Proposal | None":
    """The proposal that was asked for, as its name and settings; None for the guide itself."""
    from pyrovae.inference.annealed import Annealed
    from pyrovae.inference.individual import Individual
    from pyrovae.inference.proposals import FromPrior, Widened

    chosen = choose("proposal", value, "guide", PROPOSALS)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.settings.items()}
    if chosen.name == "guide":
        return None
    classes = {"widened": Widened, "individual": Individual, "annealed": Annealed, "prior": FromPrior}
    made: Proposal = classes[chosen.name](**settings)
    return made


def build_optimizer(recipe: Recipe) -> "Callable[[list[Tensor]], torch.optim.Optimizer]":
    """What makes the optimiser of a list of parameters."""
    import torch

    from pyrovae.inference.training.trainer import adam

    if recipe.optimizer == "Adam":
        return lambda parameters: adam(parameters, lr=recipe.lr)
    return lambda parameters: getattr(torch.optim, recipe.optimizer)(parameters, lr=recipe.lr)


def build_schedule(recipe: Recipe) -> Any:
    """What makes the scheduler of an optimiser, or None."""
    import torch

    from pyrovae.inference.training.trainer import staged

    if recipe.schedule == "staged":
        return staged
    if recipe.schedule == "cosine":
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    return None
