"""The page that all reports are: one file, readable offline, on paper, on a phone, in the dark.

Elements are made by `element`, which escapes whatever is not HTML already: a claim's or a file's
name can hold no markup. Pages are well-formed XML as well, so that a test can read them strictly.
"""

import base64
import hashlib
import html
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

VOID = {"br", "hr", "img", "input", "meta", "link"}


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def element(name: str, /, *content: Any, **attributes: Any) -> Html:
    """An HTML element; its content is escaped unless it is Html.

    Args:
      name: of the element.
      *content: text, Html, or iterables of them; None is left out.
      **attributes: `class_` for `class`, `data_kind` for `data-kind`; True for one without a
        value, None or False for none at all.

    Returns:
      The element.

    Example:
      >>> from lorajax.report.page import element
      >>> element("p", "a < b", element("b", "!"), class_="meta")
      '<p class="meta">a &lt; b<b>!</b></p>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(f'{key}="{_escaped(key if value is True else str(value))}"')
    opening = " ".join(words)
    return Html(f"<{opening}/>" if name in VOID else f"<{opening}>{join(content)}</{name}>")


def anchor(id: str) -> str:
    """The address of an element on the same page."""
    return "#" + quote(_UNPRINTABLE.sub("�", id))


def join(content: Iterable[Any]) -> Html:
    """Pieces of content one after the other, escaped unless they are Html."""
    pieces = []
    for each in content:
        if isinstance(each, Html):
            pieces.append(each)
        elif isinstance(each, str):
            pieces.append(_escaped(each))
        elif each is not None:
            pieces.append(join(each))
    return Html("".join(pieces))


# What XML or UTF-8 cannot hold at all: a file's name may have it, a page must not.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def _escaped(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("�", text))


def number(value: float | int) -> str:
    """A number as pages and tables show it: six digits at most, a real minus sign."""
    return f"{float(value):.6g}".replace("-", "−")


def short(value: float | int) -> str:
    """A number in three digits."""
    return f"{float(value):.3g}".replace("-", "−")


def table(
    header: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    numbers: Iterable[int] = (),
    dense: bool = False,
) -> Html:
    """A table that becomes a list of cards where the screen is narrow.

    Args:
      header: one cell a column.
      rows: as many cells each; the first one names the row.
      numbers: the columns that hold numbers, which are flush right.
      dense: whether a card has several cells a line, for short ones.
    """
    right = {*numbers}
    kinds = ["number" if i in right else None for i in range(len(header))]
    head = element("tr", (element("th", h, class_=k) for h, k in zip(header, kinds, strict=True)))
    body = [
        element(
            "tr",
            (
                element("td", cell, class_=kind, data_label=_plain(label))
                for cell, kind, label in zip(row, kinds, header, strict=True)
            ),
        )
        for row in rows
    ]
    whole = element("table", element("thead", head), element("tbody", body))
    return element("div", whole, class_="scroll dense" if dense else "scroll")


def _plain(label: Any) -> str:
    return label if isinstance(label, str) and not isinstance(label, Html) else ""


def picture(png: bytes, about: str, caption: str = "") -> Html:
    """A figure with its bytes inside the page, its letters as large as the page's own."""
    from lorajax import plots  # only pages with figures wait for matplotlib

    data = base64.b64encode(png).decode("ascii")
    width = plots.width_on_page(png)
    image = element("img", src=f"data:image/png;base64,{data}", alt=about, width=width)
    return element("figure", image, element("figcaption", caption) if caption else None)


def bar(share: float | int, about: str, kind: str = "") -> Html:
    """A bar with a mark at 1, in the scale 0 … 1.5; what is longer ends in an arrow.

    Args:
      share: of the mark.
      about: the same in words.
      kind: a class that colors it.
    """
    most = 1.5
    width = 100 * min(max(share, 0.0), most) / most
    over = " over" if share > most else ""
    return element(
        "div",
        element("span", style=f"width:{width:.2f}%"),
        element("i", style=f"left:{100 / most:.2f}%"),
        class_=f"bar {kind}{over}",
        role="img",
        aria_label=about,
    )


def fold(summary: str, *content: Any, open_: bool = False) -> Html:
    """Content under a line that opens it; printed in full."""
    return element("details", element("summary", summary), *content, open=open_)


def controls(kinds: Sequence[str], what: str) -> Html:
    """A search field and a choice of kinds, shown where scripts run.

    Args:
      kinds: values of `data-kind` to choose from.
      what: is searched, in the plural.
    """
    options = [element("option", f"all {what}", value=""), *(element("option", k) for k in kinds)]
    return element(
        "form",
        element("input", type="search", id="search", placeholder=f"search {what}",
                aria_label=f"search {what}"),
        element("select", options, id="kind", aria_label="show only") if kinds else None,
        element("button", "open all", type="button", id="open"),
        element("output", "", id="shown"),
        id="controls",
        hidden=True,
    )  # fmt: skip


