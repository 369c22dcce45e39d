"""Training a pair that is given labels: by the numbers of the pair that finds the same labels among its data."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae.errors import UsageError
from pyrovae.inference import ELBO, IWAE, StickingTheLanding, fit
from pyrovae.inference.tracing import compiler

D, C, Z = 4, 3, 2
LABELS = torch.eye(C).double()[torch.arange(23) % C]
X = LABELS @ torch.randn(C, D, generator=torch.Generator().manual_seed(1)).double() + torch.randn(23, D).double() * 0.3
V, V_LABELS = X[:7] + 0.1, LABELS[:7]


class Conditional(nn.Module):
    """p(x, z | y) = N(z; A y, 1) N(x; W z, 0.5), with a linear guide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.prior, self.decoder = nn.Linear(C, Z), nn.Linear(Z, D)
        self.encoder = nn.Linear(D + C, 2 * Z)
        self.double()

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior(y), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Together(Conditional):
    """The same, of rows that hold x and y side by side."""

    def model(self, x: Tensor) -> None:  # type: ignore[override]
        super().model(*x.split([D, C], -1))

    def guide(self, x: Tensor) -> None:  # type: ignore[override]
        super().guide(*x.split([D, C], -1))


def weights(pair: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in pair.parameters()]


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("objective", [ELBO(beta=2.0), IWAE(4), ELBO(gradient=StickingTheLanding())], ids=repr)
@pytest.mark.parametrize("chunk", [None, 2])
def test_labels_go_with_their_rows(
    monkeypatch: pytest.MonkeyPatch, objective: object, compiled: str, chunk: int | None
) -> None:
    """In batches of a permutation, a ragged one among them, and in validation."""
    monkeypatch.setattr(compiler, "inductor", lambda graph, inputs: graph)
    options = {"epochs": 3, "batch_size": 5, "seed": 3, "compile": compiled, "progress": False, "particle_chunk": chunk}
    given, together = Conditional(), Together()
    one = fit(
        given.model, given.guide, X, objective, given=(LABELS,), validation=V, validation_given=(V_LABELS,), **options
    )
    rows, held_out = torch.cat([X, LABELS], -1), torch.cat([V, V_LABELS], -1)
    other = fit(together.model, together.guide, rows, objective, validation=held_out, **options)
    assert len(one.notices) == len(other.notices)  # they say how many seconds compiling took
    assert one.compiled == (compiled == "on")
    for a, b in zip(weights(given), weights(together), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)
    bounds = [[epoch["validation_bound"] for epoch in result.history] for result in (one, other)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-10)
    wrong = Conditional()
    fit(wrong.model, wrong.guide, X, objective, given=(LABELS.roll(1, 0),), **options)
    assert not torch.allclose(wrong.prior.weight, given.prior.weight, atol=1e-3)


def test_a_run_that_is_given_labels_is_resumed_bit_for_bit_and_by_the_same_labels_only(tmp_path: Path) -> None:
    options = {"batch_size": 5, "seed": 3, "progress": False}

    def trained(pair: Conditional, labels: Tensor = LABELS, **more: object) -> None:
        fit(pair.model, pair.guide, X, IWAE(2), given=(labels,), **options, **more)  # type: ignore[arg-type]

    whole, first, second = Conditional(), Conditional(), Conditional()
    trained(whole, epochs=4)
    trained(first, epochs=2, directory=tmp_path)
    trained(second, epochs=4, directory=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    with pytest.raises(RuntimeError, match="cannot resume, since it was run with data"):
        trained(Conditional(), LABELS.roll(1, 0), epochs=5, directory=tmp_path, resume=True)


def test_what_is_given_wrongly_is_refused_by_name() -> None:
    pair = Conditional()

    def run(given: object, **options: object) -> None:
        fit(pair.model, pair.guide, X, given=given, progress=False, batch_size=5, epochs=1, **options)  # type: ignore

    with pytest.raises(UsageError, match="given: 22 rows beside the 23 of data"):
        run((LABELS[:-1],))
    with pytest.raises(UsageError, match="given: expected a tuple of tensors"):
        run(LABELS)
    with pytest.raises(UsageError, match=r"model: cannot be called as model\(x\)"):
        run(())
    with pytest.raises(UsageError, match=r"model: cannot be called as model\(x, given\[0\], given\[1\]\)"):
        run((LABELS, LABELS))
    with pytest.raises(UsageError, match="validation_given: 0 tensors, where training has 1"):
        run((LABELS,), validation=V)
    with pytest.raises(UsageError, match="validation_given: given without validation rows"):
        run((LABELS,), validation_given=(V_LABELS,))


def test_an_objective_of_pyros_own_is_trained_and_reported_like_ours() -> None:
    """With the same draws Trace_ELBO is the ELBO with a sampled KL; latents without draws leave the bound alone."""
    options = {"epochs": 2, "batch_size": 5, "seed": 3, "progress": False, "compile": "off"}
    ours, theirs = Conditional(), Conditional()
    for pair, objective in ((ours, ELBO(kl="sampled")), (theirs, Trace_ELBO(max_plate_nesting=1))):
        result = fit(
            pair.model, pair.guide, X, objective, given=(LABELS,), validation=V, validation_given=(V_LABELS,), **options
        )
        last = result.history[-1]
        assert last["validation_elbo"] == pytest.approx(last["reconstruction"] - last["kl"], rel=1e-9)
        assert last["latent_dimensions"] == Z
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)
