"""The drop-in loss."""

from __future__ import annotations

from torch import Tensor, nn

from . import ops


class FusedELBO(nn.Module):
    """The negative evidence lower bound of a VAE with a Bernoulli decoder and a diagonal Gaussian posterior, fused.

    For one datapoint, with L samples z_l of the posterior (Kingma & Welling 2013, eq. 7 and appendices B, C.1)::

        loss = beta * KL(N(mu, exp(logvar)) || N(0, I)) - 1/L * sum_l log p(x | z_l)

    It is called in one of two ways::

        criterion(recon, x, mu, logvar)     # the KL is computed here, in the same autograd node
        criterion(recon, x, kl=kl)          # after z, kl = aevb.sample_gaussian(mu, logvar)

    Shapes. mu's leading dimensions (all but its last), or kl's dimensions, are the batch. x is (*batch, *datapoint) and
    recon (*samples, *batch, *datapoint): everything after the batch is the datapoint, and may be laid out differently
    in the two (recon (B, 784) goes with x (B, 1, 28, 28)). Extra leading dimensions of recon are samples, averaged.

    Args:
        beta: weight of the KL: a number, or a 0-d float32 tensor. Change a tensor in place for a warm-up: a compiled
            model then never recompiles.
        reduction: "mean" (over datapoints, of per-datapoint sums), "sum", or "none" for one value a datapoint.
        from_probs: recon holds probabilities (sigmoid outputs) instead of logits. Their logarithms are clamped at -100
            and the gradient is that of `F.binary_cross_entropy`; with reduction="sum" this is the loss of
            pytorch/examples' VAE.
        x_scale: multiplies x: 1/255 for uint8 pixels, 1 for uint8 in {0, 1}. uint8 targets need it.
        validate_args: check at each call that the targets lie in [0, 1]; it costs a pass over x.

    The result is float32, in nats. recon, mu and logvar may be float32, bfloat16 or float16; x may be soft (in [0, 1]),
    bool, or uint8 with x_scale; the arithmetic is float32.

    Raises:
        ValueError: an unknown reduction, neither or both of (mu, logvar) and kl, targets outside [0, 1] when validated.
        RuntimeError: shapes, dtypes or devices that do not fit.
    """

    _beta: Tensor | float

    def __init__(
        self,
        beta: Tensor | float = 1.0,
        reduction: str = "mean",
        from_probs: bool = False,
        x_scale: float | None = None,
        *,
        validate_args: bool = False,
    ):
        super().__init__()
        if reduction not in ops.REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(map(repr, ops.REDUCTIONS))}")
        self._set_beta(beta)  # not by the property, which torch 2.11 cannot trace here
        self.reduction = reduction
        self.from_probs = from_probs
        self.x_scale = x_scale
        self.validate_args = validate_args

    @property
    def beta(self) -> Tensor | float:
        """The weight of the KL. A tensor moves with the module (`.to(device)`) and is no part of its state_dict."""
        return self._beta

    @beta.setter
    def beta(self, value: Tensor | float) -> None:
        self._set_beta(value)

    def _set_beta(self, value: Tensor | float) -> None:
        if isinstance(value, Tensor) and value.dim() != 0:
            raise ValueError(f"beta has shape {tuple(value.shape)}; expected a number or a 0-d tensor")
        if hasattr(self, "_beta"):
            del self._beta
        if isinstance(value, Tensor):
            self.register_buffer("_beta", value, persistent=False)
        else:
            self._beta = float(value)

    def forward(
        self,
        recon: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
    ) -> Tensor:
        if kl is None:
            if mu is None or logvar is None:
                raise ValueError("FusedELBO needs mu and logvar, or kl=: criterion(recon, x, mu, logvar)")
        elif mu is not None or logvar is not None:
            raise ValueError("FusedELBO got both kl and (mu, logvar); give it one of the two")
        if self.validate_args:
            ops.check_targets(x, self.x_scale)
        return ops.negative_elbo(
            recon, x, mu, logvar, kl, self._beta, ops.REDUCTIONS[self.reduction], self.from_probs, self.x_scale
        )

    def extra_repr(self) -> str:
        beta = f"tensor({self._beta.item()})" if isinstance(self._beta, Tensor) else self._beta
        text = f"beta={beta}, reduction={self.reduction!r}"
        text += ", from_probs=True" if self.from_probs else ""
        return text + (f", x_scale={self.x_scale}" if self.x_scale is not None else "")
