"""What a user may write as a pair, what is found in it, and what is refused by name."""

import functools
from types import ModuleType

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from conftest import EXACT, assert_mean
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyrovae.errors import PairError, UsageError
from pyrovae.inference import ELBO, IWAE, Pair, Renyi, log_marginal, log_weights
from pyrovae.inference.batch import Batch
from pyrovae.inference.modules import evaluating
from pyrovae.inference.weights import draw
from pyrovae.models import MLP, VAE, Bernoulli, Gaussian, HierarchicalVAE, MeanFieldNormal, StandardNormal

ENCODER = nn.Linear(4, 4).double()
DECODER = nn.Linear(2, 4).double()


def x_of(n: int = 5) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def program_of_model(decoder, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)


def program_of_guide(encoder, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc, log_scale = encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


# The ways to write a pair over two modules: each returns (model, guide, decoder, encoder).


def modules() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(2, 4).double(), nn.Linear(4, 4).double()


def as_methods_of_a_module():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = modules()

        def model(self, x: Tensor) -> None:
            program_of_model(self.decoder, x)

        def guide(self, x: Tensor) -> None:
            program_of_guide(self.encoder, x)

    both = Both()
    return both.model, both.guide, both.decoder, both.encoder


def as_methods_of_an_object():
    class Plain:
        def __init__(self) -> None:
            self.decoder, self.encoder = modules()

        def model(self, x: Tensor) -> None:
            program_of_model(self.decoder, x)

        def guide(self, x: Tensor) -> None:
            program_of_guide(self.encoder, x)

    plain = Plain()
    return plain.model, plain.guide, plain.decoder, plain.encoder


def as_modules():
    class Program(nn.Module):
        def __init__(self, net: nn.Module, program) -> None:
            super().__init__()
            self.net, self.program = net, program

        def forward(self, x: Tensor) -> None:
            self.program(self.net, x)

    decoder, encoder = modules()
    return Program(decoder, program_of_model), Program(encoder, program_of_guide), decoder, encoder


def as_closures():
    decoder, encoder = modules()
    return lambda x: program_of_model(decoder, x), lambda x: program_of_guide(encoder, x), decoder, encoder


def as_nested_closures():
    decoder, encoder = modules()

    def decode(z: Tensor) -> Tensor:
        return decoder(z)

    def encode(x: Tensor) -> Tensor:
        return encoder(x)

    return lambda x: program_of_model(decode, x), lambda x: program_of_guide(encode, x), decoder, encoder


def as_globals():
    def model(x: Tensor) -> None:
        program_of_model(DECODER, x)

    def guide(x: Tensor) -> None:
        program_of_guide(ENCODER, x)

    return model, guide, DECODER, ENCODER


def as_globals_inside_inner_code():
    def model(x: Tensor) -> None:
        program_of_model(lambda z: torch.stack([DECODER(row) for row in z]), x)

    def guide(x: Tensor) -> None:
        def encode(x: Tensor) -> Tensor:
            return ENCODER(x)

        program_of_guide(encode, x)

    return model, guide, DECODER, ENCODER


def as_partials():
    decoder, encoder = modules()
    by_position, by_name = functools.partial(program_of_model, decoder), functools.partial(call, encoder=encoder)
    return by_position, by_name, decoder, encoder


def call(x: Tensor, encoder: nn.Module) -> None:
    program_of_guide(encoder, x)


def as_defaults():
    decoder, encoder = modules()

    def model(x: Tensor, net: nn.Module = decoder) -> None:
        program_of_model(net, x)

    def guide(x: Tensor, *, net: nn.Module = encoder) -> None:
        program_of_guide(net, x)

    return model, guide, decoder, encoder


def as_containers():
    decoder, encoder = modules()
    nets, encoders = {"decoder": decoder}, [encoder]

    def model(x: Tensor) -> None:
        program_of_model(nets["decoder"], x)

    def guide(x: Tensor) -> None:
        program_of_guide(encoders[0], x)

    return model, guide, decoder, encoder


def under_poutine():
    decoder, encoder = modules()
    model, guide = functools.partial(program_of_model, decoder), functools.partial(program_of_guide, encoder)
    return poutine.infer_config(model, lambda site: {}), poutine.mask(guide, mask=True), decoder, encoder


WAYS = [
    as_methods_of_a_module,
    as_methods_of_an_object,
    as_modules,
    as_closures,
    as_nested_closures,
    as_globals,
    as_globals_inside_inner_code,
    as_partials,
    as_defaults,
    as_containers,
    under_poutine,
]


@pytest.mark.parametrize("way", WAYS)
def test_parameters_are_found_however_a_pair_is_written(way) -> None:
    """Exactly the parameters of the modules behind it, each once; and every one of them is trained."""
    model, guide, decoder, encoder = way()
    wanted = {id(p) for module in (decoder, encoder) for p in module.parameters()}
    pair = Pair(model, guide)
    assert len(list(pair.parameters())) == 4
    assert {id(p) for p in pair.parameters()} == wanted
    assert {id(p) for p in pair.trainable().values()} == wanted
    assert {id(p) for p in ELBO()(model, guide).parameters()} == wanted
    before = [p.detach().clone() for p in pair.parameters()]
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), ELBO()).step(x_of())
    assert all((p - b).abs().max() > 0.01 for p, b in zip(pair.parameters(), before, strict=True))
    assert len(pyro.get_param_store()) == 0


