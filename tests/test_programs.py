"""Programs as Pyro's users write them: each gives right numbers, or is refused with its cause and the remedy.

They are models of the kinds that Pyro's examples show, written anew and small enough for log p(x) by quadrature or
enumeration.
"""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.cevae import CEVAE
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyrovae.errors import PairError
from pyrovae.inference import ELBO, IWAE, fit, log_marginal
from pyrovae.inference.batch import Batch
from pyrovae.inference.weights import At, log_prob, run, sample_sites
from pyrovae.models import Network

GRID = torch.linspace(-6, 6, 241)
STEP = (GRID[1] - GRID[0]).item()


def log_joint(model: Callable, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """log p(x, z) at latents of shape (K, *event), shape (K, N)."""
    k = len(next(iter(values.values())))
    wide = {name: v[:, None].expand(k, len(x), *v.shape[1:]) for name, v in values.items()}
    with torch.no_grad(), At(wide):
        sites = sample_sites(run(model, "model", Batch(x), k))
    return torch.stack([log_prob(site, name, (k, len(x))) for name, site in sites.items()]).sum(0).double()


def by_quadrature(model: Callable, x: Tensor, site: str = "z", dims: int = 1) -> Tensor:
    """log p(x) of a model with one Gaussian latent of few dimensions, by the trapezoid rule."""
    points = torch.cartesian_prod(*[GRID[:: 1 if dims == 1 else 3]] * dims).reshape(-1, dims)
    step = STEP * (1 if dims == 1 else 3)
    return torch.logsumexp(log_joint(model, x, {site: points}), 0) + dims * math.log(step)


def trained(model: Callable, guide: Callable, x: Tensor, objective=None, **options) -> None:
    options = {"epochs": 60, "batch_size": 20, "optimizer": lambda p: torch.optim.Adam(p, lr=0.01)} | options
    fit(model, guide, x, objective or ELBO(), progress=False, **options)


def agrees(model: Callable, guide: Callable, x: Tensor, wanted: Tensor, num_particles: int = 4000) -> None:
    """log p(x) of every row is the true one, within its error."""
    result = log_marginal(model, guide, x, num_particles, seed=1)
    assert (result.standard_error < 0.1).all(), "no power"
    away = (result.estimate - wanted).abs()
    assert (away < 5 * result.standard_error + 1e-3).all(), away


def binary(n: int = 40, size: int = 6) -> Tensor:
    return torch.bernoulli(torch.sigmoid(2 * torch.randn(n, 1) * torch.linspace(-1, 1, size)))


# ---------------------------------------------------------------------------------------------------------------------
# A variational autoencoder


class PlainVAE(nn.Module):
    """Networks registered by `pyro.module`, images flattened by `reshape`."""

    def __init__(self, pixels: int = 6, hidden: int = 12) -> None:
        super().__init__()
        self.pixels = pixels
        self.decoder = nn.Sequential(nn.Linear(1, hidden), nn.Softplus(), nn.Linear(hidden, pixels), nn.Sigmoid())
        self.hidden, self.loc, self.scale = nn.Linear(pixels, hidden), nn.Linear(hidden, 1), nn.Linear(hidden, 1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = torch.zeros(x.shape[0], 1, dtype=x.dtype)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            image = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, self.pixels))

    def guide(self, x: Tensor) -> None:
        pyro.module("hidden", self.hidden)
        with pyro.plate("data", x.shape[0]):
            h = F.softplus(self.hidden(x.reshape(-1, self.pixels)))
            pyro.sample("z", dist.Normal(self.loc(h), self.scale(h).exp()).to_event(1))


@pytest.mark.parametrize("objective", [ELBO(), IWAE(3), Trace_ELBO()])
def test_a_vae(objective) -> None:
    vae, x = PlainVAE(), binary().reshape(-1, 1, 2, 3)
    trained(vae.model, vae.guide, x, objective)
    agrees(vae.model, vae.guide, x, by_quadrature(vae.model, x))


# ---------------------------------------------------------------------------------------------------------------------
# M2: labels that are latent for some rows and observed for others


