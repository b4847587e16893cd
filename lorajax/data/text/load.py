"""From files of texts to tables of numbers: what is asked, which answers there are, how long."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorajax.data.table import Table
from lorajax.data.text.chat import Template
from lorajax.data.text.columns import Ragged, pack
from lorajax.data.text.sheets import Columns, Sheet, choose, read_sheet
from lorajax.data.text.tokens import Encoded, Tokenizer
from lorajax.environment.judging import judged

KINDS = ("classes", "numbers", "tokens")
"""What may be asked of a text: its class, a number, or each next token."""
_MOST_CLASSES = 10_000


class Asked(NamedTuple):
    """Texts and what is asked of them, before there is a tokenizer or a model.

    Attributes:
      kind: one of `KINDS`.
      columns: which columns are what.
      train: what to learn from.
      test: what to measure on.
      classes: names of the classes, sorted (numbers by size), in the order of their numbers; ()
        for another kind.
      answers: of train and of test: int32 classes, or float32 numbers; None for tokens.
    """

    kind: str
    columns: Columns
    train: Sheet
    test: Sheet
    classes: tuple[str, ...]
    answers: tuple[np.ndarray, np.ndarray] | None


@judged
def read_texts(
    train: str | os.PathLike,
    test: str | os.PathLike | None = None,
    *,
    text: Sequence[str] | None = None,
    label: str | None = None,
    kind: str | None = None,
) -> Asked:
    """Reads two files of texts and what is asked of them.

    Args:
      train: a file or folder as `read_sheet` takes it.
      test: another; None takes the same, for a part to be held out later.
      text: columns of text; None reads the header (`choose`).
      label: the column of answers; likewise.
      kind: "classes" or "numbers" where labels such as 1.0 and 2.0 could be either; "tokens" to
        continue texts whatever labels there are, which then need no answer.

    Returns:
      The Asked. Labels that are words or whole numbers are classes, sorted; numbers with decimals
      are numbers to predict.

    Raises:
      ValueError: for what is not there, labels of two kinds, a class that the training set has not,
        or texts that are empty; one sentence with file and line.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    first = read_sheet(train)
    sheets = first, first if test is None else read_sheet(test)
    if kind == "tokens" and text is not None and label is None:
        for name in text:
            sheets[0].column(name, "text")
        columns = Columns("text" if len(text) == 1 else "answers", tuple(text))
    else:
        columns = choose(sheets[0], text, label)
    for sheet in sheets:
        for name in columns.texts:
            sheet.column(name, "text")
            if columns.kind not in ("messages",) and name != "input":
                sheet.strings(name, "text")
    if columns.kind != "labels":
        if kind in ("classes", "numbers"):
            raise ValueError(
                f"kind is {kind!r}, but {sheets[0].name} has no column of labels; name it by label."
            )
        return Asked("tokens", columns, *sheets, (), None)
    assert columns.label is not None
    if kind == "tokens":
        plain = Columns("text" if len(columns.texts) == 1 else "answers", columns.texts)
        return Asked("tokens", plain, *sheets, (), None)
    found = [_values(sheet, columns.label) for sheet in sheets]
    kind = kind or _kind(sheets[0], columns.label, found[0])
    if kind == "numbers":
        numbers = [_numbers(s, columns.label, v) for s, v in zip(sheets, found, strict=True)]
        return Asked(kind, columns, *sheets, (), (numbers[0], numbers[1]))
    classes = _classes(sheets[0], columns.label, found[0])
    place = {name: i for i, name in enumerate(classes)}
    for value, line in zip(found[1], sheets[1].lines, strict=True):
        if value not in place:
            raise ValueError(
                f"{sheets[1].name}, {line}: {columns.label} is {value!r}, which {sheets[0].name} "
                f"has not; its classes are {_some(classes)}."
            )
    numbered = [np.array([place[each] for each in values], np.int32) for values in found]
    return Asked(kind, columns, *sheets, classes, (numbered[0], numbered[1]))


def _values(sheet: Sheet, label: str) -> list[str]:
    """Labels as strings, none of them empty."""
    found = []
    for value, line in zip(sheet.column(label, "label"), sheet.lines, strict=True):
        plain = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not plain or not str(value).strip():
            raise ValueError(
                f"{sheet.name}, {line}: {label} is {value!r}; it must be a word or a number."
            )
        found.append(str(value).strip())
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()


def _kind(sheet: Sheet, label: str, values: Sequence[str]) -> str:
    numbers = [_number(each) for each in values]
    if all(map(_whole, values)) or all(each is None for each in numbers):
        return "classes"
    if None in numbers:
        where = numbers.index(None)
        raise ValueError(
            f"{sheet.name}, {sheet.lines[where]}: {label} is {values[where]!r} where other rows "
            "have numbers; give kind 'classes' if all are words."
        )
    if all(each is not None and each == int(each) for each in numbers if math.isfinite(each or 0)):
        raise ValueError(
            f"{sheet.name} has the {label} {values[0]}, which could be a class or a number; say "
            "which by kind."
        )
    return "numbers"


