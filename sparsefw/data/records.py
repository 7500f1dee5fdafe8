"""Texts of records, which are strings, or mappings with a text, or with messages.

The tokenizer's chat template makes a text of messages. It may leave some of them out: templates of reasoning models
drop the reasoning of all turns but the last. What it leaves out is counted, line by line.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsefw.errors import InputError, Say, errors_in_one_line, shown

if TYPE_CHECKING:
    from sparsefw.data.tokens import Tokenizer

# Columns of a record that may hold its text; the first one that exists is read.
TEXT_COLUMNS = ("text", "messages", "content")

# Columns of a record with messages that are for the template: tools, and other arguments by their names.
TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"

# Entries of a message that say nothing by themselves.
LABELS = ("role", "name", "id", "type", "tool_call_id")


@dataclass
class Records:
    """Reads the texts of records.

    Attributes:
        tokenizer: has the chat template; None: messages are no text.
        characters, left_out: characters of all messages so far, and of those that the template has left out.
        answered: whether the model answers the messages, so that the template begins its turn.
        passed_over: whether a record has had messages besides its text.
        told: whether `tell` was called.
    """

    tokenizer: "Tokenizer | None" = None
    characters: int = 0
    left_out: int = 0
    answered: bool = False
    passed_over: bool = False
    told: bool = False

    def texts(self, records: Iterable[Any], source: str) -> Iterator[list[str]]:
        """Yield the texts of records, or of batches of records.

        Raises:
            InputError: a record has no text, or the tokenizer has no chat template for messages.
        """
        for number, record in enumerate(records, 1):
            texts = self._of(record, source, number) if isinstance(record, Mapping) else record
            for text in texts if isinstance(texts, list | tuple) else (texts,):
                if not isinstance(text, str):
                    raise InputError(f"{source}: record {number} is {type(text).__name__}, expected a text")
                with errors_in_one_line(f"{source}: record {number}"):
                    # Half of an emoji is no text that a tokenizer can take.
                    text.encode()
                yield [text]

    def tell(self, source: str, say: Say) -> None:
        """Say at the first call what was left out so far."""
        if self.told:
            return
        self.told = True
        if self.passed_over:
            say(f"note: {source}: records have a text and messages; the text is read")
        if 1000 * self.left_out > self.characters:
            share = f"{100 * self.left_out / self.characters:.1f} % of the characters of messages"
            say(f"note: {source}: the chat template leaves out {share}; records with a text keep all")

    def _of(self, record: Mapping[str, Any], source: str, number: int) -> Any:
        found = [name for name in TEXT_COLUMNS if name in record]
        if not found:
            others = shown(", ".join(map(str, record)))
            raise InputError(
                f"{source}: no column {', '.join(TEXT_COLUMNS)}, only {others}; rename the one with the text"
            )
        column = next((name for name in found if record[name] is not None), found[0])
        self.passed_over |= column == "text" and record.get("messages") is not None
        if column != "messages" or not self.tokenizer:
            return record[column]
        with errors_in_one_line(f"{source}: record {number}: no text can be made of its messages"):
            messages, (tools, arguments) = record[column], map(record.get, (TOOLS, ARGUMENTS))
            if isinstance(messages[0], Mapping):
                return self._of_messages(messages, tools, arguments)
            # A batch has a list in each column.
            return [self._of_messages(*one) for one in zip(messages, _each(tools), _each(arguments), strict=False)]

    def _of_messages(self, messages: Any, tools: Any, arguments: dict[str, Any] | None) -> str:
        assert self.tokenizer
        own = dict(tools=tools, tokenize=False, add_generation_prompt=self.answered) | (arguments or {})
        text = str(self.tokenizer.apply_chat_template(messages, **own))
        for message in messages:
            content = message.get("content")
            if content and isinstance(content, list) and str(content) in text:
                raise ValueError("the chat template takes a string as content, and no list")
        present = {line.strip() for line in text.splitlines()}
        for line in (line.strip() for string in _strings(messages) for line in string.splitlines()):
            self.characters += len(line)
            self.left_out += len(line) * (line not in present and line not in text)
        return text


def _each(column: list[Any] | None) -> Iterable[Any]:
    return itertools.repeat(None) if column is None else column


def _strings(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what messages say: their strings, but for LABELS, and the texts among the parts of a content."""
    for message in messages:
        for name, value in message.items():
            if isinstance(value, str) and name not in LABELS:
                yield value
            for part in value if isinstance(value, list) else ():
                if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                    yield part["text"]
