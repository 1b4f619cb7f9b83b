"""The trainer: the AEVB algorithm, and the folder it leaves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from .bounds import cyclical_warmup, linear_warmup
from .data import BINARIZATIONS, Dataset, Targets, batches, epoch_order, load
from .loss import ESTIMATORS, FusedELBO
from .models import VAE
from .ops import mix_seed, sample_gaussian
from .products import has_bf16
from .runs import CONFIG, MODEL, RunFolder
from .steps import AutogradStep, GraphStep, made_of, training_step

CHECK_EVERY = 20  # steps between two looks at the loss, for the bar and for what is not finite
EVALUATION_BATCH = 1000
# Multiply-adds of a forward pass below which threads cost more in waiting for each other than they save: far more where
# another program wants their cores.
SHARED_WORK = 20_000_000


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a training run: of the command line, the Python API and config.json.

    Raises ValueError, with a sentence, for a value out of range.
    """

    data: str = "digits"
    """What to train on: "digits", which ships with aevb, or a path: a directory with MNIST's four IDX files
    (train-images-idx3-ubyte[.gz] and so on), or one IDX file of images."""
    out: str | None = None
    """The run folder. By default runs/<data>, or runs/<data>-2, -3, ... where a run is there already."""
    overwrite: bool = False
    """Delete the run that the folder holds. Without this a run that is there is kept, and no new one starts."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 100
    """Images a step (the paper's M)."""
    hidden_dims: tuple[int, ...] = (500,)
    """Units of the encoder's tanh layers, from the image on; the decoder has the same in reverse."""
    latent_dim: int = 20
    """Dimensions of z."""
    optimizer: Literal["adam", "adagrad"] = "adam"
    """The paper used Adagrad."""
    learning_rate: float = 1e-3
    """Step size; for Adagrad try the paper's 0.01, 0.02 or 0.1."""
    estimator: Literal["sgvb-b", "sgvb-a", "stl", "iwae", "dreg"] = "sgvb-b"
    """The loss: the ELBO with its KL in closed form (sgvb-b), from samples (sgvb-a), or that with the gradient of the
    path alone (stl); the importance-weighted bound (iwae), or that with the doubly reparameterized gradient (dreg)."""
    num_samples: int = 1
    """Samples of z for each image and step (the paper's L, the k of importance-weighted autoencoders)."""
    beta: float = 1.0
    """Weight of the KL divergence in the loss. The ELBO reported always has weight 1; the bound of iwae and dreg,
    reported while they train, has this weight."""
    warmup_epochs: int = 0
    """Epochs in which the weight of the KL grows from 0 to beta."""
    warmup_cycles: int = 1
    """How often it does so within these epochs. More than 1: in the first half of each cycle, then it stays."""
    free_bits: float | None = None
    """Nats of KL that are free in each dimension of z, so that fewer dimensions collapse; sgvb-b only."""
    capacity: float | None = None
    """Nats of KL to aim for: the loss has beta times the KL's distance from it; sgvb-b only."""
    binarize: Literal["dynamic", "threshold", "none"] = "dynamic"
    """What becomes of grey pixels: set with their grey value as the probability, anew at each step (dynamic); set
    where above half (threshold); or grey as they are (none)."""
    seed: int = 0
    """Everything random follows from it: one seed, one result, to the bit, on the same machine and threads."""
    device: str = "cpu"
    """Where to train: "cpu", "cuda", "cuda:1". On a GPU a step is captured in a CUDA graph."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the matrix products; losses, KLs and weights are float32. bf16 is faster where the processor has instructions
    for it: AMX or AVX512-BF16, a GPU."""
    threads: int | None = None
    """Threads to train with. By default PyTorch's number, but one where a step is too little work to be shared."""
    progress: bool = True
    """The progress bar; --no-progress for none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))  # config.json has a list
        for name in ("epochs", "batch_size", "latent_dim", "num_samples", "warmup_cycles"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims is {self.hidden_dims}; expected the units of each layer, at least 1")
        if self.estimator in ESTIMATORS and ESTIMATORS[self.estimator].importance_weighted and self.num_samples == 1:
            raise ValueError(
                f"num_samples is 1 and the estimator {self.estimator!r}, which weighs samples against each other; "
                "expected at least 2"
            )
        if self.warmup_cycles > 1 and self.warmup_epochs == 0:
            raise ValueError(f"warmup_cycles is {self.warmup_cycles}, of warmup_epochs=0; expected warmup_epochs too")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; expected a number from 0 up")
        for name in ("free_bits", "capacity"):
            value = getattr(self, name)
            if value is not None and not (0 <= value < math.inf and self.estimator == "sgvb-b"):
                raise ValueError(
                    f"{name} is {value} and the estimator {self.estimator!r}; expected a number from 0 up, and 'sgvb-b'"
                )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}; expected a number from 0 up")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; expected a 64-bit signed integer")
        for name, choices in (
            ("precision", ("float32", "bf16")),
            ("optimizer", tuple(OPTIMIZERS)),
            ("binarize", BINARIZATIONS),
            ("estimator", tuple(ESTIMATORS)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


class _Light(torch.optim.Optimizer):
    """PyTorch's add_param_group is wrapped in something that imports torch._dynamo: a second that training does not
    need."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class _Adam(_Light, torch.optim.Adam):
    pass


class _Adagrad(_Light, torch.optim.Adagrad):
    pass


def _adam(parameters, lr: float, device: torch.device) -> torch.optim.Optimizer:
    adam = _Adam(parameters, lr=lr, fused=True, capturable=device.type == "cuda")
    adam._warned_capturable_if_run_uncaptured = True  # the steps before the captured one are meant
    return adam


def _adagrad(parameters, lr: float, device: torch.device) -> torch.optim.Optimizer:
    return _Adagrad(parameters, lr=lr, fused=True)


OPTIMIZERS = {"adam": _adam, "adagrad": _adagrad}


@dataclass(frozen=True)
class Evaluation:
    """Averages per datapoint, in nats: elbo = log_likelihood - kl."""

    elbo: float
    log_likelihood: float
    kl: float


class _Ledger:
    """What the steps of an epoch gave. It is written where it is, and read without waiting for a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[int] = []
        self.sizes: list[int] = []
        self.rows: list[Tensor] = []
        self.pending: list[tuple[list[int], list[int], Tensor, torch.cuda.Event | None]] = []
        self.total, self.count = 0.0, 0

    def add(self, step: int, size: int, loss: Tensor, kl: Tensor, excess: Tensor | float) -> None:
        """A step's loss, mean KL, and what the loss has more than the negative ELBO; size is the number of images."""
        self.steps.append(step)
        self.sizes.append(size)
        excess = excess if isinstance(excess, Tensor) else torch.zeros_like(loss)
        self.rows.append(torch.stack([loss, kl, excess]))

    def read(self, wait: bool) -> Iterator[tuple[int, float]]:
        """(steps, average ELBO) of what has arrived since the last call; with `wait`, of everything.

        Raises FloatingPointError, naming the step and the term, where a loss is not finite.
        """
        if self.rows:
            numbers, event = torch.stack(self.rows), None
            if self.device.type == "cuda":
                numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.pending.append((self.steps, self.sizes, numbers, event))
            self.steps, self.sizes, self.rows = [], [], []
        while self.pending and (wait or self.pending[0][3] is None or self.pending[0][3].query()):
            steps, sizes, numbers, event = self.pending.pop(0)
            if event is not None:
                event.synchronize()
            losses, kls, excess = numbers.double().unbind(1)
            _check_finite(steps, losses, kls)
            elbo = float((excess - losses) @ torch.tensor(sizes, dtype=torch.float64))
            self.total += elbo
            self.count += sum(sizes)
            yield len(steps), elbo / sum(sizes)

    @property
    def average(self) -> float:
        """The average ELBO of what was read, each image with the same weight."""
        return self.total / self.count


def _check_finite(steps: list[int], losses: Tensor, kls: Tensor) -> None:
    for i in (~losses.isfinite()).nonzero().flatten().tolist():
        finite_kl = kls[i].isfinite()
        term, value = ("log-likelihood", -losses[i]) if finite_kl else ("KL divergence", kls[i])
        raise FloatingPointError(f"the {term} is {float(value)} at step {steps[i]}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:1'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but this PyTorch finds no CUDA GPU; expected 'cpu'")
    return device


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, as streams, events and graphs want it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Trainer:
    """Trains a VAE by the AEVB algorithm (Kingma & Welling 2013, algorithm 1), with any estimator of `FusedELBO`.

    `fit` does all of it and leaves a run folder. For a loop of your own there are `train_epoch` and `evaluate`, which
    touch no disk::

        trainer = aevb.Trainer(aevb.TrainConfig(epochs=20, out="runs/mine"))
        print(trainer.fit())                  # the last line of metrics.jsonl
        trainer.model.sample(16)

    The noise of an image, its bits and its samples of z, is a function of the config's seed, the epoch and the image,
    and the order of an epoch one of the seed and the epoch.

    Attributes: config, dataset; model, optimizer and criterion, which may be changed between epochs (a parameter's
    .grad is good until the next step); test_x, the test images as the model is evaluated on them; epoch and step, how
    many were done; folder, the run's, from `fit` on.

    Args:
        config: the options.
        model: by default a new VAE of the config's sizes, which give way to this one's. It is trained in place.
        dataset: by default the config's `data`, which gives way to this one's name, loaded.

    Raises:
        ValueError, FileNotFoundError: bad data; a model whose data_dim is not the data's.
    """

    folder: RunFolder

    def __init__(self, config: TrainConfig | None = None, *, model: VAE | None = None, dataset: Dataset | None = None):
        config = config or TrainConfig()
        if dataset is not None:
            config = dataclasses.replace(config, data=dataset.name)
        if model is not None:
            config = dataclasses.replace(config, hidden_dims=model.hidden_dims, latent_dim=model.latent_dim)
        self.config = config
        self.dataset = dataset or load(config.data)
        self.device = _device(config.device)
        seeds = mix_seed(config.seed, torch.arange(4)).tolist()
        init_seed, self._order_seed, self._noise_seed, test_seed = seeds
        self.model = model or VAE(
            self.dataset.data_dim,
            config.hidden_dims,
            config.latent_dim,
            generator=torch.Generator().manual_seed(init_seed),
        )
        if self.model.data_dim != self.dataset.data_dim:
            raise ValueError(
                f"the model's data_dim is {self.model.data_dim}; expected {self.dataset.data_dim}, "
                f"the pixels of an image of {self.dataset.name}"
            )
        self.model.to(self.device)
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), config.learning_rate, self.device)
        targets, test_targets = (
            Targets(images, config.binarize, self.dataset.max_value, self.device)
            for images in (self.dataset.train_images, self.dataset.test_images)
        )
        self.criterion = FusedELBO(
            beta=config.beta,
            x_scale=targets.x_scale,
            estimator=config.estimator,
            num_samples=None if config.num_samples == 1 else config.num_samples,
            free_bits=config.free_bits,
            capacity=config.capacity,
        )
        self._targets = targets
        self._step: AutogradStep | GraphStep | None = None
        self._step_made_of: tuple = ()
        self.step = 0
        self.epoch = 0
        # The test images are binarized once and their noise has one seed, so that epochs can be compared.
        self.test_x = test_targets.all(torch.tensor(test_seed, device=self.device))
        self._test_seeds = mix_seed(test_seed, torch.arange(len(self.test_x), device=self.device))

    @classmethod
    def load(cls, run: str | PathLike[str], device: str | None = None) -> Trainer:
        """The trainer of a run that is done, with the model it saved: to evaluate, sample, or look at; on the device
        that it was trained on, or the CPU where that is not here, or on another.

        Raises FileNotFoundError: there is no run, or its data are gone. ValueError: a damaged or foreign file.
        """
        folder = RunFolder.open(run)
        options = folder.options()
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{folder.path / CONFIG} has options that aevb does not know: {', '.join(unknown)}")
        config = TrainConfig(**options)
        if device is None:
            device = config.device if config.device == "cpu" or torch.cuda.is_available() else "cpu"
        trainer = cls(dataclasses.replace(config, device=device), model=VAE.load(folder.path / MODEL))
        trainer.folder = folder
        return trainer

    def fit(self) -> dict[str, float]:
        """Trains for `epochs` epochs and returns the last one's metrics.

        The run folder gets config.json at the start; after each epoch the checkpoint model.safetensors (see `VAE.load`)
        and a line of metrics.jsonl; at the end the pictures. A line of metrics holds epoch, step, train_elbo (the
        average over the epoch, as the weights move; for "iwae" and "dreg" that of their bound), test_elbo,
        test_log_likelihood, test_kl (nats per datapoint) and seconds (since the start).

        Raises:
            RunFolderError: the folder holds a run already, or cannot be written to.
            FloatingPointError: the loss is not finite; the last good checkpoint is kept.
            KeyboardInterrupt: after Ctrl-C, with a checkpoint and the pictures in the folder; its text says where.
        """
        config = self.config
        self.folder = folder = RunFolder(config.out, self.dataset.name, dataclasses.asdict(config), config.overwrite)
        try:
            with _threads(self._num_threads()):
                metrics = self._train(folder)
            self._draw(folder)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self._after_interrupt(folder)) from interrupt
        return metrics

    def train_epoch(self, report=lambda steps, elbo: None) -> float:
        """One pass over the training images; the average ELBO, in nats per datapoint, as the weights moved. For "iwae"
        and "dreg" it is the average of their bound.

        Each datapoint has the same weight, those of a smaller last batch too. Every few steps calls
        ``report(steps done since the last call, average ELBO of those)``.

        Raises FloatingPointError, naming the step and the term, where the loss is not finite.
        """
        order = self.order(self.epoch)
        last = math.ceil(len(order) / self.config.batch_size)
        batch_seed, noise_seed = self.noise_seeds(self.epoch)
        ledger = _Ledger(self.device)
        with _current(self.device):
            take_step = self._training_step()
            for number, index in enumerate(batches(self.dataset.train_images, order, self.config.batch_size), 1):
                self.criterion.beta = self._beta()
                outcome = take_step(index, batch_seed, noise_seed)
                self.step += 1
                ledger.add(self.step, len(index), outcome.loss, *self._kls(outcome.kl))
                if self.step % CHECK_EVERY == 0 or number == last:
                    for steps, elbo in ledger.read(wait=number == last):
                        report(steps, elbo)
        self._step_made_of = made_of(self.model, self.criterion, self.optimizer)  # the first step made Adam's state
        self.epoch += 1
        return ledger.average

    def _training_step(self) -> AutogradStep | GraphStep:
        """A step of model, criterion and optimizer as they are now: between epochs any may be changed."""
        parts = (self.model, self.criterion, self.optimizer)
        bf16 = self.config.precision == "bf16"
        if self._step is None and bf16 and not has_bf16(self.device):
            warnings.warn(
                "precision is 'bf16', for which this processor has no instructions (AVX512-BF16 or AMX; a GPU from "
                "Ampere on): training works, but is slower than in float32",
                stacklevel=3,
            )
        if self._step is None or made_of(*parts) != self._step_made_of:
            self._step = training_step(*parts, self._targets, self.config.batch_size, bf16)
            self._step_made_of = made_of(*parts)
        return self._step

    def order(self, epoch: int) -> Tensor:
        """The training images' numbers in the order of an epoch, on the device."""
        return epoch_order(self.dataset.train_images, int(mix_seed(self._order_seed, epoch))).to(self.device)

    def noise_seeds(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The seeds of an epoch's batches and of its samples: 0-d int64 tensors on the device."""
        seeds = mix_seed(self._noise_seed, torch.tensor([2 * epoch, 2 * epoch + 1]))
        batches, samples = seeds.to(self.device).unbind()
        return batches, samples

    @torch.no_grad()
    def evaluate(self, images: int | None = None) -> Evaluation:
        """The ELBO of the test images, or of the first so many, one sample of z each: a function of the weights and the
        config's seed."""
        log_likelihood = kl = 0.0
        test_x, test_seeds = self.test_x[:images], self._test_seeds[:images]
        with _current(self.device):
            for x, seeds in zip(test_x.split(EVALUATION_BATCH), test_seeds.split(EVALUATION_BATCH), strict=True):
                z, batch_kl = sample_gaussian(*self.model.encode(x), seed=seeds)
                log_likelihood += float(self.model.log_prob(x, z).sum(dtype=torch.float64))
                kl += float(batch_kl.sum(dtype=torch.float64))
        n = len(test_x)
        return Evaluation((log_likelihood - kl) / n, log_likelihood / n, kl / n)

    def _beta(self) -> float:
        """The weight of the KL in the next step."""
        config = self.config
        steps = config.warmup_epochs * math.ceil(len(self.dataset.train_images) / config.batch_size)
        if config.warmup_cycles == 1:
            return linear_warmup(self.step, steps, end=config.beta)
        return cyclical_warmup(self.step, steps, cycles=config.warmup_cycles, end=config.beta)

    def _kls(self, kl: Tensor) -> tuple[Tensor, Tensor | float]:
        """Of a batch the mean KL, and what the loss has more than the negative ELBO because of its own KL term: 0-d."""
        config = self.config
        mean = kl.mean() if config.free_bits is None else kl.sum() / max(kl[..., 0].numel(), 1)
        if ESTIMATORS[config.estimator].importance_weighted:
            return mean, 0.0
        plain = config.free_bits is None and config.capacity is None
        term = mean if plain else self.criterion.kl_term(kl).mean()
        return mean, self.criterion.beta * term - mean

    def _num_threads(self) -> int:
        if self.config.threads is not None:
            return self.config.threads
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        work = weights * self.config.batch_size * self.config.num_samples
        return torch.get_num_threads() if work >= SHARED_WORK else 1

    def _train(self, folder: RunFolder) -> dict[str, float]:
        config, start = self.config, time.perf_counter()
        last_epoch = self.epoch + config.epochs
        steps = config.epochs * math.ceil(len(self.dataset.train_images) / config.batch_size)
        metrics: dict[str, float] = {}
        # A terminal is redrawn often; where the bar goes to a file, it leaves a line every few seconds.
        interval = 0.1 if sys.stderr.isatty() else 5
        with tqdm(total=steps, unit="step", disable=not config.progress, mininterval=interval) as bar:

            def report(steps: int, elbo: float) -> None:
                test = f", test {metrics['test_elbo']:.2f}" if metrics else ""
                bar.set_postfix_str(f"ELBO {elbo:.2f}{test}", refresh=False)
                bar.update(steps)

            while self.epoch < last_epoch:
                bar.set_description(f"epoch {self.epoch + 1}/{last_epoch}", refresh=False)
                try:
                    train_elbo = self.train_epoch(report)
                    test = self.evaluate()
                    if not math.isfinite(test.elbo):
                        raise FloatingPointError(f"the test ELBO is {test.elbo} after step {self.step}")
                except FloatingPointError as error:
                    saved = (
                        f"{folder.path / MODEL} is of epoch {metrics['epoch']}" if metrics else "nothing is saved yet"
                    )
                    raise FloatingPointError(
                        f"training stopped because {error}; {saved} (a smaller --learning-rate may help)"
                    ) from error
                metrics = {
                    "epoch": self.epoch,
                    "step": self.step,
                    "train_elbo": train_elbo,
                    "test_elbo": test.elbo,
                    "test_log_likelihood": test.log_likelihood,
                    "test_kl": test.kl,
                    "seconds": round(time.perf_counter() - start, 3),
                }
                folder.write_model(self.model, epoch=self.epoch, step=self.step)
                folder.append_metrics(metrics)
        return metrics

    def _draw(self, folder: RunFolder) -> None:
        from .pictures import draw

        # A copy, since moving the model would move what a captured step writes to.
        model = self.model if self.device.type == "cpu" else copy.deepcopy(self.model).cpu()
        for name, png in draw(model, self.dataset, self.config.seed).items():
            folder.write(name, png)

    def _after_interrupt(self, folder: RunFolder) -> str:
        """Saves what there is, unless the weights are broken, and says so in a sentence."""
        interrupted = f"interrupted after {self.epoch} epochs, {self.step} steps"
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            return f"{interrupted}; the weights are not finite, so {folder.path} keeps what it had"
        path = folder.write_model(self.model, epoch=self.epoch, step=self.step)
        self._draw(folder)
        return f"{interrupted}; the model so far is in {path}, with pictures of it beside it"


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch computes with `count` threads within, and with as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
