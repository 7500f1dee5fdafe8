"""Repair Triton's interpreter, which runs the kernels on a machine without a GPU.

The interpreter holds a number as an array of one element. Python's `range` needs an int, for which Triton before 3.7
calls `int(array)`. numpy 2.4 refuses that: "only 0-dimensional arrays can be converted to Python scalars". Triton 3.7
takes the element out of the array first, and this does the same. A requirement on versions cannot replace it: CUDA
builds of torch 2.10 and 2.11 pin triton 3.6, and compiled kernels do not need numpy at all.

Remove this file when setup.py asks for triton>=3.7.
"""

from typing import Any

import triton


def repair_range() -> None:
    """Allow a range in an interpreted kernel to end at a number that is only known at run time."""
    if not triton.knobs.runtime.interpret or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)  # sets tensor.__index__, for every launch anew
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair
