"""A peer of FusedELBO in Triton: the loss and its gradients in one pass over the logits, as people write it.

Like Liger-Kernel's losses it keeps the gradients for an upstream gradient of 1; of another they are multiplied, by a
kernel that looks at it on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.autotune(
    [triton.Config({"BLOCK": block}, num_warps=warps) for block in (1024, 2048, 4096) for warps in (4, 8)],
    key=["n"],
    reset_to_zero=["sums"],  # larger blocks have fewer
)
@triton.jit
def _bernoulli(logits, x, grad, sums, n, scale, BLOCK: tl.constexpr):
    """The sum of a block's -log p(x|z), and scale times its gradient."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    logit = tl.load(logits + at, mask=there, other=0.0).to(tl.float32)
    target = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(logit))
    nll = tl.maximum(logit, 0.0) - logit * target + tl.log(1.0 + e)
    sigmoid = tl.where(logit >= 0, 1.0, e) / (1.0 + e)
    tl.store(grad + at, (sigmoid - target) * scale, mask=there)
    tl.store(sums + block, tl.sum(tl.where(there, nll, 0.0)) * scale)


@triton.jit
def _kl(mu, logvar, grad_mu, grad_logvar, sums, n, scale, BLOCK: tl.constexpr):
    """The sum of a block's KL, and scale times its gradients."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    m = tl.load(mu + at, mask=there, other=0.0).to(tl.float32)
    v = tl.load(logvar + at, mask=there, other=0.0).to(tl.float32)
    variance = tl.exp(v)
    tl.store(grad_mu + at, m * scale, mask=there)
    tl.store(grad_logvar + at, 0.5 * (variance - 1.0) * scale, mask=there)
    tl.store(sums + block, tl.sum(tl.where(there, 0.5 * (m * m + variance - 1.0 - v), 0.0)) * scale)


@triton.jit
def _scale_unless_1(gradient, n, upstream, BLOCK: tl.constexpr):
    factor = tl.load(upstream)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(gradient + at, tl.load(gradient + at, mask=at < n) * factor, mask=at < n)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, x, mu, logvar):
        n, latents, scale = logits.numel(), mu.numel(), 1.0 / mu.shape[0]
        grads = [torch.empty_like(t) for t in (logits, mu, logvar)]
        sums = logits.new_zeros(triton.cdiv(n, 1024), dtype=torch.float32)  # as many as the smallest blocks have
        _bernoulli[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](logits, x, grads[0], sums, n, scale)
        kl_sums = logits.new_empty(triton.cdiv(latents, BLOCK), dtype=torch.float32)
        _kl[(len(kl_sums),)](mu, logvar, grads[1], grads[2], kl_sums, latents, scale, BLOCK)
        ctx.save_for_backward(*grads)
        return sums.sum() + kl_sums.sum()

    @staticmethod
    def backward(ctx, upstream):
        grads = ctx.saved_tensors
        for t in grads:
            _scale_unless_1[(triton.cdiv(t.numel(), BLOCK),)](t, t.numel(), upstream, BLOCK)
        return grads[0], None, grads[1], grads[2]


def loss(logits, x, mu, logvar):
    return _Loss.apply(logits, x, mu, logvar)
