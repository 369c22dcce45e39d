"""The model written by hand in torch: python by_hand.py eager|compiled

"eager" is what most people write: Adam as it comes, a DataLoader. "compiled" is what one writes who knows torch well:
the loss compiled, Adam fused, denormal numbers flushed to zero, rows indexed in memory.
"""

import functools
import math
import sys

import numpy as np
import torch
from networks import SCALE, count_parameters, make_decoder, make_encoder
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torch.utils.data import DataLoader, TensorDataset
from worker import Peer, peak_resident, serve, timed


def log_likelihood(out: Tensor, x: Tensor, model: str) -> Tensor:
    """log p(x|z), summed over the event, of logits or means out (..., *event)."""
    if model == "dense":
        return -binary_cross_entropy_with_logits(out, x.expand_as(out), reduction="none").sum(-1)
    return torch.distributions.Normal(out, SCALE, validate_args=False).log_prob(x).flatten(-3).sum(-1)


def elbo(encoder: nn.Module, decoder: nn.Module, x: Tensor, model: str) -> Tensor:
    """-ELBO summed over rows, with one sample and the KL divergence in closed form."""
    loc, raw = encoder(x).chunk(2, -1)
    scale = softplus(raw)
    z = loc + scale * torch.randn_like(loc)
    kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
    return (kl - log_likelihood(decoder(z), x, model)).sum()


def iwae(encoder: nn.Module, decoder: nn.Module, x: Tensor, k: int, model: str) -> Tensor:
    """-log (1/K) sum_k w_k summed over rows."""
    loc, raw = encoder(x).chunk(2, -1)
    scale = softplus(raw)
    noise = torch.randn(k, *loc.shape, dtype=loc.dtype, device=loc.device)
    z = loc + scale * noise
    out = decoder(z.flatten(0, 1)).unflatten(0, (k, len(x)))
    log_prior_less_guide = (0.5 * noise.square() - 0.5 * z.square() + scale.log()).sum(-1)
    log_w = log_likelihood(out, x, model) + log_prior_less_guide
    return (math.log(k) - torch.logsumexp(log_w, 0)).sum()


def build(model: str, batch: int, K: int, x: str, rows: str | None, device: str, compiled: bool) -> Peer:
    if compiled:
        torch.set_flush_denormal(True)
    encoder, decoder = make_encoder(model).to(device), make_decoder(model).to(device)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True if compiled else None)
    loss_of = functools.partial(elbo, model=model) if K == 1 else functools.partial(iwae, k=K, model=model)
    if compiled:
        loss_of = torch.compile(loss_of)
    batches = torch.from_numpy(np.load(x)).to(device)

    def train(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(encoder, decoder, x)
        loss.backward()
        optimizer.step()
        return loss.item() / len(x)

    @functools.cache
    def loader() -> DataLoader:
        return DataLoader(TensorDataset(torch.from_numpy(np.load(rows)) / 255), batch_size=batch, shuffle=True)

    @functools.cache
    def in_memory() -> Tensor:
        return torch.from_numpy(np.load(rows)).to(device)

    def from_loader() -> None:
        for (p,) in loader():
            p = p.to(device)
            train((p > torch.rand_like(p)).float())

    def from_memory() -> None:
        for index in torch.randperm(len(in_memory()), device=device).split(batch):
            p = in_memory()[index] / 255
            train((p > torch.rand_like(p)).float())

    def epoch() -> float:
        in_memory() if compiled else loader()  # reading the file is not part of the epoch
        return timed(from_memory if compiled else from_loader)

    return Peer(
        parameters=count_parameters(encoder, decoder),
        step=lambda i: train(batches[i % len(batches)]),
        epoch=epoch,
        versions={"torch": torch.__version__},
        memory=memory if device == "cuda" else peak_resident,
    )


def memory() -> float:
    """Peak memory on the GPU, in MiB."""
    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    serve(functools.partial(build, compiled=sys.argv[1:] == ["compiled"]))
