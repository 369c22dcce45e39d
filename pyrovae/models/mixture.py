r"""Mixtures of Gaussians and of Bernoullis, whose log p(x) is exact.

A mixture is the latent variable model whose latent is one of C values, so nothing has to be estimated:

    p(x) = sum_c w_c p(x | c),     log p(x) = logsumexp_c [ log w_c + log p(x | c) ]

with p(x | c) = N(x; mu_c, Sigma_c) for real data, prod_d Bernoulli(x_d; pi_cd) for binary data. As a Pyro model the
assignment is a site `c` enumerated in parallel and the guide is empty, so `TraceEnum_ELBO(max_plate_nesting=1)` is
exactly -sum_n log p(x_n).

EM climbs the same log p(x) without a step size. With responsibilities r_nc = p(c | x_n), proportional to
w_c p(x_n | c), Jensen's inequality bounds log p(x) from below by an expected log-likelihood, with equality at the
current parameters. Its maximiser is the M step, with N_c = sum_n r_nc:

    w_c = N_c / N      mu_c = (1/N_c) sum_n r_nc x_n      pi_c = mu_c
    S_c = (1/N_c) sum_n r_nc (x_n - mu_c)(x_n - mu_c)^T

    full  Sigma_c = S_c     diagonal  diag(S_c)     spherical  (tr(S_c) / D) I     tied  sum_c (N_c / N) S_c

Rows may have gaps, NaN where an element is missing: then log p(x) is that of what is seen, p(x_seen | c) in the place
of p(x | c), and EM climbs it. Independent elements that are missing are left out of both steps, N_c being a number for
each element; a full or tied covariance takes E[x | x_seen, c] and Cov[x | x_seen, c] at the current parameters in the
place of x and of 0 (`pyrovae.models.seen.Gaps`).

Parameters are unconstrained, so that a gradient step is as lawful as an EM step: w is the softmax of `mixing_logits`,
and a full or tied Sigma = L L^T with L = diag(exp(log_scale)) (I + strictly lower triangle of `unit_lower`), whose rows
carry their scale apart because pixels differ in scale by a thousandfold. The floors act in the M step only; training by
gradient is not held by them.

EM runs in float64 whatever the dtype of the module, since covariances of images are too ill-conditioned for float32.
`log_prob` and `model` compute in the module's dtype; float32 keeps six or seven digits of log p(x).

References:
    Dempster, Laird and Rubin 1977, Maximum Likelihood from Incomplete Data via the EM Algorithm.
    Bishop 2006, Pattern Recognition and Machine Learning, chapter 9.
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ReshapeTransform
from torch.nn import functional as F

from pyrovae.errors import DataError, NumericalError, UsageError
from pyrovae.models.exact import RELATIVE_FLOOR, Exact, each_of, has_gaps
from pyrovae.models.gaps import OfSeen
from pyrovae.models.seen import Conditional, Gaps, gaussian_parts, mixture_given
from pyrovae.settings import Count, NotNegative, Number, Whole, check, checked

Covariance = Literal["full", "diagonal", "tied", "spherical"]
Weights = Literal["trainable", "uniform"]

# A component responsible for less than this many rows is empty: its mean would be noise.
EMPTY = 1e-12
# Numbers in the largest temporary of an E step: 8 MiB of float64.
CHUNK = 2**20


class Mixture(Exact):
    """C components on one event shape, with weights that are trained or held equal.

    A subclass gives the components (`component`, `component_log_prob`) and their M step (`_fit_components`); the
    Pyro pair, log p(x), sampling, the k-means start and EM are written here, once.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of components, C.
        weights: Mixing weights: "trainable", or "uniform" to hold each at 1/C.
    Raises:
        UsageError: An argument outside its range or choices; the message names them.
    """

    word = "mixture"
    tolerance: ClassVar[float]  # of `fit`: least gain of an iteration in nats per datum and dimension
    support: ClassVar[constraints.Constraint]  # of one number of x
    mixing_logits: Tensor
    means: Tensor  # of p(x | c), shape (C, *event)
    covariances: Tensor  # of Gaussians p(x | c), shape (C, D, D)

    @checked
    def __init__(self, event_shape: int | Sequence[int], components: Count, weights: Weights) -> None:
        super().__init__(event_shape)
        self.components = components
        equal = torch.zeros(components)
        if weights == "trainable":
            self.mixing_logits = nn.Parameter(equal)
        else:
            self.register_buffer("mixing_logits", equal)

    @abstractmethod
    def component(self, c: Tensor) -> dist.TorchDistribution:
        """p(x | c) for integer c of any shape: batch shape that of c, event shape that of x."""

    @abstractmethod
    def component_log_prob(self, x: Tensor) -> Tensor:
        """log p(x | c) in nats for every row and component, shape (N, C)."""

    @abstractmethod
    def _fit_components(self, x: Tensor, responsibilities: Tensor, chunk: int) -> None:
        """Maximise sum_nc r_nc log p(x_n | c) in place, over `chunk` rows at a time; called in float64."""

    @classmethod
    def most_components(cls, x: Tensor) -> int:
        """As many as rows."""
        return len(x)

    @classmethod
    def fitted(
        cls, x: Tensor, validation: Tensor, components: Sequence[int], seed: int = 0
    ) -> Iterator[tuple[Self, int]]:
        """One for each number of components."""
        return each_of(cls, x, components, seed)

    @property
    def weights(self) -> Tensor:
        """Mixing weights w, shape (C,), summing to 1."""
        return self.mixing_logits.softmax(-1)

    def model(self, x: Tensor) -> None:
        """Pyro model: sites `c`, enumerated in parallel, and `x`, observed, in the plate `data`."""
        x = self._rows(x)
        with pyro.plate("data", len(x)):
            assignment = dist.Categorical(logits=self.mixing_logits)
            c = pyro.sample("c", assignment, infer={"enumerate": "parallel"})
            pyro.sample("x", self.component(c), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log p(x); differentiable.

        Keeps about N * C * D numbers for the gradient: pass many images in batches.

        Args:
            x: Data, shape (N, *event), NaN where an element is missing; taken to the dtype and device of the
                parameters.
        Returns:
            log p(x) in nats, of what is seen of each row, shape (N,).
        Raises:
            UsageError: x does not have the mixture's event shape.
            DataError: x is outside the support.
        """
        self._check(x)
        return self._joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(c | x), shape (N, C), rows summing to 1; arguments and errors as `log_prob`."""
        self._check(x)
        return self._joint(x).softmax(-1)

    @torch.no_grad()
    def sample(self, num_samples: int, mean: bool = False) -> Tensor:
        """Draws of x from p(x): a component c by its weight, then x from p(x | c), with torch's random state.

        Args:
            num_samples: How many, at least 1.
            mean: The mean of p(x | c) for each c in place of a draw.

        Returns:
            Shape (num_samples, *event).

        Raises:
            UsageError: num_samples is no whole number of at least 1.
        """
        check("num_samples", num_samples, Whole(1))
        c = dist.Categorical(logits=self.mixing_logits).sample((num_samples,))
        if mean:
            return self.means[c]
        x = self.mixing_logits.new_empty(num_samples, *self.event_shape)
        # One component at a time: indexing by all of c would copy a (D, D) factor for every draw.
        for k in c.unique():
            rows = c == k
            x[rows] = self.component(k).sample((int(rows.sum()),))
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor, seed: int = 0) -> None:
        """Start from k-means, the start of scikit-learn's mixtures: hard assignments, then one M step.

        With one component this is the maximum likelihood fit: the sample mean and covariance (plus the floor). Gaps are
        filled with the medians of their elements for k-means.

        Args:
            x: Data, shape (N, *event), N at least C; NaN where an element is missing.
            seed: Of k-means alone; the global random states of torch and NumPy are left as they are.
        Raises:
            UsageError: x does not have the mixture's event shape, or has fewer rows than components.
            DataError: x is outside the support.
            NumericalError: A covariance is singular; a positive floor prevents it.
        """
        from sklearn.cluster import KMeans

        self._check(x, fitting=True)
        points = self.points(x.detach()).cpu()
        labels = KMeans(self.components, n_init=1, random_state=seed).fit_predict(points.numpy())
        hard = F.one_hot(torch.from_numpy(labels).long(), self.components)
        exact = copy.deepcopy(self).double()
        if has_gaps(x):
            exact._forget(x)
        exact._maximise(x, hard.to(exact.mixing_logits), self._chunk(None))
        self.load_state_dict(exact.state_dict())

    def fit(self, x: Tensor, seed: int = 0, validation: Tensor | None = None) -> int:
        """Start from k-means and climb by EM until an iteration gains far less than models differ by, or 50 of them.

        Arguments and errors as those of `initialise` and `em`; `validation` is not used.

        Returns:
            How many iterations it took.
        """
        self.initialise(x, seed)
        return len(self.em(x, max_iterations=50, tolerance=self.event_numel * self.tolerance)) - 1

    @torch.no_grad()
    def em(
        self, x: Tensor, max_iterations: int = 100, tolerance: float = 1e-3, batch_size: int | None = None
    ) -> list[float]:
        """Fit by expectation maximisation on all of x, from the current parameters; call `initialise` first.

        Stops when an iteration gains less than `tolerance`. An iteration that would lose, which rounding and the
        floor make possible near the end, is undone and ends the run; so the values returned never decrease, and the
        last one belongs to the parameters left behind. A component that is responsible for no row keeps its
        parameters and loses its weight.

        Args:
            x: Data, shape (N, *event), N at least C; NaN where an element is missing.
            max_iterations: Most M steps to take.
            tolerance: Least gain in nats per datum that is worth another iteration.
            batch_size: Rows per chunk, which bounds memory and changes nothing else; by default 8 MiB worth.
        Returns:
            Mean log p(x) in nats per datum, at the start and after each iteration.
        Raises:
            UsageError: x does not have the mixture's event shape, or has fewer rows than components; an argument
                is out of range.
            DataError: x is outside the support.
            NumericalError: A covariance is singular, or log p(x) is not finite.
        """
        self._check(x, fitting=True)
        if max_iterations < 1:
            raise UsageError(f"max_iterations: expected at least 1, got {max_iterations}; pass 1 or more")
        chunk = self._chunk(batch_size)
        exact = copy.deepcopy(self).double()
        history: list[float] = []
        for iteration in range(max_iterations + 1):
            value, responsibilities = exact._expect(x, chunk)
            if not math.isfinite(value):
                raise NumericalError(
                    f"em: expected a finite mean log p(x), got {value} after {iteration} iterations; "
                    "check x for extreme values, or raise floor"
                )
            gain = value - history[-1] if history else math.inf
            if gain < 0:
                break
            self.load_state_dict(exact.state_dict())
            history.append(value)
            if gain < tolerance or iteration == max_iterations:
                break
            exact._maximise(x, responsibilities, chunk)
        return history

    def points(self, x: Tensor) -> Tensor:
        """Rows x (N, *event) as the points that k-means starts from, (N, P): their elements, medians in the gaps."""
        flat = x.reshape(len(x), -1)
        flat = flat if flat.is_floating_point() else flat.float()
        return flat.where(~flat.isnan(), flat.nanmedian(0).values.nan_to_num(0.0)) if has_gaps(flat) else flat

    def _forget(self, x: Tensor) -> None:
        """Before a first M step on rows with gaps: parameters by which what is missing is like what is seen.

        None, where an M step does not depend on the parameters that it starts from.
        """

    def _joint(self, x: Tensor) -> Tensor:
        """log p(x, c) in nats, shape (N, C)."""
        return self.mixing_logits.log_softmax(-1) + self.component_log_prob(self._rows(x))

    def _expect(self, x: Tensor, chunk: int) -> tuple[float, Tensor]:
        """The E step: mean log p(x), and the responsibilities, shape (N, C)."""
        joint = torch.cat([self._joint(rows) for rows in x.split(chunk)])
        log_prob = joint.logsumexp(-1, keepdim=True)
        return float(log_prob.mean()), (joint - log_prob).exp()

    def _maximise(self, x: Tensor, responsibilities: Tensor, chunk: int) -> None:
        """The M step, in place."""
        if isinstance(self.mixing_logits, nn.Parameter):
            # The logit of an empty component stays finite: weight decay would turn -inf into NaN.
            smallest = torch.finfo(torch.float32).tiny
            self.mixing_logits.copy_(responsibilities.mean(0).clamp_min(smallest).log())
        self._fit_components(x, responsibilities, chunk)

    def _counts(self, x: Tensor, responsibilities: Tensor, chunk: int) -> Tensor:
        """N_c, shape (C, 1); of rows with gaps for each element, shape (C, D): over the rows in which it is seen."""
        if not has_gaps(x):
            return responsibilities.sum(0).unsqueeze(-1)
        pairs = zip(x.split(chunk), responsibilities.split(chunk), strict=True)
        return sum((r.T @ (~rows.flatten(1).isnan()).to(r) for rows, r in pairs), start=torch.zeros(()))

    def _means(self, x: Tensor, responsibilities: Tensor, counts: Tensor, chunk: int) -> Tensor:
        """sum_n r_nc x_n / N_c over what is seen, shape (C, D); meaningless where a component is empty."""
        total = counts.new_zeros(self.components, self.event_numel)
        for rows, r in zip(x.split(chunk), responsibilities.split(chunk), strict=True):
            total += r.T @ self._rows(rows).flatten(1).nan_to_num(0.0)
        return total / counts.clamp_min(EMPTY)

    def _center(self, x: Tensor, responsibilities: Tensor, chunk: int, dense: bool) -> tuple[Tensor, Tensor]:
        """Set the means; return N_c, (C, 1) or (C, D), and N_c S_c about them.

        Of Gaussians of dense covariances all of S_c, (C, D, D), with what these expect in the gaps of rows; of others
        its diagonal, (C, D), and gaps are left out.
        """
        if dense and has_gaps(x):
            counts = responsibilities.sum(0).unsqueeze(-1)
            away, second = expected(self._rows(x), responsibilities, self.means, self.covariances)
            away = away / counts.clamp_min(EMPTY)
            overwrite(self.means, self.means.flatten(1) + away, counts > EMPTY)
            return counts, second - counts.unsqueeze(-1) * away.unsqueeze(2) * away.unsqueeze(1)
        counts = self._counts(x, responsibilities, chunk)
        overwrite(self.means, self._means(x, responsibilities, counts, chunk), counts > EMPTY)
        return counts, self._scatter(x, responsibilities, chunk, dense)

    def _scatter(self, x: Tensor, responsibilities: Tensor, chunk: int, dense: bool) -> Tensor:
        """N_c S_c about the current means: (C, D, D), or its diagonal (C, D) where no more is needed."""
        C, D = self.components, self.event_numel
        means = self.means.flatten(1)
        total = means.new_zeros((C, D, D) if dense else (C, D))
        for rows, r in zip(x.split(chunk), responsibilities.split(chunk), strict=True):
            flat = self._rows(rows).flatten(1)
            for c in range(C):
                # Between images most responsibilities underflow to zero; such rows add nothing and cost D^2 each.
                counted = r[:, c] > 0
                residual, weight = (flat[counted] - means[c]).nan_to_num(0.0), r[counted, c].unsqueeze(-1)
                weighted = weight * residual
                total[c] += weighted.T @ residual if dense else (weighted * residual).sum(0)
        return total

    def _chunk(self, batch_size: int | None) -> int:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}; pass None for the default")
        return batch_size or max(1, CHUNK // max(self.components, self.event_numel))

    def _rows(self, x: Tensor) -> Tensor:
        """x, its event shape checked, in the dtype and on the device of the parameters."""
        check_shape(x, self.event_shape)
        return x.to(self.mixing_logits)

    def _check(self, x: Tensor, fitting: bool = False) -> None:
        """Refuse x of another shape, outside the support, or too short to fit C components to."""
        check_shape(x, self.event_shape)
        wrong = (~self.support.check(x) & ~x.isnan()) | x.isinf()
        if bool(wrong.any()):
            numbers = x[~x.isnan()]
            raise DataError(
                f"x: expected values in {_describe(self.support)}, got others between {numbers.min().item():g} and "
                f"{numbers.max().item():g}; clean or binarise the data, or use the mixture for its kind"
            )
        if fitting and len(x) < self.components:
            raise UsageError(
                f"x: expected at least {self.components} rows for {self.components} components, got {len(x)}; "
                "pass more data or build the mixture with fewer components"
            )


class GaussianMixture(Mixture):
    """A mixture of Gaussians, an exact baseline for densities.

    Components start at standard normal means (drawn as torch draws any layer's parameters) with unit covariance.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of components, C.
        covariance: Covariance of each component: "full", "diagonal", "tied" (one full matrix for all) or "spherical".
        weights: Mixing weights: "trainable", or "uniform" to hold each at 1/C.
        floor: Variance added to each dimension in the M step, in squared units of x; a millionth of the mean variance
            of the rows unless given. It is scikit-learn's `reg_covar`, and keeps a component that collapses onto few
            rows positive definite.
    Raises:
        UsageError: An argument outside its range or choices; the message names them.
    Example:
        >>> mixture = GaussianMixture(2, components=3)
        >>> x = torch.randn(100, 2)
        >>> mixture.initialise(x)
        >>> history = mixture.em(x)
        >>> mixture.log_prob(x).shape
        torch.Size([100])
    """

    word = "mixture"
    measure = "density"
    tolerance = 1e-4  # iterations of full covariances are dear, and densities spread more widely than masses
    support = constraints.real

    @checked
    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: Count = 10,
        covariance: Covariance = "full",
        weights: Weights = "trainable",
        floor: NotNegative | None = None,
    ) -> None:
        super().__init__(event_shape, components, weights)
        self.covariance, self.floor = covariance, floor
        self.dense = covariance in ("full", "tied")
        C, D = components, self.event_numel
        self.means = nn.Parameter(torch.randn(C, *self.event_shape))
        scales = {"full": (C, D), "diagonal": (C, D), "tied": (1, D), "spherical": (C, 1)}[covariance]
        self.log_scale = nn.Parameter(torch.zeros(scales))
        if covariance in ("full", "tied"):
            self.unit_lower = nn.Parameter(torch.zeros(*scales, D))

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"mixture of {self.components} Gaussians, {self.covariance} covariance"

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factors L of the covariances, shape (C, D, D)."""
        C, D = self.components, self.event_numel
        if self.covariance in ("full", "tied"):
            return _factor(self.log_scale, self.unit_lower).expand(C, D, D)
        return torch.diag_embed(self.log_scale.exp().expand(C, D))

    @property
    def covariances(self) -> Tensor:  # type: ignore[override]
        """Covariance of each flattened component, shape (C, D, D) whatever its kind."""
        return self.scale_tril @ self.scale_tril.mT

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """N(mu_c, Sigma_c) for integer c of any shape: batch shape that of c, event shape that of x."""
        means = self.means.flatten(1)[c]
        if self.covariance == "full":
            flat = dist.MultivariateNormal(means, scale_tril=_factor(self.log_scale[c], self.unit_lower[c]))
        elif self.covariance == "tied":
            flat = dist.MultivariateNormal(means, scale_tril=_factor(self.log_scale[0], self.unit_lower[0]))
        else:
            flat = dist.Normal(means, self.log_scale.exp()[c]).to_event(1)
        return dist.TransformedDistribution(flat, [ReshapeTransform(torch.Size([self.event_numel]), self.event_shape)])

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mu_c, Sigma_c) in nats for every row and component, shape (N, C)."""
        # One component at a time: a triangular solve on (N, D) each, where broadcasting would hold (N, C, D).
        every = torch.arange(self.components, device=self.means.device)
        if has_gaps(x):
            return self._log_prob_seen(x)
        return torch.stack([self.component(c).log_prob(x) for c in every], -1)

    def _log_prob_seen(self, x: Tensor) -> Tensor:
        """log N(x_seen; mu_c, Sigma_c), shape (N, C), of rows with gaps."""
        if self.dense:
            return seen_under(self.means, self.covariances, x)
        elements = dist.Normal(self.means.flatten(1), self.log_scale.exp(), validate_args=False)
        return OfSeen(elements, self.means.new_zeros(())).to_event(1).log_prob(x.flatten(1).unsqueeze(1))

    @torch.no_grad()
    def rescale(self, unit: Tensor) -> Self:
        """Take x for x times a unit of each element, shape (*event,); covariances are not spherical.

        A fit to elements of one unit each, in which neither the floor nor k-means prefers one, is so taken back to
        theirs: log p(x) falls by the sum of the units' logarithms.
        """
        self.means.mul_(unit)
        self.log_scale.add_(unit.flatten().log())
        return self

    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """A mixture of the components' Gaussians, in double precision."""
        flat, mask = x.flatten(1), seen.flatten()
        each = [gaussian_parts(*part, flat, mask) for part in zip(self.means.flatten(1), self.scale_tril, strict=True)]
        log_probs, locs, factors = (torch.stack(parts, -1) for parts in zip(*each, strict=True))
        loc, scale_tril = locs.movedim(-1, 1), factors.movedim(-1, 0)
        components = dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)
        return mixture_given(self.mixing_logits.double().log_softmax(-1) + log_probs, components)

    def _fit_components(self, x: Tensor, responsibilities: Tensor, chunk: int) -> None:
        floor = self._floor(x)
        counts, scatter = self._center(x, responsibilities, chunk, self.dense)
        if self.covariance == "tied":
            scatter, counts = scatter.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        live = counts > EMPTY
        if not self.dense:
            variances = scatter / counts.clamp_min(EMPTY) + floor
            if self.covariance == "spherical":
                variances, live = _overall(variances, counts), live.any(-1, keepdim=True)
            self._require_positive(variances[live.expand_as(variances)].min() > 0)
            overwrite(self.log_scale, variances.log() / 2, live)
        else:
            identity = torch.eye(self.event_numel).to(scatter)
            covariances = scatter / counts.clamp_min(EMPTY).unsqueeze(-1) + floor * identity
            covariances[~live.squeeze(-1)] = identity  # not used, but it has to factorise
            factor, failed = torch.linalg.cholesky_ex(covariances)
            self._require_positive(~failed.any())
            scale = factor.diagonal(dim1=-2, dim2=-1)
            overwrite(self.log_scale, scale.log(), live)
            overwrite(self.unit_lower, (factor / scale.unsqueeze(-1)).tril(-1), live)

    def _forget(self, x: Tensor) -> None:
        """Every component has the means of the elements, and their mean variance."""
        self.means.copy_(x.double().nanmean(0).nan_to_num(0.0).expand_as(self.means))
        self.log_scale.fill_(math.log(max(self._variance(x), EMPTY)) / 2)
        if self.dense:
            self.unit_lower.zero_()

    def _floor(self, x: Tensor) -> float:
        """What is added to variances when x is fitted."""
        return RELATIVE_FLOOR * self._variance(x) if self.floor is None else self.floor

    def _variance(self, x: Tensor) -> float:
        """The mean variance of the elements of x, of what is seen of them."""
        values = x if x.is_floating_point() else x.float()  # in the type of x, of which a copy may not fit
        if has_gaps(x):
            values = values.double()
            return (values - values.nanmean(0)).square().nanmean(0).nanmean().item()
        return values.var(0, correction=0).double().mean().item()

    def _require_positive(self, positive: Tensor) -> None:
        if not bool(positive):
            raise NumericalError(
                f"x: expected positive definite covariances, got a singular one with floor={self.floor}; "
                "raise floor, or use fewer components or covariance='diagonal'"
            )


