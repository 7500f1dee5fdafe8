"""A run that hashes nothing it reads or writes, to be timed beside `python -m sparsefw.run` with the same flags.

    python bench/runs/without_digests.py --output FOLDER

The difference is what the digests cost. Nothing can be verified or resumed with what it writes.
"""

from sparsefw import run
from sparsefw.checkpoint import evidence, writer


class _Nothing:
    """In place of xxhash: the same digest for everything."""

    @staticmethod
    def xxh3_128_hexdigest(data: memoryview) -> str:
        """No digest."""
        return ""


if __name__ == "__main__":
    evidence.xxhash = _Nothing  # type: ignore[assignment]
    writer.file_digest = lambda path: ""
    run.main()
