"""The model as Pyro's own VAE example has it: SVI, Trace_ELBO, Pyro's Adam and a DataLoader.

For K > 1 it is RenyiELBO(alpha=0), the bound of the importance weighted autoencoder, with vectorised particles.
"""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from by_hand import memory
from networks import EVENT, SCALE, Z, count_parameters, make_decoder, make_encoder
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset
from worker import Peer, peak_resident, serve, timed


class VAE(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder, self.decoder = make_encoder(kind), make_decoder(kind)

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output for z of shape (N, Z), or (K, N, Z) where particles are vectorised."""
        return self.decoder(z.reshape(-1, Z)).reshape(*z.shape[:-1], *EVENT[self.kind])

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = x.new_zeros(x.shape[0], Z), x.new_ones(x.shape[0], Z)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            out = self.decode(z)
            if self.kind == "dense":
                pyro.sample("obs", dist.Bernoulli(logits=out).to_event(1), obs=x)
            else:
                pyro.sample("obs", dist.Normal(out, SCALE).to_event(3), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(z_loc, softplus(raw)).to_event(1))


def build(model: str, batch: int, K: int, x: str, rows: str | None, device: str) -> Peer:
    vae = VAE(model).to(device)
    if K == 1:
        bound = Trace_ELBO()
    else:
        bound = RenyiELBO(alpha=0, num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), bound)
    batches = torch.from_numpy(np.load(x)).to(device)

    @functools.cache
    def loader() -> DataLoader:
        return DataLoader(TensorDataset(torch.from_numpy(np.load(rows)) / 255), batch_size=batch, shuffle=True)

    def over_rows() -> None:
        for (p,) in loader():
            p = p.to(device)
            svi.step((p > torch.rand_like(p)).float())

    def epoch() -> float:
        loader()  # reading the file is not part of the epoch
        return timed(over_rows)

    return Peer(
        parameters=count_parameters(vae),
        step=lambda i: svi.step(batches[i % len(batches)]) / batch,
        epoch=epoch,
        versions={"torch": torch.__version__, "pyro": pyro.__version__},
        memory=memory if device == "cuda" else peak_resident,
    )


if __name__ == "__main__":
    serve(build)
