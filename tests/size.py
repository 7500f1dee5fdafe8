"""Hold the size of the code and of the documents: `python tests/size.py` fails where a total is above its limit.

Code is counted in tokens of Python, without docstrings and comments, so that a line gains nothing by being dense. C++
is counted in lines that are not blank and no comment.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# Round numbers. They move by a decision alone. Words are those of README.md and docs/.
LIMITS = {
    "core of sparsefw: tokens": 111_000,
    "extras of sparsefw: tokens": 22_000,
    "kernels: tokens": 35_000,
    "bench: tokens": 28_000,
    "tests: tokens": 165_000,
    "C++ of kernels: lines": 500,
    "documents: words": 15_000,
}
# The parts of sparsefw that only some runs need: the extras, their commands, and the modules that users import.
EXTRAS = ("extras/*", "extras/*/*", "verify.py", "evaluate.py", "lm_eval.py", "recover.py", "pack.py", "unpack.py")
EXTRAS += ("packed.py", "evaluation.py", "llmcompressor.py")
# Tables of facts, which are not counted; nor are the parts of pages that bench/pages.py writes.
TABLES = {"models.md", "flags.md", "operations.md"}
WRITTEN = r"(?s)<!-- .+? -->.*?<!-- end -->"

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def code_tokens(source: str) -> int:
    """The number of tokens that are code."""
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    strings = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    text = {line for node in strings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(1 for t in tokens if t.string and t.type not in LAYOUT and t.start[0] not in text)


def main() -> int:
    """Print the totals beside their limits; returns 1 if one is above."""
    pages = [page for page in (REPO / "README.md", *(REPO / "docs").glob("*.md")) if page.name not in TABLES]
    totals = dict.fromkeys(LIMITS, 0)
    totals["documents: words"] = sum(len(re.sub(WRITTEN, "", page.read_text("utf-8")).split()) for page in pages)
    for folder in ("sparsefw", "kernels", "bench", "tests"):
        for path in (REPO / folder).rglob("*.py"):
            # sparsefw/kernels is a link, which is not followed.
            if any(p.is_symlink() for p in path.parents):
                continue
            extra = any(path.match(f"sparsefw/{pattern}") for pattern in EXTRAS)
            part = f"{'extras' if extra else 'core'} of sparsefw" if folder == "sparsefw" else folder
            totals[f"{part}: tokens"] += code_tokens(path.read_text("utf-8"))
    for path in (*(REPO / "kernels").rglob("*.cpp"), *(REPO / "kernels").rglob("*.h")):
        # No blank lines, and no comments.
        totals["C++ of kernels: lines"] += len(re.findall(r"^ *(?!//)[^ \n]", path.read_text("utf-8"), re.MULTILINE))
    for name, limit in LIMITS.items():
        print(f"{name:28}{totals[name]:8,} of {limit:7,}{'  TOO MANY' if totals[name] > limit else ''}")
    return int(any(totals[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
