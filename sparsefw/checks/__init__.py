"""Checks of a pruned checkpoint against its report and its source."""

from sparsefw.checks.output import verify
from sparsefw.checks.verdict import Check, Verdict, lines

__all__ = [
    "Check",
    "Verdict",
    "lines",
    "verify",
]
