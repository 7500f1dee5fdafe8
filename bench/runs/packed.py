"""Time packed matrices on a CPU: products compared with torch's, and text that a packed checkpoint generates.

    python bench/runs/packed.py product [--threads N] [--tiny]
    python bench/runs/packed.py generate CHECKPOINT DTYPE [--threads N]

Products are those of bf16 weights, by torch also of fp32 ones; "loop" is dense.cpp. They read several matrices in turn,
which no cache holds. The fastest of 7 rounds counts. `generate` prints the seconds to load a checkpoint, the memory of
the process, and tokens a second of greedy text.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from torch import Tensor

from sparsefw.checkpoint.packed import pack
from sparsefw.kernels import packed_cpu

SHAPES, SPARSITIES, BATCHES = [(4096, 4096), (11008, 4096), (4096, 11008)], (0.5, 0.6, 0.7), (1, 2, 4, 8, 16)
TINY = [(64, 128)]
COPIES, ROUNDS, TOKENS = 8, 7, 64


def least_ms(call: Callable, matrices: list) -> float:
    """Measure the least time of a call with a matrix, in ms; each round goes through all matrices."""
    times = []
    for _ in range(ROUNDS):
        for matrix in matrices:
            begin = time.perf_counter()
            call(matrix)
            times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def dense_loop() -> Callable[[Tensor, Tensor], None]:
    """Compile dense.cpp for this processor, as a function of x and W that computes W x."""
    library = Path(tempfile.mkdtemp()) / "dense.so"
    flags = ["-march=native", "-O3", "-fopenmp", "-fPIC", "-shared", "-o", str(library)]
    subprocess.run(["g++", *flags, str(Path(__file__).with_name("dense.cpp"))], check=True)
    product = ctypes.CDLL(str(library)).dense_product

    def call(x: Tensor, W: Tensor) -> None:
        y = torch.empty(len(W))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, x.float(), W)]
        sizes = [ctypes.c_int64(n) for n in W.shape]
        product(torch.get_num_threads(), *pointers, *sizes, ctypes.c_void_p(y.data_ptr()))

    return call


def products(shapes: list[tuple[int, int]]) -> None:
    """Print ms of torch in bf16 and fp32, of a dense loop, and of packed matrices, by shape, rows of x and sparsity."""
    loop = dense_loop()
    print(f"{packed_cpu.LEVELS[packed_cpu.level()]}, {torch.get_num_threads()} threads, ms")
    names = ("torch bf16", "torch fp32", "loop", *(f"{s:.0%}" for s in SPARSITIES))
    print(f"{'matrix':14}{'rows of x':>10}", *(f"{name:>10}" for name in names))
    for rows, cols in shapes:
        dense = [torch.randn(rows, cols).bfloat16() for _ in range(COPIES)]
        wide = [W.float() for W in dense]
        packed = []
        for sparsity in SPARSITIES:
            removed = int(sparsity * cols)
            places = [torch.rand(W.shape).topk(removed).indices for W in dense]
            zeroed = [W.scatter(1, index, 0) for W, index in zip(dense, places, strict=True)]
            packed.append([pack("W", W, cols - removed, False) for W in zeroed])
        for batch in BATCHES:
            x = torch.randn(batch, cols)
            half = x.bfloat16()
            times = [least_ms(lambda W, x=half: x @ W.T, dense), least_ms(lambda W, x=x: x @ W.T, wide)]
            times.append(least_ms(lambda W, x=half: loop(x, W), dense) if batch == 1 else float("nan"))
            times += [least_ms(lambda W, x=half: packed_cpu.packed_product(x, *W), matrices) for matrices in packed]
            print(f"{f'{rows} x {cols}':14}{batch:>10}", *(f"{t:>10.2f}" for t in times))


def generate(folder: str, dtype: str) -> None:
    """Load a checkpoint, generate, and print seconds, GB of the process and tokens a second."""
    from transformers import AutoModelForCausalLM

    import sparsefw.packed  # noqa: F401  # tells transformers how to load packed checkpoints

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded, prompt = time.perf_counter() - begin, torch.arange(1, 17).view(1, 16)
    options = dict(do_sample=False, pad_token_id=0)
    model.generate(prompt, min_new_tokens=4, max_new_tokens=4, **options)
    begin = time.perf_counter()
    model.generate(prompt, min_new_tokens=TOKENS, max_new_tokens=TOKENS, **options)
    rate = TOKENS / (time.perf_counter() - begin)
    print(
        f"loaded in {loaded:.1f} s, {psutil.Process().memory_full_info().uss / 1e9:.2f} GB, {rate:.2f} tokens a second"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["product", "generate"])
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="a tiny matrix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "product":
        products(TINY if arguments.tiny else SHAPES)
    else:
        generate(*arguments.arguments)


if __name__ == "__main__":
    main()
