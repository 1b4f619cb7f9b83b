"""What this installation is: for `aevb info`, benchmark results and bug reports."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _C


def build_info() -> dict[str, Any]:
    """Versions, the instruction sets built and in use, threads, compiler, and whether CUDA kernels were built, and why.

    Keys: aevb, torch, python (versions); isas (list), isa (the one in use); threads; compiler; cuda (a phrase).
    """
    from . import __version__

    built = _C.build_info()
    return {
        "aevb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isas": built["isas"].split(", "),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "compiler": f"GCC {built['compiler']}",
        "cuda": built["cuda"],
    }
