"""Build information for `aevb info`, benchmark results and bug reports."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _C


def build_info() -> dict[str, Any]:
    """Returns versions, instruction sets, threads, compiler and CUDA state of this installation.

    Returns:
        A dict with the keys aevb, torch and python (versions), threads and compiler. Its isas is a list of the
        instruction sets built, and isa the instruction set in use. Its cuda is a phrase: whether CUDA kernels were
        built, and why.
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
