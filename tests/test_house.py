"""How the repository is laid out: rooms import downwards, names are documented, paths are nobody's.

The rooms and the floors they stand on are those of CONTRIBUTING.md.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator

import pytest

import lorajax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lorajax"

# Each room and the rooms it may import, ground floor first; every room may import these two.
GROUND = {"environment", "factors"}
CORE = {
    "environment": set(),
    "factors": set(),
    "problems": set(),
    "initializers": set(),
    "exact": {"problems"},
    "spectra": set(),
    "sweeps": set(),
    "flows": {"problems", "initializers", "exact", "spectra", "sweeps"},
    "laws": {"problems"},
    "optima": {"problems"},
    "ranks": {"spectra"},
}
MIDDLE = {
    "claims": set(CORE),
    "downloads": set(),
    "adapters": {"initializers", "problems", "ranks"},
    "models": {"downloads"},
    "data": {"downloads"},
    "tasks": {"models", "data"},
    "finetune": {*CORE, "claims", "adapters", "models", "data", "tasks"},
}
BELOW = {*CORE, *MIDDLE}
TOP = {
    "plots": BELOW,
    "studies": BELOW | {"plots"},
    "report": BELOW | {"plots"},
    "cli": BELOW | {"plots", "studies", "report"},
    "__main__": {"cli"},
    "__init__": BELOW | {"plots", "studies", "report"},
}
ROOMS = CORE | MIDDLE | TOP
# Packages that cost seconds to import, and the only rooms that may pay for them.
HEAVY = {
    "flax": {"adapters", "models", "finetune", *TOP},
    "matplotlib": set(TOP),
    "xarray": {"sweeps", "flows", "claims", *TOP},
    "zarr": {"sweeps", *TOP},
}


def room_of(path: pathlib.Path) -> str:
    """The room that a file of the package belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(source: str, package: str) -> Iterator[str]:
    """The absolute dotted name of everything that `source`, a module of `package`, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            parts = (above if node.level else []) + ([node.module] if node.module else [])
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def trespasses(room: str, modules: Iterator[str]) -> list[str]:
    """Which of `modules` the room must not import."""
    found = []
    for module in modules:
        top, _, rest = module.partition(".")
        if top == "lorajax" and rest:
            target = rest.partition(".")[0]
            # `from lorajax import name` may also bring a public name: the name says which room.
            if target not in ROOMS:
                target = room_of_public_name(target)
            if target not in ROOMS[room] | {room, "__version__"} | GROUND:
                found.append(module)
        elif top in HEAVY and room not in HEAVY[top]:
            found.append(module)
    return found


def room_of_public_name(name: str) -> str:
    """The room that defines the public name `lorajax.<name>`."""
    value = getattr(lorajax, name)
    module = getattr(value, "__module__", "") or ""
    return module.split(".")[1] if module.startswith("lorajax.") else name


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_is_in_a_known_room():
    assert SOURCES
    assert {room_of(path) for path in SOURCES} <= set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_downwards(path):
    modules = imported_modules(path.read_text(encoding="utf-8"), package_of(path))
    assert trespasses(room_of(path), modules) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("problems", "from lorajax import flows"),
        ("problems", "from lorajax.flows import gradient_flow"),
        ("problems", "def late():\n    import lorajax.flows"),
        ("problems", "from .flows import gradient_flow"),
        ("flows", "import flax.nnx"),
        ("ranks", "from lorajax import problems"),
        ("sweeps", "from matplotlib import pyplot"),
    ],
)
def test_an_import_upwards_is_caught(room, source):
    assert trespasses(room, imported_modules(source, "lorajax")) != []


IMAGES = re.compile(
    r"\b(?:images?|pixels?|h w c|labels|image_size|config\.(?:mean|std|channels))\b", re.IGNORECASE
)


@pytest.mark.parametrize("room", ["finetune", "adapters", "sweeps"])
def test_training_does_not_know_what_an_image_is(room):
    """That is for tasks; the claims of `finetune` are of one network and its data."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        if room_of(path) == room and path.relative_to(PACKAGE) != pathlib.Path("finetune/claims.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if IMAGES.search(line)
    ]
    assert found == []
    assert IMAGES.search("x = split.images[index], model.config.mean")