class BernoulliMixture(Mixture):
    """A mixture of products of Bernoullis, an exact baseline for masses on {0, 1}^D.

    Components start at probabilities near 1/2, told apart by a little noise.

    Args:
        event_shape: Shape of one datum; an int D means (D,).
        components: Number of components, C.
        weights: Mixing weights: "trainable", or "uniform" to hold each at 1/C.
        floor: The M step keeps probabilities from floor to 1 - floor, which is the constrained maximum. It decides
            what a pixel costs that was never on in training: -log(floor), 6.9 nats by default.
    Raises:
        UsageError: An argument outside its range or choices; the message names them.
    """

    word = "mixture"
    measure = "mass"
    tolerance = 1e-5
    support = constraints.boolean

    @checked
    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: Count = 10,
        weights: Weights = "trainable",
        floor: Annotated[float, Number(above=0, below=0.5)] = 1e-3,
    ) -> None:
        super().__init__(event_shape, components, weights)
        self.floor = floor
        self.logits = nn.Parameter(0.1 * torch.randn(components, *self.event_shape))

    @property
    def description(self) -> str:
        """What a table of models calls it."""
        return f"mixture of {self.components} Bernoullis"

    @property
    def means(self) -> Tensor:  # type: ignore[override]
        """Probabilities pi of a one, shape (C, *event)."""
        return self.logits.sigmoid()

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """prod_d Bernoulli(pi_cd) for integer c of any shape: batch shape that of c, event shape that of x."""
        return dist.Bernoulli(logits=self.logits[c]).to_event(len(self.event_shape))

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log p(x | c) in nats for every row and component, shape (N, C)."""
        # x l - softplus(l), summed over dimensions: one matrix product, where broadcasting would hold (N, C, D).
        logits, flat = self.logits.flatten(1), x.flatten(1)
        if has_gaps(x):
            return flat.nan_to_num(0.0) @ logits.T + (~flat.isnan()).to(logits) @ F.logsigmoid(-logits).T
        return flat @ logits.T + F.logsigmoid(-logits).sum(-1)

    def conditional(self, x: Tensor, seen: Tensor) -> Conditional:
        """A mixture of what is missing of each component, whose elements are independent."""
        there, gone = self.logits.flatten(1)[:, seen.flatten()], self.logits.flatten(1)[:, ~seen.flatten()]
        log_probs = x.to(there).flatten(1)[:, seen.flatten()] @ there.T + F.logsigmoid(-there).sum(-1)
        components = dist.Bernoulli(logits=gone.expand(len(x), *gone.shape)).to_event(1)
        return mixture_given(self.mixing_logits.log_softmax(-1) + log_probs, components)

    def _fit_components(self, x: Tensor, responsibilities: Tensor, chunk: int) -> None:
        counts = self._counts(x, responsibilities, chunk)
        probabilities = self._means(x, responsibilities, counts, chunk).clamp(self.floor, 1 - self.floor)
        overwrite(self.logits, probabilities.logit(), counts > EMPTY)


def check_shape(x: Tensor, event_shape: torch.Size) -> None:
    """Refuse x of another event shape, with the remedy that is likely."""
    if x.dim() > 0 and x.shape[1:] == event_shape:
        return
    wanted, got = tuple(event_shape), tuple(x.shape[1:])
    if x.shape == event_shape:
        remedy = "pass x.unsqueeze(0) for a single datum"
    elif x.dim() > 0 and x.shape[1:].numel() == event_shape.numel():
        remedy = f"pass x.reshape(-1, {', '.join(map(str, wanted))})"
    else:
        remedy = f"build the mixture with event_shape={got}"
    raise UsageError(f"x: expected event shape {wanted}, got {got}; {remedy}")


def _factor(log_scale: Tensor, unit_lower: Tensor) -> Tensor:
    """L = diag(exp(log_scale)) (I + strictly lower triangle of unit_lower)."""
    identity = torch.eye(log_scale.shape[-1], dtype=log_scale.dtype, device=log_scale.device)
    return log_scale.exp().unsqueeze(-1) * (identity + unit_lower.tril(-1))


def seen_under(means: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """log N(x_seen; mu_c, Sigma_c) in nats, shape (N, C), of rows with gaps, for any batch of C Gaussians."""
    parts = list(zip(means.flatten(1), covariances, strict=True))
    blocks = (Gaps(rows) for rows in x.flatten(1).split(_block(covariances)))
    return torch.cat([torch.stack([gaps.log_prob(*part) for part in parts], -1) for gaps in blocks])


def expected(x: Tensor, responsibilities: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """sum_n r_nc E[x_n - mu_c | x_seen, c], shape (C, D), of rows with gaps, and of (x_n - mu_c) squared, (C, D, D)."""
    first, second = torch.zeros_like(covariances[..., 0]), torch.zeros_like(covariances)
    size = _block(covariances)
    for rows, r in zip(x.flatten(1).split(size), responsibilities.split(size), strict=True):
        gaps = Gaps(rows)
        for c, (loc, covariance) in enumerate(zip(means.flatten(1), covariances, strict=True)):
            one, two = gaps.moments(loc, covariance, r[:, c])
            first[c] += one
            second[c] += two
    return first, second


def _block(covariances: Tensor) -> int:
    """Rows with gaps that are looked at together: each may need a covariance of its own."""
    return max(1, CHUNK // covariances[0].numel())


def overwrite(parameter: Tensor, value: Tensor, live: Tensor) -> None:
    """Copy `value` into the parameter, but for components, or elements of them, that are not live: (C, 1) or (C, D)."""
    flat = parameter.flatten(1)
    parameter.copy_(torch.where(live, value.reshape(flat.shape), flat).view_as(parameter))


def _overall(variances: Tensor, counts: Tensor) -> Tensor:
    """The mean over elements, shape (C, 1), each counting as often as it is seen."""
    if counts.shape[-1] == 1:
        return variances.mean(-1, keepdim=True)
    return (counts * variances).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(EMPTY)


def _describe(support: constraints.Constraint) -> str:
    named = {constraints.boolean: "{0, 1}", constraints.real: "the real numbers"}
    return named.get(support, str(support))
