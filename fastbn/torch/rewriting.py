"""Methods rewritten so that a batch norm waits for what its result goes into.

``out = self.relu(self.bn(x))`` becomes ``out = act(defer(self.bn, x), self.relu)``; and ``out = self.bn(x)``,
some statements later ``out += identity``, then ``out = self.relu(out)`` become ``out = defer(self.bn, x)``,
``out = add(iadd, out, identity)`` and ``out = act(out, self.relu)``. What these functions do, and whether
anything is fused at all, is decided at each call, by fusion.py. Here is found where they may stand: where the
result of a batch norm has one reader, and nothing between the two could tell when the batch norm was
computed.

All else about a method stays: its file and lines in tracebacks, its closure (and so `super()`), its globals,
its defaults. A method whose source does not compile to the very code that it has is left alone.
"""

import __future__

import ast
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

# What activations are called as functions. Which one it is, if any, is seen at the call.
_FUNCTIONS = ("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "silu", "hardswish")

_FUTURE = sum(
    {getattr(__future__, feature).compiler_flag for feature in __future__.all_feature_names}
    - {inspect.CO_NESTED}
)

_UNUSUAL = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))

_Place = tuple[int, int]  # line and column of a statement


class Roles(NamedTuple):
    """Attributes of a module: what ends in a batch norm, lists of such, and activations."""

    norms: tuple[str, ...]
    lists: tuple[str, ...]
    activations: tuple[str, ...]


def rewrite(
    function: FunctionType, roles: Roles, helpers: dict[str, Callable[..., Any]]
) -> FunctionType | None:
    """The method with its batch norms put off; None if there is none to put off, or it cannot be done.

    `helpers` are the functions of fusion.py that it will call, by the names that they have here.
    """
    source = _definition(function)
    if source is None:
        return None
    useless: frozenset[_Place] = frozenset()
    while True:
        definition = deepcopy(source)
        rewriter = _Rewriter(definition, roles, useless)
        if not rewriter.possible:
            return None
        definition.body = rewriter.whole_block(definition.body, [])
        if rewriter.started <= rewriter.useful:
            break
        useless |= rewriter.started - rewriter.useful
    if not rewriter.called:
        return None
    added = {_hidden(name): helpers[name] for name in sorted(rewriter.called)}
    code = _compile(definition, function, tuple(added))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(helper) for name, helper in added.items()}
    new = FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    new.__kwdefaults__ = function.__kwdefaults__
    annotations = "__annotate__" if hasattr(function, "__annotate__") else "__annotations__"
    setattr(new, annotations, getattr(function, annotations))
    new.__qualname__ = function.__qualname__
    new.__dict__.update(function.__dict__)
    return new


