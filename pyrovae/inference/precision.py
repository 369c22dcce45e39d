"""How numbers are rounded: products on a CUDA device, bfloat16, and denormal numbers.

Torch has two sets of names for it, of which its compiler reads the older ones, which cannot be read at all where the
newer ones were set to something that they cannot say. So the older ones are set, and all are put back.
"""

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from pyrovae.errors import UsageError
from pyrovae.inference.batch import Batch
from pyrovae.inference.modules import modules_of

PRECISIONS = ("fp32", "tf32", "bf16-mixed")

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Products and convolutions on a CUDA device as `precision` says, the same ones each time; as before at the end."""
    if device.type != "cuda":
        yield
        return
    cudnn, products = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.cuda.matmul)
    newer = [products, cast(Any, torch.backends.mkldnn).matmul, cudnn.conv, cudnn.rnn]
    before, deterministic = [names.fp32_precision for names in newer], cudnn.deterministic
    # An older name that cannot be read says the contrary of the newer one.
    of_products = "highest" if products.fp32_precision == "tf32" else "high"
    of_convolutions = cudnn.conv.fp32_precision != "tf32"
    with suppress(RuntimeError):
        of_products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        of_convolutions = cudnn.allow_tf32
    rounded = precision == "tf32"
    try:
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        cudnn.allow_tf32, cudnn.deterministic = rounded, True
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if rounded else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(of_products)
        cudnn.allow_tf32, cudnn.deterministic = of_convolutions, deterministic
        for names, value in zip(newer, before, strict=True):
            names.fp32_precision = value


def in_single_precision(function: Callable[P, T]) -> Callable[P, T]:
    """A function of a pair, or of tensors, that computes in single precision on the CUDA device on which they are."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> T:
        with arithmetic("fp32", device_of(*args, *kwargs.values())):
            return function(*args, **kwargs)

    return exact


def device_of(*values: object) -> torch.device:
    """The CUDA device of tensors, batches, lists of them, or programs with parameters; the CPU if they are on none."""
    for value in values:
        for tensor in tensors_in(value):
            if tensor.device.type == "cuda":
                return tensor.device
    return torch.device("cpu")


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of a batch, a list or a tuple, the parameters of a program, or a tensor itself."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Batch):
        yield from value.tensors
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif callable(value):
        yield from (p for _, module in modules_of(value) for p in module.parameters())


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have."""
    if precision not in PRECISIONS:
        raise UsageError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"precision: tf32 is for CUDA devices, got {device}; use fp32 or bf16-mixed")
    if precision == "bf16-mixed" and not has_bfloat16(device):
        raise UsageError(f"precision: this {device.type} does not compute in bfloat16; use fp32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 numbers by instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def flushing(wanted: bool) -> Iterator[None]:
    """Where wanted, take denormal numbers for zero in this thread, and as before at the end.

    Normalised importance weights underflow, and processors take many times longer over denormal numbers. Threads that
    torch has started before are not reached, which is why `log_mean_exp` gives negligible weights no gradient at all.
    """
    before = bool(torch.tensor(1e-40, dtype=torch.float32) == 0)
    if wanted:
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
