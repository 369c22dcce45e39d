r"""The parts of pairs, written by hand in plain torch, as one would who writes such a model alone and wants it fast.

Each function takes a part of pyrovae for its parameters, as plain torch modules and tensors, and gives what has to be
computed of it, with no Pyro and no distribution objects:

    prior        log p(z)                                               of z (*batch, Z)
    guide        z, log q(z|x), and the KL to N(0, I) where it is known  of x (N, *event), a `Draw`
    likelihood   log p(x|z)                                             of z (*batch, Z) and x (N, *event)
    bound        the loss, -bound summed over rows                      of what the other three give

One particle has no dimension: z is (N, Z) for K = 1 and (K, N, Z) otherwise. Noise is drawn in the order in which
pyrovae draws it, so that on one seed both give the same loss and the same gradient (`tests/test_steps_by_hand.py`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    linear,
    logsigmoid,
    one_hot,
    pad,
    silu,
    softplus,
)

LOG_2PI = math.log(2 * math.pi)
FLOOR = 1e-6  # of a guide's scale
Function = Callable[..., Any]


class Draw(NamedTuple):
    """What a guide gives: z, log q(z|x), KL(q || N(0, I)), log q with its parameters held, and these, or None."""

    z: Tensor
    log_q: Tensor | None
    kl: Tensor | None = None
    held: Tensor | None = None
    parameters: Any = None


# --------------------------------------------------------------------------------------------------------------- shared


def network(theirs: Any) -> Function:
    """The layers of a network, for inputs with any leading dimensions and vectors as events."""
    body, bias = theirs.body, getattr(theirs, "bias", None)

    def run(h: Tensor) -> Tensor:
        out = body(h) if h.ndim == 2 else body(h.flatten(0, -2)).unflatten(0, h.shape[:-1])
        return out if bias is None else out + bias

    return run


def features(theirs: Any) -> Function:
    """The features of x by an encoder that centres it, and the view that it may have; for any leading dimensions."""
    body, view, dims = theirs.encoder.body, theirs.encoder.view, len(theirs.event_shape)
    shift, rescale = theirs.shift, theirs.rescale
    seen = (lambda x: x) if view is None else VIEWS[type(view).__name__](view)

    def run(x: Tensor) -> Tensor:
        if x.ndim == 1 + dims:
            return body((seen(x) - shift) * rescale)
        return body((seen(x.flatten(0, -1 - dims)) - shift) * rescale).unflatten(0, x.shape[:-dims])

    return run


def head(theirs: Any) -> Function:
    """The parameters of a guide by its encoder and head."""
    features_of, last = features(theirs), theirs.head
    return lambda x: last(features_of(x))


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(z; loc, diag scale^2), summed over the last dimension."""
    return -(0.5 * ((z - loc) / scale).square() + scale.log()).sum(-1) - 0.5 * z.shape[-1] * LOG_2PI


def log_standard(z: Tensor) -> Tensor:
    """log N(z; 0, I)."""
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * LOG_2PI


def kl_standard(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, diag scale^2) || N(0, I))."""
    return 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)


def log_counts(view: Any) -> Function:
    """The logarithms of counts."""
    return lambda x: x.log1p()


def table_seen(view: Any) -> Function:
    """Standardised numbers, logarithms of counts, and one-hot classes."""
    numbers, counts, shift, spread = view.numbers, view.counts, view.shift, view.spread
    classes = list(view.classes.items())

    def see(x: Tensor) -> Tensor:
        plain = x[:, numbers]
        plain = torch.where(counts, plain.clamp(min=0).log1p(), plain)
        return torch.cat([(plain - shift) / spread, *(one_hot(x[:, i].long(), c).to(x) for i, c in classes)], -1)

    return see


def with_mask(view: Any) -> Function:
    """Medians in the gaps, and beside them which elements are seen."""
    fill, unit = view.fill, view.unit

    def see(x: Tensor) -> Tensor:
        gone = x != x
        return torch.cat([torch.where(gone, fill, x), (~gone).to(x) * unit], -1)

    return see


VIEWS = {"LogCounts": log_counts, "OfTable": table_seen, "WithMask": with_mask}


# --------------------------------------------------------------------------------------------------------------- priors


def standard_normal(prior: Any) -> Function:
    return log_standard


def isotropic_normal(prior: Any) -> Function:
    s = prior.scale
    return lambda z: -0.5 * (z / s).square().sum(-1) - z.shape[-1] * (math.log(s) + 0.5 * LOG_2PI)


def log_mixture(z: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log sum_c w_c N(z; m_c, diag s_c^2), with the components (C, Z)."""
    return (log_weights + log_normal(z.unsqueeze(-2), loc, scale)).logsumexp(-1)


