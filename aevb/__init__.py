"""Variational autoencoders in PyTorch, with fused, exact and reproducible ELBO kernels.

After Kingma & Welling, *Auto-Encoding Variational Bayes* (2013). The ops and `FusedELBO` drop into any PyTorch model.
`VAE` and `Trainer` are the paper's model and algorithm. `aevb.reference` has the ops and `FusedELBO` in plain PyTorch.

* Loss for any model: `FusedELBO`; its recon may be a `LinearLogits`, `LinearOutput` or `GaussianOutput`.
* Samples and KL: `sample_gaussian`, `sample_gaussian_log_ratio`, `gaussian_kl`.
* Log-likelihoods: `bernoulli_log_prob`, `gaussian_log_prob`, `linear_bernoulli_log_prob`; `log_prob`, `linear_log_prob`
  and `sample_likelihood` take any of `likelihoods`.
* Bounds: `elbo`, `importance_weighted_bound`; `free_bits`, `capacity`, `linear_warmup`, `cyclical_warmup`.
* Models and training: `VAE`, `ConvVAE` (both `BaseVAE`), `TrainConfig`, `Trainer`. `load` gives a run's model, and
  `data.load` a data set. `linear` is a layer, `binarize` is dynamic binarization.
* Evaluation: `log_marginal_likelihood`, `diagnostics`, `Evaluation`.
* Exceptions: `NotFiniteError`, `CheckpointError`, `RunFolderError`, and the built-in ones of PyTorch and Python.
* Seeds for datapoints, steps and ranks: `mix_seed`. Versions and instruction sets of this installation: `build_info`.

Packages:

* `aevb.ops`: the fused ops, with their gradients.
* `aevb.likelihoods`: the families p(x|z).
* `aevb.losses`: `FusedELBO`.
* `aevb.models`: `VAE`, `ConvVAE`, `BaseVAE`.
* `aevb.training`: `Trainer`, `TrainConfig`, run folders and checkpoints.
* `aevb.inference`: log p(x), imputation, noise models and latent-space diagnostics.
* `aevb.data`: data sets by name or path.
* `aevb.cli`: the command `aevb`.
* `aevb.checks`: checks and conversions of arguments.
"""

import torch  # noqa: F401  the kernels link against it, so it comes first

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"aevb's kernels could not be loaded ({error}). If this is a checkout of aevb, build them with `pip install .`"
    ) from error

from . import diagnostics, likelihoods, reference
from .bounds import capacity, cyclical_warmup, elbo, free_bits, importance_weighted_bound, linear_warmup
from .inference.marginal_likelihood import log_marginal_likelihood
from .info import build_info
from .likelihoods import GaussianOutput, LinearLogits, LinearOutput
from .losses.elbo import FusedELBO
from .models import VAE, BaseVAE, ConvVAE
from .ops import (
    bernoulli_log_prob,
    binarize,
    gaussian_kl,
    gaussian_log_prob,
    log_prob,
    mix_seed,
    sample_gaussian,
    sample_gaussian_log_ratio,
    sample_likelihood,
)
from .ops.fused_linear import linear_bernoulli_log_prob, linear_log_prob
from .ops.linear import linear
from .training.checkpoint import CheckpointError
from .training.config import TrainConfig
from .training.metrics import Evaluation, NotFiniteError
from .training.run_dir import RunFolderError, load
from .training.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "BaseVAE",
    "CheckpointError",
    "ConvVAE",
    "Evaluation",
    "FusedELBO",
    "GaussianOutput",
    "LinearLogits",
    "LinearOutput",
    "NotFiniteError",
    "RunFolderError",
    "TrainConfig",
    "Trainer",
    "bernoulli_log_prob",
    "binarize",
    "build_info",
    "capacity",
    "cyclical_warmup",
    "diagnostics",
    "elbo",
    "free_bits",
    "gaussian_kl",
    "gaussian_log_prob",
    "importance_weighted_bound",
    "likelihoods",
    "linear",
    "linear_bernoulli_log_prob",
    "linear_log_prob",
    "linear_warmup",
    "load",
    "log_marginal_likelihood",
    "log_prob",
    "mix_seed",
    "reference",
    "sample_gaussian",
    "sample_gaussian_log_ratio",
    "sample_likelihood",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "__doc__", "data"])
