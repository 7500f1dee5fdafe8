"""Tests see no GPU unless `--gpu` is given: everywhere the same tests run, the Triton kernels in the interpreter."""

import gc
import os
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from sparsefw.environment import set_environment

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a worker, so a worker gets one thread. Set before torch reads it, and for processes that tests
    # start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Defaults depend on them. Tests that want them set them.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

# The GPUs whose rounding `--numerics` pretends, and their tiles.
NUMERICS = {"hopper": "sm_90", "ampere": "sm_80"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that show a GPU, or pretend a part of one."""
    parser.addoption("--gpu", action="store_true", help="run on the GPU, which is hidden otherwise (`make test-gpu`)")
    parser.addoption("--tiles", choices=("sm_80", "sm_90"), help="in the interpreter, too, tiles are this GPU's")
    parser.addoption("--numerics", choices=NUMERICS, help="the interpreter rounds as this GPU, and has its tiles")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare a process that runs tests; the one that hands them to workers waits for no import of torch."""
    if not config.getoption("gpu"):
        # Set before anything asks for CUDA or imports triton, as the models of transformers do: its own library is
        # decorated at import.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")
    set_environment()
    if numerics := config.getoption("numerics"):
        config.option.tiles = NUMERICS[numerics]
    if config.getoption("dist", "no") == "no":
        _prepare_triton(config.getoption("gpu"))
        if numerics:
            import_module("helpers.numerics").install(numerics)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of what only the hardware does, such as the rounding of tensor cores."""
    if item.get_closest_marker("gpu") and not item.config.getoption("gpu"):
        pytest.skip("needs a GPU: --gpu")


def _prepare_triton(gpu: bool) -> None:
    import torch

    if gpu:
        from sparsefw.errors import InputError
        from sparsefw.probe import probe_gpu, why_no_gpu

        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--gpu: {why_no_gpu()}")
        try:
            probe_gpu()
        except InputError as error:
            raise pytest.UsageError(f"--gpu: {error}") from error

    from triton import language
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_language_once(function: Any) -> Any:
        """Replace the functions of the languages that a kernel sees, unless they are replaced.

        Triton does so for every call of a function in a kernel, and looks through all of the language each time. The
        scope of a launch puts them back; that of a call inside is dropped.
        """
        seen = [value for value in function.__globals__.values() if value is language or value is language.core]
        if any(language.core.is_builtin(module.load) for module in seen):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_language_once
    # A third of the interpreter's time: a sum in 64 bits beside each of integers, for an assertion that is off.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


# Imported modules stay. To search them for garbage again and again takes a seventh of the time.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take all that is there now out of the collections."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let it go at the end as it would have gone, or extensions report leaks."""
    gc.unfreeze()
