"""What a checkpoint does when it is read: a child process reads it, and every file that is opened is looked at."""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from helpers.attacks import Files

from sparsefw.checkpoint.source import inspect
from sparsefw.data.tokenizer import load_tokenizer, start_tokens, tokenize
from sparsefw.errors import InputError
from sparsefw.estimate.describe import describe
from sparsefw.memory import peak_memory
from sparsefw.model import StreamedModel

# Where Python and its libraries are, and what the system says about this process.
OWN = (
    *(sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), sysconfig.get_paths()["purelib"]),
    *(os.path.realpath(path) for path in sys.path),
    *("/proc/", "/dev/null", "/sys/", "/usr/lib/", "/usr/share/"),
)
WATCHED = {"open", "os.listdir", "os.scandir", "subprocess.Popen", "os.system", "os.exec"}
WATCHED |= {"socket.connect", "socket.getaddrinfo"}

TEXTS = ["What a tokenizer may see.", "a" * 40 + " b", "", "\0\u202e"]
# Memory that may be touched. Much more may be reserved: the zeros on which a plan follows a model's forward are.
SECONDS, BYTES, RESERVED = 30, 2 * 2**30, 24 * 2**30


def bait_of(root: Path) -> Path:
    """A folder of files and pipes that nothing may open."""
    bait = root / "bait"
    (bait / "folder").mkdir(parents=True)
    for name in ("file", "file.json", "tokenizer.model", "folder/config.json", "folder/vocab.json"):
        (bait / name).write_text("{}")
        # Read later than written, in the system's eyes, only if it is read from now on.
        os.utime(bait / name, (1, 10**9))
    for name in ("pipe", "pipe.json"):
        os.mkfifo(bait / name)
    return bait


def judged(files: Files, bait: Path, seconds: int = SECONDS) -> list[str]:
    """What is wrong with how a checkpoint is read; nothing if it is read, or refused in one line."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        log = folder.with_suffix(".log")
        process = multiprocessing.get_context("fork").Process(target=_read, args=(folder, log), daemon=False)
        started = time.monotonic()
        process.start()
        process.join(seconds)
        took = time.monotonic() - started
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        found = sorted(set(log.read_text().splitlines())) if log.exists() else []
        if took > seconds:
            found.append(f"{took:.0f} s")
        elif process.exitcode:
            found.append(f"exit status {process.exitcode}")
        for path in bait.rglob("*"):
            if path.is_file() and path.stat().st_atime != 1:
                os.utime(path, (1, 10**9))
                found.append(f"opened {path}")
        return found
    finally:
        shutil.rmtree(folder)
        folder.with_suffix(".log").unlink(missing_ok=True)


def _read(folder: Path, log: Path) -> None:
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = psutil.Process().memory_info().data + RESERVED
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = peak_memory()["host_bytes"]
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(line: str) -> None:
        os.write(out, (ascii(line)[1:-1] + "\n").encode())

    allowed = (str(folder), str(Path(tempfile.gettempdir()) / "sparsefw-"), *OWN)

    def look(event: str, arguments: tuple) -> None:
        if event not in WATCHED:
            return
        path = arguments[0] if event in {"open", "os.listdir", "os.scandir"} else event
        if path in (0, 1, 2):
            say(f"opened the standard stream {path}")
        elif not isinstance(path, int) and not os.path.realpath(os.fsdecode(path or ".")).startswith(allowed):
            say(f"opened {os.fsdecode(path)}")

    sys.addaudithook(look)
    steps: list[Callable[[], object]] = [
        lambda: StreamedModel(inspect(folder), torch.device("cpu")),
        lambda: describe(str(folder / "config.json")),
        lambda: _tokenize(folder),
    ]
    for step in steps:
        try:
            started = time.process_time()
            step()
        except InputError as error:
            if len(str(error).splitlines()) != 1:
                say(f"several lines: {error}")
        except BaseException as error:
            say(f"{type(error).__name__}: {error}")
        if time.process_time() - started > SECONDS / 3:
            say(f"{time.process_time() - started:.0f} s of the processor")
    if (took := peak_memory()["host_bytes"] - before) > BYTES:
        say(f"{took / 2**30:.1f} GiB")
    os._exit(0)


def _tokenize(folder: Path) -> None:
    inspect(folder)
    tokenizer = load_tokenizer(folder)
    tokenize(tokenizer, TEXTS)
    start_tokens(tokenizer)
