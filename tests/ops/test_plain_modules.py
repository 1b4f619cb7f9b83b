"""What people do to a layer, or to what is around it, is done in every method and in training: nothing is bypassed."""

import contextlib
import functools

import pytest
import torch
from conftest import rand, randn
from torch import nn
from torch.nn.utils import parametrizations, prune

import aevb
from aevb.data import Dataset, Targets
from aevb.ops.plain_modules import is_plain
from aevb.training.step import AutogradStep
from aevb.training.step_choice import training_step
from aevb.training.step_direct import DirectStep

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing", "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per"
)
D, H, Z, B = 16, 8, 2, 12


def binary(seed, *size):
    return (rand(seed, *size) < 0.4).float()


class LoRA(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        rank = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(1, layer.in_features, generator=rank))
        self.b = nn.Parameter(torch.randn(layer.out_features, 1, generator=rank))

    def forward(self, t):
        return self.layer(t) + t @ self.a.T @ self.b.T


class Scaled(nn.Linear):
    """A subclass with another forward."""

    def forward(self, t):
        return 0.5 * super().forward(t)


class Noted(torch.Tensor):
    """A weight with operations of its own, as quantized and sharded ones have."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return 0.5 * function(*args, **kwargs or {})


def half(*arguments):
    return 0.5 * arguments[-1]


def half_input(_, inputs):
    return (0.5 * inputs[0],)


def half_grad(_, grad_input, grad_output):
    return tuple(g if g is None else 0.5 * g for g in grad_input)


def replace_forward(layer):
    forward = layer.forward
    layer.forward = lambda t: 0.5 * forward(t)


def scaled_class(layer):
    layer.__class__ = Scaled


def own_weight(layer):
    weight = layer.weight.detach().as_subclass(Noted)
    layer.weight = nn.Parameter(weight)
    assert isinstance(layer.weight, Noted)


TO_A_LAYER = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": lambda layer: parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(3),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "forward hook": lambda layer: layer.register_forward_hook(half),
    "forward hook with kwargs": lambda layer: layer.register_forward_hook(
        lambda m, args, kwargs, out: 0.5 * out, with_kwargs=True
    ),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(half_input),
    "backward hook": lambda layer: layer.register_full_backward_hook(half_grad),
    "forward of the instance": replace_forward,
    "another class": scaled_class,
    "weight with operations": own_weight,
}
IN_PLACE_OF_A_LAYER = {
    "LoRA": LoRA,
    "Sequential": lambda layer: nn.Sequential(layer, nn.Dropout(0.0), nn.LayerNorm(layer.out_features)),
    "no bias": lambda layer: nn.Linear(layer.in_features, layer.out_features, bias=False),
}


def vae(seed=1, hidden_dims=(H,), **options):
    return aevb.VAE(D, hidden_dims, Z, generator=torch.Generator().manual_seed(seed), **options)


def called(model, x, seed):
    """mu and logvar, z, KL and the decoder's output, by calls of the two networks."""
    mu, logvar = model.encoder(x).chunk(2, -1)
    z, kl = aevb.sample_gaussian(mu, logvar, seed=seed)
    return mu, z, kl, model.decoder(z)


def assert_nothing_is_bypassed(model):
    model.eval()  # spectral norm goes on with each call in training
    x = binary(0, B, D)
    mu, z, kl, logits = called(model, x, 5)
    criterion = aevb.FusedELBO()
    criterion(logits, x, kl=kl).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    found = aevb.sample_gaussian(*model.encode(x), seed=5)
    torch.testing.assert_close(model.encode(x)[0], mu)
    torch.testing.assert_close(model.encode(x.to(torch.uint8), 1.0)[0], mu)
    torch.testing.assert_close(model.encode(x.bool())[0], mu)
    torch.testing.assert_close(model.decode(z), logits)
    torch.testing.assert_close(model.log_prob(x, z), aevb.bernoulli_log_prob(logits, x))
    torch.testing.assert_close(model.mean(z), logits.sigmoid())
    torch.testing.assert_close(model.reconstruct(x), model.mean(mu))
    criterion(model.recon(found[0]), x, kl=found[1]).backward()
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    model.zero_grad()
    after_a_step(model, x)


