"""Parameters that a module's own code multiplies, and how: found in the source of its `forward`, without running it.

`F.linear(x, self.w[e])`, `torch.bmm(x, self.w)`, `x @ self.w.mT`, `torch.einsum("ecd,edh->ech", x, self.w)`,
`F.grouped_mm(x, self.w, offs=...)`: a weight is followed through names, views, selections of experts and casts, and
into the functions that it is handed to. What this does not see, `register_products` says.

A parameter counts only if products (and its shape) are all that the code reads it for. What is also returned, stored,
written to, looked up in, handed to another module or multiplied by another method stays as it is: an alias of its
quantized values would leave the product, or a write would be lost.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import nn

#: By operation the positions of its two factors.
FACTORS = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "mv", "grouped_mm"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), (1, 2)),
}
#: Views and copies of a weight, and selections of its experts: they are read as the weight itself.
SAME = frozenset(
    (
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "unsqueeze"),
        *("index_select", "select", "expand", "chunk", "split", "unbind", "squeeze", "narrow", "cuda", "cpu", "data"),
        *("getitem", "conj", "expand_as", "tensor_split", "unsafe_chunk", "alias"),
    )
)
#: Views that exchange the last two dims.
TURNED = frozenset(("t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "adjoint"))
#: What may be asked of a weight that is no product.
_ABOUT = frozenset(("shape", "dtype", "device", "ndim", "size", "dim", "numel", "requires_grad"))
#: Recomputes the forward pass in the backward pass, where no alias is in place.
_CHECKPOINTS = frozenset(("checkpoint", "checkpoint_sequential", "_gradient_checkpointing_func"))
#: Methods that are run before or next to the forward pass.
_SETUP = ("__", "_init", "init", "reset", "extra_repr")
#: Names that a container of layers has for itself.
_TAKEN = frozenset(dir(nn.ModuleDict))
_KEYWORDS = ({"input", "mat1", "mat_a", "batch1", "vec1"}, {"weight", "mat2", "mat_b", "batch2", "other"})
_DEPTH = 4
_LIBRARIES = ("torch.", "lq_plugin.", "lightning.", "pytorch_lightning.")
#: Base classes whose methods read no parameter of a subclass.
_BASES = (
    "transformers.modeling_utils.",
    "transformers.generation.",
    "transformers.integrations.",
    "transformers.utils.",
)
_REGISTERED: dict[type[nn.Module], dict[str, bool]] = {}
_FOUND: dict[type[nn.Module], dict[str, bool]] = {}
#: A parameter's name, and whether its last dims are exchanged on the way; None for exchanges of other dims.
_Read = tuple[str, bool | None]


def register_products(kind: type[nn.Module], **layouts: str) -> None:
    """Says which parameters the code of a class multiplies, where that cannot be seen in its `forward`.

    Args:
        kind: the class.
        layouts: by the parameter's name the order of its dims, e for experts, o for outputs and i for inputs: `"eoi"`,
            `"eio"`, `"oi"` or `"io"`.

    Raises:
        ValueError: another layout.

    >>> class Mixture(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up = nn.Parameter(torch.randn(4, 8, 16))
    >>> register_products(Mixture, up="eio")
    """
    wrong = {name: layout for name, layout in layouts.items() if layout not in ("eoi", "eio", "oi", "io")}
    if wrong:
        raise ValueError(f"a layout is 'eoi', 'eio', 'oi' or 'io', got {wrong}")
    _REGISTERED[kind] = {name: layout.endswith("io") for name, layout in layouts.items()}


def products_in_code(kind: type[nn.Module]) -> Mapping[str, bool]:
    """Returns the attributes that instances of a class multiply by, and whether they are kept as `[..., in, out]`.

    Those that are read in both ways, or by products that sum over other dims, are left out.
    """
    if kind not in _FOUND:
        _FOUND[kind] = _found(kind)
    registered = next((_REGISTERED[parent] for parent in kind.__mro__ if parent in _REGISTERED), None)
    return _FOUND[kind] if registered is None else _FOUND[kind] | registered


def _found(kind: type[nn.Module]) -> dict[str, bool]:
    forward = inspect.unwrap(kind.forward)
    if not isinstance(forward, FunctionType) or f"{forward.__module__}.".startswith(_LIBRARIES):
        return {}
    code = _Code(kind)
    code.function(forward, {}, 0)
    if code.recomputes:
        return {}
    kept = {
        name: ways.copy().pop()
        for name, ways in code.reads.items()
        if len(ways) == 1 and None not in ways and name not in code.others | _TAKEN
    }
    elsewhere = _read_elsewhere(kind, code.seen) if kept else set()
    return {name: way for name, way in kept.items() if name not in elsewhere and way is not None}


def _read_elsewhere(kind: type[nn.Module], seen: set[FunctionType]) -> set[str]:
    """Returns the attributes that methods which the forward pass does not run multiply or hand on."""
    found: set[str] = set()
    for name in {name for parent in kind.__mro__ for name in vars(parent)}:
        method = inspect.getattr_static(kind, name)
        plain = inspect.unwrap(method) if callable(method) else None
        if not isinstance(plain, FunctionType) or plain in seen or name.startswith(_SETUP):
            continue
        if not f"{plain.__module__}.".startswith((*_LIBRARIES, *_BASES)):
            code = _Code(kind)
            code.function(plain, {}, 0)
            found |= code.reads.keys() | code.others
    return found


class _Code:
    """Reads of `self.<name>` by products, in one class."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind
        self.reads: dict[str, set[bool | None]] = {}
        #: Attributes that are read for something else than a product, or written.
        self.others: set[str] = set()
        #: Whether something is computed anew in the backward pass.
        self.recomputes = False
        self.seen: set[FunctionType] = set()

    def function(self, function: FunctionType, weights: Mapping[str, _Read], depth: int, owner: bool = True) -> None:
        """Reads a function, some of whose arguments are weights; without an `owner` it is no method."""
        tree = _tree(function)
        self.seen.add(function)
        if tree is not None:
            names = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
            this = names[0] if owner and names else ""
            visitor = _Function(self, function, this, dict(weights), depth)
            for statement in tree.body:
                visitor.visit(statement)
        else:
            self.others |= {name for name, _ in weights.values()}


def _tree(function: FunctionType) -> ast.FunctionDef | None:
    """Returns the definition of a function; None without source: made by exec, or in C."""
    try:
        source = inspect.getsource(function)
        # Not dedented: a comment may begin at the left margin.
        block = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    tree = block.body[0] if isinstance(block, ast.If) else block
    return tree if isinstance(tree, ast.FunctionDef) else None


class _Function(ast.NodeVisitor):
    """Visits the nodes of a function, whose first argument `this` is the module where it is a method."""

    def __init__(self, code: _Code, function: FunctionType, this: str, weights: dict[str, _Read], depth: int) -> None:
        self.code, self.function, self.this, self.weights, self.depth = code, function, this, weights, depth
        #: Weights of which a node further out has said what they are read for.
        self._known: set[ast.expr] = set()

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.expr) and node not in self._known and (read := self._weight(node)) is not None:
            self.code.others.add(read[0])
            self._allow(node)
        return super().visit(node)

    def _allow(self, *nodes: ast.expr | None) -> None:
        """Takes weights, with the expressions that they are views or selections of, for read as they may be."""
        for node in nodes:
            while node is not None and self._weight(node) is not None:
                self._known.add(node)
                node = self.inner(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._allow_bound(target, node.value)
        self.visit(node.value)
        for target in node.targets:
            self._written(target)
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._allow_bound(node.target, node.value)
            self.visit(node.value)
            self._written(node.target)
            self._bind(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._allow_bound(node.target, node.value)
        self.visit(node.value)
        self._bind(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self._allow_each(node.iter)
        self.visit(node.iter)
        self._bind_each(node.target, node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._allow_each(node.iter)
        self.visit(node.iter)
        self._bind_each(node.target, node.iter)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for part in (*node.generators, node.elt):
            self.visit(part)

    visit_GeneratorExp = visit_ListComp  # type: ignore[assignment]

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self._product([node.left, node.right])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _ABOUT:
            self._allow(node.value)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self._allow(node.left)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _last(node.func).strip("_")
        self.code.recomputes |= name in _CHECKPOINTS or _last(node.func) in _CHECKPOINTS
        if name == "einsum":
            self._einsum(node)
        elif name in FACTORS and not self._is_own_call(node.func, name):
            first, second = FACTORS[name]
            given: list[ast.expr | None] = list(node.args)
            if isinstance(node.func, ast.Attribute) and self._weight(node.func.value) is not None:
                given.insert(0, node.func.value)  # `self.w.matmul(x)`
            elif isinstance(node.func, ast.Attribute) and not self._is_library(node.func.value):
                given.insert(0, node.func.value)  # `x.matmul(self.w)`
            given += [None] * (second + 1 - len(given))
            for keyword in node.keywords:
                for place, names in zip((first, second), _KEYWORDS, strict=True):
                    if keyword.arg in names:
                        given[place] = keyword.value
            self._product([given[first], given[second]], is_linear=name == "linear")
        elif name == "len" and isinstance(node.func, ast.Name):
            self._allow(*node.args)
        else:
            self._follow(node)
        self.generic_visit(node)

    def _is_own_call(self, called: ast.expr, name: str) -> bool:
        """Returns whether a method or a layer with the name of a product is called: `self.linear(x)`."""
        if not isinstance(called, ast.Attribute) or self._is_library(called.value):
            return False
        return name == "linear" or (isinstance(called.value, ast.Name) and called.value.id == self.this)

    def _product(self, factors: Sequence[ast.expr | None], is_linear: bool = False) -> None:
        reads = [None if factor is None else self._weight(factor) for factor in factors]
        if None not in reads:
            return  # of two weights: no input goes through their quantizers
        for place, (factor, read) in enumerate(zip(factors, reads, strict=True)):
            if read is not None and not (is_linear and place == 0):
                self._note(read, place == 1 and not is_linear)
                self._allow(factor)

    def _einsum(self, node: ast.Call) -> None:
        equation = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if not isinstance(equation, str) or "->" not in equation:
            return
        for place, factor in enumerate(node.args[1:]):
            if (read := self._weight(factor)) is not None:
                self._note(read, inputs_first(equation, place))
                self._allow(factor)

    def _note(self, read: _Read, inputs_before_outputs: bool | None) -> None:
        name, turned = read
        if self.depth and self.this and not self.function.__name__.startswith("_"):
            self.code.others.add(name)  # somebody may call this method, and no alias would be in place
        known = turned is not None and inputs_before_outputs is not None
        self.code.reads.setdefault(name, set()).add(inputs_before_outputs ^ turned if known else None)  # type: ignore[operator]

    def _follow(self, node: ast.Call) -> None:
        """Goes into a function of the class, or of its file, that is called."""
        called, owner = self._called(node.func)
        if called is None or self.depth >= _DEPTH:
            return
        try:
            bound = inspect.signature(called).bind_partial(
                *([None] if owner else []), *node.args, **{k.arg: k.value for k in node.keywords if k.arg is not None}
            )
        except (TypeError, ValueError):
            return
        weights = {
            name: read
            for name, value in bound.arguments.items()
            if isinstance(value, ast.expr) and (read := self._weight(value)) is not None
        }
        if owner or weights:
            self._allow(*(value for name, value in bound.arguments.items() if name in weights))
            self.code.function(called, weights, self.depth + 1, owner)

    def _called(self, node: ast.expr) -> tuple[FunctionType | None, bool]:
        found: Any = None
        owner = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.this
        if isinstance(node, ast.Attribute) and owner:
            found = inspect.getattr_static(self.code.kind, node.attr, None)
            if isinstance(found, staticmethod):
                found, owner = found.__func__, False
        elif isinstance(node, ast.Name):
            found = self.function.__globals__.get(node.id)
        found = inspect.unwrap(found) if callable(found) else None
        known = isinstance(found, FunctionType) and not f"{found.__module__}.".startswith(_LIBRARIES)
        return (found if known else None), owner

    def _allow_bound(self, target: ast.expr, value: ast.expr) -> None:
        """Allows a weight to get names; what these are read for is seen where they are."""
        if isinstance(target, ast.Name):
            self._allow(value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
                for inner, given in zip(target.elts, value.elts, strict=True):
                    self._allow_bound(inner, given)
            elif all(isinstance(inner, ast.Name) for inner in target.elts):
                self._allow(value)

    def _allow_each(self, values: ast.expr) -> None:
        inside = isinstance(values, ast.Call) and _last(values.func) in ("enumerate", "zip")
        self._allow(*(values.args if isinstance(values, ast.Call) and inside else [values]))

    def _written(self, target: ast.expr) -> None:
        for inner in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            if not isinstance(inner, ast.Name):
                self.visit(inner)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value] * len(target.elts)
            for inner, given in zip(target.elts, values, strict=False):
                self._bind(inner, given)
        elif isinstance(target, ast.Name):
            if (read := self._weight(value)) is not None:
                self.weights[target.id] = read
            elif not _mentions(value, target.id):
                self.weights.pop(target.id, None)

    def _bind_each(self, target: ast.expr, values: ast.expr) -> None:
        """Binds the variables of a loop over weights, with `zip` and `enumerate`."""
        if isinstance(values, ast.Call) and _last(values.func) == "enumerate" and isinstance(target, ast.Tuple):
            self._bind_each(target.elts[1], values.args[0])
        elif isinstance(values, ast.Call) and _last(values.func) == "zip" and isinstance(target, ast.Tuple):
            for inner, given in zip(target.elts, values.args, strict=False):
                self._bind_each(inner, given)
        else:
            self._bind(target, values)

    def inner(self, node: ast.expr) -> ast.expr | None:
        """Returns what a weight's expression is a view or a selection of; None where it is the parameter or a name."""
        if isinstance(node, (ast.Subscript, ast.NamedExpr)):
            return node.value
        if isinstance(node, ast.IfExp):
            return node.body if self._weight(node.body) is not None else node.orelse
        if isinstance(node, ast.Attribute):
            return None if isinstance(node.value, ast.Name) and node.value.id == self.this else node.value
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return node.args[0] if self._is_library(node.func.value) else node.func
        return None

    def _weight(self, node: ast.expr) -> _Read | None:
        """Returns the parameter that an expression is, or is a view or a selection of."""
        if isinstance(node, ast.Name):
            return self.weights.get(node.id)
        if isinstance(node, ast.Subscript):
            return self._weight(node.value)
        if isinstance(node, ast.IfExp):
            return self._weight(node.body) or self._weight(node.orelse)
        if isinstance(node, ast.NamedExpr):
            return self._weight(node.value)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == self.this:
                return node.attr, False
            return self._changed(node.attr, node.value, [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if self._is_library(node.func.value):  # `torch.transpose(self.w, 1, 2)`
                return self._changed(node.func.attr, node.args[0], node.args[1:]) if node.args else None
            return self._changed(node.func.attr, node.func.value, node.args)
        return None

    def _changed(self, name: str, value: ast.expr, dims: Sequence[ast.expr]) -> _Read | None:
        if name not in SAME | TURNED or (read := self._weight(value)) is None:
            return None
        if name in SAME:
            return read
        turned = read[1]
        return read[0], None if turned is None or not _is_last_two(name, dims) else not turned

    def _is_library(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and inspect.ismodule(self.function.__globals__.get(node.id))


def inputs_first(equation: str, place: int) -> bool | None:
    """Returns whether an operand of an einsum is kept as `[..., in, out]`; None where it is no matrix, or a stack.

    >>> inputs_first("ecd,edh->ech", 1), inputs_first("bi,oi->bo", 1), inputs_first("bshd,hde->bse", 1)
    (True, False, None)
    """
    terms, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    labels = terms.split(",")[place]
    others = set("".join(term for index, term in enumerate(terms.split(",")) if index != place))
    summed = [label for label in labels if label in others and label not in output]
    kept = [label for label in labels if label not in others and label in output]
    if len(summed) != 1 or len(kept) != 1 or {*labels[-2:]} != {*summed, *kept}:
        return None
    return labels[-2] == summed[0]


def _is_last_two(name: str, dims: Sequence[ast.expr]) -> bool:
    values = [dim.value if isinstance(dim, ast.Constant) else _negative(dim) for dim in dims]
    if not values:
        return name != "permute"
    if name == "permute":
        return values in ([0, 2, 1], [1, 0], [0, -1, -2])
    return {*values} in ({1, 2}, {-1, -2}, {0, 1}, {1, -1}, {2, -2})


def _negative(node: ast.expr) -> Any:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value  # type: ignore[operator]
    return None


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _mentions(node: ast.expr, name: str) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node))
