"""Folders that hold something else than a Hugging Face checkpoint in safetensors: what it is, and the way out."""

from pathlib import Path

from sparsefw.errors import InputError, shown

ADAPTER = "adapter_config.json"

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}

_ADAPTER = (
    "a LoRA adapter, not a model; merge it into its base model first: merge_and_unload() of peft, then "
    "save_pretrained(NEW_FOLDER)"
)
_OWN_LAYOUT = (
    "weights in the layout of their makers; give the Hugging Face checkpoint of the model, or convert it with the "
    "script of its class in transformers"
)
_ORIGINAL = "give the checkpoint in safetensors that it was made from"

# A file's name tells what a folder without config.json is, and the way out. The first pattern that matches counts.
WITHOUT_CONFIG = {
    ADAPTER: _ADAPTER,
    "adapter_model.*": _ADAPTER,
    "model_index.json": "a pipeline of diffusers, which is not pruned; give a language model",
    "modules.json": "a model of sentence-transformers; give the folder inside it that has a config.json",
    "*.gguf": f"a GGUF model, which is not read; {_ORIGINAL}",
    "*.onnx": f"an ONNX model, which is not read; {_ORIGINAL}",
    "params.json": _OWN_LAYOUT,
    "consolidated*": _OWN_LAYOUT,
    "latest_checkpointed_iteration.txt": "a checkpoint of Megatron; export it to a Hugging Face checkpoint first",
    "mp_rank_*": "a part of a checkpoint of Megatron; export it to a Hugging Face checkpoint first",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed; gather it first: zero_to_fp32.py, then save_pretrained(NEW_FOLDER)",
    ".metadata": "a distributed checkpoint of torch; export it to a Hugging Face checkpoint first",
}

# The same of a folder that has config.json, and neither model.safetensors nor its index.
WITHOUT_SAFETENSORS = {
    ADAPTER: _ADAPTER,
    "model-*-of-*.safetensors": "shards without model.safetensors.index.json; download or copy the index, too",
    "model*-mp*.safetensors": "weights cut up for several GPUs; give the Hugging Face checkpoint of the model",
    "consolidated*.safetensors": _OWN_LAYOUT,
    "*.gguf": WITHOUT_CONFIG["*.gguf"],
    "*.onnx": WITHOUT_CONFIG["*.onnx"],
    "onnx": WITHOUT_CONFIG["*.onnx"],
    "tf_model.h5": f"weights of TensorFlow; {_ORIGINAL}",
    "flax_model*.msgpack": f"weights of Flax; {_ORIGINAL}",
}


def check_adapter(folder: Path) -> None:
    """Refuse the config of an adapter beside a whole model.

    Raises:
        InputError: there is one.
    """
    if (folder / ADAPTER).exists():
        raise InputError(
            f"{folder}: {ADAPTER} beside a whole model: with peft, transformers would load the adapter's base model in "
            "its place; remove this file if the adapter is merged"
        )


def without_config(folder: Path, or_else: str = "") -> InputError:
    """The error for a folder that has no config.json; `or_else` is what could be given in the folder's place."""
    return _matching(folder, WITHOUT_CONFIG) or InputError(
        f"{folder}: no config.json; give the folder of a Hugging Face checkpoint{or_else}"
    )


def without_safetensors(folder: Path) -> InputError:
    """The error for a folder that has config.json, but no model in safetensors."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return InputError(
            f"{folder}: only pickle files ({shown(pickles[0])}), which are never read because they can run code; "
            "if you trust them, convert them with transformers: from_pretrained(...), then save_pretrained(NEW_FOLDER)"
        )
    return _matching(folder, WITHOUT_SAFETENSORS) or InputError(
        f"{folder}: neither model.safetensors nor model.safetensors.index.json; give a checkpoint in safetensors format"
    )


def _matching(folder: Path, table: dict[str, str]) -> InputError | None:
    names = sorted(path.name for path in folder.iterdir())
    for pattern, line in table.items():
        for name in names:
            if Path(name).match(pattern):
                what, _, way_out = line.partition("; ")
                return InputError(f"{folder}: {what} ({shown(name)}); {way_out}")
    return None
