"""What must hold on a GPU as on a CPU. Skipped, with that reason, where torch sees no CUDA device."""

import pytest
import torch

from pyrovae.data import load_data
from pyrovae.errors import NumericalError
from pyrovae.inference import ELBO, IWAE, Constraint, Fit, LinearWarmup, Renyi, fit, log_marginal
from pyrovae.inference.training.step import Step
from pyrovae.models import (
    MLP,
    VAE,
    Bernoulli,
    ConvDecoder,
    ConvEncoder,
    FullCovarianceNormal,
    Gaussian,
    GaussianMixture,
    LowRankNormal,
    MeanFieldNormal,
    MixtureOfGaussians,
    Network,
    StandardNormal,
    VampPrior,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # Remarks of torch: that watching for waits is experimental, that TF32 is off, and (2.11) that it has newer names.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings"),
]
SHAPE = (1, 8, 8)


def make(prior: str = "standard", guide: type = MeanFieldNormal, density: bool = False, conv: bool = False) -> VAE:
    torch.manual_seed(0)
    encoder = ConvEncoder(SHAPE) if conv else MLP(SHAPE)
    decoder = ConvDecoder(5, SHAPE) if conv else MLP(5, SHAPE)
    q = guide(encoder, 5)
    p = {"standard": StandardNormal, "mixture": MixtureOfGaussians}.get(prior, lambda z: VampPrior(q, SHAPE, 7))(5)
    return VAE(p, Gaussian(decoder) if density else Bernoulli(decoder), q)


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(5), Renyi(0.5, 5)], ids=lambda o: type(o).__name__)
def test_training_is_deterministic_and_follows_the_cpu(objective) -> None:
    """Same seed, same bits on the GPU; and the same validation bound as the CPU, whose noise differs, by 5 errors."""
    rows = load_data("digits").rows("mass")

    def run(device: str) -> tuple[VAE, float]:
        vae = make()
        result = fit(
            vae.model, vae.guide, rows.train, objective, epochs=3, transform=rows.transform, validation=rows.validation,
            device=device, progress=False,
        )  # fmt: skip
        return vae, result.history[-1]["validation_bound"]

    (first, bound), (second, _), (_, on_cpu) = run("cuda"), run("cuda"), run("cpu")
    assert all(p.is_cuda and torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    untrained = make().cuda()
    start = -objective.loss(untrained.model, untrained.guide, rows.validation.cuda()) / len(rows.validation)
    assert bound - start > 5  # nats: it has learned something
    assert abs(bound - on_cpu) < 0.1 * (bound - start)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("density", [False, True])
@pytest.mark.parametrize("guide", [MeanFieldNormal, FullCovarianceNormal, LowRankNormal])
@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp"])
def test_terms_agree_with_the_cpu(prior: str, guide: type, density: bool, conv: bool) -> None:
    """The three log-probabilities of one z are those that the CPU finds."""
    vae = make(prior, guide, density, conv)
    x = load_data("digits").rows("density" if density else "mass").test[:20]
    vae.initialise(x)
    z = vae.posterior(x).sample((3,))

    def terms(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.stack([vae.likelihood(z).log_prob(x), vae.prior().log_prob(z), vae.posterior(x).log_prob(z)])

    on_cpu = terms(x, z)
    vae.cuda()
    torch.testing.assert_close(terms(x.cuda(), z.cuda()).cpu(), on_cpu, atol=2e-2, rtol=2e-3)


def test_log_marginal_agrees_with_the_cpu() -> None:
    """Independent draws on both devices agree within five Monte Carlo errors, row by row."""
    vae, x = make(), load_data("digits").rows("mass").test[:50]
    vae.initialise(x)
    on_cpu = log_marginal(vae.model, vae.guide, x, 5000)
    vae.cuda()
    on_gpu = log_marginal(vae.model, vae.guide, x.cuda(), 5000)
    trusted = (on_cpu.pareto_k < 0.7) & (on_gpu.pareto_k < 0.7)
    assert trusted.sum() > 10
    error = (on_cpu.standard_error.square() + on_gpu.standard_error.square()).sqrt() + 1e-4
    assert ((on_cpu.estimate - on_gpu.estimate).abs() < 5 * error)[trusted].all()


def test_mixture_agrees_with_the_cpu() -> None:
    rows = load_data("digits").rows("density")
    mixture = GaussianMixture(SHAPE, 3).double()
    mixture.initialise(rows.validation)
    expected = mixture.log_prob(rows.test)
    on_gpu = mixture.cuda().log_prob(rows.test.cuda()).cpu()
    torch.testing.assert_close(on_gpu, expected, atol=1e-8, rtol=1e-10)


def test_dequantised_levels_floor_back() -> None:
    rows = load_data("digits").rows("density")
    levels = rows.measure.levels
    assert levels is not None
    x = rows.transform(rows.train.cuda())
    assert torch.equal((x.double() * levels).floor().cpu(), rows.train.double())


def test_resuming_on_the_gpu_is_exact(tmp_path) -> None:
    rows = load_data("digits").rows("mass")

    def run(vae: VAE, name: str, **options) -> None:
        fit(
            vae.model, vae.guide, rows.train, IWAE(5), epochs=3, transform=rows.transform, validation=rows.validation,
            device="cuda", directory=tmp_path / name, progress=False, **options,
        )  # fmt: skip

    whole, broken, steps = make(), make(), iter(range(1000))
    run(whole, "whole")
    run(broken, "broken", should_stop=lambda: next(steps) == 20)
    again = make()
    run(again, "broken", resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("beta", [LinearWarmup(steps=100), Constraint(2.0)], ids=lambda beta: type(beta).__name__)
def test_steps_as_one_cuda_graph_are_the_eager_steps_and_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch, beta
) -> None:
    """With dropout, a beta that changes and a schedule of the rate; nothing is read before an epoch ends."""
    rows = load_data("digits").rows("mass")
    settle = Step.settle

    def settled(step: Step) -> float:
        torch.cuda.set_sync_debug_mode("default")  # here an epoch ends
        return settle(step)

    monkeypatch.setattr(Step, "settle", settled)

    def run(mode: str) -> tuple[VAE, Fit]:
        torch.manual_seed(0)
        guide = MeanFieldNormal(MLP(SHAPE, dropout=0.2), 5)
        vae = VAE(StandardNormal(5), Bernoulli(MLP(5, SHAPE, dropout=0.2)), guide)
        steps = 0

        def watched(raw: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps > 20 and mode == "on":  # all is compiled and captured
                torch.cuda.set_sync_debug_mode("error")
            return rows.transform(raw)

        def rest(metrics: dict[str, float]) -> None:
            nonlocal steps
            steps = 0
            torch.cuda.set_sync_debug_mode("default")

        try:
            result = fit(
                vae.model, vae.guide, rows.train[:1408], ELBO(beta=beta), epochs=4, batch_size=32,
                transform=watched, device="cuda", progress=False, compile=mode, seed=1, on_epoch=rest,
                schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1),
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return vae, result

    (graph, fitted), (eager, wanted) = run("on"), run("off")
    assert fitted.compiled
    bounds = [[epoch["train_bound"] for epoch in result.history] for result in (fitted, wanted)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)
    betas = [[epoch["beta"] for epoch in result.history] for result in (fitted, wanted)]
    assert betas[0] == pytest.approx(betas[1], rel=1e-4)
    for p, q in zip(graph.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-2, rtol=1e-2)


def test_a_bad_row_is_named_at_the_end_of_the_epoch_and_nothing_is_updated_from_it_on() -> None:
    vae, x = make(density=True), torch.randn(64, *SHAPE)
    bad = False

    def transform(raw: torch.Tensor) -> torch.Tensor:
        spoilt = (raw[:, :, :1, :1] == x[40, 0, 0, 0].to(raw.device)) & bad
        return torch.where(spoilt, 1e30, raw)

    def spoil(metrics: dict[str, float]) -> None:
        nonlocal bad
        bad = True

    with pytest.raises(NumericalError, match=r"epoch 2, step \d+: .*rows \[40\]"):
        fit(
            vae.model, vae.guide, x, ELBO(), epochs=2, batch_size=8, transform=transform, device="cuda",
            progress=False, compile="on", on_epoch=spoil,
        )  # fmt: skip
    assert all(p.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("precision", ["tf32", "bf16-mixed"])
def test_precisions_train_to_the_bound_of_fp32(precision: str) -> None:
    rows = load_data("digits").rows("mass")
    bounds = []
    for chosen in ("fp32", precision):
        vae = make()
        history = fit(
            vae.model, vae.guide, rows.train, IWAE(5), epochs=10, transform=rows.transform, validation=rows.validation,
            device="cuda", progress=False, compile="on", precision=chosen,
        ).history  # fmt: skip
        bounds.append([history[0]["validation_bound"], history[-1]["validation_bound"]])
    assert abs(bounds[1][1] - bounds[0][1]) < 0.1 * (bounds[0][1] - bounds[0][0])


@pytest.mark.parametrize("guide", [MeanFieldNormal, FullCovarianceNormal, LowRankNormal])
def test_steps_of_every_guide_are_captured(guide: type) -> None:
    vae, notices = make(guide=guide), []
    rows = load_data("digits").rows("mass")
    fit(
        vae.model, vae.guide, rows.train[:320], ELBO(), epochs=2, batch_size=32, transform=rows.transform,
        device="cuda", progress=False, compile="on", on_notice=notices.append,
    )  # fmt: skip
    assert not [text for text in notices if "slower" in text]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_decoder_by_einsum_trains_as_one_by_products(mode: str) -> None:
    """Gradients lie in memory like their parameters, without which fused optimisers raise on a GPU."""
    rows = load_data("digits").rows("density")

    class Linear(torch.nn.Linear):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return torch.einsum("...i,oi->...o", z, self.weight) + self.bias

    bounds = []
    for kind in (Linear, torch.nn.Linear):
        torch.manual_seed(0)
        body = torch.nn.Sequential(kind(5, 64), torch.nn.Unflatten(-1, SHAPE))
        vae = VAE(StandardNormal(5), Gaussian(Network(body, (5,), SHAPE)), MeanFieldNormal(MLP(SHAPE), 5))
        history = fit(
            vae.model, vae.guide, rows.train, ELBO(), epochs=3, transform=rows.transform, device="cuda",
            progress=False, compile=mode,
        ).history  # fmt: skip
        bounds.append(history[-1]["train_bound"])
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-3)
