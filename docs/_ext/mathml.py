"""Formulas as MathML, made at build time: no script and nothing to download where they are read."""

from typing import Any

import latex2mathml.converter
from docutils import nodes


def _render(translator: Any, node: nodes.Element, display: str) -> None:
    try:
        formula = latex2mathml.converter.convert(node.astext().strip(), display=display)
    except Exception as error:
        raise ValueError(
            f"formula {node.astext()!r} is no LaTeX that can be read: {error}"
        ) from error
    if display == "block":
        translator.body.append(f'<div class="formula">{formula}</div>')
    else:
        translator.body.append(formula)
    raise nodes.SkipNode


def inline(translator: Any, node: nodes.Element) -> None:
    """A formula within a line."""
    _render(translator, node, "inline")


def block(translator: Any, node: nodes.Element) -> None:
    """A formula on a line of its own."""
    _render(translator, node, "block")


def setup(app: Any) -> dict[str, bool]:
    """Adds the renderer."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
