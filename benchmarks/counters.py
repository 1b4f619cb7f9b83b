"""Instructions that a call executes on the calling thread, counted by the processor, where Linux lets us ask."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable

_SYSCALL = {"x86_64": 298, "aarch64": 241}
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403
_HARDWARE, _INSTRUCTIONS = 0, 1
_DISABLED, _EXCLUDE_KERNEL, _EXCLUDE_HV = 1 << 0, 1 << 5, 1 << 6


def instructions(call: Callable[[], object]) -> int | None:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        return None
    size = 128
    attributes = struct.pack(
        "<IIQQQQQ", _HARDWARE, size, _INSTRUCTIONS, 0, 0, 0, _DISABLED | _EXCLUDE_KERNEL | _EXCLUDE_HV
    )
    buffer = ctypes.create_string_buffer(attributes.ljust(size, b"\0"), size)
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(number, buffer, 0, -1, -1, 0)  # this thread, any processor
    if file < 0:
        return None
    try:
        libc.ioctl(file, _RESET, 0)
        libc.ioctl(file, _ENABLE, 0)
        call()
        libc.ioctl(file, _DISABLE, 0)
        return struct.unpack("<Q", os.read(file, 8))[0]
    finally:
        os.close(file)
