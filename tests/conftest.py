"""What every test file shares: isolation, and the two ways a number is compared with its truth."""

import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module

import pyro
import pytest
import torch
from torch import Tensor

EXACT = {"rtol": 0.0, "atol": 1e-10}
SOLVED = {"rtol": 0.0, "atol": 1e-8}  # one linear solve away


# Commands and kernels that tests start: what they compute is as small as here.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def free_port() -> int:
    """A port to meet at, below those that other processes are given by chance until ours are there."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = secrets.choice(range(20_000, 30_000))
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Each test starts from the same seed and an empty parameter store, and leaves the process as it found it."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)  # tensors here are tiny: threads would only wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pyro.clear_param_store()
        yield
        pyro.clear_param_store()
    torch.set_num_threads(threads)
    assert torch.get_default_dtype() == dtype


def assert_mean(samples: Tensor, truth: Tensor | float, least: float | None = None) -> None:
    """The mean over dimension 0 of independent samples is `truth`, to 5 standard errors of these very samples.

    `least` is a difference that the test has to be able to see: 5 standard errors must be below it.
    """
    samples = samples.detach()
    truth = torch.as_tensor(truth, dtype=samples.dtype)
    error = samples.std(0) / math.sqrt(len(samples))
    if least is not None:
        assert (5 * error).max() < least, f"no power: 5 s.e. = {5 * error}, to be seen: {least}"
    difference = samples.mean(0) - truth
    assert (difference.abs() <= 5 * error + 1e-9 * truth.abs()).all(), (
        f"mean - truth = {difference}, standard error = {error}, truth = {truth}"
    )


def sigma_points(dim: int) -> Tensor:
    """The 2 dim points +-sqrt(dim) e_i: their plain average is E under N(0, I) of any polynomial of degree 3."""
    points = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64)
    return torch.cat([points, -points])


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`noise(table, ...)`: Gaussians draw their noise from tables (K, d) or (K, N, d), chosen by d, not at random."""

    def use(*tables: Tensor) -> None:
        by_size = {table.shape[-1]: table if table.ndim == 3 else table[:, None] for table in tables}

        def standard_normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            return by_size[shape[-1]].to(dtype).expand(shape)

        for module in ("normal", "multivariate_normal", "lowrank_multivariate_normal"):
            monkeypatch.setattr(f"torch.distributions.{module}._standard_normal", standard_normal)

    return use


@pytest.fixture
def unexamined(monkeypatch: pytest.MonkeyPatch) -> None:
    """`log_marginal` and `fit` without their look at the pair: for programs that change from run to run on purpose."""
    from pyrovae.inference.batch import Batch
    from pyrovae.inference.enumeration import Joint, Summation
    from pyrovae.inference.pair import Pair
    from pyrovae.inference.validity import Findings

    def found(pair: object, batch: Batch, rows: int | None = None, total: int | None = None) -> Findings:
        return Findings(rows=rows or len(batch), whole=False, no_density=None)

    def nothing(pair: Pair, *_: object) -> Summation:
        return Summation(pair, Joint(), None, None, "")

    # The package has functions of the modules' names.
    monkeypatch.setattr(import_module("pyrovae.inference.marginal"), "check_pair", found)
    monkeypatch.setattr(import_module("pyrovae.inference.marginal"), "summation", nothing)
    monkeypatch.setattr(import_module("pyrovae.inference.training.trial"), "examine", found)
