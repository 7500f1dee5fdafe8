"""Time operations of another commit, in a process with its `sparsefw` and this checkout's bench/."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from host import REPO

# It starts in the other checkout, whose package it imports before bench/ may change Python's path.
CODE = f"import runpy, sparsefw; runpy.run_path({str(REPO / 'bench')!r}, run_name='__main__')"
# Sources of the compiled part, and the file that says how it is built.
SOURCES = ("setup.py", "kernels/cpu/*.cpp", "kernels/cpu/*.h")


def git(*arguments: object) -> bool:
    """Run git in this repository; tells whether it succeeded."""
    return not subprocess.run(["git", "-C", REPO, *map(str, arguments)], capture_output=True, check=False).returncode


def check_out(commit: str, tree: Path) -> None:
    """Check a commit out, and compile it unless this checkout is compiled from the same.

    Raises:
        ValueError: there is no such commit, or it has no registry of operations.
    """
    if not git("cat-file", "-e", f"{commit}:kernels/operation.py"):
        raise ValueError(f"--base: {commit} is no commit, or older than kernels/operation.py, which this command needs")
    git("worktree", "add", "--detach", tree, commit)
    if git("diff", "--quiet", commit, "--", *SOURCES):
        for path in REPO.glob("kernels/cpu/*.so"):
            shutil.copy(path, tree / "kernels/cpu")
    else:
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, capture_output=True, check=True)


class Worker(NamedTuple):
    """Times operations of a commit by its process."""

    commit: str
    process: subprocess.Popen

    def time(self, **request: Any) -> float:
        """Time a call of an operation; returns seconds.

        Args:
            request: operation, setting, rows, d, tokens and dtype as in a saved run.

        Raises:
            RuntimeError: the operation failed, or the process has ended.
        """
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "its process has ended"}')
        if "error" in answer:
            raise RuntimeError(f"{self.commit}: {answer['error']}")
        return answer["seconds"]


@contextmanager
def start(commit: str, threads: int = 1) -> Iterator[Worker]:
    """Start the process of a commit; it ends with the `with` block.

    Raises:
        ValueError: there is no such commit, or it has no registry of operations.
    """
    with ExitStack() as opened:
        opened.callback(git, "worktree", "prune")
        tree = Path(opened.enter_context(TemporaryDirectory()), "base")
        check_out(commit, tree)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # In a session of its own no interrupt reaches it.
        command = [sys.executable, "-c", CODE, "--worker", "--threads", str(threads)]
        process = subprocess.Popen(command, cwd=tree, start_new_session=True, **pipes)
        opened.callback(process.communicate)
        opened.callback(process.kill)
        yield Worker(commit, process)
