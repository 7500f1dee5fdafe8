"""Call one kernel on tensors of your own, and time it: the Gram matrix X^T X, or Hessian, of inputs X.

python examples/time_kernel.py                                            # on a GPU
TRITON_INTERPRET=1 python examples/time_kernel.py 64 256                  # without one: right, and slow

`python -m bench` times every kernel, with cold caches and against the machine's roofs.
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
        # The whole square by tensor cores, summed in fp32. On a CPU torch has no such product.
        return torch.mm(X.T, X, out_dtype=torch.float32) if X.is_cuda else torch.mm(X.T, X).float()

    truth = X.float().T @ X.float()
    torch.testing.assert_close(kernel(), truth, rtol=1e-3, atol=1e-4 * truth.max().item())
    for name, run in (("sparsefw", kernel), ("torch", library)):
        print(f"{name:9} {1e3 * Timer('run()', globals={'run': run}).timeit(10).median:9.3f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
