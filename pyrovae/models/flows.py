r"""Normalising flows: invertible maps z = f(u; h) of vectors, conditioned on features h or not, and their densities.

With u ~ N(0, I) and z = m + s f(u; h), element by element,

    log q(z|h) = log N(u; 0, I) - log |det df/du| - sum_d log s_d,        u = f^-1((z - m)/s; h).

Every flow starts near the identity, so that q starts near N(m, diag s^2).

    Autoregressive    z_d = t(u_d; r_d(u_<d; h)), t increasing: affine (IAF), or a rational-quadratic spline.
                      df/du is triangular: log det = sum_d log dt/du_d. The inverse is found element after element;
                      in two groups of elements (a coupling) it is two steps.
    Inverted          f^-1 in place of f: of an autoregressive flow the masked autoregressive flow (MAF), whose density
                      is one pass and whose draws take Z steps.
    Planar            z = u + v tanh(w'u + b)
    Sylvester         z = u + Q R tanh(S Q'u + b), Q of M orthonormal columns, R and S upper triangular (M, M)

By Sylvester's identity det(I + AB) = det(I + BA), the last has det df/du = prod_i (1 + R_ii S_ii tanh'(a_i)), with
a = S Q'u + b, and is invertible where every R_ii S_ii > -1. The planar flow is the case M = 1.

Neither has an inverse in closed form, and neither needs one. With y = Q'u, t = Q'z = y + R tanh(a), from the last row
to the first all of row i is known but a_i itself: with t_i' = t_i - sum_{j>i} R_ij tanh(a_j) and
b_i' = b_i + sum_{j>i} S_ij y_j,

    a_i + c tanh(a_i) = S_ii t_i' + b_i',        c = R_ii S_ii > -1,

an increasing function of one number, whose root Newton's iterations find from the side on which they cannot overshoot
(`root`). Then u = z - Q R tanh(a). So log q of latents of any origin is had to rounding.

Pyro's transforms are not used: its splines index by truth values and assert on tensors, which cannot be compiled; its
planar and Sylvester flows have no inverse; its autoregressive networks expand features to all particles, and run once
for each element in the inverse.

References:
    Rezende and Mohamed 2015, Variational Inference with Normalizing Flows, https://arxiv.org/abs/1505.05770
    Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow,
    https://arxiv.org/abs/1606.04934
    Papamakarios, Pavlakou and Murray 2017, Masked Autoregressive Flow for Density Estimation,
    https://arxiv.org/abs/1705.07057
    van den Berg, Hasenclever, Tomczak and Welling 2018, Sylvester Normalizing Flows for Variational Inference,
    https://arxiv.org/abs/1803.05649
    Durkan, Bekasov, Murray and Papamakarios 2019, Neural Spline Flows, https://arxiv.org/abs/1906.04032
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import pad, softplus

from pyrovae.models.made import MADE

# By how much what a network puts out is scaled, for a flow to start near the identity.
NEAR = 0.1
# The least slope of a planar or Sylvester flow along any direction, for its logarithm to be a number.
SLACK = 1e-2
# An affine map stretches by exp(3), a factor of 20, at most.
MOST_LOG_SCALE = 3.0
# Least width, height and slope of a bin of a spline, as a share of the bins together and as a slope.
LEAST = 1e-3
# Up to so many groups, all are had sooner one after the other than in one pass, half of whose weights are masked.
FEW_GROUPS = 2
# Enough for any c that fits into a network's output.
NEWTON_STEPS = 20


class Flow(nn.Module, ABC):
    """An invertible map z = f(u; h) of vectors of Z elements, given features h or not.

    To write a new one, return z and log |det df/du| from `forward`, u and the same from `inverse`. Features have the
    shape (*batch, F), where u has (K, *batch, Z) or any other that the two are broadcast to.
    """

    @abstractmethod
    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z = f(u; h), shape (*batch, Z), and log |det df/du| at u, shape (*batch)."""

    @abstractmethod
    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u = f^-1(z; h), shape (*batch, Z), and log |det df/du| at u, shape (*batch)."""


class Chain(Flow):
    """One flow after the other: f = f_L ... f_1.

    Args:
        flows: f_1, ..., f_L.
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        self.flows: Sequence[Flow] = nn.ModuleList(flows)  # type: ignore[assignment]

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.flows[0](u, features)
        for flow in self.flows[1:]:
            z, more = flow(z, features)
            log_det = log_det + more
        return z, log_det

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, log_det = self.flows[-1].inverse(z, features)
        for flow in reversed(self.flows[:-1]):
            u, more = flow.inverse(u, features)
            log_det = log_det + more
        return u, log_det


