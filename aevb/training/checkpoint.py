"""Checkpoints of a run, in files that are whole or refused.

A checkpoint has the full state that a run needs to resume. It is one safetensors file, without pickle, whose header
has the numbers as JSON and a SHA-256 of the contents. The file is written beside its place, forced to the disk, and
moved there. Two checkpoints are kept, so that a damaged checkpoint has a predecessor.
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
# Names that no other program gives its files.
_NAME = re.compile(r"step-\d{12,}\.safetensors|\.step-\d{12,}\.safetensors\.part")


class CheckpointError(ValueError):
    """Error of a damaged checkpoint.

    Its text is a sentence.
    """


class Checkpoint(NamedTuple):
    """State of a run: tensors, and numbers as JSON has them."""

    tensors: dict[str, Tensor]
    """Tensors by name."""
    numbers: dict[str, Any]
    """JSON values. Floats come back as they were, to the bit."""


def pack(checkpoint: Checkpoint) -> bytes:
    """Returns the bytes of a checkpoint's file."""
    tensors = saveable(checkpoint.tensors)
    numbers = json.dumps(checkpoint.numbers)
    return safetensors(tensors, {"numbers": numbers, "sha256": _digest(tensors, numbers)})


def unpack(data: bytes, where: object) -> Checkpoint:
    """Returns the checkpoint in a file's bytes.

    Args:
        data: the bytes.
        where: the file, which the error's text names.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
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
    """Checkpoints of a run folder, by their step.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path):
        self.path = run / FOLDER

    def write(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, and remove all others except its predecessor.

        Raises:
            OSError: the file cannot be written, or an old file cannot be removed.
        """
        self.path.mkdir(exist_ok=True)
        path = self.path / f"step-{step:012d}.safetensors"
        replace(path, pack(checkpoint), durably=True)
        found = self._newest_first()
        later = found[: found.index(path)]  # damaged checkpoints, not resumed from
        for old in (*later, *found[len(later) + KEPT :]):
            old.unlink(missing_ok=True)
        return path

    def read(self) -> tuple[bytes | None, list[str]]:
        """Returns the bytes of the newest undamaged checkpoint, and newer ones' errors.

        Without any checkpoint, the bytes are None.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
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
        """Returns the files that a run wrote, half-written files too."""
        return [path for path in self.path.glob("*") if _NAME.fullmatch(path.name)]

    def there(self) -> list[Path]:
        """Returns the files that `remove` would remove."""
        return [path for path in self._files() if path.is_symlink() or not path.is_dir()]

    def remove(self) -> None:
        """Remove all checkpoints, and the folder if it is then empty."""
        for path in self.there():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
