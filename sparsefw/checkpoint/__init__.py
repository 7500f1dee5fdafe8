"""Checkpoints on disk: read only if they can be trusted, and written so that an interrupted run can go on."""

from sparsefw.checkpoint.files import DIGEST, SUMS, durably, file_digest, read_sums
from sparsefw.checkpoint.output import check_free, check_output
from sparsefw.checkpoint.reader import read_shard, read_tensors
from sparsefw.checkpoint.source import (
    CONFIG,
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    check_file,
    companions,
    fingerprint,
    from_hub,
    inspect,
    inspect_tokenizer,
    locate,
    note_of_others,
    stamps,
    tensors_in,
)
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.checkpoint.writer import Writer

__all__ = [
    "CONFIG",
    "DIGEST",
    "DTYPES",
    "INDEX",
    "SINGLE",
    "SUMS",
    "Checkpoint",
    "TensorInfo",
    "Writer",
    "check_file",
    "check_free",
    "check_output",
    "companions",
    "durably",
    "file_digest",
    "fingerprint",
    "from_hub",
    "inspect",
    "inspect_tokenizer",
    "locate",
    "note_of_others",
    "read_shard",
    "read_sums",
    "read_tensors",
    "stamps",
    "tensors_in",
]
