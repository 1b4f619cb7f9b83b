"""VAE: shapes, seeds, training through it, sentences for bad input."""

import pytest
import torch
from conftest import rand, randn, same_bits
from safetensors.torch import save_file
from torch.nn.utils.prune import random_unstructured

import aevb


def model(data_dim=12, hidden_dim=9, latent_dim=4, seed=0):
    return aevb.VAE(data_dim, hidden_dim, latent_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_shapes(batch):
    vae, x = model(), rand(0, *batch, 12)
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (*batch, 4)
    assert vae.decode(mu).shape == (*batch, 12)
    logits, kl = vae(x)
    assert logits.shape == (*batch, 12)
    assert kl.shape == batch
    assert vae(x, 3)[0].shape == (3, *batch, 12)
    assert vae.reconstruct(x).shape == (*batch, 12)


def test_is_the_papers_mlp():
    vae, x = model(), rand(0, 5, 12)
    w = dict(vae.named_parameters())
    hidden = (x @ w["encoder.0.weight"].T + w["encoder.0.bias"]).tanh()
    mu, logvar = vae.encode(x)
    torch.testing.assert_close(torch.cat([mu, logvar], 1), hidden @ w["encoder.2.weight"].T + w["encoder.2.bias"])
    hidden = (mu @ w["decoder.0.weight"].T + w["decoder.0.bias"]).tanh()
    logits = hidden @ w["decoder.2.weight"].T + w["decoder.2.bias"]
    torch.testing.assert_close(vae.decode(mu), logits)
    torch.testing.assert_close(vae.reconstruct(x), logits.sigmoid())


def test_any_number_of_hidden_layers(tmp_path):
    vae, x = aevb.VAE(12, (9, 5), 4, generator=torch.Generator().manual_seed(1)), rand(0, 3, 12)
    shapes = {name: tuple(w.shape) for name, w in vae.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [(9, 12), (5, 9), (8, 5), (5, 4), (9, 5), (12, 9)]
    save_file(vae.state_dict(), tmp_path / "model.safetensors")
    loaded = aevb.VAE.load(tmp_path / "model.safetensors")
    assert loaded.hidden_dims == (9, 5)
    assert torch.equal(loaded.reconstruct(x), vae.reconstruct(x))
    with pytest.raises(ValueError, match="hidden_dims is empty"):
        aevb.VAE(12, (), 4)
    with pytest.raises(ValueError, match="hidden_dims is 0; expected at least 1"):
        aevb.VAE(12, (9, 0), 4)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_products_without_autograd_are_the_same(batch):
    """Where no gradient is wanted, another route is taken through the layers."""
    vae, x = aevb.VAE(12, (9, 5), 4, generator=torch.Generator().manual_seed(1)), rand(0, *batch, 12)
    with torch.no_grad():
        found = (*vae.encode(x), vae.decode(vae.encode(x)[0]), vae.linear_logits(vae.encode(x)[0]).h)
    mu, logvar = vae.encode(x)
    for a, e in zip(found, (mu, logvar, vae.decode(mu), vae.linear_logits(mu).h), strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-5, atol=1e-6)


def test_log_prob_is_that_of_the_logits():
    vae, x = model(), rand(0, 5, 12)
    z = aevb.sample_gaussian(*vae.encode(x), 3, seed=1)[0].detach()
    expected = aevb.bernoulli_log_prob(vae.decode(z), x)
    torch.testing.assert_close(vae.log_prob(x, z), expected)
    torch.testing.assert_close(vae.log_prob(x, z[0]), expected[0])
    torch.testing.assert_close(vae.linear_logits(z).materialize(), vae.decode(z))
    grads = (torch.autograd.grad(v.sum(), list(vae.decoder.parameters())) for v in (vae.log_prob(x, z), expected))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_forward_is_sample_then_decode():
    vae, x = model(), rand(0, 5, 12)
    z, kl = aevb.sample_gaussian(*vae.encode(x), 2, seed=7)
    logits, same_kl = vae(x, 2, seed=7)
    assert torch.equal(logits, vae.decode(z))
    assert torch.equal(kl, same_kl)


def test_bool_is_taken_as_zero_and_one():
    vae, x = model(), rand(0, 5, 12) > 0.5
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x.float()))


