"""Unfinished runs on disk: one process at a time, and only the same run goes on."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.checkpoints import contents, refused

from sparsefw.checkpoint.evidence import FileRead
from sparsefw.checkpoint.resume import Part, PartialFolder, durably

CHOSEN = {"batch": 8}
IDENTITY = {"--sparsity": "0.6", "the model": "abc", "torch": "2.13"}
PARTS = [Part([f"t{n}"], 8, 2, f"{n}" * 64, {}, [FileRead([1, 2, 3, 4], {"a": "b"})], {"n": n}) for n in (1, 2)]


def opened(tmp_path, identity=IDENTITY, restart=False, said=None):
    partial = PartialFolder(tmp_path / "out")
    partial.lock()
    try:
        partial.open(identity, CHOSEN, restart, [].append if said is None else said.append)
    finally:
        partial.release()
    return partial


def with_two_records(tmp_path):
    partial = PartialFolder(tmp_path / "out")
    partial.lock()
    partial.open(IDENTITY, {"batch": 4})
    for part in PARTS:
        partial.add(len(partial.parts), part)
    partial.release()
    return partial


def test_goes_on_with_what_is_finished(tmp_path):
    with_two_records(tmp_path)
    again = opened(tmp_path)
    assert again.parts == dict(enumerate(PARTS))
    assert again.chosen == {"batch": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--sparsity": "0.5"}, "--sparsity 0.6 then, 0.5 now"),
        ({"the model": "abd"}, "the model abc then, abd now"),
        ({"the text of --eval x": "hash"}, "the text of --eval x nothing then, hash now"),
    ],
)
def test_another_run_is_refused_and_told_what_differs(tmp_path, change, said):
    with_two_records(tmp_path)
    with refused(rf"an unfinished run of other input is there \(2 shards finished\): {said}; .*--restart"):
        opened(tmp_path, IDENTITY | change)
    without = {k: v for k, v in IDENTITY.items() if k != "torch"}
    with refused(r"torch 2\.13 then, nothing now"):
        opened(tmp_path, without)
    assert len(opened(tmp_path).parts) == 2


def test_restart_discards_it(tmp_path):
    with_two_records(tmp_path)
    again = opened(tmp_path, {"--sparsity": "0.5"}, restart=True)
    assert again.parts == {}
    assert again.chosen == CHOSEN
    assert opened(tmp_path, {"--sparsity": "0.5"}).parts == {}


@pytest.mark.parametrize("name", ["identity.json", "new", "records"])
def test_what_is_of_no_use_any_more_is_told(tmp_path, name):
    partial, said = with_two_records(tmp_path), []
    (partial.new / "model-00001-of-00002.safetensors").touch()
    remove(partial.folder / name)
    assert opened(tmp_path, {"--sparsity": "0.5"}, said=said).parts == {}
    assert said == [f"beginning anew: what {partial.folder} holds is of no use without {name}"]
    # Nothing was finished now, and --restart says it itself.
    opened(tmp_path, {"--sparsity": "0.4"}, said=said)
    with_two_records(tmp_path)
    remove(partial.folder / "identity.json")
    opened(tmp_path, restart=True, said=said)
    assert len(said) == 1


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def flipped(content: bytes) -> bytes:
    """The content with one bit changed in the middle."""
    n = len(content) // 2
    return content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], flipped, lambda b: b"[]", lambda b: b"\xff" * 9])
@pytest.mark.parametrize("name", ["identity.json", "records/00001.json", "records/00002.json"])
def test_damaged_files_are_named_and_nothing_is_deleted(tmp_path, name, damage):
    path = with_two_records(tmp_path).folder / name
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path)
    with refused(rf"out: the unfinished run there is damaged, {name}: it .*; --restart discards it"):
        opened(tmp_path)
    assert contents(tmp_path) == before
    assert opened(tmp_path, restart=True).parts == {}


MAKE = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("made", MAKE)
@pytest.mark.parametrize("name", ["identity.json", "records/00001.json", "records/00002.json"])
def test_what_is_no_file_is_named_and_not_opened(tmp_path, name, made):
    partial = with_two_records(tmp_path)
    remove(partial.folder / name)
    MAKE[made](partial.folder / name)
    with refused(f"is damaged, {name}: it is missing, or no file"):
        opened(tmp_path)
    assert partial.finished == 2
    assert opened(tmp_path, restart=True).parts == {}


@pytest.mark.parametrize("name", ["new", "records", "kept"])
def test_links_in_place_of_folders(tmp_path, name):
    """An output that is a link would be what somebody else may change."""
    partial = with_two_records(tmp_path)
    (partial.folder / name).mkdir(exist_ok=True)
    (partial.folder / name).rename(tmp_path / "elsewhere")
    (partial.folder / name).symlink_to(tmp_path / "elsewhere")
    with refused(f"is damaged, {name}: it is no folder"):
        opened(tmp_path)
    assert opened(tmp_path, restart=True).parts == {}
    assert (tmp_path / "elsewhere").is_dir()


def test_a_link_in_place_of_the_whole_folder(tmp_path):
    with_two_records(tmp_path).folder.rename(tmp_path / "elsewhere")
    (tmp_path / ".out.partial").symlink_to("elsewhere")
    before = contents(tmp_path / "elsewhere")
    with refused(".out.partial: a link, in place of the folder of an unfinished run; remove it"):
        opened(tmp_path)
    assert contents(tmp_path / "elsewhere") == before


def test_missing_and_exchanged_records(tmp_path):
    records = with_two_records(tmp_path).folder / "records"
    (records / "00001.json").rename(records / "00003.json")
    with refused("damaged, records/00001.json: it is missing"):
        opened(tmp_path)


@pytest.mark.parametrize("ahead", [[4], [6, 8], [5, 6, 7, 8, 11]], ids=str)
def test_parts_of_ranks_that_were_ahead_are_made_again(tmp_path, ahead):
    partial = with_two_records(tmp_path)
    for n in ahead:
        partial.add(n, PARTS[0])
    ranks = PartialFolder(tmp_path / "out")
    ranks.open(IDENTITY, ranks=2)
    assert ranks.parts == dict(enumerate(PARTS))
    assert sorted(os.listdir(partial.folder / "records")) == ["00001.json", "00002.json"]


def test_a_folder_that_was_being_cleared_begins_anew(tmp_path, monkeypatch):
    """A kill in the midst of it leaves any of the records; nothing goes on with these."""
    partial = with_two_records(tmp_path)

    def remove_one(folder):
        for path in folder.glob("00002.json"):
            path.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", remove_one)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path, restart=True)
    assert len(list((partial.folder / "records").iterdir())) == 1
    assert opened(tmp_path).parts == {}


@pytest.mark.slow
def test_second_process_is_refused_and_the_first_ones_death_frees_it(tmp_path):
    code = (
        "import sys, pathlib; from sparsefw.checkpoint.resume import PartialFolder;"
        "partial = PartialFolder(pathlib.Path(sys.argv[1]) / 'out'); partial.lock(); partial.open({});"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(tmp_path)
        with refused("out: another run is writing it"):
            opened(tmp_path)
        assert contents(tmp_path) == before
        other.kill()
        other.wait()
        assert opened(tmp_path, {}).parts == {}


def test_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    durably(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        durably(path, fail)
    assert path.read_text() == "old"
    durably(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_layout_on_disk(tmp_path):
    """All versions have the same layout, so that one can finish the run of another."""
    partial = with_two_records(tmp_path)
    kept = partial.kept("wanda-00000")
    kept.parent.mkdir()
    kept.touch()
    names = ["identity.json", "kept", "kept/wanda-00000.safetensors", "lock", "new", "records"]
    names += ["records/00001.json", "records/00002.json"]
    folder = tmp_path / ".out.partial"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == sorted(names)
    for path, content in (
        ("identity.json", {"identity": IDENTITY, "chosen": {"batch": 4}}),
        ("records/00002.json", asdict(PARTS[1])),
    ):
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        assert json.loads((folder / path).read_text()) == {"sha256": digest, "content": content}
