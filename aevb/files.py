"""Files that are whole or absent, and tensors as they go into them: equal tensors, equal bytes."""

from __future__ import annotations

import json
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
        sync(path.parent)
    return path


def sync(folder: Path) -> None:
    """Forces to the disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file of what `saveable` gave: the same for the same tensors and metadata."""
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library writes them in an order that it draws
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses tensors that share memory, as those of a layer that is used twice do."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
