"""Features for the Frechet distance: what a classifier of the labels, trained here, has before its last layer.

Weights of the Inception network, of which FID is, cannot be shipped, and are of photographs. What a classifier of the
data's own labels looks at is what tells its classes apart: a distance of such features says whether samples have the
classes' shapes and shares, and little of what is alike in all classes. The classifier is the same for the same rows:
its seed is fixed, whatever that of a run or an evaluation is, so that the distances of all models of them compare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from pyrovae.errors import UsageError
from pyrovae.inference.tracing.recording import reason
from pyrovae.models.autoencoder import Autoencoder
from pyrovae.models.networks import MLP, ConvEncoder, Network
from pyrovae.quality import Frechet, frechet_distance
from pyrovae.quality.frechet import check_enough
from pyrovae.quality.reconstructions import is_image
from pyrovae.runs.directory import open_run
from pyrovae.runs.progress import Say, silent
from pyrovae.runs.quality import Draws
from pyrovae.seeding import seeded

if TYPE_CHECKING:
    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch

WIDTH = 16  # features: the bias of the distance grows with their square
STEPS, BATCH = 1000, 100  # of training the classifier
BLOCK = 500  # rows at once


@dataclass(frozen=True)
class Features:
    """What is looked at of x, and what it is called.

    Attributes:
        of: Maps x of shape (N, *event) to features, shape (N, F), each row by itself.
        description: Of what they are, for whoever wants to compare distances: only those of the same features do.
    """

    of: Callable[[Tensor], Tensor]
    description: str

    def __call__(self, x: Tensor) -> Tensor:
        """Features of x (N, *event), shape (N, F)."""
        with torch.no_grad():
            return torch.cat([self.of(block) for block in x.split(BLOCK)])


# What makes features of rows, on a device, and says what they are.
MakeFeatures = Callable[["Rows", torch.device | str, Say], Features]


def classifier_features(rows: "Rows", device: torch.device | str = "cpu", say: Say = silent) -> Features:
    """Train a small classifier on the labelled training rows: `WIDTH` features before its softmax.

    Strided convolutions for images, else dense layers; 1,000 steps of Adam on 100 rows.

    Raises:
        UsageError: the rows have no labels, or of one class only.
    """
    labels, train = rows.labels, rows.train
    if labels["train"] is None or labels["test"] is None:
        raise UsageError(
            "features: the rows have no labels to train a classifier on; from Python, give features of your own"
        )
    classes = int(max(labels["train"].max(), labels["test"].max())) + 1
    if len(labels["train"].unique()) < 2:
        raise UsageError(
            "features: the rows are all of one class, which none can tell apart; from Python, give features of your own"
        )
    with seeded("classifier", device=device):
        image = is_image(rows.event_shape)
        body = (
            ConvEncoder(rows.event_shape, channels=(16, 32), hidden=WIDTH)
            if image
            else MLP(rows.event_shape, hidden=(64, WIDTH), activation="relu")
        )
        network = nn.Sequential(body, nn.Linear(WIDTH, classes)).to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(STEPS):
            chosen = torch.randint(len(train), (BATCH,))
            x, y = rows.transform(train[chosen].to(device)), labels["train"][chosen].to(device)
            loss = nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.requires_grad_(False).eval()
    x, y = rows.test.to(device), labels["test"].to(device)
    right = torch.cat([network(block).argmax(1) for block in x.split(BLOCK)]) == y
    description = (
        f"the {WIDTH} features of a classifier trained on the training rows' labels "
        f"({100 * right.double().mean().item():.1f} % of the test rows right)"
    )
    say(f"features: {description}")
    return Features(body, description)


def network_for(chosen: str, rows: "Rows", say: Say = silent) -> Network:
    """What a pair is trained to look through (`pyrovae.models.Perception`): of rows, to a vector of features.

    Args:
        chosen: "classifier", the body of `classifier_features`; the directory of an autoencoder's run, whose code of x
            it is; or a file that `torch.export.save` wrote.
        rows: To train the classifier on.
        say: Called with what it is.

    Raises:
        UsageError: the rows have no labels; or the run is no autoencoder's, or the file of no module, of such rows.
        CheckpointError: the run is damaged.
    """
    if chosen == "classifier":
        body = classifier_features(rows, say=say).of
        assert isinstance(body, Network)
        return body
    if Path(chosen).is_dir():
        return codes_network(chosen, tuple(rows.event_shape))
    return exported_network(chosen, tuple(rows.event_shape))


class Codes(nn.Module):
    """The code of x by a trained autoencoder, with a gradient by x."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.point = model.point

    def forward(self, x: Tensor) -> Tensor:
        """Codes of x (N, *event), shape (N, Z)."""
        return self.point.parameters_of(x)


