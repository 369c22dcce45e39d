"""Deep latent variable models in Pyro: declared pairs, bounds, and log p(x) that can be believed."""

__version__ = "0.1.0.dev0"
