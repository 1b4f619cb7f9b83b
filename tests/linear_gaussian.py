"""A latent variable model of which everything is known in closed form, for tests of bounds and estimators."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LinearGaussian(nn.Module):
    """p(z) = N(0, I), p(x|z) = N(W z + b, sigma^2 I); W's columns are orthogonal, of different lengths.

    So the posterior is a diagonal Gaussian, which an encoder of the same form can be (Tipping & Bishop 1999)::

        variance_j = 1 / (1 + |w_j|^2 / sigma^2)            mean_j = variance_j w_j . (x - b) / sigma^2

    The encoder q(z|x) = N(A x + c, exp(v)), one v for every x, starts there; `perturb` takes it away. W
    (data_dim, latent_dim), b, A (latent_dim, data_dim), c and v are float32 parameters.
    """

    def __init__(self, data_dim: int = 6, latent_dim: int = 3, sigma: float = 0.7, seed: int = 0):
        super().__init__()
        if latent_dim > data_dim:
            raise ValueError(
                f"latent_dim is {latent_dim}; expected at most data_dim, {data_dim}: columns are orthogonal"
            )
        generator = torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(
            torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64, device="cpu")
        ).Q
        lengths = torch.linspace(1.8, 0.6, latent_dim, dtype=torch.float64, device="cpu")
        self.sigma = sigma
        self.W = nn.Parameter((directions * lengths).float())
        self.b = nn.Parameter(torch.randn(data_dim, generator=generator, device="cpu"))
        self.A = nn.Parameter(torch.empty(latent_dim, data_dim, device="cpu"))
        self.c = nn.Parameter(torch.empty(latent_dim, device="cpu"))
        self.v = nn.Parameter(torch.empty(latent_dim, device="cpu"))
        self.fit_encoder()

    @torch.no_grad()
    def fit_encoder(self) -> LinearGaussian:
        """Puts the encoder at the true posterior of W and b as they are now."""
        W, b = self.W.double(), self.b.double()
        variance = self._posterior_variance(W)
        A = variance.unsqueeze(-1) * W.T / self.sigma**2
        self.A.copy_(A)
        self.c.copy_(-A @ b)
        self.v.copy_(variance.log())
        return self

    @torch.no_grad()
    def perturb(self, amount: float, seed: int = 1) -> LinearGaussian:
        """Adds `amount` times standard normals to A, c and v."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.A, self.c, self.v):
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.add_(amount * noise.to(parameter))
        return self

    def _posterior_variance(self, W: Tensor) -> Tensor:
        return 1 / (1 + W.square().sum(0) / self.sigma**2)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (..., latent_dim), of q(z|x)."""
        mu = x.to(self.A.dtype) @ self.A.T + self.c
        return mu, self.v.expand_as(mu)

    def decode(self, z: Tensor) -> Tensor:
        """The mean, (..., data_dim), of p(x|z)."""
        return z @ self.W.T + self.b

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), (...,), in nats; z may have extra leading dimensions of samples."""
        error = (x.to(self.W.dtype) - self.decode(z)) / self.sigma
        return -0.5 * error.square().sum(-1) - x.shape[-1] * (math.log(self.sigma) + 0.5 * math.log(2 * math.pi))

    def log_marginal(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x; b, W W' + sigma^2 I), (...,), float64, in nats; differentiable in W, b and x."""
        W, b = self.W.double(), self.b.double()
        covariance = W @ W.T + self.sigma**2 * torch.eye(len(b), dtype=torch.float64, device=b.device)
        return torch.distributions.MultivariateNormal(b, covariance, validate_args=False).log_prob(x.double())

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance), each (..., latent_dim), float64, of p(z|x); differentiable in W, b and x."""
        W, b = self.W.double(), self.b.double()
        variance = self._posterior_variance(W)
        mean = (x.double() - b) @ W * variance / self.sigma**2
        return mean, variance.expand_as(mean)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of x, (n, data_dim), from the model; no gradient."""
        data_dim, latent_dim = self.W.shape
        noise = torch.randn(n, latent_dim + data_dim, generator=generator, device="cpu").to(self.W)
        return self.decode(noise[:, :latent_dim]) + self.sigma * noise[:, latent_dim:]


class LinearGaussianPixels(LinearGaussian):
    """The same, with what questions need of p(x_i|z)."""

    def mean(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.decode(z)
        return mean, torch.full_like(mean, self.sigma**2)

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        return self.decode(z) + self.sigma * noise

    def pixel_log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.distributions.Normal(self.decode(z), self.sigma).log_prob(x)
