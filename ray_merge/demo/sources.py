"""Labelled text that installed packages carry: where every row of the demo's four tasks comes from.

Owns: reading that text and giving each row a label and a group (rows of one group never part over splits).
Never does: choosing splits, writing files, importing the packages whose sources it reads (ast only), the net.

| task          | label                           | read from                            | licence of the text        |
|---------------|---------------------------------|--------------------------------------|----------------------------|
| docstring     | library of a docstring, 6       | sources of torch, numpy, pyarrow,    | BSD-3 (torch, numpy), PSF, |
|               |                                 | ray, transformers, standard library  | Apache-2.0 (other three)   |
| described     | does it describe this name, 2   | the same docstrings, names beside    | the same                   |
| name_language | language of a name, 10          | Babel's copy of CLDR                 | Unicode-3.0                |
| valence       | mean rating of a word, -4 to 4  | vaderSentiment's lexicon, ten raters | MIT                        |

What is arguable about each of them stands in the docstring of its function.
The text stays on the machine that has the packages; the repository holds none of it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ray_merge.errors import Refusal

LIBRARIES = ("torch", "numpy", "pyarrow", "ray", "transformers", "stdlib")
LANGUAGES = ("de", "en", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv")
DATA_PACKAGES = ("torch", "numpy", "pyarrow", "ray", "transformers", "babel", "vaderSentiment")
"""Distributions whose version changes the text (the interpreter's own version does too)."""

_LEAKS = re.compile(
    r"\b(py)?torch\w*|\bnumpy\w*|\bnp\b|\bndarrays?\b|\b(py)?arrow\w*|\bpa\b|\bray\w*|\brllib\w*"
    r"|\btransformers?\b|\bhugging ?face\w*|\bhf\b|\bc?python\w*|\bstdlib\b|\baten\b",
    re.IGNORECASE,
)
_SECTION = re.compile(
    r"(?:^|\s)(?:Args|Arguments|Parameters|Attributes|Returns|Raises|Examples?)\b\s*:?\s|:param\b"
)
_MARKUP = re.compile(r":[\w:]+:(?=`)|[`*\\~]|\]\([^)]*\)|[\[\]]")
_CYTHON = (".pyx", ".pxi")
_CYTHON_DOC = re.compile(r'(?:def|class) (?:[\w.]+ )*(\w+)\b[^"]*?:\n\s+r?"""(.*?)"""', re.DOTALL)
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NOT_PROSE = re.compile(r">>>|defaults to|https?:")
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "thirdparty_files", "_vendor", "tests", "test"}
)
_ROWS_PER_LIBRARY = 800
_ROWS_PER_FILE = 25


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One labelled text or pair; `group` names what must stay within one split."""

    text: str
    label: float
    group: str
    text_b: str = ""


def require(module: str) -> Path:
    """The folder of an installed module, found without importing it.

    Raises:
        Refusal: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise Refusal(f"the demo needs the package {module}: pip install 'ray-merge[demo]'")
    return Path(spec.origin).parent


def version(distribution: str) -> str:
    """The installed version of a distribution.

    Raises:
        Refusal: it is not installed.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        message = f"the demo needs the package {distribution}: pip install 'ray-merge[demo]'"
        raise Refusal(message) from None


def ordered(seed: str, text: str) -> str:
    """A key that puts texts in an order which looks random and is the same everywhere."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def docstring_rows() -> list[Row]:
    """First paragraphs of docstrings, labelled by library; a group is one source file.

    Library names and their usual short forms are taken out, and only the prose of the first paragraph is
    kept, so that neither the name nor the layout of the parameter section gives the library away. Arguable:
    topic words do (`dispatch key`, `replica`, `tokenizer`), which is the task; rows change with versions.
    """
    return [Row(doc.text, LIBRARIES.index(doc.library), doc.group) for doc in _all_docs()]


def described_rows() -> list[Row]:
    """Pairs of a docstring and a name: label 1 when the docstring describes that function or class, else 0.

    The wrong name is another one of the same file, so the topic does not tell; every docstring is used once,
    and a group is one source file. Arguable: words that name and docstring share are a strong hint, and a
    wrong name of the same file may fit nearly as well as the right one.
    """
    by_file: dict[str, list[_Doc]] = defaultdict(list)
    for doc in _all_docs():
        if len(doc.name.split()) >= 2:
            by_file[doc.group].append(doc)
    rows = []
    for group, docs in by_file.items():
        for here, doc in enumerate(docs):
            others = [other.name for other in (*docs[here + 1 :], *docs[:here]) if other.name != doc.name]
            is_right = int(ordered("described", doc.text)[0], 16) % 2 == 1
            if is_right or others:
                rows.append(Row(doc.text, float(is_right), group, doc.name if is_right else others[0]))
    return rows


