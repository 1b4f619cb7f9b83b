"""The trainer: the AEVB algorithm, and the folder it leaves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..bounds import cyclical_warmup, linear_warmup
from ..checks.arguments import takes_plain_values
from ..data import Dataset, MappedImages, Targets, batches, epoch_order, load
from ..data.fingerprint import check_same_data
from ..losses.elbo import ESTIMATORS, FusedELBO
from ..models import VAE, BaseVAE, ConvVAE
from ..ops import mix_seed, sample_gaussian
from ..ops.linear import floating
from ..ops.matmul import has_bf16
from .checkpoint import Checkpoint
from .config import TrainConfig
from .distributed import Alone, Several, is_launched, local_rank, processes
from .fitting import Run, deterministic, threads
from .metrics import Evaluation, Ledger, NotFiniteError
from .nonfinite import UPDATE, Finding, broken_weight, first_not_finite
from .optimizers import OPTIMIZERS, Schedule, load_optimizer_state, optimizer_state
from .run_dir import BEST, CONFIG, MODEL, RunFolder, data_of, saved_at
from .step import AutogradStep, GraphStep, made_of, training_step

CHECK_EVERY = 20  # steps between two looks at the loss, for the bar and for what is not finite
EVALUATION_BATCH = 1000
# Multiply-adds of a forward pass below which threads cost more in waiting for each other than they save: far more where
# another program wants their cores.
SHARED_WORK = 20_000_000


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


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, as streams, events and graphs want it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class HeldOut:
    """Images that are not trained on. Their bits and their noise have one seed, so that epochs can be compared."""

    def __init__(self, images: Tensor | MappedImages, targets: Targets, seed: int):
        self.images, self.targets, self.count = images, targets, len(images)
        self.seed = torch.tensor(seed, device=targets.device)

    def x(self, index: Tensor) -> Tensor:
        """As the model is evaluated on them: (B, D), bool, or floating in [0, 1]."""
        x = self.targets(index, self.seed)
        return x if x.dtype == torch.bool else floating(x, self.targets.x_scale, torch.empty(0))

    def seeds(self, index: Tensor) -> Tensor:
        return mix_seed(self.seed, index)

    def batches(self, count: int, processes: Alone) -> Iterator[Tensor]:
        """The first `count` images, or a process's part of them. Those on the disk come as they lie there, and their
        memory is given back."""
        if not isinstance(self.images, MappedImages):
            index = processes.part(torch.arange(count, device=self.targets.device))
            yield from index.split(EVALUATION_BATCH) if len(index) else ()
            return
        order = self.images.file_order()
        index = processes.part(order[order < count])
        for batch in index.split(EVALUATION_BATCH) if len(index) else ():
            yield batch.to(self.targets.device)
            self.images.release_rows(batch)


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
            place.
        dataset: by default the config's `data`, which gives way to this one's name, loaded.

    Raises:
        ValueError, FileNotFoundError: bad data; a model whose data_dim is not the data's.
    """

    folder: RunFolder

    def __init__(
        self, config: TrainConfig | None = None, *, model: BaseVAE | None = None, dataset: Dataset | None = None
    ):
        config = config or TrainConfig()
        if dataset is not None:
            config = dataclasses.replace(config, data=dataset.name)
        if model is not None:
            config = dataclasses.replace(config, **_sizes_of(model, config))
        self.config = config
        self.device = _device(config.device)
        self.processes: Alone = processes(self.device)
        self.follows_from_config = model is None and dataset is None
        self.dataset = dataset or load(config.data, validation=config.validation, split_seed=config.split_seed)
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
        seeds = mix_seed(config.seed, torch.arange(5)).tolist()
        init_seed, self._order_seed, self._noise_seed, test_seed, validation_seed = seeds
        self.model = model or _new_model(config, self.dataset, torch.Generator().manual_seed(init_seed))
        if self.model.data_dim != self.dataset.data_dim:
            raise ValueError(
                f"the model's data_dim is {self.model.data_dim}; expected {self.dataset.data_dim}, "
                f"the pixels of an image of {self.dataset.name}"
            )
        self.model.to(self.device)
        self._schedule = Schedule(config.schedule, self._steps_of(config.epochs), config.learning_rate_warmup)
        rate: float | Tensor = config.learning_rate
        if self.device.type == "cuda" and not self._schedule.is_constant:
            rate = torch.tensor(rate, device=self.device)  # which a captured step reads anew each time
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), rate, self.device)
        self._targets = self._targets_of(self.dataset.train_images)
        self.criterion = FusedELBO(
            beta=config.beta,
            x_scale=self._targets.x_scale,
            estimator=config.estimator,
            num_samples=None if config.num_samples == 1 else config.num_samples,
            free_bits=config.free_bits,
            capacity=config.capacity,
            likelihood=self.model.likelihood,
            sigmoid_means=getattr(self.model.family, "sigmoid_means", False),
        )
        self._step: AutogradStep | GraphStep | None = None
        self._step_made_of: tuple = ()
        self.step = 0
        self.epoch = 0
        self._ledger = self._new_ledger()
        self.best: dict[str, Any] = {}
        self.held_out = {"test": self._held_out(self.dataset.test_images, test_seed)}
        if self.dataset.validation_images is not None:
            self.held_out["validation"] = self._held_out(self.dataset.validation_images, validation_seed)

    def schedule_until(self, epoch: int) -> None:
        """The learning rate's schedule ends with this epoch."""
        self._schedule.steps = self._steps_of(epoch)

    def _targets_of(self, images: Tensor | MappedImages) -> Targets:
        return Targets(images, self.config.binarize, self.dataset.max_value, self.device)

    def _held_out(self, images: Tensor | MappedImages, seed: int) -> HeldOut:
        return HeldOut(images, self._targets_of(images), seed)

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
        dataset: Dataset | None = None,
    ) -> Trainer:
        """The trainer of a run that is done, with the model it saved: to evaluate, sample, or look at; on the device
        that it was trained on, or the CPU where that is not here, or on another. `epoch` and `step` are the model's.
        `best`: the model of the epoch with the best ELBO of the validation images, instead of the last epoch's. A data
        set of one's own is to be given again.

        Raises FileNotFoundError: there is no run, or its data are gone. ValueError: a damaged or foreign file; data
        that are others than those that the run began with.
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
        model = BaseVAE.load(path)
        with _as_config_says(folder):
            trainer = cls(dataclasses.replace(config, device=device), model=model, dataset=dataset)
        check_same_data(data_of(path), trainer.dataset)
        trainer.folder = folder
        trainer.epoch, trainer.step = saved_at(path)
        return trainer

    @classmethod
    def resume(
        cls,
        run: str | PathLike[str],
        *,
        model: BaseVAE | None = None,
        dataset: Dataset | None = None,
        **changes: Any,
    ) -> Trainer:
        """The trainer of a run that was stopped, whose `fit` goes on with it. `changes` are options that may be others
        than those it began with: epochs (in all), patience, device, threads, checkpoint_seconds, invert, tensorboard,
        progress.
        A model or data set of one's own is to be given again; the model's weights will be the checkpoint's.

        Raises FileNotFoundError: there is no run. ValueError: a damaged config.json.
        """
        folder = RunFolder.open(run, needs_model=False)
        config = dataclasses.replace(folder.config(), **changes, out=str(folder.path), overwrite=False, resume=True)
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
        run = Run(self)
        self.folder = run.folder
        try:
            with threads(self._num_threads()), deterministic(self.config.deterministic), _current(self.device):
                metrics = run.train()
            if self.processes.is_first:
                self._draw(self.folder)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(run.after_interrupt()) from interrupt
        finally:
            run.close()
            if isinstance(self.processes, Several):
                self._step = None  # it holds on to the group of processes, which is to end before they do
        return metrics

    def train_epoch(self, report: Callable[[int, Evaluation], None] = lambda images, averages: None) -> Evaluation:
        """One pass over the training images; its averages, in nats per datapoint, as the weights moved. For "iwae" and
        "dreg" the elbo is their bound.

        Each datapoint has the same weight, those of a smaller last batch too. Every few steps calls
        ``report(images done since the last call, averages of those)``.

        Raises NotFiniteError, naming the step and the term, where the loss is not finite.
        """
        for _ in self._train_epoch(report):
            pass
        return self._last_epoch

    def _train_epoch(
        self, report: Callable[[int, Evaluation], None], asked: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """The steps of an epoch that are left; yields after each look at the losses, which there is every few steps
        and where it is asked for."""
        if self._steps_done == 0:
            self._ledger = self._new_ledger()  # of the criterion as it is now
        batch_seed, noise_seed = self.noise_seeds(self.epoch)
        with _current(self.device):
            take_step = self._training_step()
            for index in self._batches_left():
                self._take(take_step, index, batch_seed, noise_seed)
                last = self._steps_done == self._steps_of(1)
                if self.step % CHECK_EVERY == 0 or last or asked():
                    for images, averages in self._ledger.read(wait=last):
                        report(images, averages)
                    yield
        self._step_made_of = made_of(self.model, self.criterion, self.optimizer)  # the first step made Adam's state
        self._last_epoch = self._ledger.average
        self._ledger = self._new_ledger()
        self._steps_done = 0
        self.epoch += 1

    def _batches_left(self) -> Iterator[Tensor]:
        """The images of the steps that the epoch has left."""
        size = self.config.batch_size
        left = self.order(self.epoch)[self._steps_done * size :]
        return batches(self.dataset.train_images, left, size) if len(left) else iter(())

    def _take(self, take_step: Callable, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> None:
        if self.config.warmup_epochs > 0:
            self.criterion.beta = self._beta()
        self._schedule.set(self.optimizer, self.step)
        outcome = take_step(index, batch_seed, noise_seed)
        self.step += 1
        self._steps_done += 1
        self._ledger.add(self.step, len(self.processes.part(index)), outcome.numbers)

    _steps_done = 0  # of the epoch
    _last_epoch: Evaluation

    def _new_ledger(self, totals: tuple[float, float, int] = (0.0, 0.0, 0)) -> Ledger:
        is_bound = ESTIMATORS[self.criterion.estimator].importance_weighted
        constant = 0.0 if is_bound else self.criterion.family.constant(self.dataset.data_dim)
        return Ledger(self.processes, is_bound, totals, constant)

    def _steps_of(self, epochs: int) -> int:
        return epochs * math.ceil(len(self.dataset.train_images) / self.config.batch_size)

    def _training_step(self) -> AutogradStep | GraphStep:
        """A step of model, criterion and optimizer as they are now: between epochs any may be changed."""
        parts = (self.model, self.criterion, self.optimizer)
        bf16 = self.config.precision == "bf16"
        if self._step is None and bf16 and not has_bf16(self.device):
            warnings.warn(
                "precision is 'bf16', for which this processor has no instructions (AVX512-BF16 or AMX; a GPU from "
                "Ampere on): training works, but is slower than in float32",
                stacklevel=4,
            )
        if self._step is None or made_of(*parts) != self._step_made_of:
            config = self.config
            self._step = training_step(*parts, self._targets, config.batch_size, bf16, config.clip_norm, self.processes)
            self._step_made_of = made_of(*parts)
        return self._step

    @takes_plain_values
    def order(self, epoch: int) -> Tensor:
        """The training images' numbers in the order of an epoch, on the device."""
        return epoch_order(self.dataset.train_images, int(mix_seed(self._order_seed, epoch))).to(self.device)

    @takes_plain_values
    def noise_seeds(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The seeds of an epoch's batches and of its samples: 0-d int64 tensors on the device."""
        seeds = mix_seed(self._noise_seed, torch.tensor([2 * epoch, 2 * epoch + 1]))
        batches, samples = seeds.to(self.device).unbind()
        return batches, samples

    @takes_plain_values
    @torch.no_grad()
    def evaluate(self, images: int | None = None, part: str = "test") -> Evaluation:
        """The ELBO of the test images (or of `part` "validation"), or of the first so many, one sample of z each: a
        function of the weights and the config's seed. The model is in eval mode meanwhile.

        Raises ValueError: a number of images below 1; a part that there is not.
        """
        if images is not None and images < 1:
            raise ValueError(f"images is {images}; expected at least 1")
        if part not in self.held_out:
            raise ValueError(
                f"part is {part!r}; expected {' or '.join(map(repr, self.held_out))}, which {self.dataset.name} has"
            )
        held_out = self.held_out[part]
        count = held_out.count if images is None else min(images, held_out.count)
        sums = torch.zeros(2, dtype=torch.float64)
        with _current(self.device), _evaluating(self.model):
            for batch in held_out.batches(count, self.processes):
                x = held_out.x(batch)
                z, kl = sample_gaussian(*self.model.encode(x), seed=held_out.seeds(batch))
                log_prob = self.model.log_prob(x, z)
                sums += torch.stack([log_prob.sum(dtype=torch.float64), kl.sum(dtype=torch.float64)]).cpu()
        log_likelihood, kl_sum = self.processes.sum(sums).tolist()
        return Evaluation((log_likelihood - kl_sum) / count, log_likelihood / count, kl_sum / count)

    def _beta(self) -> float:
        """The weight of the KL in the next step."""
        config = self.config
        steps = self._steps_of(config.warmup_epochs)
        if config.warmup_cycles == 1:
            return linear_warmup(self.step, steps, end=config.beta)
        return cyclical_warmup(self.step, steps, cycles=config.warmup_cycles, end=config.beta)

    def _num_threads(self) -> int:
        if self.config.threads is not None:
            return self.config.threads
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        work = weights * self.config.batch_size * self.config.num_samples
        shared = work >= SHARED_WORK or isinstance(self.model, ConvVAE)  # whose weights are used again and again
        return torch.get_num_threads() if shared else 1

    def _draw(self, folder: RunFolder) -> None:
        from .pictures import draw

        # A copy, since moving the model would move what a captured step writes to.
        model = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).cpu()
        try:
            with _evaluating(model):
                pictures = draw(model, self.dataset, self.config.seed, self.config.invert, self.config.binarize)
            for name, png in pictures.items():
                folder.write(name, png)
        except Exception as error:  # whatever it is, the model is trained and saved
            warnings.warn(
                f"{folder.path} has no pictures, or some are of before: {type(error).__name__}: {error}. The model is "
                "whole",
                stacklevel=2,
            )

    # ---- the state that a checkpoint has ----

    def state(self) -> Checkpoint:
        """All that the rest of the run depends on, between two steps whose losses were read."""
        tensors, rest = optimizer_state(self.optimizer)
        return Checkpoint(
            {
                **{f"model.{name}": t for name, t in self.model.state_dict().items()},
                **{f"optimizer.{name}": t for name, t in tensors.items()},
                **{f"rng.{name}": t for name, t in _rng_states(self.device).items()},
            },
            {
                "epoch": self.epoch,
                "step": self.step,
                "steps_done": self._steps_done,  # of the epoch
                "totals": self._ledger.totals,
                "best": self.best,
                "optimizer": rest,
            },
        )

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Puts back what `state` gave, PyTorch's own generators included, which a model with dropout draws from. Raises
        ValueError where it is another model's."""
        tensors, numbers = checkpoint
        try:
            self.model.load_state_dict(_under("model.", tensors))
            load_optimizer_state(self.optimizer, _under("optimizer.", tensors), numbers["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the checkpoint is of another model or optimizer: {error}") from error
        self.epoch, self.step, self._steps_done = (numbers[key] for key in ("epoch", "step", "steps_done"))
        self._ledger = self._new_ledger(tuple(numbers["totals"]))
        self.best = dict(numbers["best"])
        states = _under("rng.", tensors)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def weights_are_finite(self) -> bool:
        """Whether all weights are; the same answer in all processes."""
        wrong = sum((~p.isfinite()).any() for p in self.model.parameters())
        return not float(self.processes.sum(torch.as_tensor(wrong, dtype=torch.float64)))

    def replay(self, until: int) -> Finding | None:
        """Takes the steps from the present state on again, one by one, up to the step `until`: what was first not
        finite, with the weights left as they were before that. None where all is finite this time."""
        while self.step < until:
            batch_seed, noise_seed = self.noise_seeds(self.epoch)
            take_step = self._training_step()
            for index in self._batches_left():
                before = [p.detach().clone() for p in self.model.parameters()]
                self._take(take_step, index, batch_seed, noise_seed)
                try:
                    for _ in self._ledger.read(wait=True):
                        pass
                    finite = self.weights_are_finite()
                except NotFiniteError:
                    finite = False
                if not finite:
                    broken = broken_weight(self.model)
                    self.step -= 1
                    with torch.no_grad():
                        for p, value in zip(self.model.parameters(), before, strict=True):
                            p.copy_(value)
                    found = self._explain(index, batch_seed, noise_seed)
                    update = found.stage == UPDATE and broken is not None
                    return Finding(UPDATE, f"{broken} {found.text}") if update else found
                if self.step >= until:
                    return None
            self._steps_done, self._ledger = 0, self._new_ledger()
            self.epoch += 1
        return None

    def _explain(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Finding:
        parts = (self.model, self.criterion, self.optimizer, self._targets, self._targets.x_scale)
        step = AutogradStep(*parts, self.config.precision == "bf16")
        part = self.processes.part(index)
        part = part if len(part) else index[:1]
        found = first_not_finite(step, step.batch(part, batch_seed), part, step.noise_seeds(noise_seed, part))
        return min(self.processes.gather(found))

    def explain_held_out(self, part: str) -> Finding | None:
        """What is first not finite where the images of a part that is held out are evaluated."""
        held_out = self.held_out[part]
        criterion = FusedELBO(likelihood=self.model.likelihood, sigmoid_means=self.criterion.sigmoid_means)
        step = AutogradStep(self.model, criterion, self.optimizer, held_out.targets, None)
        for index in held_out.batches(held_out.count, Alone(self.device)):
            x, seeds = held_out.x(index), held_out.seeds(index)
            with torch.no_grad():
                loss, _ = step.loss(x, seeds)
            if not loss.isfinite():
                return first_not_finite(step, x, index, seeds, part)
        return None


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


@contextlib.contextmanager
def _as_config_says(folder: RunFolder) -> Iterator[None]:
    """Errors within say that it was a run's config.json that asked for what is wrong."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if type(error) not in (ValueError, FileNotFoundError) or CONFIG in str(error):
            raise
        raise type(error)(f"{error} (as {folder.path / CONFIG} has it)") from error


@contextlib.contextmanager
def _evaluating(model: BaseVAE) -> Iterator[None]:
    """The model is in eval mode within."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _new_model(config: TrainConfig, dataset: Dataset, generator: torch.Generator) -> BaseVAE:
    options: dict[str, Any] = {
        "generator": generator,
        "likelihood": config.likelihood,
        "variance": config.variance,
        "min_variance": dataset.x_scale**2 / 12 if dataset.max_value > 1 else 1 / (12 * 255**2),
    }
    if config.architecture == "conv":
        return ConvVAE(dataset.image_shape, config.channels, config.latent_dim, **options)
    return VAE(dataset.data_dim, config.hidden_dims, config.latent_dim, **options)


def _sizes_of(model: BaseVAE, config: TrainConfig) -> dict[str, Any]:
    """The options that say which model it is."""
    found = {"latent_dim": model.latent_dim, "likelihood": model.likelihood, "variance": model.variance}
    if model.likelihood != config.likelihood:
        found["binarize"] = "auto"
    if isinstance(model, ConvVAE):
        return {**found, "architecture": "conv", "channels": model.channels}
    return {**found, "architecture": "mlp", "hidden_dims": getattr(model, "hidden_dims", config.hidden_dims)}