def _hidden(name: str) -> str:
    return f"__fastbn_{name}__"


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a plain method; None if there is none to be had, or none to be trusted."""
    code = function.__code__
    if code.co_flags & _UNUSUAL:
        return None
    try:
        lines, start = inspect.getsourcelines(function)
        source = "".join(lines)
        indented = source[0].isspace()
        # With its indentation, so that columns are those of the file.
        tree: Any = ast.parse("if 1:\n" + source if indented else source)
        definition = tree.body[0].body[0] if indented else tree.body[0]
        if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
            return None
        ast.increment_lineno(definition, start - 1 - indented)
        compiled = _compile(definition, function)
    except (OSError, TypeError, SyntaxError, IndexError):  # no source, or not that of a method
        return None
    # They differ where the file was changed after its import, or where a tool has changed the code.
    return definition if compiled and compiled.replace(co_flags=code.co_flags) == code else None


def _compile(definition: ast.FunctionDef, function: FunctionType, added: tuple[str, ...] = ()) -> Any:
    """The code of a definition that stands where that of the function does: in its class, in its closure."""
    code: Any = function.__code__
    owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2]
    inside = f"class {owner}: pass" if owner.isidentifier() else "pass"
    tree: Any = ast.parse(f"def closure({', '.join(code.co_freevars + added)}):\n {inside}")
    place = tree.body[0]
    if owner.isidentifier():
        place = place.body[0]
    place.body = [definition]
    # Python compiles `name.attribute(...)` in another way where the name was imported.
    tree.body = [*_imports("".join(inspect.findsource(function)[0])), *tree.body]
    ast.fix_missing_locations(tree)
    module = compile(tree, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    for found in _codes(module):
        if (found.co_name, found.co_firstlineno) == (code.co_name, code.co_firstlineno):
            return found.replace(co_qualname=code.co_qualname) if hasattr(code, "co_qualname") else found
    return None


@lru_cache(maxsize=16)
def _imports(source: str) -> list[ast.stmt]:
    """The imports of a file that are outside its functions and classes."""
    found: list[ast.stmt] = []
    within: list[ast.AST] = [ast.parse(source)]
    while within:
        for node in ast.iter_child_nodes(within.pop()):
            if isinstance(node, ast.Import) or (
                isinstance(node, ast.ImportFrom) and node.module != "__future__"
            ):
                found.append(node)
            elif isinstance(node, (ast.stmt, ast.ExceptHandler)) and not isinstance(node, _SCOPES):
                within.append(node)
    return found


def _codes(code: CodeType) -> Iterator[Any]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


class _Hold(NamedTuple):
    """A name behind which a batch norm may wait.

    `inputs` are names of what is to be normalized, `starts` the statements that put it off.
    """

    name: str
    inputs: frozenset[str]
    starts: frozenset[_Place]


class _Rewriter(ast.NodeTransformer):
    """One pass over a method; `useless` are the statements whose batch norm is not worth putting off.

    Visiting an expression rewrites it. Statements go through `block`, which follows a name that holds a batch
    norm from the statement that puts it off to the one that takes it. Where any other statement comes
    between, the batch norm is computed before that.
    """

    def __init__(self, definition: ast.FunctionDef, roles: Roles, useless: frozenset[_Place]) -> None:
        self.roles = roles
        self.useless = useless
        self.started: set[_Place] = set()
        self.useful: set[_Place] = set()
        self.called: set[str] = set()  # which of the helpers
        self.held = ""  # the name that waits, while a statement that takes it is visited
        self.trying = False  # inside a `try`, whose handlers may read any name
        self.reads: Counter[str] = Counter()
        self.shared: set[str] = (
            set()
        )  # names that functions inside this one, or the module, have in common with it
        parameters = [*definition.args.posonlyargs, *definition.args.args]
        self.me = parameters[0].arg if parameters else ""
        self.possible = bool(parameters)
        for node in ast.walk(definition):
            if isinstance(node, ast.Name):
                self.reads[node.id] += isinstance(node.ctx, ast.Load)
                if node.id in ("locals", "vars", "eval", "exec"):
                    self.possible = False
                if node.id == self.me and not isinstance(node.ctx, ast.Load):
                    self.possible = False
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                self.reads[node.target.id] += 1
            elif isinstance(node, (ast.Global, ast.Nonlocal)):
                self.shared.update(node.names)
                self.possible = self.possible and self.me not in node.names
            elif isinstance(node, (*_SCOPES, ast.GeneratorExp)) and node is not definition:
                self.shared.update(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))

    # ---- statements

    def whole_block(self, body: list[ast.stmt], after: list[ast.stmt | None]) -> list[ast.stmt]:
        """The statements rewritten; nothing waits behind them."""
        new, hold = self.block(body, None, after)
        if hold is not None:
            new.append(self.forced(hold, body[-1]))
        return new

    def block(
        self, body: list[ast.stmt], hold: _Hold | None, after: list[ast.stmt | None]
    ) -> tuple[list[ast.stmt], _Hold | None]:
        """The statements rewritten, and what waits behind them.

        `after` is what comes after them; None in it stands for anything, as at the end of a loop's body.
        """
        new: list[ast.stmt] = []
        for i, statement in enumerate(body):
            rest = [*body[i + 1 :], *after]
            if hold is not None:
                if self.adds(statement, hold, rest):
                    self.useful |= hold.starts
                    taken = self.taken(statement, hold, keep=True)
                    hold = hold._replace(name=_assigned(taken)[0])
                    new.append(taken)
                    continue
                if self.takes(statement, hold, rest):
                    self.useful |= hold.starts
                    new.append(self.taken(statement, hold, keep=False))
                    hold = None
                    continue
                if self.passes(statement, hold):
                    _, value = _assigned(statement)
                    if isinstance(value, ast.Call):
                        new.append(self.assign(hold.name, self.settle(_name(hold.name), value), statement))
                    new.append(statement)
                    continue
                if not (
                    isinstance(statement, ast.If)
                    and _is_quiet(statement.test)
                    and not _reads(statement.test, hold.name)
                ):
                    new.append(self.forced(hold, statement))
                    hold = None
            if isinstance(statement, ast.If):
                hold = self.branches(statement, hold, rest)
            else:
                hold = self.begins(statement)
                if hold is None:
                    self.inside(statement, rest)
            new.append(statement)
        return new, hold

    def branches(self, statement: ast.If, hold: _Hold | None, rest: list[ast.stmt | None]) -> _Hold | None:
        """Rewrite an `if`; what waits behind it. It may be an ordinary tensor after one of the branches."""
        statement.test = self.visit(statement.test)
        statement.body, first = self.block(statement.body, hold, rest)
        statement.orelse, second = self.block(statement.orelse, hold, rest)
        if first is None or second is None:
            return first or second
        if first.name == second.name:
            return _Hold(first.name, first.inputs | second.inputs, first.starts | second.starts)
        statement.body.append(self.forced(first, statement))
        statement.orelse.append(self.forced(second, statement))
        return None

    def inside(self, node: ast.AST, rest: list[ast.stmt | None]) -> None:
        """Rewrite the expressions and the blocks of a statement."""
        if isinstance(node, _SCOPES):
            return
        trying = self.trying
        self.trying = trying or isinstance(node, _TRIES)
        after = [None, *rest] if isinstance(node, (ast.For, ast.While)) else rest
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                setattr(node, field, self.visit(value))
            elif isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, field, self.whole_block(value, after))
            elif isinstance(value, list):
                for i, each in enumerate(value):
                    if isinstance(each, ast.expr):
                        value[i] = self.visit(each)
                    elif isinstance(each, ast.AST):  # an `except`, a `case`, an item of a `with`
                        self.inside(each, after)
        self.trying = trying

    def begins(self, statement: ast.stmt) -> _Hold | None:
        """What waits behind a statement such as ``out = self.bn(x)``, in which it is put off."""
        name, value = _assigned(statement)
        place = statement.lineno, statement.col_offset
        if not name or self.trying or name in self.shared or place in self.useless:
            return None
        argument = value.args[0] if self.is_norm(value) else None
        waiting = self.waiting(value)
        if waiting is None:
            return None
        statement.value = waiting  # type: ignore[attr-defined]
        self.started.add(place)
        inputs = {argument.id} if isinstance(argument, ast.Name) else ()
        return _Hold(name, frozenset(inputs), frozenset({place}))

    def adds(self, statement: ast.stmt, hold: _Hold, rest: list[ast.stmt | None]) -> bool:
        """``out += r`` or ``new = out + r``, in which the sum waits in turn."""
        if isinstance(statement, ast.AugAssign):
            return (
                isinstance(statement.op, ast.Add)
                and isinstance(statement.target, ast.Name)
                and statement.target.id == hold.name
                and not _reads(statement.value, hold.name)
                and self.may_wait_for(statement.value)
            )
        name, value = _assigned(statement)
        return (
            bool(name)
            and name not in self.shared
            and self.is_sum_of(value, hold.name)
            and _reads(statement, hold.name) == 1
            and self.is_dead(hold.name, statement, rest)
        )

    def takes(self, statement: ast.stmt, hold: _Hold, rest: list[ast.stmt | None]) -> bool:
        """A statement that begins with an activation of what waits, or a sum, and reads it nowhere else."""
        if isinstance(statement, ast.AugAssign):
            if not isinstance(statement.target, ast.Name) or statement.target.id == hold.name:
                return False
        elif not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)):
            return False
        return (
            statement.value is not None
            and self.is_first_in(statement.value, hold.name)
            and _reads(statement, hold.name) == 1
            and self.is_dead(hold.name, statement, rest)
        )

    def passes(self, statement: ast.stmt, hold: _Hold) -> bool:
        """``name = name`` or ``name = self.attr(names)``, with no name that the batch norm is about."""
        _, value = _assigned(statement)
        if not (isinstance(value, ast.Name) or self.is_call_of_mine(value)):
            return False
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        return not names & {hold.name, *hold.inputs}

    def is_dead(self, name: str, statement: ast.stmt, rest: list[ast.stmt | None]) -> bool:
        """Whether nothing that comes after `statement`, which reads the name, reads the same value again."""
        if isinstance(statement, ast.Return) or _assigns(statement, name):
            return True
        for later in rest:
            if later is None or any(isinstance(node, (ast.Break, ast.Continue)) for node in ast.walk(later)):
                return self.reads[name] == 1
            if _reads(later, name):
                return False
            if isinstance(later, (ast.Return, ast.Raise)) or _assigns(later, name):
                return True
        return True

    def taken(self, statement: Any, hold: _Hold, *, keep: bool) -> ast.stmt:
        """A statement that reads what waits; with `keep`, what it assigns waits in turn."""
        self.held = hold.name
        new: ast.stmt = statement
        if not keep:
            statement.value = self.visit(statement.value)
        elif isinstance(statement, ast.AugAssign):
            waiting = self.settle(_name(hold.name), statement.value)
            value = self.call("add", self.helper("iadd"), waiting, statement.value, like=statement)
            new = self.assign(hold.name, value, statement)
        else:
            statement.value = self.waiting(statement.value)
        self.held = ""
        return new

    def forced(self, hold: _Hold, like: ast.AST) -> ast.stmt:
        return self.assign(hold.name, self.call("force", _name(hold.name), like=like), like)

    def assign(self, name: str, value: ast.expr, like: ast.AST) -> ast.stmt:
        return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), like)

    # ---- expressions

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if self.is_activation(node):
            waiting = self.waiting(node.args[0])
            if waiting is not None:
                new = self.call("act", waiting, node.func, *node.args[1:], like=node)
                new.keywords = node.keywords
                return new
        return self.visit_BinOp(node)

    def visit_BinOp(self, node: ast.Call | ast.BinOp) -> ast.expr:
        if _sum(node) is not None:
            waiting = self.waiting(node)
            if waiting is not None:
                return self.call("force", waiting, like=node)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        return node

    def waiting(self, node: Any) -> ast.expr | None:
        """An expression for `node` in which its last batch norm waits; None where it does not end in one."""
        if self.is_norm(node):
            return self.call("defer", node.func, self.visit(node.args[0]), like=node)
        if isinstance(node, ast.Name) and node.id == self.held:
            return node
        parts = _sum(node)
        if parts is None:
            return None
        operation, left, right = parts
        if self.held and self.is_sum_of(node, self.held):
            if isinstance(left, ast.Name) and left.id == self.held:
                left = self.settle(left, right)
            return self.call("add", operation or self.helper("plus"), left, right, like=node)
        waiting = self.waiting(right)
        if waiting is not None:
            return self.call("add", operation or self.helper("plus"), self.visit(left), waiting, like=node)
        waiting = self.waiting(left) if self.may_wait_for(right) else None
        if waiting is not None:
            waiting = self.settle(waiting, right)
            return self.call("add", operation or self.helper("plus"), waiting, right, like=node)
        return None

    def is_norm(self, node: Any) -> bool:
        """``self.bn(x)`` or ``self.bns[i](x)``."""
        if not (isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords):
            return False
        if isinstance(node.args[0], ast.Starred):
            return False
        if isinstance(node.func, ast.Subscript):
            return self.is_mine(node.func.value, self.roles.lists) and _is_quiet(node.func.slice)
        return self.is_mine(node.func, self.roles.norms)

    def is_activation(self, node: Any) -> bool:
        """``self.relu(x)`` or ``F.relu(x, inplace=True)``, with further arguments that are at hand."""
        if not (isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred)):
            return False
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if not self.is_mine(function, self.roles.activations) and not (
            name in _FUNCTIONS and _is_at_hand(function)
        ):
            return False
        further = [*node.args[1:], *(keyword.value for keyword in node.keywords)]
        return all(keyword.arg for keyword in node.keywords) and all(map(_is_at_hand, further))

    def is_sum_of(self, node: Any, name: str) -> bool:
        """``name + r``, where the name may wait for r, or ``r + name``, where r is at hand."""
        parts = _sum(node)
        if parts is None or _reads(node, name) != 1:
            return False
        _, left, right = parts
        if isinstance(left, ast.Name) and left.id == name:
            return self.may_wait_for(right)
        return isinstance(right, ast.Name) and right.id == name and _is_at_hand(left)

    def is_first_in(self, node: Any, name: str) -> bool:
        """Whether the first thing that `node` does is to take an activation of the name, or a sum with it."""
        if self.is_sum_of(node, name):
            return True
        if self.is_activation(node):
            argument = node.args[0]
            if (isinstance(argument, ast.Name) and argument.id == name) or self.is_sum_of(argument, name):
                return True
        first: Any = None
        if isinstance(node, ast.Call):
            first = node.args[0] if node.args and _is_at_hand(node.func) else node.func
        elif isinstance(node, ast.BinOp):
            first = node.left
        elif isinstance(node, (ast.Attribute, ast.Subscript)):
            first = node.value
        elif isinstance(node, (ast.Tuple, ast.List)) and node.elts:
            first = node.elts[0]
        return first is not None and self.is_first_in(first, name)

    def is_mine(self, node: Any, names: tuple[str, ...]) -> bool:
        """Whether this is ``self.`` and one of the names."""
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == self.me
            and node.attr in names
        )

    def is_call_of_mine(self, node: Any) -> bool:
        """``self.attr(names)``."""
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and self.is_mine(node.func, (node.func.attr,))
            and not node.keywords
            and all(isinstance(each, ast.Name) for each in node.args)
        )

    def may_wait_for(self, node: Any) -> bool:
        """Whether a batch norm may wait while this is evaluated, once `settle` has looked."""
        return _is_at_hand(node) or self.is_call_of_mine(node)

    def settle(self, waiting: ast.expr, other: Any) -> ast.expr:
        """What waits, computed before `other` is if it has to be."""
        if not isinstance(other, ast.Call):
            return waiting
        return self.call("settle", waiting, deepcopy(other.func), *deepcopy(other.args), like=other)

    def call(self, helper: str, *args: ast.expr, like: ast.AST) -> ast.Call:
        return ast.copy_location(ast.Call(self.helper(helper), list(args), []), like)

    def helper(self, name: str) -> ast.expr:
        self.called.add(name)
        return _name(_hidden(name))


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _assigned(statement: Any) -> tuple[str, Any]:
    """The name and the value of ``name = value``, with or without an annotation; or "" and None."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    else:
        return "", None
    return (target.id, statement.value) if isinstance(target, ast.Name) else ("", None)


