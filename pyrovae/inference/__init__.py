"""What is done with a pair: log-weights, bounds, training, log p(x). Takes any Pyro model and guide; never imports
`pyrovae.models`.
"""

from pyrovae.inference.diagnostics import measure as measure
from pyrovae.inference.log_marginal import LogMarginal as LogMarginal
from pyrovae.inference.log_marginal import log_marginal as log_marginal
from pyrovae.inference.log_weights import log_weights as log_weights
from pyrovae.inference.objectives import ELBO as ELBO
from pyrovae.inference.objectives import IWAE as IWAE
from pyrovae.inference.objectives import Capacity as Capacity
from pyrovae.inference.objectives import Cyclical as Cyclical
from pyrovae.inference.objectives import LinearWarmup as LinearWarmup
from pyrovae.inference.objectives import Objective as Objective
from pyrovae.inference.objectives import Renyi as Renyi
from pyrovae.inference.pair import Pair as Pair
from pyrovae.inference.svi import Fit as Fit
from pyrovae.inference.svi import adam as adam
from pyrovae.inference.svi import fit as fit
from pyrovae.inference.svi import staged as staged
