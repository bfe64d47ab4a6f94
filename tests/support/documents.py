"""Read the documents as text: their code blocks, command lines, and the names between backticks."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("autopipe", "passes", "tests", "benchmarks", "examples")

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^    (\S.*)$", re.MULTILINE)
_NAME = re.compile(r"(?<![`\w])`([^`\n]+)`(?!`)")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a document in a language ("" for those that name none)."""
    return [body for _, name, body in _BLOCK.findall(text) if name == language]


def languages(text: str) -> list[str]:
    """The language of each fenced code block of a document."""
    return [name for _, name, _ in _BLOCK.findall(text)]


def stage_columns(text: str) -> dict[str, tuple[str, ...]]:
    """The table of stages that a text shows: each column's cells, by its heading."""
    lines = text.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith("stage  ")]
    table = takewhile(re.compile(r"stage| +\d").match, lines[start:])
    heads, *rows = [re.split("  +", line.strip()) for line in table]
    return {head: tuple(cells) for head, *cells in zip(heads, *rows, strict=True)}


def command_lines(text: str) -> list[str]:
    """The lines of code blocks and indented blocks, comments cut off, that begin with a command."""
    lines = [line for _, _, body in _BLOCK.findall(text) for line in body.splitlines()]
    lines += _INDENTED.findall(_BLOCK.sub("", text))
    lines = [line.partition(" #")[0].strip() for line in lines]
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )*(autopipe|python|make)\b", line)]


def names(text: str) -> list[str]:
    """What stands between single backticks outside of code blocks, each once, in order."""
    return list(dict.fromkeys(_NAME.findall(_BLOCK.sub("", text))))


@cache
def files() -> frozenset[str]:
    """The paths of the repository's files and folders, relative to its root."""
    found = [p for folder in (*CODE, "docs", ".ci") for p in (ROOT / folder).rglob("*")]
    found += [*ROOT.iterdir(), *(ROOT / folder for folder in CODE)]
    return frozenset(str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts)


def is_file(name: str) -> bool:
    """Whether it is the path of a file or folder, or the end of one; ``*`` is any text."""
    pattern = re.escape(name.rstrip("/")).replace(r"\*", "[^/]*")
    return any(re.fullmatch(rf"(.*/)?{pattern}", path) for path in files())


@cache
def words_of_the_code() -> frozenset[str]:
    """Every name that the code uses or defines, names of files and folders, and short strings."""
    found = {part.removesuffix(".py") for path in files() for part in path.split("/")}
    for path in (ROOT / p for p in files() if p.endswith(".py")):
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match n:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.keyword(arg=str(name)):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.alias(name=name):
                    found |= {*name.split(".")}
                case ast.Constant(value=str(text)) if len(text) < 60:
                    found |= {text, *re.findall(r"\w+", text)}
    return frozenset(found)


@cache
def make_targets() -> frozenset[str]:
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    return frozenset(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
