"""Files that are whole or absent, and tensors as they go into them: equal tensors, equal bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from torch import Tensor

MODEL = "model.safetensors"  # as a run calls its last epoch's
_REFUSED = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF),
    *(errno.EACCES, errno.EPERM, errno.EISDIR),
}


def replace(path: Path, data: bytes, durably: bool = False) -> Path:
    """Writes or replaces a file, whole or not at all, whatever stops the process; `durably`: or the machine."""
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
    """Forces to the disk which files a folder has, where the file system can."""
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
    """SMB, FUSE and shared folders refuse fsync, of folders or of all: then there is none, and a run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


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
