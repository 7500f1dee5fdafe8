"""Launches of Triton's interpreter are checked, and may have the tiles of a GPU: fixtures of tests/kernels.

Every access must be of an element of a tensor that the launch was given, and no two programs may touch an element that
one of them writes. Bulk copies count entry by entry. Atomics may meet, but must stay inside.

What this cannot see: threads of one program that race, where a barrier is missing; programs of two launches; an access
that is right for another of two tensors in one storage; and atomic_cas, which no kernel has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

NOBODY, SEVERAL = -1, -2


@dataclass
class Region:
    """A storage that a launch was given: for each byte whether an element begins there, and its programs so far."""

    names: list[str]
    start: int
    begins: np.ndarray
    written: np.ndarray
    read: np.ndarray


def regions_of(arguments: Mapping[str, Any]) -> list[Region]:
    """The storages of all arguments that are tensors or describe one, from the last one in memory to the first."""
    regions: dict[int, Region] = {}
    for name, argument in arguments.items():
        tensor = getattr(argument, "base", argument)
        if not hasattr(tensor, "untyped_storage") or not tensor.numel():
            continue
        start, n = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        fresh = Region([], start, np.zeros(n, bool), np.full(n, NOBODY, np.int32), np.full(n, NOBODY, np.int32))
        region = regions.setdefault(start, fresh)
        region.names.append(name)
        size = tensor.element_size()
        first, strides = region.begins[size * tensor.storage_offset() :], [size * stride for stride in tensor.stride()]
        np.lib.stride_tricks.as_strided(first, tensor.shape, strides)[...] = True
    return sorted(regions.values(), key=lambda region: -region.start)


class Checker:
    """The interpreter's library of memory accesses, each checked before it is done."""

    def __init__(self, interpreter: ModuleType) -> None:
        self._library, self._builder = interpreter._interpreter, interpreter.interpreter_builder
        self._kernel, self._regions = "", list[Region]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def begin(self, kernel: str, arguments: Mapping[str, Any]) -> None:
        """Begin a launch."""
        self._kernel, self._regions = kernel, regions_of(arguments)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self._check("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._library.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self._check("store", pointers, mask, value.dtype.itemsize)
        self._library.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> np.ndarray:
        self._check("atomic", pointers, mask, value.dtype.itemsize)
        return self._library.atomic_rmw(op, pointers, value, mask, sem)

    def _check(self, access: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Raise unless an access is of elements of one tensor that no other program changes."""
        address = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64)
        if not address.size:
            return
        first = address.min()
        region = next((each for each in self._regions if each.start <= first), self._regions[-1])
        at, n = address - region.start, len(region.begins)
        self._fail(access, region, at[(at < 0) | (at + size > n)], f"outside of its {n} bytes")
        self._fail(access, region, at[~region.begins[at]], "where no element begins")
        if access == "atomic":
            return
        (x, y, z), (columns, rows, _) = self._builder.grid_idx, self._builder.grid_dim
        mine = (NOBODY, program := x + columns * (y + rows * z))
        self._fail(access, region, at[~np.isin(region.written[at], mine)], "which another program has written")
        if access == "store":
            self._fail(access, region, at[~np.isin(region.read[at], mine)], "which another program has read")
            region.written[at] = program
        else:
            region.read[at] = np.where(np.isin(region.read[at], mine), program, SEVERAL)

    def _fail(self, access: str, region: Region, at: np.ndarray, why: str) -> None:
        """Raise if there is a byte at which an access is wrong."""
        if at.size:
            place = f"{'/'.join(region.names)} at byte {at[0]}"
            raise AssertionError(f"{self._kernel}: {access} of {place}, {why} (program {self._builder.grid_idx})")


@pytest.fixture(autouse=True)
def checked_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise in a launch at the first access that is wrong."""
    from triton.runtime import interpreter

    checker = Checker(interpreter)
    copy_to_host = interpreter.GridExecutor._init_args_hst

    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = copy_to_host(self, args, kwargs)
        checker.begin(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        return args, kwargs

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", begin)
    monkeypatch.setattr(interpreter, "_interpreter", checker)


@pytest.fixture
def own_tiles() -> None:
    """A test that asks for it keeps the interpreter's tiles."""


@pytest.fixture(autouse=True)
def tiles_of_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that the GPU of `--tiles` has, in the interpreter. A test may replace some by its own."""
    import triton

    from sparsefw.kernels import launch

    tiles = request.config.getoption("tiles")
    if tiles and launch.INTERPRET and "own_tiles" not in request.fixturenames:
        target = SimpleNamespace(backend="cuda", arch=int(tiles.removeprefix("sm_")))
        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
        monkeypatch.setattr(triton.runtime, "driver", driver)
        monkeypatch.setattr(launch, "INTERPRET", False)
