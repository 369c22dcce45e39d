"""From a recipe to objects: rows, a pair, an objective, an optimiser, a proposal."""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pyrovae.columns import parse, written
from pyrovae.errors import UsageError
from pyrovae.runs.networks import Levels, Networks, levels
from pyrovae.runs.options import BASELINES, CONDITIONAL, GRADIENTS, OBJECTIVES, PARTS, PROPOSALS
from pyrovae.runs.parts import Part, choose, fill
from pyrovae.runs.recipe import Recipe, choose_likelihood, first

if TYPE_CHECKING:
    import torch
    from pyro.infer import ELBO as PyroELBO
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.proposals import Proposal
    from pyrovae.models.autoencoder import Reconstruction
    from pyrovae.models.conditional import ConditionalVAE
    from pyrovae.models.exact import Exact
    from pyrovae.models.judges import Judge
    from pyrovae.models.labelled import LabelledVAE
    from pyrovae.models.networks import Network
    from pyrovae.models.vae import LatentLayers

    Model = LatentLayers | ConditionalVAE | LabelledVAE | Reconstruction | Exact


# p(z|u) of a second stage. Elements of z that the first one does not use are noise of sd 1, others have fine structure:
# one scale for all of them would be that of the noise.
OF_CODES = {"name": "Gaussian", "scale": "per-dimension"}


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
        named = f"data={recipe.data}"
        raise UsageError(f"data_root: not used by `{named}`; it is for {having}", settings=("data_root", named))
    data = load_data(recipe.data, recipe.data_root, not recipe.data_hash, recipe.stream, recipe.columns, recipe.missing)
    measure: Any = recipe.measure or ("mass" if recipe.binarize is not None else default_measure(data))
    if recipe.is_exact:
        exact(recipe, measure)
    rows = data.rows(measure, recipe.binarize, recipe.standardize, recipe.condition, recipe.labels, recipe.seed)
    if recipe.batch_size > len(rows.train):
        raise UsageError(
            f"batch_size: {recipe.batch_size} is more than the {len(rows.train)} training rows",
            settings=("batch_size",),
        )
    return rows


def settle(recipe: Recipe, rows: "Rows") -> Recipe:
    """The recipe with what its rows decide."""
    suits = next(name for name, choice in PARTS["likelihood"].items() if choice.measure == rows.measure.kind)
    likelihood = recipe.likelihood or choose_likelihood(suits, recipe.model)
    of_levels = "levels" in PARTS["likelihood"][likelihood.name].classes[0].takes
    return recipe.settled(
        model=exact(recipe, rows.measure.kind, len(rows.train)) if recipe.is_exact else recipe.model,
        likelihood=likelihood,
        columns=None if rows.table is None else written(rows.table),
        binarize=rows.binarize,
        data_hash=rows.hash,
        event_shape=tuple(rows.event_shape),
        classes=rows.given.columns,
        levels=rows.measure.levels if of_levels else 0,
    )


def exact(recipe: Recipe, measure: str, rows: int | None = None) -> Part:
    """A model with an exact log p(x), with the settings of its class for a measure and training rows, and no others.

    So a saved recipe never claims what the model does not have.

    Raises:
        UsageError: it is of another measure only, or was given a setting that it does not have there.
    """
    choice, model = BASELINES[recipe.model.name], recipe.model
    cls = choice.of(measure)
    given = {k: v for k, v in model.settings.items() if k in cls.settings or v != choice.settings[k].default}
    settings = fill("model", cls.name, given, cls.settings)
    if cls.constants.get("of_rows") and rows is not None:
        settings["components"] = min(settings["components"], rows)
    return Part(model.name, settings)


def make(part: str, chosen: Part, **offered: Any) -> Any:
    """The part that was chosen; what it is made of, it finds by name in what is offered."""
    return PARTS[part][chosen.name].classes[0].build(part, chosen.settings, **offered)


