"""Checkpoints on disk: read only if they can be trusted, and written so that an interrupted run can go on."""

from sparsefw.checkpoint.checksums import DIGEST, SUMS, file_digest, read_sums
from sparsefw.checkpoint.copied import note_of_others
from sparsefw.checkpoint.evidence import Evidence, fingerprint
from sparsefw.checkpoint.progress import Progress
from sparsefw.checkpoint.reader import read_shard, read_tensors
from sparsefw.checkpoint.replaced import check_free, check_output
from sparsefw.checkpoint.resume import durably
from sparsefw.checkpoint.rewritten import rewritten
from sparsefw.checkpoint.source import (
    CONFIG,
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    check_file,
    companions,
    from_hub,
    inspect,
    inspect_tokenizer,
    locate,
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
    "Evidence",
    "Progress",
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
    "rewritten",
    "tensors_in",
]
