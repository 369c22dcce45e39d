"""What is done with a pair: log-weights, bounds, training, log p(x). Takes any Pyro model and guide; never imports
`pyrovae.models`.
"""

from pyrovae.inference.annealed import Annealed as Annealed
from pyrovae.inference.annealed import Sandwich as Sandwich
from pyrovae.inference.annealed import sandwich as sandwich
from pyrovae.inference.batch import Batch as Batch
from pyrovae.inference.diagnostics import measure as measure
from pyrovae.inference.estimators import Covariance as Covariance
from pyrovae.inference.estimators import DoublyReparameterised as DoublyReparameterised
from pyrovae.inference.estimators import Enumerated as Enumerated
from pyrovae.inference.estimators import GradientEstimator as GradientEstimator
from pyrovae.inference.estimators import LargestWeight as LargestWeight
from pyrovae.inference.estimators import LeaveOneOut as LeaveOneOut
from pyrovae.inference.estimators import Relaxed as Relaxed
from pyrovae.inference.estimators import Reparameterised as Reparameterised
from pyrovae.inference.estimators import ScoreFunction as ScoreFunction
from pyrovae.inference.estimators import StickingTheLanding as StickingTheLanding
from pyrovae.inference.estimators import WakeSleep as WakeSleep
from pyrovae.inference.imputation import Imputed as Imputed
from pyrovae.inference.imputation import impute as impute
from pyrovae.inference.imputation import log_prob_missing as log_prob_missing
from pyrovae.inference.individual import Individual as Individual
from pyrovae.inference.inference_data import elpd as elpd
from pyrovae.inference.inference_data import to_inference_data as to_inference_data
from pyrovae.inference.information import AggregateKL as AggregateKL
from pyrovae.inference.information import aggregate_kl as aggregate_kl
from pyrovae.inference.judged import VAEGAN as VAEGAN
from pyrovae.inference.judged import Perceptual as Perceptual
from pyrovae.inference.layer_table import layers as layers
from pyrovae.inference.marginal import LogMarginal as LogMarginal
from pyrovae.inference.marginal import log_marginal as log_marginal
from pyrovae.inference.objectives import ELBO as ELBO
from pyrovae.inference.objectives import IWAE as IWAE
from pyrovae.inference.objectives import ImportanceWeighted as ImportanceWeighted
from pyrovae.inference.objectives import Objective as Objective
from pyrovae.inference.objectives import OfParticles as OfParticles
from pyrovae.inference.objectives import Renyi as Renyi
from pyrovae.inference.objectives import Thermodynamic as Thermodynamic
from pyrovae.inference.pair import Pair as Pair
from pyrovae.inference.paths import great_circle as great_circle
from pyrovae.inference.paths import line as line
from pyrovae.inference.paths import neighbours as neighbours
from pyrovae.inference.paths import traverse as traverse
from pyrovae.inference.proposals import FromGuide as FromGuide
from pyrovae.inference.proposals import FromPrior as FromPrior
from pyrovae.inference.proposals import Proposal as Proposal
from pyrovae.inference.proposals import Sampler as Sampler
from pyrovae.inference.proposals import Widened as Widened
from pyrovae.inference.repairs import repair as repair
from pyrovae.inference.schedules import Capacity as Capacity
from pyrovae.inference.schedules import Constant as Constant
from pyrovae.inference.schedules import Constraint as Constraint
from pyrovae.inference.schedules import Cyclical as Cyclical
from pyrovae.inference.schedules import LinearWarmup as LinearWarmup
from pyrovae.inference.simulation import Simulated as Simulated
from pyrovae.inference.simulation import simulated as simulated
from pyrovae.inference.suboptimality import Gaps as Gaps
from pyrovae.inference.suboptimality import gaps as gaps
from pyrovae.inference.tracing.draws import Compiled as Compiled
from pyrovae.inference.tracing.draws import worth_compiling as worth_compiling
from pyrovae.inference.training.optimizers import adam as adam
from pyrovae.inference.training.optimizers import staged as staged
from pyrovae.inference.training.trainer import Fit as Fit
from pyrovae.inference.training.trainer import fit as fit
from pyrovae.inference.verdicts import Verdict as Verdict
from pyrovae.inference.verdicts import verdict as verdict
from pyrovae.inference.weighted import DIP as DIP
from pyrovae.inference.weighted import WAE as WAE
from pyrovae.inference.weighted import BetaTC as BetaTC
from pyrovae.inference.weighted import Factor as Factor
from pyrovae.inference.weighted import FreeBits as FreeBits
from pyrovae.inference.weighted import InfoVAE as InfoVAE
from pyrovae.inference.weights import log_weights as log_weights

# Those that have a name on the command line.
PROPOSALS = (FromGuide, Widened, Individual, Annealed, FromPrior)
