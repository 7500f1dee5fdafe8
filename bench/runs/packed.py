"""Time the text that checkpoints generate, packed and dense, in turns: `python bench/runs/packed.py PACKED DENSE`.

Every turn is a process of its own, which prints the memory of the process and tokens a second of greedy text; the
medians over the turns are printed as JSON. Products with packed matrices are timed by `python -m bench packed_product`.
With --disk all layers stay on the disk, and accelerate reads each for every token, as it does for a model that does not
fit into memory. The system forgets what it has read before each token.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

# The modules of bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host import REPO, commit, cpu

# The package of this checkout.
sys.path.insert(0, str(REPO))

import psutil
import torch
from transformers import AutoModelForCausalLM

import sparsefw.packed  # noqa: F401  # tells transformers how to load packed checkpoints

TURNS = 3


def one_turn(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load a checkpoint, and generate text."""
    torch.set_num_threads(arguments.threads)
    disk = dict(device_map="auto", max_memory={"cpu": 0}) if arguments.disk else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **disk)

    def forgotten(ids: torch.Tensor, scores: Any) -> Any:
        for path in folder.glob("*.safetensors") if arguments.disk else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return scores

    prompt = torch.arange(1, 17).view(1, 16)
    # The first tokens warm up.
    for tokens in (2, 4 if arguments.disk else 32):
        begin = time.perf_counter()
        length = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        model.generate(prompt, logits_processor=[forgotten], **length)
        rate = tokens / (time.perf_counter() - begin)
    return dict(gb=psutil.Process().memory_full_info().uss / 1e9, rate=rate)


def main() -> None:
    """Take turns, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    add("--threads", type=int, default=1)
    add("--disk", action="store_true", help="keep all layers on the disk")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(one_turn(*arguments.checkpoints, arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    options = [word for word in sys.argv[1:] if Path(word) not in arguments.checkpoints]
    for path in arguments.checkpoints * TURNS:
        command = [sys.executable, __file__, str(path), *options, "--child"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.setdefault(path.name, []).append(json.loads(printed.splitlines()[-1]))
    rows = {name: {key: median(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()}
    machine = {"cpu": cpu(), "commit": commit()}
    results = {"command": " ".join(["python bench/runs/packed.py", *found, *options])} | machine | {"rows": rows}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
