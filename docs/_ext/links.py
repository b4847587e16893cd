"""Does every link of the built site lead somewhere, and does a page need the network to be shown?

    python docs/_ext/links.py out/site

Links to other hosts are counted and not followed.
"""

import html.parser
import pathlib
import re
import sys
import urllib.parse

_LOADED = {
    ("script", "src"),
    ("img", "src"),
    ("link", "href"),
    ("source", "src"),
    ("iframe", "src"),
}
_REMOTE = re.compile(r"(?:https?:)?//")


class Page(html.parser.HTMLParser):
    """Anchors of a page, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes a tag's anchors and addresses."""
        found = dict(attrs)
        for name in ("id", "name"):
            if found.get(name):
                self.anchors.add(found[name] or "")
        loaded_link = tag != "link" or found.get("rel") not in ("canonical", "prev", "next")
        for name in ("href", "src"):
            if found.get(name):
                self.links.append((found[name] or "", (tag, name) in _LOADED and loaded_link))


def read(folder: pathlib.Path) -> dict[pathlib.Path, Page]:
    """All pages of a site."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        page = pages[path.resolve()] = Page()
        page.feed(path.read_text(encoding="utf-8"))
    return pages


def faults(folder: pathlib.Path) -> tuple[list[str], int, int]:
    """What is broken, and how many links there are within the site and out of it.

    Args:
      folder: of the built site.

    Returns:
      Sentences, the number of links within, and the number of links to other hosts.
    """
    pages, found, inner, outer = read(folder), [], 0, 0
    for path, page in pages.items():
        for link, loaded in page.links:
            if _REMOTE.match(link):
                outer += 1
                if loaded:
                    found.append(f"{path.name} loads {link}")
                continue
            parts = urllib.parse.urlsplit(link)
            if parts.scheme:
                continue
            inner += 1
            target = path if not parts.path else path.parent / urllib.parse.unquote(parts.path)
            target = target.resolve()
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.exists():
                found.append(f"{path.name} links to {link}, which is not there")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{path.name} links to {link}, where no such anchor is")
    for path in folder.rglob("*.css"):
        for address in re.findall(
            r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", path.read_text()
        ):
            found.append(f"{path.name} loads {address}")
    return found, inner, outer


def main() -> int:
    """Prints what is broken; exit status 1 if anything is."""
    found, inner, outer = faults(pathlib.Path(sys.argv[1]))
    for fault in dict.fromkeys(found):
        print(fault, file=sys.stderr)
    print(f"{inner:,} links within the site, {len(set(found))} broken; {outer:,} out of it.")
    return 1 if found or not inner else 0


if __name__ == "__main__":
    sys.exit(main())
