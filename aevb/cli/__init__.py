"""The command line: `aevb train`, and what a trained run can be asked."""

from .app import main

__all__ = ["main"]