def public_objects() -> Iterator[tuple[str, object]]:
    """Every public module, class, function and method of the package, with its dotted name."""
    yield "lorajax", lorajax
    for info in pkgutil.walk_packages([str(PACKAGE)], "lorajax."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        module = importlib.import_module(info.name)
        yield info.name, module
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            if inspect.isclass(value):
                yield f"{info.name}.{name}", value
                for method_name, method in vars(value).items():
                    if not method_name.startswith("_") and is_written_here(method):
                        yield f"{info.name}.{name}.{method_name}", method
            elif callable(value):
                yield f"{info.name}.{name}", value


def is_written_here(member: object) -> bool:
    """Whether a class attribute is a method, a property or the like, not a field."""
    kinds = (types.FunctionType, property, classmethod, staticmethod)
    return isinstance(member, kinds)


def has_own_docstring(value: object) -> bool:
    """Whether someone wrote a docstring: tuples and data classes make one up themselves."""
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        text = vars(value).get("__doc__") or ""
        made_up = text.startswith(f"{value.__name__}(")
        if made_up and (dataclasses.is_dataclass(value) or issubclass(value, tuple)):
            return False
    return bool(text.strip())


def test_every_public_name_has_a_docstring():
    named = dict(public_objects())
    assert len(named) > 20
    assert [name for name, value in named.items() if not has_own_docstring(value)] == []


def declared_to_type_checkers() -> tuple[dict[str, str], set[str]]:
    """The public names (with their rooms) and modules under `TYPE_CHECKING` in `__init__.py`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    names, modules = {}, set()
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is private to type checkers"
            if node.module == "lorajax":
                modules.add(alias.name)
            else:
                names[alias.name] = node.module.removeprefix("lorajax.")
    return names, modules


def test_type_checkers_and_run_time_know_the_same_names():
    names, modules = declared_to_type_checkers()
    assert names == lorajax._NAMES
    rooms = {info.name for info in pkgutil.iter_modules([str(PACKAGE)])}
    assert modules == rooms - {"cli", "__main__"}
    for name in [*names, *modules]:
        assert getattr(lorajax, name) is not None
    assert {*names, *modules} <= set(dir(lorajax))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lorajax.no_such_name


def test_the_front_door_opens():
    spec = importlib.util.spec_from_file_location("front_door", ROOT / "tests" / "front_door.py")
    assert spec is not None and spec.loader is not None
    door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(door)
    assert door.ROOMS[0] is door.SAME[0] is importlib.import_module("lorajax.finetune")


# What is imported under another name than it is installed by.
DISTRIBUTIONS = {"PIL": "pillow", "orbax": "orbax-checkpoint"}


def test_every_imported_package_is_declared():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["text"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in wanted}
    imported = {
        module.partition(".")[0]
        for path in SOURCES
        for module in imported_modules(path.read_text(encoding="utf-8"), package_of(path))
    }
    imported -= {"lorajax", *sys.stdlib_module_names}
    needed = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported}
    assert needed - declared == set()
    assert declared - needed == set()


def package_of(path: pathlib.Path) -> str:
    """The dotted package that a file belongs to."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def private_names(source: str, package: str) -> list[str]:
    """The private names that `source` takes from other files of lorajax, by import or by dot."""
    tree, found, modules = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module):
            ours = node.level or (node.module or "").split(".")[0] == "lorajax"
            for alias in node.names if ours else ():
                modules.add(alias.asname or alias.name)
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    found.append(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            named_tuple = node.attr in {"_replace", "_asdict", "_fields", "_make"}
            if private and not named_tuple and node.value.id in modules:
                found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_takes_a_private_name_from_another(path):
    assert private_names(path.read_text(encoding="utf-8"), package_of(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from lorajax.flows.gradient import _check_start",
        "def late():\n    from .gradient import _check_start",
        "from lorajax.flows import gradient\ngradient._check_start(1)",
    ],
)
def test_a_private_name_is_caught(source):
    assert private_names(source, "lorajax.flows") != []


LONGEST_FILE, LONGEST_FUNCTION = 500, 80


def long_functions(source: str) -> list[str]:
    """The functions of more than `LONGEST_FUNCTION` lines, from `def` to their end."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    assert long_functions(source) == []


def test_a_long_function_is_caught():
    head, line = "def f():\n", "    pass\n"
    assert long_functions(head + line * (LONGEST_FUNCTION - 1)) == []
    assert long_functions(head + line * LONGEST_FUNCTION) == ["f: 81 lines"]


def test_parsed_arguments_stay_in_the_command():
    found = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if room_of(path) != "cli" and "argparse.Namespace" in path.read_text(encoding="utf-8")
    ]
    assert found == []


def arrows() -> set[tuple[str, str]]:
    """The pairs of different rooms of which the first imports the second, wherever in a file.

    The front door counts for none: it names every room so that a user need not.
    """
    found = set()
    for path in SOURCES:
        room = room_of(path)
        for module in imported_modules(path.read_text(encoding="utf-8"), package_of(path)):
            top, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if top != "lorajax" or not rest or target.startswith("__"):
                continue
            target = target if target in ROOMS else room_of_public_name(target)
            found.add((room, target))
    return {(a, b) for a, b in found if a != b and a != "__init__"}


def circle(pairs: set[tuple[str, str]]) -> set[str]:
    """The rooms that are left when those that import no room that is left are taken away."""
    left = {room for pair in pairs for room in pair}
    while free := {room for room in left if not any(a == room and b in left for a, b in pairs)}:
        left -= free
    return left


def test_few_arrows_and_no_circle():
    pairs = arrows()
    assert circle(pairs) == set()
    assert len(pairs) < 103, sorted(pairs)


def test_a_circle_is_caught():
    pairs = {("a", "b"), ("b", "c"), ("d", "a")}
    assert circle(pairs) == set()
    assert circle(pairs | {("c", "a")}) == {"a", "b", "c", "d"}


def tracked_files() -> list[pathlib.Path]:
    """The text files that git tracks; every file, where this is not a git checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        return [path for path in ROOT.rglob("*.py") if ".venv" not in str(path)]
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


PRIVATE = re.compile(
    r"""(?:(?<![\w.~])|(?<=\\n))/(?:home|root|work|workspace|Users|mnt|tmp)/\w  # somebody's folder
      | \b[A-Z]:\\Users\b
      | --(?:extra-)?index[-]url | --find[-]links | --trusted[-]host  # where packages come from
      | https?://[^\s/'"]+/(?:[^\s'"]*/)?simple/?(?=[\s'"]|$)
      | \b(?:pypi\.org|pythonhosted\.org|npmjs\.org|download\.pytorch\.org)\b
    """,
    re.VERBOSE,
)


def index_hosts() -> set[str]:
    """The hosts that pip on this machine is set up to download from."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(pip, capture_output=True, text=True).stdout
    settings += "\n".join(value for name, value in os.environ.items() if name.startswith("PIP_"))
    urls = re.findall(r"https?://(?:[^\s/'\"@]*@)?([^\s/'\":]+)", settings)
    return {host for host in urls if host != "localhost" and not host.startswith("127.")}


def test_tracked_files_name_no_private_path_and_no_package_index():
    hosts = index_hosts()
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if PRIVATE.search(line) or any(host in line for host in hosts):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "open('/ho" + "me/someone/data.npz')",
        "see /wo" + "rk/notes.md",
        '"reason": "E\\n/wo' + 'rk/notes.md"',
        "pip install --index" + "-url=x",
        "https://mirror.example" + "/simple/",
    ],
)
def test_a_private_path_or_index_is_caught(line):
    assert PRIVATE.search(line)


CLAIMS = sorted((PACKAGE / "claims").rglob("*.py"))
SIMULATED = {"b_scale", "sign", "told", "skip", "shift", "mix"}
"""Alterations of what is simulated, ordered, or given to a law: with these a claim may compute."""


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of the parameters, positional ones first."""
    return [each.arg for each in [*function.args.args, *function.args.kwonlyargs]]


def is_claim(function: ast.FunctionDef) -> bool:
    """Whether a function is a claim's check."""
    calls = [each.func for each in function.decorator_list if isinstance(each, ast.Call)]
    return any(isinstance(each, ast.Name) and each.id == "claim" for each in calls)


def constants(functions: dict[str, ast.FunctionDef]) -> dict[str, set[str]]:
    """The parameters of each function that hold a constant of a claim's law, also handed on."""
    found = {
        name: {*parameters(each)[1:]} - SIMULATED if is_claim(each) else set()
        for name, each in functions.items()
    }
    for _ in functions:  # A constant is handed on at most that often.
        for name, function in functions.items():
            for call in ast.walk(function):
                called = getattr(getattr(call, "func", None), "id", None)
                if not isinstance(call, ast.Call) or called not in functions:
                    continue
                handed = [*zip(parameters(functions[called]), call.args, strict=False)]
                handed += [(each.arg, each.value) for each in call.keywords]
                for parameter, value in handed:
                    if isinstance(value, ast.Name) and value.id in found[name]:
                        found[called].add(parameter)
    return found


def retypings(source: str) -> list[str]:
    """Where a module of claims computes with a law's constant instead of handing it to the law.

    A difference from what was measured is the comparison itself, and figures may draw a line.
    """
    tree = ast.parse(source)
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}
    found = []
    for name, held in constants(functions).items():
        waiting: list[ast.AST] = [functions[name]]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.FunctionDef) and node.name == "draw":
                continue
            waiting.extend(ast.iter_child_nodes(node))
            if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Sub):
                sides = [getattr(each, "operand", each) for each in (node.left, node.right)]
                if any(isinstance(each, ast.Name) and each.id in held for each in sides):
                    found.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_claim_retypes_a_law(path):
    assert retypings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "body",
    [
        "return _slopes(run, lambda e: -factor / e['fast'])",
        "return _slopes(run, lambda e: factor * (1 - e['delta']))",
        "law = sum(V) - np.cumsum(V / (1 + (1 + factor * sum(V) / V) / N))",
        "law = factor**0.5 * np.asarray(laws.allora_time(levels, goals, a, eta))",
        "law = np.asarray(laws.logistic(factor * times[:, None], s[None], 1e-4))",
        "share = jnp.exp(-factor * w * path.times)",
        "plain = tight_flow(problem, start, times * ratio**factor)",
        "return helper(run, factor)",
    ],
)
def test_a_retyped_law_is_caught(body):
    helper = "def helper(run, floor):\n    return above(values, floor * svd(noise)[:, 0])\n"
    check = f"@claim('a.b')\ndef check(run, factor=1.0):\n    {body}\n"
    assert retypings(helper + check) != []


