"""One step of training: a batch, its noise, the gradients, the update.

`DirectStep` is for an `aevb.VAE` in float32 on a CPU: the kernels and products one after the other, without autograd,
whose bookkeeping would be a quarter of a step of 100 images. `AutogradStep` is for everything else, and has its bits.
`GraphStep` is that on a GPU, captured in a CUDA graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .chunks import FEWEST_ROWS, sum_of_bounds, sum_of_log_prob, take
from .data import Targets
from .layers import is_sparse, layer_backward, layer_forward
from .loss import ESTIMATORS, FusedELBO
from .models import VAE
from .ops import GRADIENTS, mix_seed, on_reference, weigh_samples

_ops = torch.ops.aevb


class Outcome(NamedTuple):
    """Of a step: the loss, a 0-d tensor, and the kl of `FusedELBO.sample`, both without a graph."""

    loss: Tensor
    kl: Tensor


@dataclass
class AutogradStep:
    """batch(index, seed) gives x for images `index`; x_scale is what multiplies it."""

    model: VAE
    criterion: FusedELBO
    optimizer: torch.optim.Optimizer
    batch: Callable[[Tensor, Tensor], Tensor]
    x_scale: float | None
    bf16: bool = False

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        """Trains on images `index`, (B,). The noise of an image is a function of it and of the seeds, 0-d tensors."""
        outcome = self.gradients(self.batch(index, batch_seed), self.noise_seeds(noise_seed, index))
        self.optimizer.step()
        return outcome

    def noise_seeds(self, seed: Tensor, index: Tensor) -> Tensor:
        """A seed for each z: (B,), or (L, B)."""
        seeds = mix_seed(seed, index)
        L = self.criterion.num_samples
        return seeds if L is None else mix_seed(seeds, torch.arange(L, device=index.device).unsqueeze(1))

    def gradients(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The gradients of the loss, as the parameters' .grad."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            mu, logvar = self.model.encode(x, self.x_scale)
            z, kl = self.criterion.sample(mu.float(), logvar.float(), seed=seeds)
            loss = self.criterion(self.model.linear_logits(z), x, kl=kl)
        loss.backward()
        return Outcome(loss.detach(), kl.detach())


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


class DirectStep(AutogradStep):
    @staticmethod
    def fits(model: nn.Module, criterion: FusedELBO, x: Tensor, bf16: bool) -> bool:
        """Whether the model is one that this knows, and the kernels are there."""
        return (
            type(model) is VAE
            and all(p.requires_grad and p.dtype == torch.float32 and not _has_hooks(p) for p in model.parameters())
            and not bf16
            and x.is_cpu
            and not on_reference(x)
            and criterion.free_bits is None
            and criterion.capacity is None
            and (criterion.num_samples or 1) <= 8 * FEWEST_ROWS["cpu"]  # what `sum_of_bounds` takes
            and isinstance(criterion.beta, float)
        )

    @torch.no_grad()
    def gradients(self, x: Tensor, seeds: Tensor) -> Outcome:
        criterion = self.criterion
        num_samples, gradient = criterion.num_samples, ESTIMATORS[criterion.estimator].gradient
        encoder = _Stack(self.model.encoder)
        mu, logvar = encoder.forward(x, self.x_scale).chunk(2, dim=-1)
        if gradient is None:
            z, kl = _ops.sample_gaussian_forward.default(mu, logvar, seeds, num_samples)
        else:
            code = GRADIENTS.index(gradient)
            z, kl = _ops.sample_gaussian_log_ratio_forward.default(mu, logvar, seeds, num_samples, code)

        decoder = _Stack(self.model.decoder[:-1])
        h, last = decoder.forward(z, None), self.model.decoder[-1]
        loss, grad_h, last.weight.grad, last.bias.grad, grad_kl = self._loss(h, last.weight, last.bias, x, kl)
        grad_z = decoder.backward(grad_h, needs_input=True)

        if gradient is None:
            found = _ops.sample_gaussian_backward.default(mu, logvar, seeds, num_samples, grad_z, grad_kl)
        else:
            weighed = weigh_samples((num_samples, code), (grad_z, grad_kl))
            found = _ops.sample_gaussian_log_ratio_backward.default(mu, logvar, seeds, num_samples, code, *weighed)
        encoder.backward(torch.cat(found, dim=-1), needs_input=False)
        return Outcome(loss, kl)

    def _loss(self, h, weight, bias, x, kl):
        """The loss of FusedELBO, and its gradients by h, weight, bias and kl."""
        criterion = self.criterion
        beta, B = float(criterion.beta), x.shape[0]
        if ESTIMATORS[criterion.estimator].importance_weighted:
            what = sum_of_bounds(h, weight, x, kl, criterion.ratio_weight(), -1.0 / B)
            assert what is not None
            value, *grads = take(what, h, weight, bias, x, self.x_scale, (True,) * 4)
            return value.float(), *grads
        what = sum_of_log_prob(h, weight, x, -1.0 / h.shape[:-1].numel())
        value, *grads, _ = take(what, h, weight, bias, x, self.x_scale, (True, True, True, False))
        term = criterion.kl_term(kl).mean()
        grad_kl = torch.full((), beta).div_(B)
        if kl.dim() > 1:  # of each sample
            grad_kl.div_(kl.shape[0])
        return beta * term + value.float(), *grads, grad_kl.expand(kl.shape)


class _Stack:
    """Layers of an mlp, tanh after each that is followed by one in it, and what their backward pass needs."""

    def __init__(self, mlp: nn.Module):
        assert isinstance(mlp, nn.Sequential)
        self.layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        self.activations = ["tanh" if i + 1 < len(mlp) else "none" for i in range(0, len(mlp), 2)]

    def forward(self, x: Tensor, x_scale: float | None) -> Tensor:
        self.values, self.x_scale, self.sparse = [x], x_scale, is_sparse(x)
        for i, layer in enumerate(self.layers):
            first = (x_scale, self.sparse) if i == 0 else (None, False)
            x = layer_forward(x, layer.weight, layer.bias, self.activations[i], *first)
            self.values.append(x)
        return x

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        """Sets the parameters' .grad; gives the gradient of x."""
        for i in reversed(range(len(self.layers))):
            layer, x, out = self.layers[i], self.values[i], self.values[i + 1]
            first = (self.x_scale, self.sparse) if i == 0 else (None, False)
            wanted = (i > 0 or needs_input, True)
            grad_x, layer.weight.grad, layer.bias.grad = layer_backward(
                x, layer.weight, out, grad, self.activations[i], *first, wanted
            )
            if grad_x is None:
                return None
            grad = grad_x
        return grad


