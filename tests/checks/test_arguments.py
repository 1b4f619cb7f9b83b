"""Options and arguments as scripts and sweeps give them: taken where the meaning is plain, or named in a sentence."""

import dataclasses
import decimal
import enum
import inspect
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Literal, get_type_hints

import numpy as np
import pytest
import torch

import aevb
from aevb.checks.arguments import converted, takes_plain_values
from aevb.cli import latent, main, options, restore
from aevb.data import Dataset, load
from aevb.inference import ais, latent_space
from aevb.inference import imputation as restoration
from aevb.inference import noise_models as observations


class Estimator(enum.Enum):
    STL = "stl"


class Likelihood(str, enum.Enum):
    BERNOULLI = "bernoulli"


TAKEN = [
    *[("epochs", value, 3) for value in (np.int64(3), np.uint8(3), 3.0, np.float32(3), "3", " 3 ", "3e0")],
    *[("epochs", value, 3) for value in (torch.tensor(3), np.array(3), torch.tensor(3.0), decimal.Decimal(3))],
    ("epochs", "1e2", 100),
    ("seed", "-9223372036854775808", -(2**63)),
    ("seed", 2**53 + 1, 2**53 + 1),
    ("seed", str(2**53 + 1), 2**53 + 1),
    *[("learning_rate", value, 0.5) for value in ("0.5", "5e-1", np.float32(0.5), np.float64(0.5), torch.tensor(0.5))],
    ("learning_rate", 1, 1.0),
    ("learning_rate", np.int32(1), 1.0),
    *[("clip_norm", value, None) for value in (None, "none", "None", "null")],
    ("clip_norm", np.float64(2), 2.0),
    ("patience", "3", 3),
    *[("hidden_dims", value, (8,)) for value in (8, "8", np.int64(8), np.array(8), [8], np.array([8]), 8.0, (8,))],
    *[("hidden_dims", value, (64, 32)) for value in ([64, 32], "64,32", "64 32", "[64, 32]", "(64, 32)")],
    *[("hidden_dims", value, (64, 32)) for value in (torch.tensor([64, 32]), range(64, 31, -32), ["64", np.int8(32)])],
    *[("overwrite", value, True) for value in (True, np.bool_(True), torch.tensor(True), 1, "true", "True", "yes")],
    *[("overwrite", value, False) for value in (False, np.bool_(False), 0, "false", "no", "0")],
    ("out", pathlib.Path("a") / "b", "a/b"),
    ("out", "none", "none"),
    ("data", pathlib.Path("d.npy"), "d.npy"),
    ("data", np.str_("d.npy"), "d.npy"),
    ("data", pathlib.Path("digits"), "./digits"),
    ("data", pathlib.Path("./mnist"), "./mnist"),
    ("data", "digits", "digits"),
    ("device", torch.device("cuda", 1), "cuda:1"),
    ("estimator", Estimator.STL, "stl"),
    ("estimator", np.str_("stl"), "stl"),
    ("likelihood", Likelihood.BERNOULLI, "bernoulli"),
    ("variance", "0.05", 0.05),
    ("variance", np.float32(0.5), 0.5),
    ("variance", np.str_("shared"), "shared"),
]
REFUSED = [
    *[("epochs", value, "a whole number") for value in (3.2, np.float64(3.7), "3.2", torch.tensor(3.2), True, None)],
    *[("epochs", value, "a whole number") for value in ("many", "", [3], np.nan, np.inf, 1j, b"3", np.bool_(True))],
    *[("seed", value, "a whole number") for value in (3.2, 3.7, "0.5")],
    ("seed", np.uint64(2**63), "a 64-bit signed integer"),
    *[
        ("learning_rate", value, "a number")
        for value in ("fast", None, True, [1e-3], 1j, np.array([1.0, 2.0]), 10**400)
    ],
    ("learning_rate", np.nan, "a positive number"),
    *[("batch_size", value, "a whole number") for value in (0.5, "a", torch.zeros(2))],
    *[("hidden_dims", value, "whole numbers: one, or a list") for value in ([3.5], None, {8, 9}, {8: 9}, [[8]], True)],
    *[("hidden_dims", value, "whole numbers: one, or a list") for value in (np.ones((2, 2)), "a few", [None], [True])],
    *[("hidden_dims", value, "the units of each layer") for value in ((), "", [0], np.array([], int))],
    *[("overwrite", value, "True or False") for value in ("maybe", 2, None, [], 0.5)],
    *[("out", value, "a text or a path") for value in (3, True, ["a"], b"a")],
    *[("estimator", value, "one of 'sgvb-b', 'sgvb-a'") for value in ("elbo", 3, None, pathlib.Path("stl"))],
    *[("variance", value, "'learned', 'shared' or a number") for value in ("mine", True, None, [1.0])],
    ("variance", "-1", "'learned', 'shared' or a positive number"),
]