class M2(nn.Module):
    def __init__(self, together: Callable[[Tensor, Tensor], Tensor], classes: int = 3, size: int = 6) -> None:
        super().__init__()
        self.classes, self.together = classes, together
        self.decoder, self.of_y = nn.Linear(1 + classes, size), nn.Linear(size, classes)
        self.of_z = nn.Linear(size + classes, 2)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), self.classes) / self.classes), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(self.together(z, y))).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.of_y(x)))
            loc, raw = self.of_z(self.together(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def broadcast(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, a.shape[-1]), b.expand(*shape, b.shape[-1])], -1)


def test_semi_supervised() -> None:
    """Trained with the label summed out; log p(x) draws it, and is that of summing; labelled rows have log p(x, y)."""
    m2, x = M2(broadcast), binary(40)
    trained(m2.model, config_enumerate(m2.guide), x, TraceEnum_ELBO(max_plate_nesting=1), epochs=30)
    labels = torch.eye(3)
    given = torch.stack([by_quadrature(lambda x, y=y: m2.model(x, y.expand(len(x), 3)), x) for y in labels])
    agrees(m2.model, m2.guide, x, torch.logsumexp(given, 0))

    # One tensor of rows holds both.
    def supervised(program: Callable) -> Callable:
        return lambda rows: program(rows[:, :6], rows[:, 6:])

    rows = torch.cat([x, labels[torch.arange(len(x)) % 3]], 1)
    agrees(supervised(m2.model), supervised(m2.guide), rows, given[torch.arange(len(x)) % 3, torch.arange(len(x))])


def test_semi_supervised_as_it_is_often_written() -> None:
    """A label without reparameterisation needs enumeration to train; torch.cat does not broadcast."""
    m2, x = M2(broadcast), binary(20)
    with pytest.raises(
        PairError, match=r"'y' \(OneHotCategorical\) has no reparameterised sampler.*gradient=enumerated"
    ):
        trained(m2.model, m2.guide, x, epochs=1)
    narrow = M2(lambda a, b: torch.cat([a, b], -1))
    with pytest.raises(PairError, match=r"guide: it runs by itself, but not for several particles.*x.expand"):
        log_marginal(narrow.model, narrow.guide, x, 10)


# ---------------------------------------------------------------------------------------------------------------------
# A deep Markov model