def build_model(recipe: Recipe, event_shape: tuple[int, ...]) -> "Model":
    """The pair that a recipe declares; its parameters are drawn from torch's random state."""
    from pyrovae.models import ConditionalVAE, Critic, MeanFieldNormal, PartlySeen, UnconditionalPrior
    from pyrovae.models.conditional import joined_shape

    model: Model
    if recipe.is_exact:
        settings = exact(recipe, str(recipe.measure)).settings
        model = BASELINES[recipe.model.name].of(str(recipe.measure)).build("model", settings, event_shape=event_shape)
        return model
    if recipe.first:
        return build_stages(recipe, event_shape)

    if recipe.is_reconstruction and recipe.is_closed_form:
        model = make("model", recipe.model, event_shape=event_shape, latent_dim=recipe.latent_dim[0])
        return model

    latent, networks = recipe.latent_dim, Networks(recipe.network)
    conditions, parts = len(recipe.classes), PARTS["model"][recipe.model.name].classes[0]
    likelihood_class = PARTS["likelihood"][recipe.likelihood.name].classes[0].load()
    known = {"levels": recipe.levels, "columns": parse(recipe.columns) if recipe.columns else ()}
    out_shape = likelihood_class.decoder_shape(event_shape, **known, **recipe.likelihood.settings)
    above = recipe.model.settings.get("above")
    deep = levels(networks, latent, event_shape) if above == "state" else None
    # With skip connections x is given all layers.
    code = sum(latent) if above == "all" else latent[0]
    decoder = (
        deep.decoder(out_shape, event_shape) if deep else networks.decoder(code + conditions, out_shape, event_shape)
    )
    likelihood = make("likelihood", recipe.likelihood, decoder=decoder, **known)
    likelihood = PartlySeen(likelihood) if recipe.missing else likelihood

    in_shape = event_shape
    if recipe.condition is not None:
        in_shape = joined_shape(event_shape, conditions, networks.encoding.load().of_images)
    view = None if recipe.is_reconstruction else likelihood.view(in_shape)
    seen = in_shape if view is None else view.out_shape
    encoder = (deep or networks).encoder(seen, event_shape)
    encoder = encoder if view is None else encoder.seeing(view)
    corruption = make("corruption", recipe.corruption)
    offered: dict[str, Any] = {"likelihood": likelihood, "corruption": corruption, "latent_dim": latent[0]}
    if recipe.elbo and OBJECTIVES[recipe.elbo.name].constants.get("by_critic"):
        offered["critic"] = Critic(latent[0])
    offered["judge"] = build_judge(recipe, networks, event_shape)
    if recipe.is_reconstruction:
        model = make("model", recipe.model, **offered, encoder=encoder)
        return model
    ways = {"classifier": of_classes, "merge": of_ladder, "reverse": of_auxiliary}
    layers = next((way for name, way in ways.items() if name in (*parts.takes, *parts.settings)), of_bottom_up)
    offered |= of_states(recipe, deep, encoder) if deep else layers(recipe, networks, encoder)

    beside = {key: offered.get(key) for key in ("guide", "guides")}
    beside |= {"quantiser": offered["guides"][-1] if "guides" in offered else offered["guide"]}
    beside |= {"latent_dim": offered["top"], "event_shape": in_shape, "condition_dim": conditions}
    by_condition = recipe.prior.name in CONDITIONAL
    if "conditional" in PARTS["prior"][recipe.prior.name].classes[0].takes:
        beside["conditional"] = MeanFieldNormal(networks.dense(conditions), latent[0])
    prior = offered.pop("prior", None) or make("prior", recipe.prior, **beside)
    if recipe.condition is not None:
        given = prior if by_condition else UnconditionalPrior(prior)
        return ConditionalVAE(given, likelihood, offered["guide"], corruption)
    prior = UnconditionalPrior(prior) if "classes" in parts.takes else prior
    model = make("model", recipe.model, **offered, prior=prior)
    return model


def build_judge(recipe: Recipe, networks: Networks, event_shape: tuple[int, ...]) -> "Judge | None":
    """What looks at x and at what is decoded, for an objective that asks for it."""
    from pyrovae.models import Discriminator, Perception

    judge = OBJECTIVES[recipe.elbo.name].constants.get("judge") if recipe.elbo else None
    if judge == Discriminator.__name__:  # of the encoder's architecture
        return Discriminator(networks.encoder(event_shape, event_shape))
    return Perception() if judge == Perception.__name__ else None  # which gets its network where it is trained


