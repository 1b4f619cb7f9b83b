"""The command line: `aevb train`, and the questions to a trained run.

A command is a function, whose parameters and docstring are its options and help, and its name in `COMMANDS`. The main
function prints the answer that it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from .. import __version__
from ..info import build_info
from ..training.config import TrainConfig
from ..training.run_dir import BEST, METRICS, MODEL, PICTURES
from ..training.trainer import Trainer
from .evaluation import evaluate
from .latent import embed, interpolate, manifold, reconstruct, sample, traverse
from .options import Flat, ResumeOptions, RunOptions
from .report import report
from .restore import denoise, impute

DESCRIPTION = (
    "Variational autoencoders in PyTorch, with fused ELBO kernels. Example: `aevb train` trains one on the handwritten "
    "digits that ship with the package; `aevb train --help` lists the options. The other commands ask a run: "
    "`aevb sample runs/digits`, `aevb report runs/digits`."
)


def train(config: Flat[TrainConfig]) -> None:
    """Train a variational autoencoder.

    Leaves config, metrics, checkpoint and pictures in a run folder.

    Example: aevb train --data path/to/mnist --epochs 20 --out runs/mnist
    """
    _train(Trainer(config))


def resume(run: Flat[RunOptions], options: Flat[ResumeOptions]) -> None:
    """Go on with a run, or train it for more epochs.

    A run that was stopped or killed goes on to the bit as if it had not been.

    Example: aevb resume runs/mnist --epochs 200
    """
    _train(Trainer.resume(run.run, **options.changes()))


def _train(trainer: Trainer) -> None:
    if trainer.processes.is_first:
        print(f"data      {trainer.dataset.description}", flush=True)
    metrics = trainer.fit()
    if not trainer.processes.is_first:
        return
    path = trainer.folder.path
    if trainer.epoch < trainer.config.epochs:
        print(f"stopped   after epoch {trainer.epoch}: {BEST} is the model of epoch {trainer.best['epoch']}, the best")
    print(f"model     {path / MODEL}, with its history in {METRICS}")
    print(
        f"test ELBO {metrics['test_elbo']:.2f} nats per datapoint "
        f"(log-likelihood {metrics['test_log_likelihood']:.2f}, KL {metrics['test_kl']:.2f})"
    )
    if drawn := [str(path / name) for name in PICTURES if (path / name).exists()]:
        print(f"pictures  {', '.join(drawn)}")


def info() -> None:
    """Print versions and the build of the kernels.

    These are versions, instruction sets built and in use, threads, compiler, and whether CUDA kernels were built.

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


COMMANDS: tuple[Callable[..., Any], ...] = (
    train,
    resume,
    evaluate,
    reconstruct,
    sample,
    embed,
    denoise,
    impute,
    manifold,
    traverse,
    interpolate,
    report,
    info,
)


# Names of our options in other programs, too different to be suggested by their spelling.
OTHERS_NAMES = {
    **dict.fromkeys(("--lr", "--lr-rate"), "--learning-rate"),
    **dict.fromkeys(("--bs", "--batch", "--bsz"), "--batch-size"),
    **dict.fromkeys(("--z-dim", "--zdim", "--latent", "--latent-size", "--latent-dims", "--n-latent"), "--latent-dim"),
    **dict.fromkeys(("--num-epochs", "--n-epochs", "--max-epochs", "--nepochs"), "--epochs"),
    **dict.fromkeys(("--hidden", "--hidden-dim", "--hidden-size", "--n-hidden"), "--hidden-dims"),
    **dict.fromkeys(("--kl-weight", "--kld-weight"), "--beta"),
    **dict.fromkeys(("--gpu", "--cuda", "--use-cuda"), "--device cuda"),
    **dict.fromkeys(("--output", "--output-dir", "--outdir", "--save-dir", "--logdir"), "--out"),
    **dict.fromkeys(("--dataset", "--data-path", "--data-dir", "--input"), "--data"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The command and its options; by default the process's own.

    Returns:
        The exit status: 0, 1 after an error (a sentence on stderr), 2 for a wrong option, 130 after Ctrl-C.
    """
    args = sys.argv[1:] if args is None else args
    if list(args[:1]) in (["--version"], ["-V"]):
        print(f"aevb {__version__}")
        return 0
    for name in (arg.partition("=")[0].replace("_", "-") for arg in args):
        if name in OTHERS_NAMES:
            print(f"aevb: there is no option {name}; expected {OTHERS_NAMES[name]}", file=sys.stderr)
            return 2
    try:
        answer = tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in COMMANDS},
            prog="aevb",
            description=DESCRIPTION,
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if answer is not None:
            print(answer)
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
