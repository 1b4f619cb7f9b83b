"""VAE: shapes, seeds, training through it, sentences for bad input."""

import pytest
import torch
from conftest import rand
from safetensors.torch import save_file

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
