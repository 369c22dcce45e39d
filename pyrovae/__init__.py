"""Deep latent variable models in Pyro: declared pairs, bounds, and log p(x) that can be believed.

The public names below are imported when they are first used, so that `import pyrovae` is cheap; it changes no global
state. `train` makes a run of a `Recipe`, as the command does. The commands own the names `pyrovae.fit`,
`pyrovae.evaluate` and `pyrovae.compare`: the training loop, for any pair, is `pyrovae.inference.fit`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyrovae.version import __version__

if TYPE_CHECKING:
    from pyrovae.data import load_data as load_data
    from pyrovae.inference import ELBO as ELBO
    from pyrovae.inference import IWAE as IWAE
    from pyrovae.inference import Renyi as Renyi
    from pyrovae.inference import log_marginal as log_marginal
    from pyrovae.inference import log_weights as log_weights
    from pyrovae.models import MLP as MLP
    from pyrovae.models import PPCA as PPCA
    from pyrovae.models import VAE as VAE
    from pyrovae.models import Bernoulli as Bernoulli
    from pyrovae.models import BernoulliMixture as BernoulliMixture
    from pyrovae.models import ConditionalVAE as ConditionalVAE
    from pyrovae.models import ContinuousBernoulli as ContinuousBernoulli
    from pyrovae.models import ConvDecoder as ConvDecoder
    from pyrovae.models import ConvEncoder as ConvEncoder
    from pyrovae.models import FlowPrior as FlowPrior
    from pyrovae.models import FullCovarianceNormal as FullCovarianceNormal
    from pyrovae.models import Gaussian as Gaussian
    from pyrovae.models import GaussianMixture as GaussianMixture
    from pyrovae.models import HierarchicalVAE as HierarchicalVAE
    from pyrovae.models import LowRankNormal as LowRankNormal
    from pyrovae.models import MeanFieldNormal as MeanFieldNormal
    from pyrovae.models import MixtureOfGaussians as MixtureOfGaussians
    from pyrovae.models import StandardNormal as StandardNormal
    from pyrovae.models import VampPrior as VampPrior
    from pyrovae.runs.directory import load as load
    from pyrovae.runs.recipe import Recipe as Recipe
    from pyrovae.runs.training import train as train

# Public name -> the module that defines it.
_HOME = {
    "load": "pyrovae.runs.directory",
    "Recipe": "pyrovae.runs.recipe",
    "train": "pyrovae.runs.training",
    "load_data": "pyrovae.data",
    **dict.fromkeys(("ELBO", "IWAE", "Renyi", "log_marginal", "log_weights"), "pyrovae.inference"),
    **dict.fromkeys(
        (
            "MLP",
            "PPCA",
            "VAE",
            "Bernoulli",
            "BernoulliMixture",
            "ConditionalVAE",
            "ContinuousBernoulli",
            "ConvDecoder",
            "ConvEncoder",
            "FlowPrior",
            "FullCovarianceNormal",
            "Gaussian",
            "GaussianMixture",
            "HierarchicalVAE",
            "LowRankNormal",
            "MeanFieldNormal",
            "MixtureOfGaussians",
            "StandardNormal",
            "VampPrior",
        ),
        "pyrovae.models",
    ),
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pyrovae' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
