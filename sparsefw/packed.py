"""Packed checkpoints. To import this module tells transformers how to load them:

import sparsefw.packed
model = AutoModelForCausalLM.from_pretrained("packed/")
"""

from transformers.quantizers import auto

from sparsefw.extras.packed.folders import pack_folder, unpack_folder
from sparsefw.extras.packed.quantizer import METHOD, PackedConfig, PackedQuantizer

__all__ = ["PackedConfig", "pack_folder", "unpack_folder"]

# The decorators of transformers do the same, and refuse a module that is imported anew.
auto.AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
# `get_loading_attributes` counts for the configs that are listed here.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (PackedConfig,)  # type: ignore[assignment]  # a tuple of eight there
