"""The polynomials of csrc/formulas: minimax fits whose coefficients are floats. Needs numpy, scipy and mpmath.

Each coefficient in turn is rounded to float32, the lowest power first, and the others are fitted again, so that they
make up for its rounding. `python tools/minimax.py` prints every polynomial with its largest weighted error.
"""

import math

import mpmath as mp
import numpy as np
from scipy.optimize import linprog

mp.mp.dps = 40


def minimax(basis, target, weight):
    """The c that minimises max |weight * (basis @ c - target)|: least squares, then a linear program on the rest."""
    scale = np.abs(basis * weight[:, None]).max(0)
    a, b = basis * weight[:, None] / scale, target * weight
    c = np.linalg.lstsq(a, b, rcond=None)[0]
    rest = b - a @ c
    size = np.abs(rest).max()
    if size < 1e-15:
        return c / scale
    bound = -np.ones((len(b), 1))
    found = linprog(
        np.r_[np.zeros(a.shape[1]), 1],
        A_ub=np.block([[a, bound], [-a, bound]]),
        b_ub=np.r_[rest, -rest] / size,
        bounds=[(None, None)] * a.shape[1] + [(0, None)],
        method="highs",
    )
    return (c + found.x[:-1] * size) / scale


def fit(name, target, weight, low, high, powers, points=4000):
    x = np.cos(np.linspace(0, np.pi, points)) * (high - low) / 2 + (high + low) / 2
    basis = np.stack([x**p for p in powers], 1)
    y = np.array([float(target(mp.mpf(v))) for v in x])
    w = np.array([float(weight(mp.mpf(v))) for v in x])
    fixed = np.zeros(len(powers))
    for i in range(len(powers)):
        rest = minimax(basis[:, i:], y - basis[:, :i] @ fixed[:i], w)
        fixed[i] = np.float32(rest[0])
    print(f"{name}: error {np.abs((basis @ fixed - y) * w).max():.2e}")
    for p, c in zip(powers, fixed, strict=True):
        print(f"    x^{p}: {float(c).hex()}")


def exp_q(r):  # e^r = 1 + r + r^2 q(r)
    return mp.mpf(1) / 2 + r / 6 if abs(r) < 1e-8 else (mp.exp(r) - 1 - r) / r**2


def log_p(f):  # log(1 + f) = f - f^2 / 2 + f^3 p(f)
    return mp.mpf(1) / 3 - f / 4 if abs(f) < 1e-8 else (mp.log1p(f) - f + f * f / 2) / f**3


def sine(y):  # sin(pi/2 y) / y
    return mp.sin(mp.pi / 2 * y) / y if y else mp.pi / 2


if __name__ == "__main__":
    half_ln2 = 1.001 * math.log(2) / 2
    fit("exp q", exp_q, lambda r: 1 / exp_q(r), -half_ln2, half_ln2, range(5))
    fit(
        "log p",
        log_p,
        lambda f: abs(f**3 / mp.log1p(f)) if f else mp.mpf(0),
        math.sqrt(0.5) - 1,
        math.sqrt(2) - 1,
        range(8),
    )
    fit("sin(pi/2 y) / y", sine, lambda y: 1 / sine(y), 0, 0.5, (0, 2, 4, 6))
    cosine = lambda y: mp.cos(mp.pi / 2 * y)  # noqa: E731
    fit("cos(pi/2 y) - 1", lambda y: cosine(y) - 1, lambda y: 1 / cosine(y), 0, 0.5, (2, 4, 6, 8))
