"""The pairs that go by a name, which `model` chooses from, beside models whose log p(x) is exact or not there."""

from pyrovae.models.auxiliary import AuxiliaryVAE
from pyrovae.models.labelled import GaussianMixtureVAE, SemiSupervisedVAE
from pyrovae.models.ladder import LadderVAE
from pyrovae.models.vae import VAE, HierarchicalVAE

PAIRS = (VAE, HierarchicalVAE, LadderVAE, AuxiliaryVAE, SemiSupervisedVAE, GaussianMixtureVAE)
