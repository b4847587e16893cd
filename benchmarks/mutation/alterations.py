"""Where a source can be altered, and how: one constant, sign, exponent, comparison … at a time.

An alteration replaces a stretch of the source text, so that what runs is what stands in the table.
Left alone are: docstrings, annotations, decorators, what is raised or warned of, checks that only
raise, strings, drawing, and stand-ins that `where` discards (`where(x == 0, 1, x)`).
"""

import ast
import builtins
import dataclasses
from collections.abc import Iterator

TOLERANCE = 1e-3
"""A constant below this is a tolerance, of which the order of magnitude counts."""

FACTOR, COARSER = 1.1, 1e3
"""What constants and tolerances are multiplied by; whole numbers get one more."""

COMPARISONS = {
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
PAIRS = (
    ("minimum", "maximum"),
    ("min", "max"),
    ("argmin", "argmax"),
    ("cosh", "sinh"),
    ("cos", "sin"),
    ("exp", "expm1"),
    ("log", "log1p"),
    ("sum", "mean"),
    ("any", "all"),
    ("ceil", "floor"),
    ("tanh", "arctan"),
    ("arcsinh", "arctan"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("triu", "tril"),
)
PEERS = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
DROPPED = {"sqrt", "abs", "square", "swapaxes", "cumsum", "clip", "sort", "arccos", "arctanh"}
"""Functions that are left out: what stands is their first argument."""

ORDERED = {"where", "outer", "solve", "subtract", "divide", "power"}
"""Functions of a library of arrays in which the order of the arguments counts."""

UNTOUCHED = {"isinstance", "issubclass", "warn", "TypeVar", "range", "getattr", "hasattr", "field"}
SYMMETRIC = {"zip", "min", "max", "float", "int", "isinstance", "map", "sum", "dict", "getattr"}
OF_CHECKS = {"sign", "arithmetic", "comparison", "boolean", "exponent", "function", "transpose"}
"""Operators for the checks of claims: any size, seed or time of an instance is right."""

CLAIMED = "claimed constant"
"""The operator for what a claim says by number: the defaults that its control alters, too."""

COMPOUND = (ast.If, ast.For, ast.While, ast.With)
"""Statements whose inner statements are looked at one by one."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One alteration of one module.

    Attributes:
      module: its dotted name.
      function: qualified name of the function, or `<module>`.
      operator: the kind of alteration.
      before: the text that is replaced.
      after: what stands instead.
      occurrence: which of several equal texts of the function, from 0.
      start: byte of the source where it begins.
      end: byte where it ends.
      lines: first and last line of what a test has to execute to see it.
      named: whether it stands in the table of faults that were once missed.
    """

    module: str
    function: str
    operator: str
    before: str
    after: str
    occurrence: int
    start: int
    end: int
    lines: tuple[int, int]
    named: bool = False

    @property
    def name(self) -> str:
        """Tells it from all others, wherever the function stands in its file."""
        again = f" #{self.occurrence + 1}" if self.occurrence else ""
        return f"{self.module}:{self.function}: {self.before} → {self.after}{again}"

    @property
    def of_check(self) -> bool:
        """Whether a check of a claim is altered: a test, which its own control has to catch."""
        return _is_claim(self.module) and self.operator != CLAIMED

    def apply(self, source: str) -> str:
        """The module's source with the alteration."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def mutants(module: str, source: str) -> list[Mutant]:
    """All alterations of a module, in the order of the source."""
    tree = ast.parse(source)
    collector = _Collector(module, source)
    collector.visit(tree)
    seen: dict[tuple[str, str, str], int] = {}
    found = []
    for mutant in sorted(collector.found, key=lambda m: (m.start, m.end, m.after)):
        if mutant.of_check and mutant.operator not in OF_CHECKS:
            continue
        key = (mutant.function, mutant.before, mutant.after)
        seen[key] = seen.get(key, -1) + 1
        found.append(dataclasses.replace(mutant, occurrence=seen[key]))
    return found


def _is_claim(module: str) -> bool:
    return ".claims." in module and not module.endswith(".base")


def _is_register(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _called(node) == "claim"


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _number(node: ast.AST) -> float | int | None:
    """The value of a number that is written down, with its sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _altered(value: float | int) -> float | int:
    if isinstance(value, int):
        return value + 1 if value >= 0 else value - 1
    if value == 0:
        return 0.1
    return float(f"{value * (COARSER if abs(value) < TOLERANCE else FACTOR):.12g}")


def _constant(value: float | int) -> ast.expr:
    if value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def _only_raises(node: ast.If) -> bool:
    return not node.orelse and all(isinstance(x, ast.Raise) for x in node.body)


def _is_stand_in(node: ast.Call) -> bool:
    """`where(condition of x, 1, x)` or `where(condition, x, 1)`: the 1 keeps a division finite."""
    if _called(node) != "where" or len(node.args) != 3:
        return False
    condition, first, second = node.args
    for number, kept in ((first, second), (second, first)):
        if _number(number) is not None and _number(number) != 0:
            names = {x.id for x in ast.walk(condition) if isinstance(x, ast.Name)}
            kept_names = {x.id for x in ast.walk(kept) if isinstance(x, ast.Name)}
            return bool(names & kept_names)
    return False


class _Collector(ast.NodeVisitor):
    """Walks a module and notes its alterations."""

    def __init__(self, module: str, source: str) -> None:
        self.module = module
        self.data = source.encode()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.scope: list[str] = []
        self.lines = (0, len(self.starts))
        self.context = "constant"
        self.found: list[Mutant] = []

    def note(self, node: ast.expr | ast.stmt, operator: str, new: ast.AST) -> None:
        """One alteration: the node's text gives way to the new one's."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        before = self.data[start:end].decode()
        after = ast.unparse(ast.fix_missing_locations(new))
        if isinstance(node, ast.expr) and not isinstance(new, ast.Constant | ast.Name):
            after = f"({after})"
        function = ".".join(self.scope) or "<module>"
        self.found.append(
            Mutant(
                self.module,
                function,
                operator,
                " ".join(before.split()),
                after,
                0,
                start,
                end,
                self.lines,
            )
        )

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "draw" or node.name.startswith(("draw_", "check_", "_check", "__repr__")):
            return
        outer = self.lines
        self.scope.append(node.name)
        if len(outer) == 2 and outer == (0, len(self.starts)):
            self.lines = (node.body[0].lineno, node.end_lineno or node.lineno)
        of_function = self.lines
        if _is_claim(self.module) and any(_is_register(x) for x in node.decorator_list):
            self.context = CLAIMED
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self.context = "constant"
        for statement in node.body:
            self.statement(statement)
            self.lines = of_function
        self.scope.pop()
        self.lines = outer

    def statement(self, node: ast.stmt) -> None:
        """A statement of a function: what a test has to execute is this one, or one inside it."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.visit(node)
            return
        if not isinstance(node, COMPOUND):
            self.lines = (node.lineno, node.end_lineno or node.lineno)
            self.visit(node)
            return
        if isinstance(node, ast.If) and _only_raises(node):
            return
        for name, part in ast.iter_fields(node):
            self.lines = (node.lineno, node.lineno)
            if name in ("body", "orelse"):
                for inner in part:
                    self.statement(inner)
            elif isinstance(part, ast.expr):
                self.visit(part)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if not _only_raises(node):
            self.generic_visit(node)

    def skip(self, node: ast.AST) -> None:
        """Nothing in here is altered."""

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = skip

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.note(node, "flag", ast.Constant(not value))
        elif isinstance(value, int | float):
            self.note(node, self.context, _constant(_altered(value)))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        value = _number(node)
        if isinstance(node.op, ast.USub) and self.context == "constant":
            self.note(node, "sign", node.operand)
        elif isinstance(node.op, ast.Not):
            self.note(node, "boolean", node.operand)
        if value is not None:
            self.note(node, self.context, _constant(_altered(value)))
        else:
            self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Pow):
            power = _number(node.right)
            new = node.left if power is None else None
            if power is not None:
                new = ast.BinOp(node.left, ast.Pow(), _constant(_altered(power)))
            assert new is not None
            self.note(node, "exponent", new)
            self.visit(node.left)
            if power is None:
                self.visit(node.right)
            return
        texts = (ast.List, ast.Tuple, ast.JoinedStr)
        strings = any(
            isinstance(x, texts) or (isinstance(x, ast.Constant) and isinstance(x.value, str))
            for x in (node.left, node.right)
        )
        other = ARITHMETIC.get(type(node.op))
        # A | between types is no arithmetic.
        union = not self.scope and isinstance(node.op, ast.BitOr)
        if other is not None and not strings and not union:
            self.note(node, "arithmetic", ast.BinOp(node.left, other(), node.right))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        other = ARITHMETIC.get(type(node.op))
        if other is not None and not isinstance(node.value, ast.List):
            self.note(node, "arithmetic", ast.AugAssign(node.target, other(), node.value))
        self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        other = COMPARISONS.get(type(node.ops[0])) if len(node.ops) == 1 else None
        if other is not None:
            self.note(node, "comparison", ast.Compare(node.left, [other()], node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self.note(node, "boolean", ast.BoolOp(other, node.values))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("T", "mT"):
            self.note(node, "transpose", node.value)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        outer, self.context = self.context, "index"
        self.visit(node.slice)
        self.context = outer

    def visit_Call(self, node: ast.Call) -> None:
        called = _called(node)
        if called in UNTOUCHED or called.startswith(("check_", "_check")):
            return
        outer, self.context = self.context, "constant"
        # Python itself has min, max, any and all, and no mean.
        known = isinstance(node.func, ast.Attribute) or PEERS.get(called) in dir(builtins)
        if called in PEERS and known:
            self.note(node, "function", self.renamed(node, PEERS[called]))
        elif called in DROPPED and node.args:
            operator = "transpose" if called == "swapaxes" else "function"
            self.note(node, operator, node.args[0])
        self.swap(node, called)
        stand_in = _is_stand_in(node)
        for argument in node.args:
            if not (stand_in and _number(argument) is not None):
                self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg == "strict":  # a check, of zip
                continue
            if keyword.arg == "axis":
                self.context = "axis"
            self.visit(keyword.value)
            self.context = "constant"
        if isinstance(node.func, ast.Attribute):
            self.visit(node.func.value)
        self.context = outer

    def renamed(self, node: ast.Call, name: str) -> ast.Call:
        """The call of another function of the same place."""
        if isinstance(node.func, ast.Attribute):
            func: ast.expr = ast.Attribute(node.func.value, name, ast.Load())
        else:
            func = ast.Name(name, ast.Load())
        return ast.Call(func, node.args, node.keywords)

    def swap(self, node: ast.Call, called: str) -> None:
        """Two arguments in each other's place."""
        own = isinstance(node.func, ast.Name) and called not in SYMMETRIC | set(PEERS)
        first = 1 if called == "where" else 0
        pair = node.args[first : first + 2]
        plain = len(pair) == 2 and not any(isinstance(x, ast.Starred) for x in pair)
        if not plain or not (own or called in ORDERED):
            return
        if ast.dump(pair[0]) == ast.dump(pair[1]) or (called == "where" and len(node.args) < 3):
            return
        new = [*node.args[:first], pair[1], pair[0], *node.args[first + 2 :]]
        self.note(node, "argument", ast.Call(node.func, new, node.keywords))


def instrumented(source: str, index: int, room: int) -> str:
    """The source with a call before each statement of a function: `_mutation_hit(index, line)`.

    Args:
      source: of a module.
      index: of the module.
      room: numbers that each module has for its lines.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for block in _blocks(node):
            documented = block is node.body and ast.get_docstring(node, clean=False) is not None
            body = block[documented:]
            block[documented:] = [
                line
                for statement in body
                for line in (_hit(index * room + statement.lineno), statement)
            ]
    return ast.unparse(ast.fix_missing_locations(tree))


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    """The lists of statements of a function, without those of the functions in it."""
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop()
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block
                waiting += [x for x in block if isinstance(x, COMPOUND)]


def _hit(number: int) -> ast.stmt:
    name = ast.Name("_mutation_hit", ast.Load())
    return ast.Expr(ast.Call(name, [ast.Constant(number)], []))