def after_a_step(model, x):
    """Training's step gives the gradients of calls."""
    targets = Targets(x, "none", 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = training_step(model, aevb.FusedELBO(x_scale=targets.x_scale), optimizer, targets, B, False)
    seeds = torch.tensor(3), torch.tensor(4)
    step(torch.arange(B), *seeds)
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    batch = step.batch(torch.arange(B), seeds[0])
    _, _, kl, logits = called(model, batch.float(), step.noise_seeds(seeds[1], torch.arange(B)))
    aevb.FusedELBO()(logits, batch.float(), kl=kl).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
    model.zero_grad()
    return step


PLACES = {
    "first of the encoder": lambda m: (m.encoder, 0),
    "last of the encoder": lambda m: (m.encoder, 2),
    "first of the decoder": lambda m: (m.decoder, 0),
    "last of the decoder": lambda m: (m.decoder, 2),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", TO_A_LAYER)
def test_what_is_done_to_a_layer(change, place):
    model = vae()
    mlp, i = PLACES[place](model)
    before = model.encode(binary(0, B, D))[0], model.decode(randn(1, 3, Z))
    TO_A_LAYER[change](mlp[i])
    after = model.encode(binary(0, B, D))[0], model.decode(randn(1, 3, Z))
    if change != "backward hook":
        assert not all(torch.equal(b, a) for b, a in zip(before, after, strict=True)), "nothing was changed"
    assert not is_plain(mlp[i], nn.Linear)
    assert_nothing_is_bypassed(model)
    assert not DirectStep.fits(model, aevb.FusedELBO(), binary(0, B, D), False)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", IN_PLACE_OF_A_LAYER)
def test_what_is_put_in_place_of_a_layer(change, place):
    model = vae()
    mlp, i = PLACES[place](model)
    mlp[i] = IN_PLACE_OF_A_LAYER[change](mlp[i])
    assert_nothing_is_bypassed(model)


@pytest.mark.parametrize("mlp", ["encoder", "decoder"])
@pytest.mark.parametrize("hook", ["forward", "pre", "backward", "replaced", "in another", "subclass"])
def test_what_is_done_to_the_container(hook, mlp):
    model = vae()
    sequential = getattr(model, mlp)
    if hook == "forward":
        sequential.register_forward_hook(half)
    elif hook == "pre":
        sequential.register_forward_pre_hook(half_input)
    elif hook == "backward":
        sequential.register_full_backward_hook(half_grad)
    elif hook == "replaced":
        replace_forward(sequential)
    elif hook == "in another":
        setattr(model, mlp, nn.Sequential(sequential, nn.Hardtanh(-0.1, 0.1)))
    else:

        class Halved(nn.Sequential):
            def forward(self, t):
                return 0.5 * super().forward(t)

        setattr(model, mlp, Halved(*sequential))
    assert_nothing_is_bypassed(model)


@pytest.mark.parametrize("mlp", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.GELU(), nn.Sequential(nn.Tanh(), nn.Dropout(0.0)), nn.Identity(), nn.Softplus()]
)
def test_other_activations(activation, mlp):
    model = vae()
    getattr(model, mlp)[1] = activation
    assert_nothing_is_bypassed(model)


@pytest.mark.parametrize("mlp", ["encoder", "decoder"])
def test_more_layers_and_fewer(mlp):
    model = vae(hidden_dims=(H, H))
    getattr(model, mlp).insert(1, nn.LayerNorm(H))
    getattr(model, mlp).append(nn.Hardtanh(-0.2, 0.2))
    assert_nothing_is_bypassed(model)
    model = vae()
    setattr(model, mlp, nn.Sequential(nn.Linear(D, 2 * Z) if mlp == "encoder" else nn.Linear(Z, D)))
    assert_nothing_is_bypassed(model)


def test_an_activation_with_a_hook_is_called():
    model = vae()
    for mlp in (model.encoder, model.decoder):
        mlp[1].register_forward_hook(half)
    assert_nothing_is_bypassed(model)


@pytest.fixture
def hooked_everywhere():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    yield calls
    handle.remove()


def test_hooks_of_all_modules(hooked_everywhere):
    model = vae()
    assert_nothing_is_bypassed(model)
    hooked_everywhere.clear()
    model.log_prob(binary(0, B, D), model.encode(binary(0, B, D))[0])
    assert hooked_everywhere.count("Linear") == 4
    assert hooked_everywhere.count("Sequential") == 2


def test_classes_whose_forward_is_replaced(monkeypatch):
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(forward)(lambda self, t: 0.5 * forward(self, t)))
    assert_nothing_is_bypassed(vae())