@pytest.mark.parametrize(("name", "value", "expected"), TAKEN, ids=lambda value: repr(value)[:40])
def test_what_is_plain_is_taken(name, value, expected):
    more = {"likelihood": "gaussian"} if name == "variance" else {}
    config = aevb.TrainConfig(**{name: value, **more})
    changed = dataclasses.replace(aevb.TrainConfig(**more), **{name: value})
    for found in (config, changed):
        assert getattr(found, name) == expected
        assert type(getattr(found, name)) is type(expected)
        assert json.loads(json.dumps(dataclasses.asdict(found)))
    assert aevb.TrainConfig.of(json.loads(json.dumps(dataclasses.asdict(config))), "config.json") == config
    assert hash(config) == hash(changed)


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED, ids=lambda value: repr(value)[:40])
def test_what_is_not_plain_is_a_sentence_that_names_the_option(name, value, expected):
    for make in (
        lambda: aevb.TrainConfig(**{name: value}),
        lambda: dataclasses.replace(aevb.TrainConfig(), **{name: value}),
    ):
        with pytest.raises(ValueError, match=name) as error:
            make()
        text = str(error.value)
        assert text.startswith(f"{name} is ")
        assert f"; expected {expected}" in text
        assert "\n" not in text
    with pytest.raises(ValueError, match=rf"config.json.*{name} is "):
        aevb.TrainConfig.of({name: value}, "config.json")


def test_every_option_is_held_to_its_type():
    """Those of the future too: of no type is anything taken that is not of it."""

    class Thing:
        """Nothing that an option could be."""

    for field in dataclasses.fields(aevb.TrainConfig):
        with pytest.raises(ValueError, match=rf"{field.name} is .*Thing.*; expected "):
            aevb.TrainConfig(**{field.name: Thing()})


def test_a_run_of_what_a_sweep_gives(tmp_path):
    """From its options to what it leaves, and on."""
    np.save(tmp_path / "d.npy", np.random.default_rng(0).integers(0, 256, (60, 16)).astype(np.uint8))
    config = aevb.TrainConfig(
        data=tmp_path / "d.npy",
        out=tmp_path / "run",
        epochs=np.int64(1),
        hidden_dims=np.array([6]),
        latent_dim=torch.tensor(2),
        learning_rate="1e-2",
        batch_size=np.int32(20),
        validation=np.float64(0.25),
        num_samples="2",
        progress=np.bool_(False),
    )
    aevb.Trainer(config).fit()
    assert aevb.Trainer.load(tmp_path / "run").config == config
    trainer = aevb.Trainer.resume(tmp_path / "run", epochs=np.float32(2), threads="1")
    assert trainer.fit()["epoch"] == 2
    with pytest.raises(ValueError, match=r"epochs is 2.5; expected a whole number"):
        aevb.Trainer.resume(tmp_path / "run", epochs=2.5)
    options = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**options, "seed": 0.5}))
    with pytest.raises(ValueError, match=r"config.json has an option of another type than aevb's: seed is 0.5; expect"):
        aevb.Trainer.load(tmp_path / "run")


