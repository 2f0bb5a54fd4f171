"""Reads what of a Markdown page can be tested: code blocks, Python that only the tests run, links, anchors.

Two HTML comments, which no rendered page shows, stand between the blocks of a page:

* ``<!-- test``, lines of Python, ``-->``: run in their place, in the namespace of the page. They stand in for what a block
  needs and the tests do not have (photos, trained networks, other packages), and check what a page says of a block.
* ``<!-- not run: REASON -->``: the next block is not run, and reported as skipped.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}

_PART = re.compile(
    r"^<!-- test\n(?P<test>.*?)^-->$"
    r"|^<!-- not run: (?P<reason>[^\n]+) -->$"
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
    not_run: str | None = None

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    """All blocks of a page, in order."""
    text = PAGES[page].read_text()
    found, reason = [], None
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 2
        if part["reason"] is not None:
            reason = part["reason"]
        elif part["test"] is not None:
            found.append(Block(page, line, "test", part["test"]))
        else:
            found.append(Block(page, line, part["language"], dedent(part["code"]), reason))
            reason = None
    if reason is not None:
        raise ValueError(f"{page}: no block follows 'not run: {reason}'")
    return found


def prose(page):
    """The text of a page without its blocks and comments, code in backticks left empty."""
    text = re.sub(r"<!--.*?-->", "", _PART.sub("", PAGES[page].read_text()), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "``", text)


def anchors(page):
    """What can follow ``#`` in a link to the page: GitHub's names of its headings."""
    text = _PART.sub("", PAGES[page].read_text())
    found = []
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return found