def test_a_call_that_is_replaced(monkeypatch):
    call, calls = nn.Module.__call__, []

    def counted(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counted)
    vae().encode(binary(0, B, D))
    assert calls.count("Linear") == 2


def test_subclasses_that_decode_in_their_own_way():
    class Tempered(aevb.VAE):
        def decode(self, z):
            return super().decode(z) / 3

    model = Tempered(D, H, Z)
    x, z = binary(0, B, D), randn(1, B, Z)
    logits = model.decode(z)
    torch.testing.assert_close(model.log_prob(x, z), aevb.bernoulli_log_prob(logits, x))
    torch.testing.assert_close(model.recon(z), logits)
    with pytest.raises(ValueError, match=r"Tempered decodes in its own way; expected a plain nn\.Linear"):
        model.linear_logits(z)
    plain = vae()
    plain.decode = lambda z: model.decode(z)
    torch.testing.assert_close(plain.log_prob(x, z), aevb.bernoulli_log_prob(logits, x))


def test_linear_logits_of_what_is_not_linear():
    model = vae()
    model.decoder[2] = LoRA(model.decoder[2])
    with pytest.raises(ValueError, match="last layer does something of its own"):
        model.linear_logits(randn(0, B, Z))
    model.decoder = nn.Identity()
    with pytest.raises(ValueError, match="the decoder, a Identity, does something of its own"):
        model.linear_logits(randn(0, B, Z))
    with pytest.raises(ValueError, match="likelihood is 'gaussian'"):
        vae(likelihood="gaussian").linear_logits(randn(0, B, Z))


def test_quantized_layers():
    """Of these no parameter is left, nor one for a dtype."""
    with contextlib.suppress(ImportError):
        torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    model = torch.ao.quantization.quantize_dynamic(vae(), {nn.Linear}, dtype=torch.qint8)
    assert not list(model.parameters())
    x = binary(0, B, D)
    mu, _ = model.encode(x.bool())
    torch.testing.assert_close(mu, model.encoder(x).chunk(2, -1)[0])
    torch.testing.assert_close(model.log_prob(x, mu), aevb.bernoulli_log_prob(model.decoder(mu), x))
    assert model.sample(3).shape == (3, D)
    assert model.traverse(x, steps=2).shape == (B, Z, 2, D)


