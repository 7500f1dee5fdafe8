"""Checkpoints on disk: read only if they can be trusted, and written so that an interrupted run can go on."""

from sparsefw.checkpoint.files import SUMS, file_digest, read_sums
from sparsefw.checkpoint.output import check_free, check_output
from sparsefw.checkpoint.reader import read_shard, read_tensors
from sparsefw.checkpoint.source import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    fingerprint,
    from_hub,
    inspect,
    locate,
    note_of_others,
    stamps,
    tensors_in,
)
from sparsefw.checkpoint.writer import Writer

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "SUMS",
    "Checkpoint",
    "Writer",
    "check_free",
    "check_output",
    "file_digest",
    "fingerprint",
    "from_hub",
    "inspect",
    "locate",
    "note_of_others",
    "read_shard",
    "read_sums",
    "read_tensors",
    "stamps",
    "tensors_in",
]