def of_bottom_up(recipe: Recipe, networks: Networks, encoder: "Network") -> dict[str, Any]:
    """Parts of one or several layers with a guide from the data upwards."""
    from pyrovae.models import MeanFieldNormal

    known: dict[str, Any] = {"latent_dim": recipe.latent_dim[0], "event_shape": recipe.event_shape}
    of_guide = PARTS["guide"][recipe.guide.name].classes[0].takes
    own = {"prior": make("prior", recipe.prior, **known)} if "prior" in of_guide else {}
    guides = [make("guide", recipe.guide, encoder=encoder, latent_dim=recipe.latent_dim[0], **own)]
    conditionals = []
    for below, above in pairwise(recipe.latent_dim):
        guides.append(make("guide", recipe.guide, encoder=networks.dense(below), latent_dim=above))
        if guides[0].latents == MeanFieldNormal.latents:
            conditionals.append(MeanFieldNormal(networks.dense(above), below))
        else:  # bits given bits, as in a sigmoid belief net
            conditionals.append(make("guide", recipe.guide, encoder=networks.dense(above), latent_dim=below))
    return {"top": recipe.latent_dim[-1], "guide": guides[0], "guides": guides, "conditionals": conditionals, **own}


def of_ladder(recipe: Recipe, networks: Networks, encoder: "Network") -> dict[str, Any]:
    """Parts of several layers with a guide from the top down."""
    from pyrovae.models import MLP, MeanFieldNormal

    latent, settings = recipe.latent_dim, recipe.model.settings
    features, guides, conditionals = [encoder], [], []
    for _ in latent[1:]:
        features.append(networks.dense(features[-1].out_shape[0]))
    for i, size in enumerate(latent):
        above = latent[i + 1 :] if settings["above"] == "all" else latent[i + 1 : i + 2]
        (found,) = features[i].out_shape
        merges = above and settings["merge"] == "learned"
        # A message from below, and the top layer, are linear maps of features.
        network = networks.dense(sum(above) + found) if merges else MLP(found, hidden=())
        guides.append(make("guide", recipe.guide, encoder=network, latent_dim=size))
        if above:
            conditionals.append(MeanFieldNormal(networks.dense(sum(above)), size))
    return {"top": latent[-1], "features": features, "guides": guides, "conditionals": conditionals}


def of_states(recipe: Recipe, deep: Levels, encoder: "Network") -> dict[str, Any]:
    """Parts of several layers with a guide from the top down, which hand down a state."""
    from pyrovae.models import MeanFieldNormal

    guides, conditionals = [], []
    *lower, top = range(len(deep.sizes))
    alone = recipe.model.settings["merge"] == "precision"
    for i in lower:
        network = deep.message(i) if alone else deep.reader(i, features=True)
        guides.append(make("guide", recipe.guide, encoder=network, latent_dim=deep.sizes[i]))
        conditionals.append(MeanFieldNormal(deep.reader(i, features=False), deep.sizes[i]))
    guides.append(make("guide", recipe.guide, encoder=deep.message(top), latent_dim=deep.sizes[top]))
    offered = {"top": deep.sizes[top], "guides": guides, "conditionals": conditionals, "states": deep.states}
    return offered | {"features": [encoder, *deep.upwards()]}


def of_auxiliary(recipe: Recipe, networks: Networks, encoder: "Network") -> dict[str, Any]:
    """Parts of one layer whose guide draws an auxiliary first: sizes are those of z and of a."""
    from pyrovae.models import MLP, MeanFieldNormal

    z, a = recipe.latent_dim
    (found,) = encoder.out_shape
    return {
        "top": z,
        "features": encoder,
        "auxiliary": MeanFieldNormal(MLP(found, hidden=()), a),
        "guide": make("guide", recipe.guide, encoder=networks.dense(a + found), latent_dim=z),
        "reverse": MeanFieldNormal(networks.dense(z + found), a),
    }


