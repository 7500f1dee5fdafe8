"""Checkpoints on disk: read only if they can be trusted, and written so that an interrupted run can go on."""

from sparsefw.checkpoint.reader import fingerprint, read_shard, read_tensors
from sparsefw.checkpoint.resume import durably
from sparsefw.checkpoint.rewritten import rewritten
from sparsefw.checkpoint.source import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    check_file,
    companions,
    from_hub,
    inspect,
    locate,
)
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.checkpoint.writer import Writer, check_free, check_output

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "TensorInfo",
    "Writer",
    "check_file",
    "check_free",
    "check_output",
    "companions",
    "durably",
    "fingerprint",
    "from_hub",
    "inspect",
    "locate",
    "read_shard",
    "read_tensors",
    "rewritten",
]
