"""Random checkpoints of any size."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsefw.inputs import DEFAULT_MODEL


def generate(folder: Path, family: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Path:
    """Write a checkpoint with the built-in model's tokenizer.

    Args:
        folder: folder of the checkpoint. It is made with its parents.
        family: transformers' model_type.
        device: device that draws the weights. They depend on it.
        dtype: dtype of the weights.
        sizes: sizes of the config, such as `hidden_size`; the vocabulary must be at least the tokenizer's.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=dtype)
    model.save_pretrained(folder, max_shard_size="1GB")
    for path in DEFAULT_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder
