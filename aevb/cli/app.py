"""The command line: `aevb train`, and what a run can be asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from .. import __version__
from ..inference.imputation import Method
from ..info import build_info
from ..training.config import TrainConfig
from ..training.run_dir import BEST, EVALUATION, METRICS, MODEL, PICTURES
from ..training.trainer import Trainer
from . import answers
from .answers import Part
from .evaluation import evaluate as evaluate_model

DESCRIPTION = (
    "Variational autoencoders in PyTorch, with fused ELBO kernels. Example: `aevb train` trains one on the handwritten "
    "digits that ship with the package; `aevb train --help` lists the options. The other commands ask a run: "
    "`aevb sample runs/digits`, `aevb report runs/digits`."
)
Run = tyro.conf.Positional[str]


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a variational autoencoder; leaves config, metrics, checkpoint and pictures in a run folder.

    Example: aevb train --data path/to/mnist --epochs 20 --out runs/mnist
    """
    _train(Trainer(config))


def resume(
    run: tyro.conf.Positional[str],
    /,
    epochs: int | None = None,
    patience: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    invert: bool = False,
    progress: bool = True,
) -> None:
    """Go on with a run that was stopped or killed, to the bit as if it had not been; or train it for more epochs.

    Example: aevb resume runs/mnist --epochs 200

    Args:
        run: the run folder.
        epochs: passes over the training images in all, if not as many as it began with.
        patience: epochs without a better ELBO of the validation images, if not as many as it began with.
        device: where to train, if not where it began.
        threads: threads to train with.
        invert: show images inverted in the pictures, 0 as white, if not as it began.
        progress: the progress bar; --no-progress for none.
    """
    changes: dict[str, Any] = {"epochs": epochs, "patience": patience, "device": device, "threads": threads}
    changes["invert"] = invert or None
    changes = {name: value for name, value in changes.items() if value is not None}
    _train(Trainer.resume(run, **changes, progress=progress))


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


def evaluate(
    run: Run,
    /,
    num_samples: int = 5000,
    images: int | None = None,
    seed: int = 0,
    best: bool = False,
    progress: bool = True,
) -> None:
    """Evaluate a run on its test images: ELBO, log p(x), and what the posterior uses; leaves evaluation.json there.

    Example: aevb evaluate runs/digits

    Args:
        run: the run folder.
        num_samples: samples of z for each image, for log p(x).
        images: only the first so many test images.
        seed: all noise follows from it.
        best: the model of the best epoch by the validation images, not the last one's.
        progress: the progress bar; --no-progress for none.
    """
    trainer = Trainer.load(run, best=best)
    found = evaluate_model(trainer, num_samples, images, seed, progress)
    trainer.folder.write(EVALUATION, json.dumps(found.numbers, indent=2).encode() + b"\n")
    print(found)
    print(f"\nall of it  {trainer.folder.path / EVALUATION}")


