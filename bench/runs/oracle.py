"""Hold a change of the code to the same bytes, by digests of the outputs of pruning.

    python bench/runs/oracle.py --write          # before a change
    python bench/runs/oracle.py [NAME ...]       # after it: exit status 1 if a checkpoint has other tensors

The runs prune the built-in model and tiny random models, one thread each, with the kernels of torch. A digest covers
names, dtypes, shapes and bytes of all tensors of the output, and the perplexities of the run. The division of tensors
into files does not count. Digests are of one processor and one version of torch and transformers, which the file names.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import transformers
from torch import nn

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "bench"), str(REPO / "tests")]

DIGESTS = REPO / "bench/results/oracle.json"
TEXT = "".join(f"Line {n}: the quick brown fox jumps over {n * n} lazy dogs.\n" for n in range(400))
OTHER = "".join(f"def f{n}(x):\n    return x ** {n} + {n % 7}\n" for n in range(300))
SHORT = ["--nsamples", "16", "--eval-windows", "8"]
# Flags of short runs of the built-in model. Without --recover they do not recover the model.
BUILT_IN = {
    "recovered": "--recover 2048",
    "refit-0": "--refit 0",
    "2-4": "--sparsity 2:4",
    "layer": "--sparsity layer:0.6",
    "paper": "--preset paper --steps 20",
    "fast": "--preset fast",
    "sparsegpt": "--method sparsegpt",
    "wanda": "--method wanda --reconstruct 1",
    "ria": "--method ria --sparsity 4:8",
    "bf16": "--precision bf16",
    "selected": "--include re:.*mlp --ignore re:.*layers.0 --reconstruct 0",
}
# The flags of runs of tiny models on two texts.
TINY = ["--nsamples", "6", "--seqlen", "32", "--eval-windows", "4"]

# A run takes an empty folder, and returns what is compared.
Run = Callable[[Path], dict[str, Any]]


def tensors_digest(folder: Path) -> str:
    """Digest all tensors of a checkpoint, by name."""
    from helpers.commands import tensors_of

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def result_of(folder: Path) -> dict[str, Any]:
    """Read the part of an output that is compared."""
    report = json.loads((folder / "report.json").read_text())
    return {"tensors": tensors_digest(folder), "perplexity": [text["perplexity"] for text in report["evaluation"]]}


def run(folder: Path, flags: Sequence[str], ranks: int = 1) -> dict[str, Any]:
    """Make a run by the command line."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    usual = ["--kernel", "torch", "--recover", "0", "--output", str(folder / "out")]
    command += ["-m", "sparsefw.run", *usual, *flags]
    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return result_of(folder / "out")


def tiny(*arguments: Any, helper: str = "families.save_model", flags: str = "", ranks: int = 1, **changes: Any) -> Run:
    """Return a run on a tiny random checkpoint, calibrated on a mixture of two texts.

    Args:
        helper: the function that writes the checkpoint: a module of tests/helpers, and its name there.
        arguments, changes: arguments of it after the folder.
        flags, ranks: of the run.
    """

    def do(folder: Path) -> dict[str, Any]:
        resolve_name(f"helpers.{helper}")(folder / "model", *arguments, **changes)
        (folder / "a.txt").write_text(TEXT)
        lines = (json.dumps({"text": OTHER[i : i + 500]}) + "\n" for i in range(0, 9000, 500))
        (folder / "b.jsonl").write_text("".join(lines))
        texts = ["--dataset", "a.txt=2", "--dataset", "b.jsonl", "--eval", "a.txt"]
        return run(folder, ["--model", str(folder / "model"), *texts, *TINY, *flags.split()], ranks)

    return do


def in_memory(folder: Path) -> dict[str, Any]:
    """Prune a model in memory on documents. The model holds the written weights afterwards."""
    from helpers.families import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sparsefw

    source = save_model(folder / "model", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(source)
    texts = [TEXT[i : i + 400] for i in range(0, 12000, 400)]
    (folder / "a.txt").write_text(TEXT)
    options = dict(nsamples=6, seqlen=32, eval_windows=4, kernel="torch", recover=0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    sparsefw.prune(model, folder / "out", dataset=texts, evaluate=str(folder / "a.txt"), tokenizer=tokenizer, **options)
    model.save_pretrained(folder / "again")
    return result_of(folder / "out") | {"model": tensors_digest(folder / "again")}


def on_batches(folder: Path) -> dict[str, Any]:
    """Prune a plain stack of blocks in memory, on batches of vectors."""
    import sparsefw

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    batches = [torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    sparsefw.prune(model, folder / "out", calibration=batches, kernel="torch", recover=0)
    return result_of(folder / "out")


RUNS = {
    "default": partial(run, flags=[]),
    **{name: partial(run, flags=[*SHORT, *flags.split()]) for name, flags in BUILT_IN.items()},
    "llama": tiny("llama"),
    "mixture": tiny("mixtral", flags="--reconstruct 1"),
    "experts-bf16": tiny("qwen2_moe", dtype=torch.bfloat16, flags="--sparsity 2:4"),
    "handed-on": tiny("gemma3n_text"),
    "parallel": tiny("gptj"),
    "fp8": tiny("deepseek_v3", helper="quantized.save_fp8"),
    "mxfp4": tiny(helper="quantized.save_mxfp4"),
    "in-memory": in_memory,
    "batches": on_batches,
    "ranks": partial(run, flags=SHORT, ranks=2),
    "ranks-mixture": tiny("qwen3_moe", ranks=2),
}


def machine() -> dict[str, str]:
    """Name the machine and the versions on which digests depend."""
    from host import cpu

    return {"cpu": cpu(), "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> int:
    """Make the runs, and compare or write their digests."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--write", action="store_true", help="write the digests")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in RUNS]:
        parser.error(f"{', '.join(unknown)}: no such run; there are {', '.join(RUNS)}")
    known = json.loads(DIGESTS.read_text())
    if known["machine"] != machine():
        if not arguments.write:
            sys.exit(f"{DIGESTS}: made on {known['machine']}, this is {machine()}: --write them before the change")
        known = {"machine": machine(), "runs": {}}
    changed = False
    for name in arguments.names or RUNS:
        with tempfile.TemporaryDirectory() as scratch:
            result = RUNS[name](Path(scratch))
        same = known["runs"].get(name) == result
        print(f"{name:14} {'same' if same else 'DIFFERS' if name in known['runs'] else 'new'}", flush=True)
        if arguments.write:
            known["runs"][name] = result
        elif not same:
            changed = True
            print(f"  was {known['runs'].get(name)}\n  is  {result}")
    if arguments.write:
        DIGESTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return int(changed)


if __name__ == "__main__":
    sys.exit(main())
