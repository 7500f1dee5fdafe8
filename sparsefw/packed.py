"""Importing this module lets transformers load packed checkpoints:

import sparsefw.packed
model = AutoModelForCausalLM.from_pretrained("packed/")
"""

from transformers.quantizers import auto

from sparsefw.extras.packed.folders import pack_folder, unpack_folder
from sparsefw.extras.packed.quantizer import METHOD, PackedConfig, PackedQuantizer

__all__ = ["PackedConfig", "pack_folder", "unpack_folder"]

# Set directly, because transformers' decorators raise an error if this module is imported again.
auto.AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig
# transformers calls `get_loading_attributes` only for the config classes in this tuple.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (PackedConfig,)  # type: ignore[assignment]  # typed as eight
