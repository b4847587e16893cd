"""What runs leave for people and for programs.

| file | holds |
|---|---|
| `verdicts` | the terminal's table, `verdicts.json` and `report.html` of `lorajax validate` |
| `runs` | `report.html` of `lorajax finetune` |
| `comparison` | the table and page of `lorajax compare` |
| `page`, `charts` | the page that all reports are, which opens offline; line charts in it |

What belongs to `verdicts` is imported when it is asked for: the claims take a second.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorajax.report.verdicts import SCHEMA as SCHEMA
    from lorajax.report.verdicts import SYMBOLS as SYMBOLS
    from lorajax.report.verdicts import to_html as to_html
    from lorajax.report.verdicts import to_json as to_json
    from lorajax.report.verdicts import verdict_table as verdict_table
    from lorajax.report.verdicts import write_json as write_json

__all__ = ["SCHEMA", "SYMBOLS", "to_html", "to_json", "verdict_table", "write_json"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lorajax.report.verdicts"), name)
    raise AttributeError(f"module 'lorajax.report' has no attribute {name!r}")
