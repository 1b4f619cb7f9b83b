"""The training loop: epochs, evaluation, and what went wrong. It touches no disk and no signal."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..bounds import cyclical_warmup, linear_warmup
from ..data import Dataset, LoadedImages, MappedImages, Targets, batches, epoch_order
from ..inference.standardised import prior_of
from ..losses.elbo import FusedELBO
from ..models import BaseVAE
from ..models.own import encode, log_prob_of
from ..ops import mix_seed, sample_gaussian
from ..ops.linear import floating
from ..ops.matmul import has_bf16
from .checkpoint import Checkpoint
from .config import TrainConfig
from .distributed import ProcessGroup, SingleProcess
from .metrics import EpochMetrics, Evaluation, NotFiniteError
from .nonfinite import UPDATE, Finding, broken_weight, first_not_finite
from .optimizers import Schedule
from .state import TrainState
from .step import AutogradStep
from .step_choice import step_key, training_step
from .step_cuda_graph import GraphStep

CHECK_EVERY = 20  # steps between two looks at the loss, for the bar and for what is not finite
EVALUATION_BATCH = 1000

Report = Callable[[int, Evaluation], None]


class HeldOut:
    """Images that are not trained on. Their bits and their noise have one seed, so that epochs can be compared."""

    def __init__(self, images: Tensor | MappedImages, inputs: Targets, seed: int):
        self.images, self.inputs, self.count = images, inputs, len(images)
        self.seed = torch.tensor(seed, device=inputs.device)

    def x(self, index: Tensor) -> Tensor:
        """Returns x as the model is evaluated on it: (B, D), bool, or floating in [0, 1]."""
        x = self.inputs(index, self.seed)
        return x if x.dtype == torch.bool else floating(x, self.inputs.x_scale, torch.empty(0))

    def observed(self, index: Tensor) -> Tensor | None:
        """Returns which values are observed, bool, (B, D); None where nothing is missing."""
        return self.inputs.mask(index)

    def seeds(self, index: Tensor) -> Tensor:
        """Returns the seed of each image's z, (B,)."""
        return mix_seed(self.seed, index)

    def batches(self, count: int, processes: SingleProcess) -> Iterator[Tensor]:
        """Yields the first `count` images' numbers, or a process's part of them, in batches.

        Those on the disk come as they lie there, and their memory is given back.
        """
        if not isinstance(self.images, MappedImages):
            index = processes.part(torch.arange(count, device=self.inputs.device))
            yield from index.split(EVALUATION_BATCH) if len(index) else ()
            return
        order = self.images.file_order()
        index = processes.part(order[order < count])
        for batch in index.split(EVALUATION_BATCH) if len(index) else ():
            yield batch.to(self.inputs.device)
            self.images.release_rows(batch)