def test_a_module_shared_by_both_sides_is_found_once() -> None:
    """One name and one tensor per parameter, the module inside another one included."""
    vae = VAE(StandardNormal(2), Gaussian(MLP(2, 4)), MeanFieldNormal(MLP(4), 2)).double()
    pair = Pair(vae.model, vae.guide)
    assert len(pair.state_dict()) == len(vae.state_dict())
    assert {id(p) for p in pair.parameters()} == {id(p) for p in vae.parameters()}
    inner = Pair(vae.model, lambda x: program_of_guide(vae.guides[0].head, x))
    assert {id(p) for p in inner.parameters()} == {id(p) for p in vae.parameters()}
    assert len(list(inner.parameters())) == len(list(vae.parameters()))


def test_an_attribute_is_no_global_of_its_name(monkeypatch) -> None:
    """`self.encoder` is not the `encoder` that an earlier cell left behind; what is reached by a module's name is."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = modules()

        def model(self, x: Tensor) -> None:
            program_of_model(self.decoder, x)

        def guide(self, x: Tensor) -> None:
            program_of_guide(self.encoder, x)

    def by_name(x: Tensor) -> None:
        program_of_guide(nets.inner.encoder, x)  # type: ignore[name-defined]  # noqa: F821

    def renamed(x: Tensor) -> None:
        mine = nets  # type: ignore[name-defined]  # noqa: F821
        program_of_guide(mine.encoder, x)

    both, (leftover, other) = Both(), modules()
    package, inner = ModuleType("nets"), ModuleType("nets.inner")
    package.inner, inner.encoder, package.encoder = inner, other, leftover  # type: ignore[attr-defined]
    for name, value in (("encoder", leftover), ("decoder", leftover), ("nets", package)):
        monkeypatch.setitem(globals(), name, value)
    assert {id(p) for p in Pair(both.model, both.guide).parameters()} == {id(p) for p in both.parameters()}
    for guide, used in ((by_name, other), (renamed, leftover)):
        found = {id(p) for p in Pair(guide, guide).parameters()}
        assert {id(p) for p in used.parameters()} <= found, guide
    assert not {id(p) for p in leftover.parameters()} & {id(p) for p in Pair(by_name, by_name).parameters()}


def test_parameters_of_pyro_module_and_pyro_param() -> None:
    """`adopt` takes in what a plain function declares in Pyro's store, unconstrained, with its starting values."""
    inner = [nn.Linear(2, 4).double()]

    def model(x: Tensor) -> None:
        decoder = pyro.module("decoder", inner[0])
        scale = pyro.param("scale", torch.tensor(2.0).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", x.new_zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = x_of()
    with poutine.trace(param_only=True) as declared:
        log_weights(model, guide, x)
    pair = Pair(model, guide)
    pair.adopt(declared.trace)
    trainable = pair.trainable()
    assert {id(p) for p in inner[0].parameters()} <= {id(p) for p in trainable.values()}
    assert len(trainable) == 4
    assert_close(trainable["param:scale"], torch.tensor(2.0).double().log(), **EXACT)
    assert_close(trainable["param:loc"], torch.zeros(2, dtype=torch.float64), **EXACT)
    assert set(trainable) <= set(pair.tensors())
    IWAE(3).differentiable_loss(model, guide, x).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    optimiser = torch.optim.SGD(trainable.values(), lr=0.01)
    optimiser.step()
    assert pyro.param("scale").item() != 2.0


def test_evaluation_mode_reaches_modules_of_any_program() -> None:
    """`evaluating` switches what Pair finds, and only for its duration."""
    dropout = nn.Dropout(0.5)

    def model(x: Tensor) -> None:
        program_of_model(lambda z: dropout(DECODER(z)), x)

    with evaluating(model):
        assert not dropout.training
    assert dropout.training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError("user's")
    assert dropout.training


# ---------------------------------------------------------------------------------------------------------------------
# Disagreements


BOUNDS = [ELBO(), IWAE(3), Renyi(0.5, 3)]


def refused(message: str, model, guide, x: Tensor, error: type[Exception] = PairError) -> None:
    """Every entry refuses the pair with this message."""
    for bound in BOUNDS:
        with pytest.raises(error, match=message):
            bound.loss(model, guide, x)
    with pytest.raises(error, match=message):
        log_weights(model, guide, x, 2)
    with pytest.raises(error, match=message):
        log_marginal(model, guide, x, 10)


def latent(name: str = "z", dim: int = 2, plate: bool = True, event: bool = True):
    """A guide with one Gaussian site."""

    def guide(x: Tensor) -> None:
        def site() -> None:
            shape = () if plate else (len(x),)
            q = dist.Normal(x.new_zeros((*shape, dim)), 1.0)
            pyro.sample(name, q.to_event(1 if event else 0))

        if plate:
            with pyro.plate("data", len(x)):
                site()
        else:
            site()

    return guide


def a_model(x: Tensor) -> None:
    program_of_model(DECODER, x)


def test_sites_of_different_event_shapes_are_named_with_both() -> None:
    """The site, and both shapes."""

    def model(x: Tensor) -> None:
        program_of_model(lambda z: DECODER(z[..., :2]), x)

    refused(r"site 'z': event shape \(2,\) in the model, \(3,\) in the guide", model, latent(dim=3), x_of())


def test_a_latent_absent_from_the_guide_is_named() -> None:
    """Also what the guide has instead."""
    refused(r"model site 'z' is latent but not in the guide \(its sites: w\)", a_model, latent("w"), x_of())
    refused(r"model site 'z' .*its sites: none", a_model, lambda x: None, x_of())


def test_a_guide_site_absent_from_the_model_is_named() -> None:
    """Unless the guide declares it auxiliary."""

    def guide(x: Tensor) -> None:
        latent()(x)
        with pyro.plate("more", len(x)):
            pyro.sample("extra", dist.Normal(x.new_zeros(()), 1.0))

    refused(r"guide site 'extra' is not in the model \(its sites: z, x\)", a_model, guide, x_of())


def test_a_site_latent_in_the_guide_and_observed_in_the_model_is_named() -> None:
    """The same name cannot be both."""

    def guide(x: Tensor) -> None:
        latent()(x)
        with pyro.plate("more", len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1))

    refused("site 'x' is latent in the guide but observed in the model", a_model, guide, x_of())


