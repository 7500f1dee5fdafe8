"""Checkpoints that are read: nothing outside of their folder is opened, and what is refused is refused in one line."""

import json
import os
import resource
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch
from classes.tiny_model import byte_tokenizer
from helpers.checkpoints import TENSORS, make_hub_cache, refused, write_index
from helpers.tensors import assert_equal
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparsefw.checkpoint.source import INDEX, SINGLE, companions, inspect, locate, note_of_others
from sparsefw.checkpoint.tensors import read_shard, read_tensors
from sparsefw.data.tokens import load_tokenizer
from sparsefw.errors import InputError
from sparsefw.model import skeleton


class TestLocate:
    @pytest.fixture
    def offline(self, monkeypatch) -> list[str]:
        """Makes every download fail; a list of the ids that were asked for."""
        wanted = []

        def fail(model, **_):
            wanted.append(model)
            raise (HFValidationError if "//" in model else LocalEntryNotFoundError)("Cannot reach the Hub\nand why")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        return wanted

    def test_a_local_folder(self, folder, offline, monkeypatch):
        monkeypatch.chdir(folder.parent)
        monkeypatch.setenv("HOME", str(folder.parent))
        assert [locate(name) for name in (str(folder), "source", "~/source")] == [folder, Path("source"), folder]
        assert offline == []

    @pytest.mark.parametrize("model", ["./no/where", "/no/where", "~no-user/x", "../no-where", ""])
    def test_a_path_is_never_looked_up(self, model, offline, folder):
        for name in (model, str(folder / SINGLE)):
            with refused("no such folder; give the folder of a checkpoint or a Hub id"):
                locate(name)
        assert offline == []

    @pytest.mark.parametrize("name", ["org/name", "org//name"])
    def test_no_download(self, offline, name):
        with refused(rf"^{name}: .*Cannot reach the Hub.*give the path of a local checkpoint$"):
            locate(name)
        assert offline == [name]

    def test_what_is_copied_is_downloaded_and_no_pickle_and_no_code(self, monkeypatch):
        from huggingface_hub.utils import filter_repo_objects

        wanted = [
            *("config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "tokenizer.model"),
            *("chat_template.jinja", "additional_chat_templates/tool.jinja", "source.spm", "bpe.codes", "README.md"),
            *("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "prophetnet.tokenizer", "tokenizer.model.v3"),
            *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors"),
        ]
        unwanted = [
            *("pytorch_model.bin", "model.pt", "modeling_x.py", "consolidated.safetensors", "onnx/config.json", ".env"),
            *("original/consolidated.00.pth", "original/model.safetensors", "additional_chat_templates/x.py"),
            *("8bit/model.safetensors", "1_Pooling/x.py"),
        ]
        got = []

        def download(model, allow_patterns, ignore_patterns=None, revision=None):
            names = [*wanted, *unwanted]
            got.extend(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
            return "/cache/snapshot"

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert locate("org/name") == Path("/cache/snapshot")
        assert sorted(got) == sorted(wanted)


class TestTensors:
    @pytest.mark.parametrize("sharded", [False, True])
    def test_they_are_the_files(self, folder, shards, sharded):
        found = inspect(shards if sharded else folder)
        assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
        }
        assert found.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
        # 22 bytes of bf16 against 8 of fp32 and 24 of integers.
        assert found.dtype == torch.bfloat16
        assert_equal(read_tensors(found.tensors), TENSORS)

    def test_memory_is_aligned_as_torchs_own(self, folder):
        """Whatever the length of the header: products may round differently with another alignment."""
        for length in range(1, 9):
            save_file({"x" * length: torch.ones(3), "w": torch.ones(64, 64, dtype=torch.bfloat16)}, folder / SINGLE)
            for read in (read_tensors(inspect(folder).tensors), read_shard(folder / SINGLE)):
                assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())

    @pytest.mark.parametrize(
        "change", [lambda path: os.truncate(path, os.path.getsize(path) - 4), lambda path: os.utime(path, ns=(1, 1))]
    )
    def test_files_that_are_changed_while_a_run_reads_them(self, folder, change):
        tensors = inspect(folder).tensors
        change(folder / SINGLE)
        with refused("model.safetensors: changed since the run began"):
            read_tensors(tensors)


class TestFiles:
    def test_no_checkpoint(self, folder, tmp_path):
        for path in (folder / SINGLE, tmp_path):
            with refused("no config.json"):
                inspect(path)
        (folder / SINGLE).rename(folder / "pytorch_model.bin")
        with refused("neither model.safetensors nor .*: pickle files are never read"):
            inspect(folder)
        (folder / "adapter_config.json").write_text("{}")
        with refused(r"a LoRA adapter \(adapter_config.json\); merge it"):
            inspect(folder)

    @pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
    @pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b'{"a": 1' + b"0" * 5000 + b"}"])
    def test_what_is_no_json_object(self, shards, name, text):
        (shards / name).write_bytes(text)
        with refused(f"{name}: (not JSON|expected a JSON object)"):
            inspect(shards)

    @pytest.mark.parametrize(
        "shard", ["../source/model.safetensors", "/tmp/x.safetensors", "x.bin", "..", "", None, ["one.safetensors"]]
    )
    def test_an_index_that_leads_elsewhere(self, shards, shard):
        write_index(shards, a=shard)
        with refused("(missing, or not a file|outside of the checkpoint|no weight_map with names of files in it)"):
            inspect(shards)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda shards: (shards / "two.safetensors").unlink(), "two.safetensors: missing"),
            (
                lambda shards: save_file({"a": TENSORS["a"]}, shards / "one.safetensors"),
                "tensor b is not where it says",
            ),
            (lambda shards: save_file(TENSORS, shards / "two.safetensors"), "tensor . is in one.safetensors too"),
            (lambda shards: write_index(shards, a="one.safetensors"), "tensor b is not where it says"),
        ],
    )
    def test_shards_that_do_not_fit_their_index(self, shards, change, message):
        change(shards)
        with refused(message):
            inspect(shards)

    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
    def test_what_is_no_file_is_not_opened(self, folder, shards, make):
        for path in (folder / "config.json", folder / SINGLE, shards / INDEX, shards / "two.safetensors"):
            kept = path.read_bytes()
            path.unlink()
            make(path)
            with refused(f"{path.name}: missing, or not a file"):
                inspect(path.parent)
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(kept)
        make(folder / "tokenizer.json")
        if make == Path.mkdir:
            assert [path.name for path in companions(folder)] == ["config.json"]
        else:
            with refused("tokenizer.json: missing, or not a file"):
                inspect(folder)

    def test_what_is_copied(self, folder):
        names = ["config.json", "tokenizer.json", "LICENSE.txt", "additional_chat_templates/a.jinja"]
        names += ["modules.json", "1_Pooling/config.json"]
        others = ["modeling.py", "pytorch_model.bin", ".env", "notes.json", "additional_chat_templates/a.py"]
        for name in (*names, *others):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        assert [path.relative_to(folder).as_posix() for path in companions(folder)] == sorted(names)
        (note,) = note_of_others(folder)
        assert note.endswith(": 3 files or folders (modeling.py, notes.json, pytorch_model.bin)")


