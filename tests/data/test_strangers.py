"""Files of strangers: what has no end, what grows, and templates that want hours or gigabytes."""

import gzip
import os
import struct
import time
import zipfile

import numpy as np
import pytest

from lorajax import data
from lorajax.data import text
from lorajax.data.text import sandbox
from lorajax.environment import files

LOOP = "{{% for i in range({}) %}}{}{{% endfor %}}"
SET = "{% set n = namespace(x='ab') %}"
HARMFUL = {
    "loops": (LOOP.format(99999, LOOP.format(99999, "")), "steps"),
    "calls": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "steps",
    ),
    "joins": (SET + LOOP.format(60, "{% set n.x = n.x ~ n.x %}"), "characters"),
    "adds": (SET + LOOP.format(60, "{% set n.x = n.x + n.x %}"), "characters"),
    "repeats": ("{{ 'a' * 10000000000 }}", "characters"),
    "replaces": (SET + LOOP.format(60, "{% set n.x = n.x|replace('a', n.x) %}"), "characters"),
    "calls replace": (SET + LOOP.format(60, "{% set n.x = n.x.replace('a', n.x) %}"), "characters"),
    "powers": ("{{ 9 ** (9 ** 9) }}", "digits"),
    "centers": ("{{ 'a'.center(10000000000) }}", "width"),
    "formats": ("{{ '%10000000000d' % 1 }}", "wide"),
    "formats by a method": ("{{ '{:10000000000}'.format(1) }}", "wide"),
    "fills": ("{{ [1]|batch(1000000000, 'x')|list }}", "count"),
    "writes": (LOOP.format(4000, "{{ 'a' * 9999 }}"), "characters"),
    "reaches out": ("{{ raise_exception.__globals__['os'] }}", "undefined|unsafe"),
    "nests": ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, "no Jinja template"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_template_is_kept_from_harm(name, monkeypatch):
    monkeypatch.setattr(sandbox, "STEPS", 5000)
    source, why = HARMFUL[name]
    begun = time.monotonic()
    with pytest.raises(ValueError, match=why) as caught:
        text.Template(source).render([{"role": "user", "content": "a"}])
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10


def test_what_templates_do_is_left_to_them():
    source = (
        "{% for m in messages %}{{ '<|' + m['role'] ~ '|>' }}{{ m.content|trim|replace('a', 'b') }}"
        "{{ '%03d' % loop.index }}{{ ', '.join(['x', 'y']) }}{{ 2 ** 10 * 3 }}{% endfor %}"
    )
    shown = text.Template(source).render([{"role": "user", "content": " a "}])
    assert shown == "<|user|>b001x, y3072"


def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.tsv")
    with pytest.raises(ValueError, match=r"a.tsv is no regular file; name"):
        text.read_texts(tmp_path / "a.tsv")
    with open(tmp_path / "b.tsv", "wb") as file:
        file.truncate(files.LARGEST + 1)  # sparse
    with pytest.raises(ValueError, match=r"b.tsv has 2,147,483,649 bytes; at most"):
        text.read_texts(tmp_path / "b.tsv")


def test_what_grows_is_not_unpacked(tmp_path):
    with gzip.open(tmp_path / "x.gz", "wb", 1) as file:
        file.write(struct.pack(">IIII", 0x803, 2**20, 64, 64) + bytes(1 << 20))
    with pytest.raises(ValueError, match=r"x.gz grows from .* to 4,294,967,296 bytes or more"):
        data.read_idx(tmp_path / "x.gz")
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_x.npy", "w") as member:
            np.lib.format.write_array(member, np.zeros((24, 1 << 20), np.uint8))
    with pytest.raises(ValueError, match=r"x.npz grows from"):
        data.load(tmp_path / "x.npz")