def _assigns(statement: ast.stmt, name: str) -> bool:
    """Whether the statement is an assignment that gives the name a value."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
        for target in targets
        for node in ast.walk(target)
    )


def _reads(node: ast.AST, name: str) -> int:
    """How often a name is read in an expression or a statement."""
    count = 0
    for inner in ast.walk(node):
        if isinstance(inner, ast.AugAssign):
            count += isinstance(inner.target, ast.Name) and inner.target.id == name
        elif isinstance(inner, ast.Name):
            count += inner.id == name and isinstance(inner.ctx, ast.Load)
    return count


def _sum(node: Any) -> tuple[ast.expr | None, ast.expr, ast.expr] | None:
    """The two sides of ``a + b`` (None before them), or of ``torch.add(a, b)`` (the function before them)."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return None, node.left, node.right
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add"
        and _is_at_hand(node.func)
        and len(node.args) == 2
        and not node.keywords
        and not any(isinstance(each, ast.Starred) for each in node.args)
    ):
        return node.func, node.args[0], node.args[1]
    return None


def _is_at_hand(node: Any) -> bool:
    """A constant, a name, or attributes of one: nothing that computes."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, (ast.Constant, ast.Name))


def _is_quiet(node: ast.AST) -> bool:
    """Whether an expression calls nothing and assigns nothing."""
    return not any(
        isinstance(inner, (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom))
        for inner in ast.walk(node)
    )
