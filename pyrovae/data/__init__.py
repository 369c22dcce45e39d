r"""Data: where rows come from, how they are split, and the measure on which a model of them is scored.

`load_data` returns `Data`: raw rows in three fixed splits. `Data.rows` makes of them `Rows`, what a model trains on
and is scored on, for one measure:

- **mass**: p(x) is a probability, x in {0,1}^D. Grey pixels become binary ones; a pixel of level l out of L is 1
  with probability l / (L - 1).
- **density**: p(x) is a density. Grey levels are dequantised, x = (l + u) / L with u ~ U[0,1), so that

      log P(l) >= E_u log p(x) - D log L

  (Jensen), and -log p(x) / (D log 2) + log2 L bounds the bits per dimension of the levels l from above.

- **counts**: p(x) is a probability, x in {0, 1, 2, ...}^D.

- **columns**: of a table whose columns are of several kinds, a density of some columns times a mass of the others.

Nats of different measures are not comparable, so every `Rows` carries its `Measure`, and a `hash` that two runs share
only if they are scored on identical rows. Training rows may be drawn anew in every epoch; validation and test rows
never are, and neither they nor the splits depend on a global seed.

A named source is an entry of `pyrovae.data.sources`; any other source is a path: .npz, .npy, .csv, or a folder of
images. The training rows of a .npy file that does not fit in memory stay in it (`pyrovae.data.streaming`). Nothing
depends on whether they do: splits are a function of the number of rows, and what is found out about all rows (that
they are finite, or binary; their hash, moments and overlap) is computed block by block, in the order of the source.

From the file to the model: `sources` and `files` (with `arrays`, for NumPy's) give what was `found`; `loading` checks
and splits it, after a `summary` of all rows; `rows` brings it into the space of a likelihood (`spaces`, by
`transforms`), where log p(x) has a `measure`, beside what is `given`.

The public names below are imported when they are first used: the commands list the sources in their `--help`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrovae.data.found import SPLITS as SPLITS
    from pyrovae.data.loading import STREAM as STREAM
    from pyrovae.data.loading import load_data as load_data
    from pyrovae.data.measure import Measure as Measure
    from pyrovae.data.rows import Data as Data
    from pyrovae.data.rows import Rows as Rows
    from pyrovae.data.sources import NAMES as NAMES
    from pyrovae.data.sources import SOURCES as SOURCES
    from pyrovae.data.sources import find_source as find_source
    from pyrovae.data.spaces import Binary as Binary
    from pyrovae.data.spaces import Continuous as Continuous
    from pyrovae.data.spaces import Counts as Counts
    from pyrovae.data.spaces import OfColumns as OfColumns
    from pyrovae.data.spaces import Reading as Reading
    from pyrovae.data.spaces import Space as Space
    from pyrovae.data.spaces import default_measure as default_measure
    from pyrovae.data.streaming import MappedRows as MappedRows
    from pyrovae.data.transforms import Standardize as Standardize

# Public name -> the module that defines it.
_HOME = {
    **dict.fromkeys(("STREAM", "load_data"), "loading"),
    "Measure": "measure",
    **dict.fromkeys(("Data", "Rows"), "rows"),
    **dict.fromkeys(("NAMES", "SOURCES", "find_source"), "sources"),
    "SPLITS": "found",
    **dict.fromkeys(("Binary", "Continuous", "Counts", "OfColumns", "Reading", "Space", "default_measure"), "spaces"),
    "MappedRows": "streaming",
    "Standardize": "transforms",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pyrovae.data' has no attribute {name!r}")
    return getattr(import_module(f"pyrovae.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
