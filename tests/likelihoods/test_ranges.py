"""Values that are not what they are taken for are said: at the first eager call on a CPU, at each, or never."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from conftest import rand, randn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import aevb
from aevb.likelihoods import values as ranges

B, D = 6, 12
X, LOGITS, PROBS, KL = rand(1, B, D), 2 * randn(2, B, D), 0.1 + 0.8 * rand(3, B, D), rand(4, B)
BITS = (X < 0.4).float()
LINEAR = aevb.LinearLogits(randn(5, B, 7), randn(6, D, 7))


@pytest.fixture(autouse=True)
def no_function_was_called(monkeypatch, functions_were_called_before):
    monkeypatch.setattr(ranges, "_looked", set())


# What is given; the options; what is said.
WRONG = {
    "0..255": ((LOGITS, 255 * X), {}, r"a Bernoulli target lies in \[0, 1\]\. Of 0\.\.255 it is x / 255"),
    "[-1, 1]": ((LOGITS, 2 * X - 1), {}, r"lies in \[0, 1\]\. Of \[-1, 1\] it is \(x \+ 1\) / 2"),
    "standardized": ((LOGITS, (X - 0.1307) / 0.3081), {}, r"x\[\d, \d+\] is .*lies in \[0, 1\]"),
    "NaN": ((LOGITS, X.where(X < 0.9, torch.nan)), {}, "is nan; a Bernoulli target"),
    "bytes without their scale": ((LOGITS, (255 * X).byte()), {"x_scale": 1.0}, "times x_scale=1.0; a Bernoulli"),
    "a scale of what is scaled": ((LOGITS, 255 * X), {"x_scale": 1.0}, "times x_scale=1.0; a Bernoulli target"),
    "swapped": ((X, LOGITS), {}, r"the two may be swapped\. Expected criterion\(recon, x, \.\.\.\)"),
    "swapped, bits": ((BITS, LOGITS), {}, "the two may be swapped"),
    "swapped, linear": ((LINEAR, LOGITS), {}, "a Bernoulli target"),
    "logits for probabilities": (
        (LOGITS, X),
        {"from_probs": True},
        r"a probability lies in \[0, 1\]. For",
    ),
    "Gaussian, NaN": ((LOGITS, X.where(X < 0.9, torch.nan)), {"likelihood": "gaussian"}, "a Gaussian target is finite"),
    "negative beta, a tensor": ((LOGITS, X), {"beta": torch.tensor(-1.0)}, "beta is -1.0; expected a number from 0 up"),
    "NaN beta, a tensor": ((LOGITS, X), {"beta": torch.tensor(torch.nan)}, "beta is nan; expected a number from 0 up"),
}
ODD = {
    "probabilities for logits": ((PROBS, X), {}, r"every logit lies in \[0, 1\] .*leave it out"),
    "sigmoid's": ((LOGITS.sigmoid(), BITS), {}, r"every logit lies in \[0, 1\]"),
    "swapped probabilities": ((BITS, PROBS), {"from_probs": True}, "recon holds nothing but 0 and 1, and x neither"),
    "0..255 beside a sigmoid": (
        (LOGITS, 255 * X),
        {"likelihood": "gaussian", "sigmoid_means": True},
        r"x lies in .*the means in 0\.\.1\. Of 0\.\.255 it is x / 255",
    ),
    "[-1, 1] beside a sigmoid": (
        (aevb.GaussianOutput(LOGITS, 0.3), 2 * X - 1),
        {"likelihood": "gaussian", "sigmoid_means": True},
        r"Of \[-1, 1\] it is",
    ),
}
RIGHT = {
    "soft": ((LOGITS, X), {}),
    "bits": ((LOGITS, BITS.bool()), {}),
    "bytes": ((LOGITS, (255 * X).byte()), {"x_scale": 1 / 255}),
    "floats of 0..255": ((LOGITS, 255 * X.round()), {"x_scale": 1 / 255}),
    "probabilities": ((PROBS, X), {"from_probs": True}),
    "certain probabilities": ((BITS, X.round()), {"from_probs": True}),
    "a new decoder's logits": ((torch.zeros(B, D), X), {}),
    "linear": ((LINEAR, X), {}),
    "half": ((LOGITS.half(), X.half()), {}),
    "gaussian": ((LOGITS, 255 * X), {"likelihood": "gaussian"}),
    "gaussian, noisy": ((LOGITS, X + 0.1 * randn(7, B, D)), {"likelihood": "gaussian", "sigmoid_means": True}),
    "no beta": ((LOGITS, X), {"beta": torch.tensor(0.0)}),
    "infinite logits": ((LOGITS * 1e38 * 1e38, BITS), {}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_values_raise(kind):
    """At the first call, and again, until they are right; with False they are computed with."""
    arguments, options, sentence = WRONG[kind]
    criterion = aevb.FusedELBO(**options)
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            criterion(*arguments, kl=KL)
    with pytest.raises(ValueError, match=sentence):
        aevb.FusedELBO(**options, validate_args=True)(*arguments, kl=KL)
    assert aevb.FusedELBO(**options, validate_args=False)(*arguments, kl=KL).shape == ()


@pytest.mark.parametrize("kind", ODD)
def test_odd_values_warn_once(kind):
    arguments, options, sentence = ODD[kind]
    criterion = aevb.FusedELBO(**options)
    with pytest.warns(UserWarning, match=sentence) as said:
        criterion(*arguments, kl=KL)
    assert said[0].filename == __file__
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*arguments, kl=KL)
        aevb.FusedELBO(**options, validate_args=False)(*arguments, kl=KL)


@pytest.mark.parametrize("validate_args", [None, True])
@pytest.mark.parametrize("kind", RIGHT)
def test_right_values_are_not_spoken_of(kind, validate_args):
    arguments, options = RIGHT[kind]
    if kind == "infinite logits" and validate_args:
        pytest.skip("which True minds")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aevb.FusedELBO(**options, validate_args=validate_args)(*arguments, kl=KL)


def test_none_looks_once_and_true_at_each_call():
    once, each = aevb.FusedELBO(), aevb.FusedELBO(validate_args=True)
    for criterion in (once, each):
        criterion(LOGITS, X, kl=KL)
    wrong = 3 * X
    once(LOGITS, wrong, kl=KL)
    for _ in range(2):
        with pytest.raises(ValueError, match="a Bernoulli target"):
            each(LOGITS, wrong, kl=KL)
    with pytest.raises(ValueError, match=r"recon\[2, 3\] is inf; a logit is finite"):
        each(LOGITS.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(torch.inf)), X, kl=KL)
    with pytest.raises(ValueError, match=r"recon\[2, 3\] is nan; a probability lies in"):
        aevb.FusedELBO(from_probs=True, validate_args=True)(
            PROBS.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(torch.nan)), X, kl=KL
        )
    with pytest.raises(ValueError, match=r"recon\[2, 3\] is nan; a Gaussian's mean is finite"):
        aevb.FusedELBO(likelihood="gaussian", validate_args=True)(
            PROBS.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(torch.nan)), X, kl=KL
        )


def test_copies_look_for_themselves_or_have_looked():
    criterion = aevb.FusedELBO()
    criterion(LOGITS, X, kl=KL)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        copied(LOGITS, 3 * X, kl=KL)
    assert aevb.FusedELBO().state_dict() == {}


@pytest.mark.parametrize("beta", [-1, -1e-9, float("nan"), float("inf")])
def test_a_negative_beta(beta):
    for make in (
        lambda: aevb.FusedELBO(beta),
        lambda: setattr(aevb.FusedELBO(), "beta", beta),
        lambda: aevb.elbo(rand(1, 3, 6), rand(2, 6), beta),
        lambda: aevb.importance_weighted_bound(rand(1, 3, 6), rand(2, 3, 6), beta),
    ):
        with pytest.raises(ValueError, match=f"beta is {re.escape(str(beta))}; expected a number from 0 up"):
            make()


# ---- functions ------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "bernoulli_log_prob": lambda x, **options: aevb.bernoulli_log_prob(LOGITS, x, **options),
    "linear_bernoulli_log_prob": lambda x, **options: aevb.linear_bernoulli_log_prob(*LINEAR, x, **options),
    "gaussian_log_prob": lambda x, **options: aevb.gaussian_log_prob(LOGITS, x, **options),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function):
    call = FUNCTIONS[function]
    wrong = X.where(X < 0.9, torch.nan)
    call(wrong, validate_args=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="is nan"):
            call(wrong)
    call(X)
    call(wrong)
    with pytest.raises(ValueError, match="is nan"):
        call(wrong, validate_args=True)


def test_probabilities_given_to_the_function_of_logits():
    with pytest.warns(UserWarning, match="every logit lies in"):
        aevb.bernoulli_log_prob(PROBS, X)


# ---- where nobody looks ---------------------------------------------------------------------------------------------


def test_not_in_graphs_which_never_recompile():
    torch._dynamo.reset()  # other tests' graphs count towards its limit
    criterion = aevb.FusedELBO()
    counter = CompileCounter()
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    wrong = 255 * X
    compiled(LOGITS, wrong, kl=KL)
    with pytest.raises(ValueError, match="a Bernoulli target"):
        criterion(LOGITS, wrong, kl=KL)
    criterion(LOGITS, X, kl=KL)  # which has looked now
    compiled(LOGITS, wrong, kl=KL)
    function = torch.compile(aevb.bernoulli_log_prob, backend=counter, fullgraph=True)
    function(LOGITS, wrong)
    aevb.bernoulli_log_prob(LOGITS, X)
    function(LOGITS, wrong)
    torch.compile(aevb.FusedELBO(validate_args=True), backend="aot_eager", fullgraph=True)(LOGITS, wrong, kl=KL)
    assert counter.frame_count == 2


@pytest.mark.parametrize("validate_args", [None, True])
def test_not_under_torch_func_nor_on_fakes(validate_args):
    wrong, criterion = 255 * X, aevb.FusedELBO(validate_args=validate_args)

    def loss(recon, x, kl):
        return criterion(recon, x, kl=kl)

    torch.func.vmap(loss)(LOGITS, wrong, KL)
    torch.func.grad(loss)(LOGITS, wrong, KL)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (LOGITS, wrong, KL)]
        loss(*fakes)
        aevb.bernoulli_log_prob(*fakes[:2], validate_args=validate_args)
    loss(*(t.to("meta") for t in (LOGITS, wrong, KL)))
    graph = torch.fx.experimental.proxy_tensor.make_fx(loss)(LOGITS, wrong, KL)
    assert not any("aminmax" in str(node.target) for node in graph.graph.nodes)


def test_it_is_exported():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = aevb.FusedELBO()

        def forward(self, recon, x, kl):
            return self.criterion(recon, x, kl=kl)

    exported = torch.export.export(Loss(), (LOGITS, X, KL))
    assert not any("aminmax" in str(node.target) for node in exported.graph.nodes)


# ---- a model that is asked ------------------------------------------------------------------------------------------

ASK = {
    "reconstruct": lambda m, x: m.reconstruct(x),
    "embed": lambda m, x: m.embed(x),
    "traverse": lambda m, x: m.traverse(x, steps=2),
    "interpolate": lambda m, x: m.interpolate(X, x, steps=2),
    "impute": lambda m, x: m.impute(x, torch.ones(D, dtype=torch.bool), steps=1, num_samples=2),
    "impute, clean": lambda m, x: m.impute(X, X < 0.5, steps=1, num_samples=2, clean=x),
    "denoise": lambda m, x: m.denoise(x, sigma=0.1, steps=1, num_samples=2),
    "log_marginal_likelihood": lambda m, x: aevb.log_marginal_likelihood(m, x, 3),
    "kl_per_dimension": lambda m, x: aevb.diagnostics.kl_per_dimension(m, x),
    "ais": lambda m, x: aevb.diagnostics.annealed_importance_sampling(m, x, num_temperatures=2, num_chains=2),
}


@pytest.mark.parametrize("times", [lambda x: 255 * x, lambda x: 4 * x - 2])
@pytest.mark.parametrize("question", ASK)
def test_a_models_pixels(question, times):
    ask = ASK[question]
    bernoulli, gaussian = aevb.VAE(D, 5, 2), aevb.VAE(D, 5, 2, likelihood="gaussian")
    bits = X.round() if question == "impute, clean" else X
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(bernoulli, bits)
        ask(gaussian, X)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(x|b|clean)\[\d, \d+\] is .*; the model's pixels lie in \[0, 1\]"):
            ask(bernoulli, times(X))
    with pytest.warns(UserWarning, match=r"(x|b|clean) lies in .*, and the model's pixels in 0\.\.1"):
        ask(gaussian, times(X))


def test_what_is_missing_may_be_anything():
    observed = X > 0.5
    aevb.VAE(D, 5, 2).impute(X.where(observed, -77.0), observed, steps=1, num_samples=2)


def test_a_gpus_values_are_not_looked_at_unless_asked():
    """The question, whose answer is always no, costs its calls next to nothing."""

    class OnGpu:
        is_cpu = False

    assert not aevb.FusedELBO()._is_wanted(OnGpu())
    assert aevb.FusedELBO(validate_args=True)._is_wanted(OnGpu())
    assert not ranges.is_wanted("bernoulli_log_prob", None, OnGpu())
    assert ranges.is_wanted("bernoulli_log_prob", True, OnGpu())
    assert ranges.is_wanted("bernoulli_log_prob", None, X)