class TestLinks:
    @pytest.mark.parametrize("sharded", [False, True])
    def test_of_the_hub_cache(self, folder, shards, tmp_path, hub, sharded):
        snapshot = make_hub_cache(shards if sharded else folder, hub)
        # Models share large files.
        blob = (snapshot / "config.json").resolve()
        (hub / "blobs").mkdir()
        blob.rename(hub / "blobs" / "shared")
        blob.symlink_to("../../blobs/shared")
        (tmp_path / "link").symlink_to(snapshot)
        for place in (snapshot, tmp_path / "link"):
            assert inspect(place).tensors.keys() == TENSORS.keys()

    @pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json", "additional_chat_templates/a.jinja"])
    @pytest.mark.parametrize("cached", [False, True])
    def test_to_elsewhere(self, folder, tmp_path, hub, name, cached):
        (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
        folder = make_hub_cache(folder, hub) if cached else folder
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with refused(rf"{name}: a link to .*elsewhere, outside of the checkpoint; put the file itself there"):
            inspect(folder)

    def test_a_folder_that_looks_like_the_cache(self, folder, tmp_path, hub):
        with refused(r"config.json: a link to .*, outside of the checkpoint; .* set HF_HUB_CACHE"):
            inspect(make_hub_cache(folder, tmp_path / "given"))


def entry(shape="[2]", start=0, end=8, dtype="F32") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {end}]}}'


