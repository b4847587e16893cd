"""Conversations as a model was trained to read them: its own template, in a sandbox."""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorajax.data.text import sandbox
from lorajax.data.text.tokens import LARGEST, Tokenizer, read_json
from lorajax.environment.files import regular
from lorajax.environment.judging import judged

Message = Mapping[str, Any]


class Template:
    """A chat template, which turns messages into one text.

    Args:
      source: text of the template, in Jinja's language as transformers runs it: blocks trimmed,
        `raise_exception`, `strftime_now` and a `tojson` that escapes nothing.
      special: special tokens by name, such as "bos_token", that the template may ask for.

    Attributes:
      source: as given.
      marked: whether it marks the answers itself, by `{% generation %}`.

    A template comes with a stranger's model: it runs in `sandbox`, within bounds.

    Raises:
      ValueError: for a text that is no template.
      ImportError: where the package jinja2 is missing.
    """

    @judged
    def __init__(self, source: str, special: Mapping[str, str] | None = None):
        try:
            import jinja2.ext
        except ImportError as error:
            raise ImportError(
                "chat templates need the package jinja2, which is not installed; "
                "pip install 'lorajax[text]' brings it."
            ) from error
        self.source, self.special = source, dict(special or {})
        if not isinstance(source, str):
            raise ValueError(f"source is {source!r}; a chat template must be a text.")
        environment = sandbox.environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _generation()],
        )
        environment.filters["tojson"] = sandbox.guarded("tojson", _to_json)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Jinja's own, and whatever Python's compiler runs into
            raise ValueError(f"the chat template is no Jinja template: {_said(error)}.") from error
        self._environment = environment
        self.marked = _BEGIN in "".join(str(each) for each in _constants(environment.parse(source)))

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The text of messages.

        Args:
          messages: each with `role` and `content`.
          prompt: whether the words that begin the assistant's answer are put after them.

        Returns:
          The text; special tokens are part of it.

        Raises:
          ValueError: where the template refuses the messages, or fails.
        """
        text, _ = self.spans(messages, prompt)
        return text

    def spans(
        self, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and what in it the template marks as answers, in characters."""
        try:
            self._environment.begin()
            text = self._template.render(
                messages=[dict(each) for each in messages],
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self.special,
            )
        except Exception as error:  # a template can fail in as many ways as a program
            raise ValueError(
                f"the chat template does not take the messages: {_said(error)}."
            ) from error
        return _unmarked(text)

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it the assistant speaks.

        Where the template marks answers by `{% generation %}`, its marks are taken. Else each is
        what rendering with it adds to rendering what comes before it with the prompt: the answer
        and the words that end its turn.

        Args:
          messages: of a whole conversation.

        Returns:
          The text, and (begin, end) of each answer, in characters.

        Raises:
          ValueError: where a conversation has no answer, or where what the template makes of its
            beginning is not the beginning of what it makes of all, so that the answer cannot be
            told apart.
        """
        if not any(each["role"] == "assistant" for each in messages):
            raise ValueError("no message has the role 'assistant', so there is no answer to learn.")
        whole, marked = self.spans(messages)
        if self.marked:
            return whole, marked
        found = []
        for i, each in enumerate(messages):
            if each["role"] != "assistant":
                continue
            before = self.render(messages[:i], prompt=True)
            after = whole if i + 1 == len(messages) else self.render(messages[: i + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"the chat template renders message {i + 1} otherwise when more follow, so "
                    "that the answer cannot be told apart; mark it in the template by "
                    "{% generation %} … {% endgeneration %}, or end the conversation there."
                )
            found.append((len(before), len(after)))
        return whole, found


@judged
def chat_template(folder: str | os.PathLike, tokenizer: Tokenizer | None = None) -> Template | None:
    """The chat template of a Hugging Face folder.

    Args:
      folder: with `chat_template.jinja`, or `tokenizer_config.json` that has a `chat_template`: a
        text, or a list of named ones, of which the one named "default" is taken.
      tokenizer: whose special tokens it may ask for; that of the folder if None.

    Returns:
      The Template; None if the folder has none.

    Raises:
      ValueError: for a template that is none.
    """
    folder = Path(folder)
    if tokenizer is None:
        tokenizer = Tokenizer(folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        regular(file, LARGEST)
        return _template(file, file.read_text(encoding="utf-8", errors="replace"), tokenizer)
    source = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        if not all(isinstance(each, dict) for each in source):
            raise ValueError(f"{folder} has chat templates without names; each must be an object.")
        named = {each.get("name"): each.get("template") for each in source}
        source = named.get("default")
        if source is None:
            raise ValueError(
                f"{folder} has the chat templates {', '.join(map(str, named))}, none of them named "
                "'default'; save the one to take as chat_template.jinja."
            )
    if source is None:
        return None
    return _template(folder / "tokenizer_config.json", source, tokenizer)


def _template(file: Path, source: Any, tokenizer: Tokenizer) -> Template:
    try:
        return Template(source, tokenizer.special)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _said(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


# Characters that no text has: what the template marks is found by them in what it renders.
_BEGIN, _END = "\ue5a0\ufdd0", "\ue5a1\ufdd1"


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    parts = text.split(_BEGIN)
    plain, spans = parts[0], []
    for part in parts[1:]:
        inside, _, rest = part.partition(_END)
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + rest
    return plain, spans


def _generation() -> Any:
    """Jinja's extension for `{% generation %}` … `{% endgeneration %}`, which marks its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [
                nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)
            ]
            return [marks[0], *body, marks[1]]

    return Generation


def _constants(tree: Any) -> list[str]:
    from jinja2 import nodes

    return [each.data for each in tree.find_all(nodes.TemplateData)]


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own would escape the signs of HTML.
    allowed = ("ensure_ascii", "separators", "sort_keys")
    given: dict[str, Any] = {"ensure_ascii": False} | {
        k: v for k, v in options.items() if k in allowed
    }
    return json.dumps(value, indent=indent, **given)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
