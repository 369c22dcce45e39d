"""The model declared in pyrovae: python by_pyrovae.py eager|compiled

Steps are `pyrovae.inference.training.step.Step`, which is what `fit` takes; epochs are those of `fit`.
"""

import functools
import sys

import numpy as np
import torch
from networks import EVENT, SCALE, Z, count_parameters
from worker import Peer, peak_resident, serve

import pyrovae
from pyrovae.data.transforms import DrawnPixels
from pyrovae.inference import ELBO, IWAE, fit
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.inference.training.optimizers import adam
from pyrovae.inference.training.step import Step
from pyrovae.models import MLP, VAE, Bernoulli, ConvDecoder, ConvEncoder, Gaussian, MeanFieldNormal, StandardNormal


def declare(model: str) -> VAE:
    shape = EVENT[model]
    if model == "dense":
        return VAE(StandardNormal(Z), Bernoulli(MLP(Z, shape)), MeanFieldNormal(MLP(shape), Z))
    likelihood = Gaussian(ConvDecoder(Z, shape, channels=(32, 64)), scale=SCALE)
    return VAE(StandardNormal(Z), likelihood, MeanFieldNormal(ConvEncoder(shape, channels=(32, 64)), Z))


def build(model: str, batch: int, K: int, x: str, rows: str | None, device: str, compiled: bool) -> Peer:
    vae = declare(model).to(device)
    objective = ELBO() if K == 1 else IWAE(K)
    pair = Pair(vae.model, vae.guide)
    step = Step(objective, pair, adam(list(pair.trainable().values())), compiled=compiled)
    batches = torch.from_numpy(np.load(x)).to(device)

    def train(x: torch.Tensor) -> float:
        loss = step(Batch(x), 0)
        return (step.settle() if loss is None else loss) / len(x)  # on a GPU it is only read when asked for

    @functools.cache
    def data() -> torch.Tensor:
        return torch.from_numpy(np.load(rows))

    def epoch() -> float:
        result = fit(
            vae.model,
            vae.guide,
            data(),
            objective,
            epochs=1,
            batch_size=batch,
            transform=DrawnPixels(256),
            compile="on" if compiled else "off",
            progress=False,
        )
        return result.history[-1]["seconds"]

    return Peer(
        parameters=count_parameters(vae),
        step=lambda i: train(batches[i % len(batches)]),
        epoch=epoch,
        versions={"torch": torch.__version__, "pyrovae": pyrovae.__version__},
        memory=(lambda: torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else peak_resident,
    )


if __name__ == "__main__":
    serve(functools.partial(build, compiled=sys.argv[1:] == ["compiled"]))
