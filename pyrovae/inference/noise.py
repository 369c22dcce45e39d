r"""How noisy a gradient is: bias, variance and signal to noise of estimators of a bound's gradient.

Of D gradients g_d of the same rows, each by fresh noise, C elements of which are looked at,

    variance    mean over elements of s_c^2, the variance of g_c
    SNR         root mean square over elements of |E g_c| / sd g_c
    bias        |E (g - r)| / |E r|, with r the gradients of an unbiased estimator on the same noise

Plugged in, a mean of D draws gives signal to noise even where there is no signal: E (mean_c / s_c)^2 is
(D - 1)/(D - 3) (SNR_c^2 + 1/D). So 1/D is taken off, and a square that is then negative is called 0: the draws do not
show a signal. Of |E (g - r)|^2 the estimate without that floor is the product of the means of two halves.

Elements of one gradient depend on each other, so that t of many of them are no sample of t. The test of a bias is one
t, of the second half of the differences along their mean in the first, which is another sample.

References:
    Rainforth et al. 2018, Tighter Variational Bounds are Not Necessarily Better, https://arxiv.org/abs/1802.04537
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.objectives import Objective
from pyrovae.inference.pair import Pair
from pyrovae.inference.weights import drawn_sites, run, sample_sites
from pyrovae.seeding import derive_seed, reseed, same_noise

# Elements of the model's and of the guide's gradient that are looked at, chosen at random where there are more.
ELEMENTS = 200
REPLICATES = 200


@dataclass(frozen=True)
class Interval:
    """A number, and its 95 % bootstrap interval over draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Noise:
    """What repeated draws say of an estimator, for the elements that were looked at.

    Attributes:
        variance: Of an element of the gradient of the mean bound, per datum.
        snr: Signal to noise, without the floor.
        bias: Relative to the unbiased gradient; 0 where the halves do not agree on a direction.
        bias_t: Student's t of the bias: normal under none.
    """

    variance: Interval
    snr: Interval
    bias: float
    bias_t: float


def sides(pair: Pair, batch: Batch) -> dict[str, list[str]]:
    """The trainable parameters on which the guide's draws and densities depend, "guide", and the others, "model"."""
    named = pair.trainable()
    with torch.enable_grad(), same_noise(batch.x.device):
        sites = drawn_sites(sample_sites(run(pair.guide, "guide", batch, 1)))
        total = sum(site["fn"].log_prob(site["value"]).sum() + site["value"].sum() for site in sites.values())
    if not (isinstance(total, Tensor) and total.requires_grad):
        return {"model": list(named), "guide": []}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    of_guide = [name for name, gradient in zip(named, found, strict=True) if gradient is not None]
    return {"model": [name for name in named if name not in of_guide], "guide": of_guide}


def elements(pair: Pair, batch: Batch, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The places looked at: by side, for each parameter its elements, at most `ELEMENTS` on a side."""
    generator, named = torch.Generator().manual_seed(seed), pair.trainable()
    chosen: dict[str, dict[str, Tensor]] = {}
    for side, names in sides(pair, batch).items():
        sizes = [named[name].numel() for name in names]
        some = torch.randperm(sum(sizes), generator=generator)[:ELEMENTS].sort().values
        chosen[side], start = {}, 0
        for name, size in zip(names, sizes, strict=True):
            inside = some[(some >= start) & (some < start + size)] - start
            chosen[side] |= {name: inside.to(named[name].device)} if len(inside) else {}
            start += size
    return {side: places for side, places in chosen.items() if places}


def gradients(
    pair: Pair,
    batch: Batch,
    objective: Objective,
    places: dict[str, dict[str, Tensor]],
    draws: int,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Tensor]:
    """Gradients of the mean bound per datum, on noise that depends on the seed and the number of the draw alone.

    Returns:
        By side, shape (draws, elements), in double precision.

    Raises:
        PairError: the estimator is not for this pair.
    """
    if draws < 10:
        raise UsageError(f"draws: expected at least 10, got {draws}")
    named, device = pair.trainable(), batch.x.device
    parameters = [named[name] for of_side in places.values() for name in of_side]
    where = [place for of_side in places.values() for place in of_side.values()]
    found = []
    with same_noise(device), torch.enable_grad():
        for number in range(draws):
            reseed(derive_seed(seed, "gradients", number), device)
            bound = -objective.loss_of(pair, batch) / len(batch)
            slopes = torch.autograd.grad(bound, parameters, allow_unused=True)
            parts = [
                torch.zeros(len(place), device=device) if slope is None else slope.flatten()[place]
                for slope, place in zip(slopes, where, strict=True)
            ]
            found.append(torch.cat([part.double() for part in parts]).cpu())
            progress(number + 1)
    sizes = [sum(map(len, of_side.values())) for of_side in places.values()]
    return dict(zip(places, torch.stack(found).split(sizes, 1), strict=True))


def noise_of(found: Tensor, reference: Tensor, seed: int = 0) -> Noise:
    """What draws of shape (D, C) say of an estimator, beside those of an unbiased one on the same noise."""
    draws = len(found)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(draws, (REPLICATES, draws), generator=generator)
    weights = torch.zeros(REPLICATES, draws, dtype=torch.float64)
    weights.scatter_add_(1, chosen, torch.full_like(weights, 1 / draws))
    variance, snr = moments(found, torch.full((1, draws), 1 / draws, dtype=torch.float64), 1)
    variances, snrs = moments(found, weights, 2)  # a replicate has the errors of D draws twice
    bias, bias_t = bias_of(found, reference)
    return Noise(interval(variance, variances), interval(snr, snrs), bias, bias_t)


def moments(found: Tensor, weights: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Variance and SNR of weighted draws, one of each for every row of weights (B, D), drawn so many `times`."""
    draws = len(found)
    centre = found.mean(0)  # first, against cancellation
    mean = weights @ (found - centre)
    variance = (weights @ (found - centre).square() - mean.square()) * (draws / (draws - 1)) ** times
    moves = variance > 0
    squares = torch.where(moves, (mean + centre).square() / torch.where(moves, variance, 1.0), 0.0)
    squares = torch.where(moves, squares * ((draws - 3) / (draws - 1)) ** times - times / draws, 0.0)
    snr = (squares.sum(1) / moves.sum(1).clamp(min=1)).clamp(min=0).sqrt()
    return variance.mean(1), snr


def interval(value: Tensor, replicates: Tensor) -> Interval:
    """A value with the percentiles of its replicates."""
    low, high = replicates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value.item(), low, high)


def bias_of(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """The relative size of E (found - reference), and its t."""
    half = len(found) // 2
    difference = found - reference
    first, second = difference[:half].mean(0), difference[half:].mean(0)
    along = difference[half:] @ (first / first.norm().clamp(min=1e-300))
    # Below the rounding of what is subtracted, the two are the same.
    if difference.abs().max() <= 1e-5 * reference.abs().max():
        return 0.0, 0.0
    error = along.std() / math.sqrt(len(along))
    signal = (reference[:half].mean(0) @ reference[half:].mean(0)).clamp(min=0).sqrt()
    size = (first @ second).clamp(min=0).sqrt()
    return (size / signal).item() if signal > 0 else math.nan, (along.mean() / error).item()
