"""What guides close of the approximation gap, where the posterior is bent and where it has two modes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "guides.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The benchmark of guides."""
    spec = importlib.util.spec_from_file_location("benchmark_of_guides", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_log_p_by_quadrature_is_that_of_another_grid(script: ModuleType) -> None:
    """Twice as coarse a grid gives the same log p(x), of both pairs."""
    for name in script.PAIRS:
        torch.manual_seed(0)
        x = script.rows(name, 5)
        vae = script.VAE(script.StandardNormal(2), script.PAIRS[name](), script.GUIDES["mean-field"](x))
        points, log_area = script.grid(121)
        with torch.no_grad():
            coarse = [vae.log_joint(row.expand(len(points), -1), points).logsumexp(0) + log_area for row in x]
        assert_close(script.log_p(vae, x), torch.stack(coarse), rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guide"), [("banana", "flow"), ("two modes", "mixture")])
def test_nine_tenths_of_the_approximation_gap_are_closed(script: ModuleType, name: str, guide: str) -> None:
    """By a flow on the banana and by a mixture on the two modes, network and all; by mean-field guides nothing."""
    x = script.rows(name, 200)
    plain, other = (script.trained(name, kind, x, epochs) for kind, epochs in (("mean-field", 60), (guide, 200)))
    exact = script.log_p(plain, x)
    least = script.approximation_gap([plain, other], x, exact)
    assert least.mean() > 0.3
    assert script.closed(least, script.gap(plain, x, exact)) < 0.1
    own = script.gap(other, x, exact)
    assert script.closed(least, own) > 0.9
    assert own.mean() > -0.01  # an ELBO above log p(x) would be none
