"""From a cold start to a trained model: `aevb train` and scripts that train the same model, each as a command.

The clock starts when the command is given, so that imports, compilation and the reading of the files count. After every
epoch each of them evaluates the test ELBO, one sample of z an image. Each run has a seed of its own: how many epochs
the target takes is partly chance, the same for all, so that it is the median of some runs that counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import cases
from .measure import Json, has_jax, quartiles

TARGET_ELBO = -103.0  # nats
SCRIPTS = Path(__file__).parent / "scripts"
PROVIDERS = {  # what a run is called, and its script; none for `aevb train`
    "aevb train": None,
    "a JAX and Optax script": "vae_jax.py",
    "a lean PyTorch script": "vae_pytorch_lean.py",
    "a script in the style of pytorch/examples": "vae_pytorch.py",
}
TARGETS = {"a script in the style of pytorch/examples": 2.0, "a JAX and Optax script": 1.0}  # times aevb's wall time


def run(script: str | None, data: str, epochs: int, seed: int, device: str = "cpu") -> list[Json]:
    """The seconds since the command was given, and the test ELBO, after each epoch. On a GPU, whose time is dear, until
    the target is reached."""
    options = ["--epochs", str(epochs), "--seed", str(seed), "--device", device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cases.THREADS)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = (
            [sys.executable, "-m", "aevb", "train", "--data", data, "--out", str(out), "--no-progress", *options]
            if script is None
            else [sys.executable, str(SCRIPTS / script), data, *options]
        )
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            lines = _printed(process) if script else _followed(process, out / "metrics.jsonl")
            points = []
            for line in lines:
                points.append({"seconds": time.perf_counter() - start, "test_elbo": json.loads(line)["test_elbo"]})
                if device != "cpu" and reached(points):
                    process.kill()
                    return points
        if process.returncode or len(points) != epochs:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode} after {len(points)} epochs")
    return points


def _printed(process: subprocess.Popen) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def _followed(process: subprocess.Popen, file: Path) -> Iterator[str]:
    """The lines of a file that a process writes, as they come."""
    done = 0
    while True:
        ended = process.poll() is not None
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        for line in lines[done:]:
            if line.endswith("\n"):
                done += 1
                yield line
        if ended:
            return
        time.sleep(0.02)


def reached(points: list[Json]) -> float | None:
    """The seconds after which the test ELBO was first that of the target."""
    return next((point["seconds"] for point in points if point["test_elbo"] >= TARGET_ELBO), None)


def learn(
    data: str, runs: int, epochs: int, device: str = "cpu", save: Callable[[Json], None] = lambda found: None
) -> Json:
    """Each provider's runs, by turns, and when they reach the target; `save` is called with what there is after each
    run."""
    data = str(Path(data).resolve())  # "mnist" is a folder here, and not the data set of that name
    names = [name for name, script in PROVIDERS.items() if script != "vae_jax.py" or has_jax()]
    found: dict[str, list[list[Json]]] = {name: [] for name in names}
    about: Json = {"target_elbo": TARGET_ELBO, "targets": TARGETS, "epochs": epochs}
    for seed in range(runs):
        turn = seed % len(names)
        for name in (*names[turn:], *names[:turn]):
            print(f"  seed {seed}, {name} ...", flush=True)
            found[name].append(run(PROVIDERS[name], data, epochs, seed, device))
            save(about | {"providers": {name: _summary(points) for name, points in found.items() if points}})
    return about | {"providers": {name: _summary(points) for name, points in found.items()}}


def _summary(runs: list[list[Json]]) -> Json:
    seconds = [reached(points) for points in runs]
    whole = [s for s in seconds if s is not None]
    return {
        "runs": runs,
        "reached": len(whole),
        "seconds": quartiles(whole) if whole else None,  # of those that reached it
    }
