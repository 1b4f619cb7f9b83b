"""The trainer: the AEVB algorithm on a data set, and the folder that a run leaves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._torch import uncompiled
from ..checks.arguments import takes_plain_values
from ..checks.errors import warn
from ..data import Dataset, LoadedImages, Targets, from_torch, is_torch_data, load
from ..data.fingerprint import check_same_data
from ..inference.protocols import check_takes_weight
from ..inference.standardised import prior_of
from ..losses.elbo import FusedELBO
from ..models import VAE, BaseVAE, ConvVAE
from ..models.own import GIVEN, build, check_model, load_weights, name_of
from ..models.own import NAME as OWN_CLASS
from ..ops import mix_seed
from .config import TrainConfig
from .distributed import SingleProcess, is_launched, local_rank, processes
from .loop import HeldOut, TrainingLoop, current_device, evaluating
from .metrics import Evaluation
from .optimizers import OPTIMIZERS
from .run import Run, deterministic, threads
from .run_dir import BEST, CONFIG, MODEL, RunFolder, data_of, saved_at
from .state import TrainState

# Multiply-adds of a forward pass below which threads cost more in waiting for each other than they save: far more where
# another program wants their cores.
SHARED_WORK = 20_000_000


def _of_state(name: str, doc: str) -> Any:
    return property(
        lambda self: getattr(self.state, name), lambda self, value: setattr(self.state, name, value), doc=doc
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:1'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this PyTorch finds no CUDA GPU; expected 'cpu'")
    if device.type == "cuda" and device.index is None and is_launched():
        device = torch.device("cuda", local_rank())
    return device


class Trainer:
    """Trains a VAE by the AEVB algorithm (Kingma & Welling 2013, algorithm 1), with any estimator of `FusedELBO`.

    `fit` does all of it and leaves a run folder. For a loop of your own there are `train_epoch` and `evaluate`, which
    touch no disk::

        trainer = aevb.Trainer(aevb.TrainConfig(epochs=20, out="runs/mine"))
        print(trainer.fit())                  # the last line of metrics.jsonl
        trainer.model.sample(16)

    The noise of an image, its bits and its samples of z, is a function of the config's seed, the epoch and the image,
    and the order of an epoch one of the seed and the epoch. Several processes, which torchrun starts, share each batch;
    but for the rounding of sums they do what one does.

    Attributes: config, dataset; model, optimizer and criterion, which may be changed between epochs (a parameter's
    .grad is good until the next step; while the config's warm-up lasts, it sets the criterion's beta); test_x, the test
    images as the model is evaluated on them; epoch and step, how many were done; best, the epoch with the best ELBO of
    the validation images and that ELBO, from `fit` on where there are any; folder, the run's, from `fit` on.

    Args:
        config: the options.
        model: by default a new one of the config's kind and sizes, which give way to this one's. It is trained in
            place. Any `torch.nn.Module` will do that has encode(x) -> (mu, logvar), each (B, latent_dim), and
            log_prob(x, z) -> log p(x|z), (*samples, B), in nats; x is (B, data_dim), floating, in [0, 1]: bits, unless
            the config's binarize is "none". Its prior is N(0, I), or that of its prior_parameters, (prior_mu,
            prior_logvar), each (latent_dim,), which may be parameters of it. It is trained by any estimator, evaluated,
            saved and resumed; there are no pictures of it.
        dataset: by default the config's `data`, which gives way to this one's name, loaded. A `Dataset`; a data set of
            `torch.utils.data`, which is read into memory; or a mapping with "train", "test" and perhaps "validation"
            (see `aevb.data.from_torch`), where "train" may be a DataLoader, whose order cannot be resumed to the bit.

    Raises:
        ValueError, FileNotFoundError: bad data; a model whose data_dim is not the data's.
        TypeError: a model without encode or log_prob.
    """

    folder: RunFolder

    def __init__(
        self, config: TrainConfig | None = None, *, model: Any | None = None, dataset: Dataset | Any | None = None
    ):
        config = config or TrainConfig()
        if dataset is not None:
            dataset = _given_dataset(dataset, config)
            config = dataclasses.replace(config, data=dataset.name)
        if model is not None:
            model = uncompiled(model)
            check_model(model)
            config = dataclasses.replace(config, **_sizes_of(model, config))
        self.device = _device(config.device)
        self.processes: SingleProcess = processes(self.device)
        self.follows_from_config = model is None and dataset is None
        self.dataset = dataset or load(
            config.data,
            validation=config.validation,
            split_seed=config.split_seed,
            missing=config.missing,
            mask=config.mask,
        )
        if config.validation > 0 and self.dataset.validation_images is None:
            raise ValueError(
                f"validation is {config.validation}, but the data set given has no validation images; expected "
                "Dataset(..., validation_images=...)"
            )
        if config.patience is not None and self.dataset.validation_images is None:
            raise ValueError(
                f"patience is {config.patience}, but {self.dataset.name} has no validation images; expected a "
                "validation above 0, such as 0.1"
            )
        init_seed = int(mix_seed(config.seed, 0))
        model = (
            model if model is not None else _new_model(config, self.dataset, torch.Generator().manual_seed(init_seed))
        )
        if getattr(model, "data_dim", self.dataset.data_dim) != self.dataset.data_dim:
            raise ValueError(
                f"the model's data_dim is {model.data_dim}; expected {self.dataset.data_dim}, "
                f"the pixels of an image of {self.dataset.name}"
            )
        if self.dataset.observed:
            check_takes_weight(model)
        if prior_of(model) is None and config.prior == "learned":
            raise ValueError(
                f"prior is 'learned', but {type(model).__name__} has the prior N(0, I); expected a model whose "
                "prior_parameters are (prior_mu, prior_logvar)"
            )
        model.to(self.device)
        observed = self.dataset.observed.get("train")
        inputs = Targets(self.dataset.train_images, config.binarize, self.dataset.max_value, self.device, observed)
        criterion = FusedELBO(
            beta=config.beta,
            x_scale=inputs.x_scale,
            estimator=config.estimator,
            num_samples=None if config.num_samples == 1 else config.num_samples,
            free_bits=config.free_bits,
            capacity=config.capacity,
            **_likelihood_of(model),
        )
        rate: float | Tensor = config.learning_rate
        if self.device.type == "cuda" and (config.schedule != "constant" or config.learning_rate_warmup > 0):
            rate = torch.tensor(rate, device=self.device)  # which a captured step reads anew each time
        optimizer = OPTIMIZERS[config.optimizer](model.parameters(), rate, self.device)
        self._say_what_is_lacking(model)
        self.state = TrainState(model, optimizer, criterion, self.device)
        self.loop = TrainingLoop(config, self.dataset, inputs, self.state, self.processes)

    def _say_what_is_lacking(self, model: Any) -> None:
        if isinstance(self.dataset.train_images, LoadedImages):
            if self.processes.size > 1:
                raise ValueError(
                    "the training images are a DataLoader, which does not know of the other processes; expected a "
                    "Dataset, or one process"
                )
            warn(
                "the training images come from a DataLoader, in its own order and batches: a run that goes on with "
                "resume sees others than one that was not stopped, and batch_size is not used"
            )
        if not isinstance(model, BaseVAE):
            warn(
                f"{type(model).__name__} has encode and log_prob alone: it is trained, evaluated and saved, but there "
                "are no pictures, and no command can ask the run; an aevb.BaseVAE has both"
            )

    model = _of_state("model", "The VAE that is trained.")
    optimizer = _of_state("optimizer", "What updates its weights.")
    criterion = _of_state("criterion", "The loss, a `FusedELBO`.")
    epoch = _of_state("epoch", "How many epochs are done.")
    step = _of_state("step", "How many steps are done.")
    best = _of_state("best", "The epoch with the best validation ELBO, and that ELBO.")

    @property
    def config(self) -> TrainConfig:
        """The options."""
        return self.loop.config

    @config.setter
    def config(self, config: TrainConfig) -> None:
        self.loop.config = config

    @property
    def held_out(self) -> dict[str, HeldOut]:
        """The images that are not trained on, by the name of their part."""
        return self.loop.held_out

    @property
    def test_x(self) -> Tensor:
        """The test images as the model is evaluated on them."""
        test = self.held_out["test"]
        return test.x(torch.arange(test.count, device=self.device))

    @classmethod
    @takes_plain_values
    def load(
        cls,
        run: str | PathLike[str],
        device: str | None = None,
        best: bool = False,
        *,
        model: Any | None = None,
        dataset: Dataset | Any | None = None,
    ) -> Trainer:
        """Returns the trainer of a finished run, with its model: to evaluate, sample, or look at.

        `epoch` and `step` are the model's.

        Args:
            run: the folder.
            device: by default that of the training, or the CPU where it is not here.
            best: take the model of the epoch with the best ELBO of the validation images, not the last epoch's.
            model: a model of one's own that was given to the trainer; the run's weights are put into it.
            dataset: a data set of one's own that was given to the trainer.

        Raises:
            FileNotFoundError: there is no run, or its data are gone.
            ValueError: a damaged or foreign file, or data that differ from those that the run began with.
        """
        folder = RunFolder.open(run)
        config = folder.config()
        path = folder.path / (BEST if best else MODEL)
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder.path} has no {path.name}: no validation images said which epoch is the best; expected a run "
                "that was trained with --validation 0.1, say, or the last epoch's model, without --best"
            )
        if device is None:
            device = config.device if config.device == "cpu" or torch.cuda.is_available() else "cpu"
        _check_given(config, model)
        is_saved = model is None and OWN_CLASS.fullmatch(config.architecture) is None
        if is_saved:
            model = BaseVAE.load(path)
        with _as_config_says(folder):
            trainer = cls(dataclasses.replace(config, device=device), model=model, dataset=dataset)
        if not is_saved:
            load_weights(trainer.model, path)
        check_same_data(data_of(path), trainer.dataset)
        trainer.folder = folder
        trainer.epoch, trainer.step = saved_at(path)
        return trainer

    @classmethod
    def resume(
        cls,
        run: str | PathLike[str],
        *,
        model: Any | None = None,
        dataset: Dataset | Any | None = None,
        **changes: Any,
    ) -> Trainer:
        """Returns the trainer of a stopped run, whose `fit` goes on with it.

        Args:
            run: the folder.
            model: a model of one's own that was given to the trainer; its weights become the checkpoint's.
            dataset: a data set of one's own that was given to the trainer.
            **changes: options that may change: epochs (in all), patience, device, threads, checkpoint_seconds, invert,
                tensorboard, progress.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: a damaged config.json.
        """
        folder = RunFolder.open(run, needs_model=False)
        config = dataclasses.replace(folder.config(), **changes, out=str(folder.path), overwrite=False, resume=True)
        _check_given(config, model)
        with _as_config_says(folder):
            return cls(config, model=model, dataset=dataset)

    # ---- a whole run ----

    def fit(self) -> dict[str, float]:
        """Trains for `epochs` epochs and returns the last one's metrics.

        The run folder gets config.json at the start; after each epoch the model, model.safetensors (see `VAE.load`),
        and a line of metrics.jsonl, and best.safetensors where the validation images' ELBO is the best so far; every
        `checkpoint_seconds` a checkpoint; at the end the pictures. A line of metrics holds epoch, step, the averages
        over the epoch, as the weights move (train_elbo, train_log_likelihood, train_kl; for "iwae" and "dreg"
        train_elbo is their bound, and there is no train_log_likelihood), the same of the test images, and of the
        validation images where there are any, in nats per datapoint, learning_rate, and seconds (since the start).

        A run that was stopped, at any moment, goes on with `resume`: its weights and metrics will be those of one that
        was not, to the bit, but for `seconds`.

        Raises:
            RunFolderError: the folder holds a run already, or files that no run wrote; another process trains there; it
                cannot be written to. A run that was to be overwritten is kept until this one's first files are written.
            CheckpointError: all checkpoints of a run to be resumed are damaged.
            NotFiniteError, a FloatingPointError: something is not finite; the text says what went first, and the last
                good checkpoint is kept.
            KeyboardInterrupt: after Ctrl-C, with a checkpoint and the pictures in the folder; its text says where.
        """
        run = Run(self.loop, self._draw, self._how_to_go_on)
        self.folder = run.folder
        try:
            with threads(self._num_threads()), deterministic(self.config.deterministic), current_device(self.device):
                metrics = run.train()
            if self.processes.is_first:
                self._draw(self.folder)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(run.after_interrupt()) from interrupt
        finally:
            run.close()
            self.loop.release()
        return metrics

    def _how_to_go_on(self, path: Path) -> str:
        return f"`aevb resume {path}`" if self.follows_from_config else "aevb.Trainer.resume(...).fit()"

    # ---- a loop of one's own ----

    def train_epoch(self, report: Callable[[int, Evaluation], None] = lambda images, averages: None) -> Evaluation:
        """Takes one pass over the training images and returns its averages.

        They are in nats per datapoint, as the weights moved; for "iwae" and "dreg" the elbo is their bound. Each
        datapoint has the same weight, in a smaller last batch too.

        Args:
            report: called every few steps with the number of images since its last call, and their averages.

        Raises:
            NotFiniteError: the loss is not finite; it names the step and the term.
        """
        for _ in self.loop.epoch(report):
            pass
        return self.loop.last_epoch

    @takes_plain_values
    def order(self, epoch: int) -> Tensor:
        """Returns the training images' numbers in the order of an epoch, on the device."""
        return self.loop.order(epoch)

    @takes_plain_values
    def noise_seeds(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns the seeds of an epoch's batches and of its samples: 0-d int64 tensors on the device."""
        return self.loop.noise_seeds(epoch)

    @takes_plain_values
    def evaluate(self, images: int | None = None, part: str = "test") -> Evaluation:
        """Returns the ELBO of images that are not trained on, with one sample of z each.

        It is a function of the weights and the config's seed. The model is in eval mode meanwhile.

        Args:
            images: how many, the first ones; by default all.
            part: "test" or "validation".

        Raises:
            ValueError: a number of images below 1, or a part that the data lack.
        """
        if images is not None and images < 1:
            raise ValueError(f"images is {images}; expected at least 1")
        if part not in self.held_out:
            raise ValueError(
                f"part is {part!r}; expected {' or '.join(map(repr, self.held_out))}, which {self.dataset.name} has"
            )
        return self.loop.evaluate(part, images)

    def _num_threads(self) -> int:
        if self.config.threads is not None:
            return self.config.threads
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        work = weights * self.config.batch_size * self.config.num_samples
        shared = work >= SHARED_WORK or isinstance(self.model, ConvVAE)  # whose weights are used again and again
        return torch.get_num_threads() if shared else 1

    def _draw(self, folder: RunFolder) -> None:
        from .pictures import draw

        if not isinstance(self.model, BaseVAE):
            return
        # A copy, since moving the model would move what a captured step writes to.
        model = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).cpu()
        try:
            with evaluating(model):
                pictures = draw(model, self.dataset, self.config.seed, self.config.invert, self.config.binarize)
            for name, png in pictures.items():
                folder.write(name, png)
        except Exception as error:  # whatever it is, the model is trained and saved
            warnings.warn(
                f"{folder.path} has no pictures, or some are of before: {type(error).__name__}: {error}. The model is "
                "whole",
                stacklevel=2,
            )


