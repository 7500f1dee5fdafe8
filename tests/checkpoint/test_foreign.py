"""Folders of other kinds: one line says what they are, and what to do. Code of a checkpoint is named, never run."""

import json

import pytest
from helpers.checkpoints import refused
from helpers.families import save_model

from sparsefw.checkpoint import foreign
from sparsefw.checkpoint.source import CONFIG, SINGLE, inspect
from sparsefw.estimate import describe
from sparsefw.model import StreamedModel

WITHOUT_CONFIG = [
    (
        "adapter_config.json",
        r"a LoRA adapter, not a model \(adapter_config.json\); merge .*: merge_and_unload\(\) of peft",
    ),
    ("adapter_model.safetensors", r"a LoRA adapter, not a model \(adapter_model.safetensors\); merge"),
    ("model_index.json", r"a pipeline of diffusers, which is not pruned \(model_index.json\); give a language model"),
    ("modules.json", r"a model of sentence-transformers \(modules.json\); give the folder inside it"),
    ("Model-Q4_K_M.gguf", r"a GGUF model, which is not read \(Model-Q4_K_M.gguf\); give the checkpoint"),
    ("decoder.onnx", r"an ONNX model, which is not read \(decoder.onnx\); give the checkpoint"),
    ("params.json", r"weights in the layout of their makers \(params.json\); give the Hugging Face checkpoint"),
    ("consolidated.safetensors", r"weights in the layout of their makers \(consolidated.safetensors\); give"),
    ("latest_checkpointed_iteration.txt", r"a checkpoint of Megatron \(latest_checkpointed_iteration.txt\); export it"),
    ("mp_rank_00", r"a part of a checkpoint of Megatron \(mp_rank_00\); export it"),
    ("zero_to_fp32.py", r"a checkpoint of DeepSpeed \(zero_to_fp32.py\); gather it first"),
    (".metadata", r"a distributed checkpoint of torch \(.metadata\); export it"),
    ("notes.txt", "no config.json; give the folder of a Hugging Face checkpoint"),
]
WITHOUT_SAFETENSORS = [
    ("adapter_config.json", r"a LoRA adapter, not a model \(adapter_config.json\); merge"),
    (
        "model-00001-of-00002.safetensors",
        r"shards without model.safetensors.index.json \(model-00001-of-.*\); download",
    ),
    ("model0-mp8.safetensors", r"weights cut up for several GPUs \(model0-mp8.safetensors\); give"),
    ("consolidated.00.safetensors", r"weights in the layout of their makers \(consolidated.00.safetensors\); give"),
    ("m.gguf", r"a GGUF model, which is not read \(m.gguf\); give the checkpoint in safetensors"),
    ("model.onnx", r"an ONNX model, which is not read \(model.onnx\); give"),
    ("onnx", r"an ONNX model, which is not read \(onnx\); give"),
    ("tf_model.h5", r"weights of TensorFlow \(tf_model.h5\); give"),
    ("flax_model.msgpack", r"weights of Flax \(flax_model.msgpack\); give"),
    (
        "notes.txt",
        "neither model.safetensors nor model.safetensors.index.json; give a checkpoint in safetensors format",
    ),
]


@pytest.mark.parametrize(("name", "message"), WITHOUT_CONFIG)
def test_without_a_config(tmp_path, name, message):
    (tmp_path / name).touch()
    with refused(f"^{tmp_path}: {message}"):
        inspect(tmp_path)
    with refused(f"^{tmp_path}: {message}"):
        describe(str(tmp_path))


@pytest.mark.parametrize(("name", "message"), WITHOUT_SAFETENSORS)
def test_with_a_config_and_without_weights(tmp_path, name, message):
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    (tmp_path / name).touch()
    with refused(f"^{tmp_path}: {message}"):
        inspect(tmp_path)


def test_all_rows_are_tested():
    names = [name for name, _ in WITHOUT_CONFIG + WITHOUT_SAFETENSORS]
    assert len(names) == len(foreign.WITHOUT_CONFIG) + len(foreign.WITHOUT_SAFETENSORS) + 2


def test_an_adapter_beside_a_model(folder):
    (folder / "adapter_config.json").write_text("{}")
    with refused("adapter_config.json beside a whole model: .*; remove this file if the adapter is merged$"):
        inspect(folder)


@pytest.mark.parametrize("code", [True, False])
def test_a_model_that_transformers_does_not_have(folder, code):
    auto_map = {"auto_map": {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}}
    (folder / CONFIG).write_text(json.dumps({"model_type": "brand_new"} | (auto_map if code else {})))
    (folder / "configuration_x.py").write_text("raise SystemExit('code of the checkpoint was run')")
    message = (
        r"model_type brand_new exists as code of the checkpoint \(auto_map\), which is never run, and "
        r"transformers [\d.]+ has no class for it; give a model that transformers has$"
        if code
        else r"transformers [\d.]+ has no class for model_type brand_new; give .*, or install a later version$"
    )
    with refused(f"config.json: {message}"):
        StreamedModel(inspect(folder), "cpu")
    with refused(f"config.json: {message}"):
        describe(str(folder / CONFIG))


def test_code_beside_a_class_of_transformers(tmp_path):
    save_model(tmp_path, "llama")
    content = json.loads((tmp_path / CONFIG).read_text()) | {"auto_map": {"AutoConfig": "configuration_x.C"}}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    (tmp_path / "configuration_x.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert (tmp_path / SINGLE).exists() or list(tmp_path.glob("*.safetensors"))
    with StreamedModel(inspect(tmp_path), "cpu") as model:
        assert [note for note in model.notes if note.startswith("auto_map is not written: it names code")]