def mixture_of_gaussians(prior: Any) -> Function:
    logits, loc, raw_scale, floor = prior.logits, prior.loc, prior.raw_scale, prior.floor
    return lambda z: log_mixture(z, logits.log_softmax(-1), loc, floor + softplus(raw_scale))


def vamp_prior(prior: Any) -> Function:
    parameters_of, pseudo_inputs = head(prior._guide[0]), prior.pseudo_inputs

    def log_p(z: Tensor) -> Tensor:
        loc, raw = parameters_of(pseudo_inputs).chunk(2, -1)
        return log_mixture(z, loc.new_tensor(-math.log(len(loc))), loc, softplus(raw) + FLOOR)

    return log_p


def hierarchical_vamp_prior(prior: Any) -> Function:
    below, above, pseudo_inputs = head(prior._guides[0]), head(prior._guides[1]), prior.pseudo_inputs

    def log_p(z: Tensor) -> Tensor:
        loc, raw = above(below(pseudo_inputs).chunk(2, -1)[0]).chunk(2, -1)
        return log_mixture(z, loc.new_tensor(-math.log(len(loc))), loc, softplus(raw) + FLOOR)

    return log_p


def flow_prior(prior: Any) -> Function:
    networks, kept = [network(net) for net in prior.networks], prior.kept

    def log_p(z: Tensor) -> Tensor:
        log_det = 0.0
        for net in reversed(networks):
            a, b = z.flip(-1).split([kept, z.shape[-1] - kept], -1)
            shift, log_scale = (0.1 * net(a)).unbind(-2)
            z = torch.cat([a, (b - shift) * (-log_scale).exp()], -1)
            log_det = log_det + log_scale.sum(-1)
        return log_standard(z) - log_det

    return log_p


def flowed_prior(prior: Any, inverse: Function) -> Function:
    """m + s f(u), by the inverses of the flows in f, the last one first: each gives u and log |du/dz|."""
    layers = [inverse(layer.flow) for layer in reversed(prior.flow.flows)]
    loc, log_scale = prior.loc, prior.log_scale

    def log_p(z: Tensor) -> Tensor:
        z, log_det = (z - loc) * (-log_scale).exp(), -log_scale.sum()
        for layer in layers:
            z, more = layer(z)
            log_det = log_det + more
        return log_standard(z) + log_det

    return log_p


def masked_autoregressive_prior(prior: Any) -> Function:
    return flowed_prior(prior, autoregressive)


def neural_spline_prior(prior: Any) -> Function:
    return flowed_prior(prior, coupling)


def autoregressive_prior(prior: Any) -> Function:
    net, means = made(prior.network), prior.loc
    start = math.sqrt(0.5) - 1e-3
    start = start + math.log(-math.expm1(-start))

    def log_p(z: Tensor) -> Tensor:
        logits, shift, raw = (0.1 * net(z)).chunk(3, -1)
        scale = 1e-3 + softplus(start + raw)
        e = (z.unsqueeze(-1) - means - shift) / scale
        each = logits.log_softmax(-1) - 0.5 * e.square() - scale.log() - 0.5 * LOG_2PI
        return each.logsumexp(-1).sum(-1)

    return log_p


def independent_bernoulli(prior: Any) -> Function:
    return lambda z: log_bits(z, prior.logits)


def categorical_prior(prior: Any) -> Function:
    return lambda z: (z * prior.logits.log_softmax(-1)).sum(-1)


def student_t_prior(prior: Any) -> Function:
    log_df, loc, raw = prior.log_df, prior.loc, prior.raw_scale

    def log_p(z: Tensor) -> Tensor:
        df, scale = log_df.exp(), softplus(raw)
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * math.pi).log()
        tails = torch.log1p(((z - loc) / scale).square() / df).sum(-1)
        return z.shape[-1] * constant - scale.log().sum() - (df + 1) / 2 * tails

    return log_p


def ornstein_uhlenbeck(prior: Any) -> Function:
    steps, log_length = (prior.steps, prior.width), prior.log_length

    def log_p(z: Tensor) -> Tensor:
        z = z.unflatten(-1, steps)
        rate = (-log_length).exp()
        log_scale = 0.5 * (-torch.expm1(-2 * rate)).log()
        e = (z[..., 1:, :] - (-rate).exp() * z[..., :-1, :]) * (-log_scale).exp()
        return log_standard(z[..., 0, :]) + log_standard(e.flatten(-2)) - (steps[0] - 1) * log_scale.sum()

    return log_p


