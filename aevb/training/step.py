"""One step of training: a batch, its noise, the gradients, the update.

`DirectStep` is for an `aevb.VAE` in float32: the kernels and products one after the other, without autograd, whose
bookkeeping would be a quarter of a step of 100 images. `AutogradStep` is for everything else, with the same bits on a
CPU. `DistributedStep` is that of several processes; `GraphStep` is any of them on a GPU, captured in a CUDA graph.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..checks.choices import ACTIVATIONS, GRADIENTS
from ..data import Targets
from ..likelihoods import Likelihood
from ..losses.elbo import ESTIMATORS, FusedELBO
from ..models import VAE, BaseVAE
from ..ops import matmul_cuda as cuda_products
from ..ops import mix_seed, on_reference, weigh_samples
from ..ops.chunking import FEWEST_ROWS, Kernel, rows_of_chunk, sum_of_bounds, sum_of_log_prob, take
from ..ops.linear import floating, is_sparse, sparse_linear, sparse_weight_grad
from ..ops.matmul import activation_backward_, bias_activation, product, rows_product
from ..ops.plain_modules import has_hooks, inherits, is_hooked, is_plain
from . import cuda_graphs
from .distributed import Alone, Several

_sample = torch.ops.aevb.sample_gaussian_forward.default
_sample_backward = torch.ops.aevb.sample_gaussian_backward.default
_sample_log_ratio = torch.ops.aevb.sample_gaussian_log_ratio_forward.default
_sample_log_ratio_backward = torch.ops.aevb.sample_gaussian_log_ratio_backward.default


@dataclass(frozen=True)
class Outcome:
    """A step's loss, mean KL, and loss + ELBO, which is not 0 under a beta other than 1, free bits or a capacity."""

    numbers: Tensor  # (3,), float32, without a graph

    @property
    def loss(self) -> Tensor:
        return self.numbers[0]

    @property
    def kl(self) -> Tensor:
        return self.numbers[1]


@dataclass
class AutogradStep:
    """batch(index, seed) gives x for images `index`; x_scale is what multiplies it."""

    model: BaseVAE
    criterion: FusedELBO
    optimizer: torch.optim.Optimizer
    batch: Callable[[Tensor, Tensor], Tensor]
    x_scale: float | None
    bf16: bool = False
    clip_norm: float | None = None

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        """Trains on images `index`, (B,). The noise of an image is a function of it and of the seeds, 0-d tensors."""
        outcome = self.gradients(self.batch(index, batch_seed), self.noise_seeds(noise_seed, index))
        self.update()
        return outcome

    def update(self) -> None:
        """The optimizer's step without the profiling around it, which takes 50 us, and a second at the first."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        optimizer = self.optimizer
        if _has_own_step(optimizer):
            optimizer.step()
        else:
            with torch.no_grad():
                inspect.unwrap(type(optimizer).step)(optimizer)

    def noise_seeds(self, seed: Tensor, index: Tensor) -> Tensor:
        """A seed for each z: (B,), or (L, B)."""
        seeds = mix_seed(seed, index)
        L = self.criterion.num_samples
        return seeds if L is None else mix_seed(seeds, torch.arange(L, device=index.device).unsqueeze(1))

    def gradients(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The gradients of the loss, as the parameters' .grad."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, kl = self.loss(x, seeds)
        loss.backward()
        return self.outcome(loss, kl)

    def outcome(self, loss: Tensor, kl: Tensor) -> Outcome:
        """Of the loss, and the kl of `FusedELBO.sample`."""
        criterion, loss, kl = self.criterion, loss.detach(), kl.detach()
        mean = kl.mean() if criterion.free_bits is None else kl.sum() / max(kl[..., 0].numel(), 1)
        if ESTIMATORS[criterion.estimator].importance_weighted:
            excess = torch.zeros_like(mean)
        else:
            plain = criterion.free_bits is None and criterion.capacity is None
            term = mean if plain else criterion.kl_term(kl).mean()
            excess = criterion.beta * term - mean
        return Outcome(torch.stack([loss, mean, excess]))

    def loss(self, x: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the kl of `FusedELBO.sample`."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            mu, logvar = self.model.encode(x, self.x_scale)
            z, kl = self.criterion.sample(mu.float(), logvar.float(), seed=seeds)
            kl = self.of_whole_batch(kl)
            return self.criterion(self.model.recon(z), x, kl=kl), kl

    def of_whole_batch(self, kl: Tensor) -> Tensor:
        """kl so that its mean is that of the whole batch, which free bits and a capacity go by."""
        return kl


def _has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step is more than that of a class of PyTorch's or of aevb's."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or "step" in vars(optimizer)  # a scheduler's
        or not type(optimizer).__module__.startswith(("torch.optim.", "aevb."))
    )


def _calls_others(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step runs somebody's Python, which a graph would leave out."""
    return is_hooked(model) or has_hooks(criterion) or _has_own_step(optimizer)