def of_classes(recipe: Recipe, networks: Networks, encoder: "Network") -> dict[str, Any]:
    """Parts of a pair with a class y beside z: both guides are of features, and that of z of y too."""
    from pyrovae.models import MLP, CategoricalGuide, CategoricalPrior

    (found,) = encoder.out_shape
    count = len(recipe.classes) or recipe.prior.settings["components"]
    return {
        "top": recipe.latent_dim[0],
        "features": encoder,
        "classes": CategoricalPrior(count),
        "classifier": CategoricalGuide(MLP(found, hidden=()), count),
        "guide": make("guide", recipe.guide, encoder=networks.dense(count + found), latent_dim=recipe.latent_dim[0]),
    }


def build_stages(recipe: Recipe, event_shape: tuple[int, ...]) -> "Model":
    """A first stage as its own recipe says, and a prior or a second stage on its codes as this one does, joined."""
    below = recipe.below.settled(levels=recipe.levels)
    trained: Any = build_model(below, event_shape)
    stages: dict[str, Any] = {"first": trained}
    if "second" in PARTS["model"][recipe.model.name].classes[0].takes:
        vae = Part(first("model"))
        of_codes = recipe.settled(model=vae, likelihood=choose_likelihood(OF_CODES, vae), first=Part())
        stages["second"] = build_model(of_codes, below.latent_dim)
    else:
        (guide,) = trained.guides
        offered: dict[str, Any] = {"guide": guide, "quantiser": guide, "event_shape": event_shape}
        stages["prior"] = make("prior", recipe.prior, latent_dim=below.latent_dim[0], **offered)
    model: Model = make("model", recipe.model, **stages)
    return model


def build_objective(recipe: Recipe, steps_per_epoch: int = 1, num_rows: int = 1) -> "PyroELBO":
    """The objective that a recipe trains with, on so many training rows; for what is reported it takes none."""
    from pyro.infer import TraceEnum_ELBO

    from pyrovae.inference.objectives import ELBO

    if recipe.is_exact:
        return TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)  # for those without a site
    if recipe.is_reconstruction:  # of its flat prior and its point, what is left is log p(x|z)
        return ELBO()
    bound = OBJECTIVES[recipe.elbo.name].classes[0]
    estimator = GRADIENTS[recipe.gradient.name].classes[0]
    built: PyroELBO = bound.build(
        "elbo",
        recipe.elbo.settings,
        num_rows=num_rows,
        num_particles=recipe.K,
        num_averages=recipe.M,
        alpha=recipe.alpha,
        beta=build_beta(recipe.beta, steps_per_epoch),
        partitions=recipe.partitions,
        gradient=estimator.build("gradient", recipe.gradient.settings),
    )
    return built


def build_beta(value: float | str | None, steps_per_epoch: int) -> Any:
    """A number, or the schedule that a string such as warmup:10 names; 1 where there is none."""
    from pyrovae.inference.schedules import Capacity, Constraint, Cyclical, LinearWarmup

    if not isinstance(value, str):
        return 1.0 if value is None else value
    kind, *numbers = value.split(":")
    if kind == "constraint":
        return Constraint(float(numbers[0]))
    steps = int(numbers[-1]) * steps_per_epoch
    if kind == "warmup":
        return LinearWarmup(steps=steps)
    return Cyclical(period=steps) if kind == "cyclical" else Capacity(float(numbers[0]), steps=steps)


def build_proposal(value: Any) -> "Proposal":
    """The proposal that was asked for, as its name and settings; the guide itself if none was."""
    chosen = choose("proposal", value, next(iter(PROPOSALS)), PROPOSALS)
    made: Proposal = PROPOSALS[chosen.name].classes[0].build("proposal", chosen.settings)
    return made


def build_optimizer(recipe: Recipe) -> "Callable[[list[Tensor]], torch.optim.Optimizer]":
    """What makes the optimiser of a list of parameters."""
    import torch

    from pyrovae.inference.training.optimizers import adam

    if recipe.optimizer == "Adam":
        return lambda parameters: adam(parameters, lr=recipe.lr)
    return lambda parameters: getattr(torch.optim, recipe.optimizer)(parameters, lr=recipe.lr)


def build_schedule(recipe: Recipe) -> Any:
    """What makes the scheduler of an optimiser, or None."""
    import torch

    from pyrovae.inference.training.optimizers import staged

    if recipe.schedule == "staged":
        return staged
    if recipe.schedule == "cosine":
        return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    return None
