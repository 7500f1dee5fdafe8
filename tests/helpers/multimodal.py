"""Tiny random models that look at images or listen, too, as checkpoints on disk."""

from pathlib import Path

import torch
import transformers
from classes.tiny_model import byte_tokenizer
from helpers.families import COMMON
from transformers import AutoConfig, AutoModelForMultimodalLM

_TEXT = COMMON | dict(num_hidden_layers=2)
# As many blocks as the text has.
_VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
_QWEN_VISION = dict(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
    num_position_embeddings=16, deepstack_visual_indexes=[0],
)  # fmt: skip
_MLLAMA_VISION = _VISION | dict(
    attention_heads=2, num_global_layers=1, intermediate_layers_indices=[0], vision_output_dim=32
)
_AUDIO = dict(
    model_type="qwen2_audio_encoder", d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24,
    num_mel_bins=8, max_source_positions=16,
)  # fmt: skip
_CHUNKED = dict(intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=1, attention_chunk_size=32)
_PROJECTED = dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
_CLIP = dict(model_type="clip_vision_model", projection_dim=16)

# A class whose own forward fails without images, in transformers 5.24. Its text model runs.
NOT_ON_TEXT = {"llama4": dict(text_config=_TEXT | _CHUNKED, vision_config=_VISION | _PROJECTED, image_token_index=3)}

# By model_type: config.
MULTIMODAL = {
    "llava": dict(text_config=_TEXT | dict(model_type="llama"), vision_config=_VISION | _CLIP, image_token_index=3),
    # A tied head, and classes of text alone beside it.
    "gemma3": dict(text_config=_TEXT | dict(sliding_window=8), vision_config=_VISION, mm_tokens_per_image=4),
    "qwen3_vl": dict(text_config=_TEXT, vision_config=_QWEN_VISION),
    # Blocks that look at images only; text does not run through them.
    "mllama": dict(
        text_config=_TEXT | dict(num_hidden_layers=4, cross_attention_layers=[1, 3]),
        vision_config=_MLLAMA_VISION,
        image_token_index=3,
    ),
    "qwen2_audio": dict(text_config=_TEXT | dict(model_type="qwen2"), audio_config=_AUDIO, audio_token_index=3),
}


def save_multimodal(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random checkpoint of one of these families with a byte-level tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(
        AutoConfig.for_model(family, **(MULTIMODAL | NOT_ON_TEXT)[family]), dtype=dtype
    )
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_as_named(folder: Path) -> tuple[torch.nn.Module, dict]:
    """The model of the class that a checkpoint's config names, and what transformers reports of its loading."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(
        folder, dtype="auto", output_loading_info=True, experts_implementation="eager"
    )
