"""Texts: files of them, tokenizers, chat templates, and the tables that they become.

Reading needs nothing more; tokenizers and chat templates need the extra `text`.
"""

from lorajax.data.text.chat import Template, chat_template
from lorajax.data.text.columns import Ragged, lengths, pack, sizes
from lorajax.data.text.load import KINDS, Asked, Limits, read_texts, tables
from lorajax.data.text.sheets import SUFFIXES, Columns, Sheet, choose, is_text, read_sheet
from lorajax.data.text.tokens import Encoded, Tokenizer

__all__ = [
    "KINDS",
    "SUFFIXES",
    "Asked",
    "Columns",
    "Encoded",
    "Limits",
    "Ragged",
    "Sheet",
    "Template",
    "Tokenizer",
    "chat_template",
    "choose",
    "is_text",
    "lengths",
    "pack",
    "read_sheet",
    "read_texts",
    "sizes",
    "tables",
]
