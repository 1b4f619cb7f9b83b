"""The command line: `aevb train`, `aevb resume`, `aevb evaluate`, `aevb info`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from .config import TrainConfig
from .evaluation import evaluate as evaluate_model
from .info import build_info
from .runs import EVALUATION, METRICS, MODEL, PICTURES
from .train import Trainer

DESCRIPTION = (
    "Variational autoencoders in PyTorch, with fused ELBO kernels. Example: `aevb train` trains one on the handwritten "
    "digits that ship with the package; `aevb train --help` lists the options."
)


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a variational autoencoder; leaves config, metrics, checkpoint and pictures in a run folder.

    Example: aevb train --data path/to/mnist --epochs 20 --out runs/mnist
    """
    _train(Trainer(config))


def resume(
    run: tyro.conf.Positional[str],
    /,
    epochs: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> None:
    """Go on with a run that was stopped or killed, to the bit as if it had not been; or train it for more epochs.

    Example: aevb resume runs/mnist --epochs 200

    Args:
        run: the run folder.
        epochs: passes over the training images in all, if not as many as it began with.
        device: where to train, if not where it began.
        threads: threads to train with.
        progress: the progress bar; --no-progress for none.
    """
    changes = {"epochs": epochs, "device": device, "threads": threads}
    changes = {name: value for name, value in changes.items() if value is not None}
    _train(Trainer.resume(run, **changes, progress=progress))


def _train(trainer: Trainer) -> None:
    if trainer.processes.is_first:
        print(f"data      {trainer.dataset.description}", flush=True)
    metrics = trainer.fit()
    if not trainer.processes.is_first:
        return
    path = trainer.folder.path
    print(f"model     {path / MODEL}, with its history in {METRICS}")
    print(
        f"test ELBO {metrics['test_elbo']:.2f} nats per datapoint "
        f"(log-likelihood {metrics['test_log_likelihood']:.2f}, KL {metrics['test_kl']:.2f})"
    )
    print(f"pictures  {', '.join(str(path / name) for name in PICTURES)}")


def evaluate(
    run: tyro.conf.Positional[str],
    /,
    num_samples: int = 5000,
    images: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Evaluate a run on its test images: ELBO, log p(x), and what the posterior uses; leaves evaluation.json there.

    Example: aevb evaluate runs/digits

    Args:
        run: the run folder.
        num_samples: samples of z for each image, for log p(x).
        images: only the first so many test images.
        seed: all noise follows from it.
        progress: the progress bar; --no-progress for none.
    """
    trainer = Trainer.load(run)
    found = evaluate_model(trainer, num_samples, images, seed, progress)
    trainer.folder.write(EVALUATION, json.dumps(found.numbers, indent=2).encode() + b"\n")
    print(found)
    print(f"\nall of it  {trainer.folder.path / EVALUATION}")


def info() -> None:
    """Print versions, instruction sets built and in use, threads, compiler, and whether CUDA kernels were built.

    Example: aevb info
    """
    about = build_info()
    rows = {
        **{name: about[name] for name in ("aevb", "torch", "python")},
        "CPU kernels": f"{about['isa']} in use; built: {', '.join(about['isas'])}",
        "CUDA kernels": about["cuda"],
        "threads": about["threads"],
        "compiler": about["compiler"],
    }
    for name, value in rows.items():
        print(f"{name:13}{value}")


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 0, 1 after an error (a sentence on stderr), 130 after Ctrl-C."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "resume": resume, "evaluate": evaluate, "info": info},
            prog="aevb",
            description=DESCRIPTION,
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except KeyboardInterrupt as interrupt:
        print(f"\naevb: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"aevb: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = str(error).splitlines() or ["no more is known"]
    expected = isinstance(error, ValueError | OSError | FloatingPointError | ImportError)
    return lines[0] if expected else f"{type(error).__name__}: {lines[0]}"
