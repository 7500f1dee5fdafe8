"""Hold the size of the code and of the documents: `python tests/size.py` fails where a total is above its limit."""

import ast
import io
import sys
import tokenize
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# Lines of code are without docstrings, comments and blank lines. Words are those of README.md and docs/.
LIMITS = {
    "sparsefw: files": 98,
    "sparsefw: code lines": 11_400,
    "kernels: code lines": 2_500,
    "bench: code lines": 3_475,
    "tests: code lines": 14_850,
    "documents: words": 17_970,
}
# Tables of facts, which are not counted.
TABLES = {"models.md", "flags.md"}

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def code_lines(source: str) -> int:
    """The number of lines that hold code."""
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    strings = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.string and t.type not in LAYOUT]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)})


def main() -> int:
    """Print the totals beside their limits; returns 1 if one is above."""
    pages = [page for page in (REPO / "README.md", *(REPO / "docs").glob("*.md")) if page.name not in TABLES]
    totals = {"documents: words": sum(len(page.read_text("utf-8").split()) for page in pages)}
    for folder in ("sparsefw", "kernels", "bench", "tests"):
        # sparsefw/kernels is a link, which is not followed.
        paths = [path for path in (REPO / folder).rglob("*.py") if not any(p.is_symlink() for p in path.parents)]
        totals[f"{folder}: files"] = len(paths)
        totals[f"{folder}: code lines"] = sum(code_lines(path.read_text("utf-8")) for path in paths)
    for name, limit in LIMITS.items():
        print(f"{name:22}{totals[name]:8,} of {limit:7,}{'  TOO MANY' if totals[name] > limit else ''}")
    return int(any(totals[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
