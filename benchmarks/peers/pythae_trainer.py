"""The model in Pythae, trained by its BaseTrainer: VAE for K = 1, IWAE with number_samples = K otherwise.

The encoder and decoder are our own, in its way: the encoder returns the log-variance, the decoder probabilities. Its
Gaussian likelihood has unit variance. Pixels are made binary a batch at a time, where the trainer takes a batch in.
"""

import functools
import tempfile
from importlib.metadata import version

import numpy as np
import torch
from by_hand import memory
from networks import EVENT, Z, count_parameters, make_decoder, make_encoder
from pythae.data.datasets import BaseDataset
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor
from worker import Peer, peak_resident, serve, timed


class Encoder(BaseEncoder):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.layers = make_encoder(model)

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_variance = self.layers(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=log_variance)


class Decoder(BaseDecoder):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.layers = make_decoder(model)
        self.binary = model == "dense"

    def forward(self, z: Tensor) -> ModelOutput:
        out = self.layers(z)
        return ModelOutput(reconstruction=torch.sigmoid(out) if self.binary else out)


class Trainer(BaseTrainer):
    """BaseTrainer, with pixels of a batch drawn anew whenever it is taken in."""

    def _set_inputs_to_device(self, inputs: dict) -> dict:
        inputs = super()._set_inputs_to_device(inputs)
        p = inputs["data"]
        inputs["data"] = (p > torch.rand_like(p)).float()
        return inputs


def build(model: str, batch: int, K: int, x: str, rows: str | None, device: str) -> Peer:
    options = {
        "input_dim": EVENT[model],
        "latent_dim": Z,
        "reconstruction_loss": "bce" if model == "dense" else "mse",
    }
    parts = {"encoder": Encoder(model), "decoder": Decoder(model)}
    vae = VAE(VAEConfig(**options), **parts) if K == 1 else IWAE(IWAEConfig(number_samples=K, **options), **parts)
    batches = torch.from_numpy(np.load(x))

    def trainer_of(data: Tensor) -> Trainer:
        config = BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            no_cuda=device == "cpu",
        )
        trainer = Trainer(vae, BaseDataset(data, torch.zeros(len(data))), training_config=config)
        trainer.prepare_training()
        return trainer

    trainer = trainer_of(batches[0])
    batches = batches.to(device)

    def step(i: int) -> float:
        data = batches[i % len(batches)]
        output = trainer.model({"data": data}, epoch=1, dataset_size=len(data), uses_ddp=False)
        trainer._optimizers_step(output)
        return output.loss.item()

    @functools.cache
    def epochs() -> Trainer:
        return trainer_of(torch.from_numpy(np.load(rows)) / 255)

    def epoch() -> float:
        epochs()  # reading the file is not part of the epoch
        return timed(lambda: epochs().train_step(1))

    return Peer(
        parameters=count_parameters(vae),
        step=step,
        epoch=epoch,
        versions={"torch": torch.__version__, "pythae": version("pythae")},
        memory=memory if device == "cuda" else peak_resident,
    )


if __name__ == "__main__":
    serve(build)
