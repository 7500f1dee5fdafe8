"""Handle the caller's process: settings of torch and transformers, wrappers of a model, log lines and progress bars.

A run overrides settings that would change its results, and restores the caller's values at the end.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import nn

from sparsefw.environment import set_environment

# Only one thread runs at a time, since library settings and memory limits hold for the whole process.
_turn = RLock()


# Log lines that begin with these words have level WARNING; all others have level INFO.
WARNINGS = ("note: ", "seqlen: ", "out of memory ")


def to_logger(line: str) -> None:
    """Send a line to the logger "sparsefw", which shows only warnings unless `logging` is configured."""
    logging.getLogger("sparsefw").log(logging.WARNING if line.startswith(WARNINGS) else logging.INFO, line)


def bar_of_blocks(blocks: int, shown: bool | None) -> Any:
    """Make a tqdm progress bar over the blocks of a model.

    Args:
        blocks: number of blocks.
        shown: whether the bar is shown; None: only in a terminal.
    """
    from tqdm.auto import tqdm

    # If `disable` is not passed, tqdm obeys TQDM_DISABLE in the environment.
    return tqdm(total=blocks, unit="block", **({} if shown else {"disable": None if shown is None else True}))


def bars_wanted() -> bool:
    """Tell whether huggingface_hub has progress bars turned on, in general and for the name "sparsefw"."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled("sparsefw")


@contextmanager
def settings_kept() -> Iterator[None]:
    """Let one thread at a time into the `with` block, and restore the caller's settings after it."""
    set_environment()
    # Tensors made in inference mode have no version counter, which tracing needs.
    with _turn, torch.inference_mode(False), without_autocast(), _exact_products(), _progress_bars_kept():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off autocast inside the `with` block.

    Autocast would make the products of a solver less exact than documented. It also caches the cast copy of a weight
    with gradients, so later forwards would not see the new values.
    """
    with ExitStack() as left:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                left.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def on_cpu_by_default() -> Iterator[None]:
    """Make the CPU torch's default device inside the `with` block, for models that sparsefw has loaded.

    The forward of a caller's model may need the caller's default device.
    """
    # Skipped if the CPU is the default already, since the context slows every call of torch.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def products_of_fp32(on_cpu: str, on_gpu: str) -> Iterator[None]:
    """Set the precision of fp32 products inside the `with` block: "ieee", "bf16" or "tf32"."""
    # mypy does not know that torch replaces this module by an object.
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
    """Make fp32 products exact inside the `with` block, whatever the caller has set.

    `torch.set_float32_matmul_precision` sets all libraries, and `fp32_precision` sets a single library. Reading the
    setting of all raises an error if the libraries disagree.
    """
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:
        # The libraries disagree: only their own settings are restored.
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
    """Restore the settings of progress bars of transformers and the Hub after the `with` block.

    Reading a model turns these bars off.
    """
    # Imported here, because `solve_layer` needs neither library.
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
    """Replace modules that `torch.compile` has wrapped by the original modules inside the `with` block.

    Compiled code hides its operations from torch's dispatch modes, and wrappers change names. Yields the original
    model, or `model` itself if it is not wrapped.
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
    """Return the module inside of `torch.compile`'s wrapper. A wrapper that has hooks is returned itself."""
    # Found by an attribute, because importing the wrapper's class takes seconds.
    while (
        isinstance(module, nn.Module)
        and "_orig_mod" in module._modules
        and not (module._forward_hooks or module._forward_pre_hooks)
    ):
        module = module._modules["_orig_mod"]
    return module


def as_python() -> AbstractContextManager[Any]:
    """Run compiled code as Python inside the `with` block."""
    # If the compiler was never imported, no code is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
