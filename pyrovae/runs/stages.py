"""The first stage of a run of two: a trained run, whose recipe and weights are taken over.

A run of two stages stands by itself. Its config.yaml has the whole recipe of the first one, and its checkpoints have
the weights of both, so that it is evaluated, loaded, compared and resumed when the first run is gone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.errors import CheckpointError, DataError, UsageError
from pyrovae.runs.directory import open_run
from pyrovae.runs.options import DERIVED
from pyrovae.runs.parts import Part
from pyrovae.runs.recipe import Recipe, first, staged
from pyrovae.runs.scoring import hash_of

if TYPE_CHECKING:
    from pyrovae.data import Rows
    from pyrovae.models import VAE

# What a run of two stages has from its first one, whose x is its own.
OF_X = ("data", "data_root", "binarize", "standardize", "likelihood")


@dataclass(frozen=True)
class FirstStage:
    """A trained VAE, and the recipe of its run."""

    vae: "VAE"
    recipe: Recipe

    def taken_over(self, recipe: Recipe) -> Recipe:
        """The recipe of a run on this first stage, with all that it has from it.

        Raises:
            UsageError: it was given other data, or another likelihood.
        """
        options: dict[str, Any] = {"latent_dim": self.recipe.latent_dim, **recipe.given}
        if not recipe.network and tuple(recipe.latent_dim or self.recipe.latent_dim) != self.recipe.latent_dim:
            raise UsageError(
                f"latent_dim: a prior on {recipe.first.name} has that of its codes, {self.recipe.latent_dim[0]}; leave "
                "it out",
                settings=("latent_dim",),
            )
        plain = self.recipe.plain()
        for key in OF_X:
            asked, theirs = getattr(recipe, key), getattr(self.recipe, key)
            if recipe.given.get(key) is not None and asked != theirs:
                raise UsageError(
                    f"{key}: that of the first stage, {recipe.first.name}, is {plain.get(key)}; leave it out",
                    settings=(key,),
                )
            options[key] = plain.get(key)
        kept = {key: value for key, value in plain.items() if key not in DERIVED}
        options["first"] = {"name": recipe.first.name, "weights": hash_of(self.vae), "recipe": kept}
        options["seed"] = recipe.seed  # which may have been drawn
        return Recipe(**options)

    def check_rows(self, rows: "Rows", name: str) -> None:
        """Refuse rows that are not those of the first stage's training.

        Raises:
            DataError: the data has changed since.
        """
        if rows.hash != self.recipe.data_hash:
            raise DataError(
                f"{name}: the data has changed since the first stage was trained: hash {rows.hash[:12]} now, "
                f"{self.recipe.data_hash[:12]} then; train it anew"
            )


def check_kept(first: str, directory: Path) -> None:
    """Refuse to write a run of two stages over its first one.

    Raises:
        UsageError: they have one directory.
    """
    if directory.exists() and directory.samefile(first):
        raise UsageError(
            f"directory {directory}: is that of the first stage, which stays; choose another", settings=("out",)
        )


def first_stage(chosen: Part) -> FirstStage:
    """The trained VAE of a run, by the run's directory; nothing of it is changed.

    Raises:
        UsageError: it is no VAE of p(x) alone.
        CheckpointError: there is no such run, it is not trained to its end, or has other weights than were taken over.
    """
    run = open_run(chosen.name)
    kind = run.recipe.model.name
    if kind != first("model") or run.recipe.condition is not None:
        what = f"{kind}, given the {run.recipe.condition}" if run.recipe.condition else kind
        raise UsageError(
            f"first: the model of {chosen.name} is {what}; a {staged()} is trained on the codes of a {first('model')}",
            settings=("first",),
        )
    vae: Any = run.model()
    if run.unfinished:
        raise CheckpointError(f"first: {run.unfinished}; finish it by resuming it", settings=("first",))
    weights = hash_of(vae)
    if chosen.settings.get("weights", weights) != weights:
        raise CheckpointError(
            f"first: the weights of {chosen.name} are not those that this configuration was made with; name the run "
            "anew to take those that it has",
            settings=("first",),
        )
    return FirstStage(vae, run.recipe)