# ---- functions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer():
    return aevb.Trainer(aevb.TrainConfig(hidden_dims=8, latent_dim=2, validation=0.1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    options = {"epochs": 1, "hidden_dims": 8, "latent_dim": 2, "threads": 1, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aevb.training.pictures.draw", lambda *_: {})
        aevb.Trainer(aevb.TrainConfig(out=path, **options)).fit()
    return path


# Every whole number that a function takes: none is cut.
WHOLE = {
    aevb.diagnostics.kl_per_dimension: ["batch_size"],
    aevb.diagnostics.active_units: ["batch_size"],
    aevb.diagnostics.mutual_information: ["num_samples", "seed", "batch_size"],
    aevb.diagnostics.posterior_collapse: ["num_samples", "seed", "batch_size"],
    aevb.diagnostics.annealed_importance_sampling: [
        *("num_chains", "num_temperatures", "num_leapfrog", "seed", "batch_size")
    ],
    observations.flip_bits: ["seed"],
    observations.add_gaussian: ["seed"],
    observations.random_mask: ["seed"],
    restoration.restore: ["steps", "num_samples", "seed"],
    restoration.refine: ["steps"],
    options.EvaluateOptions: ["num_samples", "images", "seed"],
    aevb.VAE.embed: ["num_samples", "seed"],
    aevb.VAE.impute: ["steps", "num_samples", "seed"],
    aevb.VAE.denoise: ["steps", "num_samples", "seed"],
    aevb.VAE.manifold: ["n"],
    aevb.VAE.traverse: ["dims", "steps"],
    aevb.VAE.interpolate: ["steps"],
    aevb.Trainer.evaluate: ["images"],
    aevb.Trainer.order: ["epoch"],
    aevb.Trainer.noise_seeds: ["epoch"],
    aevb.data.load: ["split_seed"],
    aevb.data.from_torch: ["split_seed"],
    aevb.data.epoch_order: ["seed"],
    aevb.data.batches: ["batch_size"],
    options.ResumeOptions: ["epochs", "patience", "threads"],
    options.ReconstructOptions: ["images"],
    options.SampleOptions: ["num", "seed"],
    options.EmbedOptions: ["num_samples", "seed"],
    options.ImputeOptions: ["images", "steps", "num_samples", "seed"],
    options.DenoiseOptions: ["images", "steps", "num_samples", "seed"],
    options.ManifoldOptions: ["num"],
    options.TraverseOptions: ["image", "num_dims", "steps"],
    options.InterpolateOptions: ["pairs", "steps", "seed"],
    options.ReportOptions: ["seed"],
}


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, names in WHOLE.items() for name in names],
    ids=lambda value: getattr(value, "__qualname__", value),
)
def test_no_argument_is_cut_to_a_whole_number(function, name):
    """Nothing else is looked at before."""
    others = {
        parameter: 0.5 if about.annotation == "float" else None
        for parameter, about in inspect.signature(function).parameters.items()
        if parameter != name and about.default is about.empty and about.kind is not about.VAR_KEYWORD
    }
    for value in (3.2, np.float32(3.7), "0.5", torch.tensor(1.5), True):
        with pytest.raises(ValueError, match=rf"^{name} is .*; expected (a )?whole numbers?(: one, or a list)?$"):
            function(**others, **{name: value})


@pytest.mark.parametrize("module", [ais, latent_space, observations, restoration, aevb.data])
def test_every_public_function_is_among_them(module):
    names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    for function in (getattr(module, name) for name in names):
        if inspect.isfunction(function) and function.__module__.startswith(module.__name__):
            parameters = inspect.signature(function).parameters.items()
            whole = {name for name, about in parameters if about.annotation in ("int", "int | None")}
            assert whole <= set(WHOLE.get(function, ())), function.__name__


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *(({"images": 2.5}, "images"), ({"steps": 1.5}, "steps"), ({"num_samples": "a"}, "num_samples")),
        *(({"seed": 0.1}, "seed"), ({"missing": "half"}, "missing")),
    ],
    ids=str,
)
def test_the_options_of_commands(given, name):
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected a"):
        options.ImputeOptions(**given)


def test_every_command_has_its_whole_numbers_among_them():
    for group in vars(options).values():
        if dataclasses.is_dataclass(group) and not group.__subclasses__():
            whole = {field.name for field in dataclasses.fields(group) if field.type in ("int", "int | None")}
            assert whole <= set(WHOLE.get(group, ())), group.__name__


def test_answers_take_what_scripts_give(run, tmp_path):
    np.save(tmp_path / "some.npy", load("digits").test_images[:3].numpy())
    model, some = options.ModelOptions(run), tmp_path / "some.npy"
    asked = options.EmbedOptions(data=some, num_samples=np.int64(2), seed="3", out=tmp_path / "out")
    found = latent.embed(asked, model)
    assert [path.name for path in found.files] == ["latent.npz", "latent.png"]
    assert np.load(found.files[0])["z"].shape == (2, 3, 2)
    output = options.OutputOptions(out=tmp_path / "out", save_array="false")
    few = options.ImputeOptions(data=some, steps=np.int64(2), num_samples=4.0, mask="lower")
    restore.impute(few, output, model)
    asked = options.ReconstructOptions(part=np.str_("test"), images=np.uint8(3))
    model = options.ModelOptions(run, best=np.bool_(False))
    latent.reconstruct(asked, options.OutputOptions(out=tmp_path / "r.npy"), model)
    assert np.load(tmp_path / "r.npy").shape == (297, 64)


def test_equal_numbers_equal_noise(trainer):
    x = trainer.test_x[:5].float()
    expected = trainer.model.embed(x, 2, seed=3).z
    for seed in (np.int64(3), 3.0, "3", torch.tensor(3)):
        assert torch.equal(trainer.model.embed(x, np.int64(2), seed=seed).z, expected)
    assert not torch.equal(trainer.model.embed(x, 2, seed=4).z, expected)
    assert trainer.model.traverse(x, np.array([1, 0]), "3").shape == (5, 2, 3, 64)
    assert trainer.evaluate(np.int64(5)) == trainer.evaluate(5.0) == trainer.evaluate(5)


