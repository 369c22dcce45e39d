"""The models with an exact log p(x): `compare` puts those of the rows' measure beside trained runs."""

from pyrovae.models.factor_mixture import MixtureOfFactorAnalysers
from pyrovae.models.kernels import BernoulliKernelDensity, KernelDensity
from pyrovae.models.linear_gaussian import PPCA, FactorAnalysis
from pyrovae.models.mixture import BernoulliMixture, GaussianMixture

BASELINES = (
    GaussianMixture,
    BernoulliMixture,
    PPCA,
    FactorAnalysis,
    MixtureOfFactorAnalysers,
    KernelDensity,
    BernoulliKernelDensity,
)
