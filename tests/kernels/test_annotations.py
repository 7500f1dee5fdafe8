"""All functions in kernels/ are annotated except those in Triton's language, for which mypy lets them all pass."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_host_functions_are_annotated(path):
    assert path.name != "__init__.py", "kernels/ is a namespace: another distribution owns the import name `kernels`"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [x.arg for x in parameters if x.annotation is None and x.arg != "self"]
            assert not bare, f"{node.name}: {bare}"
            assert node.returns is not None or node.name == "__init__", node.name