def _numbers(sheet: Sheet, label: str, values: Sequence[str]) -> np.ndarray:
    for value, line in zip(values, sheet.lines, strict=True):
        number = _number(value)
        if number is None or not abs(number) < 1e30:
            raise ValueError(f"{sheet.name}, {line}: {label} is {value!r}; it must be a number.")
    return np.array([float(each) for each in values], np.float32)


def _classes(sheet: Sheet, label: str, values: Sequence[str]) -> tuple[str, ...]:
    whole = all(map(_whole, values))
    names = sorted(set(values), key=(lambda each: (int(each), each)) if whole else None)
    if whole and int(names[0]) < 0:
        line = sheet.lines[values.index(names[0])]
        raise ValueError(
            f"{sheet.name}, {line}: {label} is {names[0]}; a class must not be negative, as it is "
            "where no answer is told."
        )
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise ValueError(
            f"{sheet.name} has {len(names):,} values of {label}; classes must be 2 to "
            f"{_MOST_CLASSES:,}."
        )
    return tuple(names)


def _some(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + f" and {len(names) - limit} more" * (len(names) > limit)


class Limits(NamedTuple):
    """What a model takes, and what its user asks for.

    Attributes:
      vocabulary: words that the model knows; None for any number.
      longest: tokens that it has positions for; None for any number.
      max_length: tokens that texts are cut at, as asked; None refuses texts of more than `longest`.
    """

    vocabulary: int | None = None
    longest: int | None = None
    max_length: int | None = None


@judged
def tables(
    texts: Asked,
    tokenizer: Tokenizer,
    limits: Limits | None = None,
    *,
    template: Template | None = None,
    packed: bool = False,
) -> tuple[Table, Table]:
    """Texts as tables of numbers.

    Args:
      texts: of `read_texts`.
      tokenizer: of the model.
      limits: of the model, and what to cut at.
      template: that conversations are rendered by.
      packed: whether several texts share a row, where each next token is asked for.

    Returns:
      Tables to train and to test on. For classes and numbers: `tokens`, `types` (int32), `mask`
      (bool), each filled up a batch at a time, and `labels`. For tokens: `tokens`, `targets`
      (bool: which tokens are asked for), `positions`, and `segments`, 0 where nothing stands.

    Raises:
      ValueError: for a tokenizer that is not the model's, a text longer than the model takes where
        no `max_length` is given, or a conversation that the template does not take.
    """
    limits = limits or Limits()
    tokenizer.check(limits.vocabulary)
    if limits.max_length is not None:
        if limits.max_length < 1:
            raise ValueError(f"max_length is {limits.max_length}; it must be at least 1.")
        if limits.longest is not None and limits.max_length > limits.longest:
            raise ValueError(
                f"max_length is {limits.max_length}; the model takes {limits.longest} tokens."
            )
    sheets = [texts.train] if texts.test is texts.train else [texts.train, texts.test]
    if texts.kind == "tokens":
        made = [_continued(s, texts.columns, tokenizer, limits, template) for s in sheets]
        width = limits.max_length or limits.longest
        if packed and width is None:
            raise ValueError("max_length is None; packed rows need a length.")
        found = [
            Table(pack(rows, width) if packed and width else _loose(rows, tokenizer.fill))
            for rows in made
        ]
        return found[0], found[-1]
    assert texts.answers is not None
    found = []
    for sheet, answers in zip(sheets, texts.answers, strict=False):
        columns = [sheet.strings(name, "text") for name in texts.columns.texts]
        encoded = tokenizer.encode(*columns, max_length=limits.max_length)
        _check_lengths(sheet, [each.tokens for each in encoded], limits)
        found.append(
            Table(
                {
                    "tokens": Ragged([each.tokens for each in encoded], tokenizer.fill),
                    "types": Ragged([each.types for each in encoded]),
                    "mask": Ragged([np.ones(len(each.tokens), bool) for each in encoded]),
                    "labels": answers,
                }
            )
        )
    return found[0], found[-1]


def _check_lengths(sheet: Sheet, rows: Sequence[np.ndarray], limits: Limits) -> None:
    for row, line in zip(rows, sheet.lines, strict=True):
        if not len(row):
            raise ValueError(f"{sheet.name}, {line}: the text has no token; leave it out.")
        if limits.longest is not None and len(row) > limits.longest:
            raise ValueError(
                f"{sheet.name}, {line}: the text has {len(row)} tokens, the model takes "
                f"{limits.longest}; give max_length to cut texts at."
            )


Row = tuple[np.ndarray, np.ndarray]


def _loose(rows: Sequence[Row], fill: int) -> dict[str, Any]:
    counts = [len(tokens) for tokens, _ in rows]
    return {
        "tokens": Ragged([tokens for tokens, _ in rows], fill),
        "targets": Ragged([targets for _, targets in rows]),
        "positions": Ragged([np.arange(n, dtype=np.int32) for n in counts]),
        "segments": Ragged([np.ones(n, np.int32) for n in counts]),
    }


def _continued(
    sheet: Sheet,
    columns: Columns,
    tokenizer: Tokenizer,
    limits: Limits,
    template: Template | None,
) -> list[Row]:
    """Tokens of each text and which of them are asked for."""
    if columns.kind == "text":
        return _chunks(sheet, columns, tokenizer, limits)
    if template is None and columns.kind == "messages":
        raise ValueError(
            f"{sheet.name} has conversations, but {tokenizer.folder} has no chat template; take "
            "the folder of a chat model, or put a chat_template.jinja there."
        )
    written = [
        _rendered(template, _messages(sheet, columns, i), f"{sheet.name}, {line}")
        if template is not None
        else _joined(sheet, columns, i)
        for i, line in enumerate(sheet.lines)
    ]
    # What the template writes has the special tokens in it already.
    encoded = tokenizer.encode([text for text, _ in written], special=template is None, spans=True)
    found = []
    for (_, spans), each, line in zip(written, encoded, sheet.lines, strict=True):
        tokens, targets = each.tokens, _inside(each, spans)
        end = tokenizer.number("eos_token")
        if template is None and end is not None:
            if len(tokens) and tokens[-1] == end:
                targets[-1] = True
            else:
                tokens, targets = np.append(tokens, np.int32(end)), np.append(targets, True)
        if limits.max_length is not None:
            tokens, targets = tokens[: limits.max_length], targets[: limits.max_length]
        if not targets[1:].any():
            raise ValueError(
                f"{sheet.name}, {line}: no token of an answer is within "
                f"{limits.max_length or len(tokens)} tokens; give a larger max_length or leave it "
                "out."
            )
        found.append((tokens, targets))
    _check_lengths(sheet, [tokens for tokens, _ in found], limits)
    return found


def _inside(text: Encoded, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens begin in one of the spans; one that begins before it is no answer's."""
    assert text.spans is not None
    begin, end = text.spans.T
    found = np.zeros(len(text.tokens), bool)
    for low, high in spans:
        found |= (low <= begin) & (begin < high) & (begin < end)
    return found


def _messages(sheet: Sheet, columns: Columns, row: int) -> list[Mapping[str, Any]]:
    if columns.kind == "messages":
        messages = sheet.columns["messages"][row]
        if not isinstance(messages, list) or not all(
            isinstance(each, dict)
            and isinstance(each.get("role"), str)
            and isinstance(each.get("content"), str)
            for each in messages
        ):
            raise ValueError(
                f"{sheet.name}, {sheet.lines[row]}: messages must be a list of objects with a role "
                "and a content."
            )
        return messages
    request, answer = _request(sheet, columns, row)
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _request(sheet: Sheet, columns: Columns, row: int) -> tuple[str, str]:
    values = [sheet.columns[name][row] for name in columns.texts]
    for name, value in zip(columns.texts, values, strict=True):
        if not isinstance(value, str | None):
            raise ValueError(f"{sheet.name}, {sheet.lines[row]}: {name} is no text, but {value!r}.")
    return "\n\n".join(value for value in values[:-1] if value), values[-1]


def _rendered(
    template: Template, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[str, list[tuple[int, int]]]:
    try:
        return template.answers(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _joined(sheet: Sheet, columns: Columns, row: int) -> tuple[str, list[tuple[int, int]]]:
    """A request and its answer; a prompt and its completion as they stand, others a line apart."""
    request, answer = _request(sheet, columns, row)
    request += "" if columns.texts[0] == "prompt" else "\n\n"
    return request + answer, [(len(request), len(request) + len(answer))]


def _chunks(sheet: Sheet, columns: Columns, tokenizer: Tokenizer, limits: Limits) -> list[Row]:
    """Plain texts cut into pieces that a model takes; every token but a piece's first is asked."""
    length = limits.max_length or limits.longest
    if length is not None and length < 2:
        raise ValueError(f"max_length is {length}; to ask for a next token it must be at least 2.")
    found = []
    for each in tokenizer.encode(sheet.strings(columns.texts[0], "text")):
        step = length or max(2, len(each.tokens))
        pieces = [each.tokens[i : i + step] for i in range(0, len(each.tokens), step)]
        found += [(piece, np.ones(len(piece), bool)) for piece in pieces if len(piece) > 1]
    if not found:
        raise ValueError(f"{sheet.name} has no text of two tokens; there is no next one to learn.")
    return found
