"""What is declared: priors, likelihoods, guides, and the pairs they make. Never imports `pyrovae.inference`."""

from pyrovae.models.conditional import AmortisedPrior as AmortisedPrior
from pyrovae.models.conditional import ConditionalPrior as ConditionalPrior
from pyrovae.models.conditional import ConditionalVAE as ConditionalVAE
from pyrovae.models.conditional import UnconditionalPrior as UnconditionalPrior
from pyrovae.models.guides import FullCovarianceNormal as FullCovarianceNormal
from pyrovae.models.guides import Guide as Guide
from pyrovae.models.guides import LowRankNormal as LowRankNormal
from pyrovae.models.guides import MeanFieldNormal as MeanFieldNormal
from pyrovae.models.likelihoods import Bernoulli as Bernoulli
from pyrovae.models.likelihoods import Gaussian as Gaussian
from pyrovae.models.likelihoods import Likelihood as Likelihood
from pyrovae.models.mixture import BernoulliMixture as BernoulliMixture
from pyrovae.models.mixture import GaussianMixture as GaussianMixture
from pyrovae.models.networks import MLP as MLP
from pyrovae.models.networks import ConvDecoder as ConvDecoder
from pyrovae.models.networks import ConvEncoder as ConvEncoder
from pyrovae.models.networks import Network as Network
from pyrovae.models.priors import MixtureOfGaussians as MixtureOfGaussians
from pyrovae.models.priors import Prior as Prior
from pyrovae.models.priors import StandardNormal as StandardNormal
from pyrovae.models.priors import VampPrior as VampPrior
from pyrovae.models.vae import VAE as VAE
from pyrovae.models.vae import HierarchicalVAE as HierarchicalVAE
