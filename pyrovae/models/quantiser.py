r"""A guide that quantises: the vectors that an encoder finds, replaced by the nearest of a codebook's.

At each place m of a grid the encoder finds e_m(x), a vector of D elements. With the rows c_1, ..., c_C of the codebook

    q(k_m | x) = softmax_k( -|e_m(x) - c_k|^2 / t )                    t = 0: all mass on the nearest code

and z is the vectors of the codes (`pyrovae.models.codes`). A VAE with this guide and a prior over codes is a VQ-VAE.
At t = 0 its ELBO has no expectation in it,

    log p(x) >= log p(x, z(x)) = log p(x|z(x)) + log p(k(x))

where log p(k) = -M log C of a uniform prior: what is reconstructed, less what its codes cost. That is one term of the
sum over all grids, and nothing says how much the others have: a lower bound. At t > 0 draws weigh all grids, and
importance sampling finds log p(x) of the same decoder; as t falls to 0, their bound becomes the one above.

**Gradients.** At t = 0 the derivative of z by e is taken to be 1, and the commitment, -beta |e - c_k|^2, has its
gradient in log q (`KnownCodes`). None of it reaches the codebook. At t > 0 log q has a gradient by e, and training asks
for an estimator of discrete sites.

**The codebook** is set by moving averages of what is assigned to each code. With n_k the share of a batch's vectors
that are nearest to c_k, and s_k their sum divided by the number of all vectors,

    r_k <- g r_k + (1 - g) n_k          c_k <- (g r_k c_k + (1 - g) s_k) / (g r_k + (1 - g) n_k)

which is a moving average of sums over one of counts. It is done after the step, from what `forward` has noted of the
batch in training mode (`pyrovae.inference.training.moving`), so that within a step there is one codebook. It starts at
k-means of the vectors that the untrained encoder finds. A code of which r_k has fallen below a share of 1/C is dead,
and starts again at a vector of the batch, drawn with a probability proportional to its squared distance to its own
code, as k-means++ draws: where the codebook is worst.

References:
    van den Oord, Vinyals and Kavukcuoglu 2017, Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937
    Razavi, van den Oord and Vinyals 2019, Generating Diverse High-Fidelity Images with VQ-VAE-2,
    https://arxiv.org/abs/1906.00446
"""

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyrovae.errors import UsageError
from pyrovae.models.codes import Codes, IndependentCodes, KnownCodes
from pyrovae.models.guides import Guide
from pyrovae.models.networks import Network
from pyrovae.settings import Count, NotNegative, Number, Share, Whole, checked

# Vectors for each code that k-means starts from.
VECTORS_OF_A_CODE = 256


