"""Matrix products and convolutions with factors in bfloat16, in graphs and in eager code; all else is not rounded."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def half_products(node: fx.Node, *args: Any) -> fx.Proxy | None:
    """A matrix product or convolution of single-precision numbers rounded to bfloat16; what is added is not rounded."""
    if node.target not in PRODUCTS or first(node.meta["val"]).dtype != torch.float32 or node.kwargs:
        return None
    return half_product(node.target, *args)


class HalfProducts(TorchDispatchMode):
    """The same for every product in eager code and its gradient, in the context of this mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or kwargs or any(isinstance(a, Tensor) and a.dtype != torch.float32 for a in args):
            return func(*args, **(kwargs or {}))
        return half_product(func, *args)


def half_product(product: Any, *args: Any) -> Any:
    """A product of tensors, or of proxies for them, with its factors rounded to bfloat16."""
    if product is aten.convolution_backward.default:
        slope, x, weight, _, *rest, (of_x, of_weight, of_bias) = args
        mask = [of_x, of_weight, False]
        grads = product(half(slope), half(x), half(weight), None, *rest, mask)
        over = [0, *range(2, ndim(slope))]
        return (
            single(grads[0]) if of_x else None,
            single(grads[1]) if of_weight else None,
            aten.sum.dim_IntList(slope, over) if of_bias else None,
        )
    if product is aten.convolution.default:
        a, b, bias, *rest = args
        result = single(product(half(a), half(b), None, *rest))
        return result if bias is None else result + aten.reshape.default(bias, [1, -1] + [1] * (ndim(a) - 2))
    *added, a, b = args
    plain = aten.bmm.default if product in (aten.bmm.default, aten.baddbmm.default) else aten.mm.default
    result = single(plain(half(a), half(b)))
    return result + added[0] if added else result


PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)


def first(value: Any) -> Tensor:
    """A tensor, or the first one of several."""
    return next(v for v in value if v is not None) if isinstance(value, tuple | list) else value


def ndim(a: Any) -> int:
    """The number of dimensions of a tensor, or of the one a proxy stands for."""
    return a.ndim if isinstance(a, Tensor) else a.node.meta["val"].ndim


def half(a: Any) -> Any:
    """A tensor in bfloat16."""
    return aten._to_copy.default(a, dtype=torch.bfloat16)


def single(a: Any) -> Any:
    """A tensor in single precision."""
    return aten._to_copy.default(a, dtype=torch.float32)
