"""The report of a run: the lines of its log, report.json and report.html."""

from sparsefw.report import html, log
from sparsefw.report.content import (
    HIDDEN,
    PREDICTIONS,
    BlockRecord,
    Reconstruction,
    Report,
    amount,
    read_report,
)
from sparsefw.report.environment import machine

__all__ = [
    "HIDDEN",
    "PREDICTIONS",
    "BlockRecord",
    "Reconstruction",
    "Report",
    "amount",
    "html",
    "log",
    "machine",
    "read_report",
]
