"""Atomic file writes, and safetensors bytes that depend on the tensors alone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from torch import Tensor

MODEL = "model.safetensors"  # model of a run's last epoch
_REFUSED = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF),
    *(errno.EACCES, errno.EPERM, errno.EISDIR),
}


def replace(path: Path, data: bytes, durably: bool = False) -> Path:
    """Writes or replaces a file atomically.

    The file is whole or absent if the process is stopped at any time.

    Args:
        path: The file; it is written next to its place first.
        data: Its content.
        durably: Guard against a stop of the machine too, by fsync of the file and its folder.

    Returns:
        The path.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            if durably:
                file.flush()
                sync_file(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durably:
        sync(path.parent)
    return path


def sync(folder: Path) -> None:
    """Forces a folder's entries to the disk, where the file system can."""
    with _unless_refused():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(file: IO[bytes]) -> None:
    """Forces a file to the disk, where the file system can."""
    with _unless_refused():
        os.fsync(file.fileno())


@contextlib.contextmanager
def _unless_refused() -> Iterator[None]:
    """Ignores refusals of fsync by the file system.

    SMB, FUSE and shared folders refuse fsync, of folders or of all files. A run goes on without it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file's bytes, equal for equal tensors and metadata.

    Args:
        tensors: Tensors from `saveable`, by name.
        metadata: Texts of the file's header.
    """
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library's order is random
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # 8-byte alignment of the tensors
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns contiguous CPU copies of the tensors.

    safetensors refuses tensors that share memory, such as the weights of a layer used twice.
    """
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
