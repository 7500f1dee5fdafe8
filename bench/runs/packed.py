"""Time packed matrices on a CPU: products compared with torch's, and text that a packed checkpoint generates.

    python bench/runs/packed.py product [--threads N] [--tiny]
    python bench/runs/packed.py generate CHECKPOINT DTYPE [--threads N]

`product` multiplies with matrices that are dense in bf16 and fp32, or packed at 50, 60 and 70 %. "loop" is dense.cpp.
The matrices of a product take turns, and no cache holds all of them. The fastest product counts. `generate` prints the
seconds to load a checkpoint, the memory of the process, and tokens a second of greedy text.
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

from sparsefw.extras.packed.matrices import pack
from sparsefw.kernels.cpu import packed as packed_cpu

SHAPES, TINY = [(4096, 4096), (11008, 4096), (4096, 11008)], [(64, 128)]
COPIES, ROUNDS, TOKENS = 8, 7, 64


def compile_loop() -> Callable[[Tensor, Tensor], None]:
    """Compile dense.cpp for this processor, as a function of x (1, d) and W (rows, d) that computes W x."""
    library = f"{tempfile.mkdtemp()}/dense.so"
    flags = ["-march=native", "-O3", "-fopenmp", "-fPIC", "-shared", "-o", library]
    subprocess.run(["g++", *flags, Path(__file__).with_name("dense.cpp")], check=True)
    product = ctypes.CDLL(library).dense_product

    def loop(x: Tensor, W: Tensor) -> None:
        x32, y = x.float(), torch.empty(len(W))
        x_at, x32_at, W_at, y_at = (ctypes.c_void_p(t.data_ptr()) for t in (x, x32, W, y))
        product(torch.get_num_threads(), x_at, x32_at, W_at, *map(ctypes.c_int64, W.shape), y_at)

    return loop


def time_products(rows: int, d: int, loop: Callable[[Tensor, Tensor], None]) -> None:
    """Print the ms of products with matrices (rows, d), by the number of rows of x."""
    dense = [torch.randn(rows, d).bfloat16() for _ in range(COPIES)]
    ways: dict[str, tuple[Callable, list]] = {
        "torch bf16": (lambda x, W: x @ W.T, dense),
        "torch fp32": (lambda x, W: x @ W.T, [W.float() for W in dense]),
        "loop": (loop, dense),
    }
    for sparsity in (0.5, 0.6, 0.7):
        removed = int(sparsity * d)
        zeroed = [W.scatter(1, torch.rand(W.shape).topk(removed).indices, 0) for W in dense]
        packed = [pack("W", W, d - removed, False) for W in zeroed]
        ways[f"{sparsity:.0%}"] = lambda x, W: packed_cpu.packed_product(x, *W), packed
    for batch in (1, 2, 4, 8, 16):
        print(f"{rows} x {d}, {batch} rows of x, ms")
        for name, (multiply, matrices) in ways.items():
            if name != "loop" or batch == 1:
                x, times = torch.randn(batch, d, dtype=matrices[0][0].dtype), []
                for W in ROUNDS * matrices:
                    begin = time.perf_counter()
                    multiply(x, W)
                    times.append(time.perf_counter() - begin)
                print(f"{name:>14}{1e3 * min(times):8.2f}", flush=True)


def time_text(checkpoint: str, dtype: str) -> None:
    """Generate text by a checkpoint; print the seconds to load it, GB of the process, and tokens a second."""
    from transformers import AutoModelForCausalLM

    import sparsefw.packed  # noqa: F401  # tells transformers how to load packed checkpoints

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    print(f"loaded in {time.perf_counter() - begin:.1f} s")
    prompt = torch.arange(1, 17).view(1, 16)
    # The first tokens warm up.
    for tokens in (4, TOKENS):
        begin = time.perf_counter()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        rate = tokens / (time.perf_counter() - begin)
    print(f"{psutil.Process().memory_full_info().uss / 1e9:.2f} GB, {rate:.2f} tokens a second")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["product", "generate"])
    parser.add_argument("checkpoint", nargs="*", metavar="CHECKPOINT DTYPE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="a tiny matrix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "generate":
        time_text(*arguments.checkpoint)
        return
    print(f"{packed_cpu.LEVELS[packed_cpu.level()]}, {torch.get_num_threads()} threads")
    loop = compile_loop()
    for shape in TINY if arguments.tiny else SHAPES:
        time_products(*shape, loop)


if __name__ == "__main__":
    main()