class OnPlaces(nn.Module):
    """One linear map for every place of a grid: features (*batch, F M), by channel, to (*batch, M, D).

    Args:
        features: F M.
        places: M.
        out: D.
    """

    def __init__(self, features: int, places: int, out: int) -> None:
        super().__init__()
        self.places = places
        self.linear = nn.Linear(features // places, out)

    def forward(self, h: Tensor) -> Tensor:
        e: Tensor = self.linear(h.unflatten(-1, (-1, self.places)).transpose(-1, -2))
        return e


class VectorQuantiser(Guide):
    """Codes: each vector of a grid that the encoder finds is replaced by the nearest one of a codebook.

    Where the encoder's features are a grid (`Network.grid`), that is the grid; else it is a row of places.

    Args:
        encoder: Maps an event to a vector of features.
        latent_dim: Z = D M, elements of all vectors of a grid.
        codes: C, rows of the codebook.
        code_dim: D, elements of a code.
        temperature: t; 0 takes the nearest code.
        commitment: beta, in nats per squared unit of e, of a temperature 0.
        decay: g, of the moving averages.
        restart: Share of 1/C below which a code is dead; 0: none is.

    Attributes:
        grid: Height and width of the grid.
        codebook: Shape (C, D).
        shares: r_k, shape (C,).

    Raises:
        UsageError: the grid has no room for codes of that many elements.
    """

    short = ("vq", "quantiser")
    latents = "codes"
    of_one_layer = True
    codebook: Tensor
    shares: Tensor
    noted: Tensor
    candidates: Tensor
    used: Tensor

    @checked
    def __init__(
        self,
        encoder: Network,
        latent_dim: Count,
        codes: Annotated[int, Whole(2)] = 64,
        code_dim: Count = 16,
        temperature: NotNegative = 0.0,
        commitment: NotNegative = 0.25,
        decay: Annotated[float, Number(least=0, below=1)] = 0.99,
        restart: Share = 0.02,
    ) -> None:
        places = latent_dim // code_dim if encoder.grid is None else math.prod(encoder.grid)
        if places * code_dim != latent_dim:
            wanted = f"a multiple of {code_dim}" if encoder.grid is None else f"{places * code_dim}"
            of = "" if encoder.grid is None else f" on a grid of {encoder.grid[0]} x {encoder.grid[1]}"
            raise UsageError(
                f"latent_dim: codes of {code_dim} elements{of} take {wanted}, got {latent_dim}",
                settings=("latent_dim",),
            )
        (features,) = encoder.out_shape
        dense = nn.Sequential(nn.Linear(features, latent_dim), nn.Unflatten(-1, (places, code_dim)))
        head = dense if encoder.grid is None else OnPlaces(features, places, code_dim)
        super().__init__(encoder, latent_dim, latent_dim, head=head)
        self.grid = encoder.grid or (1, places)
        self.temperature, self.commitment, self.decay, self.restart = temperature, commitment, decay, restart
        self.register_buffer("codebook", torch.randn(codes, code_dim))
        self.register_buffer("shares", torch.full((codes,), 1 / codes))
        self.register_buffer("used", torch.zeros(codes, dtype=torch.float64))  # vectors of this epoch, by code
        # Of the batch: numbers and sums of vectors by code, and where dead codes would start again.
        self.register_buffer("noted", torch.zeros(codes, 1 + code_dim), persistent=False)
        self.register_buffer("candidates", torch.zeros(codes, code_dim), persistent=False)

    @property
    def places(self) -> int:
        """M."""
        return math.prod(self.grid)

    def forward(self, x: Tensor) -> Codes:
        e = self.parameters_of(x)  # (*batch, M, D)
        # Minus the squared distance but for |e|^2, which all codes share.
        closeness = 2 * e @ self.codebook.T - self.codebook.square().sum(-1)
        codes = closeness.detach().argmax(-1)
        if self.training:
            self.note(e.detach().flatten(0, -2), codes.flatten())
        if self.temperature:
            return IndependentCodes(closeness / self.temperature, self.codebook, self.places)
        return KnownCodes(e, codes, self.codebook, self.commitment if self.training else 0.0)

    @torch.no_grad()
    def note(self, e: Tensor, codes: Tensor) -> None:
        """Keep what the codebook is moved by: vectors e (P, D) and their codes (P,)."""
        assigned = one_hot(codes, len(self.codebook)).to(e.dtype)
        beside = torch.cat([e.new_ones(len(e), 1), e], -1)
        self.noted.copy_(assigned.T @ beside)
        # The largest of log-weights with Gumbel noise are a draw without replacement.
        far = (e - self.codebook[codes]).square().sum(-1).clamp(min=torch.finfo(e.dtype).tiny)
        noise = -(-torch.rand_like(far).clamp(1e-30, 1 - 1e-7).log()).log()
        chosen = (far.log() + noise).topk(min(len(self.codebook), len(e))).indices
        chosen = chosen.repeat(-(-len(self.codebook) // len(chosen)))[: len(self.codebook)]
        self.candidates.copy_(apart(e[chosen], e.std()))

    def statistics(self, leading: bool) -> Tensor:
        """What `forward` noted of the last batch, in sums over processes: one vector.

        Args:
            leading: Whether dead codes start again at vectors of this process.
        """
        return torch.cat([self.noted.flatten(), (self.candidates * leading).flatten()])

    @torch.no_grad()
    def move(self, totals: Tensor) -> None:
        """Move the codebook by what was noted of a batch, summed over processes."""
        noted, candidates = totals.split([self.noted.numel(), self.candidates.numel()])
        counts, sums = noted.view_as(self.noted).split([1, self.noted.shape[1] - 1], -1)
        total = counts.sum()
        before, now = self.decay * self.shares, (1 - self.decay) * counts[:, 0] / total
        shares = before + now
        moved = (before[:, None] * self.codebook + (1 - self.decay) * sums / total) / shares[:, None]
        dead = shares < self.restart / len(shares)
        self.codebook.copy_(torch.where(dead[:, None], candidates.view_as(moved), moved))
        self.shares.copy_(torch.where(dead, 1 / len(shares), shares))
        self.used += counts[:, 0]

    @torch.no_grad()
    def record(self) -> dict[str, float]:
        """Of the vectors since it was last asked, how many codes they have, and the perplexity of these codes."""
        found = usage(self.used)
        self.used.zero_()
        return found

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Start the codebook by k-means at rows x (N, *event)."""
        from sklearn.cluster import KMeans

        codes, places = len(self.codebook), self.places
        rows = torch.randperm(len(x))[: max(1, VECTORS_OF_A_CODE * codes // places)].to(x.device)
        e = torch.cat([self.parameters_of(block) for block in x[rows].split(1000)]).flatten(0, 1)
        e = apart(e, e.std())
        clusters = min(codes, len(e))
        seed = int(torch.randint(2**31, ()).item())
        found = KMeans(clusters, n_init=1, random_state=seed).fit(e.double().cpu().numpy())
        self.codebook[:clusters] = torch.as_tensor(found.cluster_centers_).to(self.codebook)
        counts = torch.bincount(torch.as_tensor(found.labels_).long(), minlength=codes)
        self.shares.copy_((counts + 1) / (len(e) + codes))


def apart(e: Tensor, sd: Tensor) -> Tensor:
    """Vectors (P, D) with a little noise: no two codes are to be alike, though vectors of a background are."""
    return e + 1e-4 * sd * torch.randn_like(e)


def usage(counts: Tensor) -> dict[str, float]:
    """How many codes are used, and exp of the entropy of their shares: as many codes, all alike, have that entropy.

    Args:
        counts: How often each code came, shape (C,).
    """
    shares = counts / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(shares, shares).sum().item()
    return {"codes_used": float((counts > 0).sum()), "code_perplexity": math.exp(entropy)}
