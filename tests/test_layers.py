"""Each layer imports only what stands below it, and no module waits for itself."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_sfn"
MODULES = {
    ".".join(("lightning_sfn", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the top down; what belongs to no layer (version, data, the package itself) stands below all of them.
LAYERS = {"cli": 0, "cli_messages": 0, "experiments": 1, "trainer": 2, "newton": 3}


def layer_of(module: str) -> int:
    return LAYERS.get([*module.split("."), ""][1], len(LAYERS))


def statements(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    """All statements of a module, or without ``lazy`` those that run when it is imported."""
    for child in ast.iter_child_nodes(node):
        late = isinstance(child, ast.FunctionDef) or (
            isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        )
        if lazy or not late:
            yield child
            yield from statements(child, lazy=lazy)


def imports(module: str, *, lazy: bool) -> set[str]:
    found = set()
    for node in statements(ast.parse(MODULES[module].read_text()), lazy=lazy):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_sfn":
            assert node.level == 0
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(MODULES)
    return found


@pytest.mark.parametrize("module", sorted(name for name in MODULES if layer_of(name) < len(LAYERS)))
def test_a_module_imports_only_its_own_layer_and_those_below(module: str) -> None:
    above = {name for name in imports(module, lazy=True) if layer_of(name) < layer_of(module)}
    assert above == set()


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: imports(module, lazy=False) for module in MODULES}
    assert len(graph["lightning_sfn.trainer.callbacks.switch"]) > 10
    order = list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    assert order.index("lightning_sfn.newton.krylov") < order.index("lightning_sfn.newton.optimizer")
