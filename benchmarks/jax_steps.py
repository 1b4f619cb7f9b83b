"""The training step in JAX and Optax: one jitted function from batch to weights, its buffers donated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from . import steps
from .jax_peers import IMPLEMENTATIONS, kl, softplus
from .steps import StepCase, _Step


def loss(weights, x, eps):
    """As plain_loss of steps.py; weights are transposed, as JAX's libraries keep them."""
    w0, b0, w1, b1, w2, b2, w3, b3 = weights
    mu, logvar = jnp.split(jnp.tanh(x @ w0 + b0) @ w1 + b1, 2, -1)
    z = mu + jnp.exp(0.5 * logvar) * eps
    logits = jnp.tanh(z @ w2 + b2) @ w3 + b3
    if eps.ndim == 2:
        return ((softplus(logits) - x * logits).sum() + kl(mu, logvar).sum()) / x.shape[0]
    nll = (softplus(logits) - x * logits).sum(-1)
    log_ratio = 0.5 * (z * z - eps * eps - logvar).sum(-1)
    return -(jax.nn.logsumexp(-nll - log_ratio, 0) - np.log(len(eps))).mean()


def ways(case: StepCase) -> dict[str, _Step]:
    return {f"jit, donated, {implementation}": make(case, implementation) for implementation in IMPLEMENTATIONS}


def make(case: StepCase, implementation: str) -> _Step:
    optimizer = optax.adam(steps.LEARNING_RATE)
    from_data, shape = case.work.from_data, case.eps_shape
    grey = jnp.asarray(case.grey.numpy().astype(np.float32) / 255 if from_data else np.zeros((1, 1), np.float32))

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(weights, state, key, grey, batch):
        key, noise, bits = jax.random.split(key, 3)
        x = batch
        if from_data:
            picked = grey[batch]
            x = (jax.random.uniform(bits, picked.shape) < picked).astype(jnp.float32)
        value, gradients = jax.value_and_grad(loss)(weights, x, jax.random.normal(noise, shape))
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, key, value

    def first() -> list[Any]:
        return [jnp.asarray(w.T) for w in steps.initial()]

    class Step(steps._Step):
        def __init__(self):
            self.weights = first()
            self.state, self.key = optimizer.init(self.weights), jax.random.key(0, impl=implementation)
            batches = case.index if from_data else [x.float() for x in case.bits]
            self.batches = [jnp.asarray(b.numpy()) for b in batches]

        def __call__(self) -> None:
            batch = self.batches[self.done % steps.BATCHES]
            self.weights, self.state, self.key, self.last = train(self.weights, self.state, self.key, grey, batch)
            jax.block_until_ready(self.last)
            self.done += 1

        def loss(self) -> float:
            return float(self.last)

        def check(self) -> None:
            x, eps = case.bits[0].float(), torch.randn(shape)
            found = jax.jit(jax.grad(loss))(first(), jnp.asarray(x.numpy()), jnp.asarray(eps.numpy()))
            steps.check([torch.from_numpy(np.array(g).T) for g in found], x, eps, rtol=1e-4)

    return Step()


steps.OTHERS["jax"] = ways
