"""How the pages of reports are read, and what hostile text they have to bear."""

import base64
import hashlib
import re
import types
import xml.etree.ElementTree as ElementTree

import pytest

HOSTILE = "<script>alert('1')</script> & \"quoted\" </style>\x00\ud800"


def read(text):
    """A page as a tree; raises where it is not well-formed."""
    head, _, rest = text.partition("\n")
    assert head == "<!doctype html>"
    return ElementTree.fromstring(rest.encode())


def words(tree):
    """What a page says, without styles and scripts."""
    for parent in tree.iter():
        for child in [*parent]:
            if child.tag in ("style", "script"):
                parent.remove(child)
    return " ".join("".join(tree.itertext()).split())


def check_alone(text):
    """Asserts that a page refers to nothing outside itself and runs no script but its own."""
    tree = read(text)
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len({*ids})
    for element in tree.iter():
        assert element.tag not in ("link", "iframe", "object", "embed", "base")
        assert not [name for name in element.attrib if name.startswith("on")]
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = element.get(name)
            assert value is None or re.match(r"#|data:image/png;base64,", value), value
        if (element.get("href") or "").startswith("#"):
            assert element.get("href")[1:] in ids
    assert "url(" not in text and "@import" not in text
    (script,) = tree.iter("script")
    digest = base64.b64encode(hashlib.sha256((script.text or "").encode()).digest()).decode()
    (policy,) = [e for e in tree.iter("meta") if e.get("http-equiv")]
    assert f"script-src 'sha256-{digest}'" in policy.get("content")
    return tree


@pytest.fixture(scope="session")
def pages():
    return types.SimpleNamespace(read=read, words=words, alone=check_alone, hostile=HOSTILE)
