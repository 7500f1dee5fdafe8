"""Imports point one way, from the commands down to the kernels, and there are no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sparsefw"

# From the top down. A module imports from its own package or from a lower level, never from another package of its
# level.
LEVELS = [
    ["unpack"],
    ["run", "plan", "verify", "evaluate", "lm_eval", "pack", "recover"],
    ["cli", "api", "llmcompressor", "recovery"],
    ["arguments"],
    ["driver", "verification", "packing"],
    ["evaluation", "probe"],
    ["report"],
    ["estimate"],
    ["model", "packed"],
    ["solver"],
    ["inputs"],
    ["data"],
    ["checkpoint"],
    ["kernels", "memory", "timeline", "fields", "default", "selection"],
    ["arithmetic"],
    ["ranks"],
    ["errors", "caller"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Packages that must not import others: solving one layer takes no model and no file.
NEVER = {"solver": {"model", "checkpoint", "data", "driver"}, "checkpoint": {"data", "model"}, "kernels": set(LEVEL)}


def modules():
    """Every module by its dotted name below the package, with its path."""
    # A link is not followed.
    paths = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}
    return {name: path for name, path in names.items() if path.name != "__init__.py"}


def imported(path):
    """The modules of the package that a file imports, as dotted names below the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and node.module
            and node.module.split(".")[0] == "sparsefw"
        ):
            base = node.module.partition(".")[2]
            # In `from sparsefw.package import name`, the name is a module, or something in a module.
            yield from ((f"{base}.{alias.name}" if base else alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("sparsefw."))


def test_all_modules_have_a_level():
    assert {name.split(".")[0] for name in modules()} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    home = module.split(".")[0]
    for name in imported(modules()[module]):
        other = name.split(".")[0]
        if other == home or other == "__version__":
            continue
        assert LEVEL[other] > LEVEL[home], f"{module} imports {name}"
        assert other not in NEVER.get(home, set()), f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    """An `__init__` is left out: it imports all modules of its package."""
    paths = modules()
    edges = {
        module: {other for name in imported(path) for other in paths if f"{name}.".startswith(f"{other}.")}
        for module, path in paths.items()
    }
    # Raises CycleError, which names the circle.
    TopologicalSorter(edges).prepare()


def test_kernels_are_found_through_a_link():
    """transformers imports a top-level package called kernels: it must not be one."""
    assert (PACKAGE / "kernels").is_symlink()
    assert not (PACKAGE / "kernels" / "__init__.py").exists()
