"""The share of a run's processor time that digests take: of tensors as they are read, and of shards once written.

    python bench/runs/digests.py --output FOLDER

It takes the flags of `python -m sparsefw.run`, and prints a line after the run's own.
"""

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sparsefw import run
from sparsefw.checkpoint import evidence, writer


def main() -> None:
    """Run, and print the share."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments)
            spent.append(time.thread_time() - began)
            return result

        return call

    names: Any = evidence
    names.xxhash = SimpleNamespace(
        xxh3_128=evidence.xxhash.xxh3_128, xxh3_128_hexdigest=timed(evidence.xxhash.xxh3_128_hexdigest)
    )
    writer.file_digest = timed(writer.file_digest)
    began = time.process_time()
    status = run.main(sys.argv[1:])
    whole = time.process_time() - began
    print(f"digests: {sum(spent):.3f} of {whole:.1f} processor seconds, {100 * sum(spent) / whole:.2f} %")
    sys.exit(status)


if __name__ == "__main__":
    main()
