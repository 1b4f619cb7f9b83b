"""FusedELBO in place of a loss that people have: the same losses, step after step."""

import torch
import torch.nn.functional as F
from torch import nn

import aevb


class ExampleVAE(nn.Module):
    """The VAE of pytorch/examples: 784-400-20, relu, and sigmoid outputs."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc3, self.fc4 = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x, eps):
        h = F.relu(self.fc1(x.view(-1, 784)))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu + eps * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def example_loss(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


def blobs(steps, batch):
    """Images (batch, 1, 28, 28) in [0, 1] with something to learn: a bright spot on black."""
    generator = torch.Generator().manual_seed(11)
    axis = torch.arange(28.0)
    for _ in range(steps):
        row, column = (4 + 20 * torch.rand(batch, 1, generator=generator) for _ in range(2))
        spot = (-((axis - row) ** 2) / 8).exp().unsqueeze(2) * (-((axis - column) ** 2) / 8).exp().unsqueeze(1)
        yield spot.unsqueeze(1), torch.randn(batch, 20, generator=generator)


def losses(criterion, steps=50):
    torch.manual_seed(1)
    model = ExampleVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = []
    for x, eps in blobs(steps, batch=64):
        recon, mu, logvar = model(x, eps)
        optimizer.zero_grad()
        loss = criterion(recon, x, mu, logvar)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return torch.tensor(seen, dtype=torch.float64)


def test_pytorch_examples_vae_trains_the_same():
    own, fused = losses(example_loss), losses(aevb.FusedELBO(from_probs=True, reduction="sum"))
    assert own[-1] < 0.5 * own[0]
    assert ((fused - own).abs() / own).max() < 1e-5


def test_probabilities_at_their_limits():
    """Probabilities that are exactly 0 and 1: logs clamped at -100, with F.binary_cross_entropy's gradient."""
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(8, 33, generator=generator)
    p[:, :3] = torch.tensor([0.0, 1.0, 1e-30])
    x = (torch.rand(8, 33, generator=generator) > 0.5).float()
    results = []
    for loss in (
        lambda q: aevb.FusedELBO(from_probs=True, reduction="sum")(q, x, kl=torch.zeros(8)),
        lambda q: F.binary_cross_entropy(q, x, reduction="sum"),
    ):
        q = p.clone().requires_grad_()
        value = loss(q)
        results.append((value.detach(), *torch.autograd.grad(0.3 * value, q)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


def test_shapes_of_the_examples():
    """Images against flat outputs, samples in front, a datapoint of no batch."""
    criterion = aevb.FusedELBO(reduction="none")
    logits, x = torch.randn(4, 784), torch.rand(4, 1, 28, 28)
    mu, logvar = torch.randn(4, 20), torch.randn(4, 20)
    loss = criterion(logits, x, mu, logvar)
    expected = F.binary_cross_entropy_with_logits(logits, x.view(4, -1), reduction="none").sum(-1)
    torch.testing.assert_close(loss, expected + aevb.gaussian_kl(mu, logvar))
    samples = torch.stack([logits, 2 * logits])
    averaged = (criterion(logits, x, mu, logvar) + criterion(2 * logits, x, mu, logvar)) / 2
    torch.testing.assert_close(criterion(samples, x, mu, logvar), averaged)
    torch.testing.assert_close(criterion(logits[0], x[0], mu[0], logvar[0]), loss[0])
    pictures = x.squeeze(1)
    torch.testing.assert_close(criterion(logits.view(4, 28, 28), pictures, mu, logvar), loss)
