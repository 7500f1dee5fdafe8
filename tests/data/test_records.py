"""Messages of records: what reaches the chat template, and what it leaves out."""

import json

import pyarrow.parquet
import pytest
from classes.tiny_model import byte_tokenizer
from helpers.checkpoints import refused

from sparsefw.data.records import Records
from sparsefw.data.text import read_text
from sparsefw.data.windows import WindowStream

# It drops the reasoning of all turns but the last, as templates of reasoning models do.
TEMPLATE = """
{%- for turn in messages %}{{ turn.role }}: {{
  turn.content[0].text or turn.content if loop.last else turn.content.split("</think>")[-1] }}
{% endfor %}{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ style }}"""
ANSWER = {"role": "assistant", "content": "<think>first\nthen</think>\nso"}
USER = {"role": "user", "content": [{"type": "text", "text": "why"}]}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


@pytest.fixture
def tokenizer():
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(params=["list", "x.jsonl", "x.parquet"])
def place(request, tmp_path):
    """Writes records; gives what names them."""

    def put(records):
        path = tmp_path / request.param
        if request.param == "list":
            return records
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        else:
            path.write_text("\n".join(map(json.dumps, records)))
        return str(path)

    return put


def test_tools_and_arguments_reach_the_template(tokenizer, place):
    own = {"messages": [ANSWER], "tools": [TOOL], "chat_template_kwargs": {"style": "brief"}}
    _, documents = read_text(place([own, {"messages": [ANSWER]}]), "train", Records(tokenizer))
    plain = f"assistant: {ANSWER['content']}\n"
    assert ["".join(parts) for parts in documents] == [f"{plain}search brief", plain]


def test_what_the_template_leaves_out_is_said(tokenizer, place):
    """Nothing of the last answer, and the reasoning before it: 24 of 45 characters."""
    turns = [
        ANSWER,
        {"role": "user", "content": "and", "id": "17"},
        {"role": "assistant", "content": "<think>x</think>"},
    ]
    lines = []
    for records in ([{"messages": [ANSWER]}] * 9, [{"messages": turns}] * 9, [{"messages": turns, "text": "kept"}] * 9):
        given = place(records)
        WindowStream(tokenizer, given, 1, 8, 0, say=lines.append).take(99)
    name = given if isinstance(given, str) else "texts"
    said = "the chat template leaves out 53.3 % of the characters of messages; records with a text keep all"
    both = "records have a text and messages; the text is read"
    assert [line for line in lines if "is read again" not in line] == [f"note: {name}: {said}", f"note: {name}: {both}"]


def test_a_template_that_takes_no_list_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    with refused("data: record 1: .*: the chat template takes a string"):
        list(Records(tokenizer).texts([{"messages": [USER]}], "data"))


def test_a_batch_of_conversations(tokenizer):
    records = Records(tokenizer)
    batch = {"messages": [[ANSWER], [USER]], "tools": [[TOOL], None]}
    found = [text for (text,) in records.texts([batch], "data")]
    assert found == [f"assistant: {ANSWER['content']}\nsearch ", "user: why\n"]
    assert (records.characters, records.left_out) == (len("<think>first" + "then</think>" + "so" + "why"), 0)