class _Objective(nn.Module):
    """A step's loss as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, step: AutogradStep):
        super().__init__()
        self.model = step.model  # its parameters are those whose gradients are added up
        self.loss = step.loss

    def forward(self, x: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(x, seeds)


@dataclass
class DistributedStep(AutogradStep):
    """Each process takes its part of the batch, and DistributedDataParallel adds up their gradients: those of one
    process, but for the order of additions. The outcome is that of the part."""

    processes: Alone | None = None
    share: float = field(default=1.0, init=False)  # of the batch

    def __post_init__(self) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.objective = DistributedDataParallel(_Objective(self), gradient_as_bucket_view=True)

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        assert self.processes is not None
        part = self.processes.part(index)
        # DistributedDataParallel averages over processes. One that has no image left takes part with weight 0.
        self.share = len(part) / len(index)
        weight = self.share * self.processes.size
        part = part if len(part) else index[:1]
        self.optimizer.zero_grad(set_to_none=True)
        loss, kl = self.objective(self.batch(part, batch_seed), self.noise_seeds(noise_seed, part))
        (weight * loss).backward()
        self.update()
        return self.outcome(loss, kl)

    def of_whole_batch(self, kl: Tensor) -> Tensor:
        if self.criterion.free_bits is None and self.criterion.capacity is None:
            return kl
        assert self.processes is not None
        mean = kl.detach().mean(0)
        return kl + (self.processes.sum(self.share * mean).to(kl) - mean)


_OWN = ("encode", "decode", "recon", "_encoded", "_decoded", "_output", "beside_the_layer")  # which a step goes by


def has_shared_parameter(model: BaseVAE) -> bool:
    """Whether one learned number is the variance of all elements."""
    return model.family.has_spread and model.variance == "shared"


def _is_known(model: nn.Module) -> bool:
    """Whether the model is a VAE as `VAE` makes it, no layer replaced, frozen or shared, and each of them
    plain."""
    if not (is_plain(model, VAE) and inherits(model, VAE, *_OWN)):
        return False
    mlps = [model.encoder, model.decoder]
    if not all(is_plain(mlp, nn.Sequential) and len(mlp) % 2 for mlp in mlps):
        return False
    layers = [layer for mlp in mlps for layer in mlp[::2]]
    return (
        all(is_plain(layer, nn.Linear) and layer.bias is not None for layer in layers)
        and all(is_plain(activation, nn.Tanh) for mlp in mlps for activation in mlp[1::2])
        and len(list(model.parameters())) == 2 * len(layers) + has_shared_parameter(model)
        and all(p.requires_grad and p.dtype == torch.float32 and p.is_leaf for p in model.parameters())
        and not is_hooked(model)
    )


@dataclass
class DirectStep(AutogradStep):
    """The parameters' .grad is memory that the next step writes over."""

    plans: dict[int, _Plan] = field(default_factory=dict, init=False)  # by the batch size

    @staticmethod
    def fits(model: nn.Module, criterion: FusedELBO, x: Tensor, bf16: bool) -> bool:
        """Whether the model is one that this knows, and the kernels are there."""
        return (
            _is_known(model)
            and is_plain(criterion, FusedELBO)
            and criterion.family == model.family
            and criterion.reduction == "mean"
            and not bf16
            and (x.is_cpu or x.is_cuda)
            and not on_reference(x)
            and criterion.free_bits is None
            and criterion.capacity is None
            and (criterion.num_samples or 1) <= 8 * FEWEST_ROWS[x.device.type]  # what `sum_of_bounds` takes
            and isinstance(criterion.beta, float)
        )

    @torch.no_grad()
    def gradients(self, x: Tensor, seeds: Tensor) -> Outcome:
        criterion, B = self.criterion, x.shape[0]
        plan = self.plans.get(B)
        if plan is None:
            assert isinstance(self.model, VAE)
            plan = self.plans[B] = _Plan(self.model, B, criterion.num_samples)
        num_samples, gradient = criterion.num_samples, ESTIMATORS[criterion.estimator].gradient

        posterior = plan.first.forward_of_images(x, self.x_scale)
        for layer in plan.encoder:
            posterior = layer.forward(posterior)
        mu, logvar = posterior.chunk(2, dim=-1)
        if gradient is None:
            z, kl = _sample(mu, logvar, seeds, num_samples)
        else:
            code = GRADIENTS.index(gradient)
            z, kl = _sample_log_ratio(mu, logvar, seeds, num_samples, code)
        h = z.view(plan.rows, z.shape[-1])
        for layer in plan.decoder:
            h = layer.forward(h)
        outcome, grad, grad_kl = self._loss(plan, h, x, kl)
        for layer in reversed(plan.decoder):
            grad = layer.backward(grad)
        grad = grad.view_as(z)
        if gradient is None:
            found = _sample_backward(mu, logvar, seeds, num_samples, grad, grad_kl)
        else:
            weighed = weigh_samples((num_samples, code), (grad, grad_kl))
            found = _sample_log_ratio_backward(mu, logvar, seeds, num_samples, code, *weighed)
        grad = torch.cat(found, dim=-1)
        for layer in reversed(plan.encoder):
            grad = layer.backward(grad)
        plan.first.backward(grad, wanted=False)
        return outcome

    def _loss(self, plan: _Plan, h: Tensor, x: Tensor, kl: Tensor) -> tuple[Outcome, Tensor, Tensor]:
        """The loss of FusedELBO, and its gradients by h (rows, H) and kl. Sets those of the last layer."""
        criterion, last, B = self.criterion, plan.last, x.shape[0]
        beta = criterion.beta  # a tensor where this is captured in a graph
        weighted = ESTIMATORS[criterion.estimator].importance_weighted
        kernel = plan.kernel(criterion.family.density if weighted else criterion.family, x, self.x_scale)
        if weighted:
            samples = h.view(*kl.shape, h.shape[1])
            what = sum_of_bounds(samples, last.weight, x, kl, criterion.ratio_weight(), -1.0 / B)
            assert what is not None
            taken = take(what, samples, last.weight, last.bias, x, kernel, (True, True, True, plan.learns_shared, True))
            plan.set_shared_gradient(taken.shared)
            last.weight.grad, last.bias.grad = taken.weight, taken.bias
            assert taken.h is not None
            assert taken.log_ratio is not None
            return self.outcome(taken.value.float(), kl), taken.h.view_as(h), taken.log_ratio
        factor = -1.0 / plan.rows
        if plan.in_chunks:
            samples = h.view(-1, B, h.shape[1])
            what = sum_of_log_prob(samples, last.weight, x, factor)
            taken = take(
                what, samples, last.weight, last.bias, x, kernel, (True, True, True, plan.learns_shared, False)
            )
            plan.set_shared_gradient(taken.shared)
            last.weight.grad, last.bias.grad = taken.weight, taken.bias
            assert taken.h is not None
            value, grad_h = taken.value, taken.h.view_as(h)
        elif plan.on_gpu:
            logits = plan.last_layer.forward(h)
            log_prob, logits, shared = kernel.both(logits.view(-1, B, logits.shape[1]), x, factor)
            logits = logits.view(plan.rows, -1)
            plan.set_shared_gradient(None if shared is None else shared.view(plan.rows, -1).sum(0))
            weight = (beta, 1.0) if isinstance(beta, Tensor) else (None, beta)
            outcome = Outcome(cuda_products.elbo_terms(log_prob, kl, *weight))
            return outcome, plan.last_layer.backward(logits), plan.grad_kl(beta, kl)
        else:
            logits = product(h, last.weight, last.bias, out=plan.logits)
            log_prob, logits, shared = kernel.both(logits.view(-1, B, logits.shape[1]), x, factor)
            logits = logits.view(plan.rows, -1)
            plan.set_shared_gradient(None if shared is None else shared.view(plan.rows, -1).sum(0))
            value = log_prob.sum(dtype=torch.float64).mul_(factor)
            grad_h = product(logits, last.weight.t(), out=plan.grad_h)
            last.weight.grad = rows_product(logits, h, out=plan.grad_weight).contiguous()
            last.bias.grad = logits.sum(0)
        loss = beta * criterion.kl_term(kl).mean() + value.float()
        return self.outcome(loss, kl), grad_h, plan.grad_kl(beta, kl)


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


