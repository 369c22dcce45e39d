"""What can be chosen by name: priors, guides, likelihoods and networks; of all but likelihoods the first is usual."""

from pyrovae.models.code_priors import MaskedConvolutions, TransformerCodes, UniformCodes, UnigramCodes
from pyrovae.models.conditional import AmortisedPrior
from pyrovae.models.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyrovae.models.discrete import BernoulliGuide, CategoricalGuide, CategoricalPrior, IndependentBernoulli
from pyrovae.models.flow_guides import InverseAutoregressiveFlow, PlanarFlow, SplineFlow, SylvesterFlow
from pyrovae.models.flow_priors import AutoregressivePrior, MaskedAutoregressivePrior, NeuralSplinePrior
from pyrovae.models.grids import ResidualConvDecoder, ResidualConvEncoder
from pyrovae.models.guides import FullCovarianceNormal, LowRankNormal, MeanFieldNormal
from pyrovae.models.levels import Categorical, DiscretizedLogistic, DiscretizedLogisticMixture
from pyrovae.models.likelihoods import Bernoulli, Beta, ContinuousBernoulli, Gaussian, Laplace, LogNormal, StudentT
from pyrovae.models.mixture_guide import MixtureOfNormals
from pyrovae.models.networks import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    ResidualMLP,
    SequenceDecoder,
    SequenceEncoder,
    StepEncoder,
)
from pyrovae.models.priors import FlowPrior, IsotropicNormal, MixtureOfGaussians, StandardNormal, VampPrior
from pyrovae.models.quantiser import VectorQuantiser
from pyrovae.models.semi_amortised import SemiAmortised
from pyrovae.models.sequence_guides import MarkovGuide
from pyrovae.models.sequences import GatedMarkov, Markov, OrnsteinUhlenbeck
from pyrovae.models.simplex import DirichletGuide, DirichletPrior, LogisticNormalGuide, LogisticNormalPrior
from pyrovae.models.student import StudentTPrior
from pyrovae.models.tables import Columns
from pyrovae.models.topics import Multinomial, Topics
from pyrovae.models.vamp import ConditionalVampPrior, HierarchicalVampPrior

PRIORS = (
    StandardNormal,
    IsotropicNormal,
    MixtureOfGaussians,
    VampPrior,
    FlowPrior,
    MaskedAutoregressivePrior,
    NeuralSplinePrior,
    AutoregressivePrior,
    IndependentBernoulli,
    CategoricalPrior,
    StudentTPrior,
    HierarchicalVampPrior,
    OrnsteinUhlenbeck,
    Markov,
    GatedMarkov,
    LogisticNormalPrior,
    DirichletPrior,
    UniformCodes,
    UnigramCodes,
    MaskedConvolutions,
    TransformerCodes,
)

# p(z|y), which can be chosen where there is a condition; any other prior is `UnconditionalPrior` there.
CONDITIONAL_PRIORS = (
    AmortisedPrior,
    ConditionalVampPrior,
)

GUIDES = (
    MeanFieldNormal,
    FullCovarianceNormal,
    LowRankNormal,
    MixtureOfNormals,
    SemiAmortised,
    InverseAutoregressiveFlow,
    SplineFlow,
    PlanarFlow,
    SylvesterFlow,
    BernoulliGuide,
    CategoricalGuide,
    MarkovGuide,
    LogisticNormalGuide,
    DirichletGuide,
    VectorQuantiser,
)

# Of those of a measure, the first is the default for rows of that measure.
LIKELIHOODS = (
    Bernoulli,
    Gaussian,
    ContinuousBernoulli,
    Laplace,
    StudentT,
    Beta,
    LogNormal,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Categorical,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    Columns,
    Multinomial,
    Topics,
)

# Each an encoder and a decoder, with the same settings.
NETWORKS = (
    (MLP, MLP),
    (ConvEncoder, ConvDecoder),
    (ResidualMLP, ResidualMLP),
    (SequenceEncoder, SequenceDecoder),
    (StepEncoder, SequenceDecoder),
    (ResidualConvEncoder, ResidualConvDecoder),
)
