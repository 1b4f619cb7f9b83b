"""Files that are whole or absent, and tensors as they go into them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def replace(path: Path, data: bytes, durably: bool = False) -> Path:
    """Writes or replaces a file, whole or not at all, whatever stops the process; `durably`: or the machine."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            if durably:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durably:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses tensors that share memory, as those of a layer that is used twice do."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
