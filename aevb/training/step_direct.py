"""Training step of `aevb.VAE` with hand-written gradients, without autograd.

Autograd's bookkeeping would be a quarter of a step of 100 images.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..checks.choices import ACTIVATIONS, ESTIMATORS, GRADIENTS
from ..likelihoods import Likelihood
from ..likelihoods.target import Target
from ..losses.elbo import FusedELBO
from ..models import VAE, BaseVAE
from ..ops import matmul_cuda as cuda_products
from ..ops.autograd import on_reference
from ..ops.chunking import FEWEST_ROWS, Kernel, rows_of_chunk, sum_of_bounds, sum_of_log_prob, take
from ..ops.gaussian import weigh_samples
from ..ops.linear import floating, is_sparse, sparse_linear, sparse_weight_grad
from ..ops.matmul import activation_backward_, bias_activation, product, rows_product
from ..ops.plain_modules import inherits, is_hooked, is_plain
from .objectives import SGVB, Objective, objective_of
from .step import AutogradStep, Outcome, outcome_of

_sample = torch.ops.aevb.sample_gaussian_forward.default
_sample_backward = torch.ops.aevb.sample_gaussian_backward.default
_sample_log_ratio = torch.ops.aevb.sample_gaussian_log_ratio_forward.default
_sample_log_ratio_backward = torch.ops.aevb.sample_gaussian_log_ratio_backward.default


# Methods of VAE whose work the step does itself: a model that overrides any of them needs autograd.
_OWN = (
    "encode",
    "encoder_input",
    "decode",
    "recon",
    "_encoded",
    "_decoded",
    "_output",
    "beside_the_layer",
    "prior_parameters",
)


def has_shared_parameter(model: BaseVAE) -> bool:
    """Whether the variance is one learned scalar, shared by all elements."""
    return model.family.has_spread and model.variance == "shared"


def is_known(model: nn.Module) -> bool:
    """Whether `DirectStep` has the gradients of this model.

    The model must be a VAE as `VAE` builds it, of the prior N(0, I), with float32 parameters. Each layer must be plain:
    none replaced, frozen, shared or hooked.
    """
    if not (is_plain(model, VAE) and inherits(model, VAE, *_OWN)):
        return False
    mlps = [model.encoder, model.decoder]
    if model.prior_parameters is not None:
        return False
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
    """Training step of a plain `VAE` under `SGVB`, without autograd.

    The next step overwrites the memory of the parameters' `.grad`.
    """

    plans: dict[int, _Plan] = field(default_factory=dict, init=False)  # by batch size

    @staticmethod
    def fits(model: nn.Module, objective: Objective | FusedELBO, x: Tensor, bf16: bool) -> bool:
        """Whether the step supports the model, the objective and the device.

        The criterion must be a plain `FusedELBO` of the model's likelihood, with reduction "mean" and a float beta.
        bf16, free bits, a capacity, a range of logvar, and devices without the kernels are not supported.
        """
        loss = objective_of(objective)
        if type(loss) is not SGVB:
            return False
        criterion = loss.criterion
        return (
            is_known(model)
            and is_plain(criterion, FusedELBO)
            and criterion.family == model.family
            and criterion.reduction == "mean"
            and not bf16
            and (x.is_cpu or x.is_cuda)
            and not on_reference(x)
            and criterion.free_bits is None
            and criterion.logvar_range is None
            and criterion.capacity is None
            and (criterion.num_samples or 1) <= 8 * FEWEST_ROWS[x.device.type]  # limit of `sum_of_bounds`
            and isinstance(criterion.beta, float)
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.objective, SGVB)
        self.sgvb, self.criterion = self.objective, self.objective.criterion

    @torch.no_grad()
    def gradients(self, x: Tensor, seeds: Tensor, observed: Tensor | None = None) -> Outcome:
        """Set the loss's gradients as the parameters' `.grad`.

        Args:
            x: (B, D), the batch.
            seeds: (B,) or (num_samples, B), the seed of each z.
            observed: bool, (B, D): False where a value is missing; None where nothing is.

        Returns:
            The step's loss, mean KL, and loss + ELBO.
        """
        criterion, model, B = self.criterion, self.model, x.shape[0]
        assert isinstance(model, VAE)
        plan = self.plans.get(B)
        if plan is None:
            plan = self.plans[B] = _Plan(model, B, criterion.num_samples)
        num_samples, gradient = criterion.num_samples, ESTIMATORS[criterion.estimator].gradient

        posterior = plan.first.forward_of_images(*model.encoder_input(x, self.x_scale, observed))
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
        outcome, grad, grad_kl = self._loss(plan, h, Target(x, self.x_scale, observed), kl)
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

    def _loss(self, plan: _Plan, h: Tensor, target: Target, kl: Tensor) -> tuple[Outcome, Tensor, Tensor]:
        """Returns the outcome, and the loss's gradients by h and kl.

        Also sets the gradients of the last layer and of a shared logvar.

        Args:
            plan: the layers for this batch size.
            h: (rows, H), the input of the decoder's last layer.
            target: of x (B, D), the batch.
            kl: the KL of each z, as the posterior's sampling op gives it.
        """
        criterion, last, x, B = self.criterion, plan.last, target.x, target.x.shape[0]
        beta = criterion.beta  # a tensor while a CUDA graph is captured
        weighted = ESTIMATORS[criterion.estimator].importance_weighted
        kernel = plan.kernel(criterion.family.density if weighted else criterion.family, x)
        if weighted:
            samples = h.view(*kl.shape, h.shape[1])
            what = sum_of_bounds(samples, last.weight, x, kl, criterion.ratio_weight(), -1.0 / B)
            assert what is not None
            needs = (True, True, True, plan.learns_shared, True)
            taken = take(what, samples, last.weight, last.bias, target, kernel, needs)
            plan.set_shared_gradient(taken.shared)
            last.weight.grad, last.bias.grad = taken.weight, taken.bias
            assert taken.h is not None
            assert taken.log_ratio is not None
            return outcome_of(self.sgvb.terms_of(taken.value.float(), kl)), taken.h.view_as(h), taken.log_ratio
        factor = -1.0 / plan.rows
        if plan.in_chunks:
            samples = h.view(-1, B, h.shape[1])
            what = sum_of_log_prob(samples, last.weight, x, factor)
            needs = (True, True, True, plan.learns_shared, False)
            taken = take(what, samples, last.weight, last.bias, target, kernel, needs)
            plan.set_shared_gradient(taken.shared)
            last.weight.grad, last.bias.grad = taken.weight, taken.bias
            assert taken.h is not None
            value, grad_h = taken.value, taken.h.view_as(h)
        elif plan.on_gpu:
            logits = plan.last_layer.forward(h)
            log_prob, logits, shared = kernel.both(logits.view(-1, B, logits.shape[1]), target, factor)
            logits = logits.view(plan.rows, -1)
            plan.set_shared_gradient(None if shared is None else shared.view(plan.rows, -1).sum(0))
            weight = (beta, 1.0) if isinstance(beta, Tensor) else (None, beta)
            outcome = Outcome(cuda_products.elbo_terms(log_prob, kl, *weight))
            return outcome, plan.last_layer.backward(logits), plan.grad_kl(beta, kl)
        else:
            logits = product(h, last.weight, last.bias, out=plan.logits)
            log_prob, logits, shared = kernel.both(logits.view(-1, B, logits.shape[1]), target, factor)
            logits = logits.view(plan.rows, -1)
            plan.set_shared_gradient(None if shared is None else shared.view(plan.rows, -1).sum(0))
            value = log_prob.sum(dtype=torch.float64).mul_(factor)
            grad_h = product(logits, last.weight.t(), out=plan.grad_h)
            last.weight.grad = rows_product(logits, h, out=plan.grad_weight).contiguous()
            last.bias.grad = logits.sum(0)
        loss = beta * criterion.kl_term(kl).mean() + value.float()
        return outcome_of(self.sgvb.terms_of(loss, kl)), grad_h, plan.grad_kl(beta, kl)


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


class _Plan:
    """Layers of a VAE for batches of one size.

    On a CPU the plan keeps their memory from step to step.

    Args:
        model: the VAE.
        B: the batch size.
        num_samples: samples of z for each image; None stands for 1.
    """

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

    def kernel(self, family: Likelihood, x: Tensor) -> Kernel:
        """Returns a likelihood's kernel for the output of the last layer."""
        shared, floor = self.model.beside_the_layer()
        D = x.shape[-1]
        name, scalar, shared = family.linear_kernel(self.last.out_features // D, shared)
        if isinstance(shared, Tensor):
            shared = shared.expand(D).contiguous()
        elif shared is not None:
            shared = torch.full((D,), shared, dtype=torch.float32, device=x.device)
        return Kernel(name, scalar, shared, floor)

    def set_shared_gradient(self, grad: Tensor | None) -> None:
        """Set the gradient of the shared logvar, if the model learns one.

        Args:
            grad: (D,), the gradient by the kernel's shared parameter, summed over rows.
        """
        if self.learns_shared:
            assert grad is not None
            self.model.logvar.grad = self.model.family.above_backward(
                self.model.min_variance, self.model.logvar, grad.sum()
            )

    def grad_kl(self, beta: Tensor | float, kl: Tensor) -> Tensor:
        """Returns the gradient by kl of beta times the mean of kl.

        It divides first by datapoints, then by samples, as autograd does.
        """
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
    """Linear layer and activation on a CPU, for a fixed row count.

    The next forward pass overwrites the result of the last.

    Args:
        layer: the weight and bias.
        rows: the number of rows of its input.
        activation: "tanh" or "none".
    """

    def __init__(self, layer: nn.Linear, rows: int, activation: str):
        self.layer, self.activation, self.code = layer, activation, ACTIVATIONS.index(activation)
        self.out = torch.empty(rows, layer.out_features)
        self.grad_x = torch.empty(rows, layer.in_features)
        self.grad_weight = torch.empty_like(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activations for x (rows, in_features)."""
        self.x, self.sparse = x, False
        bias = self.layer.bias
        if self.activation == "none":
            self.value = product(x, self.layer.weight, bias, out=self.out)
        else:
            self.value = product(x, self.layer.weight, out=self.out)
            bias_activation(self.value, bias, self.code)
        return self.value

    def forward_of_images(self, x: Tensor, x_scale: float | None) -> Tensor:
        """Returns the activations for x_scale * x; sparse images are not converted."""
        if not is_sparse(x):
            return self.forward(floating(x, x_scale, self.layer.weight))
        self.x, self.x_scale, self.sparse = x, x_scale, True
        self.value = sparse_linear(x, x_scale, self.layer.weight, self.layer.bias, self.code)
        return self.value

    def backward(self, grad: Tensor, wanted: bool = True) -> Tensor:
        """Set the gradients of weight and bias; return the gradient of x.

        Args:
            grad: the upstream gradient (rows, out_features), which is overwritten.
            wanted: whether the gradient of x is needed; the result has no meaning otherwise.
        """
        weight, bias = self.layer.weight, self.layer.bias
        bias.grad = activation_backward_(self.value, grad, self.code)
        if self.sparse:
            weight.grad = sparse_weight_grad(self.x, self.x_scale, grad)
        else:
            weight.grad = rows_product(grad, self.x, out=self.grad_weight).contiguous()
        return product(grad, weight.t(), out=self.grad_x) if wanted else grad


class _GpuLayer:
    """Linear layer and activation on a GPU, with the methods of `_Layer`.

    It keeps no memory for its results: a CUDA graph does.
    """

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
