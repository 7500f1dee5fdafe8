"""The reference text of the quality study: two parts that have no topic and no run of words in common."""

import os
import sys
from pydoc_data.topics import topics

import pytest
import texts


def test_no_run_of_words_is_in_both_parts():
    calibration, test = texts.split(topics)
    assert texts.runs(calibration).isdisjoint(texts.runs(test))


def test_both_parts_are_long_enough():
    """64 windows of 512 tokens to calibrate on, 20 to test on, a token of at most 4 characters."""
    calibration, test = texts.split(topics)
    assert len(calibration) > 64 * 512 * 4
    assert len(test) > 20 * 512 * 4


def test_topics_go_by_their_names():
    """A topic that another Python version adds moves no other topic."""
    names = sorted(topics)
    content = {name: f"Text of {name} alone." for name in names}
    before, after = texts.split(content), texts.split(content | {"a new one": "This is new."})
    assert before == tuple(part.replace("This is new.\n\n", "") for part in after)
    for name in names:
        assert [f"Text of {name} alone." in part for part in before] == [not texts.is_test(name), texts.is_test(name)]


def test_what_topics_repeat_is_left_out():
    repeated = " ".join(f"word{letter}" for letter in "abcdefghijklmnop")
    test, other = (next(n for n in sorted(topics) if texts.is_test(n) == part) for part in (True, False))
    content = {test: f"Own.\n\n{repeated}.", other: f"Mine.\n\n  {repeated.upper()}!  \n \nEnd.\n\nMine."}
    assert texts.split(content) == ("Mine.\n\nEnd.\n", f"Own.\n\n{repeated}.\n")


def test_files_and_header(tmp_path, capsys):
    texts.main([str(tmp_path / "new")])
    assert "bytes" in capsys.readouterr().out
    reference = texts.write_reference(tmp_path)
    for path in (reference.calibration, reference.test):
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()
    assert list(reference.header()) == ["python", texts.CALIBRATION, texts.TEST]


def test_what_another_study_reads_stays_whole(tmp_path):
    """Two studies may share a folder: the second puts a new file in place of the one that the first is reading."""
    reference = texts.write_reference(tmp_path)
    files = (reference.calibration, reference.test)
    linked = [path.with_suffix(".linked") for path in files]
    for path, link in zip(files, linked, strict=True):
        os.link(path, link)
    texts.write_reference(tmp_path)
    for path, link in zip(files, linked, strict=True):
        assert not path.samefile(link)
    assert sorted(tmp_path.iterdir()) == sorted([*files, *linked])


def test_a_python_without_the_reference_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SystemExit, match="which this Python lacks"):
        texts.write_reference(tmp_path)