def test_a_data_sets_sizes_are_numbers_that_json_knows():
    images = torch.zeros(4, 6, dtype=torch.uint8)
    dataset = Dataset("x", np.array([2, 3]), np.int64(9), images, images)
    assert json.dumps([dataset.image_shape, dataset.max_value, dataset.name]) == '[[2, 3], 9, "x"]'
    with pytest.raises(ValueError, match=r"max_value is 9.5; expected a whole number"):
        Dataset("x", (2, 3), 9.5, images, images)


@pytest.mark.parametrize("text", ["3.2", "3.7", "many", "1e3"])
@pytest.mark.parametrize(
    "command",
    [["train", "--seed"], ["train", "--epochs"], ["evaluate", "run", "--num-samples"], ["sample", "run", "--num"]],
)
def test_the_command_line_cuts_nothing(command, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, text])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


# ---- the function that does it ---------------------------------------------------------------------------------------


def test_by_annotations():
    assert converted("x", [np.float32(0.5), "1"], Sequence[float]) == (0.5, 1.0)
    assert converted("x", "b", Literal["a", "b"] | None) == "b"
    assert converted("x", None, tuple[int, ...] | None) is None
    assert converted("x", 3, int | Sequence[int]) == 3
    assert converted("x", [3], int | Sequence[int]) == (3,)
    with pytest.raises(ValueError, match=r"^x is tensor\(..., device='meta'.*\); expected a whole number$"):
        converted("x", torch.zeros((), device="meta"), int)
    with pytest.raises(ValueError, match=r"^x is \[0, 1, .*\.\.\.; expected a whole number$"):
        converted("x", list(range(1000)), int)


def test_what_it_does_not_know_is_left_alone():
    @takes_plain_values
    def function(x: "torch.Tensor | int", path: "str | os.PathLike[str]", n: "int" = 1, *rest: int, **more: int):
        """Its docstring."""
        return x, path, n, rest, more

    path, x = pathlib.Path("a"), torch.tensor(2)
    assert function(x, path, "3", 4.5, m=5.5) == (x, path, 3, (4.5,), {"m": 5.5})
    assert function.__doc__ == "Its docstring."
    assert list(inspect.signature(function).parameters) == ["x", "path", "n", "rest", "more"]
    with pytest.raises(TypeError, match="missing a required argument: 'path'"):
        function(x)


def test_every_type_of_an_option_is_known():
    for name, hint in get_type_hints(aevb.TrainConfig).items():
        assert converted(name, getattr(aevb.TrainConfig(), name), hint) == getattr(aevb.TrainConfig(), name)


MU, PIXELS = torch.zeros(3, 2), torch.rand(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: aevb.VAE(64.5, 8, 2), "data_dim is 64.5; expected a whole number"),
        (lambda: aevb.VAE(64, 8.5, 2), "hidden_dims is 8.5; expected"),
        (lambda: aevb.VAE(64, 8, 2.7), "latent_dim is 2.7; expected a whole number"),
        (lambda: aevb.ConvVAE((8, 8), (4.5,)), r"channels is \(4.5,\); expected whole numbers"),
        (lambda: aevb.ConvVAE((8.5, 8)), r"image_shape is \(8.5, 8\); expected whole numbers"),
        (lambda: aevb.VAE(64, 8, 2).sample(2.5), "n is 2.5; expected a whole number"),
        (lambda: aevb.FusedELBO(num_samples=2.5), "num_samples is 2.5; expected a whole number"),
        (lambda: aevb.FusedELBO("x"), "beta is 'x'; expected a number"),
        (lambda: aevb.sample_gaussian(MU, MU, 2.5), "num_samples is 2.5; expected a whole number"),
        (lambda: aevb.gaussian_kl(MU, MU, 1.5), "groups is 1.5; expected a whole number"),
        (lambda: aevb.log_marginal_likelihood(aevb.VAE(4, 3, 2), PIXELS, 2.5), "num_samples is 2.5; expected a whole"),
    ],
)
def test_models_losses_and_ops_cut_nothing(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_models_losses_and_ops_take_plain_values():
    model = aevb.VAE(np.int64(64), np.array([8, 4]), "2", likelihood="gaussian", variance=np.float32(0.5))
    assert model.options()["hidden_dims"] == (8, 4)
    assert '"data_dim": 64' in model.metadata()["model"]
    assert aevb.VAE(64, [8.0], 2).sample(np.int64(3)).shape == (3, 64)
    assert aevb.FusedELBO("0.5", num_samples="2", estimator="iwae").num_samples == 2
    assert aevb.sample_gaussian(MU, MU, np.int64(2))[0].shape == (2, 3, 2)
