"""The rooms of the library: a file imports only from rooms above it, without circles, and stays short."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lq_plugin"
ROOMS = [
    "errors", "extras", "utilities", "intent", "native", "functional", "metrics", "ranges", "quantizers", "layers",
    "model", "ptq", "plots", "export", "report", "callbacks", "search", "demo", "commands", "__init__",
]  # fmt: skip
ALLOWED_LENGTH = 450
#: All else asks `lightning_packages`: either package may be the user's.
USES_LIGHTNING = {
    "utilities/lightning_packages.py",
    "demo/__main__.py",
    "demo/cifar10.py",
    "demo/digits.py",
    "demo/resnet.py",
}
#: Imports by name, inside a function, that are left out of the picture, each with its reason.
SHORTCUTS = {("intent.plan", "report.explain"): "plan.describe(model) is lq-explain, as a method of what users hold"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> dict[str, list[tuple[str, ...]]]:
    """Names that a file imports by their module, also those inside functions, under TYPE_CHECKING and by name."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, []).append(())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.setdefault(node.module or "", []).append(tuple(alias.name for alias in node.names))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            by_name = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            for name in by_name:
                if (module_of(path), name.removeprefix("lq_plugin.")) not in SHORTCUTS:
                    found.setdefault(name, []).append(())
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of the package, without its name, that a file imports."""
    found = set()
    for module, uses in imports(path).items():
        top, _, rest = module.partition(".")
        if top == "lq_plugin":
            for name in [name for names in uses for name in names] or [""]:
                whole = f"{rest}.{name}".strip(".")
                found.add(whole if whole in MODULES else rest)
    return found - {module_of(path)}


def circles() -> list[frozenset[str]]:
    """Sets of modules that import each other, directly or around (Tarjan's strongly connected components)."""
    graph = nx.DiGraph([(module, other) for module, path in MODULES.items() for other in own_imports(path)])
    return [frozenset(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_imports_point_upwards():
    for path in FILES:
        room = (module_of(path) or "__init__").split(".")[0]
        for module in own_imports(path):
            other = (module or "__init__").split(".")[0]
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path} ({room}) imports {module}"


def test_no_circle_of_imports():
    assert circles() == []


def test_private_names_stay_in_their_file():
    for path in FILES:
        for module, uses in imports(path).items():
            if module.partition(".")[0] == "lq_plugin":
                private = [name for names in uses for name in names if name.startswith("_") and not name.endswith("__")]
                assert not private, f"{path} imports {private} from {module}"


def test_only_one_file_imports_lightning():
    for path in FILES:
        for node in tree(path).body:  # under TYPE_CHECKING everybody may
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            if any((name or "").split(".")[0] in ("lightning", "pytorch_lightning") for name in names):
                assert str(path.relative_to(PACKAGE)) in USES_LIGHTNING, path


def test_files_are_short_and_do_not_print():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= ALLOWED_LENGTH, path
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printed, f"{path} prints in line {printed[0]}"


def test_the_core_does_not_import_lightning():
    heavy = ("lightning", "optuna", "wandb", "hydra", "matplotlib")
    core = "lq_plugin, lq_plugin.intent.plan, lq_plugin.ranges, lq_plugin.model"
    code = f"import sys, {core}; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


#: Rooms' files whose functions take pointers and constants of a GPU kernel, named where their wrappers hand them over.
KERNELS_OF_GPUS = {"layers/integer/triton_kernels.py", "native/triton_kernels.py"}
#: A summary that begins with these is no phrase that stands alone in an editor's hover.
NO_SUMMARY = ("What", "Which", "How", "Whether", "Where", "The same")


def documented(path: Path) -> list[tuple[str, ast.AST, str]]:
    """Name, node and docstring of a file and of its classes and functions; overrides without one have their base's."""
    found: list[tuple[str, ast.AST, str]] = []

    def visit(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = f"{owner}.{child.name}".strip(".") if hasattr(child, "name") else owner
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(child)):
                found.append((name, child, text))
            if not isinstance(child, ast.FunctionDef):  # what is inside of a function is its own affair
                visit(child, name)

    if text := ast.get_docstring(tree(path)):
        found.append(("", tree(path), text))
    visit(tree(path), "")
    return found


def test_summaries_stand_alone():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}: {text.splitlines()[0]}"
        for path in FILES
        for name, _, text in documented(path)
        if text.startswith(tuple(f"{word} " for word in NO_SUMMARY))
    ]
    assert not wrong, "\n".join(wrong)


def test_three_parameters_or_more_are_described():
    wrong = []
    for path in FILES:
        for name, node, text in documented(path):
            private = any(part.startswith("_") for part in name.split("."))
            if private or not isinstance(node, ast.FunctionDef) or str(path.relative_to(PACKAGE)) in KERNELS_OF_GPUS:
                continue
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in taken)
            if count >= 3 and "Args:" not in text:
                wrong.append(f"{path.relative_to(PACKAGE)}: {name} takes {count}")
    assert not wrong, "\n".join(wrong)
