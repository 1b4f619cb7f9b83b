"""Checkpoints: all that a run needs to go on, in files that are whole or refused, without pickle.

A checkpoint is one safetensors file, whose header has the numbers as JSON and a SHA-256 of everything in it. It is
written beside its place, forced to the disk, and moved there; two are kept, so that a damaged one has one before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import replace, safetensors, saveable

FOLDER = "checkpoints"
KEPT = 2
# As no other program names its own.
_NAME = re.compile(r"step-\d{12,}\.safetensors|\.step-\d{12,}\.safetensors\.part")


class CheckpointError(ValueError):
    """A checkpoint is damaged. Its text is a sentence."""


class Checkpoint(NamedTuple):
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    """What JSON holds. Floats come back as they were, to the bit."""


def pack(checkpoint: Checkpoint) -> bytes:
    """The bytes of a checkpoint's file."""
    tensors = saveable(checkpoint.tensors)
    numbers = json.dumps(checkpoint.numbers)
    return safetensors(tensors, {"numbers": numbers, "sha256": _digest(tensors, numbers)})


def unpack(data: bytes, where: object) -> Checkpoint:
    """The checkpoint in a file's bytes. Raises CheckpointError, with the file's name, where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} is truncated or damaged ({error})") from error
    if header.get("sha256") != _digest(tensors, header.get("numbers", "")):
        raise CheckpointError(f"{where} is damaged: its contents do not have the SHA-256 that it was written with")
    return Checkpoint(tensors, json.loads(header["numbers"]))


def _digest(tensors: Mapping[str, Tensor], numbers: str) -> str:
    digest = hashlib.sha256(numbers.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of a run folder, by their step."""

    def __init__(self, run: Path):
        self.path = run / FOLDER

    def write(self, step: int, checkpoint: Checkpoint) -> Path:
        """Writes one, and removes those before the one before it. Raises OSError."""
        self.path.mkdir(exist_ok=True)
        path = self.path / f"step-{step:012d}.safetensors"
        replace(path, pack(checkpoint), durably=True)
        found = self._newest_first()
        later = found[: found.index(path)]  # damaged ones, that this run went on without
        for old in (*later, *found[len(later) + KEPT :]):
            old.unlink(missing_ok=True)
        return path

    def read(self) -> tuple[bytes | None, list[str]]:
        """The bytes of the newest that is whole, and what is wrong with those after it; None where there is none.

        Raises CheckpointError where there are some, and all are damaged.
        """
        wrong: list[str] = []
        for path in self._newest_first():
            try:
                data = path.read_bytes()
                unpack(data, path)
            except CheckpointError as error:
                wrong.append(str(error))
            except OSError as error:
                wrong.append(f"{path} cannot be read: {error.strerror or error}")
            else:
                return data, wrong
        if wrong:
            raise CheckpointError(f"no checkpoint can be read: {'; '.join(wrong)}")
        return None, wrong

    def _newest_first(self) -> list[Path]:
        return sorted((path for path in self._files() if path.suffix != ".part"), reverse=True)

    def _files(self) -> list[Path]:
        """Those that a run wrote, half written ones too."""
        return [path for path in self.path.glob("*") if _NAME.fullmatch(path.name)]

    def there(self) -> list[Path]:
        """The files that `remove` would remove."""
        return [path for path in self._files() if path.is_symlink() or not path.is_dir()]

    def remove(self) -> None:
        """Removes them all, and the folder where it is empty then."""
        for path in self.there():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