def markov(prior: Any) -> Function:
    """m and log s of a step by a network of the one before."""
    net, widest = network(prior.network), prior.widest

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = (0.1 * net(z)).unbind(-2)
        return mean, widest * (log_scale / widest).tanh()

    return step


def gated_markov(prior: Any) -> Function:
    """m between a linear map and a network's, by a gate."""
    net, line, spread, widest = network(prior.network), prior.linear, prior.spread, prior.widest

    def step(z: Tensor) -> tuple[Tensor, Tensor]:
        logit, proposed = net(z).unbind(-2)
        gate = (logit - 2).sigmoid()
        return (1 - gate) * line(z) + gate * proposed, widest * (spread(proposed) / widest).tanh()

    return step


def of_steps(prior: Any, step: Function) -> Function:
    """log p(z) of a Gaussian process of steps, for all steps at once."""
    steps = (prior.steps, prior.width)

    def log_p(z: Tensor) -> Tensor:
        z = z.unflatten(-1, steps)
        mean, log_scale = step(z[..., :-1, :])
        e = (z[..., 1:, :] - mean) * (-log_scale).exp()
        return log_standard(z[..., 0, :]) + log_standard(e.flatten(-2)) - log_scale.sum((-2, -1))

    return log_p


def amortised_prior(prior: Any) -> Function:
    parameters_of = head(prior.conditional)

    def log_p(z: Tensor, y: Tensor) -> Tensor:
        loc, raw = parameters_of(y).chunk(2, -1)
        return log_normal(z, loc, softplus(raw) + FLOOR)

    return log_p


def conditional_vamp_prior(prior: Any) -> Function:
    parameters_of, pseudo_inputs, unit = head(prior._guide[0]), prior.pseudo_inputs, prior.unit

    def log_p(z: Tensor, y: Tensor) -> Tensor:
        components, rows = len(pseudo_inputs), len(y)
        inputs = torch.cat(
            [pseudo_inputs.expand(rows, -1, -1), (unit * y).unsqueeze(1).expand(-1, components, -1)], -1
        ).flatten(0, 1)
        loc, raw = parameters_of(inputs).unflatten(0, (rows, components)).chunk(2, -1)
        return log_mixture(z, loc.new_tensor(-math.log(components)), loc, softplus(raw) + FLOOR)

    return log_p


# ---------------------------------------------------------------------------------------------------------------- flows


def made(net: Any) -> Function:
    """The parameters of each element from those before it, (*batch, Z, P), by masked layers."""
    layers, features, shape = list(net.layers), net.features, (net.size, net.outputs)
    masks = [net.get_buffer(f"mask{i}") for i in range(len(layers))]

    def run(u: Tensor, h: Tensor | None = None) -> Tensor:
        out = linear(u, layers[0].weight * masks[0], layers[0].bias)
        out = out if features is None else out + features(h)
        for layer, mask in zip(layers[1:], masks[1:], strict=True):
            out = linear(silu(out), layer.weight * mask, layer.bias)
        return out.unflatten(-1, shape)

    return run


