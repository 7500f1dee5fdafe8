"""Imports point one way, from the commands down to the kernels, and there are no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sparsefw"

# The core from the top down. A module imports from its own package or from a lower level, never from another package of
# its level.
LEVELS = [
    ["run", "plan", "__main__"],
    ["cli", "api"],
    ["call_inputs"],
    ["driver"],
    ["probe"],
    ["report"],
    ["estimate"],
    ["model"],
    ["solver"],
    ["inputs"],
    ["data"],
    ["checkpoint"],
    ["kernels", "memory", "timeline", "fields", "default", "selection"],
    ["arithmetic"],
    ["ranks"],
    ["caller"],
    ["errors", "environment"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Packages that must not import others: solving one layer takes no model and no file.
NEVER = {"solver": {"model", "checkpoint", "data", "driver"}, "checkpoint": {"data", "model"}, "kernels": set(LEVEL)}

# Extras, from the top down, and the modules by which users import them.
EXTRAS = [["recover_output"], ["verification", "packed"], ["page", "evaluation", "llmcompressor"]]
EXTRA = {name: level for level, names in enumerate(EXTRAS) for name in names}
NAMED = {"verify", "recover", "pack", "unpack", "evaluate", "lm_eval", "packed", "evaluation", "llmcompressor"}
# Modules of the core that import from the extras: a call of `prune` writes pages and packs.
ENTRIES = {"api"}


def modules():
    """Every module by its dotted name below the package, with its path."""
    # A link is not followed.
    paths = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")]
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}
    return {name: path for name, path in names.items() if path.name != "__init__.py"}


def imported(path):
    """The modules of the package that a file imports, as dotted names below the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "sparsefw":
            base = node.module.partition(".")[2]
            # In `from sparsefw.package import name`, the name is a module, or something in a module.
            yield from ((f"{base}.{alias.name}" if base else alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("sparsefw."))


def home_of(module):
    """The package or the module of the package that a dotted name is in; in the extras, of two words."""
    words = module.split(".")
    return ".".join(words[:2]) if words[0] == "extras" else words[0]


def test_all_modules_have_a_level():
    names = {home_of(name) for name in modules()}
    assert names == {*LEVEL, *NAMED, *(f"extras.{name}" for name in EXTRA)}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    """From the extras to the core, not back, inside of functions neither."""
    home = home_of(module)
    for name in imported(modules()[module]):
        other = home_of(name)
        if other == home or other == "__version__":
            continue
        if other.startswith("extras."):
            below = home.startswith("extras.") and EXTRA[other[7:]] > EXTRA[home[7:]]
            assert below or home in NAMED | ENTRIES, f"{module} imports {name}"
        elif home in LEVEL:
            assert LEVEL.get(other, -1) > LEVEL[home], f"{module} imports {name}"
            assert other not in NEVER.get(home, set()), f"{module} imports {name}"
        else:
            allowed = other in LEVEL or (home in NAMED and other in NAMED)
            assert allowed, f"{module} imports {name}"


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
