"""The benchmark of training speed: it times the same computation in all contestants, and reports what it timed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor, nn

from pyrovae.inference import ELBO, IWAE
from pyrovae.models import VAE

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the benchmark, which finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    known = set(sys.modules)

    def load(path: str) -> ModuleType:
        name = Path(path).stem
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - known:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def copy_weights(vae: VAE, encoder: nn.Module, decoder: nn.Module) -> None:
    """Give hand-written networks the weights of a pair: layer by layer in order, the head after the encoder."""
    guide = vae.guides[0]
    for theirs, ours in ((encoder, [guide.encoder, guide.head]), (decoder, [vae.likelihood.decoder])):
        sources = [m for part in ours for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        targets = [m for m in theirs.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for target, source in zip(targets, sources, strict=True):
            target.load_state_dict(source.state_dict())
    bias = getattr(vae.likelihood.decoder, "bias", None)
    if bias is not None:
        list(decoder.modules())[-1].bias.data.copy_(bias.data)


@pytest.mark.parametrize("model", ["dense", "convolutional"])
@pytest.mark.parametrize("k", [1, 3])
def test_by_hand_and_pyrovae_compute_the_same_loss_of_as_many_parameters(imported: Any, model: str, k: int) -> None:
    by_pyrovae, by_hand = imported("peers/by_pyrovae.py"), imported("peers/by_hand.py")
    networks = sys.modules["networks"]
    vae = by_pyrovae.declare(model).double()
    encoder, decoder = networks.make_encoder(model).double(), networks.make_decoder(model).double()
    assert networks.count_parameters(encoder, decoder) == networks.count_parameters(vae)
    with torch.no_grad():  # a bias of zero would not be seen
        vae.likelihood.decoder.output_bias.normal_()
    copy_weights(vae, encoder, decoder)
    x = torch.rand(4, *networks.EVENT[model], dtype=torch.float64).round()
    torch.manual_seed(1)
    ours = (ELBO() if k == 1 else IWAE(k))(vae.model, vae.guide)(x)
    torch.manual_seed(1)
    theirs = by_hand.elbo(encoder, decoder, x, model) if k == 1 else by_hand.iwae(encoder, decoder, x, k, model)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)  # pyrovae adds 1e-6 to a guide's scale

    def gradient_norm(loss: Tensor, *modules: nn.Module) -> Tensor:
        gradients = torch.autograd.grad(loss, [p for module in modules for p in module.parameters()])
        return torch.cat([g.flatten() for g in gradients]).norm()

    torch.testing.assert_close(gradient_norm(ours, vae), gradient_norm(theirs, encoder, decoder), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("model", ["dense", "convolutional"])
def test_by_hand_and_pyro_compute_the_same_loss(imported: Any, model: str) -> None:
    pyro_example, by_hand = imported("peers/pyro_example.py"), sys.modules["by_hand"]
    vae = pyro_example.VAE(model).double()
    x = torch.rand(4, *pyro_example.EVENT[model], dtype=torch.float64).round()
    torch.manual_seed(1)
    theirs = RenyiELBO(0, num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    by_hand_loss = by_hand.iwae(vae.encoder, vae.decoder, x, 3, model)
    assert theirs == pytest.approx(by_hand_loss.item(), rel=1e-9)


@pytest.mark.parametrize("contestant", ["by_hand.py", "pyro_example.py", "by_pyrovae.py"])
def test_a_contestant_trains_and_reports_its_failures(contestant: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", (np.random.default_rng(0).random((2, 10, 784)) < 0.1).astype(np.float32))
    np.save(tmp_path / "rows.npy", np.zeros((50, 784), np.uint8))
    build = {"do": "build", "model": "dense", "batch": 10, "K": 2, "x": str(tmp_path / "x.npy"), "device": "cpu"}
    requests = [
        {**build, "rows": str(tmp_path / "missing.npy")},
        {"do": "steps", "number": 1},
        {"do": "steps", "number": 30},
        {"do": "memory"},
        {"do": "epoch"},
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", BENCHMARKS / "peers" / contestant, "eager"],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    built, first, later, memory, failed = map(json.loads, done.stdout.splitlines())
    assert built["parameters"] == 425_284
    assert len(later["seconds"]) == 30
    assert 0 < later["loss"] < 0.8 * first["loss"]
    assert memory["MiB"] > 100
    assert "missing.npy" in failed["error"]


def test_operations_are_those_that_torch_counts(imported: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    speed, by_hand = imported("speed.py"), imported("peers/by_hand.py")
    networks = sys.modules["networks"]
    for setting in (speed.Setting("dense", 7, 3), speed.Setting("convolutional", 2, 3)):
        encoder, decoder = networks.make_encoder(setting.model), networks.make_decoder(setting.model)
        x = torch.rand(setting.batch, *networks.EVENT[setting.model])
        with FlopCounterMode(display=False) as counter:
            by_hand.iwae(encoder, decoder, x, setting.K, setting.model).backward()
        assert speed.operations(setting) == counter.get_total_flops()


def test_the_report_compares_medians(imported: Any, tmp_path: Path) -> None:
    speed = imported("speed.py")
    results = speed.Results(versions={"torch": "2"})
    for name, milliseconds in (("by-hand", 6.0), ("by-hand-compiled", 4.0), ("pyrovae", 3.0), ("numpyro", 5.0)):
        for setting in (speed.Setting("dense", 100, 1), speed.Setting("convolutional", 100, 1)):
            if name == "numpyro" and setting.model == "convolutional":
                continue  # one that was left out
            results.add(name, setting, "step", "ms", [milliseconds, 0.0, 100.0])
            for quantity in ("memory", "compiling", "loss", "start-up", "compiling again", "parameters"):
                results.add(name, setting, quantity, "", [1.0])
    text = speed.report(speed.parse(["--threads", "2"]), results, rate=1e12)
    rows = {heading.splitlines()[0]: heading for heading in text.split("\n## ")}
    relative = rows["Step, relative to by hand, compiled (below 1: faster)"]
    assert "| dense | 100 | 1 | 1.50 | 1.00 | 1.25 | 0.75 |" in relative
    assert "| convolutional | 100 | 1 | 1.50 | 1.00 | – | 0.75 |" in relative
    speed.draw(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
