"""Links in the folder of a checkpoint: only those of the Hub's own cache are followed."""

import pytest
from helpers.checkpoints import TENSORS, make_hub_cache, refused
from huggingface_hub import constants

from sparsefw.checkpoint.source import SINGLE, inspect

# locate


@pytest.mark.parametrize("sharded", [False, True])
def test_links_of_the_hub_cache(folder, shards, tmp_path, hub, sharded):
    snapshot = make_hub_cache(shards if sharded else folder, hub)
    assert inspect(snapshot).tensors.keys() == TENSORS.keys()
    # Models share large files.
    blob = (snapshot / "config.json").resolve()
    (hub / "blobs").mkdir()
    blob.rename(hub / "blobs" / "shared")
    blob.symlink_to("../../blobs/shared")
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert inspect(link).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer.json"])
@pytest.mark.parametrize("cached", [False, True])
def test_links_to_elsewhere_are_refused(folder, tmp_path, hub, name, cached):
    target = tmp_path / "elsewhere"
    target.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    if cached:
        folder = make_hub_cache(folder, hub)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with refused(f"{name}: a link to .*elsewhere, outside of the checkpoint; put the file itself there"):
        inspect(folder)


@pytest.mark.parametrize("place", ["models--org--name/id_rsa", "models--other--name/blobs/x", "id_rsa", "blobs-x/a"])
def test_links_in_the_cache_lead_to_blobs(folder, hub, place):
    snapshot = make_hub_cache(folder, hub)
    (hub / place).parent.mkdir(parents=True, exist_ok=True)
    (hub / place).write_text("secret")
    (snapshot / "notes.txt").symlink_to(hub / place)
    with refused("notes.txt: a link to .*, outside of the checkpoint; put the file itself there"):
        inspect(snapshot)


def test_a_folder_that_looks_like_the_cache_is_not_trusted(folder, tmp_path, hub):
    snapshot = make_hub_cache(folder, tmp_path / "given")
    told = f"; set HF_HUB_CACHE={tmp_path / 'given'} if that is a cache of the Hub that you trust, or give the model's"
    with refused(f"config.json: a link to .*sha-config.json, outside of the checkpoint{told} Hub id$"):
        inspect(snapshot)
    for path in snapshot.iterdir():
        path.unlink()
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (snapshot.parent.parent / "id_rsa").write_text("secret")
    (snapshot / "notes.txt").symlink_to("../../id_rsa")
    with refused("notes.txt: a link to .*id_rsa, outside of the checkpoint; put the file itself there$"):
        inspect(snapshot)


@pytest.mark.parametrize("way", ["relative", "linked", "dotted"])
def test_the_cache_may_be_named_in_any_way(folder, tmp_path, hub, way, monkeypatch):
    snapshot = make_hub_cache(folder, hub)
    (tmp_path / "link").symlink_to(hub)
    monkeypatch.chdir(hub.parent)
    names = {"relative": hub.name, "linked": str(tmp_path / "link"), "dotted": f"{hub}/../{hub.name}"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", names[way])
    assert inspect(snapshot).tensors.keys() == TENSORS.keys()
    if way == "relative":
        monkeypatch.chdir(tmp_path.parent)
        with refused("outside of the checkpoint"):
            inspect(snapshot)


def test_blobs_that_are_a_link_are_not_trusted(folder, tmp_path, hub):
    snapshot = make_hub_cache(folder, hub)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("secret")
    (hub / "blobs").symlink_to(tmp_path / "secret")
    (snapshot / "vocab.txt").symlink_to("../../../blobs/id_rsa")
    with refused("vocab.txt: a link to .*id_rsa, outside of the checkpoint"):
        inspect(snapshot)


def test_a_link_says_nothing_to_the_terminal(folder, tmp_path):
    (tmp_path / "\x1b[31m\n").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "\x1b[31m\n")
    with refused(r"tokenizer.json: a link to .*\\x1b\[31m\\n, outside") as caught:
        inspect(folder)
    assert str(caught.value).isprintable()


def test_a_folder_called_snapshots_is_no_hub_cache(folder, tmp_path):
    moved = tmp_path / "snapshots" / "abc"
    moved.parent.mkdir()
    folder.rename(moved)
    (moved / SINGLE).rename(tmp_path / "weights")
    (moved / SINGLE).symlink_to(tmp_path / "weights")
    with refused("outside of the checkpoint"):
        inspect(moved)


def test_dangling_link(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(folder / "gone")
    with refused("model.safetensors: missing"):
        inspect(folder)
