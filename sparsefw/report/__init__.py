"""The report of a run: the lines of its log, report.json and report.html."""

from sparsefw.report import html, log
from sparsefw.report.content import (
    DENSE,
    HIDDEN,
    PREDICTIONS,
    BlockRecord,
    CalibrationText,
    EvaluationText,
    MemoryRecord,
    RankRecord,
    Reconstruction,
    Report,
    amount,
    read_report,
)
from sparsefw.report.environment import device_name, machine, versions

__all__ = [
    "DENSE",
    "HIDDEN",
    "PREDICTIONS",
    "BlockRecord",
    "CalibrationText",
    "EvaluationText",
    "MemoryRecord",
    "RankRecord",
    "Reconstruction",
    "Report",
    "amount",
    "device_name",
    "html",
    "log",
    "machine",
    "read_report",
    "versions",
]
