"""A run that takes the place of another, and is killed meanwhile: for tests/training/test_overwrite.py."""

from __future__ import annotations

import os
import signal

import aevb
from aevb import files
from aevb.training import pictures, run_files

CALLS = ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")
OPTIONS = {"hidden_dims": (6,), "latent_dim": 2, "threads": 1, "progress": False, "validation": 0.1}


def train(out: str, kill_at: int = 0, **changes) -> None:
    """Trains. kill_at: the how manieth call to the system, of those that write or remove files until the first step,
    in which the process is killed."""
    pictures.draw = lambda *_: {}  # they take longer than all else
    trainer = aevb.Trainer(aevb.TrainConfig(out=out, **{"epochs": 1, **OPTIONS, **changes}))
    calls = _Killing(kill_at)
    files.os = run_files.os = calls

    def begun(*_):
        calls.at = 0

    trainer.optimizer.register_step_pre_hook(begun)
    trainer.fit()


class _Killing:
    """The module os, in one of whose calls the process is killed."""

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def __getattr__(self, name):
        found = getattr(os, name)
        return self.before(found) if name in CALLS else found

    def before(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


def train_for_long(out: str, **changes) -> None:
    """Trains until it is killed."""
    aevb.Trainer(aevb.TrainConfig(out=out, epochs=1_000_000, **{**OPTIONS, **changes})).fit()