def test_auxiliary_sites_of_the_guide_are_trained_and_make_no_log_p() -> None:
    """What is maximised subtracts their log q, in every form of the ELBO; it is no bound, and log p(x) refuses them."""

    def guide(x: Tensor) -> None:
        latent()(x)
        with pyro.plate("more", len(x)):
            pyro.sample("aux", dist.Normal(x.new_zeros(()), 2.0), infer={"is_auxiliary": True})

    x = x_of()
    particles = draw(Pair(a_model, guide), Batch(x), 4)
    aux = dist.Normal(x.new_zeros(()), 2.0).log_prob(particles.guide_trace.nodes["aux"]["value"])
    z = particles.latents["z"].value
    wanted = particles.log_likelihood + particles.log_prior - dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - aux
    assert_close(particles.log_weights, wanted, **EXACT)
    elbo = ELBO(4)
    assert_close(elbo.of(particles), particles.log_likelihood.mean(0) + -aux.mean(0), **EXACT)  # KL of z is 0
    assert elbo.kl_forms(particles) == {"z": "analytic", "auxiliary": "sampled"}
    with pytest.raises(PairError, match="guide site 'aux' is auxiliary, and nothing integrates it out"):
        log_marginal(a_model, guide, x, 10)


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_site_outside_the_plate_is_named(side: str) -> None:
    """A site without the plate is one of the whole batch, whatever shape it has."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(DECODER(z), 1.0).to_event(1), obs=x)

    programs = (model, latent()) if side == "model" else (a_model, latent(plate=False))
    refused(rf"{side} site 'z' must be inside exactly one plate over the data .*its plates: none", *programs, x_of())


def test_a_global_latent_is_named() -> None:
    """One latent for the whole data set makes no bound per datum."""

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        program_of_model(lambda z: DECODER(z) + shift.unsqueeze(-1), x)

    def guide(x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        latent()(x)

    refused("site 'shift' must be inside exactly one plate", model, guide, x_of())


def test_plates_of_another_size_or_number_are_named() -> None:
    """The one plate is over the rows of x."""

    def model(x: Tensor) -> None:
        with pyro.plate("wrong", 1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(DECODER(z), 1.0).to_event(1), obs=x[:1])

    def guide(x: Tensor) -> None:
        with pyro.plate("wrong", 1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    refused(r"size 5\); its plates: 'wrong' \(dim -1, size 1\)", model, guide, x_of())

    def nested_model(x: Tensor) -> None:
        with pyro.plate("outer", 2, dim=-3):
            a_model(x)

    def nested_guide(x: Tensor) -> None:
        with pyro.plate("outer", 2, dim=-3):
            latent()(x)

    refused(r"exactly one plate over the data.*'outer' \(dim -3, size 2\)", nested_model, nested_guide, x_of())


def test_a_broadcast_decoder_output_is_refused() -> None:
    """A mean of shape (N, 1) against x of shape (N, 4) would silently be scored 4 times."""

    def model(x: Tensor) -> None:
        program_of_model(lambda z: z[..., :1], x)

    refused(r"site 'x': the distribution has event shape \(1,\), its value has shape \(5, 4\)", model, latent(), x_of())


def test_an_event_not_declared_is_refused() -> None:
    """Without .to_event the site has one log-probability per element."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(DECODER(z), 1.0), obs=x)

    x = x_of()
    for bound in BOUNDS:
        with pytest.raises(ValueError, match=r"data|event"):
            bound.loss(model, latent(), x)


