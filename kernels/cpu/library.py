"""Load what was compiled at installation: packed.cpp and selection.cpp. Without a compiler torch does their work."""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

# Sets of instructions, in the order of their numbers in packed.cpp.
LEVELS = ("portable", "AVX2", "AVX-512", "AVX-512 BF16", "AMX")

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@cache
def library() -> ctypes.CDLL | None:
    """Load the library; None if it was not compiled."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_packed{suffix}")).exists()]
    if not found:
        return None
    loaded = ctypes.CDLL(str(found[0]))
    matrix: list[Any] = [_INT, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG]
    loaded.packed_product.argtypes = [_INT, _INT, _INT, _POINTER, _LONG, *matrix, _POINTER]
    loaded.packed_unpack.argtypes = [_INT, _INT, *matrix, _LONG, _LONG, _POINTER]
    loaded.select_best.argtypes = [_INT, _INT, *4 * [_POINTER], *7 * [_LONG], _INT]
    for function in (loaded.packed_product, loaded.packed_unpack, loaded.select_best):
        function.restype = None
    return loaded


@cache
def level() -> int | None:
    """Return the index in LEVELS of the best instructions of this machine; None if nothing was compiled."""
    loaded = library()
    return None if loaded is None else loaded.packed_level()
