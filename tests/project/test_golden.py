"""The bits, numbers and runs of tests/golden: of version 55b551f, or as CHANGELOG.md says that they were changed."""

import json
import shutil

import golden_cases
import golden_runs
import make_golden
import pytest
import torch
from make_golden import FIRST, RUN, WORDS, Differences, Digests

import aevb
from aevb.training.checkpoint import Checkpoints, unpack


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The calls are small. And by the kernels, whatever the machine."""
    monkeypatch.setattr(aevb.ops.autograd, "_reference_on", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path):
    """A copy of the run of another version."""
    return shutil.copytree(RUN, tmp_path / RUN.name)


def assert_held(numbers):
    """That these numbers are those held."""
    held = make_golden.read_numbers()
    assert numbers.keys() <= held.keys(), "`python tests/make_golden.py` adds what is not held yet"
    wrong = make_golden.wrong_numbers(numbers, held)
    if wrong:
        pytest.fail(make_golden.told(wrong), pytrace=False)


# ---- bits -----------------------------------------------------------------------------------------------------------


def test_bits():
    _, held = make_golden.read_bits()
    differences = Differences.between(make_golden.digests_of(golden_cases.calls()), held)
    if any(differences):
        pytest.fail(str(differences), pytrace=False)


def test_every_op_is_held():
    """In every dtype, where it takes more than one."""
    _, held = make_golden.read_bits()
    of_an_op = [group.partition(":")[0] for group in held]
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas()]
    names = {name.removeprefix("aevb::") for name in schemas if name.startswith("aevb::")}
    # An op's kernel has its name and "_forward". Of products numbers are held, and `empty` has none.
    products = {name for name in names if name.startswith("linear_log_prob")}
    of_a_gpu = {"split_bfloat16", "add_pieces", "elbo_terms", "adam_"}
    expected = {name for name in names if f"{name}_forward" not in names} - products - of_a_gpu - {"empty"}
    # What is one op for all likelihoods is held by the names of its two first ones.
    general = {name for name in expected if name.startswith("log_prob")}
    expected -= general
    expected |= {f"bernoulli_{name}" for name in general}
    expected |= {f"gaussian_{name}" for name in general if not name.endswith("_")}
    assert expected <= {name.split()[0] for name in of_an_op}
    layers = ("sparse", "bias_activation", "activation_backward")
    for name in expected:
        dtypes = {group.split()[1] for group in of_an_op if group.split()[0] == name and " " in group}
        assert not dtypes or name.startswith(layers) or dtypes == {"float32", "bfloat16", "float16"}, name


def test_what_is_public_is_held():
    _, held = make_golden.read_bits()
    names = {group.split()[0].rstrip(":") for group in (*held, *make_golden.read_numbers())}
    of_tensors = {
        *("FusedELBO", "bernoulli_log_prob", "binarize", "elbo", "gaussian_kl", "gaussian_log_prob", "linear"),
        *("importance_weighted_bound", "linear_bernoulli_log_prob", "mix_seed", "sample_gaussian"),
        "sample_gaussian_log_ratio",
    }
    assert of_tensors < set(aevb.__all__)
    assert {f"aevb.{name}" for name in of_tensors} <= names


def test_differences_are_told_apart():
    """A change of one bit, of inputs, and of what is called."""
    call = golden_cases.Call("op float32: ordinary", (torch.tensor([1.0]), 0.5), (torch.tensor([2.0, float("nan")]),))
    held = make_golden.digests_of([call])
    other_nan = torch.tensor([0x40000000, -0x3FFFFF], dtype=torch.int32).view(torch.float32)
    assert other_nan.isnan().tolist() == [False, True]
    assert not any(Differences.between(make_golden.digests_of([call._replace(results=(other_nan,))]), held))

    bits = torch.tensor([0x40000001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for results in ((bits,), (call.results[0].unsqueeze(0),), (call.results[0].double(),), (*call.results, 1)):
        differences = Differences.between(make_golden.digests_of([call._replace(results=results)]), held)
        assert differences == ([call.group], [], [], [])
        assert "1 have other bits than those in tests/golden" in str(differences)
        assert 'a line in CHANGELOG.md with the words "bits changed"' in str(differences)
        assert call.group in str(differences)
    differences = Differences.between(make_golden.digests_of([call._replace(inputs=(0.0,), results=(bits,))]), held)
    assert differences == ([], [call.group], [], [])
    assert "which says nothing of bits" in str(differences)
    assert Differences.between({"new": Digests("", "")}, held) == ([], [], ["new"], [call.group])


def test_a_change_has_its_line():
    """The reason for which results are as they are is a line of the changelog."""
    reason, _ = make_golden.read_bits()
    assert reason == FIRST or (WORDS in reason and make_golden.in_changelog(reason)), make_golden.ADVICE


def test_no_change_without_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(make_golden, "CHANGELOG", tmp_path / "CHANGELOG.md")
    make_golden.CHANGELOG.write_text(
        "* Exponentials are rounded; bits changed,\n  since it is faster.\n* Old: bits changed."
    )
    line = "Exponentials are rounded; bits changed, since it is faster."
    assert make_golden.objection(line, FIRST, True) is None
    assert make_golden.objection(None, FIRST, False) is None
    assert "leave the reason out" in make_golden.objection(line, FIRST, False)
    assert make_golden.objection(None, FIRST, True) == make_golden.ADVICE
    for reason in ("Exponentials are rounded", "Something else; bits changed."):
        assert 'expected a line of CHANGELOG.md that has the words "bits changed"' in make_golden.objection(
            reason, FIRST, True
        )
    assert "that of the last change" in make_golden.objection("Old: bits changed.", "Old: bits changed.", True)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_numbers():
    assert_held(make_golden.numbers_of_calls())


def test_numbers_that_are_off():
    held = {"f float32": [[1.0, -200.0], []], "f bfloat16": [[1.0]]}
    assert make_golden.wrong_numbers({"f float32": [[1.0019, -200.0019], []], "f bfloat16": [[1.015]]}, held) == {}
    for numbers in ([[1.0021, -200.0], []], [[float("nan"), -200.0], []], [[1.0], []], [[1.0, -200.0]]):
        wrong = make_golden.wrong_numbers({"f float32": numbers}, held)
        assert wrong.keys() == {"f float32"}
        assert "f float32: off by" in make_golden.told(wrong)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_training():
    assert_held(make_golden.numbers_of_training())


def test_what_a_run_of_another_version_answers_and_ends_with(run):
    assert_held(make_golden.numbers_of_run(run))


def test_a_run_of_another_version_loads(run):
    last = golden_runs.metrics(run)[-1]
    trainer = aevb.Trainer.load(run)
    assert (trainer.epoch, trainer.step) == (last["epoch"], last["step"]) == (2, 54)
    assert trainer.evaluate().elbo == pytest.approx(last["test_elbo"], rel=1e-5)
    assert trainer.evaluate(part="validation").kl == pytest.approx(last["validation_kl"], rel=1e-5)
    for name in ("model", "best"):
        model = aevb.VAE.load(run / f"{name}.safetensors")
        assert (model.data_dim, model.hidden_dims, model.latent_dim) == (64, (8,), 2)


def test_the_run_goes_on_from_the_middle_of_an_epoch(run):
    """From a checkpoint that holds an epoch's steps so far, to where a run that nothing stopped ends."""
    data, wrong = Checkpoints(run).read()
    assert not wrong
    begun = unpack(data, "").numbers
    assert (begun["epoch"], begun["step"], begun["steps_done"]) == (2, 60, 6)
    before = golden_runs.metrics(run)
    golden_runs.go_on(run)
    after = golden_runs.metrics(run)
    assert after[:2] == before

    options = json.loads((RUN / "config.json").read_text())
    whole = run.with_name("whole")
    aevb.Trainer(aevb.TrainConfig(**{**options, "out": str(whole), "progress": False})).fit()
    assert len(after) == len(golden_runs.metrics(whole)) == 4
    for line, expected in zip(after, golden_runs.metrics(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_the_run_says_nothing_of_where_it_was_made():
    assert json.loads((RUN / "config.json").read_text())["out"] == RUN.name
    for path in RUN.rglob("*"):
        assert path.is_dir() or not any(root in path.read_bytes() for root in (b"/home", b"/root", b"/tmp"))