class Inverted(Flow):
    """f^-1 in place of f.

    Args:
        flow: f.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.flow.inverse(u, features)
        return z, -log_det

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, log_det = self.flow(z, features)
        return u, -log_det


class Monotone(ABC):
    """An increasing map of each element, by parameters of its own.

    Attributes:
        outputs: Number of parameters of an element, P; with all at 0 it is the identity.
    """

    outputs: int

    @abstractmethod
    def forward(self, u: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """z and log dz/du, each (*batch, Z), of u (*batch, Z) by parameters (*batch, Z, P)."""

    @abstractmethod
    def inverse(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """u and log dz/du at it, each (*batch, Z)."""


class Affine(Monotone):
    """z = m + exp(s) u, s bounded, so that what one flow makes large does not become huge in the next."""

    outputs = 2

    def forward(self, u: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.parameters_of(raw)
        return shift + log_scale.exp() * u, log_scale

    def inverse(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.parameters_of(raw)
        return (z - shift) * (-log_scale).exp(), log_scale

    def parameters_of(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """m and s, each (*batch, Z)."""
        shift, log_scale = raw.unbind(-1)
        return shift, MOST_LOG_SCALE * (log_scale / MOST_LOG_SCALE).tanh()


class Spline(Monotone):
    r"""A rational-quadratic spline on [-B, B], the identity outside, with a continuous slope.

    Between knots (x_k, y_k) and (x_k+1, y_k+1) with slopes d_k and d_k+1, width w, height h, s = h/w, e = (x - x_k)/w:

        y = y_k + h (s e^2 + d_k e(1-e)) / D            D = s + (d_k + d_k+1 - 2s) e(1-e)
        dy/dx = s^2 (d_k+1 e^2 + 2s e(1-e) + d_k (1-e)^2) / D^2

    Given y, with g = y - y_k and t = d_k + d_k+1 - 2s, e is the root in [0, 1] of a e^2 + b e + c = 0, in the form that
    loses no digits: e = 2c/(-b - sqrt(b^2 - 4ac)) with a = h(s - d_k) + g t, b = h d_k - g t, c = -s g.

    Args:
        bins: Number of bins.
        bound: B.
    """

    def __init__(self, bins: int, bound: float) -> None:
        self.bins, self.bound, self.outputs = bins, bound, 3 * bins - 1

    def forward(self, u: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        x, y, slopes = self.knots(raw)
        inside = u.clamp(-self.bound, self.bound)
        left, bottom, w, h, d0, d1 = self.bin_of(inside, x, x, y, slopes)
        s, e = h / w, (inside - left) / w
        between = e * (1 - e)
        z = bottom + h * (s * e.square() + d0 * between) / (s + (d0 + d1 - 2 * s) * between)
        return torch.where(inside == u, z, u), self.log_slope(inside == u, s, e, d0, d1)

    def inverse(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        x, y, slopes = self.knots(raw)
        inside = z.clamp(-self.bound, self.bound)
        left, bottom, w, h, d0, d1 = self.bin_of(inside, y, x, y, slopes)
        s, g = h / w, inside - bottom
        t = d0 + d1 - 2 * s
        a, b, c = h * (s - d0) + g * t, h * d0 - g * t, -s * g
        # What is under the root is positive but for rounding.
        e = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
        return torch.where(inside == z, left + w * e, z), self.log_slope(inside == z, s, e, d0, d1)

    def knots(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_k, y_k and d_k, each (*batch, Z, bins + 1)."""
        widths, heights, slopes = raw.split([self.bins, self.bins, self.bins - 1], -1)
        x, y = (
            2 * self.bound * pad(((1 - LEAST * self.bins) * part.softmax(-1) + LEAST).cumsum(-1), (1, 0)) - self.bound
            for part in (widths, heights)
        )
        inner = LEAST + softplus(slopes + math.log(math.expm1(1 - LEAST)))
        return x, y, pad(inner, (1, 1), value=1.0)

    def bin_of(self, at: Tensor, by: Tensor, *of_knots: Tensor) -> tuple[Tensor, ...]:
        """x_k, y_k, width, height, d_k and d_k+1 of the bin in which each of `at` is, among the knots `by`."""
        index = (at.unsqueeze(-1) >= by[..., 1:-1]).sum(-1, keepdim=True)
        start, end = (
            [knots.expand(*index.shape[:-1], -1).gather(-1, i).squeeze(-1) for knots in of_knots]
            for i in (index, index + 1)
        )
        (x0, y0, d0), (x1, y1, d1) = start, end
        return x0, y0, x1 - x0, y1 - y0, d0, d1

    def log_slope(self, inside: Tensor, s: Tensor, e: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
        """log dy/dx; 0 outside."""
        between = e * (1 - e)
        over = d1 * e.square() + 2 * s * between + d0 * (1 - e).square()
        log_slope = 2 * s.log() + over.log() - 2 * (s + (d0 + d1 - 2 * s) * between).log()
        return torch.where(inside, log_slope, torch.zeros_like(log_slope))


class Autoregressive(Flow):
    """z_d = t(u_d; r_d(u_<d; h)), in reversed order, so that of two in a row the second begins where the first ends.

    Args:
        size: Z.
        monotone: t.
        hidden: Widths of the hidden layers of r.
        groups: Elements of a group are given the groups before it, and not each other; None: each is one; 2: a
            coupling, whose inverse is as cheap.
        features: Width of h; 0: there is none.
    """

    def __init__(
        self, size: int, monotone: Monotone, hidden: Sequence[int], groups: int | None = None, features: int = 0
    ) -> None:
        super().__init__()
        self.monotone = monotone
        self.network = MADE(size, monotone.outputs, hidden, groups, features)

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.network.groups > FEW_GROUPS:
            z, log_slope = self.monotone.forward(u, NEAR * self.network(u, features))
            return z.flip(-1), log_slope.sum(-1)
        moved: list[Tensor] = []

        def group(elements: slice, raw: Tensor) -> tuple[Tensor, Tensor]:
            z, log_slope = self.monotone.forward(u[..., elements], NEAR * raw)
            moved.append(z)
            return u[..., elements], log_slope

        _, log_det = self.by_groups(group, features)
        return torch.cat(moved, -1).flip(-1), log_det

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = z.flip(-1)
        return self.by_groups(lambda elements, raw: self.monotone.inverse(z[..., elements], NEAR * raw), features)

    def by_groups(
        self, group: Callable[[slice, Tensor], tuple[Tensor, Tensor]], features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u and log |det df/du|, from the first group to the last: `group` gives both of some elements, see `MADE`."""
        log_slopes: list[Tensor] = []

        def known(elements: slice, raw: Tensor) -> Tensor:
            u, log_slope = group(elements, raw)
            log_slopes.append(log_slope.sum(-1))
            return u

        u = self.network.unrolled(known, features)
        return u, sum(log_slopes, u.new_zeros(u.shape[:-1]))


class Planar(Flow):
    """z = u + v tanh(w'u + b), with v, w and b linear in the features.

    Where w'v <= -1 it would fold space. So v is moved along w until w'v is c(w'v) = softplus(w'v + k) - 1 + slack, with
    k such that c(0) = 0: v = 0 stays the identity.

    Args:
        size: Z.
        features: Width of h.
    """

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.size = size
        self.parameters_of = nn.Linear(features, 2 * size + 1)

    def vectors(self, features: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """v, w, b and w'v, the last two with one element."""
        v, w, b = self.parameters_of(features).split([self.size, self.size, 1], -1)
        v = NEAR * v
        along = (w * v).sum(-1, keepdim=True)
        wanted = softplus(along + math.log(math.expm1(1 - SLACK))) - (1 - SLACK)
        v = v + (wanted - along) * w / w.square().sum(-1, keepdim=True).clamp(min=1e-12)
        return v, w, b, (w * v).sum(-1, keepdim=True)

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v, w, b, c = self.vectors(features)
        h = ((w * u).sum(-1, keepdim=True) + b).tanh()
        return u + v * h, torch.log1p(c * (1 - h.square())).squeeze(-1)

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v, w, b, c = self.vectors(features)
        h = root(c, (w * z).sum(-1, keepdim=True) + b).tanh()
        return z - v * h, torch.log1p(c * (1 - h.square())).squeeze(-1)


class Sylvester(Flow):
    """z = u + Q R tanh(S Q'u + b), with Q, R, S and b made from what is linear in the features.

    Q holds the first M columns of a product of M Householder reflections, so that it is orthonormal whatever the
    features. R and S are what stands above and below the diagonal of one matrix; their own diagonals are of the form
    tanh, less a little, so that their products are above -1.

    Args:
        size: Z.
        columns: M, at most Z.
        features: Width of h.
    """

    def __init__(self, size: int, columns: int, features: int) -> None:
        super().__init__()
        self.size, self.columns = size, columns
        self.sizes = [size * columns, columns * columns, columns, columns, columns]
        self.parameters_of = nn.Linear(features, sum(self.sizes))

    def matrices(self, features: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q (*batch, Z, M), R and S (*batch, M, M), and b (*batch, M)."""
        vectors, above, r, s, b = self.parameters_of(features).split(self.sizes, -1)
        above = above.unflatten(-1, (self.columns, self.columns))
        most = math.sqrt(1 - SLACK)
        # S starts away from 0, and R near it: with both near 0, neither would have a gradient to speak of.
        R = (NEAR * above).triu(1) + torch.diag_embed(most * (NEAR * r).tanh())
        S = above.mT.triu(1) + torch.diag_embed(most * (1 + s).tanh())
        return orthonormal(vectors.unflatten(-1, (self.size, self.columns))), R, S, b

    def forward(self, u: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        Q, R, S, b = self.matrices(features)
        h = (times(S, times(Q.mT, u)) + b).tanh()
        return u + times(Q, times(R, h)), log_det_of(R, S, h)

    def inverse(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        Q, R, S, b = self.matrices(features)
        t = times(Q.mT, z)
        h: list[Tensor] = []  # of the rows below, as y
        y: list[Tensor] = []
        for i in reversed(range(self.columns)):
            known, shift = t[..., i], b[..., i]
            if h:
                known = known - (R[..., i, i + 1 :] * torch.stack(h, -1)).sum(-1)
                shift = shift + (S[..., i, i + 1 :] * torch.stack(y, -1)).sum(-1)
            r, s = R[..., i, i], S[..., i, i]
            h.insert(0, root(r * s, s * known + shift).tanh())
            y.insert(0, known - r * h[0])
        all_h = torch.stack(h, -1)
        return z - times(Q, times(R, all_h)), log_det_of(R, S, all_h)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of matrices (*batch, A, B) and vectors (*batch, B), broadcast without a copy of the matrices."""
    return torch.einsum("...ab,...b->...a", matrix, vector)


def log_det_of(R: Tensor, S: Tensor, h: Tensor) -> Tensor:
    """log det of a Sylvester flow, where h = tanh(a): sum_i log (1 + R_ii S_ii (1 - h_i^2))."""
    products = R.diagonal(dim1=-2, dim2=-1) * S.diagonal(dim1=-2, dim2=-1)
    return torch.log1p(products * (1 - h.square())).sum(-1)


def orthonormal(raw: Tensor) -> Tensor:
    """M orthonormal columns of Z elements from any matrix (*batch, Z, M), which is V less the first columns of I.

    The product of the reflections I - 2 v v'/v'v of V's columns is I - V T V', with T^-1 the part of V'V above the
    diagonal and half of its diagonal.

    References:
        Joffrain et al. 2006, Accumulating Householder transformations, revisited, ACM TOMS 32
    """
    size, columns = raw.shape[-2:]
    eye = torch.eye(size, columns, dtype=raw.dtype, device=raw.device)
    V = raw + eye
    inner = V.mT @ V
    inverse_of_T = inner.triu(1) + torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1) / 2)
    return eye - V @ torch.linalg.solve_triangular(inverse_of_T, V[..., :columns, :].mT, upper=True)


def root(c: Tensor, s: Tensor) -> Tensor:
    """The a with a + c tanh(a) = s, for c > -1, element by element.

    Both sides are odd, so let s >= 0. For a >= 0 the left side is concave where c > 0, and convex where c < 0; and
    s - c, or 0, is on the side of the root from which Newton's steps go towards it and not past it. Sixteen digits take
    a dozen of them. The gradient is that of one more step: da = (ds - tanh(a) dc) /
    (1 + c tanh'(a)).
    """
    with torch.no_grad():
        target = s.abs()
        a = (target - c).clamp(min=0)
        for _ in range(NEWTON_STEPS):
            h = a.tanh()
            a = (a - (a + c * h - target) / (1 + c * (1 - h.square()))).clamp(min=0)
        a = a * s.sign()
        slope = 1 + c * (1 - a.tanh().square())
    return a - (a + c * a.tanh() - s) / slope


class Flowed(dist.TorchDistribution):
    r"""The distribution of z = m + s f(u; h), u ~ N(0, I): batch shape of m, event shape (Z,).

    A draw comes with its log-density, so that a pair, which asks for it next, does not invert the flow; of any other
    value it is found by f^-1. The mean has no closed form.

    Args:
        flow: f.
        loc: m, shape (*batch, Z).
        scale: s, shape (*batch, Z).
        features: h, shape (*batch, F), or None.
        batch_shape: To which the batch is expanded; None: that of m. Features and what a flow makes of them stay one
            for each datum.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        flow: Flow,
        loc: Tensor,
        scale: Tensor,
        features: Tensor | None = None,
        batch_shape: torch.Size | None = None,
    ) -> None:
        self.flow, self.loc, self.scale, self.features = flow, loc, scale, features
        # The last draw, its version in memory, whether its density has a gradient, and its density.
        self._drawn: tuple[Tensor, int, bool, Tensor] | None = None
        super().__init__(loc.shape[:-1] if batch_shape is None else batch_shape, loc.shape[-1:])

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Flowed":
        return Flowed(self.flow, self.loc, self.scale, self.features, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        u = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        y, log_det = self.flow(u, self.features)
        z = self.loc + self.scale * y
        self._drawn = (z, z._version, torch.is_grad_enabled(), self.log_density(u, log_det))
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z|h) of z (*batch, Z), in nats.

        Of the last draw it is that which came with it: as a function of the noise and the parameters, not of z. A draw
        that was detached, changed in place, or made without gradients which are now wanted, is another value.
        """
        if self._drawn is not None:
            z, version, differentiable, log_q = self._drawn
            if value is z and value._version == version and differentiable >= torch.is_grad_enabled():
                return log_q
        if self._validate_args:
            self._validate_sample(value)
        log_q = self.log_density(*self.flow.inverse((value - self.loc) / self.scale, self.features))
        return log_q.expand(torch.broadcast_shapes(log_q.shape, self.batch_shape))

    def log_density(self, u: Tensor, log_det: Tensor) -> Tensor:
        """log N(u; 0, I) - log det df/du - sum_d log s_d."""
        log_base = -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))
        return log_base - log_det - self.scale.log().sum(-1)

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError("the mean of a flow has no closed form; average draws")
