"""Kill real runs at random moments until one comes through, and compare it with an undisturbed one.

    python bench/runs/kill_runs.py FOLDER --kills 50
    python bench/runs/kill_runs.py FOLDER --kills 20 --ranks 3

A run that is killed is started again with the same command. Once it has come through, the next one begins anew. All
outputs must have the bytes of the undisturbed run. The runs prune the built-in model, into FOLDER. Of several ranks one
is killed, and the others must end by themselves.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# These hold times, digests of files with times, or the output's name.
TIMED = {"report.json", "report.html", "SHA256SUMS", "README.md"}


def outputs(folder: Path) -> dict[str, bytes]:
    """Check the digests of an output; returns the bytes of all files that are the same in every run."""
    if (folder / "SHA256SUMS").exists():
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def start(output: Path, ranks: int) -> subprocess.Popen:
    """Start a run of the built-in model."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "sparsefw.run", "--output", str(output)]
    # The package of this checkout, whatever is installed.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    """Kill runs, and compare their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    folder, drawn = arguments.folder, random.Random(arguments.seed)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    assert start(folder / "undisturbed", arguments.ranks).wait() == 0
    length = time.perf_counter() - began
    expected, output, finished = outputs(folder / "undisturbed"), folder / "killed", []
    while len(finished) < arguments.kills:
        run = start(output, arguments.ranks)
        try:
            # To a little beyond the end.
            assert run.wait(drawn.uniform(0, 1.1 * length)) == 0
        except subprocess.TimeoutExpired:
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            os.kill(int(drawn.choice(children)) if arguments.ranks > 1 and children else run.pid, signal.SIGKILL)
            run.wait(60)
            finished.append(len(list(folder.glob(".killed.partial/records/*.json"))))
        # A run that was killed may have put its output in place before.
        if output.exists():
            assert outputs(output) == expected
            shutil.rmtree(output)
            shutil.rmtree(folder / ".killed.partial", ignore_errors=True)
    assert start(output, arguments.ranks).wait() == 0
    assert outputs(output) == expected
    assert not (folder / ".killed.partial").exists()
    counts = ", ".join(f"{finished.count(n)} with {n}" for n in sorted(set(finished)))
    print(f"{len(finished)} runs of {length:.1f} s were killed ({counts} shards finished); all have the same bytes")


if __name__ == "__main__":
    main()
