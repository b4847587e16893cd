"""What runs leave for people and for programs.

| file | holds |
|---|---|
| `verdicts` | the terminal's table, `verdicts.json` and `report.html` of `lorajax validate` |
| `page` | the page that all reports are: one file that opens offline and needs nothing else |
"""

from lorajax.report.verdicts import SCHEMA as SCHEMA
from lorajax.report.verdicts import SYMBOLS as SYMBOLS
from lorajax.report.verdicts import to_html as to_html
from lorajax.report.verdicts import to_json as to_json
from lorajax.report.verdicts import verdict_table as verdict_table
from lorajax.report.verdicts import write_json as write_json
