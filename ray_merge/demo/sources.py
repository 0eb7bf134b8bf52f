"""Labelled text that installed packages carry: where every row of the demo's four tasks comes from.

Owns: reading that text and giving each row a label and a group (rows of one group never part over splits).
Never does: choosing splits, writing files, importing the packages whose sources it reads (ast only), the net.

| task          | label                           | read from                            | licence of the text        |
|---------------|---------------------------------|--------------------------------------|----------------------------|
| docstring     | library of a docstring, 6       | sources of torch, numpy, pyarrow,    | BSD-3 (torch, numpy), PSF, |
|               |                                 | ray, transformers, standard library  | Apache-2.0 (other three)   |
| name_language | language of a name, 10          | Babel's copy of CLDR                 | Unicode-3.0                |
| name_kind     | kind of thing a name is, 4      | pycountry's copy of Debian iso-codes | LGPL-2.1                   |
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
from pathlib import Path

from ray_merge.errors import Refusal

LIBRARIES = ("torch", "numpy", "pyarrow", "ray", "transformers", "stdlib")
LANGUAGES = ("de", "en", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv")
KINDS = ("country", "subdivision", "currency", "language")
DATA_PACKAGES = ("torch", "numpy", "pyarrow", "ray", "transformers", "babel", "pycountry", "vaderSentiment")
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
_CYTHON_DOC = re.compile(r'(?:def|class) [^"]*?:\n\s+r?"""(.*?)"""', re.DOTALL)
_NOT_PROSE = re.compile(r">>>|defaults to|https?:")
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "thirdparty_files", "_vendor", "tests", "test"}
)
_ROWS_PER_LIBRARY = 800
_ROWS_PER_FILE = 25


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """One labelled text; `group` names what must stay within one split."""

    text: str
    label: float
    group: str


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

    Library names and their usual short forms are taken out, and only the first paragraph is kept, so that
    neither the name nor the layout of the parameter section gives the library away. Arguable: topic words do
    (`dispatch key`, `replica`, `tokenizer`), which is the task, and rows change with the packages' versions.
    """
    rows = []
    for label, library in enumerate(LIBRARIES):
        root = Path(sysconfig.get_path("stdlib")) if library == "stdlib" else require(library)
        found: list[Row] = []
        for path in _sources(root):
            name = path.relative_to(root).as_posix()
            texts = sorted(_paragraphs(path), key=lambda text: ordered("docstring", text))[:_ROWS_PER_FILE]
            found += (Row(text, label, f"{library}/{name}") for text in texts)
            if len(found) >= _ROWS_PER_LIBRARY:
                break
        rows += found[:_ROWS_PER_LIBRARY]
    return rows


def _sources(root: Path) -> list[Path]:
    """All source files below `root` in hash order; skipped folders are not entered (site-packages is large)."""
    kept = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths = [Path(folder, name) for name in files if name.endswith((".py", *_CYTHON))]
        kept += ((ordered("file", path.relative_to(root).as_posix()), path) for path in paths)
    return [path for _, path in sorted(kept)]


def _paragraphs(path: Path) -> Iterator[str]:
    """First paragraphs of all docstrings of one file, without library names and markup; 5 to 60 words each."""
    try:
        docs = _docstrings(path.read_text(encoding="utf-8"), cython=path.suffix in _CYTHON)
    except (SyntaxError, ValueError, OSError):
        return  # a template or another Python's syntax: the next file serves as well
    for doc in docs:
        text = _SECTION.split(doc.strip().split("\n\n")[0])[0]
        text = " ".join(without_leaks(_MARKUP.sub(" ", text)).split())
        if 5 <= len(text.split()) <= 60 and text.isascii() and not _NOT_PROSE.search(text):
            yield text


def _docstrings(source: str, *, cython: bool) -> list[str]:
    if cython:  # most of pyarrow is Cython, which ast does not read
        return _CYTHON_DOC.findall(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        tree = ast.parse(source)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [doc for doc in docs if doc]


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


def name_kind_rows() -> list[Row]:
    """English names of ISO standards, labelled by the standard: what kind of thing the name is.

    A group is one code (a country's short and official name stay together). Names that are of two kinds are
    left out, and so are names that say their kind (`... language`, `... province`). Arguable: some currency
    names are giveaways (`dollar`), many rare names can only be told by their looks, and the classes are
    uneven, because there are few countries and currencies.
    """
    require("pycountry")
    import pycountry

    tables = (pycountry.countries, pycountry.subdivisions, pycountry.currencies, pycountry.languages)
    rows_by_name: dict[str, list[Row]] = defaultdict(list)
    for label, (kind, table) in enumerate(zip(KINDS, tables, strict=True)):
        for entry in table:
            fields = ("name", "official_name", "common_name") if kind == "country" else ("name",)
            code = next(str(getattr(entry, key)) for key in ("code", "alpha_3") if hasattr(entry, key))
            for name in (getattr(entry, field, None) for field in fields):
                if name and len(name) > 2 and not _SAYS_KIND.search(name):
                    rows_by_name[name.lower()].append(Row(name.lower(), label, f"{kind} {code}"))
    return [min(same) for same in rows_by_name.values() if len({row.label for row in same}) == 1]


_SAYS_KIND = re.compile(
    r"\b(languages?|scripts?|country|currency|province|state|code|reserved)\b", re.IGNORECASE
)


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
