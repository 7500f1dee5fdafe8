"""Hold the size of the code and of the documents: `python tests/size.py` fails where a total is above its limit."""

import ast
import io
import sys
import tokenize
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# By folder: the most files, and the most lines of code, without docstrings, comments and blank lines.
LIMITS = {"sparsefw": (85, 9_500), "kernels": (30, 2_300), "bench": (60, 2_800), "tests": (150, 13_000)}

# The most words of README.md and docs/, without those that are tables of facts.
WORDS, TABLES = 14_000, {"models.md", "flags.md"}

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
    totals = []
    for folder, (files, lines) in LIMITS.items():
        # sparsefw/kernels is a link, which is not followed.
        paths = [path for path in (REPO / folder).rglob("*.py") if not any(p.is_symlink() for p in path.parents)]
        totals.append((f"{folder}: files", len(paths), files))
        totals.append((f"{folder}: code lines", sum(code_lines(path.read_text("utf-8")) for path in paths), lines))
    pages = [page for page in (REPO / "README.md", *(REPO / "docs").glob("*.md")) if page.name not in TABLES]
    totals.append(("documents: words", sum(len(page.read_text("utf-8").split()) for page in pages), WORDS))
    for name, total, limit in totals:
        print(f"{name:22}{total:8,} of {limit:7,}{'  TOO MANY' if total > limit else ''}")
    return int(any(total > limit for _, total, limit in totals))


if __name__ == "__main__":
    sys.exit(main())
