"""The options of training: schedules, clipping, validation, early stopping, models and likelihoods, TensorBoard."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import aevb
from aevb.checks.choices import ESTIMATORS
from aevb.data import BINARIZATIONS, load
from aevb.likelihoods import REGISTRY
from aevb.training.config import _choices
from aevb.training.optimizers import OPTIMIZERS, schedule_factor
from aevb.training.trainer import HeldOut


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    few = {
        f"{part}_{what}": getattr(data, f"{part}_{what}")[:100] for part in ("train", "test") for what in ("images",)
    }
    return dataclasses.replace(data, **few, train_labels=data.train_labels[:100], test_labels=data.test_labels[:100])


def options(tmp_path, **changes):
    small = {"epochs": 2, "batch_size": 50, "hidden_dims": (16,), "latent_dim": 3, "progress": False}
    return aevb.TrainConfig(out=str(tmp_path / "run"), **{**small, **changes})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- the learning rate ----------------------------------------------------------------------------------------------


def test_schedules():
    assert [schedule_factor("constant", step, 10, 0) for step in (0, 5, 9)] == [1, 1, 1]
    assert [schedule_factor("linear", step, 10, 0) for step in (0, 5, 9, 10, 12)] == pytest.approx([1, 0.5, 0.1, 0, 0])
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert [schedule_factor("cosine", 4 + step, 12, 4) for step in range(9)] == pytest.approx(cosine)
    assert [schedule_factor("cosine", step, 12, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_the_learning_rate_follows_its_schedule(tmp_path, digits, optimizer):
    config = options(
        tmp_path, schedule="cosine", learning_rate_warmup=2, learning_rate=0.5, epochs=4, optimizer=optimizer
    )
    trainer = aevb.Trainer(config, dataset=digits)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.fit()
    assert seen == pytest.approx([0.5 * schedule_factor("cosine", step, 8, 2) for step in range(8)])
    assert [line["learning_rate"] for line in lines(tmp_path / "run")] == pytest.approx(seen[1::2])


def test_the_rate_of_a_step_is_used(tmp_path, digits):
    """Of the first step's it is a hundredth: Adam's first step moves each weight by it."""
    config = options(tmp_path, learning_rate_warmup=100, learning_rate=0.1, batch_size=100)
    trainer = aevb.Trainer(config, dataset=digits)
    before = trainer.model.decoder[2].bias.detach().clone()
    trainer.train_epoch()
    moved = (trainer.model.decoder[2].bias.detach() - before).abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)


# ---- the gradient's norm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"], ids=["without autograd", "with autograd"])
def test_gradients_are_clipped(tmp_path, digits, likelihood):
    norms = {}
    for clip_norm in (None, 0.25, 1e6):
        trainer = aevb.Trainer(options(tmp_path, clip_norm=clip_norm, likelihood=likelihood), dataset=digits)
        seen = norms[clip_norm] = []

        def note(*_, trainer=trainer, seen=seen):
            gradients = [p.grad.double().flatten() for p in trainer.model.parameters()]
            seen.append(float(torch.cat(gradients).norm()))

        trainer.optimizer.register_step_pre_hook(note)
        trainer.train_epoch()
    assert norms[None] == norms[1e6]
    assert min(norms[None]) > 0.5
    assert norms[0.25] == pytest.approx([0.25] * 2, rel=1e-4)


# ---- validation, the best epoch, stopping early ---------------------------------------------------------------------


def test_the_best_epoch_is_kept_beside_the_last(tmp_path, monkeypatch):
    trainer = aevb.Trainer(options(tmp_path, validation=0.1, epochs=4))
    assert len(trainer.dataset.validation_images) == 150
    assert len(trainer.dataset.train_images) == 1350
    evaluate, worth = trainer.loop.evaluate, iter([-30.0, -20.0, -25.0, -22.0])

    def validated(part, images=None):
        found = evaluate(part, images)
        return dataclasses.replace(found, elbo=next(worth)) if part == "validation" else found

    monkeypatch.setattr(trainer.loop, "evaluate", validated)
    trainer.fit()
    run = tmp_path / "run"
    assert [line["validation_elbo"] for line in lines(run)] == [-30.0, -20.0, -25.0, -22.0]
    best = aevb.Trainer.load(run, best=True)
    assert best.evaluate().elbo == lines(run)[1]["test_elbo"]
    assert aevb.Trainer.load(run).evaluate().elbo == lines(run)[3]["test_elbo"]
    assert best.dataset.train_images.shape == (1350, 64)


def test_a_run_stops_when_it_gets_no_better(tmp_path, monkeypatch):
    def stopped(after, **changes):
        trainer = aevb.Trainer(options(tmp_path, validation=0.1, patience=2, **changes))
        evaluate = trainer.loop.evaluate

        def validated(part, images=None):
            found = evaluate(part, images)
            return dataclasses.replace(found, elbo=-abs(trainer.epoch - 3.0)) if part == "validation" else found

        monkeypatch.setattr(trainer.loop, "evaluate", validated)
        assert trainer.fit()["epoch"] == after

    stopped(5, epochs=50)
    stopped(5, epochs=60, resume=True)  # it is over, and stays so


def test_patience_needs_validation_images(tmp_path, digits):
    with pytest.raises(ValueError, match=r"patience is 3, but digits has no validation images; expected a validation"):
        aevb.Trainer(options(tmp_path, patience=3), dataset=digits)


def test_images_held_out_have_noise_of_their_own(tmp_path):
    trainer = aevb.Trainer(options(tmp_path, validation=0.1))
    test, validation = trainer.held_out["test"], trainer.held_out["validation"]
    assert isinstance(test, HeldOut)
    assert validation.count == 150
    index = torch.arange(50)
    assert not torch.equal(test.seeds(index), validation.seeds(index))
    assert torch.equal(test.x(index), trainer.test_x[:50])
    assert trainer.evaluate(part="validation").elbo != trainer.evaluate().elbo


# ---- models and likelihoods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"likelihood": "gaussian"},
        {"likelihood": "gaussian", "variance": "shared"},
        {"likelihood": "gaussian", "variance": 0.05, "hidden_dims": (24, 16)},
        {"likelihood": "gaussian", "estimator": "iwae", "num_samples": 4},
        {"likelihood": "gaussian", "free_bits": 0.1, "warmup_epochs": 1},
        {"architecture": "conv", "channels": (8, 12)},
        {"architecture": "conv", "channels": (8,), "likelihood": "gaussian"},
        {"architecture": "conv", "channels": (8,), "estimator": "stl", "num_samples": 3, "binarize": "none"},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_model_learns_and_loads(tmp_path, digits, changes):
    config = options(tmp_path, learning_rate=5e-3, batch_size=10, epochs=6, **changes)
    trainer = aevb.Trainer(config, dataset=digits)
    before = trainer.evaluate()
    metrics = trainer.fit()
    assert metrics["test_elbo"] > before.elbo + 10
    assert metrics["test_elbo"] == pytest.approx(metrics["test_log_likelihood"] - metrics["test_kl"])
    model = aevb.BaseVAE.load(tmp_path / "run" / "model.safetensors")
    assert type(model) is type(trainer.model)
    assert (
        model.options()
        == trainer.model.options()
        | {key: list(value) for key, value in trainer.model.options().items() if isinstance(value, tuple)}
        or model.options() == trainer.model.options()
    )
    again = aevb.Trainer(config, model=model, dataset=digits)
    assert again.evaluate().elbo == metrics["test_elbo"]
    assert again.config == trainer.config


def test_grey_values_are_the_gaussians(tmp_path):
    assert options(tmp_path).binarize == "dynamic"
    assert options(tmp_path, likelihood="gaussian").binarize == "none"
    with pytest.raises(ValueError, match="binarize is 'dynamic' and the likelihood 'gaussian', of grey values"):
        options(tmp_path, likelihood="gaussian", binarize="dynamic")
    with pytest.raises(ValueError, match=r"variance is -1.0; expected 'learned', 'shared' or a positive number"):
        options(tmp_path, likelihood="gaussian", variance=-1.0)
    with pytest.raises(ValueError, match="variance is 'mine'; expected"):
        options(tmp_path, likelihood="gaussian", variance="mine")


# ---- what watches a run ---------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path, digits):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    aevb.Trainer(options(tmp_path, tensorboard=True, epochs=1), dataset=digits).fit()
    aevb.Trainer(options(tmp_path, tensorboard=True, epochs=3, resume=True), dataset=digits).fit()
    found = events.EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(found.Tags()["scalars"]) >= {"train/elbo", "train/kl", "test/elbo", "test/log_likelihood"}
    written = [(event.step, event.value) for event in found.Scalars("test/elbo")]
    assert written == [(line["step"], pytest.approx(line["test_elbo"])) for line in lines(tmp_path / "run")]


def test_without_tensorboard_a_sentence(tmp_path, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'TensorBoard is missing .*; `pip install "aevb\[tensorboard\]"` has it'):
        aevb.Trainer(options(tmp_path, tensorboard=True), dataset=digits).fit()


def test_a_run_is_not_deleted_for_want_of_tensorboard(tmp_path, digits, monkeypatch):
    metrics = aevb.Trainer(options(tmp_path), dataset=digits).fit()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="TensorBoard is missing"):
        aevb.Trainer(options(tmp_path, tensorboard=True, overwrite=True), dataset=digits).fit()
    assert lines(tmp_path / "run")[-1] == metrics


def test_lines_where_there_is_no_terminal(tmp_path, digits, capsys):
    metrics = aevb.Trainer(options(tmp_path, progress=True), dataset=digits).fit()
    *_, line = capsys.readouterr().err.splitlines()
    terms = (metrics[f"train_{name}"] for name in ("elbo", "log_likelihood", "kl"))
    start = "epoch 2/2, ELBO {:.2f} (log-likelihood {:.2f}, KL {:.2f}), test {:.2f}, ".format(
        *terms, metrics["test_elbo"]
    )
    assert line.startswith(start)
    assert line.endswith(" images/s, 00:00 left")


def test_a_bar_on_a_terminal(tmp_path, digits, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    aevb.Trainer(options(tmp_path, progress=True), dataset=digits).fit()
    bar = capsys.readouterr().err
    for text in ("epoch 2/2: 100%", "200/200", "images/s", "ELBO -", "log-likelihood", "KL", "test -"):
        assert text in bar


def test_deterministic_mode_ends_with_the_run(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path, deterministic=True), dataset=digits)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    trainer.fit()
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_test_images_that_are_not_finite_are_named(tmp_path, digits, monkeypatch):
    """Of which the last step's loss knew nothing."""
    trainer = aevb.Trainer(options(tmp_path, epochs=1), dataset=digits)

    def spoil(*_):
        if trainer.step == 1:  # within the last step
            with torch.no_grad():
                trainer.model.encoder[2].weight[5] = 0
                trainer.model.encoder[2].bias[5] = 100.0

    trainer.optimizer.register_step_post_hook(spoil)
    sentence = r"the test ELBO is -inf after step 2: the KL divergence of latent dimension 2 is inf .*, of test image 0"
    with pytest.raises(
        FloatingPointError, match=f"training stopped because {sentence}; the checkpoint in .* of step 0"
    ):
        trainer.fit()


