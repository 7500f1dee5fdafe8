"""Checkpoints on disk: what is read and trusted, what is written, and how an interrupted run goes on."""

from sparsefw.checkpoint.resume import durably
from sparsefw.checkpoint.source import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    TensorInfo,
    all_finite,
    check_file,
    check_finite,
    companions,
    from_hub,
    inspect,
    locate,
    root_of,
)
from sparsefw.checkpoint.writer import Writer, check_output

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "TensorInfo",
    "Writer",
    "all_finite",
    "check_file",
    "check_finite",
    "check_output",
    "companions",
    "durably",
    "from_hub",
    "inspect",
    "locate",
    "root_of",
]
