"""A run to be killed, in a process of its own: for tests/training/test_resume.py."""

from __future__ import annotations

import os
import signal

import aevb
from aevb import files
from aevb.training import pictures

OPTIONS = {"hidden_dims": (12,), "latent_dim": 3, "batch_size": 25, "threads": 1, "checkpoint_seconds": 0.0}


def train(out: str, epochs: int, kill_in: tuple[str, int] | None = None, **changes) -> None:
    """Trains, or goes on with what is in `out`. kill_in: the call of this name, as a checkpoint is written, and the
    how manieth one, in which the process is killed."""
    if kill_in is not None:
        _kill_in(*kill_in)
    pictures.draw = lambda *_: {}  # they take longer than all else
    options = {**OPTIONS, "resume": True, "progress": False, **changes}
    aevb.Trainer(aevb.TrainConfig(out=out, epochs=epochs, **options)).fit()


def _kill_in(name: str, wanted: int) -> None:
    calls = 0

    def killing(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += name in ("fsync", "open") or "step-" in str(args[0])  # other files are neither forced nor of steps
            if calls == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    class Killed:
        """The module os, but for one function."""

        def __getattr__(self, attribute):
            found = getattr(os, attribute)
            return killing(found) if attribute == name else found

    def half_written(path, *args):
        file = open(path, *args)  # noqa: SIM115  the caller closes it
        nonlocal calls
        if "step-" in str(path):
            calls += 1
            if calls == wanted:
                write = file.write

                def write_half(data):
                    write(data[: len(data) // 2])
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

                return _With(file, write_half)
        return file

    if name == "write":
        files.open = half_written
    else:
        files.os = Killed()


class _With:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