def reconstruct(
    run: Run,
    /,
    part: Part | None = None,
    data: str | None = None,
    images: int = 40,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Show images and their reconstructions, at the mean of the posterior; leaves reconstructions.png.

    Example: aevb reconstruct runs/digits --save-array

    Args:
        run: the run folder.
        part: of the data set; by default test.
        data: other images of the same shape: a .npy file, or a data set as `aevb train` takes it.
        images: how many the picture shows.
        save_array: write the reconstructions of all images too: reconstructions.npy, (N, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    print(
        answers.reconstruct(
            run, out, invert=invert, best=best, part=part, data=data, images=images, save_array=save_array
        )
    )


def sample(
    run: Run,
    /,
    num: int = 100,
    seed: int = 0,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Draw images from the model, z from the prior; leaves samples.png in the run folder.

    Example: aevb sample runs/digits --num 50 --seed 1

    Args:
        run: the run folder.
        num: how many.
        seed: the draws follow from it.
        save_array: write the images too: samples.npy, (num, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    print(answers.sample(run, out, invert=invert, best=best, num=num, seed=seed, save_array=save_array))


def embed(
    run: Run,
    /,
    part: Part | None = None,
    data: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Write the posterior of each image: latent.npz with mu, logvar and labels, and latent.png, a map of the means.

    Example: aevb embed runs/digits --part train --out features.npy

    Args:
        run: the run folder.
        part: of the data set; by default test.
        data: other images of the same shape: a .npy file, or a data set as `aevb train` takes it.
        num_samples: draws of each posterior, for an array z, (num_samples, N, dimensions); none by default.
        seed: these draws follow from it.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .npz file, a .npy file (mu alone), a .png file (the map), or a folder, in place of the run folder.
    """
    print(answers.embed(run, out, best=best, part=part, data=data, num_samples=num_samples, seed=seed))


def impute(
    run: Run,
    /,
    mask: str = "lower",
    missing: float = 0.5,
    data: str | None = None,
    images: int = 100,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 500,
    seed: int = 0,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Restore missing pixels from the others, by the posterior that these give; leaves impute.png in the run folder.

    On test images, whose pixels the command hides itself, it says how good that is: against the binarized images where
    the run binarizes grey ones. On yours it writes impute.npy.

    Example: aevb impute runs/digits --mask random --missing 0.7

    Args:
        run: the run folder.
        mask: what is missing: "lower", "upper", "left", "right" (halves), "random", or a .npy file, of one mask or one
            an image, with 1 or True where a pixel is observed.
        missing: the fraction of the pixels that "random" hides.
        data: a .npy file of images to restore; what they hold where pixels are missing is not used.
        images: how many test images, without data.
        method: "gradient" refines each posterior by Adam and weighs its samples; "gibbs" goes on from there by
            Metropolis-within-Gibbs.
        steps: of Adam.
        num_samples: samples of z for each image.
        seed: the mask and all samples follow from it.
        save_array: write the restored images too: impute.npy, (N, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    found = answers.impute(
        run,
        out,
        data=data,
        mask=mask,
        missing=missing,
        images=images,
        method=method,
        steps=steps,
        num_samples=num_samples,
        seed=seed,
        invert=invert,
        best=best,
        save_array=save_array,
    )
    print(found)


def denoise(
    run: Run,
    /,
    flip: float | None = None,
    sigma: float | None = None,
    data: str | None = None,
    mask: str | None = None,
    images: int = 100,
    method: Method = "gradient",
    steps: int = 50,
    num_samples: int = 500,
    seed: int = 0,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Restore clean images from noisy ones, by the posterior of the clean image; leaves denoise.png in the run folder.

    The noise must be known: --flip or --sigma. On test images, to which the command adds the noise itself, it says how
    good that is: against the binarized images where the run binarizes grey ones. On yours it writes denoise.npy.

    Example: aevb denoise runs/digits --flip 0.2

    Args:
        run: the run folder.
        flip: the probability with which each bit was flipped.
        sigma: the standard deviation of Gaussian noise on pixels in [0, 1].
        data: a .npy file of noisy images to restore.
        mask: what is missing as well: see `aevb impute --help`.
        images: how many test images, without data.
        method: "gradient" refines each posterior by Adam and weighs its samples; "gibbs" goes on from there by
            Metropolis-within-Gibbs.
        steps: of Adam.
        num_samples: samples of z for each image.
        seed: the noise and all samples follow from it.
        save_array: write the restored images too: denoise.npy, (N, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    found = answers.denoise(
        run,
        out,
        data=data,
        mask=mask,
        flip=flip,
        sigma=sigma,
        images=images,
        method=method,
        steps=steps,
        num_samples=num_samples,
        seed=seed,
        invert=invert,
        best=best,
        save_array=save_array,
    )
    print(found)


def manifold(
    run: Run,
    /,
    num: int = 20,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Show the manifold of a run with 2 latent dimensions, z over a grid of the prior's quantiles; leaves manifold.png.

    Example: aevb manifold runs/mnist2 --num 25

    Args:
        run: the run folder.
        num: images in a row, and rows.
        save_array: write the images too: manifold.npy, (num, num, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    print(answers.manifold(run, out, invert=invert, best=best, num=num, save_array=save_array))


def traverse(
    run: Run,
    /,
    image: int = 0,
    dims: tuple[int, ...] | None = None,
    num_dims: int = 10,
    steps: int = 11,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Show what each dimension of z does: it goes through the quantiles of its prior, the others stay at an image's
    posterior mean; leaves traverse.png in the run folder.

    Example: aevb traverse runs/digits --image 3 --dims 0 5 7

    Args:
        run: the run folder.
        image: the number of a test image.
        dims: which dimensions; by default those of the largest KL, the most informative first.
        num_dims: how many of them, without dims.
        steps: values of each.
        save_array: write the images too: traverse.npy, (dims, steps, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    print(
        answers.traverse(
            run,
            out,
            invert=invert,
            best=best,
            image=image,
            dims=dims,
            num_dims=num_dims,
            steps=steps,
            save_array=save_array,
        )
    )


def interpolate(
    run: Run,
    /,
    pairs: int | None = None,
    steps: int = 9,
    spherical: bool = False,
    seed: int = 0,
    save_array: bool = False,
    invert: bool = False,
    best: bool = False,
    out: str | None = None,
) -> None:
    """Show the way from one test image to another, between their posterior means; leaves interpolate.png.

    Linear, since on a line the prior's density never falls below that of the less dense of its ends; --spherical keeps
    the length of z.

    Example: aevb interpolate runs/digits --pairs 5 --seed 2

    Args:
        run: the run folder.
        pairs: how many pairs; by default 8, or as many as there are.
        steps: images of each, the reconstructions of both ends included.
        spherical: along a great circle.
        seed: which test images.
        save_array: write the images too: interpolate.npy, (pairs, steps, pixels).
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .png or .npy file, written alone, or a folder, in place of the run folder.
    """
    print(
        answers.interpolate(
            run,
            out,
            invert=invert,
            best=best,
            pairs=pairs,
            steps=steps,
            spherical=spherical,
            seed=seed,
            save_array=save_array,
        )
    )


def report(run: Run, /, seed: int = 0, invert: bool = False, best: bool = False, out: str | None = None) -> None:
    """Write one page about a run: options, training curves, images, the posterior, numbers; leaves report.html.

    The page needs nothing else, and can be sent as it is. With `aevb evaluate` before, it has log p(x) too.

    Example: aevb report runs/digits

    Args:
        run: the run folder.
        seed: the samples follow from it.
        invert: show the images inverted, 0 as white.
        best: the model of the best epoch by the validation images, not the last one's.
        out: a .html file, or a folder, in place of the run folder.
    """
    print(answers.report(run, out, invert=invert, best=best, seed=seed))


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


COMMANDS = (
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


# What other programs call our options, too different to be suggested by their spelling.
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
    """Runs a command. Returns its exit status: 0, 1 after an error (a sentence on stderr), 130 after Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    if list(args[:1]) in (["--version"], ["-V"]):
        print(f"aevb {__version__}")
        return 0
    for name in (arg.partition("=")[0].replace("_", "-") for arg in args):
        if name in OTHERS_NAMES:
            print(f"aevb: there is no option {name}; expected {OTHERS_NAMES[name]}", file=sys.stderr)
            return 2
    try:
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: command for command in COMMANDS},
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