def test_a_users_deterministic_mode_is_left_alone(tmp_path, digits):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for deterministic in (False, True):
            config = options(tmp_path, deterministic=deterministic, overwrite=True, epochs=1)
            aevb.Trainer(config, dataset=digits).fit()
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_criterion_of_ones_own_is_the_one_reported(tmp_path, digits):
    trainer = aevb.Trainer(options(tmp_path, learning_rate=1e-30, batch_size=100), dataset=digits)
    plain = trainer.train_epoch()
    trainer.criterion = aevb.FusedELBO(free_bits=0.5, beta=4.0)
    trainer.epoch = 0
    other = trainer.train_epoch()
    assert trainer.criterion.beta == 4.0
    assert dataclasses.astuple(other) == pytest.approx(dataclasses.astuple(plain), rel=1e-5)
    trainer.criterion = aevb.FusedELBO(estimator="iwae", num_samples=3)
    trainer.epoch = 0
    bound = trainer.train_epoch()
    assert math.isnan(bound.log_likelihood), "a bound has no such term"
    assert bound.elbo > plain.elbo


def test_the_model_is_evaluated_in_eval_mode(tmp_path, digits):
    model = aevb.VAE(64, 16, 3)
    model.encoder[1] = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Dropout(0.5))
    trainer = aevb.Trainer(options(tmp_path), model=model, dataset=digits)
    assert trainer.evaluate() == trainer.evaluate()
    assert model.training