@dataclass(frozen=True, slots=True)
class _Doc:
    """The first paragraph of one docstring, with the name it describes in words (empty for a module)."""

    library: str
    group: str
    name: str
    text: str


@lru_cache(maxsize=1)
def _all_docs() -> tuple[_Doc, ...]:
    """Read once for both tasks: parsing takes four seconds."""
    found: dict[str, _Doc] = {}
    for library in LIBRARIES:
        root = Path(sysconfig.get_path("stdlib")) if library == "stdlib" else require(library)
        before = len(found)
        for path in _sources(root):
            group = f"{library}/{path.relative_to(root).as_posix()}"
            pairs = sorted(_paragraphs(path), key=lambda pair: ordered("docstring", pair[1]))
            for name, text in pairs[:_ROWS_PER_FILE]:
                found.setdefault(text.lower(), _Doc(library, group, name, text))
            if len(found) - before >= _ROWS_PER_LIBRARY:
                break
    return tuple(found.values())


def _sources(root: Path) -> list[Path]:
    """All source files below `root` in hash order; skipped folders are not entered (site-packages is large)."""
    kept: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in files if name.endswith((".py", *_CYTHON))]
        kept += ((ordered("file", path.relative_to(root).as_posix()), path) for path in paths)
    return [path for _, path in sorted(kept)]


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    """Names in words and first paragraphs of all docstrings of one file, without library names and markup."""
    try:
        docs = _docstrings(path.read_text(encoding="utf-8"), cython=path.suffix in _CYTHON)
    except (SyntaxError, ValueError, OSError):
        return  # a template or another Python's syntax: the next file serves as well
    for name, doc in docs:
        text = _SECTION.split(doc.strip().split("\n\n")[0])[0]
        text = " ".join(without_leaks(_MARKUP.sub(" ", text)).split())
        if 5 <= len(text.split()) <= 60 and text.isascii() and not _NOT_PROSE.search(text):
            yield " ".join(without_leaks(_HUMP.sub(" ", name)).lower().split()), text


def _docstrings(source: str, *, cython: bool) -> list[tuple[str, str]]:
    if cython:  # most of pyarrow is Cython, which ast does not read
        return _CYTHON_DOC.findall(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        tree = ast.parse(source)
    found = ((getattr(node, "name", ""), ast.get_docstring(node)) for node in _definitions(tree))
    return [(name, doc) for name, doc in found if doc]


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: _Definition) -> Iterator[_Definition]:
    """The module and the definitions nested in it; `ast.walk` would visit every expression too."""
    yield node
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _definitions(child)


def without_leaks(text: str) -> str:
    """`text` without the names of the libraries and their usual short forms."""
    return _LEAKS.sub(" ", text.replace("_", " "))


def name_language_rows() -> list[Row]:
    """Names of languages, scripts, territories, currencies and cities in ten languages of Latin script.

    A group is one concept (`territory FR`), so no concept is learned in one language and asked in another.
    Names that two of the ten languages share are left out. Arguable: many names are transliterations of
    proper names, so a few cannot be told apart by anyone; the tokenizer also drops all accents.
    """
    require("babel")
    from babel import Locale

    rows_by_name: dict[str, list[Row]] = defaultdict(list)
    for label, language in enumerate(LANGUAGES):
        locale = Locale(language)
        tables: list[tuple[str, Iterable[tuple[str, str]]]] = [
            ("language", locale.languages.items()),
            ("script", locale.scripts.items()),
            ("territory", locale.territories.items()),
            ("currency", locale.currencies.items()),
            ("city", ((zone, names.get("city", "")) for zone, names in locale.time_zones.items())),
        ]
        for kind, table in tables:
            for code, name in table:
                if len(name) > 3 and name != code:
                    rows_by_name[name.lower()].append(Row(name.lower(), label, f"{kind} {code}"))
    return [min(same) for same in rows_by_name.values() if len({row.label for row in same}) == 1]


def valence_rows() -> list[Row]:
    """Words of vaderSentiment's lexicon with the mean of ten human ratings, from -4 to 4.

    A group is a crude stem, so that `abandon` and `abandoned` stay in one split and the task is about words
    the adapter never saw. Arguable: ten raters, and the ratings were collected for short social-media text.
    """
    lines = (require("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    ratings = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines)}
    words = {word for word in ratings if re.fullmatch("[a-z]{3,}", word)}
    return [Row(word, ratings[word], _stem(word, words)) for word in sorted(words)]


def _stem(word: str, words: set[str]) -> str:
    """A group for inflections; too coarse is harmless, too fine would leak (`love`, `loving` -> `lov`)."""
    if word[:3] in words:
        return word[:3]
    stem = word[:4].rstrip("eiy")
    return stem if len(stem) >= 3 else word[:4]