@dataclass
class GraphStep:
    """A step on a GPU, captured in a CUDA graph after a few that run as they are: batch, noise, gradients and update
    are one launch. Batches of another size run as they are."""

    step: AutogradStep
    batch_size: int
    warm_up: int = 3

    def __post_init__(self):
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given_up = False

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        if self.given_up or len(index) != self.batch_size:
            return self.step(index, batch_seed, noise_seed)
        if self.warm_up > 0:
            self.warm_up -= 1
            return self._beside(index, batch_seed, noise_seed)
        beta = self.step.criterion.beta
        if self.graph is None:
            self.inputs = index.clone(), batch_seed.clone(), noise_seed.clone(), torch.tensor(beta, device=index.device)
            if not self._capture():
                return self.step(index, batch_seed, noise_seed)
        for static, given in zip(self.inputs, (index, batch_seed, noise_seed), strict=False):
            static.copy_(given)
        self.inputs[-1].fill_(float(beta))
        assert self.graph is not None
        self.graph.replay()
        return Outcome(self.outcome.loss.clone(), self.outcome.kl.clone())

    def _beside(self, *args: Tensor) -> Outcome:
        """A step on a stream of its own, as capturing wants those before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outcome = self.step(*args)
        torch.cuda.current_stream().wait_stream(stream)
        return outcome

    def _capture(self) -> bool:
        criterion = self.step.criterion
        beta, criterion.beta = criterion.beta, self.inputs[-1]
        self.step.optimizer.zero_grad(set_to_none=True)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outcome = self.step(*self.inputs[:-1])
            self.graph = graph
        except RuntimeError as error:
            self.given_up = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"the training step could not be captured in a CUDA graph ({reason}), so it runs op by op: the same "
                "numbers, more slowly",
                stacklevel=2,
            )
        finally:
            criterion.beta = beta
        return self.graph is not None


def training_step(
    model: VAE,
    criterion: FusedELBO,
    optimizer: torch.optim.Optimizer,
    batch: Targets,
    batch_size: int,
    bf16: bool,
) -> AutogradStep | GraphStep:
    """The fastest of the steps that the model and its device allow."""
    parts = (model, criterion, optimizer, batch, batch.x_scale, bf16)
    if DirectStep.fits(model, criterion, batch.images, bf16):
        return DirectStep(*parts)
    step = AutogradStep(*parts)
    return GraphStep(step, batch_size) if batch.images.is_cuda else step