class DMM(nn.Module):
    """z_t given z_{t-1}, x_t given z_t, a guide with an RNN that runs backwards; masks where sequences have ended."""

    def __init__(self, size: int = 3, hidden: int = 5, annealing: float = 1.0) -> None:
        super().__init__()
        self.transition, self.emitter = nn.Linear(1, 2), nn.Linear(1, size)
        self.rnn = nn.RNN(size, hidden, batch_first=True)
        self.combiner, self.out = nn.Linear(1, hidden), nn.Linear(hidden, 2)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.annealing = annealing

    def mask(self, x: Tensor) -> Tensor:
        """Rows hold -1 where their sequence has ended; shape (N, T)."""
        return (x >= 0).all(-1)

    def model(self, x: Tensor) -> None:
        pyro.module("dmm", self)
        mask = self.mask(x)
        z = self.z_0.expand(len(x), 1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, raw = self.transition(z).chunk(2, -1)
                prior = dist.Normal(loc, raw.exp())
                with poutine.scale(scale=self.annealing):
                    z = pyro.sample(f"z_{t}", prior.mask(mask[:, t : t + 1]).to_event(1))
                emitted = dist.Bernoulli(logits=self.emitter(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x_{t}", emitted, obs=x[:, t].clamp(min=0))

    def guide(self, x: Tensor) -> None:
        mask = self.mask(x)
        states = self.rnn(x.clamp(min=0).flip(1) * mask.flip(1)[..., None])[0].flip(1)
        z = self.z_q_0.expand(len(x), 1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                h = 0.5 * (torch.tanh(self.combiner(z)) + states[:, t])
                loc, raw = self.out(h).chunk(2, -1)
                q = dist.Normal(loc, raw.exp()).mask(mask[:, t : t + 1]).to_event(1)
                with poutine.scale(scale=self.annealing):
                    z = pyro.sample(f"z_{t}", q)


def test_a_deep_markov_model() -> None:
    dmm = DMM()
    x = torch.bernoulli(torch.full((24, 2, 3), 0.3))
    x[::3, 1] = -1.0  # a third of the sequences are one step long
    trained(dmm.model, dmm.guide, x, IWAE(3), batch_size=8, epochs=20)
    points = torch.cartesian_prod(GRID[::3], GRID[::3])
    joint = log_joint(dmm.model, x, {"z_0": points[:, :1], "z_1": points[:, 1:]})
    wanted = torch.logsumexp(joint, 0) + 2 * math.log(3 * STEP)
    wanted[::3] -= math.log(3 * STEP * len(GRID[::3]))  # z_1 is no latent there
    agrees(dmm.model, dmm.guide, x, wanted)


def test_a_deep_markov_model_with_an_annealed_kl() -> None:
    dmm = DMM(annealing=0.3)
    with pytest.raises(PairError, match=r"'z_0' is scaled by 0.3 .*use ELBO\(beta=...\)"):
        trained(dmm.model, dmm.guide, torch.zeros(20, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Topics


class Topics(nn.Module):
    """Two topics over words: a logistic normal prior, a decoder with batch normalisation and dropout."""

    def __init__(self, words: int = 8, right: bool = True) -> None:
        super().__init__()
        self.beta, self.norm, self.drop = nn.Linear(2, words, bias=False), nn.BatchNorm1d(words), nn.Dropout(0.2)
        self.hidden = nn.Sequential(nn.Linear(words, 10), nn.Softplus(), nn.Dropout(0.2))
        self.heads = nn.Linear(10, 4)
        body = nn.Sequential(self.drop, self.beta, self.norm, nn.Softmax(1))
        self.decoder: nn.Module = Network(body, 2, words) if right else body

    def model(self, docs: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", docs.shape[0]):
            zeros = docs.new_zeros((docs.shape[0], 2))
            logtheta = pyro.sample("logtheta", dist.Normal(zeros, zeros.exp()).to_event(1))
            total = int(docs.sum(-1).max())
            words = self.decoder(F.softmax(logtheta, -1))
            pyro.sample("obs", dist.Multinomial(total, words), obs=docs)

    def guide(self, docs: Tensor) -> None:
        pyro.module("encoder", self.hidden)
        with pyro.plate("documents", docs.shape[0]):
            loc, raw = self.heads(self.hidden(docs)).chunk(2, -1)
            pyro.sample("logtheta", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))


def documents(n: int = 40, words: int = 8) -> Tensor:
    return dist.Multinomial(12, probs=torch.softmax(torch.randn(n, words), -1)).sample()


def test_a_topic_model() -> None:
    lda, x = Topics(), documents()
    trained(lda.model, lda.guide, x, epochs=20)
    with torch.no_grad():
        lda.eval()
        wanted = by_quadrature(lda.model, x, "logtheta", 2)
        lda.train()
    agrees(lda.model, lda.guide, x, wanted)


@pytest.mark.parametrize("n", [5, 8])
def test_a_topic_model_written_for_one_batch_dimension(n: int) -> None:
    """Batch normalisation and softmax(1) count dimensions from the front; with as many documents as words, silently."""
    lda, x = Topics(right=False), documents(n)
    causes = {5: "runs by itself, but not for several particles", 8: r"BatchNorm1d\(8\) was given \(K, N, features\)"}
    for call in (
        lambda: log_marginal(lda.model, lda.guide, x, 10),
        lambda: trained(lda.model, lda.guide, x, batch_size=n),
    ):
        with pytest.raises(PairError, match=causes[n] if n == 5 else f"{causes[n]}|depends on the other rows"):
            call()


def test_topics_that_all_documents_share() -> None:
    """A latent of the whole data set has no log q(z|x); a parameter in its place has none to ask for."""

    def model(x: Tensor) -> None:
        with pyro.plate("topics", 3):
            words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(8)))
        with pyro.plate("documents", len(x)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(3)))
            pyro.sample("obs", dist.Multinomial(12, theta @ words), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("topics", 3):
            pyro.sample("topic_words", dist.Dirichlet(pyro.param("words", torch.ones(3, 8))))
        with pyro.plate("documents", len(x)):
            pyro.sample("theta", dist.Dirichlet(torch.ones(3)))

    for call in (lambda: log_marginal(model, guide, documents(), 10), lambda: trained(model, guide, documents())):
        with pytest.raises(PairError, match=r"'topic_words' must be inside exactly one plate.*a parameter in place"):
            call()
    assert len(pyro.get_param_store()) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Mini-batches by the plate


def test_mini_batches_by_the_plate() -> None:
    """The plate's own subsampling scales log-probabilities; `fit` passes rows instead."""
    data = binary(40)
    vae = PlainVAE()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(vae.decoder(z)).to_event(1), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            h = F.softplus(vae.hidden(x[rows]))
            pyro.sample("z", dist.Normal(vae.loc(h), vae.scale(h).exp()).to_event(1))

    def chosen(x: Tensor) -> None:
        with pyro.plate("data", len(data), subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    for pair in ((model, guide), (vae.model, chosen)):
        with pytest.raises(
            PairError, match=r"subsampling plate.*use pyro.plate\('data', len\(x\)\) and pass minibatches"
        ):
            trained(*pair, data, batch_size=20)
        with pytest.raises(PairError, match="subsampling plate"):
            log_marginal(*pair, data[:20], 10)


# ---------------------------------------------------------------------------------------------------------------------
# Automatic guides, and CEVAE's auxiliary sites, as they are shipped


def test_an_automatic_guide() -> None:
    """On all rows together, see `test_validity` for the others."""
    vae, x = PlainVAE(), binary(20)
    guide = AutoNormal(vae.model)
    trained(vae.model, guide, x, epochs=100, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    agrees(vae.model, guide, x, by_quadrature(vae.model, x))


def test_cevae() -> None:
    """Its guide observes treatment and outcome, for a loss of its own; log p(x, t, y) leaves them out of log q."""
    cevae = CEVAE(feature_dim=3, outcome_dist="normal", latent_dim=1, hidden_dim=6, num_layers=2)
    x = torch.randn(30, 3)
    t = torch.bernoulli(torch.sigmoid(x[:, 0]))
    rows = torch.cat([x, t[:, None], (x.sum(1) + t)[:, None]], 1)

    def model(rows: Tensor) -> None:
        cevae.model(rows[:, :3], rows[:, 3], rows[:, 4])

    def guide(rows: Tensor) -> None:
        cevae.guide(rows[:, :3], rows[:, 3], rows[:, 4])

    trained(model, guide, rows, epochs=20)
    agrees(model, guide, rows, by_quadrature(model, rows))


# ---------------------------------------------------------------------------------------------------------------------
# A deep exponential family


class SparseGamma(nn.Module):
    """Counts from two layers of Gammas; the weights are latents that all rows share, or parameters."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.w = nn.Parameter(torch.zeros(2, 4))

    def weights(self) -> Tensor:
        if not self.shared:
            return F.softplus(self.w)
        with pyro.plate("w_plate", 8):
            return pyro.sample("w", dist.Gamma(torch.tensor(0.3), torch.tensor(0.3))).reshape(2, 4)

    def model(self, x: Tensor) -> None:
        w = self.weights()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Poisson(z @ w).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        if self.shared:
            with pyro.plate("w_plate", 8):
                pyro.sample("w", dist.Gamma(torch.ones(8), torch.ones(8)))
        positive = {"constraint": constraints.positive, "event_dim": 1}
        alpha = pyro.param("alpha", lambda: torch.full((len(x), 2), 2.0), **positive)
        mean = pyro.param("mean", lambda: torch.ones(len(x), 2), **positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(alpha, alpha / mean).to_event(1))


def test_a_deep_exponential_family() -> None:
    x = dist.Poisson(torch.ones(12, 4)).sample()
    shared = SparseGamma(shared=True)
    for call in (
        lambda: log_marginal(shared.model, shared.guide, x, 10),
        lambda: trained(shared.model, shared.guide, x, batch_size=12),
    ):
        with pytest.raises(
            PairError, match=r"site 'w' must be inside exactly one plate.*a parameter in place of a latent"
        ):
            call()
    assert len(pyro.get_param_store()) == 0
    single = SparseGamma(shared=False)
    with pytest.raises(PairError, match="parameters for each row; use batch_size=12"):
        trained(single.model, single.guide, x, batch_size=4)
    trained(single.model, single.guide, x, batch_size=12, epochs=200)
    grid = torch.linspace(0.0, 12.0, 401)[1:] - 0.015
    joint = log_joint(single.model, x, {"z": torch.cartesian_prod(grid, grid)})
    agrees(single.model, single.guide, x, torch.logsumexp(joint, 0) + 2 * math.log(0.03), num_particles=8000)
