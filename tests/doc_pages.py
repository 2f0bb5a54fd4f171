"""Reads what of a Markdown page can be tested: code blocks, Python that only the tests run, links, anchors.

Between its blocks stand HTML comments, which no rendered page shows: ``<!-- test``, lines of Python, ``-->``. They run
in their place, in the namespace of the page. They stand in for what a block needs and the tests do not have (photos,
trained networks), check what a page says of a block, and skip the rest of a page that needs a package
(``pytest.importorskip``).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("README.md"), *sorted(ROOT.glob("docs/*.md")))}

_PART = re.compile(
    r"^ *<!-- test\n(?P<test>.*?)^ *-->$"
    r"|^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block, of language "python", "sh", ... or "", or of language "test" what only the tests run."""

    page: str
    line: int  # of the first line of code
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    """All blocks of a page, in order."""
    text = PAGES[page].read_text()
    found = []
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 2
        if part["test"] is not None:
            found.append(Block(page, line, "test", dedent(part["test"])))
        else:
            found.append(Block(page, line, part["language"], dedent(part["code"])))
    return found


def prose(page):
    """The text of a page without its blocks and comments, code in backticks left empty."""
    text = re.sub(r"<!--.*?-->", "", _PART.sub("", PAGES[page].read_text()), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "``", text)


def anchors(page):
    """What can follow ``#`` in a link to the page: GitHub's names of its headings."""
    text = _PART.sub("", PAGES[page].read_text())
    names, found = [], []
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
        found.append(f"{name}-{names.count(name)}" if name in names else name)
        names.append(name)
    return found
