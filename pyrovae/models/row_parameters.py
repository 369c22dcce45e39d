r"""Individual inference, trained as such: features of each training row's own, in the place of an encoder's.

    q(z|x_n) = F(h_n),        h_n a parameter of row n, with the guide F of any family

is the best that amortisation can come to: no row's answer is tied to another's, and what a guide of the same family
with an encoder loses against it is its amortisation gap. Rows are told apart by what they hold and not by their place,

    key(x) = sum_d a_d bits(x_d)  modulo 2^64,        two of them, with random odd a

so that q is a function of x: batches, their order, and rows that are alike need nothing else. Of two different rows
the keys are alike with a chance of about 2^-120. Rows that were not there when it was made have no parameters: a table
cannot tell what they would be. So there is no bound on validation or test rows, and it is refused by name.

References:
    Hoffman, Blei, Wang and Paisley 2013, Stochastic Variational Inference, https://arxiv.org/abs/1206.7055
"""

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrovae.errors import DataError, UsageError
from pyrovae.models.networks import Network
from pyrovae.settings import Count, checked

BITS = {4: torch.int32, 8: torch.int64}  # by the bytes of a number


class RowParameters(Network):
    """The encoder of a guide with parameters for each training row: x to features of its own.

    `MeanFieldNormal(RowParameters(x), Z)`, and any other guide, then trains by batches as it does with a network. A
    head maps features to the guide's parameters; with as many features as parameters it leaves each row all of them.

    Args:
        x: The rows, shape (N, *event): as the guide will see them, with no noise that is drawn anew.
        features: Of each row.
    """

    centred: ClassVar[bool] = False

    @checked
    def __init__(self, x: Tensor, features: Count = 64) -> None:
        if x.ndim < 2 or not len(x):
            raise UsageError(f"x: expected rows of shape (N, *event), got {tuple(x.shape)}")
        super().__init__(Table(x, features), tuple(x.shape[1:]), features)


class Table(nn.Module):
    """The features of rows, found by their keys."""

    factors: Tensor
    keys: Tensor

    def __init__(self, x: Tensor, features: int) -> None:
        super().__init__()
        self.register_buffer("factors", 2 * torch.randint(-(2**62), 2**62, (2, x[0].numel())) + 1)
        keys = torch.unique(self.keys_of(x), dim=0)  # in order of the first
        self.register_buffer("keys", keys)
        self.features = nn.Parameter(0.1 * torch.randn(len(keys), features))

    def keys_of(self, x: Tensor) -> Tensor:
        """The two keys of rows x (N, *event), shape (N, 2)."""
        bits = (x.flatten(1) + 0.0).contiguous().view(BITS[x.element_size()]).long()  # -0.0 is 0.0
        return torch.stack([(bits * factor).sum(1) for factor in self.factors], 1)

    def forward(self, x: Tensor) -> Tensor:
        """The features of rows x (N, *event), shape (N, features).

        Raises:
            DataError: a row is none of those that have parameters.
        """
        keys = self.keys_of(x)
        places = torch.searchsorted(self.keys[:, 0].contiguous(), keys[:, 0].contiguous()).clamp(max=len(self.keys) - 1)
        found = (self.keys[places] == keys).all(1)
        if dist.is_validation_enabled() and not found.all():  # as it is not in a trace, where x has no values
            count = int((~found).sum())
            raise DataError(
                f"x: {count} of {len(x)} rows are none of the {len(self.keys)} that this guide has parameters for. "
                "Make one of these rows and train it with the model held, or train a guide with an encoder, which "
                "answers for any row; rows that a transform draws anew are new ones"
            )
        return self.features[places].where(found.unsqueeze(1), torch.nan)