def test_layers_that_share_weights_are_saved(tmp_path, digits):
    model = aevb.VAE(64, (16, 16, 16), 3)
    model.encoder[4].weight = model.encoder[2].weight
    aevb.Trainer(options(tmp_path), model=model, dataset=digits).fit()
    assert torch.equal(*(load_file(tmp_path / "run/model.safetensors")[f"encoder.{i}.weight"] for i in (2, 4)))


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda t: t.evaluate(0), "images is 0; expected at least 1"),
        (lambda t: t.evaluate(part="validation"), "part is 'validation'; expected 'test', which digits has"),
        (lambda t: aevb.TrainConfig(epochs=1.5), r"epochs is 1.5; expected a whole number"),
        (lambda t: aevb.TrainConfig.of({"hidden_dims": None}, "x"), "x has an option of another type"),
        (
            lambda t: aevb.Trainer(dataclasses.replace(t.config, validation=0.2), dataset=t.dataset),
            "has no validation im",
        ),
    ],
)
def test_sentences(tmp_path, digits, ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(aevb.Trainer(options(tmp_path), dataset=digits))


def test_the_names_of_the_options_are_those_there_are():
    """Types have to be written out; what they name is elsewhere."""
    assert _choices()["estimator"] == tuple(ESTIMATORS)
    assert _choices()["likelihood"] == tuple(REGISTRY)
    assert _choices()["optimizer"] == tuple(OPTIMIZERS)
    assert _choices()["binarize"] == ("auto", *BINARIZATIONS)


def test_there_is_no_best_epoch_without_validation(tmp_path, digits):
    aevb.Trainer(options(tmp_path), dataset=digits).fit()
    with pytest.raises(FileNotFoundError, match=r"has no best.safetensors: no validation images said"):
        aevb.Trainer.load(tmp_path / "run", best=True)


def test_images_on_the_disk_are_evaluated_as_those_in_memory(tmp_path, monkeypatch):
    """In the file's order: but for the order of sums, and the bits, which are the row's."""
    images = load("digits").train_images[:500].numpy()
    np.save(tmp_path / "images.npy", (images > 8).astype(np.uint8) * 255)
    config = options(tmp_path, data=str(tmp_path / "images.npy"), binarize="threshold", validation=0.2, batch_size=30)
    in_memory = aevb.Trainer(config)
    monkeypatch.setattr("aevb.data.arrays.MAPPED_ABOVE", 0)
    on_disk = aevb.Trainer(config)
    assert isinstance(on_disk.dataset.test_images, aevb.data.MappedImages)
    for part in ("test", "validation"):
        expected = dataclasses.astuple(in_memory.evaluate(part=part))
        assert dataclasses.astuple(on_disk.evaluate(part=part)) == pytest.approx(expected)
    assert dataclasses.astuple(on_disk.evaluate(7)) == pytest.approx(dataclasses.astuple(in_memory.evaluate(7)))
    before = on_disk.evaluate(part="validation").elbo
    assert on_disk.fit()["validation_elbo"] > before + 1
