"""One direction of imports: what a package may know of the others, read off every import."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "medusa_exp"
LAYERS = (
    {"errors", "identity"},
    {"config"},
    {"runs"},
    {"data", "demo", "tree", "tracking"},
    {"model"},
    {"decode"},
    {"train", "evaluate", "serving", "export"},
    {"stages"},
    {"cli", "hub"},
    {"__main__"},
)
"""Packages and modules, lowest first: each may import those of lower layers, and itself."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
READS_CONFIG = {"config", "runs", "stages", "cli", "__main__", "tracking"}
"""Where a whole `Config` may be taken; below, functions have plain arguments."""
HYDRA = {"config", "runs", "cli"}
"""Where Hydra and OmegaConf may be imported."""


@cache
def imports() -> dict[str, set[str]]:
    """Return, for each of our modules, what it imports of us: modules, `package.module`."""
    modules = {_name(path): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, tree in modules.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.startswith("medusa_exp."):
                    inner = target.removeprefix("medusa_exp.")
                    found[name].add(inner if inner in modules else inner.rpartition(".")[0])
    return found


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_is_in_a_layer():
    assert {_package(module) for module in imports()} - {""} == set(LEVEL)


def test_imports_run_down():
    upward = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if module and target and _package(module) != _package(target)
        if LEVEL[_package(target)] >= LEVEL[_package(module)]
    ]
    assert upward == []


def test_there_is_no_circle():
    # A package's __init__ names what its modules have: it is no stop on the way.
    graph = {m: {t for t in targets if t != m} for m, targets in imports().items() if m}
    packages = {m for m in graph if (SOURCE / m.replace(".", "/") / "__init__.py").is_file()}
    inner = {
        m: {t for t in targets if not (t in packages and m.startswith(f"{t}."))}
        for m, targets in graph.items()
    }
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' <- '.join(error.args[1])}") from None


def test_the_whole_config_stays_above():
    readers = {_name(path) for path in SOURCE.rglob("*.py") if _imports_config(path)}
    assert [m for m in sorted(readers) if _package(m) not in READS_CONFIG] == []
    assert len([m for m in readers if _package(m) != "config"]) <= 18


def _imports_config(path: Path) -> bool:
    """Is the whole `Config` taken here, rather than a section of it?"""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(alias.name == "Config" for node in found for alias in node.names)


def test_hydra_stays_above():
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in ("hydra", "omegaconf") for name in names):
                found.append(_name(path))
    assert [m for m in found if _package(m) not in HYDRA] == []


def test_pyarrow_is_imported_where_a_file_asks_for_it():
    """It is an extra: whoever reads no Parquet does without."""
    ours = re.compile(
        r"(import|from) pyarrow|from medusa_exp\.data(\.columnar | import .*columnar)"
    )
    found = {
        _name(path)
        for path in SOURCE.rglob("*.py")
        if any(ours.match(ast.unparse(node)) for node in ast.parse(path.read_text()).body)
    }
    assert found == {"data.columnar"}


def test_no_test_tools_in_the_product():
    assert [p for p in SOURCE.rglob("*.py") if "unittest" in p.read_text()] == []
