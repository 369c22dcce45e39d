"""Figures of training, of data and codes, and of model comparison.

Each function returns a `matplotlib.figure.Figure`. It is made without pyplot, so no figure registry, backend or
rcParams is touched: it shows when it is the last expression of a notebook cell, and `figure.savefig(path)` writes it.
matplotlib itself is imported by the first figure.
"""

from pyrovae.plots.calibration import reliability as reliability
from pyrovae.plots.comparisons import SIGNS as SIGNS
from pyrovae.plots.comparisons import comparison as comparison
from pyrovae.plots.comparisons import gaps as gaps
from pyrovae.plots.comparisons import k_curve as k_curve
from pyrovae.plots.densities import densities as densities
from pyrovae.plots.disentangling import information as information
from pyrovae.plots.films import film as film
from pyrovae.plots.gradients import gradient_noise as gradient_noise
from pyrovae.plots.images import conditional_samples as conditional_samples
from pyrovae.plots.images import grid as grid
from pyrovae.plots.images import named_rows as named_rows
from pyrovae.plots.images import neighbourhood as neighbourhood
from pyrovae.plots.images import reconstructions as reconstructions
from pyrovae.plots.images import samples as samples
from pyrovae.plots.images import traversals as traversals
from pyrovae.plots.latents import MAX_CLASSES as MAX_CLASSES
from pyrovae.plots.latents import clouds as clouds
from pyrovae.plots.latents import latent_map as latent_map
from pyrovae.plots.style import Style as Style
from pyrovae.plots.training import step_curve as step_curve
from pyrovae.plots.training import training_curves as training_curves
