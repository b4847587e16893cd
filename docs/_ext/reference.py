"""The pages of the API reference, one a room, and how docstrings become part of them.

A room's page shows what `lorajax.ROOM` exports, by the file that holds it; what else the files of a
room make public stands on a second page. Everything is found in the package, so that no list here
can fall behind it.
"""

import ast
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import re
import sys
import types
import typing
from typing import Any

import bibliography
from docutils import nodes
from sphinx import addnodes
from sphinx.domains.python import PyObject
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

SKIPPED_ROOMS = {"cli", "__main__"}
# Papers have pages of their own.
_PAPERS = re.compile(r"lorajax\.claims\.(?!base$)\w+|lorajax\.finetune\.claims")


def rooms() -> list[str]:
    """Names of the rooms with a public interface."""
    import lorajax

    found = (info.name for info in pkgutil.iter_modules(lorajax.__path__))
    return sorted(name for name in found if name not in SKIPPED_ROOMS)


def modules_of(room: str) -> list[types.ModuleType]:
    """A room's module, then those of its files, outermost first."""
    top = importlib.import_module(f"lorajax.{room}")
    found = [top]
    for info in pkgutil.walk_packages(getattr(top, "__path__", []), f"{top.__name__}."):
        prefixes = _prefixes(info.name)
        private = any(part.startswith("_") for part in info.name.split("."))
        if not private and not any(_PAPERS.fullmatch(prefix) for prefix in prefixes):
            found.append(importlib.import_module(info.name))
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(1, len(parts))]


