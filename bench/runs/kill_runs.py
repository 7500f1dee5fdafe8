"""Kill real runs at random moments until one comes through, and compare it with an undisturbed one.

    python bench/runs/kill_runs.py FOLDER --kills 50
    python bench/runs/kill_runs.py FOLDER --kills 20 --ranks 3
    python bench/runs/kill_runs.py FOLDER --kills 50 --signals KILL,INT,TERM

A run that is killed is started again with the same command. Once it has come through, the next one begins anew. All
outputs must have the bytes of the undisturbed run. The runs prune the embedded model, into FOLDER. Of several ranks one
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
from collections import Counter
from functools import partial
from pathlib import Path

# These hold times, or digests of what does.
TIMED = {"report.json", "report.html", "SHA256SUMS"}


def outputs(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of an output that are the same in every run, once its digests have been checked."""
    if (folder / "SHA256SUMS").exists():
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def main() -> None:
    """Kill runs, and compare their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--signals", default="KILL", help="names, one of which is drawn each time (default: KILL)")
    parser.add_argument("--begin", type=float, default=0.0, help="share of its time that is over before (default: 0)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    drawn = random.Random(arguments.seed)
    signals = [signal.Signals[f"SIG{name}"] for name in arguments.signals.split(",")]

    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.ranks)] if arguments.ranks > 1 else []
    seconds, lines = [], Counter[str]()

    def start(output: Path) -> subprocess.Popen:
        command = [sys.executable, *launcher, "-m", "sparsefw.run", "--output", str(output)]
        # A shell has what runs in its background ignore SIGINT.
        obeys = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=obeys)

    def kill(run: subprocess.Popen) -> bool:
        """Kill a run or one of its ranks; returns whether it has not come through before."""
        errors.truncate(0)
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() if launcher else [str(run.pid)]
        if ranks:
            os.kill(int(drawn.choice(ranks)), drawn.choice(signals))
        killed = time.perf_counter()
        failed = run.wait(60) != 0
        seconds.append(time.perf_counter() - killed)
        told = [line for line in Path(errors.name).read_text().splitlines() if line.startswith("sparsefw: ")]
        lines[told[0] if told else "nothing is printed"] += failed
        return failed and bool(ranks)

    errors = (arguments.folder / "errors").open("a+")
    began = time.perf_counter()
    assert start(arguments.folder / "undisturbed").wait() == 0
    length = time.perf_counter() - began
    expected = outputs(arguments.folder / "undisturbed")
    kills, finished, output = 0, [], arguments.folder / "killed"
    while kills < arguments.kills:
        run = start(output)
        try:
            # To a little beyond the end.
            assert run.wait(drawn.uniform(arguments.begin * length, 1.1 * length)) == 0
        except subprocess.TimeoutExpired:
            kills += kill(run)
            finished.append(len(list(output.with_name(".killed.partial").glob("records/*.json"))))
        # A run that was killed may have put its output in place before.
        if output.exists():
            assert outputs(output) == expected
            shutil.rmtree(output)
            shutil.rmtree(output.with_name(".killed.partial"), ignore_errors=True)
    if output.with_name(".killed.partial").exists():
        assert start(output).wait() == 0
        assert outputs(output) == expected
        assert not output.with_name(".killed.partial").exists()
    counts = ", ".join(f"{finished.count(n)} with {n}" for n in sorted(set(finished)))
    print(f"{kills} runs of {length:.1f} s were killed ({counts} parts finished); all outputs have the same bytes")
    print(f"the runs were over within {max(seconds):.1f} s")
    for line, count in lines.most_common():
        print(f"{count:3} {line}")


if __name__ == "__main__":
    main()
