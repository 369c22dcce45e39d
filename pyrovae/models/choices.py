"""The priors and the guides that can be chosen by name: the first of each is the default."""

from pyrovae.models.guides import FullCovarianceNormal, LowRankNormal, MeanFieldNormal
from pyrovae.models.priors import FlowPrior, IsotropicNormal, MixtureOfGaussians, StandardNormal, VampPrior

PRIORS = (
    StandardNormal,
    IsotropicNormal,
    MixtureOfGaussians,
    VampPrior,
    FlowPrior,
)

GUIDES = (
    MeanFieldNormal,
    FullCovarianceNormal,
    LowRankNormal,
)