def codes_network(directory: str, event_shape: tuple[int, ...]) -> Network:
    """The code of x by the autoencoder of a run, which in DARLA is a denoising one.

    Raises:
        UsageError: the run is no autoencoder's, or of other rows.
    """
    model = open_run(directory).model()
    if not isinstance(model, Autoencoder) or tuple(model.event_shape) != event_shape:
        of = f"of rows of shape {tuple(model.event_shape)}" if isinstance(model, Autoencoder) else "no autoencoder's"
        raise UsageError(
            f"elbo.network: {directory} is a run {of}; expected one of an autoencoder of rows of shape {event_shape}",
            settings=("elbo.network",),
        )
    return Network(Codes(model), event_shape, model.latent_dim)


def exported_network(file: str, event_shape: tuple[int, ...]) -> Network:
    """The module in a file that `torch.export.save` wrote, from rows of an event shape to flat features.

    Raises:
        UsageError: there is none, or it does not map any number of such rows to features.
    """
    named = ("elbo.network",)
    if not Path(file).is_file():
        raise UsageError(
            f"elbo.network: {file} ({Path(file).absolute()}) is no file; give one that torch.export.save wrote, the "
            "run of an autoencoder, or classifier",
            settings=named,
        )
    try:
        module: Any = torch.export.load(file).module()
        body = nn.Sequential(fx.GraphModule(module, module.graph), nn.Flatten())
        two, three = (body(torch.zeros(rows, *event_shape)) for rows in (2, 3))
    except Exception as error:  # of zip files, of shapes: of whatever is in it
        raise UsageError(
            f"elbo.network: {file} holds no module of torch.export that takes any number of rows of shape "
            f"{event_shape} ({reason(error)}); export it for them, with dynamic_shapes for the rows",
            settings=named,
        ) from error
    if not two.is_floating_point() or two.shape[1:] != three.shape[1:] or (len(two), len(three)) != (2, 3):
        raise UsageError(
            f"elbo.network: {file} gives {tuple(two.shape)} for 2 rows; expected features, floating-point numbers, of "
            "each row",
            settings=named,
        )
    return Network(body, event_shape, two.shape[1:])


def features_for(make: MakeFeatures, rows: "Rows", batch: "Batch", say: Say = silent) -> Features:
    """Features made of rows, to look at a batch of them with.

    Raises:
        UsageError: they cannot be made, or there are too few rows for so many.
    """
    features = make(rows, batch.x.device, say)
    check_enough(len(batch), features(batch.x[:1]).shape[1])
    return features


def frechet_of(model: Draws, batch: "Batch", features: Features, seed: int = 0) -> Frechet:
    """The Frechet distance between rows and draws of x from a model, on features of both.

    As many are drawn as there are rows, each given what that row is given.

    Args:
        model: In evaluation mode, on the batch's device.
        batch: Rows of data, and what they are given.
        features: Of what.
        seed: Of the draws.

    Raises:
        UsageError: too few rows for so many features.
    """
    with seeded(seed, "frechet draws", device=batch.x.device), torch.no_grad():
        drawn = [features(model.sample(len(block), *block.given).to(batch.x)) for block in batch.split(BLOCK)]
    return frechet_distance(features(batch.x), torch.cat(drawn), seed)


def of_frechet(model: Any, batch: "Batch", features: Features, seed: int = 0) -> dict[str, Any] | None:
    """The Frechet distance as plain values, and what it is of; None for a model that nothing can be drawn from."""
    if not isinstance(model, Draws):
        return None
    found = frechet_of(model, batch, features, seed)
    return {
        "about": "squared Frechet distance of rows and as many draws of x; no likelihood",
        "features": features.description,
        "dimensions": found.dimensions,
        "extrapolated": found.extrapolated,
        "error": found.error,
        "by_rows": [{"rows": rows, "distance": distance} for rows, distance in found.by_rows.items()],
        "seed": seed,
    }
