"""Formulas as MathML, made at build time: no script and nothing to download where they are read."""

import re
from typing import Any

import latex2mathml.converter
from docutils import nodes

_PARENTHESES = re.compile(r"<mo>&#x00028;</mo><mtable>(.*?)</mtable><mo>&#x00029;</mo>")


def _render(translator: Any, node: nodes.Element, display: str) -> None:
    try:
        formula = latex2mathml.converter.convert(node.astext().strip(), display=display)
    except Exception as error:
        raise ValueError(
            f"formula {node.astext()!r} is no LaTeX that can be read: {error}"
        ) from error
    # Parentheses of a matrix grow only in fonts for mathematics, which many machines lack: they are
    # borders of the table (site.css).
    formula = _PARENTHESES.sub(r'<mtable class="matrix">\1</mtable>', formula)
    formula = formula.replace("<mo>&#x002D9;</mo>", '<mo class="dot">&#x002D9;</mo>')
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
