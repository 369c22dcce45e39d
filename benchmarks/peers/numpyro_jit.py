"""The model as NumPyro's own VAE example has it: networks of stax, SVI, and an epoch as one `lax.fori_loop` under jit.

For K > 1 the bound is RenyiELBO(alpha=0). Convolutions have their channels last, as stax has them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.example_libraries import stax
from numpyro import optim
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from worker import Peer, serve, timed

Z, SCALE = 50, 0.1


def elementwise(fun):
    """A layer of stax without parameters."""
    return (lambda key, shape: (jax.eval_shape(fun, jnp.zeros(shape)).shape, ())), (lambda _, x, **__: fun(x))


def upsample(x: Array) -> Array:
    """Every pixel twice in both directions."""
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def convolution(channels: int, stride: int):
    return stax.Conv(channels, (3, 3), (stride, stride), ((1, 1), (1, 1)))


Upsample, Unflatten = elementwise(upsample), elementwise(lambda x: x.reshape(-1, 8, 8, 64))
# The last convolution has one bias per pixel in place of one per channel.
LastConvolution = (
    lambda key, shape: ((*shape[:3], 3), (0.02 * random.normal(key, (3, 3, shape[3], 3)), jnp.zeros((32, 32, 3)))),
    lambda p, x, **_: (
        lax.conv_general_dilated(x, p[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + p[1]
    ),
)


def encoder(model: str):
    """x to the location and scale of z."""
    if model == "dense":
        features = [stax.Dense(200), stax.Tanh, stax.Dense(200), stax.Tanh]
    else:
        features = [convolution(32, 2), stax.Relu, convolution(64, 2), stax.Relu, stax.Flatten]
        features += [stax.Dense(256), stax.Relu]
    both = stax.parallel(stax.Dense(Z), stax.serial(stax.Dense(Z), stax.Softplus))
    return stax.serial(*features, stax.FanOut(2), both)


def decoder(model: str):
    """z to logits or means."""
    if model == "dense":
        return stax.serial(stax.Dense(200), stax.Tanh, stax.Dense(200), stax.Tanh, stax.Dense(784))
    return stax.serial(
        *(stax.Dense(256), stax.Relu, stax.Dense(64 * 8 * 8), stax.Relu, Unflatten),
        *(Upsample, convolution(32, 1), stax.Relu, Upsample, LastConvolution),
    )


def declare(kind: str):
    """Model and guide."""

    def model(x: Array) -> None:
        decode = numpyro.module("decoder", decoder(kind), (x.shape[0], Z))
        with numpyro.plate("batch", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([Z]).to_event(1))
            likelihood = dist.Bernoulli(logits=decode(z)) if kind == "dense" else dist.Normal(decode(z), SCALE)
            numpyro.sample("obs", likelihood.to_event(x.ndim - 1), obs=x)

    def guide(x: Array) -> None:
        encode = numpyro.module("encoder", encoder(kind), x.shape)
        loc, scale = encode(x)
        with numpyro.plate("batch", x.shape[0]):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def build(model: str, batch: int, K: int, x: str, rows: str | None, device: str) -> Peer:
    bound = Trace_ELBO() if K == 1 else RenyiELBO(alpha=0, num_particles=K)
    svi = SVI(*declare(model), optim.Adam(1e-3), bound)
    arrays = np.load(x)
    batches = [jnp.asarray(a if model == "dense" else a.transpose(0, 2, 3, 1)) for a in arrays]
    state = svi.init(random.PRNGKey(0), batches[0])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(svi.get_params(state)))
    update = jax.jit(svi.update)

    def step(i: int) -> float:
        nonlocal state
        state, loss = update(state, batches[i % len(batches)])
        jax.block_until_ready(state)
        return float(loss) / batch

    @jax.jit
    def train(state, key, order, images):
        def body(i, carried):
            total, state = carried
            p = images[lax.dynamic_slice_in_dim(order, i * batch, batch)]
            binary = random.bernoulli(random.fold_in(key, i), p).astype(p.dtype)
            state, loss = svi.update(state, binary)
            return total + loss, state

        return lax.fori_loop(0, len(order) // batch, body, (0.0, state))

    @functools.cache
    def images() -> Array:
        return jnp.asarray(np.load(rows) / np.float32(255))

    generator = np.random.default_rng(0)

    def over_rows() -> None:
        nonlocal state
        key = random.PRNGKey(generator.integers(2**31))
        order = generator.permutation(len(images()))
        _, state = jax.block_until_ready(train(state, key, order, images()))

    def epoch() -> float:
        images()  # reading the file is not part of the epoch
        return timed(over_rows)

    return Peer(
        parameters=parameters,
        step=step,
        epoch=epoch,
        versions={"jax": jax.__version__, "numpyro": numpyro.__version__},
    )


if __name__ == "__main__":
    serve(build)
