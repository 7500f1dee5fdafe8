"""Models that take more than text: their text runs, and all else stays as it is in the checkpoint."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers.checkpoints import refused
from helpers.commands import TEXT, report_of, run, tensors_of
from helpers.families import COMMON, first_is_fast, write_random
from helpers.tensors import assert_equal
from helpers.verifying import passed
from helpers.whole import run_blocks, streamed
from transformers import AutoConfig, AutoModelForMultimodalLM

from sparsefw import PruneConfig, prune
from sparsefw.checkpoint.source import inspect
from sparsefw.estimate.profile import shape_of
from sparsefw.model.forward import embed
from sparsefw.model.head import logits

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
    # A tied head, and classes of text alone.
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


def save_multimodal(folder: Path, family: str) -> Path:
    """A random checkpoint of one of these families with a byte-level tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(MULTIMODAL | NOT_ON_TEXT)[family])
    return write_random(AutoModelForMultimodalLM.from_config(config), folder)


def load_as_named(folder: Path) -> tuple[torch.nn.Module, dict]:
    """The model of the class that a checkpoint's config names, and what transformers reports of its loading."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(
        folder, dtype="auto", output_loading_info=True, experts_implementation="eager"
    )


IDS = torch.randint(4, 250, (3, 24), generator=torch.Generator().manual_seed(0))


def pruned_by_a_run(folder, family):
    """Source and output."""
    source = save_multimodal(folder / "model", family)
    (folder / "text.txt").write_text(TEXT)
    assert run(source, folder / "text.txt", folder / "out", "--method", "wanda") == 0
    return source, folder / "out"


def check_whole(output, text_model=""):
    """Assert that it is a whole model of the class that the config names, whose logits, or its part's, are streamed."""
    model, loaded = load_as_named(output)
    assert not any(loaded[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    with torch.no_grad():
        expected = model.eval().get_submodule(text_model)(input_ids=IDS, use_cache=False).logits
    assert expected.std() > 0.1
    with streamed(output) as model:
        states = embed(model, IDS, 3)
        run_blocks(model, states)
        assert torch.equal(logits(model, IDS, states.hidden[0]), expected)


@pytest.mark.parametrize("family", first_is_fast(MULTIMODAL))
def test_a_pruned_model(family, tmp_path):
    """It is whole, and all but its pruned layers is the source's. Only what text needs is loaded."""
    source, output = pruned_by_a_run(tmp_path, family)
    check_whole(output)
    before, after = tensors_of(source), tensors_of(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    report = report_of(output)
    assert len(changed) == len(report["layers"]) > 0
    with streamed(source) as model, model.outside_loaded():
        assert changed < {name for i in range(len(model.blocks)) for name in model.tensors_of(i)}
        loaded = {id(p): p.nbytes for p in model.model.parameters() if not p.is_meta}
        names = {n for n, p in model.model.named_parameters() if not p.is_meta}
    other = [name for name in names if any(part in name for part in ("vision", "visual", "audio", "projector"))]
    # The forward of one asks where the first tensor of its tower is.
    assert len(other) == (family == "qwen2_audio")
    # The embedding, the last norm, and the head where it is not tied.
    assert len(loaded) - len(other) == (2 if family == "gemma3" else 3)
    shape = shape_of(inspect(source))
    assert shape.outside == sum(loaded.values())
    assert sum(shape.pieces) + sum(block.nbytes for block in shape.blocks) == inspect(source).nbytes
    idle = {name.split(".layers.")[1][0] for name in report["kept_dense"] if ".layers." in name}
    assert idle == ({"1", "3"} if family == "mllama" else set())


def test_a_model_in_memory(tmp_path, out):
    """Its layers come back to the model's own class."""
    source = save_multimodal(tmp_path / "model", "llava")
    model, untouched = load_as_named(source)[0], dict(load_as_named(source)[0].named_parameters())
    config = PruneConfig(kernel="torch", method="wanda")
    prune(model, out, config, dataset=IDS)
    written = dict(load_as_named(out)[0].named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, untouched[name])}
    assert len(changed) == 2 * 7
    assert_equal(dict(model.named_parameters()), written)


def test_text_model_of_a_class_that_does_not_run_on_text(tmp_path, monkeypatch, capsys):
    def fails(self, *args, **kwargs):
        raise AttributeError("no image_outputs")

    # Later versions of transformers may have mended it.
    monkeypatch.setattr("transformers.Llama4ForConditionalGeneration.forward", fails)
    _, output = pruned_by_a_run(tmp_path, "llama4")
    assert "only its text model Llama4ForCausalLM runs" in str(capsys.readouterr())
    passed(capsys, output)
    check_whole(output, "language_model")


def test_text_model_is_not_run_in_the_place_of_a_forward_that_is_refused(tmp_path, monkeypatch):
    """The forward runs on text alone, so its text model does less than it."""
    source = save_multimodal(tmp_path / "model", "llama4")

    def twice(self, input_ids, use_cache=False):
        return self.language_model(input_ids), self.language_model(input_ids)

    monkeypatch.setattr("transformers.Llama4ForConditionalGeneration.forward", twice)
    with refused(r"Llama4ForConditionalGeneration: language_model\S*\.0 runs more than once"):
        streamed(source)