class TestHeaders:
    @pytest.mark.parametrize(
        ("header", "body", "length"),
        [
            # Nothing is allocated for a length that no file has.
            *((f'{{"a": {entry()}}}', 8, length) for length in (2**63, 2**64 - 1, 2**27)),
            (f'{{"a": {entry()}}}', 9, None),
            (f'{{"a": {entry(start=4, end=12)}}}', 12, None),
            (f'{{"a": {entry("[4294967296, 4294967296]", end=0)}}}', 0, None),
            (f'{{"a": {entry(dtype="X9")}}}', 8, None),
            ('{"a": ' + "[" * 100_000, 8, None),
        ],
    )
    def test_that_lie(self, folder, header, body, length):
        """Any header, a body of zeros, and any length in front of them."""
        length = length or len(header)
        (folder / SINGLE).write_bytes(length.to_bytes(8, "little") + header.encode() + bytes(body))
        with refused("model.safetensors: "):
            inspect(folder)

    @settings(max_examples=200, deadline=None)
    @given(data=st.data())
    def test_any_damage_ends_in_one_line_or_in_tensors(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("damaged")
        (folder / "config.json").write_text("{}")
        save_file(TENSORS, folder / SINGLE)
        content = bytearray((folder / SINGLE).read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        (folder / SINGLE).write_bytes(content)
        with suppress(InputError):
            read_tensors(inspect(folder).tensors)


class TestConfigs:
    @pytest.fixture
    def bait(self, tmp_path):
        """A file that nothing may open."""
        (tmp_path / "bait.json").write_text("{}")
        return tmp_path / "bait.json"

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
    @pytest.mark.parametrize(
        "entries",
        [
            {"attn_implementation": "org/kernel"},
            {"text_config": {"_experts_implementation": {"": "org/kernel@main"}}},
            {"vision_config": {"architecture": "local-dir:/elsewhere"}},
            {"vocab_file": "BAIT"},
        ],
    )
    def test_that_lead_to_code_or_files_elsewhere(self, folder, bait, name, entries):
        (folder / name).write_text(json.dumps(entries).replace("BAIT", str(bait)))
        with refused(f"{name}: .* lies outside of the checkpoint; remove the entry"):
            inspect(folder)

    def test_a_vocabulary_elsewhere_by_any_key(self, folder, bait, monkeypatch):
        """transformers would open it. The path may be relative to where the run starts."""
        monkeypatch.chdir(bait.parent)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).write_text(json.dumps({"vocab": bait.name}))
            with refused(f"{name}: vocab .* lies outside of the checkpoint"):
                inspect(folder)
            (folder / name).unlink()

    def test_counts_that_a_class_makes_objects_of(self, folder, monkeypatch):
        """Layers take time before they take memory; the labels of a classifier take memory."""
        (folder / "config.json").write_text('{"num_hidden_layers": 1000000}')
        with refused("num_hidden_layers 1000000: more than 2000"):
            inspect(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_labels": 10**9}))
        monkeypatch.setattr(skeleton, "MOST_BYTES", 2**27)
        with refused("config.json: its config takes more than 0.12 GiB without its weights"):
            skeleton.read_config(inspect(folder))
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY

    def test_paths_of_the_machine_that_they_were_saved_on(self, folder, bait):
        """Real configs hold them. The file in the folder of the config is used."""
        byte_tokenizer().save_pretrained(folder)
        elsewhere = bait.rename(bait.with_name("tokenizer.json"))
        content = json.loads((folder / "tokenizer_config.json").read_text())
        content |= {"name_or_path": str(folder.parent), "vocab_file": "/gone/vocab.json", "unk_token": "/"}
        content |= {"tokenizer_file": str(elsewhere)}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        inspect(folder)
        assert len(load_tokenizer(folder)("abc")["input_ids"]) == 3
