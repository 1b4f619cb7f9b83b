"""The command line: `aevb train`, and the questions to a trained run."""

from .app import main

__all__ = ["main"]
