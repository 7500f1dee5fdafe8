"""Join the processes that `torchrun` has started for a run, or another launcher that sets the same variables."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sparsefw.errors import InputError, first_line, printable, shown
from sparsefw.ranks.group import ALONE, LostRankError, Ranks
from sparsefw.ranks.voice import COMING, HEARING, LOST, WAITING, Voice

# The variables that tell a process its number, and how many there are; then the same of its machine alone.
NUMBER, COUNT, LOCAL_NUMBER, LOCAL_COUNT = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"

# The voice of this process, while it has one.
_open: list[Voice] = []

# Numbers of the times that this process joins others. Each time has keys of its own.
_times = itertools.count()


def is_rank() -> bool:
    """Whether this process is one of several ranks."""
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return NUMBER in os.environ and os.environ.get(COUNT, "1") != "1"


def connect() -> Voice:
    """Connect with the other ranks. The last one to come lets all go on.

    Raises:
        InputError: a variable is no number, or they have not come in time.
    """
    if dist.is_initialized():
        # The caller's script has joined them. Another store could not have the same port.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        number, count = dist.get_rank(), dist.get_world_size()
    else:
        number, count = _variable(NUMBER), _variable(COUNT)
        try:
            store, *_ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=COMING))))
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"rank {number}: the others cannot be reached: {first_line(error)}") from error
    voice = Voice(dist.PrefixStore(f"sparsefw {next(_times)}", store), number, count)
    _open.append(voice)
    return voice


def disconnect(voice: Voice) -> None:
    """Take leave of the other ranks."""
    voice.close()
    _open.remove(voice)


@contextmanager
def joined_with(log: Callable[[str], None]) -> Iterator[tuple[Ranks, Callable[[str], None]]]:
    """As `joined`, with a function that says a line of the log on the rank that speaks for all.

    Args:
        log: called with every line. Names in them come from files, so what does not print is spelled out.
    """
    with joined() as ranks:

        def say(line: str) -> None:
            if ranks.first:
                log(printable(line))

        yield ranks, say


@contextmanager
def joined(on_gpus: bool = True) -> Iterator[Ranks]:
    """Inside the `with` block, the process is one of the ranks of a run. Without a launcher it is alone.

    A process group that the caller has made is used.

    Args:
        on_gpus: whether each rank takes a GPU, where there are any.

    Raises:
        InputError: not every rank has a GPU of its own.
        LostRankError: another rank has failed; the message is its line.
    """
    if not is_rank():
        yield ALONE
        return
    mine = not _open
    voice = connect() if mine else _open[0]
    made, wanted = not dist.is_initialized(), on_gpus
    try:
        here, local = _variable(LOCAL_COUNT, "1"), _variable(LOCAL_NUMBER, "0")
        on_gpus = wanted and torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(_number_of_gpu(here, local))
        if made:
            backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
            dist.init_process_group(
                backend,
                # Of a connection of its own: one that waits for a key would keep the voice silent.
                store=dist.PrefixStore("group", voice.store.clone()),
                rank=voice.number,
                world_size=voice.count,
                timeout=timedelta(seconds=2 * WAITING),
            )
        ranks = Ranks(voice.number, voice.count, here, local, voice)
        if wanted:
            _check_gpus(ranks, on_gpus)
        yield ranks
    except BaseException as error:
        # To take leave of a group in which a rank is lost may never end: NCCL waits for it. A command ends the process.
        made = made and mine and not on_gpus
        if mine:
            _raise_of_others(error, voice)
        raise
    finally:
        if made and dist.is_initialized():
            dist.destroy_process_group()
        if mine:
            disconnect(voice)


def _number_of_gpu(here: int, local: int) -> int:
    """The number of this rank's GPU among those that it sees: all of its machine, or its own alone."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return 0
    if local >= gpus:
        raise InputError(f"{here} ranks on this machine, and {gpus} GPUs (CUDA_VISIBLE_DEVICES): each needs one")
    return local


def _check_gpus(ranks: Ranks, has_gpu: bool) -> None:
    """Refuse ranks of which some have a GPU and others none, and two on one, which NCCL has words of its own for."""
    gpus = ranks.gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if has_gpu else "")
    if not any(gpus):
        return
    for number, gpu in enumerate(gpus):
        if not gpu:
            raise InputError(f"rank {number} sees no GPU, and another rank does (CUDA_VISIBLE_DEVICES)")
        if (other := gpus.index(gpu)) < number:
            raise InputError(
                f"ranks {other} and {number} have the same GPU: start one rank for each, which sees all of its machine "
                "or its own alone (CUDA_VISIBLE_DEVICES)"
            )


def _raise_of_others(error: BaseException, voice: Voice) -> None:
    """Leave an error for the other ranks, or raise that of the one that was first."""
    lost = isinstance(error, LostRankError)
    failure = voice.find(HEARING) if lost else None
    failure = failure or voice.leave(LOST, f"rank {voice.number}: {first_line(error)}")
    if lost:
        raise LostRankError(failure.line) from error


def _variable(name: str, default: str = "") -> int:
    """A number that a launcher has set."""
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise InputError(f"{name}={shown(text)}: expected a number; torchrun sets it")
    return int(text)
