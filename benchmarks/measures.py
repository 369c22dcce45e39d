"""Measures of a package's sources: what it says beside what it does, and how long its parts are.

    python benchmarks/measures.py [FOLDER ...] [--over]

prints a line for each folder (by default pyrovae), in Markdown; `--over` also names
every function and class that is over an aim. Lines are of code where they hold a token that is neither a comment nor
a docstring; a function or class is as long as its source, docstring and decorators included.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_FUNCTION, LONGEST_CLASS, MOST_PARAMETERS, MOST_ISINSTANCE, LEAST_DOC = 60, 250, 12, 8.0, 0.40
Function = ast.FunctionDef | ast.AsyncFunctionDef
SPACE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}


@dataclass(frozen=True)
class Part:
    """A function or class: where it is, its lines, and its parameters without `self` (0 for a class)."""

    where: str
    lines: int
    parameters: int


@dataclass(frozen=True)
class Measures:
    """What is measured of a folder of sources."""

    code: int
    doc: int
    isinstance: int
    functions: tuple[Part, ...]
    classes: tuple[Part, ...]

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        lengths = [part.lines for part in self.functions]
        return [
            f"{self.doc / self.code:.2f}".removeprefix("0"),
            f"{max(lengths)}",
            f"{100 * sum(length > 40 for length in lengths) / len(lengths):.1f} %",
            f"{max(part.parameters for part in self.functions)}",
            f"{max(part.lines for part in self.classes)}",
            f"{1000 * self.isinstance / self.code:.1f}",
        ]

    def over(self) -> Iterator[str]:
        """What is over an aim, the longest first."""
        for part in sorted(self.functions, key=lambda part: -part.lines):
            if part.lines > LONGEST_FUNCTION:
                yield f"{part.where}: a function of {part.lines} lines"
        for part in sorted(self.classes, key=lambda part: -part.lines):
            if part.lines > LONGEST_CLASS:
                yield f"{part.where}: a class of {part.lines} lines"
        for part in sorted(self.functions, key=lambda part: -part.parameters):
            if part.parameters > MOST_PARAMETERS:
                yield f"{part.where}: {part.parameters} parameters"


def measure(folder: Path) -> Measures:
    """Measure every Python source in a folder."""
    code = doc = checks = 0
    functions: list[Part] = []
    classes: list[Part] = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        written = _docstring_lines(tree)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
        real = [token for token in tokens if token.type not in SPACE | {tokenize.COMMENT}]
        used = {line for token in real for line in range(token.start[0], token.end[0] + 1)} - written
        code += len(used)
        doc += len(written) + len(comments - used)
        checks += sum(isinstance(n, ast.Call) and ast.unparse(n.func) == "isinstance" for n in ast.walk(tree))
        for node in ast.walk(tree):
            where = f"{path.relative_to(folder.parent)}:{getattr(node, 'lineno', 0)} {getattr(node, 'name', '')}"
            if isinstance(node, Function):
                functions.append(Part(where, _lines(node), _parameters(node)))
            elif isinstance(node, ast.ClassDef):
                classes.append(Part(where, _lines(node), 0))
    return Measures(code, doc, checks, tuple(functions), tuple(classes))


def _docstring_lines(tree: ast.AST) -> set[int]:
    """The lines of all docstrings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def _lines(node: Function | ast.ClassDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or first) - first + 1


def _parameters(node: Function) -> int:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(argument is not None and argument.arg not in ("self", "cls") for argument in every)


def main() -> None:
    """Print the table, and what is over an aim."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "pyrovae"])
    parser.add_argument("--over", action="store_true", help="name every function and class that is over an aim")
    options = parser.parse_args()
    heads = ["doc/code", "longest function", "over 40 lines", "most parameters", "longest class"]
    print("| " + " | ".join(["", *heads, "isinstance per 1000 lines"]) + " |\n|" + "---|" * 7)
    for folder in options.folders:
        measured = measure(folder.resolve())
        print("| " + " | ".join([folder.name, *measured.cells]) + " |")
        if options.over:
            print("\n".join(["", *measured.over()]))


if __name__ == "__main__":
    main()