def test_a_law_that_is_called_is_not_caught():
    body = "law = laws.logistic(t, s, start, rate=factor)\n    return abs(slope - factor)"
    assert retypings(f"@claim('a.b')\ndef check(run, factor=1.0):\n    {body}\n") == []


def unnamed(room: types.ModuleType, prefix: str, sources: list[pathlib.Path]) -> list[str]:
    """The public functions of a room that no source names as `prefix.name`."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = set(re.findall(rf"\b{prefix}\.(\w+)", texts))
    tools = {"lorajax.laws.base"}
    return [
        name
        for name, value in vars(room).items()
        if callable(value)
        and not name.startswith("_")
        and not inspect.isclass(value)
        and getattr(value, "__module__", "").startswith(room.__name__)
        and value.__module__ not in tools
        and name not in named
    ]


def test_every_law_and_rank_rule_is_named_in_a_claim_or_a_test():
    tests = [*(ROOT / "tests" / "laws").glob("*.py"), *(ROOT / "tests").rglob("test_ranks*.py")]
    assert unnamed(lorajax.laws, "laws", CLAIMS + tests) == []
    assert unnamed(lorajax.ranks, "ranks", CLAIMS + tests) == []


def test_a_law_that_nothing_names_is_found():
    assert "logistic" in unnamed(lorajax.laws, "laws", [])
