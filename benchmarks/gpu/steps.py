"""A training step of a 784-500-20 VAE with Adam, from the data set: gathered, binarized, forward, backward, update.

Grey images lie on the device, as each provider likes them best. All begin with the same weights, and see the same
images in the same order; bits and noise are each provider's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import aevb
from aevb.data import Targets
from aevb.training.objectives import SGVB
from aevb.training.optimizers import OPTIMIZERS
from aevb.training.step import AutogradStep
from aevb.training.step_choice import training_step
from aevb.training.step_cuda_graph import GraphStep

from .. import cases
from ..measure import Json, has_jax
from .clocks import captured
from .work import LATENTS, PIXELS, Function

HIDDEN, LEARNING_RATE = 500, 1e-3
BATCHES = 16


def images(data: str | None, batch: int) -> Tensor:
    """MNIST's, or where it is not there some that a VAE can learn: bytes, (N, 784)."""
    if data:
        found = aevb.data.load(data).train_images
        assert isinstance(found, Tensor)
        return found
    generator = torch.Generator().manual_seed(3)
    grey = torch.linspace(0, 1, PIXELS) ** 3  # some pixels are rarely set
    return (255 * grey * torch.rand(BATCHES * batch, PIXELS, generator=generator)).to(torch.uint8)


def new_model(device: str) -> aevb.VAE:
    return aevb.VAE(PIXELS, HIDDEN, LATENTS, generator=torch.Generator().manual_seed(1)).to(device)


def plain_loss(model: aevb.VAE, x: Tensor) -> Tensor:
    """What a person would write."""
    mu, logvar = model.encoder(x).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return cases.loss(model.decoder(z), x, mu, logvar)


CRITERION = aevb.FusedELBO()


def fused_loss(model: aevb.VAE, x: Tensor) -> Tensor:
    z, kl = aevb.sample_gaussian(*model.encoder(x).chunk(2, -1))
    return CRITERION(model.decoder(z), x, kl=kl)


class Objective(nn.Module):
    """The loss of images by their numbers. The grey images are a buffer, floats: no step copies or converts them."""

    grey: Tensor

    def __init__(self, case: StepCase, loss: Function):
        super().__init__()
        self.model, self.loss = new_model(case.device), loss
        self.register_buffer("grey", case.grey.to(case.device).float() / 255)

    def forward(self, index: Tensor) -> Tensor:
        return self.loss(self.model, torch.bernoulli(self.grey[index]))


