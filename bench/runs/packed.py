"""Packed matrices on a CPU: products against torch's, and what a packed checkpoint gives when text is generated.

    python bench/runs/packed.py product [--threads N] [--level AVX2]
    python bench/runs/packed.py generate PRUNED PACKED [--threads N]

Products are those of bf16 weights, by torch also of fp32; "loop" is dense.cpp. They read 8 matrices in turn, which no
cache holds; the least of 7 times. Generation is greedy, each model in a process of its own, in turns; the median of 3.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch

from sparsefw.checkpoint.packed import pack
from sparsefw.kernels import packed_cpu

SHAPES, SPARSITIES, BATCHES = [(4096, 4096), (11008, 4096), (4096, 11008)], (0.5, 0.6, 0.7), (1, 2, 4, 8, 16)
COPIES, REPEATS, TOKENS = 8, 7, 64


def least_ms(call, matrices) -> float:
    """The least time of a call with a matrix, in ms; each repetition goes through all of them."""
    times = []
    for _ in range(REPEATS):
        for matrix in matrices:
            begin = time.perf_counter()
            call(matrix)
            times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def dense_loop(level: str):
    """A function of x and W that gives W x by dense.cpp, compiled with the instructions of a level."""
    target = Path(tempfile.mkdtemp()) / "dense.so"
    machine = "-mavx2 -mfma" if level == "AVX2" else "-march=native"
    flags = [*machine.split(), "-O3", "-fopenmp", "-fPIC", "-shared", "-o", str(target)]
    subprocess.run(["g++", *flags, str(Path(__file__).with_name("dense.cpp"))], check=True)
    product, y = ctypes.CDLL(str(target)).dense_product, torch.empty(max(rows for rows, _ in SHAPES))

    def call(x: torch.Tensor, W: torch.Tensor) -> None:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, x.float(), W)]
        sizes = [ctypes.c_int64(n) for n in W.shape]
        product(torch.get_num_threads(), *pointers, *sizes, ctypes.c_void_p(y.data_ptr()))

    return call


def products(level: str) -> None:
    """Print ms of torch in bf16 and fp32, of a dense loop, and of packed matrices, by shape, rows of x and sparsity."""
    number = packed_cpu.LEVELS.index(level) if level else packed_cpu.level()
    assert number <= packed_cpu.level()
    packed_cpu.level = lambda: number
    loop = dense_loop(packed_cpu.LEVELS[number])
    print(f"{packed_cpu.LEVELS[number]}, {torch.get_num_threads()} threads, ms")
    names = ("torch bf16", "torch fp32", "loop", *(f"{s:.0%}" for s in SPARSITIES))
    print(f"{'matrix':14}{'rows of x':>10}", *(f"{name:>10}" for name in names))
    for rows, cols in SHAPES:
        dense = [torch.randn(rows, cols).bfloat16() for _ in range(COPIES)]
        wide = [W.float() for W in dense]
        packed = []
        for sparsity in SPARSITIES:
            kept = cols - int(sparsity * cols)
            order = [torch.rand(W.shape).topk(cols - kept).indices for W in wide]
            zeroed = [W.scatter(1, removed, 0) for W, removed in zip(dense, order, strict=True)]
            packed.append([pack("W", W, kept, False) for W in zeroed])
        for batch in BATCHES:
            x = torch.randn(batch, cols)
            half = x.bfloat16()
            times = [least_ms(lambda W, x=half: x @ W.T, dense), least_ms(lambda W, x=x: x @ W.T, wide)]
            times.append(least_ms(lambda W, x=half: loop(x, W), dense) if batch == 1 else float("nan"))
            times += [least_ms(lambda W, x=half: packed_cpu.packed_product(x, *W), matrices) for matrices in packed]
            print(f"{f'{rows} x {cols}':14}{batch:>10}", *(f"{t:>10.2f}" for t in times))


def generate_once(folder: str, dtype: str) -> None:
    """Load a checkpoint, generate, and print seconds, bytes of the process and tokens a second."""
    from transformers import AutoModelForCausalLM

    import sparsefw.packed  # noqa: F401  # tells transformers how to load packed checkpoints

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded, prompt = time.perf_counter() - begin, torch.arange(1, 17).view(1, 16)
    options = dict(do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0)
    model.generate(prompt, **options | dict(min_new_tokens=4, max_new_tokens=4))
    begin = time.perf_counter()
    model.generate(prompt, **options)
    seconds = time.perf_counter() - begin
    print(json.dumps(dict(load=loaded, gb=psutil.Process().memory_full_info().uss / 1e9, rate=TOKENS / seconds)))


def generation(pruned: str, packed: str, threads: int) -> None:
    """Print the figures of a pruned checkpoint in bf16 and fp32, and of the packed one."""
    ways = [(pruned, "bfloat16"), (pruned, "float32"), (packed, "bfloat16")]
    runs: list[list[dict]] = [[] for _ in ways]
    for _ in range(3):
        for way, results in zip(ways, runs, strict=True):
            command = [sys.executable, __file__, "once", *way, "--threads", str(threads)]
            results.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    print(f"{'checkpoint':24}{'dtype':>10}{'load s':>9}{'GB':>8}{'tokens/s':>10}")
    for (folder, dtype), results in zip(ways, runs, strict=True):
        load, gb, rate = (statistics.median(result[key] for result in results) for key in ("load", "gb", "rate"))
        print(f"{folder[-24:]:24}{dtype:>10}{load:>9.1f}{gb:>8.2f}{rate:>10.2f}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["product", "generate", "once"])
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--level", choices=packed_cpu.LEVELS[1:], default="", help="instructions (default: the best)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "product":
        products(arguments.level)
    elif arguments.what == "generate":
        generation(*arguments.arguments, arguments.threads)
    else:
        generate_once(*arguments.arguments)


if __name__ == "__main__":
    main()
