"""What tests/golden holds of runs: the metrics of short ones, and what a run of another version answers and ends with.

    python tests/golden_runs.py tests/golden/run-55b551f

leaves such a run, killed in its third epoch of four, with its checkpoints. It is made once, by the version that it is
of, and never again.
"""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import aevb
from aevb.cli import main
from aevb.training import pictures
from aevb.training.metrics import Evaluation

# ---- short runs -----------------------------------------------------------------------------------------------------

EPOCHS = 3
OPTIONS = {"hidden_dims": (32,), "latent_dim": 4, "progress": False}
TRAINED = {
    "Bernoulli": {},
    "Gaussian": {"likelihood": "gaussian"},
    "iwae": {"estimator": "iwae", "num_samples": 5},
    "dreg": {"estimator": "dreg", "num_samples": 5},
    "stl": {"estimator": "stl", "num_samples": 2},
    "conv": {"architecture": "conv", "channels": (4, 8)},
    "Adagrad, free bits": {
        **{"optimizer": "adagrad", "learning_rate": 0.02, "schedule": "cosine", "free_bits": 0.5, "warmup_epochs": 2},
    },
}


def draws() -> list[torch.Tensor]:
    """What PyTorch draws for a run, an epoch's order and the first weights: where a version of PyTorch draws other
    numbers, all the rest differs."""
    trainer = aevb.Trainer(aevb.TrainConfig(**OPTIONS))
    return [trainer.order(0), trainer.model.encoder[0].weight.detach()]


def training(name: str) -> Iterator[list[float]]:
    """Of each epoch the averages over its steps and over the test images, in nats."""
    trainer = aevb.Trainer(aevb.TrainConfig(**OPTIONS, **TRAINED[name]))
    for _ in range(EPOCHS):
        yield [*terms(trainer.train_epoch()), *terms(trainer.evaluate())]


def terms(evaluation: Evaluation) -> list[float]:
    """Those that there are: the bound of "iwae" and "dreg" has no log-likelihood."""
    found = (evaluation.elbo, evaluation.log_likelihood, evaluation.kl)
    return [value for value in found if value == value]


# ---- a run of another version ---------------------------------------------------------------------------------------

QUESTIONS = {
    "reconstruct": [],
    "sample": ["--num", "5"],
    "embed": ["--num-samples", "2"],
    "impute": ["--images", "5", "--steps", "10", "--num-samples", "20"],
    "denoise": ["--flip", "0.1", "--images", "5", "--steps", "10", "--num-samples", "20"],
    "manifold": ["--num", "3"],
    "traverse": ["--steps", "3"],
    "interpolate": ["--pairs", "2", "--steps", "3"],
}


def answers(run: Path, out: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What the commands say of a run, by their names; their files go to `out`, and evaluation.json to the run."""
    for command, options in QUESTIONS.items():
        path = out / f"{command}.{'npz' if command == 'embed' else 'npy'}"
        ask(command, str(run), *options, "--out", str(path))
        found = np.load(path)
        arrays = {command: found} if path.suffix == ".npy" else {f"{command} {key}": found[key] for key in found}
        yield from ((name, torch.from_numpy(array)) for name, array in arrays.items())
    for best in ([], ["--best"]):
        ask("evaluate", str(run), "--num-samples", "50", "--no-progress", *best)
        numbers = json.loads((run / "evaluation.json").read_text())
        for name in ("epoch", "elbo", "log_likelihood", "kl", "log_marginal_likelihood"):
            yield " ".join(["evaluate", name, *best]), torch.tensor(numbers[name], dtype=torch.float64)


def ask(*command: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        failed = main(list(command))
    if failed:
        raise RuntimeError(f"aevb {' '.join(command)} failed")


def go_on(run: Path) -> None:
    """Trains a run to its end, without the pictures, which take longer than all else."""
    with mock.patch.object(pictures, "draw", return_value={}):
        aevb.Trainer.resume(run, progress=False).fit()


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, but for the time they took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def leave_run(path: Path) -> None:
    """Trains, and kills this process between two checkpoints of the third epoch."""
    os.chdir(path.parent)  # the run's config.json has its path
    options = {"hidden_dims": (8,), "latent_dim": 2, "batch_size": 50, "epochs": 4, "learning_rate": 0.01}
    options |= {"validation": 0.1, "threads": 1, "checkpoint_seconds": 0.0, "progress": False}
    trainer = aevb.Trainer(aevb.TrainConfig(**options, out=path.name))
    trainer.optimizer.register_step_post_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGKILL) if trainer.step == 70 else None
    )
    trainer.fit()


if __name__ == "__main__":
    leave_run(Path(sys.argv[1]).resolve())
