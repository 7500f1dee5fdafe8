"""Settings of the process and wrappers of a model, which a caller from Python has made; and what it is shown.

Settings are as they were at the end. Meanwhile none of them changes results.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import nn

# Settings of torch and transformers, and limits of memory, are those of the whole process.
_turn = RLock()


# How lines begin that a caller should see who has not asked for the log: others are of level INFO.
WARNINGS = ("note: ", "seqlen: ", "out of memory ")


def to_logger(line: str) -> None:
    """Log a line by the logger "sparsefw", which shows warnings alone unless `logging` is told otherwise."""
    logging.getLogger("sparsefw").log(logging.WARNING if line.startswith(WARNINGS) else logging.INFO, line)


def bar_of_blocks(blocks: int, shown: bool | None) -> Any:
    """A progress bar over the blocks of a model, of tqdm.

    Args:
        blocks: number of the blocks.
        shown: whether it is shown; None: in a terminal alone.
    """
    from tqdm.auto import tqdm

    # Unless it is given, tqdm asks the environment (TQDM_DISABLE).
    return tqdm(total=blocks, unit="block", **({} if shown else {"disable": None if shown is None else True}))


def bars_wanted() -> bool:
    """Whether the caller has not turned off the progress bars of transformers or of the Hub, or "sparsefw" there."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled("sparsefw")


@contextmanager
def settings_kept() -> Iterator[None]:
    """Inside the `with` block is one thread at a time. Behind it, libraries show what they did before."""
    # Tensors that are made in inference mode do not tell when they are written to.
    with _turn, torch.inference_mode(False), without_autocast(), _exact_products(), _progress_bars_kept():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside the `with` block, torch casts nothing by itself.

    Products of a solver would be less exact than they are said to be. And weights that ask for gradients would be cast
    once, so that forwards would not see their later values.
    """
    with ExitStack() as left:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                left.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def on_cpu_by_default() -> Iterator[None]:
    """Inside the `with` block, tensors are made on the CPU unless a device is named.

    This is for models that sparsefw has loaded by itself. The forward of a caller's model may need the caller's device.
    """
    # Not where it would be the same: it slows every call of torch.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def products_of_fp32(on_cpu: str, on_gpu: str) -> Iterator[None]:
    """Inside the `with` block products of fp32 take operands of these precisions: "ieee", "bf16" or "tf32"."""
    # The module of oneDNN is replaced by an object when it is imported, which types do not tell.
    libraries = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [library.fp32_precision for library in libraries]
    try:
        for library, precision in zip(libraries, (on_cpu, on_gpu), strict=True):
            library.fp32_precision = precision
        yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of fp32 are products of fp32, whatever torch has been told.

    It can be told by `torch.set_float32_matmul_precision` for all libraries, and for each of them by `fp32_precision`.
    The two must not contradict each other, or whoever asks for the former gets an error.
    """
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The libraries' own contradict it.
        of_all = None
    with products_of_fp32("ieee", "ieee"):
        try:
            if of_all:
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            if of_all:
                torch.set_float32_matmul_precision(of_all)


@contextmanager
def _progress_bars_kept() -> Iterator[None]:
    """Reading a model turns off those of transformers, and with them the Hub's."""
    # The solver needs neither.
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    of_transformers, of_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        yield
    finally:
        if of_transformers:
            logging.enable_progress_bar()
        (enable_progress_bars if of_hub else disable_progress_bars)()


@contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """Inside the `with` block, modules are in the places of what `torch.compile` has made of them.

    Compiled code hides what it does from torch's modes, and wrappers change names. Yields the model itself, or
    unchanged what is no module.
    """
    model = _inner(model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    wrapped = [(m, name, x) for m in modules for name, x in m._modules.items() if _inner(x) is not x]
    try:
        for module, name, wrapper in wrapped:
            module._modules[name] = _inner(wrapper)
        yield model
    finally:
        for module, name, wrapper in wrapped:
            module._modules[name] = wrapper


def _inner(module: Any) -> Any:
    """What `torch.compile` was given; a wrapper that has hooks of its own stays."""
    # The class of wrappers is in the compiler, which takes seconds to import.
    while (
        isinstance(module, nn.Module)
        and "_orig_mod" in module._modules
        and not (module._forward_hooks or module._forward_pre_hooks)
    ):
        module = module._modules["_orig_mod"]
    return module


def as_python() -> AbstractContextManager[Any]:
    """Inside the `with` block, compiled code runs as Python."""
    # If the compiler has not been imported, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