class UserError(RuntimeError):
    pass


@pytest.mark.parametrize("side", ["model", "guide"])
def test_user_s_exceptions_keep_their_type_and_gain_the_shapes(side: str) -> None:
    """What a program raises is not wrapped; a note says for which program, x and number of particles."""

    def broken(x: Tensor) -> None:
        raise UserError("own message")

    programs = {"model": a_model, "guide": latent(), side: broken}
    with pytest.raises(UserError, match="own message") as caught:
        IWAE(3).loss(programs["model"], programs["guide"], x_of())
    note = " ".join(caught.value.__notes__)
    for part in (f"raised by the {side}", "x of shape (5, 4)", "3 particles", "batch shape (3, 5)"):
        assert part in note


def test_a_shape_error_inside_the_user_s_network_says_what_was_run() -> None:
    """The commonest mistake: a decoder that cannot take a particle dimension."""

    def model(x: Tensor) -> None:
        program_of_model(lambda z: z.reshape(len(x), 3), x)

    with pytest.raises(RuntimeError, match="shape") as caught:
        ELBO(2).loss(model, latent(), x_of())
    assert any("raised by the model for x of shape (5, 4)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("bad", [[1.0], torch.zeros(()), torch.zeros(0, 4)])
def test_x_must_have_rows(bad) -> None:
    """A tensor of shape (N, *event), N >= 1."""
    with pytest.raises(UsageError, match=r"x: expected a tensor of shape \(N, \*event\)"):
        log_weights(a_model, latent(), bad, 2)


# ---------------------------------------------------------------------------------------------------------------------
# What runs


def test_a_user_s_own_functions_are_the_shipped_vae() -> None:
    """The same networks, written out as two Pyro functions: the same log-weights on the same seed."""
    vae = VAE(StandardNormal(2), Bernoulli(MLP(2, 4)), MeanFieldNormal(MLP(4), 2)).double()

    def model(x: Tensor) -> None:
        with pyro.plate("rows", x.shape[0]):
            code = pyro.sample("code", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=vae.likelihood.decoder(code)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", x.shape[0]):
            pyro.sample("code", vae.guides[0](x))

    x = (x_of() > 0).double()
    torch.manual_seed(1)
    ours = log_weights(vae.model, vae.guide, x, 3)
    torch.manual_seed(1)
    assert_close(log_weights(model, guide, x, 3), ours, **EXACT)
    assert ours.std() > 0.01


def test_hierarchies_need_nothing_special() -> None:
    """log w of two layers, each term by hand; and weights have the mean of p(x|z1) under ancestral sampling."""
    vae = HierarchicalVAE(
        StandardNormal(2),
        [MeanFieldNormal(MLP(2, hidden=(5,)), 3)],
        Gaussian(MLP(3, 4, hidden=(5,))),
        [MeanFieldNormal(MLP(4, hidden=(5,)), 3), MeanFieldNormal(MLP(3, hidden=(5,)), 2)],
    ).double()
    x = x_of()
    particles = draw(Pair(vae.model, vae.guide), Batch(x), 4)
    z1, z2 = particles.latents["z1"].value, particles.latents["z2"].value
    prior = vae.prior().log_prob(z2) + vae.conditionals[0](z2).log_prob(z1)
    guide = vae.guides[0](x).log_prob(z1) + vae.guides[1](z1).log_prob(z2)
    assert_close(particles.log_prior, prior, **EXACT)
    assert_close(particles.log_guide, guide, **EXACT)
    assert_close(particles.log_likelihood, vae.likelihood(z1).log_prob(x), **EXACT)
    # importance weights are unbiased: against ancestral sampling from the prior
    with torch.no_grad():
        vae.conditionals[0].head.bias[3:] -= 1.5  # guides wider than the posterior: weights of finite variance
        vae.guides[0].head.bias[3:] += 0.7
        vae.guides[1].head.bias[2:] += 0.7
        x = 0.3 * x[:1].expand(5000, 4)
        weights = log_weights(vae.model, vae.guide, x, 20).exp().mean(0)
        z = vae.prior().sample((20, 5000))
        direct = vae.likelihood(vae.conditionals[0](z).sample()).log_prob(x).exp().mean(0)
    assert_mean(weights - direct, 0.0, least=0.3 * direct.mean().item())


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    """A pair's randomness is torch's seed and nothing else."""
    x = x_of()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(log_weights(a_model, latent(), x, 3))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_modules_with_names_that_containers_use() -> None:
    """A network called `values` or `train` is found like any other."""
    values = nn.Linear(2, 4).double()

    def model(x: Tensor) -> None:
        program_of_model(values, x)

    found = Pair(model, latent()).trainable()
    assert {id(p) for p in values.parameters()} == {id(p) for p in found.values()}
