"""The trainer: the AEVB algorithm, and the folder it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from .bounds import cyclical_warmup, linear_warmup
from .data import BINARIZATIONS, Dataset, load, targets
from .loss import ESTIMATORS, FusedELBO
from .models import VAE
from .ops import mix_seed, sample_gaussian
from .runs import CONFIG, MODEL, RunFolder

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
            ("optimizer", tuple(OPTIMIZERS)),
            ("binarize", BINARIZATIONS),
            ("estimator", tuple(ESTIMATORS)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


OPTIMIZERS = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}


@dataclass(frozen=True)
class Evaluation:
    """Averages per datapoint, in nats: elbo = log_likelihood - kl."""

    elbo: float
    log_likelihood: float
    kl: float


class Trainer:
    """Trains a VAE by the AEVB algorithm (Kingma & Welling 2013, algorithm 1), with any estimator of `FusedELBO`.

    `fit` does all of it and leaves a run folder. For a loop of your own there are `train_epoch` and `evaluate`, which
    touch no disk::

        trainer = aevb.Trainer(aevb.TrainConfig(epochs=20, out="runs/mine"))
        print(trainer.fit())                  # the last line of metrics.jsonl
        trainer.model.sample(16)

    Attributes: config, dataset, model, optimizer; test_x, the test images as the model is evaluated on them; epoch and
    step, how many were done; folder, the run's, from `fit` on.

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
        init_seed, order_seed, self._noise_seed, test_seed = mix_seed(config.seed, torch.arange(4)).tolist()
        self._generator = torch.Generator().manual_seed(order_seed)
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
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), lr=config.learning_rate, fused=True)
        self.criterion = FusedELBO(
            beta=config.beta,
            estimator=config.estimator,
            num_samples=None if config.num_samples == 1 else config.num_samples,
            free_bits=config.free_bits,
            capacity=config.capacity,
        )
        self.step = 0
        self.epoch = 0
        # The test images are binarized once and their noise has one seed, so that epochs can be compared.
        self.test_x = self._targets(self.dataset.test_images, torch.Generator().manual_seed(test_seed))
        self._test_seeds = mix_seed(test_seed, torch.arange(len(self.test_x)))

    @classmethod
    def load(cls, run: str | PathLike[str]) -> Trainer:
        """The trainer of a run that is done, with the model it saved: to evaluate, sample, or look at.

        Raises FileNotFoundError: there is no run, or its data are gone. ValueError: a damaged or foreign file.
        """
        folder = RunFolder.open(run)
        options = folder.options()
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"{folder.path / CONFIG} has options that aevb does not know: {', '.join(unknown)}")
        trainer = cls(TrainConfig(**options), model=VAE.load(folder.path / MODEL))
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
        images, criterion = self.dataset.train_images, self.criterion
        batches = torch.randperm(len(images), generator=self._generator).split(self.config.batch_size)
        seeds = mix_seed(self._noise_seed, torch.arange(self.step, self.step + len(batches)))
        total, losses, kls, sizes = 0.0, [], [], []
        for batch, seed in zip(batches, seeds.unbind(), strict=True):
            x = self._targets(images[batch], self._generator)
            criterion.beta = self._beta()
            z, kl = criterion.sample(*self.model.encode(x), seed=seed)
            loss = criterion(self.model.linear_logits(z), x, kl=kl)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            losses.append(loss.detach())
            kls.append(self._batch_kl(kl.detach()))
            sizes.append(len(batch))
            if len(losses) == CHECK_EVERY or batch is batches[-1]:
                batch_losses, batch_kls = torch.stack(losses).double(), torch.stack(kls).double()
                self._check_finite(batch_losses, batch_kls[:, 0])
                bounds = batch_kls[:, 1] - batch_losses
                elbo = float(bounds @ torch.tensor(sizes, dtype=torch.float64))
                total += elbo
                report(len(losses), elbo / sum(sizes))
                losses, kls, sizes = [], [], []
        self.epoch += 1
        return total / len(images)

    @torch.no_grad()
    def evaluate(self, images: int | None = None) -> Evaluation:
        """The ELBO of the test images, or of the first so many, one sample of z each: a function of the weights and the
        config's seed."""
        log_likelihood = kl = 0.0
        test_x, test_seeds = self.test_x[:images], self._test_seeds[:images]
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

    def _batch_kl(self, kl: Tensor) -> Tensor:
        """Of the batch the mean KL, and what the loss has more than the negative ELBO because of its own KL term."""
        mean = kl.sum() / max(kl.numel() if self.config.free_bits is None else kl[..., 0].numel(), 1)
        if ESTIMATORS[self.config.estimator].importance_weighted:
            return torch.stack([mean, torch.zeros_like(mean)])
        return torch.stack([mean, self.criterion.beta * self.criterion.kl_term(kl).mean() - mean])

    def _targets(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return targets(images, self.config.binarize, self.dataset.max_value, generator)

    def _check_finite(self, losses: Tensor, kls: Tensor) -> None:
        """Raises FloatingPointError unless the losses and KLs of the last steps are finite."""
        for i in (~losses.isfinite()).nonzero().flatten().tolist():
            finite_kl = kls[i].isfinite()
            term, value = ("log-likelihood", -losses[i]) if finite_kl else ("KL divergence", kls[i])
            raise FloatingPointError(f"the {term} is {float(value)} at step {self.step - len(losses) + i + 1}")

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

        for name, png in draw(self.model, self.dataset, self.config.seed).items():
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
