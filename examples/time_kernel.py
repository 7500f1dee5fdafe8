"""Call one kernel on tensors of your own, and time it against torch: the Gram matrix X^T X, or Hessian, of inputs X.

python examples/time_kernel.py                                            # on a GPU
TRITON_INTERPRET=1 python examples/time_kernel.py 64 256                  # without one: right, and slow
"""

import sys

import torch
from torch.utils.benchmark import Timer

from sparsefw.kernels.triton_ops import gram_accumulate, mirror_lower


def main(tokens=16384, d=4096, dtype=torch.bfloat16):
    """X is (tokens, d)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    X = torch.randn(int(tokens), int(d), device=device, dtype=dtype)
    G = torch.zeros(int(d), int(d), device=device)

    def kernel():
        # The lower triangle, added to G; mirror_lower copies it to the upper one, once all inputs are in.
        return mirror_lower(gram_accumulate(G.zero_(), X))

    def library():
        # The whole square on tensor cores, summed in fp32. On a CPU torch has no such product.
        return torch.mm(X.T, X, out_dtype=torch.float32) if X.is_cuda else torch.mm(X.T, X).float()

    def plain():
        return X.float().T @ X.float()

    torch.testing.assert_close(kernel(), plain(), rtol=1e-3, atol=1e-2)
    flops = X.shape[0] * X.shape[1] * (X.shape[1] + 1)
    for name, run in (("sparsefw", kernel), ("torch", library), ("torch in fp32", plain)):
        seconds = Timer("run()", globals={"run": run}).timeit(10).median
        print(f"{name:14} {seconds * 1e3:9.3f} ms  {flops / seconds / 1e12:8.3f} Tflops of a triangle")


if __name__ == "__main__":
    main(*sys.argv[1:])
