"""Repair Triton's interpreter, which runs the kernels on a machine without a GPU.

The interpreter holds a scalar in an array of one element. Python's `range` needs an int, and Triton before 3.7 calls
`int(array)` to get it. numpy 2.4 refuses this call: "only 0-dimensional arrays can be converted to Python scalars".
Triton 3.7 takes the element out of the array first, and this file makes older versions do the same. Requirements on
versions cannot replace this file: CUDA builds of torch 2.10 and 2.11 pin triton 3.6, and kernels compiled for a GPU do
not need numpy.

Remove this file when setup.py asks for triton>=3.7.
"""

from typing import Any

import triton


def repair_range() -> None:
    """Let `range` in an interpreted kernel end at a value that is only known at run time, if Triton is too old."""
    if not triton.knobs.runtime.interpret or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)  # sets tensor.__index__ at every launch
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair
