"""Check that an output has the files of its SHA256SUMS, byte by byte, and no other."""

import os
from pathlib import Path

from sparsefw.checkpoint import SUMS, check_file, file_digest, read_sums
from sparsefw.checks.verdict import Check
from sparsefw.errors import InputError


def check_sums(check: Check, output: Path, digest: str | None = None) -> str:
    """Compare every file of an output with its digest.

    Args:
        check: receives the failures.
        output: folder of the output.
        digest: SHA-256 of SHA256SUMS itself, as the run has printed it; None: not compared.

    Returns:
        SHA-256 of SHA256SUMS; empty if that cannot be read.
    """
    try:
        sums = read_sums(output / SUMS)
        actual = file_digest(output / SUMS)
    except InputError as error:
        check.failures.append(str(error))
        return ""
    if digest not in (None, actual):
        check.fail(SUMS, f"its SHA-256 is {actual}, not that of --digest")
    there = set(_files(output))
    for name in sorted(there - sums.keys() - {SUMS}):
        check.fail(name, f"not in {SUMS}")
    for name, expected in sums.items():
        check.count += 1
        if name not in there:
            check.fail(name, "missing")
            continue
        try:
            check_file(output / name, output)
        except InputError as error:
            check.failures.append(str(error))
            continue
        if file_digest(output / name) != expected:
            check.fail(name, "not what the run wrote")
    return actual


def _files(folder: Path) -> list[str]:
    """Names of all that is no folder, links to folders included."""
    names = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        names += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return names
