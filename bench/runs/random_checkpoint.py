"""Random checkpoints of any size, written shard by shard: the model is never in memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from sparsefw.checkpoint import INDEX
from sparsefw.inputs import DEFAULT_MODEL

# Standard deviation of the weights: small enough that activations stay finite through many blocks.
SCALE = 0.02


def generate(
    folder: Path, family: str, shard_bytes: int = 2**30, seed: int = 0, device: str = "cpu", **sizes: int
) -> Path:
    """Write a checkpoint in bf16, with the embedded model's tokenizer.

    Args:
        folder: folder of the checkpoint, made with its parents.
        family: transformers' model_type.
        shard_bytes: a shard is closed once it has this many bytes.
        seed: seed of the weights.
        device: device that draws them, which they depend on.
        sizes: sizes of the config, such as `hidden_size`; the vocabulary must be at least the tokenizer's.
    """
    config = AutoConfig.for_model(family, **sizes)
    config.dtype = torch.bfloat16
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
    folder.mkdir(parents=True)
    generator, shard, weight_map = torch.Generator(device).manual_seed(seed), {}, {}

    def close() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        # The weights of norms have one dimension, and are about 1.
        center, scale = (1.0, 0.1) if len(shape) == 1 else (0.0, SCALE)
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(center, scale, generator=generator)
        shard[name] = drawn.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            close()
    if shard:
        close()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    for path in DEFAULT_MODEL.glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder
