"""Which papers the text names, and what turns their numbers into citations."""

import functools
import pathlib
import re

BIB = pathlib.Path(__file__).resolve().parents[1] / "references.bib"
# What is cited by name, as docstrings write it.
BY_NAME = {
    "OpenReview gg2Wb2HPOI": "spectral2026",
    "Jordan et al. 2024": "muon2024",
    "Fukumizu 1998": "fukumizu1998",
    "Braun et al. 2022": "braun2022",
    "Dominé et al. 2024": "domine2024",
    "Saxe et al. 2014": "saxe2014",
    "Beck, Teboulle 2009": "beck2009",
    "Roy, Vetterli 2007": "roy2007",
    "Johnstone 2001": "johnstone2001",
    "Ma 2012": "ma2012",
    "De Lathauwer et al. 2000": "delathauwer2000",
    "Halko, Martinsson, Tropp 2011": "halko2011",
    "Nesterov 1983": "nesterov1983",
    "Zhai et al. 2023": "siglip2023",
    "ICML 2026": "tight_frames2026",
}
NUMBER = re.compile(r"(?:arXiv:)?\b(\d{4}\.\d{4,5})\b")
_NAMES = re.compile("|".join(map(re.escape, BY_NAME)))
_THEORY = re.compile(r"\b(theory(?: sections?|,? §)) ?(\d)(?:\.(\d))?")


@functools.cache
def keys() -> dict[str, str]:
    """Entries by their number on arXiv."""
    text = BIB.read_text(encoding="utf-8")
    found = re.findall(r"@\w+\{(\w+),((?:\n  .*)*)", text)
    numbers = {key: re.search(r"eprint = \{([\d.]+)\}", body) for key, body in found}
    return {match[1]: key for key, match in numbers.items() if match}


def cited(text: str, form: str) -> str:
    """A line with a citation behind every paper that it names, and links into the theory's page.

    Args:
      text: a line of a docstring, or of Markdown.
      form: "rst" or "md".

    Returns:
      The line; a number on arXiv that the bibliography does not have stays as it is.
    """
    role = ":cite:labelpar:`{}`" if form == "rst" else "{{cite:labelpar}}`{}`"
    ref = ":ref:`{} <{}>`" if form == "rst" else "[{}](#{})"

    def number(match: re.Match) -> str:
        key = keys().get(match[1])
        plain = match[0] if match[0].startswith("arXiv:") or not key else f"arXiv:{match[1]}"
        return f"{plain} {role.format(key)}" if key else match[0]

    def name(match: re.Match) -> str:
        return f"{match[0]} {role.format(BY_NAME[match[0]])}"

    def section(match: re.Match) -> str:
        anchor = f"theory-{match[2]}" + (f"-{match[3]}" if match[3] and match[2] == "2" else "")
        return ref.format(match[0], anchor)

    text = NUMBER.sub(number, text)
    # A number right behind a name is the same paper.
    text = _NAMES.sub(lambda m: m[0] if "arXiv:" in text[m.end() : m.end() + 9] else name(m), text)
    return _THEORY.sub(section, text)
