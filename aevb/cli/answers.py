"""What the commands that ask a trained run do: load it, compute, draw, and write the answer."""

from .images import Part
from .latent import embed, interpolate, manifold, reconstruct, sample, traverse
from .report import report
from .restore import denoise, impute

__all__ = [
    "Part",
    "denoise",
    "embed",
    "impute",
    "interpolate",
    "manifold",
    "reconstruct",
    "report",
    "sample",
    "traverse",
]