class Step:
    """A step as a call, by PyTorch: the next of some batches, forward, backward, fused Adam."""

    def __init__(self, case: StepCase, loss: Function, how: Function = lambda f: f, marks_steps: bool = False):
        objective = Objective(case, loss)
        capturable = isinstance(self, CapturedStep)
        self.optimizer = torch.optim.Adam(objective.parameters(), LEARNING_RATE, fused=True, capturable=capturable)
        self.index, self.marks_steps, self.done = case.index, marks_steps, 0
        self.objective = how(objective)
        self.loss = torch.zeros((), device=case.device)

    def next_batch(self) -> Tensor:
        self.done += 1
        return self.index[self.done % len(self.index)]

    def train(self, index: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.objective(index)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def __call__(self) -> None:
        if self.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        self.loss = self.train(self.next_batch())

    def draws_noise(self) -> bool:
        """Whether two steps with the same images have other losses, by bits and noise that are drawn anew."""
        self.index, kept = self.index[:1], self.index
        found = []
        for _ in range(2):
            self()
            found.append(float(self.loss))
        self.index = kept
        return 0 < abs(found[0] / found[1] - 1) < 0.1

    def learn(self, steps: int) -> float:
        """The average of the last 5 losses after as many steps."""
        losses = []
        while self.done < steps:
            self()
            losses.append(float(self.loss))
        return statistics.mean(losses[-5:])


class CapturedStep(Step):
    """The same, recorded once in a CUDA graph and replayed; a batch is copied to where the graph reads it."""

    def __init__(self, case: StepCase, loss: Function, how: Function = lambda f: f):
        super().__init__(case, loss, how)
        self.batch = self.index[0].clone()
        self.graph, self.loss = captured(lambda: self.train(self.batch), self.warm_up)

    def warm_up(self) -> None:
        for _ in range(3):
            self.batch.copy_(self.next_batch())
            self.train(self.batch)

    def __call__(self) -> None:
        self.batch.copy_(self.next_batch())
        self.graph.replay()


class TrainerStep(Step):
    """The step of `aevb.Trainer`: on a GPU all of it is a CUDA graph."""

    def __init__(self, case: StepCase, bf16: bool = False, direct: bool = True):
        model, self.index, self.done = new_model(case.device), case.index, 0
        targets = Targets(case.grey, "dynamic", 255, case.device)
        optimizer = OPTIMIZERS["adam"](model.parameters(), LEARNING_RATE, torch.device(case.device))
        batch = len(self.index[0])
        self.step = training_step(model, aevb.FusedELBO(), optimizer, targets, batch, bf16)
        if not direct:
            step = AutogradStep(model, SGVB(aevb.FusedELBO()), optimizer, targets, None)
            self.step = GraphStep(step, batch) if case.device != "cpu" else step
        self.seeds = [t.clone() for t in torch.arange(20, device=case.device)]

    def __call__(self) -> None:
        self.done += 1
        seed = self.seeds[self.done // 600 % len(self.seeds)]  # one an epoch
        self.loss = self.step(self.index[self.done % len(self.index)], seed, seed).loss


class JaxStep(Step):
    """One jitted function from the data set to the weights, its buffers donated."""

    def __init__(self, case: StepCase, precision: str):
        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax

        from ..jax_steps import loss

        optimizer = optax.adam(LEARNING_RATE)

        def train(weights, state, key, grey, index):
            key, noise, bits = jax.random.split(key, 3)
            picked = grey[index]
            x = (jax.random.uniform(bits, picked.shape) < picked).astype(jnp.float32)
            eps = jax.random.normal(noise, (len(index), LATENTS))
            value, gradients = jax.value_and_grad(loss)(weights, x, eps)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(weights, updates), state, key, value

        self.jax, self.done = jax, 0
        self.jitted = jax.jit(train, donate_argnums=(0, 1, 2))
        self.precision = precision
        self.grey = jnp.asarray(case.grey.numpy().astype(np.float32) / 255)
        self.index = tuple(jnp.asarray(i.cpu().numpy()) for i in case.index)
        self.weights = [jnp.asarray(p.detach().cpu().numpy().T) for p in new_model("cpu").parameters()]
        self.state, self.key = optimizer.init(self.weights), jax.random.key(0, impl="rbg")

    def __call__(self) -> None:
        with self.jax.default_matmul_precision(self.precision):
            found = self.jitted(self.weights, self.state, self.key, self.grey, self.next_batch())
            self.weights, self.state, self.key, self.loss = found

    def wait(self) -> None:
        self.jax.block_until_ready(self.loss)


class StepCase:
    """Steps of one batch size, on a device, and who takes them."""

    def __init__(self, device: str, batch: int, data: str | None, tf32: bool = False):
        self.device, self.batch, self.tf32 = device, batch, tf32
        self.grey = images(data, batch)
        order = torch.randperm(len(self.grey), generator=torch.Generator().manual_seed(1))
        whole = min(BATCHES, len(self.grey) // batch)
        self.index = order[: whole * batch].to(device).split(batch)

    def compiled(self, **options: Any) -> Function:
        if self.device == "cpu":
            return lambda f: torch.compile(f, dynamic=False, backend="aot_eager")
        return lambda f: torch.compile(f, dynamic=False, **options)

    def providers(self) -> dict[str, Callable[[], Step]]:
        """The most wanted first."""
        found: dict[str, Callable[[], Step]] = {"eager": lambda: Step(self, plain_loss)}
        if self.device != "cpu":
            # Before anything is captured: as it records its graphs, it gives back the workspaces that others' write to.
            overhead: Any = {"mode": "reduce-overhead"}
            found["compile, reduce-overhead"] = lambda: Step(
                self, plain_loss, self.compiled(**overhead), marks_steps=True
            )
        found["aevb, trainer"] = lambda: TrainerStep(self)
        if has_jax():
            found["jax"] = lambda: JaxStep(self, "tensorfloat32" if self.tf32 else "highest")
        if self.tf32:
            return found
        found |= {
            "aevb": lambda: Step(self, fused_loss),
            "compile": lambda: Step(self, plain_loss, self.compiled()),
            "aevb, trainer, bf16": lambda: TrainerStep(self, bf16=True),
            "aevb, trainer, with autograd": lambda: TrainerStep(self, direct=False),
        }
        if self.device != "cpu":
            found |= {
                "aevb, captured": lambda: CapturedStep(self, fused_loss),
                "eager, captured": lambda: CapturedStep(self, plain_loss),
                "compile, captured": lambda: CapturedStep(self, plain_loss, self.compiled()),
            }
        return found


def profile(step: Step, steps: int = 20) -> Json:
    """What a GPU does in a step: its kernels by the time they take."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in found.key_averages() if e.self_device_time_total > 0]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    rows = [
        {"kernel": e.key[:120], "a step": e.count / steps, "us a step": round(e.self_device_time_total / steps, 2)}
        for e in kernels
    ]
    return {
        "launches": sum(row["a step"] for row in rows),
        "us": round(sum(row["us a step"] for row in rows), 1),
        "kernels": rows,
    }
