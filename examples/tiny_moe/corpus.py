"""Readable English that ships with CPython: pydoc topics, the licence, docstrings of the standard library."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Packages whose docstrings are terse or test data, or that are not part of the library itself.
_SKIPPED_PARTS = {
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "__pycache__", "turtledemo",
    "encodings", "tkinter", "distutils",
}  # fmt: skip
# Modules with less prose than this mostly list what their functions return, in one line each.
_LEAST_CHARACTERS = 4000
_TYPOGRAPHIC = str.maketrans(
    {
        "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'",
        "\u2013": "-", "\u2014": "-", "\u2026": "...", "\u00a0": " ",
    }
)  # fmt: skip
_PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z]+(?:[-'][a-z]+)?[\"',.;:)]*")


@dataclass(frozen=True)
class Document:
    """One text: its title and its paragraphs, one string without a line break each."""

    title: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs) + "\n"


def prose(text: str) -> list[str]:
    """Return the paragraphs of ``text`` that are English sentences, each joined to one line.

    Code, grammar, tables, headings and one-line descriptions go: two million weights have no room for them.
    """
    kept = []
    for block in re.split(r"\n\s*\n", text.translate(_TYPOGRAPHIC)):
        paragraph = re.sub(r"\s+", " ", block).strip()
        paragraph = re.sub(r"\s*\[\d+\]", "", paragraph)  # footnote marks
        paragraph = re.sub(r"^(\*|-|\d+\.)\s+", "", paragraph)
        paragraph = re.sub(r"(?<=\w)- (?=[a-z])", "-", paragraph)  # a word broken at its hyphen
        if _is_prose(paragraph):
            kept.append(paragraph)
    return kept


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < 120 or not paragraph.isascii():
        return False
    if not re.match(r'["*]*[A-Z]', paragraph) or not re.search(r"[.:;][\"*)]*$", paragraph):
        return False
    if any(mark in paragraph for mark in (">>>", "::=", "...)", " | ", "---", "===", "$", "@", "\\")):
        return False
    words = paragraph.split()
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= 10 and plain / len(words) > 0.85


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]


def _licence(library: Path) -> Iterator[tuple[str, str]]:
    for name in ("LICENSE.txt", "LICENSE"):
        path = library / name
        if path.is_file():
            yield "licence", path.read_text(encoding="utf-8")
            return


def _docstrings(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_PARTS.intersection(relative.parts) or relative == Path("pydoc_data/topics.py"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a file in another encoding is no loss
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
        yield f"module {relative.with_suffix('')}", "\n\n".join(texts)


def documents() -> list[Document]:
    """Return the corpus in a fixed order, every paragraph once.

    The text depends on the version of Python that runs this.
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    result = []
    for source in (_topics(), _licence(library), _docstrings(library)):
        for title, text in source:
            fresh = [p for p in prose(text) if p not in seen]
            seen.update(fresh)
            # dict.fromkeys: a docstring may occur twice inside one module.
            if fresh and (not title.startswith("module ") or sum(map(len, fresh)) >= _LEAST_CHARACTERS):
                result.append(Document(title, tuple(dict.fromkeys(fresh))))
    return result