def test_weights_and_samples_follow_from_the_generator():
    a, b, other = model(seed=3), model(seed=3), model(seed=4)
    state = torch.get_rng_state()
    draw = a.sample(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw, b.sample(6, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(a.decoder[0].weight, other.decoder[0].weight)
    assert draw.shape == (6, 12)
    assert ((draw > 0) & (draw < 1)).all()
    assert not draw.requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_every_parameter_gets_a_gradient():
    vae, x = model(), rand(0, 5, 12)
    logits, kl = vae(x, seed=1)
    (1.7 * aevb.FusedELBO()(logits, x, kl=kl)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_hooks_and_other_layers_are_called():
    vae, x = aevb.VAE(12, (7, 6), 2), rand(1, 5, 12)
    seen = []
    for layer in (vae.encoder[0], vae.encoder[4], vae.decoder[1]):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    vae(x)
    assert seen == ["Linear", "Linear", "Tanh"]
    vae.decoder[1] = torch.nn.ReLU()
    z = rand(2, 5, 2)
    torch.testing.assert_close(vae.decode(z), vae.decoder(z))
    random_unstructured(vae.encoder[2], "weight", 0.5)
    for _ in range(2):  # a graph of its own each time
        vae(x)[0].sum().backward()


def test_bad_input_gets_a_sentence():
    vae = model()
    with pytest.raises(ValueError, match=r"x has shape \(5, 11\); expected \(\.\.\., 12\): flatten"):
        vae(rand(0, 5, 11))
    with pytest.raises(ValueError, match=r"z has shape \(\); expected \(\.\.\., 4\)"):
        vae.decode(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x is torch.uint8; .* x / 255"):
        vae.encode(torch.zeros(5, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="latent_dim is 0; expected at least 1"):
        aevb.VAE(12, 9, 0)
    with pytest.raises(ValueError, match="n is -1"):
        vae.sample(-1)


def test_load_gives_the_saved_model(tmp_path):
    vae, x, path = model(), rand(0, 5, 12), tmp_path / "model.safetensors"
    save_file(vae.state_dict(), path)
    loaded = aevb.VAE.load(path)
    assert (loaded.data_dim, loaded.hidden_dims, loaded.latent_dim) == (12, (9,), 4)
    assert torch.equal(loaded.reconstruct(x), vae.reconstruct(x))


def test_load_says_what_is_wrong(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError):
        aevb.VAE.load(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"does not hold the weights of an aevb\.VAE: w"):
        aevb.VAE.load(path)
    save_file(model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        aevb.VAE.load(path)


# ---- likelihoods, and the convolutional model -----------------------------------------------------------------------

GAUSSIANS = [{"likelihood": "gaussian", "variance": variance} for variance in ("learned", "shared", 0.3)]


def models(**likelihood):
    generator = torch.Generator().manual_seed(0)
    yield aevb.VAE(3 * 7 * 9, (20, 10), 4, generator=generator, **likelihood)
    yield aevb.ConvVAE((3, 7, 9), (5, 6), 4, generator=generator, **likelihood)


@pytest.mark.parametrize("likelihood", [{}, *GAUSSIANS], ids=str)
def test_a_models_likelihood_is_one(likelihood):
    """That of its pixels, of its moments, of the loss, and of the formula in float64."""
    for model in models(**likelihood):
        x, z = rand(1, 5, 189), randn(2, 6, 5, 4)
        with torch.no_grad():
            log_prob, mean, (moment, variance) = model.log_prob(x, z), model.mean(z), model.moments(z)
            pixels = model.pixel_log_prob(x, z)
            loss = aevb.FusedELBO(likelihood=model.likelihood, sigmoid_means=bool(likelihood))
            negative = loss(model.recon(z), x, kl=torch.zeros(5))
        assert pixels.shape == mean.shape == variance.shape == (6, 5, 189)
        assert torch.equal(mean, moment)
        if likelihood:
            m, v = mean.double(), variance.double()
            expected = -0.5 * ((x.double() - m) ** 2 / v + torch.log(2 * torch.pi * v)).sum(-1)
        else:
            m = mean.double()
            expected = (x.double() * m.log() + (1 - x.double()) * (-m).log1p()).sum(-1)
            torch.testing.assert_close(variance, mean * (1 - mean))
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(pixels.double().sum(-1), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(-negative.double(), expected.mean(), rtol=1e-5, atol=1e-3)


def test_a_learned_variance_keeps_above_its_floor():
    model = aevb.VAE(6, 5, 2, likelihood="gaussian", min_variance=1e-3)
    with torch.no_grad():
        model.decoder[-1].weight[6:] = 0
        model.decoder[-1].bias[6:] = torch.tensor([-1e4, -50.0, -8.0, 0.0, 3.0, 20.0])
    z = torch.zeros(1, 2)
    _, variance = model.moments(z)
    torch.testing.assert_close(variance[0, 2:], 1e-3 + torch.tensor([-8.0, 0.0, 3.0, 20.0]).exp())
    torch.testing.assert_close(variance[0, :2], torch.tensor([1e-3, 1e-3]))
    model.log_prob(torch.zeros(1, 6), z).sum().backward()
    assert model.decoder[-1].bias.grad.isfinite().all()
    assert model.decoder[-1].bias.grad[8] != 0


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (28, 20), (1, 9, 13), (3, 5, 4)])
def test_convolutions_fit_any_shape(shape):
    model = aevb.ConvVAE(shape, (3, 4), 2)
    x = rand(0, 6, 2, *shape).flatten(2)
    mu, logvar = model.encode(x)
    assert mu.shape == logvar.shape == (6, 2, 2)
    assert model.decode(mu).shape == x.shape
    assert model.decode(mu.expand(5, 6, 2, 2)).shape == (5, *x.shape)
    torch.testing.assert_close(model.decode(mu)[3], model.decode(mu[3]))
    bits = x > 0.5
    for a, b in zip(model.encode(bits), model.encode(bits.float()), strict=True):
        torch.testing.assert_close(a, b)
    logits, kl = model(x, 3)
    assert (logits.shape, kl.shape) == ((3, *x.shape), (6, 2))
    assert model.decode(model.encode(x[:0])[0]).shape == x[:0].shape


def test_a_generator_decides_the_convolutions_weights():
    state = torch.get_rng_state()
    first, second = (aevb.ConvVAE((8, 8), generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    again = aevb.ConvVAE((8, 8), generator=torch.Generator().manual_seed(1))
    for a, b, c in zip(first.parameters(), again.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.any() or not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: aevb.ConvVAE((8, 8), (4, 4, 4, 4)), r"channels has 4 layers, each of which halves .* at most 3"),
        (lambda: aevb.ConvVAE((8,)), r"image_shape is \(8,\); expected \(H, W\) or \(C, H, W\)"),
        (lambda: aevb.ConvVAE((8, 8), ()), r"channels is \(\); expected the channels of each layer"),
        (lambda: aevb.VAE(4, 3, 2, likelihood="poisson"), "likelihood is 'poisson'; expected one of 'bernoulli', "),
        (lambda: aevb.VAE(4, 3, 2, likelihood="gaussian", variance=0.0), r"variance is 0.0; expected 'learned', 's"),
        (lambda: aevb.VAE(4, 3, 2, min_variance=-1.0), r"min_variance is -1.0; expected a positive number"),
    ],
)
def test_what_cannot_be_made_gets_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_file_says_which_model_it_holds(tmp_path):
    from aevb.training.run_dir import RunFolder

    folder = RunFolder(tmp_path, "run", {}, overwrite=False)
    for model in (*models(), *models(likelihood="gaussian", variance="shared", min_variance=0.01)):
        path = folder.write_model("model.safetensors", model, epoch=3)
        loaded = aevb.BaseVAE.load(path)
        assert type(loaded) is type(model)
        assert loaded.options() == model.options()
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="holds a ConvVAE; expected a VAE"):
        aevb.VAE.load(path)


@pytest.mark.parametrize("size", [28, 64, 105, 256])
@pytest.mark.parametrize("background", [0, 1])
def test_a_convolutional_model_starts_well_at_any_size(size, background):
    """No step of Adam undoes what came before: it moved logvar by its learning rate times the number of features."""
    model = aevb.ConvVAE((size, size), generator=torch.Generator().manual_seed(0))
    x = (rand(1, 8, size * size) < 0.1).float()
    x = 1 - x if background else x
    optimizer, criterion, losses = torch.optim.Adam(model.parameters(), 1e-3), aevb.FusedELBO(), []
    for seed in range(5):
        recon, kl = model(x, seed=seed)
        loss = criterion(recon, x, kl=kl)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert max(losses) < 1.05 * losses[0]
    assert losses[-1] < losses[0]


def test_weights_of_a_large_convolutional_model_from_before_there_was_a_scale(tmp_path):
    model = aevb.ConvVAE((64, 64), latent_dim=3)
    old = {name: t for name, t in model.state_dict().items() if not name.endswith("scale")}
    assert len(old) == len(model.state_dict()) - 1
    model.load_state_dict(old)
    assert model.encoder[5].scale == 1.0
    save_file(old, tmp_path / "old.safetensors", metadata=model.metadata())
    x = rand(1, 2, 64 * 64)
    for loaded in (model, aevb.ConvVAE.load(tmp_path / "old.safetensors")):
        features = loaded.encoder[:5](x).flatten(1)
        torch.testing.assert_close(torch.cat(loaded.encode(x), -1), features @ old["encoder.6.weight"].t())


def test_a_scale_is_kept_with_the_weights(tmp_path):
    model = aevb.ConvVAE((64, 64), latent_dim=3)
    assert model.encoder[5].scale == 4096 / (64 * 16 * 16)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata=model.metadata())
    x = rand(1, 2, 64 * 64)
    assert same_bits(aevb.ConvVAE.load(tmp_path / "model.safetensors").encode(x)[0], model.encode(x)[0])
    assert type(aevb.ConvVAE((32, 32)).encoder[5]) is torch.nn.Flatten
