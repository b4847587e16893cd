"""A stranger's chat template, kept from harm: Jinja's sandbox, with an end to its time and memory.

Jinja forbids a template to reach what is not its own; it does not keep one from looping for hours
or from doubling a text sixty times. Here every turn of a loop and every call of a macro is counted,
and nothing grows beyond what a conversation is.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

STEPS = 10**5
"""Turns of loops and calls of macros in one rendering."""
LONGEST = 10**7
"""Characters of a text, items of a list, and characters written in one rendering."""
LARGEST = 10**6
"""The largest whole number that a filter or a method is given: a width, an indent, a count."""
_DIGITS = 4000  # of a number; Python itself writes none of more than 4,300

_WIDE = re.compile(r"\d{7,}")


class TooMuch(ValueError):
    """A template asks for more than a conversation needs."""


def _bounded(size: int) -> None:
    if size > LONGEST:
        raise TooMuch(f"it makes more than {LONGEST:,} characters or items")


def _check_arguments(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise TooMuch(f"it gives {LARGEST:,} or more for a width or a count")


def _check_formatting(form: str) -> None:
    if _WIDE.search(form):
        raise TooMuch(f"it formats {form[:40]!r}, which is too wide")


def _check_method(function: Any, args: tuple[Any, ...]) -> None:
    """Methods of texts that make much of little."""
    function = getattr(function, "__wrapped__", function)  # Jinja wraps `str.format`
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str):
        return
    if name in ("format", "format_map"):
        _check_formatting(owner)
    elif name == "replace" and len(args) > 1:
        _check_replacing(owner, *args[:2])
    elif name == "join" and args:
        _check_joining(list(args[0]), owner)


def _check_replacing(text: Any, old: Any, new: Any) -> None:
    text = str(text)
    _bounded(len(text) + (text.count(str(old)) if old else len(text) + 1) * len(str(new)))


def _check_joining(parts: list[Any], between: Any) -> None:
    _bounded(sum(len(str(part)) for part in parts) + len(parts) * len(str(between)))


def _digits(value: Any) -> int:
    return int(value.bit_length() * 0.302) if isinstance(value, int) else 0


def operate(operator: str, left: Any, right: Any) -> None:
    """Raises TooMuch where a sum, product, power or format would be too large."""
    if operator == "%":
        if isinstance(left, str):
            _check_formatting(left)
            if "*" in left:
                _check_arguments(right if isinstance(right, tuple) else (right,))
        return
    if operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _bounded(len(left) + len(right))
        return
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                _bounded(len(sequence) * max(times, 0))
        digits = _digits(left) + _digits(right)
    else:
        digits = _digits(left) * right if isinstance(right, int) else 0
    if digits > _DIGITS:
        raise TooMuch(f"it computes a number of more than {_DIGITS:,} digits")


def environment(**options: Any) -> Any:
    """A Jinja environment for strangers.

    Args:
      **options: of `jinja2.Environment`.

    Returns:
      The environment. Before each rendering `begin()` starts the counts anew.
    """
    import jinja2.sandbox
    from jinja2 import nodes, visitor

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        steps = written = 0

        def begin(self) -> None:
            """Starts a rendering."""
            self.steps = self.written = 0

        def tick(self) -> str:
            """Counts a turn of a loop or a call of a macro."""
            self.steps += 1
            if self.steps > STEPS:
                raise TooMuch(f"it takes more than {STEPS:,} steps")
            return ""

        def write(self, value: Any) -> Any:
            """Counts what is written."""
            self.written += len(value) if isinstance(value, str) else 1
            _bounded(self.written)
            return value

        def joined(self, *parts: Any) -> str:
            """What `~` makes of its sides."""
            texts = [str(part) for part in parts]
            _bounded(sum(map(len, texts)))
            return "".join(texts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            operate(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            if obj not in (self.tick, self.joined):
                _check_arguments((*args, *kwargs.values()))
                _check_method(obj, args)
            return super().call(context, obj, *args, **kwargs)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = super()._parse(source, name, filename)
            for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                node.body.insert(0, nodes.ExprStmt(_call("tick", [], node), lineno=node.lineno))
            return _Joining().visit(tree)

    class _Joining(visitor.NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:  # noqa: N802, the name is Jinja's
            self.generic_visit(node)
            return _call("joined", node.nodes, node)

    def _call(name: str, args: list[Any], at: Any) -> Any:
        callee = nodes.EnvironmentAttribute(name, lineno=at.lineno)
        return nodes.Call(callee, args, [], None, None, lineno=at.lineno)

    made = Sandbox(**options)
    made.finalize = made.write
    # Words without end, that no conversation has.
    made.globals.pop("lipsum", None)
    made.filters.update({name: guarded(name, each) for name, each in made.filters.items()})
    return made


def guarded(name: str, function: Any) -> Any:
    """A filter that is not given too much to do."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # Some filters are given the environment or the context before the value.
        value, *rest = args[1:] if hasattr(function, "jinja_pass_arg") else args
        _check_arguments((*rest, *kwargs.values()))
        if name == "format":
            _check_formatting(str(value))
        elif name == "replace" and len(rest) > 1:
            _check_replacing(value, *rest[:2])
        elif name == "join" and isinstance(value, (list, tuple)):
            _check_joining(list(value), rest[0] if rest else kwargs.get("d", ""))
        elif name == "indent" and isinstance(value, str):
            width = rest[0] if rest else kwargs.get("width", 4)
            size = width if isinstance(width, int) else len(str(width))
            _bounded(len(value) + (value.count("\n") + 1) * size)
        return function(*args, **kwargs)

    return guarded