class _Plan:
    """The layers of a VAE for batches of one size, and on a CPU their memory, kept from step to step."""

    def __init__(self, model: VAE, B: int, num_samples: int | None):
        encoder, (*decoder, last) = _linear_layers(model.encoder), _linear_layers(model.decoder)
        self.rows, self.last, self.on_gpu = B * (num_samples or 1), last, _on_gpu(last.weight)
        self.model, self.learns_shared = model, has_shared_parameter(model)

        def made(layer: nn.Linear, rows: int, activation: str) -> _Layer | _GpuLayer:
            return (_GpuLayer if self.on_gpu else _Layer)(layer, rows, activation)

        activations = ["tanh"] * (len(encoder) - 1) + ["none"]
        self.first, *self.encoder = (made(layer, B, a) for layer, a in zip(encoder, activations, strict=True))
        self.decoder = [made(layer, self.rows, "tanh") for layer in decoder]
        self.known_kl: tuple[float, Tensor] = (0.0, torch.empty(0))
        self.in_chunks = not 0 < self.rows <= rows_of_chunk(last.weight)
        if self.on_gpu:
            self.last_layer = made(last, self.rows, "none")
        elif not self.in_chunks:
            self.logits = torch.empty(self.rows, last.out_features)
            self.grad_h = torch.empty(self.rows, last.in_features)
            self.grad_weight = torch.empty_like(last.weight)

    def kernel(self, family: Likelihood, x: Tensor, x_scale: float | None) -> Kernel:
        """A likelihood's, of what the last layer gives."""
        shared, floor = self.model.beside_the_layer()
        D = x.shape[-1]
        name, scalar, shared = family.linear_kernel(self.last.out_features // D, shared)
        if isinstance(shared, Tensor):
            shared = shared.expand(D).contiguous()
        elif shared is not None:
            shared = torch.full((D,), shared, dtype=torch.float32, device=x.device)
        return Kernel(name, scalar, x_scale, shared, floor)

    def set_shared_gradient(self, grad: Tensor | None) -> None:
        """That of the one logvar of all, from the gradient [D] of what it makes."""
        if self.learns_shared:
            assert grad is not None
            self.model.logvar.grad = self.model.family.above_backward(
                self.model.min_variance, self.model.logvar, grad.sum()
            )

    def grad_kl(self, beta: Tensor | float, kl: Tensor) -> Tensor:
        """That of beta times the mean of kl: as autograd has it, first over datapoints, then over samples."""
        if isinstance(beta, Tensor):
            return _grad_of_mean(beta, kl)
        if self.known_kl[0] != beta or self.known_kl[1].shape != kl.shape:
            self.known_kl = beta, _grad_of_mean(torch.full((), beta, device=kl.device), kl).contiguous()
        return self.known_kl[1]


def _grad_of_mean(beta: Tensor, kl: Tensor) -> Tensor:
    grad = beta / kl.shape[-1]
    return (grad / kl.shape[0] if kl.dim() > 1 else grad).expand(kl.shape)


def _linear_layers(mlp: nn.Module) -> list[nn.Linear]:
    return [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]


class _Layer:
    """A layer of so many rows, and the two passes through it. What the forward pass gives is there until the next."""

    def __init__(self, layer: nn.Linear, rows: int, activation: str):
        self.layer, self.activation, self.code = layer, activation, ACTIVATIONS.index(activation)
        self.out = torch.empty(rows, layer.out_features)
        self.grad_x = torch.empty(rows, layer.in_features)
        self.grad_weight = torch.empty_like(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.x, self.sparse = x, False
        bias = self.layer.bias
        if self.activation == "none":
            self.value = product(x, self.layer.weight, bias, out=self.out)
        else:
            self.value = product(x, self.layer.weight, out=self.out)
            bias_activation(self.value, bias, self.code)
        return self.value

    def forward_of_images(self, x: Tensor, x_scale: float | None) -> Tensor:
        if not is_sparse(x):
            return self.forward(floating(x, x_scale, self.layer.weight))
        self.x, self.x_scale, self.sparse = x, x_scale, True
        self.value = sparse_linear(x, x_scale, self.layer.weight, self.layer.bias, self.code)
        return self.value

    def backward(self, grad: Tensor, wanted: bool = True) -> Tensor:
        """Sets the gradients of weight and bias; gives that of x, where it is wanted. grad is written over."""
        weight, bias = self.layer.weight, self.layer.bias
        bias.grad = activation_backward_(self.value, grad, self.code)
        if self.sparse:
            weight.grad = sparse_weight_grad(self.x, self.x_scale, grad)
        else:
            weight.grad = rows_product(grad, self.x, out=self.grad_weight).contiguous()
        return product(grad, weight.t(), out=self.grad_x) if wanted else grad


class _GpuLayer:
    """The same on a GPU, where a graph keeps the memory."""

    def __init__(self, layer: nn.Linear, rows: int, activation: str):
        self.layer, self.activation, self.code = layer, activation, ACTIVATIONS.index(activation)
        self.in_pieces = cuda_products.in_pieces(rows, layer.weight)
        self.x_scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        self.orders = cuda_products.LEFT, cuda_products.RIGHT
        if not self.in_pieces:
            self.x = x
            self.value = cuda_products.linear(x, weight, bias, self.activation)
            return self.value
        if not x.is_floating_point():
            self.orders = cuda_products.BYTES, cuda_products.BESIDE_BYTES
        self.x = cuda_products.pieces(x, self.orders[0])
        out = cuda_products.product_of_pieces(self.x, cuda_products.pieces(weight, self.orders[1]))
        self.value = cuda_products.activate(out, self.x_scale or 1.0, bias, self.activation)
        return self.value

    def forward_of_images(self, x: Tensor, x_scale: float | None) -> Tensor:
        if x.is_floating_point() or not self.in_pieces:
            return self.forward(floating(x, x_scale, self.layer.weight))
        self.x_scale = x_scale
        return self.forward(x)

    def backward(self, grad: Tensor, wanted: bool = True) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        grad_input, bias.grad = cuda_products.activation_backward(self.value, grad, self.code)
        grad = grad_input if self.code else grad
        if not self.in_pieces:
            weight.grad = cuda_products.rows_product(grad, self.x)
            return cuda_products.linear(grad, weight.t()) if wanted else grad
        pieces = cuda_products.pieces(grad, self.orders[1])
        weight.grad = cuda_products.rows_product_of_pieces(pieces, self.x, (weight.shape[0], weight.shape[1]))
        if self.x_scale is not None:
            weight.grad.mul_(self.x_scale)
        return cuda_products.product_with_weight(pieces, weight, self.orders[0]) if wanted else grad


@dataclass
class GraphStep:
    """A step on a GPU, captured in a CUDA graph after a few that run as they are: batch, noise, gradients and update
    are one launch. Batches of another size run as they are."""

    step: AutogradStep
    batch_size: int
    warm_up: int = 3

    def __post_init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given_up = False
        self.inputs: _GraphInputs | None = None

    def __call__(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Outcome:
        if self.given_up or len(index) != self.batch_size:
            return self.step(index, batch_seed, noise_seed)
        if self.inputs is None:
            self.inputs = _GraphInputs(index, batch_seed, noise_seed)
        self.inputs.set(index, batch_seed, noise_seed, self.step.criterion.beta)
        if self.warm_up > 0:
            self.warm_up -= 1
            return cuda_graphs.beside(self._take)
        if self.graph is None and not self._capture():
            return self.step(index, batch_seed, noise_seed)
        assert self.graph is not None
        self.graph.replay()
        return Outcome(self.outcome.numbers.clone())

    def _take(self) -> Outcome:
        """A step of the inputs, which the graph reads. A beta that is a number is read where it is too."""
        assert self.inputs is not None
        criterion = self.step.criterion
        beta, criterion.beta = criterion.beta, self.inputs.beta
        try:
            return self.step(*self.inputs.tensors)
        finally:
            criterion.beta = beta

    def _capture(self) -> bool:
        self.step.optimizer.zero_grad(set_to_none=True)
        try:
            self.graph, self.outcome = cuda_graphs.capture(self._take)
        except RuntimeError as error:
            self.given_up = True
            first: BaseException = error  # where ending the capture failed too, what went wrong before says why
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).splitlines()[0] if str(first) else type(first).__name__
            warnings.warn(
                f"the training step could not be captured in a CUDA graph ({reason}), so it runs op by op: the same "
                "numbers, more slowly",
                stacklevel=3,
            )
        return self.graph is not None


class _GraphInputs:
    """What a captured step reads anew each time; it is copied only where it is not what it was."""

    def __init__(self, *given: Tensor):
        self.tensors = tuple(t.clone() for t in given)
        self.beta = torch.ones((), device=given[0].device)
        self.known: list[object] = [None] * (len(given) + 1)

    def set(self, *given: Tensor | float) -> None:
        for i, (to, value) in enumerate(zip((*self.tensors, self.beta), given, strict=True)):
            # A tensor may have been written to since.
            now = (value, value._version) if isinstance(value, Tensor) else value
            before = self.known[i]
            if isinstance(value, Tensor):
                if not (isinstance(before, tuple) and before[0] is value and before[1] == value._version):
                    to.copy_(value)
            elif before != value:
                to.fill_(value)
            self.known[i] = now


def made_of(model: nn.Module, criterion: FusedELBO, optimizer: torch.optim.Optimizer) -> tuple:
    """What a step takes as it is: where this has changed, there must be a new one. A captured one has addresses and
    hyperparameters in it."""
    parameters = list(model.parameters())
    options = [value for name, value in vars(criterion).items() if name != "beta" and not name.startswith("_")]
    found: list = [criterion, *options, optimizer, *model.modules(), *parameters]
    found += [getattr(model, name, None) for name in ("family", "variance", "min_variance")]
    found += [_is_known(model), is_plain(criterion, FusedELBO), _calls_others(model, criterion, optimizer)]
    if any(p.is_cuda for p in parameters):
        states = [t for p in parameters for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]
        found += [t.data_ptr() for t in (*parameters, *states)]
        found += [repr({k: _where(v) for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
    return tuple(id(x) if isinstance(x, nn.Module | Tensor | torch.optim.Optimizer) else x for x in found)


def _where(option: object) -> object:
    """Of a tensor, which a captured step reads anew each time, its address."""
    return option.data_ptr() if isinstance(option, Tensor) else option


def training_step(
    model: BaseVAE,
    criterion: FusedELBO,
    optimizer: torch.optim.Optimizer,
    batch: Targets,
    batch_size: int,
    bf16: bool,
    clip_norm: float | None = None,
    processes: Alone | None = None,
) -> AutogradStep | GraphStep:
    """The fastest of the steps that the model and its device allow."""
    parts = (model, criterion, optimizer, batch, batch.x_scale, bf16, clip_norm)
    if isinstance(processes, Several):
        return DistributedStep(*parts, processes)
    direct = DirectStep.fits(model, criterion, batch.images, bf16)
    step = (DirectStep if direct else AutogradStep)(*parts)
    # What is gathered from the disk comes from the CPU, where no graph reaches.
    in_graph = batch.images.is_cuda and not batch.streamed and not _calls_others(model, criterion, optimizer)
    return GraphStep(step, batch_size) if in_graph else step
