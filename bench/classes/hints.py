"""Entries of tiny configs that neither names nor defaults tell, by the config's class."""

from typing import Any

_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CODEBOOK = {"codebook_size": 16}
_LINEAR = "linear_attention"
_HYBRID = dict(num_hidden_layers=5, layers_block_type=[_LINEAR, _LINEAR, "hybrid", _LINEAR, "hybrid"])
# By default the second type of layers comes later than a tiny model has layers.
_SLIDING_TWICE = {"layer_types": _SLIDING_AND_FULL * 2}
_LINEAR_TWICE = {"layer_types": [_LINEAR, "full_attention"] * 2}
_HYBRID_TWICE = {"layer_types": ["hybrid_sliding", "hybrid"] * 2}

HINTS: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": _LINEAR_TWICE,
    "Gemma3TextConfig": _SLIDING_TWICE,
    "Gemma3nTextConfig": _SLIDING_TWICE,
    "Inkling2TextConfig": _HYBRID_TWICE,
    "InklingTextConfig": _HYBRID_TWICE,
    "KimiLinearConfig": _LINEAR_TWICE,
    "Kolibri1Config": _SLIDING_TWICE,
    "T5Gemma2TextConfig": _SLIDING_TWICE,
    "T5Gemma2DecoderConfig": _SLIDING_TWICE,
    "Lfm3Config": {"layer_types": ["conv", "full_attention", "sliding_attention", "conv"]},
    # Heads and their widths make up twice the width of the model.
    "Mamba2Config": {"num_heads": 8},
    "NemotronHConfig": {"mamba_num_heads": 8},
    # The text part of this class has other widths.
    "Nemotron3_5TranscribeConfig": {"text_config": {"mamba_num_heads": 4}},
    # Sections of half of the part of a head that is rotated.
    "Glm4vMoeTextConfig": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
    # The default names no bands of the tokens of images.
    "Apertus1p5Config": dict(image_token_offset=280, audio_token_offset=296, vision_config=_CODEBOOK,
        audio_config=_CODEBOOK),
    # The default has state spaces only.
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    # Ids of the tokens of images, which real configs list.
    "ChameleonConfig": {"vocabulary_map": {"<image>": 300, "IMGIMGAZ": 301, "IMGIMGBZ": 302}},
    "Emu3Config": {"vocabulary_map": {"<image>": 300, "<|visual token 000000|>": 301, "<|visual token 000001|>": 302}},
    # The default has no rotary embedding, which real configs give by type of layer.
    "CohereCompassTextConfig": {"rope_parameters": dict.fromkeys(_SLIDING_AND_FULL, _ROPE)},
    # The default lacks these.
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    # The default lacks these.
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    # The default has experts and no sizes of them.
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    # Sizes of the layers with a window, which are not among the fields of the class.
    "Dots3NoteTextConfig": dict(swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16,
        swa_kv_lora_rank=16, swa_head_dim=32, swa_qk_nope_head_dim=16, swa_v_head_dim=16),
    # The number of experts of each layer.
    "Dots3NoteVisionConfig": {"pyramid_num_routed": [-1, -1, 4, 4]},
    # A quarter of the width of the text.
    "FunAsrNanoConfig": {"adaptor_config": {"intermediate_size": 16}},
    # Not among the fields of the class.
    "Gemma4TextConfig": {"global_head_dim": 32},
    # Divides index_topk.
    "Glm5NextTextConfig": {"index_kpool": 4},
    # A pattern and how often it is repeated.
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    # Pairs of a layer of the images' model and a layer of the text's.
    "Granite4VisionConfig": dict(deepstack_layer_map=[[1, 0], [2, 1]], spatial_target_layers=[2, 3],
        downsample_rate="1/2"),
    # Bounds of the layers that run several times.
    "Inkling2LoopTextConfig": _HYBRID_TWICE | dict(n_layers_per_attn_res_block=1, loop_layer_index_start=1,
        loop_layer_index_end=3),
    # The widths of layers are made of the patch's prime factors, one factor a layer.
    "InklingVisionConfig": {"patch_size": 4, "num_hidden_layers": 3},
    # The default lacks these.
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    # Made by the class for more layers than there are.
    "Molmo2AdapterConfig": {"vision_feature_layer": [3, 1]},
    # Without sections of the rotary embedding in the config the code has others.
    "PaddleOCRTextConfig": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    # Less than chunk_length.
    "Nemotron3DiarizationConfig": {"chunk_right_context": 4},
    # The default has no sizes of the index.
    "Qwen4ExpTextConfig": dict(indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
        indexer_compress_ratio=2),
    # Factors of max_position_embeddings and of hidden_size.
    "ReformerConfig": dict(is_decoder=True, axial_pos_shape=[8, 16], axial_pos_embds_dim=[32, 32],
        attn_layers=["local", "lsh"] * 2),
    # The default has layers of that type and no width of their window.
    "Step3p7TextConfig": {"sliding_window": 8},
    # A multiple of the tokenizer's hop.
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 3200},
    # The width of keys is rounded up to a multiple of 64.
    "xLSTMConfig": {"hidden_size": 128},
    # The adapter of one language, which is chosen when a model is loaded.
    "XmodConfig": {"default_language": "en_XX"},
    # Two blocks with the shared layers at least.
    "ZambaConfig": _HYBRID,
    "Zamba2Config": _HYBRID,
}  # fmt: skip
