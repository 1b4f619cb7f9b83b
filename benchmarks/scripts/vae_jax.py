"""The VAE of vae_pytorch.py in JAX and Optax: the images on the device, a jitted step with donated buffers.

Prints a line of JSON an epoch: the test ELBO, one sample of z an image, in nats.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import arguments, images

args = arguments()
jax.config.update("jax_default_matmul_precision", "highest")  # float32 on a GPU too, as PyTorch's default is

train_x, test_x = images(args.data, "train"), images(args.data, "t10k")
random = np.random.RandomState(args.seed)
test_bits = jnp.asarray((random.rand(*test_x.shape) < test_x).astype(np.float32))
train_x = jnp.asarray(train_x)


def layer(rows, columns):
    limit = (6 / (rows + columns)) ** 0.5
    return jnp.asarray(random.uniform(-limit, limit, (rows, columns)), jnp.float32), jnp.zeros(columns)


def softplus(logits):
    return jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))  # faster here than jax.nn.softplus


def loss_function(weights, key, x):
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = weights
    mu, logvar = jnp.split(jnp.tanh(x @ w1 + b1) @ w2 + b2, 2, -1)
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape)
    logits = jnp.tanh(z @ w3 + b3) @ w4 + b4
    nll = (softplus(logits) - x * logits).sum()
    return (nll + 0.5 * (mu * mu + jnp.exp(logvar) - 1 - logvar).sum()) / len(x)


weights = [layer(784, 500), layer(500, 40), layer(20, 500), layer(500, 784)]
optimizer = optax.adam(1e-3)
state = optimizer.init(weights)
key = jax.random.key(args.seed, impl="rbg")


@partial(jax.jit, donate_argnums=(0, 1))
def step(weights, state, key, train_x, index):
    key, noise, bits = jax.random.split(key, 3)
    grey = train_x[index]
    x = (jax.random.uniform(bits, grey.shape) < grey).astype(jnp.float32)
    gradients = jax.grad(loss_function)(weights, noise, x)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(weights, updates), state, key


@jax.jit
def test(weights, key):
    batches = test_bits.reshape(10, -1, 784)
    return -jax.lax.map(lambda x: loss_function(weights, key, x), batches).mean()


for epoch in range(1, args.epochs + 1):
    order = random.permutation(len(train_x)).reshape(-1, args.batch_size)
    for index in order:
        weights, state, key = step(weights, state, key, train_x, index)
    print(json.dumps({"epoch": epoch, "test_elbo": float(test(weights, key))}), flush=True)