def autoregressive(flow: Any) -> Function:
    """An affine autoregressive flow and its log-determinant, with the order of the elements reversed."""
    net = made(flow.network)

    def run(u: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale = (0.1 * net(u, h)).unbind(-1)
        log_scale = 3 * (log_scale / 3).tanh()
        return (shift + log_scale.exp() * u).flip(-1), log_scale.sum(-1)

    return run


def coupling(flow: Any) -> Function:
    """A spline coupling: the first half by splines of the features alone, the second given the first half too."""
    net, bins, bound = flow.network, flow.monotone.bins, flow.monotone.bound
    layers, features, P = list(net.layers), net.features, net.outputs
    half = net.ends[0][1]
    ends = [end[0] for end in net.ends[1:-1]]  # hidden units that see features alone
    top = half * P

    def run(u: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = u[..., :half], u[..., half:]
        beside = layers[0].bias if features is None else layers[0].bias + features(h)
        alone, known = beside[..., : ends[0]], None
        given = linear(first, layers[0].weight[ends[0] :, :half]) + beside[..., ends[0] :]
        for i, layer in enumerate(layers[1:]):
            end = (*ends, top)[i + 1]
            before = ends[i]
            raw = silu(given)
            given = linear(raw, layer.weight[end:, before:], layer.bias[end:])
            if before:
                known = silu(alone)
                given = given + linear(known, layer.weight[end:, :before])
                alone = linear(known, layer.weight[:end, :before], layer.bias[:end])
            else:
                alone = layer.bias[:end]
        a, log_a = spline(first, 0.1 * alone.unflatten(-1, (half, P)), bins, bound)
        b, log_b = spline(second, 0.1 * given.unflatten(-1, (-1, P)), bins, bound)
        return torch.cat([a, b], -1).flip(-1), log_a.sum(-1) + log_b.sum(-1)

    return run


def spline(u: Tensor, raw: Tensor, bins: int, bound: float) -> tuple[Tensor, Tensor]:
    """A monotone rational-quadratic spline on [-bound, bound] of each element, and the logarithm of its slope."""
    widths, heights, slopes = raw.split([bins, bins, bins - 1], -1)
    x, y = (
        2 * bound * pad(((1 - 1e-3 * bins) * part.softmax(-1) + 1e-3).cumsum(-1), (1, 0)) - bound
        for part in (widths, heights)
    )
    slopes = pad(1e-3 + softplus(slopes + math.log(math.expm1(1 - 1e-3))), (1, 1), value=1.0)
    inside = u.clamp(-bound, bound)
    k = (inside.unsqueeze(-1) >= x[..., 1:-1]).sum(-1, keepdim=True)
    x, y, slopes = (t.expand(*k.shape[:-1], -1) for t in (x, y, slopes))
    x0, y0, d0 = (t.gather(-1, k).squeeze(-1) for t in (x, y, slopes))
    x1, y1, d1 = (t.gather(-1, k + 1).squeeze(-1) for t in (x, y, slopes))
    w, h = x1 - x0, y1 - y0
    s, e = h / w, (inside - x0) / w
    both = e * (1 - e)
    below = s + (d0 + d1 - 2 * s) * both
    log_slope = 2 * s.log() + (d1 * e.square() + 2 * s * both + d0 * (1 - e).square()).log() - 2 * below.log()
    z = y0 + h * (s * e.square() + d0 * both) / below
    return torch.where(inside == u, z, u), torch.where(inside == u, log_slope, 0.0)


def planar(flow: Any) -> Function:
    parameters_of, size = flow.parameters_of, flow.size

    def run(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        v, w, b = parameters_of(h).split([size, size, 1], -1)
        v = 0.1 * v
        along = (w * v).sum(-1, keepdim=True)
        v = v + (softplus(along + math.log(math.expm1(0.99))) - 0.99 - along) * w / w.square().sum(-1, keepdim=True)
        c = (w * v).sum(-1)
        t = ((w * u).sum(-1, keepdim=True) + b).tanh()
        return u + v * t, torch.log1p(c * (1 - t.squeeze(-1).square()))

    return run


def sylvester(flow: Any) -> Function:
    parameters_of, sizes, size, M = flow.parameters_of, flow.sizes, flow.size, flow.columns
    eye = torch.eye(size, M)

    def run(u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        vectors, above, r, s, b = parameters_of(h).split(sizes, -1)
        above, r, s = above.unflatten(-1, (M, M)), 0.99**0.5 * (0.1 * r).tanh(), 0.99**0.5 * (1 + s).tanh()
        R, S = (0.1 * above).triu(1) + torch.diag_embed(r), above.mT.triu(1) + torch.diag_embed(s)
        V = vectors.unflatten(-1, (size, M)) + eye
        T = V.mT @ V
        T = T.triu(1) + torch.diag_embed(T.diagonal(dim1=-2, dim2=-1) / 2)
        Q = eye - V @ torch.linalg.solve_triangular(T, V[..., :M, :].mT, upper=True)
        a = torch.einsum("...ij,...j->...i", S, torch.einsum("...ji,...j->...i", Q, u)) + b
        t = a.tanh()
        moved = torch.einsum("...ij,...j->...i", Q, torch.einsum("...ij,...j->...i", R, t))
        return u + moved, torch.log1p(r * s * (1 - t.square())).sum(-1)

    return run


# --------------------------------------------------------------------------------------------------------------- guides


def mean_field(guide: Any) -> Function:
    parameters_of = head(guide)

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        loc, raw = parameters_of(x).chunk(2, -1)
        scale = softplus(raw) + FLOOR
        e = torch.randn(*lead, *loc.shape)
        z = loc + scale * e
        log_q = -(0.5 * e.square() + scale.log()).sum(-1) - 0.5 * e.shape[-1] * LOG_2PI
        held = log_normal(z, loc.detach(), scale.detach())
        return Draw(z, log_q, kl_standard(loc, scale), held, (loc, scale))

    return draw


def full_covariance(guide: Any) -> Function:
    parameters_of, Z, rows, columns = head(guide), guide.latent_dim, guide.rows, guide.columns

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        loc, raw, below = parameters_of(x).split([Z, Z, len(rows)], -1)
        scale = softplus(raw) + FLOOR
        L = torch.diag_embed(scale)
        L[..., rows, columns] = below
        e = torch.randn(*lead, *loc.shape)
        log_det = scale.log().sum(-1)
        kl = 0.5 * (scale.square().sum(-1) + below.square().sum(-1) + loc.square().sum(-1) - Z) - log_det
        return Draw(loc + (L @ e.unsqueeze(-1)).squeeze(-1), log_standard(e) - log_det, kl)

    return draw


def low_rank(guide: Any) -> Function:
    parameters_of, Z, rank = head(guide), guide.latent_dim, guide.rank

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        loc, raw, factor = parameters_of(x).split([Z, Z, rank * Z], -1)
        F, variance = 0.1 * factor.unflatten(-1, (Z, rank)), (softplus(raw) + FLOOR).square()
        a, b = torch.randn(*lead, len(x), rank), torch.randn(*lead, *loc.shape)
        z = loc + (F @ a.unsqueeze(-1)).squeeze(-1) + variance.sqrt() * b
        inner = torch.linalg.cholesky(torch.eye(rank) + F.mT @ (F / variance.unsqueeze(-1)))
        log_det = variance.log().sum(-1) + 2 * inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        trace = F.square().sum((-2, -1)) + variance.sum(-1)
        return Draw(z, None, 0.5 * (trace + loc.square().sum(-1) - Z - log_det))

    return draw


def mixture_of_normals(guide: Any) -> Function:
    parameters_of, C, Z = head(guide), guide.components, guide.latent_dim

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        loc, raw, logits = parameters_of(x).split([C * Z, C * Z, C], -1)
        loc, scale = loc.unflatten(-1, (C, Z)), softplus(raw.unflatten(-1, (C, Z))) + FLOOR
        with torch.no_grad():
            p = logits.softmax(-1).expand(*lead, -1, -1).flatten(0, -2)
            chosen = torch.multinomial(p, 1, True).view(*lead, len(x), 1, 1).expand(*lead, -1, -1, Z)
            m, s = (t.expand(*lead, -1, -1, -1).gather(-2, chosen).squeeze(-2) for t in (loc, scale))
            z = m + s * torch.randn_like(m)
        z = z - quantiles_held(z, loc, scale, logits)
        return Draw(z, (logits.log_softmax(-1) + log_normal(z.unsqueeze(-2), loc, scale)).logsumexp(-1))

    return draw


def quantiles_held(z: Tensor, loc: Tensor, scale: Tensor, logits: Tensor) -> Tensor:
    """Zero, whose gradient is that by which z moves if its quantiles are held, one element after the other."""
    e = (z.unsqueeze(-2) - loc) / scale
    log_n = -0.5 * e.square() - scale.log()
    w = (logits.unsqueeze(-1) + log_n.cumsum(-1) - log_n).softmax(-2)
    phi = torch.special.ndtr(e)
    F = (w * phi).sum(-2)
    with torch.no_grad():
        f = (w * (log_n - 0.5 * LOG_2PI).exp()).sum(-2).clamp(min=torch.finfo(z.dtype).tiny)
        J = ((w * (phi - F.unsqueeze(-2))).mT @ (-e / scale)) / f.unsqueeze(-1)
    moved = ((F - F.detach()) / f).unsqueeze(-1)
    return torch.linalg.solve_triangular(J, moved, upper=False, unitriangular=True).squeeze(-1)


def semi_amortised(guide: Any, log_joint: Function) -> Function:
    parameters_of, points, steps, rate = head(guide), guide.points, guide.steps, guide.rate

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        loc, raw = parameters_of(x).chunk(2, -1)
        scale = softplus(raw) + FLOOR
        e, Z = points.unsqueeze(1), loc.shape[-1]
        slope_of = torch.func.grad(lambda z: log_joint(z, x).sum())
        for _ in range(steps):
            s = scale.detach()
            r = s * slope_of(loc.detach() + s * e).detach() + e
            g_m, g_s = (
                g * (Z**0.5 / g.square().sum(-1, keepdim=True).clamp(min=1.0).sqrt()).clamp(max=1)
                for g in (r.mean(0), (r * e).mean(0))
            )
            loc, scale = loc + rate * s * g_m, scale * (rate * g_s).exp()
        noise = torch.randn(*lead, *loc.shape)
        log_q = log_standard(noise) - scale.log().sum(-1)
        return Draw(loc + scale * noise, log_q, kl_standard(loc, scale))

    return draw


def flowed_guide(guide: Any, made_of: Function) -> Function:
    features_of, last, layers = features(guide), guide.head, [made_of(flow) for flow in guide.flow.flows]

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        h = features_of(x)
        loc, raw = last(h).chunk(2, -1)
        scale = softplus(raw) + FLOOR
        u = torch.randn(*lead, *loc.shape)
        log_q = log_standard(u) - scale.log().sum(-1)
        for layer in layers:
            u, log_det = layer(u, h)
            log_q = log_q - log_det
        return Draw(loc + scale * u, log_q)

    return draw


def log_bits(z: Tensor, logits: Tensor) -> Tensor:
    """log p of bits, summed over the last dimension."""
    return -binary_cross_entropy_with_logits(logits.expand_as(z), z, reduction="none").sum(-1)


def kl_bits(q: Tensor, p: Tensor) -> Tensor:
    """KL of independent bits with these logits, summed over the last dimension."""
    return (q.sigmoid() * (q - p) + logsigmoid(-q) - logsigmoid(-p)).sum(-1)


def bernoulli_guide(guide: Any) -> Function:
    parameters_of = head(guide)

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        logits = parameters_of(x)
        z = torch.bernoulli(logits.detach().sigmoid().expand(*lead, *logits.shape))
        return Draw(z, log_bits(z, logits), parameters=logits)

    return draw


def markov_guide(guide: Any) -> Function:
    """Steps of whole sequences: a recurrent network backwards, whose message is multiplied with the prior's step."""
    features_of, inputs, recurrent, last, T = (
        features(guide),
        guide.inputs,
        guide.recurrent,
        guide.head,
        guide.prior.steps,
    )
    step = STEPS[type(guide.prior).__name__](guide.prior)

    def draw(x: Tensor, lead: tuple[int, ...]) -> Draw:
        seen = inputs(features_of(x).unflatten(-1, (-1, T)).mT)
        h, messages = torch.zeros(len(x), last.in_features), []
        for t in reversed(range(T)):
            a, b, c = seen[:, t].chunk(3, -1)
            r, k, n = recurrent(h).chunk(3, -1)
            keep = (b + k).sigmoid()
            h = keep * h + (1 - keep) * (c + (a + r).sigmoid() * n).tanh()
            messages.append(h)
        loc, raw = last(torch.stack(messages[::-1], 1)).chunk(2, -1)
        precision = softplus(raw)
        noise = torch.randn(*lead, len(x), T * loc.shape[-1]).unflatten(-1, (T, -1))
        z, log_scales = [], []
        for t in range(T):
            mean, log_scale = step(z[-1]) if t else (torch.zeros_like(noise[..., 0, :]),) * 2
            ratio = (2 * log_scale).exp() * precision[:, t]
            mean, log_scale = mean + ratio / (1 + ratio) * (loc[:, t] - mean), log_scale - 0.5 * ratio.log1p()
            z.append(mean + log_scale.exp() * noise[..., t, :])
            log_scales.append(log_scale)
        log_q = log_standard(noise.flatten(-2)) - torch.cat(log_scales, -1).sum(-1)
        return Draw(torch.cat(z, -1), log_q)

    return draw


STEPS: dict[str, Function] = {"Markov": markov, "GatedMarkov": gated_markov}
GUIDES: dict[str, Function] = {
    "MeanFieldNormal": mean_field,
    "FullCovarianceNormal": full_covariance,
    "LowRankNormal": low_rank,
    "MixtureOfNormals": mixture_of_normals,
    "InverseAutoregressiveFlow": lambda guide: flowed_guide(guide, autoregressive),
    "SplineFlow": lambda guide: flowed_guide(guide, coupling),
    "PlanarFlow": lambda guide: flowed_guide(guide, planar),
    "SylvesterFlow": lambda guide: flowed_guide(guide, sylvester),
    "BernoulliGuide": bernoulli_guide,
    "MarkovGuide": markov_guide,
}
PRIORS: dict[str, Function] = {
    "StandardNormal": standard_normal,
    "IsotropicNormal": isotropic_normal,
    "MixtureOfGaussians": mixture_of_gaussians,
    "VampPrior": vamp_prior,
    "FlowPrior": flow_prior,
    "MaskedAutoregressivePrior": masked_autoregressive_prior,
    "NeuralSplinePrior": neural_spline_prior,
    "AutoregressivePrior": autoregressive_prior,
    "IndependentBernoulli": independent_bernoulli,
    "CategoricalPrior": categorical_prior,
    "StudentTPrior": student_t_prior,
    "HierarchicalVampPrior": hierarchical_vamp_prior,
    "OrnsteinUhlenbeck": ornstein_uhlenbeck,
    "Markov": lambda prior: of_steps(prior, markov(prior)),
    "GatedMarkov": lambda prior: of_steps(prior, gated_markov(prior)),
    "AmortisedPrior": amortised_prior,
    "ConditionalVampPrior": conditional_vamp_prior,
}


# ---------------------------------------------------------------------------------------------------------- likelihoods


def total(each: Tensor, x: Tensor) -> Tensor:
    """The sum over the event of x (N, *event), of log p of each element."""
    return each.sum(tuple(range(1 - x.ndim, 0)))


def bernoulli(p: Any) -> Function:
    decoder = network(p.decoder)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        logits, bits = torch.broadcast_tensors(decoder(z), x)
        return total(-binary_cross_entropy_with_logits(logits, bits, reduction="none"), x)

    return log_p


def of_scale(p: Any, log_density: Function) -> Function:
    """A family of a location and a scale: `log_density(x, location, scale, log scale)` of each element."""
    decoder, unit, floor, dims = network(p.decoder), p.unit, p.floor, len(p.event_shape)
    raw_scale = getattr(p, "raw_scale", None)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        out = decoder(z)
        loc, raw = (out, raw_scale) if raw_scale is not None else out.unbind(-1 - dims)
        scale = unit * (floor + softplus(raw))
        return total(log_density(x, unit * loc, scale, scale.log()), x)

    return log_p


def gaussian(p: Any) -> Function:
    return of_scale(p, lambda x, m, s, log_s: -0.5 * ((x - m) / s).square() - log_s - 0.5 * LOG_2PI)


def laplace(p: Any) -> Function:
    return of_scale(p, lambda x, m, s, log_s: -(x - m).abs() / s - log_s - math.log(2))


def student_t(p: Any) -> Function:
    df = p.df
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return of_scale(
        p, lambda x, m, s, log_s: constant - log_s - (df + 1) / 2 * torch.log1p(((x - m) / s).square() / df)
    )


def log_normal_elements(p: Any) -> Function:
    def log_density(x: Tensor, m: Tensor, s: Tensor, log_s: Tensor) -> Tensor:
        log_x = x.clamp(min=torch.finfo(x.dtype).tiny).log()
        return -0.5 * ((log_x - m) / s).square() - log_s - 0.5 * LOG_2PI - log_x

    return of_scale(p, log_density)


def beta(p: Any) -> Function:
    decoder, dims = network(p.decoder), len(p.event_shape)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        a, b = (0.01 + softplus(decoder(z))).unbind(-1 - dims)
        eps = torch.finfo(x.dtype).eps
        x = x.clamp(eps**2, 1 - eps / 2)
        each = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + (a - 1) * x.log() + (b - 1) * (1 - x).log()
        return total(each, x)

    return log_p


def continuous_bernoulli(p: Any) -> Function:
    decoder = network(p.decoder)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        eta = decoder(z)
        h = eta.abs() / 2
        near = h < 0.1
        far, square = torch.where(near, 1.0, h), torch.where(near, h, 0.0).square()
        series = square / 6 - square**2 / 180 + square**3 / 2835
        log_sinhc = torch.where(near, series, far + torch.log1p(-torch.exp(-2 * far)) - torch.log(2 * far))
        return total(eta * (x - 0.5) - log_sinhc, x)

    return log_p


def log_logistic(x: Tensor, loc: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The log mass of a logistic density at levels, the tails at the ends."""
    rate = 1 / scale
    above = (x + 0.5 - loc) * rate
    first, last = x <= 0, x >= levels - 1
    width = torch.log(-torch.expm1(-rate))
    return (
        torch.where(last, 0.0, logsigmoid(above))
        + torch.where(first, 0.0, logsigmoid(rate - above))
        + torch.where(first | last, 0.0, width)
    )


def discretized_logistic(p: Any) -> Function:
    levels = p.levels
    return of_scale(p, lambda x, m, s, log_s: log_logistic(x, m, s, levels))


def discretized_logistic_mixture(p: Any) -> Function:
    decoder, unit, levels = network(p.decoder), p.unit, p.levels

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        logits, loc, raw = decoder(z).unbind(-2 - (x.ndim - 1))  # each (*batch, C, *event)
        scale, over = unit * (1e-3 + softplus(raw)), -x.ndim
        each = logits + log_logistic(x.unsqueeze(1), unit * loc, scale, levels)
        return total(each.logsumexp(over) - logits.logsumexp(over), x)

    return log_p


def categorical(p: Any) -> Function:
    decoder = network(p.decoder)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        logits, over = decoder(z), -x.ndim
        index = x.long().expand(*z.shape[:-1], *x.shape[1:]).unsqueeze(over)
        return total(logits.gather(over, index).squeeze(over) - logits.logsumexp(over), x)

    return log_p


def poisson(p: Any) -> Function:
    decoder = network(p.decoder)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        log_mean = decoder(z)
        return total(x * log_mean - log_mean.exp() - torch.lgamma(x + 1), x)

    return log_p


def log_negative_binomial(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """log p of each count, with parameters that broadcast."""
    theta, logits = log_theta.exp(), log_mean - log_theta
    counts = torch.lgamma(theta + x) - torch.lgamma(1 + x) - torch.lgamma(theta)
    return counts + theta * logsigmoid(-logits) + x * logsigmoid(logits)


def negative_binomial(p: Any) -> Function:
    decoder, log_theta = network(p.decoder), p.log_theta
    return lambda z, x: total(log_negative_binomial(x, decoder(z), log_theta), x)


def zero_inflated_negative_binomial(p: Any) -> Function:
    decoder, log_theta, dims = network(p.decoder), p.log_theta, len(p.event_shape)

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        log_mean, gate = decoder(z).unbind(-1 - dims)
        of_counts = log_negative_binomial(x, log_mean, log_theta) + logsigmoid(-gate)
        return total(torch.where(x == 0, torch.logaddexp(logsigmoid(gate), of_counts), of_counts), x)

    return log_p


def columns(p: Any) -> Function:
    """A table: Gaussians of standardised columns, bits, negative binomials and categories, of slices of one output."""
    decoder, loc, unit, sizes = network(p.decoder), p.loc, p.unit, p.sizes
    groups = [(type(part).__name__, part, group.at) for part, group in zip(p.parts, p.groups, strict=True)]

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        log_prob = 0.0
        for (kind, part, at), out in zip(groups, decoder(z).split(sizes, -1), strict=True):
            value, bias = x[:, at], part.decoder.bias
            out = out.unflatten(-1, bias.shape) + bias
            if kind == "Gaussian":
                scale = part.floor + softplus(part.raw_scale)
                each = -0.5 * (((value - loc[at]) / unit[at] - out) / scale).square() - (scale * unit[at]).log()
                each = each - 0.5 * LOG_2PI
            elif kind == "Bernoulli":
                each = -binary_cross_entropy_with_logits(out, value.expand_as(out), reduction="none")
            elif kind == "NegativeBinomial":
                each = log_negative_binomial(value, out, part.log_theta)
            else:
                index = value.long().expand(out.shape[:-1]).unsqueeze(-1)
                each = out.log_softmax(-1).gather(-1, index).squeeze(-1)
            log_prob = log_prob + each.sum(-1)
        return log_prob

    return log_p


def partly_seen_gaussian(p: Any) -> Function:
    """A Gaussian of what is seen: NaN is missing."""
    whole, fill = p.whole, p.fill

    def log_p(z: Tensor, x: Tensor) -> Tensor:
        gone = x != x
        value, scale = torch.where(gone, fill, x), whole.unit * (whole.floor + softplus(whole.raw_scale))
        each = -0.5 * ((value - whole.unit * decoder(z)) / scale).square() - scale.log() - 0.5 * LOG_2PI
        return total(each.masked_fill(gone, 0.0), x)

    decoder = network(whole.decoder)
    return log_p


LIKELIHOODS: dict[str, Function] = {
    "Bernoulli": bernoulli,
    "Gaussian": gaussian,
    "ContinuousBernoulli": continuous_bernoulli,
    "Laplace": laplace,
    "StudentT": student_t,
    "Beta": beta,
    "LogNormal": log_normal_elements,
    "DiscretizedLogistic": discretized_logistic,
    "DiscretizedLogisticMixture": discretized_logistic_mixture,
    "Categorical": categorical,
    "NegativeBinomial": negative_binomial,
    "Poisson": poisson,
    "ZeroInflatedNegativeBinomial": zero_inflated_negative_binomial,
    "Columns": columns,
    "PartlySeen": partly_seen_gaussian,
}
