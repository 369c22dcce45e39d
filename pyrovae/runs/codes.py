"""The density of codes that a run without a p(x) draws from, in codes.safetensors beside its checkpoints.

It is fit when the training has ended, so that no checkpoint has it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pyrovae.errors import CheckpointError, UsageError
from pyrovae.files import inside, write_atomically

if TYPE_CHECKING:
    from pyrovae.data import Rows
    from pyrovae.models import Reconstruction

NAME = "codes.safetensors"
MOST_ROWS = 20_000  # of the training rows, whose codes are fit to


def fit_codes(model: "Reconstruction", rows: "Rows", directory: Path, seed: int) -> str:
    """Fit the density of a trained model's codes and keep it; what it is, in words."""
    from safetensors.torch import save

    from pyrovae.seeding import seeded

    device = next(model.parameters()).device
    with seeded(seed, "codes"):
        train = rows.transform(rows.train[:: -(-len(rows.train) // MOST_ROWS)]).to(device)
        found = model.fit_codes(train, rows.validation.to(device), seed=seed)
    tensors = {name: value.contiguous() for name, value in found.state_dict().items()}
    write_atomically(inside(directory, NAME), save(tensors))
    return found.description


def read_codes(model: "Reconstruction", directory: Path) -> None:
    """Give a model the density of its codes that its run has kept, if it has.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from pyrovae.files import read_bytes
    from pyrovae.models import GaussianMixture

    path = inside(directory, NAME)
    try:
        tensors = load(read_bytes(path))
        found = GaussianMixture(model.latent_dim, components=len(tensors["means"])).double()
        found.load_state_dict(tensors)
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UsageError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({what}); resume the run, which makes it anew") from error
    model.codes = found.requires_grad_(False).eval()