def item(*content: Any, text: str, kind: str = "", id: str | None = None, class_: str = "") -> Html:
    """A section that search and choice show or hide.

    Args:
      *content: of the section.
      text: that is searched.
      kind: that is chosen by.
      id: of the section, for links.
      class_: further classes.
    """
    return element(
        "article",
        *content,
        id=id,
        class_=f"item {class_}".strip(),
        data_text=" ".join(text.lower().split()),
        data_kind=kind,
    )


def shell(title: str, *content: Any) -> str:
    """A whole page.

    Args:
      title: plain text, for the window.
      *content: of the body.

    Returns:
      HTML. It refers to nothing outside itself, and tells browsers to load nothing from elsewhere
      and to run no script but its own.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(CSS)),
    )
    body = element("body", element("main", *content), element("script", Html(SCRIPT)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in few words: `0–9, 100–134`."""
    found: list[list[int]] = []
    for each in sorted({*numbers}):
        if found and each == found[-1][1] + 1:
            found[-1][1] = each
        else:
            found.append([each, each])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)


def grouped(things: Iterable[Any], by: Any) -> dict[Any, list[Any]]:
    """Things by what a function says of them, groups in order of appearance."""
    found: dict[Any, list[Any]] = {}
    for key, members in itertools.groupby(things, by):
        found.setdefault(key, []).extend(members)
    return found


CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f8; --ink: #1b1e23; --soft: #5a616b;
  --line: #d9dde2; --good: #00714f; --bad: #b0390a; --open: #7a5d00; --accent: #0b5a93;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #b04f8b; --s4: #a87400; --s5: #3a94cf; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1d2126; --ink: #e6e8eb; --soft: #a3abb5; --line: #363c44;
    --good: #43c59a; --bad: #ff8a5b; --open: #e3bb4d; --accent: #7fc1f5;
    --s0: #5fb2ea; --s1: #ff8a3c; --s2: #35c99c; --s3: #e08fc0; --s4: #e6ab2e; --s5: #8fd0f8; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 4.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0 .75rem; text-wrap: balance; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.75rem 0 .6rem; text-wrap: balance; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .45rem 0; max-width: 46rem; overflow-wrap: break-word; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 2px; }
code, pre { font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  background: var(--card); border-radius: 4px; }
code { padding: .1rem .3rem; overflow-wrap: anywhere; }
pre { padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
.meta { font-size: .86rem; color: var(--soft); }
.id { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-weight: 600; }
.id a { color: inherit; text-decoration: none; } .id a:hover { text-decoration: underline; }
.badge { font-weight: 600; white-space: nowrap; }
.confirmed { --kind: var(--good); } .refuted { --kind: var(--bad); }
.inconclusive, .vacuous { --kind: var(--open); }
.badge.confirmed, .badge.refuted, .badge.inconclusive, .badge.vacuous { color: var(--kind); }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; padding: 0; list-style: none; }
.tiles li { flex: 1 1 8.5rem; background: var(--card); border-radius: 8px; padding: .55rem .8rem;
  border-top: 3px solid var(--kind, var(--line)); font-size: .86rem; color: var(--soft); }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.25; color: var(--ink);
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .78rem; }
.item { border-top: 1px solid var(--line); padding: .95rem 0 .85rem; }
.item > header { display: flex; flex-wrap: wrap; gap: .15rem .9rem; align-items: baseline; }
.item > header h3 { flex: 1 1 16rem; }
.item:target { background: var(--card); box-shadow: 0 0 0 .6rem var(--card); }
.bar { position: relative; height: .6rem; background: var(--card); border-radius: 2px;
  max-width: min(30rem, 100% - 1.2rem); margin: .5rem 0 .2rem; border: 1px solid var(--line); }
.bar span { display: block; height: 100%; background: var(--kind, var(--accent)); min-width: 2px; }
.bar i { position: absolute; top: -.25rem; bottom: -.25rem; width: 2px; background: var(--ink); }
.bar.over::after { content: "▶"; position: absolute; right: -1.1rem; top: -.5rem; font-size: .8rem;
  color: var(--kind, var(--accent)); }
.marks { display: flex; flex-wrap: wrap; gap: 2px; }
.marks a { display: inline-block; width: 1.5rem; line-height: 1.5rem; text-align: center;
  border-radius: 3px; background: var(--card); color: var(--kind); text-decoration: none;
  font-weight: 700; }
.papers { list-style: none; margin: 0; padding: 0; }
.papers li { display: flex; flex-wrap: wrap; gap: .15rem .9rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line); align-items: center; font-size: .9rem; }
.papers li > a { flex: 0 0 11.5rem; } .papers .marks { flex: 1 1 20rem; }
.papers li > span { color: var(--soft); font-variant-numeric: tabular-nums; }
.marks a:hover { outline: 2px solid var(--kind); }
.marks .refuted, .marks .inconclusive, .marks .vacuous { background: var(--kind);
  color: var(--paper); }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: .45rem 0 0; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