def exported(module: types.ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or else the public names that it defines or renames."""
    if hasattr(module, "__all__"):
        return [n for n in module.__all__ if not inspect.ismodule(getattr(module, n))]
    # `from x import a as a` makes a name public to type checkers; the source tells.
    source = inspect.getsource(module)
    again = set(re.findall(r"^from \S+ import (\w+) as \1$", source, re.MULTILINE))
    return [n for n in _defined(module) if not n.startswith("_")] + sorted(again)


def _defined(module: types.ModuleType) -> list[str]:
    """Public names that a module's own source defines, in its order."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [n for n in dict.fromkeys(names) if not n.startswith("_") and hasattr(module, n)]


def kind_of(module: types.ModuleType, name: str) -> str:
    """Which directive of autodoc documents a name."""
    value = getattr(module, name)
    if inspect.isclass(value) and value.__name__ == name:
        return "autoclass"
    if inspect.isroutine(value) or (callable(value) and hasattr(value, "__wrapped__")):
        return "autofunction"
    return "autodata"


def home_of(modules: list[types.ModuleType], name: str) -> str:
    """The file that defines a name which its room exports."""
    value = getattr(modules[0], name)
    at = getattr(value, "__module__", None)
    if at in {m.__name__ for m in modules} and getattr(value, "__name__", None) == name:
        return at
    for module in modules[1:]:
        if name in _defined(module):
            return module.__name__
    return modules[0].__name__


def has_comment(module: types.ModuleType, name: str) -> bool:
    """Whether a value (no class or function) is described by a string right below it."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def entry(module: str, name: str, kind: str) -> str:
    """One directive of autodoc, within Markdown."""
    options = {"autoclass": "   :members:\n   :show-inheritance:\n", "autodata": "   :no-value:\n"}
    body = f".. {kind}:: {module}.{name}\n{options.get(kind, '')}"
    return f"```{{eval-rst}}\n{body}```\n"


def entry_of_room(modules: list[types.ModuleType], home: str, name: str) -> str:
    """One directive for a name that a room exports.

    Functions and classes go by the room; autodoc finds what is said of a value where it stands.
    """
    kind = kind_of(modules[0], name)
    if kind != "autodata":
        return entry(modules[0].__name__, name, kind)
    where = next(m for m in modules if m.__name__ == home)
    if has_comment(where, name):
        return entry(home, name, kind)
    value = repr(getattr(where, name))
    shown = f"   :value: {value}\n" if len(value) <= 80 and "\n" not in value else ""
    body = f".. py:currentmodule:: {home}\n\n.. py:data:: {name}\n{shown}"
    return f"```{{eval-rst}}\n{body}```\n"


def first_paragraph(module: types.ModuleType) -> str:
    """What a file is about."""
    return inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]


def room_page(room: str) -> tuple[str, str | None]:
    """A room's page, and the page of what its files hold besides, if they do."""
    modules = modules_of(room)
    top = modules[0]
    offered = exported(top)
    by_home: dict[str, list[str]] = {}
    for name in offered:
        by_home.setdefault(home_of(modules, name), []).append(name)
    parts = [f"# {room}\n", inspect.cleandoc(top.__doc__ or "") + "\n"]
    if len(offered) > 4:
        anchors = {
            n: home if kind_of(top, n) == "autodata" else top.__name__
            for home, names in by_home.items()
            for n in names
        }
        links = (f"[`{n}`](#{anchors[n]}.{n})" for n in sorted(offered, key=str.lower))
        parts.append(" · ".join(links) + "\n")
    inside = []
    for module in modules:
        names = by_home.get(module.__name__, [])
        if names:
            if module is not top:
                parts.append(f"## {title_of(module)}\n\n{first_paragraph(module)}\n")
            parts += [entry_of_room(modules, module.__name__, name) for name in names]
        rest = [n for n in _defined(module) if n not in names and documentable(module, n)]
        if module is not top and rest:
            inside.append(f"## {title_of(module)}\n\n{first_paragraph(module)}\n")
            inside += [entry(module.__name__, n, kind_of(module, n)) for n in rest]
    if not inside:
        return "\n".join(parts), None
    parts.append(
        f"What the files of this room hold besides is in [{room}: inside](inside-{room}.md).\n"
    )
    head = (
        f"# {room}: inside\n\nPublic names of the files of [`lorajax.{room}`]({room}.md) that the "
        "room itself does not export. They are stable enough to read, and may move.\n"
    )
    return "\n".join(parts), "\n".join([head, *inside])


def title_of(module: types.ModuleType) -> str:
    """A file's heading."""
    return f"`{module.__name__.removeprefix('lorajax.')}`"


def documentable(module: types.ModuleType, name: str) -> bool:
    """Functions and classes always; values where a string says what they are."""
    return kind_of(module, name) != "autodata" or has_comment(module, name)


def front_page() -> str:
    """`import lorajax`: what stands in front, and the rooms."""
    import lorajax

    rows = [f"| [`{room}`]({room}.md) | {_line(room)} |" for room in rooms()]
    names = [
        f"[`{name}`]({module.partition('.')[0]}.md)"
        for name, module in sorted(lorajax._NAMES.items())
    ]
    tree = "\n".join(rooms())
    return (
        "# API reference\n\n"
        + inspect.cleandoc(lorajax.__doc__ or "")
        + "\n\n| room | about |\n|---|---|\n"
        + "\n".join(rows)
        + "\n\nThese names stand in front, as `lorajax.NAME`: "
        + ", ".join(names)
        + ".\n\nShapes are those of jaxtyping: `Float[Array, 'm r']` is an array of floats, two "
        "axes, and a letter that comes twice in a signature is one size; `*` before a name stands "
        "for any number of axes. Sources are cited as what they are: *stated* in the paper, "
        "*derived* here, *reconstructed* from an abstract, or *recalled*.\n\n"
        f"```{{toctree}}\n:hidden:\n\n{tree}\n```\n"
    )


def _line(room: str) -> str:
    text = " ".join(first_paragraph(importlib.import_module(f"lorajax.{room}")).split())
    return text.replace("|", r"\|")


def write(folder: pathlib.Path) -> None:
    """Writes all pages; those that are as they were keep their time, so that builds stay short."""
    folder.mkdir(exist_ok=True)
    pages = {"index": front_page()}
    for room in rooms():
        page, inside = room_page(room)
        pages[room] = page
        if inside:
            pages[room] += f"```{{toctree}}\n:hidden:\n\ninside-{room}\n```\n"
            pages[f"inside-{room}"] = inside
    for old in folder.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def soft(name: str, rawtext: str, text: str, lineno: int, inliner: Any, *rest: Any) -> tuple:
    """Single backticks of a docstring: a link where they name something of ours, else code."""
    literal = nodes.literal(rawtext, text, classes=["xref", "py"])
    if not re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", text):
        return [nodes.literal(rawtext, text)], []
    env = inliner.document.settings.env
    reference = addnodes.pending_xref(
        rawtext,
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=text.removesuffix("()"),
        refdoc=env.docname,
        refwarn=False,
        **{
            "py:module": env.ref_context.get("py:module"),
            "py:class": env.ref_context.get("py:class"),
        },
    )
    reference["soft"] = True
    return [reference], []


def missing(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Names that are reached by more than one way, and soft ones that lead nowhere."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node["reftarget"]
    for candidate in candidates(target, env.docname_room.get(node.get("refdoc"), "")):
        if candidate in domain.objects:
            found = domain.objects[candidate]
            return make_refnode(
                app.builder, node["refdoc"], found.docname, found.node_id, [content], candidate
            )
    # Type variables and other private names of a signature have no page.
    return content if node.get("soft") or target.rpartition(".")[2].startswith("_") else None


def candidates(target: str, room: str) -> list[str]:
    """Full names that a name in a docstring may stand for."""
    if target.startswith("lorajax."):
        parts = target.split(".")
        # lorajax.flows.path.Path is documented as lorajax.flows.Path.
        shorter = [".".join([*parts[:i], *parts[i + 1 :]]) for i in range(2, len(parts) - 1)]
        return [*shorter, f"lorajax.{parts[1]}.{parts[-1]}", *_front(parts[-1])]
    found = [f"lorajax.{room}.{target}"] if room else []
    return [*found, f"lorajax.{target}", *_front(target)]


def _front(name: str) -> list[str]:
    lorajax = sys.modules.get("lorajax")
    room = getattr(lorajax, "_NAMES", {}).get(name)
    return [f"lorajax.{room}.{name}"] if room else []


def rooms_of_pages(app: Any, env: Any) -> None:
    """Which room a page of the reference is about."""
    names = {}
    for docname in env.found_docs:
        if docname.startswith("api/"):
            names[docname] = docname.removeprefix("api/").removeprefix("inside-")
    env.docname_room = names


_LITERAL = re.compile(r"(``.+?``|`[^`]*`)", re.DOTALL)
_COLON = "\ue000"
_BULLET = re.compile(r"\s*[-*] ")


def lists_apart(lines: list[str]) -> list[str]:
    """Blank lines around lists, which docstrings do without and reStructuredText does not."""
    found: list[str] = []
    for line in lines:
        before = found[-1] if found else ""
        inside = _BULLET.match(before) or before.startswith(" " * (_indent(line) + 1))
        if _BULLET.match(line) and before.strip() and not inside and _indent(line) > 0:
            found.append("")
        found.append(line)
    return found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def escaped(text: str) -> str:
    """Stars and bars of formulas stay themselves; code, examples and bullets stay as they are."""
    blocks, literal = re.split(r"(\n[ ]*\n)", text), False
    for i, block in enumerate(blocks):
        if not block.strip():
            continue
        example = block.lstrip().startswith((">>>", ".. "))
        if not example and not (literal and block.startswith(" ")):
            parts = _LITERAL.split(block)
            blocks[i] = "".join(
                part if _LITERAL.fullmatch(part) else _escape(part) for part in parts
            )
        literal = block.rstrip().endswith("::")
    return "".join(blocks)


def _escape(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        bullet = re.match(r"\s*\* ", line)
        head = bullet[0] if bullet else ""
        rest = re.sub(r"(?<!\\)\|", r"\\|", line[len(head) :])
        lines.append(head + re.sub(r"(?<!\\)\*", r"\\*", rest))
    return "\n".join(lines)


def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: lists get the blank lines that they need.

    What stands before a colon in the first line about a value would be taken for its type.
    """
    lines[:] = lists_apart(lines)
    if what in ("data", "attribute", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def sources(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After napoleon: formulas are kept from being markup, and sources become citations."""
    text = escaped("\n".join(lines)).replace(_COLON, ":")
    lines[:] = [bibliography.cited(line, "rst") for line in text.split("\n")]


# optax spells its union of rates and schedules out.
_SCHEDULE = re.compile(r"float \| \S*Array \| \S*Callable\[\[.*?complex\], .*?complex\]")


def signature(
    app: Any, what: str, name: str, obj: Any, options: Any, given: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Classes whose metaclass takes anything show what their own __init__ takes."""
    if what == "class" and "*args: " in (given or "") and "__init__" in vars(obj):
        found = inspect.signature(obj.__init__)
        shown = found.replace(parameters=list(found.parameters.values())[1:])
        given = stringify_signature(shown, show_return_annotation=False, unqualified_typehints=True)
        return given, None
    return (_SCHEDULE.sub("optax.ScalarOrSchedule", given), returns) if given else None


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of named tuples say nothing of their own: the class's docstring describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, bool]:
    """Writes the pages before anything is read, and hooks the rest in."""
    # Before jaxtyping is imported: its types then print as they are written.
    typing.GENERATING_DOCUMENTATION = "lorajax"
    # Names of attributes would be looked up like types, and found in other classes.
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.rolename = ""
    app.add_role("soft", soft)
    app.connect("builder-inited", lambda app: write(pathlib.Path(app.srcdir) / "api"))
    app.connect("env-updated", rooms_of_pages)
    app.connect("missing-reference", missing)
    app.connect("autodoc-process-docstring", docstring, priority=400)
    app.connect("autodoc-process-docstring", sources, priority=600)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