def replica_of(model):
    """As `nn.parallel.replicate` makes it, for one more device of the same kind."""
    modules = list(model.modules())
    replicas = [m._replicate_for_data_parallel() for m in modules]
    for module, replica in zip(modules, replicas, strict=True):
        replica._former_parameters = {}
        for name, child in module._modules.items():
            setattr(replica, name, replicas[modules.index(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.clone())
            replica._former_parameters[name] = getattr(replica, name)
    return replicas[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_of_data_parallel(dtype):
    """It has no parameters that `parameters` finds, and the dtype of those it was made of."""
    model = vae().to(dtype)
    replica = replica_of(model)
    assert not list(replica.parameters())
    x = binary(0, B, D)
    for given in (x, x.bool()):
        for a, b in zip(replica.encode(given), model.encode(given), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b)
    recon, kl = replica(x.bool(), seed=3)
    aevb.FusedELBO()(recon, x, kl=kl).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_last_layer_that_learns():
    """The last layer's low rank, whose gradient was nothing, moves."""
    model = vae()
    model.decoder[2] = lora = LoRA(model.decoder[2])
    before = lora.a.detach().clone()
    targets = Targets(binary(0, B, D), "none", 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step = training_step(model, aevb.FusedELBO(x_scale=targets.x_scale), optimizer, targets, B, False)
    step(torch.arange(B), torch.tensor(3), torch.tensor(4))
    assert not torch.equal(lora.a, before)


def test_plain_modules_are_plain():
    model = vae()
    assert is_plain(model, aevb.VAE)
    assert is_plain(model.encoder, nn.Sequential)
    assert all(is_plain(m, nn.Linear) for m in (model.encoder[0], model.decoder[2]))
    handle = model.encoder[0].register_forward_hook(half)
    assert not is_plain(model.encoder[0], nn.Linear)
    handle.remove()
    prune.l1_unstructured(model.decoder[2], "weight", 0.5)
    prune.remove(model.decoder[2], "weight")
    assert DirectStep.fits(model, aevb.FusedELBO(), binary(0, B, D), False)
    assert isinstance(model.recon(randn(0, B, Z)), aevb.LinearLogits)
    assert after_a_step(model, binary(0, B, D)).__class__ is DirectStep
    assert not is_plain(torch.compile(model.encoder[0]), nn.Linear)
    model.encoder[0].compile(backend="eager")
    assert not is_plain(model.encoder[0], nn.Linear)


# ---- the loss and the optimizer -------------------------------------------------------------------------------------


class Penalized(aevb.FusedELBO):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


def doubled(criterion):
    criterion.register_forward_hook(lambda m, args, out: 2 * out)
    return criterion


@pytest.mark.parametrize("criterion", [Penalized(x_scale=1.0), doubled(aevb.FusedELBO(x_scale=1.0))])
def test_a_loss_of_ones_own(criterion):
    targets = Targets(binary(0, B, D), "none", 1.0)
    losses = []
    for each in (aevb.FusedELBO(x_scale=1.0), criterion):
        model = vae()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = training_step(model, each, optimizer, targets, B, False)
        losses.append(step(torch.arange(B), torch.tensor(3), torch.tensor(4)).loss)
    torch.testing.assert_close(losses[1], 2 * losses[0])


def test_an_optimizer_of_ones_own():
    class Counted(torch.optim.SGD):
        steps = 0

        def decorated(step):
            @functools.wraps(step)
            def counting(self, *args, **kwargs):
                self.steps += 1
                return step(self, *args, **kwargs)

            return counting

        step = decorated(torch.optim.SGD.step)

    targets = Targets(binary(0, B, D), "none", 1.0)
    model = vae()
    optimizer = Counted(model.parameters(), lr=0.1)
    step = training_step(model, aevb.FusedELBO(x_scale=1.0), optimizer, targets, B, False)
    assert isinstance(step, AutogradStep)
    step(torch.arange(B), torch.tensor(3), torch.tensor(4))
    assert optimizer.steps == 1


# ---- in the middle of training --------------------------------------------------------------------------------------


def test_between_fits(tmp_path):
    """What is done to a layer after a fit is done in the next."""
    data = Dataset("mine", (4, 4), 255, *((255 * binary(i, 4 * B, D)).to(torch.uint8) for i in range(2)))
    config = aevb.TrainConfig(
        hidden_dims=(H,), latent_dim=Z, epochs=1, batch_size=B, progress=False, out=str(tmp_path / "a")
    )
    trainer = aevb.Trainer(config, dataset=data)
    trainer.fit()
    assert isinstance(trainer.loop.step_now, DirectStep)
    calls = []
    trainer.model.decoder[2].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.config = aevb.TrainConfig(**{**vars(config), "out": str(tmp_path / "b")})
    trainer.fit()
    assert calls.count(True) == 4
