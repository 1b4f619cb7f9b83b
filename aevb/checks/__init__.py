"""Checks and conversions of arguments: dtypes, shapes, seeds, choices and error messages."""
