"""From a configuration to objects: rows, a pair, an objective, an optimiser, a proposal."""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pyrovae.errors import UsageError
from pyrovae.runs.options import PROPOSALS
from pyrovae.runs.recipe import Config, choose, choose_likelihood, choose_measure

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.proposals import Proposal
    from pyrovae.models.mixture import Mixture
    from pyrovae.models.vae import HierarchicalVAE

    Model = HierarchicalVAE | Mixture


def build_rows(config: Config) -> "Rows":
    """Load the data, settle what depends on it (`likelihood`, `binarize`), and split it.

    The configuration of a run, which has the hash of its rows, downloads nothing: it may be a stranger's.

    Raises:
        DataError: the data is missing, damaged, or does not suit the likelihood.
    """
    from pyrovae.data import SOURCES, default_measure, find_source, load_data

    source = find_source(config["data"])
    if config["data_root"] is not None and not (source and source.downloaded):
        having = ", ".join(source.name for source in SOURCES if source.downloaded)
        raise UsageError(f"--data-root: not used by --data {config['data']}; it is for {having}")
    data = load_data(config["data"], config["data_root"], "data_hash" not in config, stream=config["stream"])
    if config["likelihood"] is None:
        binarised = config["binarize"] is not None
        measure = "mass" if binarised else default_measure(data)
        pick = choose_measure if config["model"]["name"] == "mixture" else choose_likelihood
        config["likelihood"] = pick("Bernoulli" if measure == "mass" else "Gaussian")
    measure = "mass" if config["likelihood"]["name"] == "Bernoulli" else "density"
    rows = data.rows(measure, binarize=config["binarize"], standardize=config["standardize"])
    if measure == "mass" and "covariance" in config["model"]:
        if config["model"]["covariance"] != "full":
            raise UsageError("--model.covariance: not used by a mixture of Bernoullis; use --likelihood gaussian")
        # Left out, so that a saved configuration never claims what such a mixture does not have.
        config["model"] = {key: value for key, value in config["model"].items() if key != "covariance"}
    config["binarize"] = rows.binarize
    config["data_hash"] = rows.hash
    if config["batch_size"] > len(rows.train):
        raise UsageError(f"--batch-size: {config['batch_size']} is more than the {len(rows.train)} training rows")
    return rows


def build_model(config: Config, event_shape: tuple[int, ...]) -> "Model":
    """The pair that a resolved configuration declares; its parameters are drawn from torch's random state."""
    from pyrovae import models
    from pyrovae.models.mixture import BernoulliMixture, GaussianMixture

    if config["model"]["name"] == "mixture":
        settings = {k: v for k, v in config["model"].items() if k != "name"}
        if config["likelihood"]["name"] == "Bernoulli":
            settings.pop("covariance", None)
            return BernoulliMixture(event_shape, **settings)
        return GaussianMixture(event_shape, **settings)

    def settings_of(part: str) -> Config:
        return {k: v for k, v in config[part].items() if k != "name"}

    latent = config["latent_dim"]
    conv = config["network"]["name"] == "conv"
    network = settings_of("network")
    # Layers above the first map vectors to vectors, so they are dense in every architecture.
    dense = {k: v for k, v in network.items() if k in ("activation", "dropout")}
    if not conv:
        dense["hidden"] = network["hidden"]

    predicted = config["likelihood"].get("scale") == "predicted"
    out_shape = (2, *event_shape) if predicted else event_shape
    decoder = (
        models.ConvDecoder(latent[0], out_shape, **network) if conv else models.MLP(latent[0], out_shape, **network)
    )
    likelihood = getattr(models, config["likelihood"]["name"])(decoder, **settings_of("likelihood"))

    make_guide, guide_settings = getattr(models, config["guide"]["name"]), settings_of("guide")
    encoder = models.ConvEncoder(event_shape, **network) if conv else models.MLP(event_shape, **network)
    guides = [make_guide(encoder, latent[0], **guide_settings)]
    conditionals = []
    for below, above in pairwise(latent):
        guides.append(make_guide(models.MLP(below, **dense), above, **guide_settings))
        conditionals.append(models.MeanFieldNormal(models.MLP(above, **dense), below))

    make_prior, prior_settings = getattr(models, config["prior"]["name"]), settings_of("prior")
    if make_prior is models.VampPrior:
        prior = models.VampPrior(guides[0], event_shape, **prior_settings)
    else:
        prior = make_prior(latent[-1], **prior_settings)
    if len(latent) == 1:
        return models.VAE(prior, likelihood, guides[0])
    return models.HierarchicalVAE(prior, conditionals, likelihood, guides)


def build_objective(config: Config, steps_per_epoch: int = 1) -> "PyroELBO":
    """The objective that a resolved configuration trains with."""
    from pyro.infer import TraceEnum_ELBO

    from pyrovae.inference import objectives

    if config["model"]["name"] == "mixture":
        return TraceEnum_ELBO(max_plate_nesting=1)
    particles = {"num_particles": config["K"], "num_averages": config["M"]}
    if config["elbo"] == "iwae":
        return objectives.IWAE(**particles)
    if config["elbo"] == "renyi":
        return objectives.Renyi(config["alpha"], **particles)
    return objectives.ELBO(beta=build_beta(config["beta"], steps_per_epoch), **particles)


def build_beta(value: float | str, steps_per_epoch: int) -> Any:
    """A number, or the schedule that a string such as warmup:10 names."""
    from pyrovae.inference.objectives import Capacity, Cyclical, LinearWarmup

    if not isinstance(value, str):
        return value
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
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items() if k != "name"}
    if chosen["name"] == "guide":
        return None
    classes = {"widened": Widened, "individual": Individual, "annealed": Annealed, "prior": FromPrior}
    made: Proposal = classes[chosen["name"]](**settings)
    return made


def build_optimizer(config: Config) -> "Callable[[list[Tensor]], torch.optim.Optimizer]":
    """What makes the optimiser of a list of parameters."""
    import torch

    from pyrovae.inference.training.trainer import adam

    if config["optimizer"] == "Adam":
        return lambda parameters: adam(parameters, lr=config["lr"])
    return lambda parameters: getattr(torch.optim, config["optimizer"])(parameters, lr=config["lr"])


def build_schedule(config: Config) -> Any:
    """What makes the scheduler of an optimiser, or None."""
    import torch

    from pyrovae.inference.training.trainer import staged

    if config["schedule"] == "staged":
        return staged
    if config["schedule"] == "cosine":
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    return None