figure { margin: .8rem 0; } figcaption { font-size: .84rem; color: var(--soft); max-width: 46rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; display: block; }
#controls { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; position: sticky;
  top: 0; z-index: 2; background: var(--paper); padding: .6rem 0; margin: 1.5rem 0 0;
  border-bottom: 1px solid var(--line); }
#controls[hidden], [hidden] { display: none !important; }
input, select, button { font: inherit; font-size: .9rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: .35rem .6rem; }
input { flex: 1 1 12rem; min-width: 0; } button { cursor: pointer; }
output { font-size: .86rem; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  gap: 1rem 1.5rem; margin: .8rem 0; }
.charts figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 10px system-ui, sans-serif; }
svg .title { fill: var(--ink); font-weight: 600; }
svg .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
svg .grid { stroke: var(--line); stroke-width: .7; fill: none; }
svg .line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: .8; opacity: .45; } svg .law { stroke-dasharray: 4 3; }
svg .dot { fill: var(--paper); stroke-dasharray: none; stroke-width: 1.5; }
svg .level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 1 3; fill: none; }
svg .c0 { stroke: var(--s0); } svg .c1 { stroke: var(--s1); } svg .c2 { stroke: var(--s2); }
svg .c3 { stroke: var(--s3); } svg .c4 { stroke: var(--s4); } svg .c5 { stroke: var(--s5); }
svg .k { stroke: var(--ink); }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .82rem; color: var(--soft); }
.key svg { display: inline-block; width: 1.8rem; height: .7rem; vertical-align: middle;
  margin-right: .35rem; }
@media (max-width: 40rem) {
  body { font-size: 15px; } main { padding: .9rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  .tiles li { flex-basis: 6.5rem; padding: .45rem .65rem; } .tiles b { font-size: 1.2rem; }
  .item > header h3 { flex-basis: 100%; }
  #controls { position: static; } html { scroll-padding-top: 1rem; }
  .papers li > a { flex: 1 1 auto; } .papers .marks { order: 3; flex-basis: 100%; }
  .scroll thead { display: none; } .scroll table, .scroll tbody, .scroll tr, .scroll td {
    display: block; width: 100%; }
  .scroll tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .scroll td { border: 0; padding: .08rem 0; display: flex; justify-content: space-between;
    gap: 1rem; text-align: right; overflow-wrap: anywhere; }
  .scroll td:empty { display: none; }
  .scroll td:first-child { font-weight: 600; text-align: left; justify-content: flex-start; }
  .scroll td:not(:first-child)::before { content: attr(data-label); color: var(--soft);
    text-align: left; flex: 0 0 auto; max-width: 50%; }
  .dense td:not(:first-child) { display: inline-flex; width: auto; gap: .35rem;
    margin-right: .9rem; }
  .dense td:not(:first-child)::before { max-width: none; }
}
@media print {
  :root { --paper: #fff; --card: #f4f4f4; --ink: #000; --soft: #444; --line: #bbb; --good: #00543b;
    --bad: #8a2a05; --open: #5c4600; --accent: #000; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; }
  #controls { display: none !important; } .item[hidden] { display: block !important; }
  details::details-content { content-visibility: visible !important; block-size: auto !important; }
  summary { list-style: none; font-weight: 600; }
  figure, .bar, tr, h2, h3, .item > header { break-inside: avoid; } h2, h3 { break-after: avoid; }
  img { max-height: 9cm; } .bar span { print-color-adjust: exact; }
}
"""

# Without "less than" and "and" signs, which XML would take for markup.
SCRIPT = """
(function () {
  var form = document.getElementById("controls");
  if (!form) return;
  var search = document.getElementById("search"), kind = document.getElementById("kind");
  var shown = document.getElementById("shown"), open = document.getElementById("open");
  var items = Array.from(document.querySelectorAll(".item"));
  var groups = Array.from(document.querySelectorAll(".group"));
  function unfold(inside, how) {
    inside.querySelectorAll("details").forEach(function (each) { each.open = how; });
  }
  function apply() {
    var words = search.value.toLowerCase().split(/\\s+/).filter(Boolean), count = 0;
    items.forEach(function (each) {
      var right = !kind || !kind.value || each.dataset.kind === kind.value;
      var found = words.every(function (word) { return each.dataset.text.includes(word); });
      each.hidden = !(right ? found : false);
      if (!each.hidden) count += 1;
    });
    groups.forEach(function (each) { each.hidden = !each.querySelector(".item:not([hidden])"); });
    shown.textContent = count + " of " + items.length;
  }
  function jump() {
    var goal = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!goal) return;
    if (goal.hidden) { search.value = ""; if (kind) kind.value = ""; apply(); }
    unfold(goal, true);
    goal.scrollIntoView();
  }
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.addEventListener("input", apply);
  open.addEventListener("click", function () {
    var how = open.textContent === "open all";
    unfold(document, how);
    open.textContent = how ? "close all" : "open all";
  });
  window.addEventListener("hashchange", jump);
  window.addEventListener("beforeprint", function () { unfold(document, true); });
  form.hidden = false;
  apply();
  jump();
})();
"""