@contextlib.contextmanager
def _as_config_says(folder: RunFolder) -> Iterator[None]:
    """Errors within say that it was a run's config.json that asked for what is wrong."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError) or CONFIG in str(error):
            raise
        raise type(error)(f"{error} (as {folder.path / CONFIG} has it)") from error


def _check_given(config: TrainConfig, model: Any | None) -> None:
    """Raises ValueError for a run of a model that was handed over, and is not given again."""
    if model is None and GIVEN.fullmatch(config.architecture):
        raise ValueError(
            f"the run is of a model that was given to the trainer, {config.architecture.removesuffix('()')}; expected "
            "model=, another one that is made alike, for the run's weights"
        )


def _given_dataset(dataset: Any, config: TrainConfig) -> Dataset:
    """Returns the `Dataset` of data that were handed over.

    Raises:
        TypeError: data of another kind.
        ValueError: options about missing values, of which a `Dataset` has masks.
    """
    if is_torch_data(dataset):
        name = config.data if config.data != TrainConfig.data else "data"
        return from_torch(dataset, name, config.validation, config.split_seed, config.missing, config.mask)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; expected an aevb.data.Dataset, a data set of "
            'torch.utils.data (TensorDataset(x), say), or {"train": ..., "test": ...} of such'
        )
    for name in ("missing", "mask"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"{name} is {value!r}, and the data set given is a Dataset already; expected "
                'Dataset(..., observed={"train": mask, "test": mask})'
            )
    return dataset


def _likelihood_of(model: Any) -> dict[str, Any]:
    """Returns the criterion's options that say the likelihood: a model of one's own has log_prob in its place."""
    if not isinstance(model, BaseVAE):
        return {}
    return {"likelihood": model.likelihood, "sigmoid_means": getattr(model.family, "sigmoid_means", False)}


def _new_model(config: TrainConfig, dataset: Dataset, generator: torch.Generator) -> Any:
    options: dict[str, Any] = {
        "generator": generator,
        "likelihood": config.likelihood,
        "variance": config.variance,
        "min_variance": dataset.x_scale**2 / 12 if dataset.max_value > 1 else 1 / (12 * 255**2),
        "mask_input": config.mask_input,
    }
    if config.prior != "standard":  # which a class of one's own need not know, nor mean by its own `prior`
        options["prior"] = config.prior
    if OWN_CLASS.fullmatch(config.architecture):
        sizes = {"data_dim": dataset.data_dim, "image_shape": dataset.image_shape, "latent_dim": config.latent_dim}
        sizes |= {"hidden_dims": config.hidden_dims, "channels": config.channels}
        with torch.random.fork_rng(devices=[]):  # its layers draw their weights from PyTorch's own generator
            torch.manual_seed(generator.initial_seed())
            return build(config.architecture, {**sizes, **options})
    if config.architecture == "conv":
        return ConvVAE(dataset.image_shape, config.channels, config.latent_dim, **options)
    return VAE(dataset.data_dim, config.hidden_dims, config.latent_dim, **options)


def _sizes_of(model: Any, config: TrainConfig) -> dict[str, Any]:
    """Returns the options that say which model this is."""
    if not isinstance(model, BaseVAE):
        return {"architecture": name_of(model)}
    found = {"latent_dim": model.latent_dim, "likelihood": model.likelihood, "variance": model.variance}
    found |= {"mask_input": model.mask_input, "prior": model.prior}
    if model.likelihood != config.likelihood:
        found["binarize"] = "auto"
    if type(model) is ConvVAE:
        return {**found, "architecture": "conv", "channels": model.channels}
    found["hidden_dims"] = getattr(model, "hidden_dims", config.hidden_dims)
    return {**found, "architecture": "mlp" if type(model) is VAE else name_of(model)}
