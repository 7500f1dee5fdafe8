"""Large models on a small machine: prune random checkpoints, and measure memory and time.

    python bench/runs/proof.py FOLDER [CASE ...]

Each case writes a checkpoint into FOLDER (unless it is there), prunes it under `/usr/bin/time -v`, has the result
verified, and prints a row. Calibration is small and steps are few: this shows memory, not quality.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from random_checkpoint import generate

_HEADS = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 2048}
_FEW = ["--refit", "1", "--rounds", "0", "--steps", "1", "--reconstruct", "0"]

# Family, sizes, and flags of the run.
CASES = {
    # Llama-3.2-3B's sizes, in less than half of its own size.
    "3B": (
        "llama",
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256}
        | {"tie_word_embeddings": True}
        | _HEADS,
        ["--host-memory", "2.5", *_FEW],
    ),
    # Two blocks of Llama-3-70B: no run holds more than one block at work.
    "70B": (
        "llama",
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2, "vocab_size": 2048}
        | _HEADS
        | {"num_attention_heads": 64},
        ["--method", "wanda"],
    ),
    # A mixture with 64 experts in a block: transformers stacks them when it loads a model.
    "experts": (
        "mixtral",
        {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 2048}
        | {"num_local_experts": 64, "num_experts_per_tok": 2}
        | _HEADS
        | {"num_attention_heads": 8, "head_dim": 64},
        ["--host-memory", "2", *_FEW],
    ),
}


def prove(folder: Path, case: str) -> dict:
    """Prune one case; returns its row of the table."""
    family, sizes, flags = CASES[case]
    model, output, text = folder / case, folder / f"{case}-pruned", folder / "text.txt"
    if not model.exists():
        generate(model, family, **sizes)
    text.write_text("".join(f"{n}: a rose is a rose is a rose, {n % 7} times.\n" for n in range(2000)))
    command = ["/usr/bin/time", "-v", sys.executable, "-m", "sparsefw.run", "--model", str(model)]
    command += ["--dataset", str(text), "--nsamples", "8", "--seqlen", "128", "--output", str(output), "--overwrite"]
    done = subprocess.run([*command, *flags], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr}")
    kib = int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)[1])
    subprocess.run([sys.executable, "-m", "sparsefw.verify", str(output)], check=True)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {
        "case": case,
        "GiB on disk": sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**30,
        "peak GiB": kib / 2**20,
        "expected GiB": report["memory"]["expected"]["host"] / 2**30,
        "minutes": sum(report["seconds"].values()) / 60,
        "flags": " ".join(flags),
    }


def main() -> None:
    """Run the cases, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints go, with 30 GB free")
    parser.add_argument("case", nargs="*", choices=[*CASES, []], help="(default: all)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = [prove(arguments.folder, case) for case in arguments.case or CASES]
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values()) + " |")


if __name__ == "__main__":
    main()