class TrainingLoop:
    """Takes a `TrainState` through epochs of a data set.

    The noise of an image, its bits and its samples of z, is a function of the seed, the epoch and the image, and the
    order of an epoch one of the seed and the epoch.

    Attributes:
        state: the model, and how far its training is.
        last_epoch: the averages of the epoch that is done.
        held_out: the images that are not trained on, by the name of their part: "test", "validation".
    """

    last_epoch: Evaluation

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        inputs: Targets,
        state: TrainState,
        processes: SingleProcess,
    ):
        self.config, self.dataset, self.inputs, self.state = config, dataset, inputs, state
        self.processes, self.device = processes, state.device
        seeds = mix_seed(config.seed, torch.arange(5)).tolist()
        _, self._order_seed, self._noise_seed, test_seed, validation_seed = seeds
        self.schedule = Schedule(config.schedule, self.steps_of(config.epochs), config.learning_rate_warmup)
        self.step_now: AutogradStep | GraphStep | None = None
        self._step_key: tuple = ()
        state.metrics = self.new_metrics()
        self.held_out = {"test": self._held_out("test", dataset.test_images, test_seed)}
        if dataset.validation_images is not None:
            self.held_out["validation"] = self._held_out("validation", dataset.validation_images, validation_seed)

    def _held_out(self, part: str, images: Tensor | MappedImages, seed: int) -> HeldOut:
        observed = self.dataset.observed.get(part)
        inputs = Targets(images, self.config.binarize, self.dataset.max_value, self.device, observed)
        return HeldOut(images, inputs, seed)

    # ---- an epoch ----

    def steps_of(self, epochs: int) -> int:
        """Returns the number of steps in so many epochs."""
        images = self.dataset.train_images
        of_one = images.count if isinstance(images, LoadedImages) else math.ceil(len(images) / self.config.batch_size)
        return epochs * of_one

    def order(self, epoch: int) -> Tensor:
        """Returns the training images' numbers in the order of an epoch, on the device."""
        images = self.dataset.train_images
        if isinstance(images, LoadedImages):
            return torch.arange(len(images), device=self.device)
        return epoch_order(images, int(mix_seed(self._order_seed, epoch))).to(self.device)

    def noise_seeds(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns the seeds of an epoch's batches and of its samples: 0-d int64 tensors on the device."""
        seeds = mix_seed(self._noise_seed, torch.tensor([2 * epoch, 2 * epoch + 1]))
        of_batches, of_samples = seeds.to(self.device).unbind()
        return of_batches, of_samples

    def epoch(self, report: Report, asked: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Takes the steps of an epoch that are left; yields after each look at the losses.

        A look comes every few steps, and after a step where `asked()`. It calls ``report(images, averages)``.

        Raises:
            NotFiniteError: the loss is not finite; it names the step and the term.
        """
        state = self.state
        if state.steps_done == 0:
            state.metrics = self.new_metrics()  # of the criterion as it is now
        batch_seed, noise_seed = self.noise_seeds(state.epoch)
        state.model.train()
        with current_device(self.device):
            take_step = self.training_step()
            for index in self._batches_left():
                self.take(take_step, index, batch_seed, noise_seed)
                last = state.steps_done == self.steps_of(1)
                if state.step % CHECK_EVERY == 0 or last or asked():
                    for images, averages in state.metrics.read(wait=last):
                        report(images, averages)
                    yield
            # A loader may give more or fewer batches than before, so that the last step was not known to be it.
            for images, averages in state.metrics.read(wait=True):
                report(images, averages)
        if state.metrics.count == 0:
            raise ValueError(
                f"the training images of epoch {state.epoch + 1} are none: the DataLoader gave no batch; expected a "
                "data set that can be gone through again in each epoch"
            )
        # The first step made Adam's state, which the key has.
        self._step_key = step_key(state.model, state.objective, state.optimizer)
        self.last_epoch = state.metrics.average
        self._end_epoch()

    def _end_epoch(self) -> None:
        self.state.metrics, self.state.steps_done = self.new_metrics(), 0
        self.state.epoch += 1

    def _batches_left(self) -> Iterator[Tensor]:
        images, size = self.dataset.train_images, self.config.batch_size
        if isinstance(images, LoadedImages):
            return self._loaded(images)
        left = self.order(self.state.epoch)[self.state.steps_done * size :]
        return batches(images, left, size) if len(left) else iter(())

    def _loaded(self, images: LoadedImages) -> Iterator[Tensor]:
        """Yields each batch's places in the epoch; the batch itself is with the inputs then."""
        first = 0
        for number, x in enumerate(images.epoch()):
            if number >= self.state.steps_done:
                self.inputs.give(x)
                yield torch.arange(first, first + len(x), device=self.device)
            first += len(x)

    def take(self, take_step: Callable, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> None:
        """Takes a step on images `index`, with the KL's weight and the learning rate of this step."""
        state = self.state
        if self.config.warmup_epochs > 0:
            state.criterion.beta = self._beta()
        self.schedule.set(state.optimizer, state.step)
        outcome = take_step(index, batch_seed, noise_seed)
        state.step += 1
        state.steps_done += 1
        state.metrics.add(state.step, len(self.processes.part(index)), outcome.numbers)

    def _beta(self) -> float:
        """Returns the weight of the KL in the next step."""
        config, step = self.config, self.state.step
        steps = self.steps_of(config.warmup_epochs)
        if config.warmup_cycles == 1:
            return linear_warmup(step, steps, end=config.beta)
        return cyclical_warmup(step, steps, cycles=config.warmup_cycles, end=config.beta)

    def new_metrics(self, totals: tuple[float, float, int] = (0.0, 0.0, 0)) -> EpochMetrics:
        """Returns metrics that go on from these totals."""
        reports = self.state.objective.reports
        is_own = not isinstance(self.state.model, BaseVAE)
        constant = self.state.criterion.family.constant(self.dataset.data_dim)
        if (mask := self.inputs.observed) is not None:  # of those of an epoch's values that are observed
            constant *= float(mask.float().mean())
        constant = 0.0 if reports == "bound" or is_own else constant
        return EpochMetrics(self.processes, reports, totals, constant)

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Puts the state back. Raises ValueError where it is another model's."""
        totals = self.state.load_state_dict(checkpoint)
        self.state.metrics = self.new_metrics(totals)

    def training_step(self) -> AutogradStep | GraphStep:
        """Returns a step of model, criterion and optimizer as they are now: between epochs any may be changed."""
        state, config = self.state, self.config
        parts = (state.model, state.objective, state.optimizer)
        bf16 = config.precision == "bf16"
        if self.step_now is None and bf16 and not has_bf16(self.device):
            warnings.warn(
                "precision is 'bf16', for which this processor has no instructions (AVX512-BF16 or AMX; a GPU from "
                "Ampere on): training works, but is slower than in float32",
                stacklevel=4,
            )
        if self.step_now is None or step_key(*parts) != self._step_key:
            self.step_now = training_step(
                *parts, self.inputs, config.batch_size, bf16, config.clip_norm, self.processes
            )
            self._step_key = step_key(*parts)
        return self.step_now

    def release(self) -> None:
        """Lets go of the group of processes, which is to end before they do."""
        if isinstance(self.processes, ProcessGroup):
            self.step_now = None

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self, part: str, images: int | None = None) -> Evaluation:
        """Returns the ELBO of a part that is held out, or of its first images, one sample of z each."""
        held_out, model = self.held_out[part], self.state.model
        count = held_out.count if images is None else min(images, held_out.count)
        sums = torch.zeros(2, dtype=torch.float64)
        with current_device(self.device), evaluating(model):
            for batch in held_out.batches(count, self.processes):
                x = held_out.x(batch)
                observed = held_out.observed(batch)
                posterior = encode(model, x, None, observed)
                z, kl = sample_gaussian(*posterior, prior=prior_of(model), seed=held_out.seeds(batch))
                log_prob = log_prob_of(model, x, None, z, observed)
                sums += torch.stack([log_prob.sum(dtype=torch.float64), kl.sum(dtype=torch.float64)]).cpu()
        log_likelihood, kl_sum = self.processes.sum(sums).tolist()
        return Evaluation((log_likelihood - kl_sum) / count, log_likelihood / count, kl_sum / count)

    # ---- what is not finite ----

    def weights_are_finite(self) -> bool:
        """Whether all weights are; the same answer in all processes."""
        wrong = sum((~p.isfinite()).any() for p in self.state.model.parameters())
        return not float(self.processes.sum(torch.as_tensor(wrong, dtype=torch.float64)))

    def replay(self, until: int) -> Finding | None:
        """Takes the steps from the present state on again, one by one, up to the step `until`.

        Returns:
            What was first not finite, with the weights left as they were before; None where all is finite this time.
        """
        state = self.state
        while state.step < until:
            batch_seed, noise_seed = self.noise_seeds(state.epoch)
            take_step = self.training_step()
            for index in self._batches_left():
                before = [p.detach().clone() for p in state.model.parameters()]
                self.take(take_step, index, batch_seed, noise_seed)
                if not self._is_finite():
                    broken = broken_weight(state.model)
                    state.step -= 1
                    with torch.no_grad():
                        for p, value in zip(state.model.parameters(), before, strict=True):
                            p.copy_(value)
                    found = self._explain(index, batch_seed, noise_seed)
                    update = found.stage == UPDATE and broken is not None
                    return Finding(UPDATE, f"{broken} {found.text}") if update else found
                if state.step >= until:
                    return None
            if state.steps_done == 0:  # a data set that is used up
                return None
            self._end_epoch()
        return None

    def _is_finite(self) -> bool:
        try:
            for _ in self.state.metrics.read(wait=True):
                pass
        except NotFiniteError:
            return False
        return self.weights_are_finite()

    def _explain(self, index: Tensor, batch_seed: Tensor, noise_seed: Tensor) -> Finding:
        state = self.state
        parts = (state.model, state.objective, state.optimizer, self.inputs, self.inputs.x_scale)
        step = AutogradStep(*parts, self.config.precision == "bf16")
        part = self.processes.part(index)
        part = part if len(part) else index[:1]
        x, seeds = step.batch(part, batch_seed), step.noise_seeds(noise_seed, part)
        found = first_not_finite(step, x, part, seeds, observed=step.observed(part))
        return min(self.processes.gather(found))

    def explain_held_out(self, part: str) -> Finding | None:
        """Returns what is first not finite where the images of a part that is held out are evaluated."""
        held_out, state = self.held_out[part], self.state
        likelihood, sigmoid_means = state.criterion.likelihood, state.criterion.sigmoid_means
        criterion = FusedELBO(likelihood=likelihood, sigmoid_means=sigmoid_means)
        step = AutogradStep(state.model, criterion, state.optimizer, held_out.inputs, None)  # type: ignore[arg-type]
        for index in held_out.batches(held_out.count, SingleProcess(self.device)):
            x, seeds, observed = held_out.x(index), held_out.seeds(index), held_out.observed(index)
            with torch.no_grad():
                loss = step.terms(x, seeds, observed).loss
            if not loss.isfinite():
                return first_not_finite(step, x, index, seeds, part, observed)
        return None


def current_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, as streams, events and graphs want it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(model: BaseVAE) -> Iterator[None]:
    """The model is in eval mode within."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
