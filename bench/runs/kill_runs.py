"""Kill runs at random moments, and compare their outputs with that of an undisturbed run.

    python bench/runs/kill_runs.py FOLDER --kills 50
    python bench/runs/kill_runs.py FOLDER --kills 20 --ranks 3
    python bench/runs/kill_runs.py FOLDER --kills 1 --model MODEL --preset fast

The runs prune into FOLDER; all other flags are those of `sparsefw.run`, by default with the built-in model. After a
kill the same command resumes the run, until it comes to its end. Then its output must have the bytes of the undisturbed
run, and the next run begins. With several ranks one of them is killed, and the others must end by themselves.
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

# Files that hold times, digests of such files, or the output's name.
TIMED = {"report.json", "report.html", "SHA256SUMS", "README.md"}


def outputs(folder: Path) -> dict[str, bytes]:
    """Check the digests of an output; returns the bytes of all files that are the same in every run."""
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def start(output: Path, ranks: int, flags: list[str]) -> subprocess.Popen:
    """Start a run with these flags of `sparsefw.run`."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "sparsefw.run", *flags, "--output", str(output)]
    # The package of this checkout, whatever is installed.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(run: subprocess.Popen, ranks: int) -> None:
    """Kill a run, or one of its ranks; returns when all its processes have ended."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(random.choice(children)) if ranks > 1 and children else run.pid, signal.SIGKILL)
    run.wait(60)


def main() -> None:
    """Kill runs, and compare their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    random.seed(0)
    folder, ranks, kills = arguments.folder, arguments.ranks, 0
    folder.mkdir(parents=True)
    began = time.perf_counter()
    assert start(folder / "undisturbed", ranks, flags).wait() == 0
    seconds = time.perf_counter() - began
    expected, output = outputs(folder / "undisturbed"), folder / "killed"
    while kills < arguments.kills or not output.exists():
        shutil.rmtree(output, ignore_errors=True)
        run = start(output, ranks, flags)
        try:
            # A moment may be a little after the end.
            assert run.wait(random.uniform(0, 1.1 * seconds) if kills < arguments.kills else None) == 0
            assert not (folder / ".killed.partial").exists()
        except subprocess.TimeoutExpired:
            kill(run, ranks)
            kills += 1
            finished = len(list(folder.glob(".killed.partial/records/*.json")))
            print(f"kill {kills}: {finished} shards finished", flush=True)
        # A run may also be killed after its output is in place.
        if output.exists():
            assert outputs(output) == expected
            shutil.rmtree(folder / ".killed.partial", ignore_errors=True)
    print(f"{kills} runs of {seconds:.1f} s were killed; all outputs have the same bytes")


if __name__ == "__main__":
    main()
