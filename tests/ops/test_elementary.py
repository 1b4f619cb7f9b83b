"""The elementary functions, over all of float32 by a stride and at every edge, against float64."""

import numpy as np
import pytest
import torch

from aevb import _C

ISAS = _C.build_info()["isas"].split(", ")
QUIET_NAN, SIGNALLING_NAN = 0x7FC00000, 0x7F800001


def elementary(name, x):
    return torch.ops.aevb.elementary(name, torch.from_numpy(x)).numpy()


def floats(bits):
    return np.asarray(bits, np.uint64).astype(np.uint32).view(np.float32)


def around(*values, steps=200):
    """The floats around each value: `steps` to each side."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.int64)
    return floats((bits[:, None] + np.arange(-steps, steps + 1)).ravel() & 0xFFFFFFFF)


NANS = floats([sign | p for sign in (0, 0x80000000) for p in (QUIET_NAN, SIGNALLING_NAN, 0x7FFFFFFF, 0x7FA55555)])
EDGES = np.concatenate(
    [
        NANS,
        floats([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF]),  # +-0, +-inf, +-max
        floats(np.arange(1, 2000)),  # subnormals
        floats(0x80000000 + np.arange(1, 2000)),
        around(2.0**-126, -(2.0**-126), 2.0**-125, 2.0**-24, -(2.0**-24), 2.0**-60, 2.0**60),
        around(0.5, -0.5, 1.0, -1.0, 2.0, np.sqrt(0.5), np.sqrt(2.0), np.log(2) / 2, -np.log(2) / 2),
        # over- and underflow of exp
        around(88.722839, 89, -87.336545, -88, -103.27893, -103.97208, -104, 103.97208, 104),
        around(65504, 65520, -65520, 2.0**-14, 2.0**-25, -(2.0**-25)),  # range of float16
    ]
)
EVERYTHING = np.concatenate([floats(np.arange(0, 2**32, 997)), EDGES])


def expm1_minus_x(x):
    with np.errstate(all="ignore"):
        series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
        return np.where(np.abs(x) < 0.01, series, np.where(x == np.inf, x, np.expm1(x) - x))


def log_one_minus(p):
    return np.where((p >= 0) & (p <= 1), np.log1p(-p), np.nan)


def everywhere(x):
    return np.ones_like(x, bool)


# name: (float64 function, where it is defined, allowed error in ulp). Measured: exp 0.90, exp_minus 0.88, tanh 2.99,
# log 1.01, log1p 1.16, log_one_minus 1.44.
FUNCTIONS = {
    "exp": (np.exp, everywhere, 1.5),
    "exp_minus": (lambda x: np.exp(-x), lambda x: (x >= 0) | np.isnan(x), 1.5),
    # As exact as exp where |x| < 0.35, and so where the KL is small; measured 3.4 and 13.8 just beyond, at 0.4, where
    # e^x - 1 - x is small beside the e^x that it is taken from.
    "expm1": (np.expm1, everywhere, 2.5),
    "expm1_minus_x": (expm1_minus_x, everywhere, 6.0),
    "tanh": (np.tanh, everywhere, 3.5),
    "log": (np.log, everywhere, 1.5),
    "log1p": (np.log1p, lambda x: (x >= 0) & (x <= 2.0**60) | np.isnan(x), 2.0),
    "log_one_minus": (log_one_minus, everywhere, 2.0),
}


def ulp_error(actual, expected):
    """|actual - expected| in units of float32's last place at `expected`; an overflow counts as 2^128."""
    top = 2.0**128
    actual, expected = (np.clip(v.astype(np.float64), -top, top) for v in (actual, expected))
    _, exponent = np.frexp(np.abs(expected))
    return np.abs(actual - expected) / np.ldexp(1.0, np.clip(exponent, -125, 128) - 24)


@pytest.fixture(params=ISAS)
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.mark.parametrize("name", FUNCTIONS)
@np.errstate(all="ignore")
def test_within_ulps_of_float64(name):
    function, defined, allowed = FUNCTIONS[name]
    x = EVERYTHING[defined(EVERYTHING)]
    expected, actual = function(x.astype(np.float64)), elementary(name, x)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    x, expected, actual = (v[~np.isnan(expected)] for v in (x, expected, actual))
    error = ulp_error(actual, expected)
    normal = (np.abs(expected) >= 2.0**-126) | (expected == 0)
    worst = error[normal].argmax()
    assert error[normal][worst] <= allowed, f"{error[normal][worst]:.3f} ulp at {x[normal][worst]!r}"
    assert error[~normal].max(initial=0) <= 1, "more than a quantum in a subnormal result"
    sure = np.abs(expected) > 2.0**128
    np.testing.assert_array_equal(actual[sure], expected.astype(np.float32)[sure])


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("exp", [-np.inf, np.inf, 100, -200, 0.0, -0.0], [0, np.inf, np.inf, 0, 1, 1]),
        ("exp_minus", [np.inf, 0.0, -0.0, 1e30], [0, 1, 1, 0]),
        ("expm1", [-np.inf, np.inf, 0.0, -0.0, -1e30], [-1, np.inf, 0, 0, -1]),
        ("expm1_minus_x", [-np.inf, 0.0, -0.0, 1e30, -1e30], [np.inf, 0, 0, np.inf, 1e30]),
        ("log", [np.inf, 1.0, 0.0, -0.0, -1.0, -np.inf, -1e-45], [np.inf, 0, -np.inf, -np.inf] + 3 * [np.nan]),
        ("log1p", [0.0, -0.0, 1e-45], [0, 0, 1e-45]),
        ("log_one_minus", [0.0, 1.0, -1e-45, 1.0000001, np.inf, -np.inf], [0, -np.inf, np.nan, np.nan, np.nan, np.nan]),
    ],
)
def test_edges(name, x, expected, isa):
    np.testing.assert_array_equal(elementary(name, np.float32(x)), np.float32(expected))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan(name, isa):
    assert np.isnan(elementary(name, NANS)).all()


@pytest.mark.parametrize("name", ["rcp", "sqrt"])
def test_correctly_rounded_in_range(name):
    x = EVERYTHING[(EVERYTHING >= 2.0**-60) & (EVERYTHING <= 2.0**60)]
    expected = np.float32(1) / x if name == "rcp" else np.sqrt(x)
    np.testing.assert_array_equal(elementary(name, x).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_is_torchs(name):
    halves = floats(np.arange(2**16) << 16)  # every bfloat16, and the ties between them
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float().numpy()
    x = np.concatenate([EVERYTHING, halves, floats((np.arange(2**16) << 16) + 0x8000), every_half])
    ties = np.arange(0x33000000, 0x47800000, 0x1000)  # of float16, over all of its range
    x = np.concatenate([x, floats(ties), -floats(ties)])
    expected = torch.from_numpy(x).to(getattr(torch, name)).float().numpy()
    actual = elementary(name, x)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(x))
    number = ~np.isnan(x)
    np.testing.assert_array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))


@pytest.mark.parametrize("name", [*FUNCTIONS, "rcp", "sqrt", "bfloat16", "float16"])
def test_every_isa_gives_the_same_bits(name, isa):
    x = EVERYTHING[::7]
    actual = elementary(name, x)
    _C.set_cpu_isa("plain")
    plain = elementary(name, x)
    np.testing.assert_array_equal(actual, plain)  # NaN equals NaN
    np.testing.assert_array_equal(np.signbit(actual)[actual == 0], np.signbit(plain)[actual == 0])


def test_unknown_function():
    with pytest.raises(RuntimeError, match="no elementary function is called sinh"):
        elementary("sinh", np.zeros(1, np.float32))
