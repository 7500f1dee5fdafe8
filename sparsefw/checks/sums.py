"""Check that an output has the files of its SHA256SUMS, byte by byte, and no other."""

import os
from pathlib import Path

from sparsefw.checkpoint import SUMS, Progress, check_file, file_digest, read_sums
from sparsefw.checks.shared import share_out
from sparsefw.checks.verdict import Check
from sparsefw.errors import InputError
from sparsefw.ranks import ALONE, Ranks, balanced


def check_sums(check: Check, output: Path, digest: str | None = None, ranks: Ranks = ALONE) -> str:
    """Compare every file of an output with its digest.

    Args:
        check: receives the failures.
        output: folder of the output.
        digest: SHA-256 of SHA256SUMS itself, as the run has printed it; None: not compared.
        ranks: the processes that share the files.

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
    there = _entries(output)
    for name in sorted(there - sums.keys() - {SUMS}):
        check.fail(name, f"not in {SUMS}")
    sizes = {}
    for name in sums:
        check.count += 1
        if name not in there:
            check.fail(name, "missing")
            continue
        try:
            check_file(output / name, output)
            sizes[name] = (output / name).stat().st_size
        except InputError as error:
            check.failures.append(str(error))
    names = [*sizes]
    owners = balanced([*sizes.values()], ranks.count)
    mine = sum(size for size, owner in zip(sizes.values(), owners, strict=True) if owner == ranks.number)
    with Progress(lambda line: None, bar=ranks.first).hashing("files", mine) as done:

        def matches(n: int) -> bool:
            found = file_digest(output / names[n]) == sums[names[n]]
            done(sizes[names[n]])
            return found

        for name, sound in zip(names, share_out(ranks, (actual, sizes), owners, matches), strict=True):
            if not sound:
                check.fail(name, "not what the run wrote")
    return actual


def _entries(folder: Path) -> set[str]:
    """Names of all that is in a folder and below: of folders only those that are empty, links, or cannot be read."""
    found: list[str] = []
    unreadable: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [os.path.join(place, name) for name in (*files, *links)]
        if not files and not folders:
            found.append(place)
    found += [error.filename for error in unreadable]
    return {Path(path).relative_to(folder).as_posix() for path in found}
