"""Random checkpoints of any size."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsefw.inputs import DEFAULT_MODEL


def generate(folder: Path, family: str, device: str = "cpu", **sizes: int) -> Path:
    """Write a checkpoint in bf16, with the built-in model's tokenizer.

    Args:
        folder: folder of the checkpoint, made with its parents.
        family: transformers' model_type.
        device: device that draws the weights, which they depend on.
        sizes: sizes of the config, such as `hidden_size`; the vocabulary must be at least the tokenizer's.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1GB")
    for path in DEFAULT_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder
