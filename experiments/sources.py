"""Where the texts of the demonstration tasks come from: the standard library, its Unicode tables, tzdata and Babel.

Nothing is downloaded. The examples depend on the Python version (source and Unicode tables) and on the pinned tzdata
and Babel. The operating system's time-zone files are not read, nor the library parts that some distributions leave out.
"""

import ast
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

Example = tuple[str, str]  # (text, label)


class Source(NamedTuple):
    """A task before its texts are dealt to the splits."""

    prompts: Mapping[str, str]  # label -> the text whose embedding stands for the label
    examples: Callable[[], Iterator[Example]]  # may repeat itself
    gate: int  # examples per label, at most
    tune: int  # examples per label, at most
    train: int  # examples per label, at most


CITY = {
    "Africa": "a city in Africa",
    "America": "a city in America",
    "Asia": "a city in Asia",
    "Europe": "a city in Europe",
    "Pacific": "an island in the Pacific Ocean",
    "Australia": "a city in Australia",
}

SCRIPT = {
    "ARABIC": "Arabic letter",
    "CANADIAN": "Canadian Aboriginal syllable",
    "CUNEIFORM": "Cuneiform sign",
    "CYRILLIC": "Cyrillic letter",
    "ETHIOPIC": "Ethiopic syllable",
    "GREEK": "Greek letter",
    "HANGUL": "Hangul syllable",
    "LATIN": "Latin letter",
    "TIBETAN": "Tibetan sign",
    "YI": "Yi syllable",
}

DOCSTRING = {
    "asyncio": "asynchronous event loop and coroutines",
    "decimal": "decimal arithmetic",
    "email": "parsing and writing mail messages",
    "importlib": "finding and loading modules",
    "logging": "logging records and handlers",
    "multiprocessing": "processes and shared memory",
    "unittest": "unit tests and mock objects",
    "xml": "XML documents and elements",
}

LINE = {
    "assert": "an assertion",
    "assignment": "an assignment",
    "call": "a function call",
    "class": "a class definition",
    "comment": "a comment",
    "condition": "a condition",
    "function": "a function definition",
    "import": "an import statement",
    "loop": "a loop",
    "raise": "an exception is raised",
    "return": "a return statement",
}

LANGUAGE = {
    "cy": "Welsh",
    "eu": "Basque",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "id": "Indonesian",
    "pl": "Polish",
    "sw": "Swahili",
    "tr": "Turkish",
    "vi": "Vietnamese",
}

# Modules that come with every interpreter; distributions pack tkinter, idlelib, lib2to3, distutils and test apart.
MODULES = (
    "argparse ast asyncio bdb codecs configparser contextlib csv dataclasses difflib ftplib functools gzip heapq "
    "json locale optparse random shutil socket string subprocess tempfile textwrap threading traceback urllib xml"
)


def cities() -> Iterator[Example]:
    """City -> world region, from the names of the time zones (tzdata)."""
    for zone in (files("tzdata") / "zones").read_text("utf-8").split():
        region, *path = zone.split("/")
        if region in CITY and path:
            yield path[-1].replace("_", " "), region


def characters() -> Iterator[Example]:
    """Rest of a character's name -> script, the name's first word (Unicode)."""
    for code in range(sys.maxunicode + 1):
        script, _, rest = unicodedata.name(chr(code), "").partition(" ")
        if script in SCRIPT and rest:
            yield rest.lower(), script


def docstrings() -> Iterator[Example]:
    """First line of a docstring -> package; lines that say the name of any label are left out."""
    for package in DOCSTRING:
        for text in _sources("_pydecimal" if package == "decimal" else package):
            for line in map(_first_line, ast.walk(ast.parse(text))):
                if len(line.split()) >= 3 and not any(label in line.lower() for label in DOCSTRING):
                    yield line, package


def lines() -> Iterator[Example]:
    """Source line -> kind, from the syntax tree (and the number sign for comments)."""
    for module in MODULES.split():
        for text in _sources(module):
            for line, kind in _kinds(text):
                if len(line.split()) >= 2 and len(line) <= 60:
                    yield line, kind


def words() -> Iterator[Example]:
    """Name of a territory, language or currency -> the language it is written in (CLDR, through Babel)."""
    from babel import Locale  # only this task needs the package

    for language in LANGUAGE:
        locale = Locale.parse(language)
        for names in (locale.territories, locale.languages, locale.currencies):
            yield from ((names[code], language) for code in sorted(names) if names[code] != code)


def _sources(module: str) -> Iterator[str]:
    """The source texts of a module, or of a package's modules in the order of their paths, without its tests."""
    root = Path(ast.__file__).parent / module
    paths = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    yield from (path.read_text("utf-8") for path in paths if "test" not in path.relative_to(root.parent).parts)


def _first_line(node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return ""
    return (ast.get_docstring(node) or "").partition("\n")[0].strip()


KINDS: Mapping[type[ast.stmt], str] = MappingProxyType(
    {
        ast.Assert: "assert",
        ast.Assign: "assignment",
        ast.AnnAssign: "assignment",
        ast.AugAssign: "assignment",
        ast.ClassDef: "class",
        ast.If: "condition",
        ast.FunctionDef: "function",
        ast.AsyncFunctionDef: "function",
        ast.Import: "import",
        ast.ImportFrom: "import",
        ast.For: "loop",
        ast.While: "loop",
        ast.Raise: "raise",
        ast.Return: "return",
    }
)


def _kinds(text: str) -> Iterator[Example]:
    """(line, kind) of each statement's first line and of each comment that has a line to itself."""
    source = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and (kind := _kind(node)):
            yield source[node.lineno - 1].strip(), kind
    yield from ((line.strip(), "comment") for line in source if line.strip().startswith("# "))


def _kind(node: ast.stmt) -> str:
    """The statement's kind; '' for one that no label names."""
    if isinstance(node, ast.Expr):
        return "call" if isinstance(node.value, ast.Call) else ""
    return KINDS.get(type(node), "")


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "city": Source(CITY, cities, gate=35, tune=35, train=200),
        "script": Source(SCRIPT, characters, gate=36, tune=12, train=240),
        "docstring": Source(DOCSTRING, docstrings, gate=44, tune=14, train=240),
        "line": Source(LINE, lines, gate=32, tune=10, train=240),
        "language": Source(LANGUAGE, words, gate=36, tune=12, train=400),
    }
)
