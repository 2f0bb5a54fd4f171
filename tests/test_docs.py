"""Every code block of the documentation runs, what commands name exists, links lead somewhere."""

import inspect
import os
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from importlib import import_module
from unittest import mock

import doc_stand_ins
import matplotlib
import pytest
from doc_pages import PAGES, ROOT, anchors, blocks, prose
from torch import distributed

from dynexec import cli, models

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the source tree")

COMMANDS = [
    pytest.param(line.partition("#")[0], id=f"{block.page}: {line.partition('#')[0].strip()}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "sh"
    for line in block.code.splitlines()
    if line.partition("#")[0].strip()
]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, tmp_path, monkeypatch):
    """In order, in one namespace and an empty folder. A traceback has the lines of the page."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for name, module in doc_stand_ins.packages().items():
        monkeypatch.setitem(sys.modules, name, module)
    with mock.patch.dict(models._MODELS), mock.patch.dict(os.environ):
        try:
            for block in blocks(page):
                if block.language in ("python", "test"):
                    source = "\n" * (block.line - 1) + block.code
                    exec(compile(source, PAGES[page], "exec"), namespace)
        finally:
            mock.patch.stopall()
            if distributed.is_initialized():
                distributed.destroy_process_group()


def test_every_block_has_a_language():
    """So that none is left out by a missing word, or is no block to the tests: text is "text"."""
    for page, path in PAGES.items():
        found = {str(block): block.language for block in blocks(page)}
        assert set(found.values()) <= {"python", "sh", "text", "test"}, found
        fences = re.findall(r"^ *```", path.read_text(), re.MULTILINE)
        comments = path.read_text().count("<!-- test")
        assert len(fences) == 2 * (len(found) - comments), page


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command):
    program, *words = shlex.split(command)
    if program == "torchrun":
        words = words[next(number for number, word in enumerate(words) if word.endswith(".py")) :]
        program = "python"
    if program == "python" and words[0] != "-m":
        check_script(*words)
    elif program == "dynexec":
        check_subcommand(*words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "bash":
        assert (ROOT / words[0]).is_file()
    elif (program, words[0]) == ("pip", "install"):
        check_extras(words[1:])
    else:
        raise AssertionError(f"no test knows the command {command!r}: add one")


class Parsed(Exception):
    """The script took its arguments."""


def check_script(script, *words):
    """The script exists and its own parser takes the arguments; it is stopped behind that."""
    path = ROOT / script
    if not words and "argparse" not in path.read_text():
        return
    own = ArgumentParser.parse_args

    def parse(parser, *given, **options):
        own(parser, *given, **options)
        raise Parsed

    changes = mock.patch.object(ArgumentParser, "parse_args", parse), mock.patch.object(sys, "argv", [script, *words])
    with changes[0], changes[1], mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def check_subcommand(command, *words):
    parser = ArgumentParser()
    import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    parser.parse_args(words)


def check_extras(words):
    named = {extra for word in words for extras in re.findall(r"\[(.*)\]", word) for extra in extras.split(",")}
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert named <= set(re.findall(r"^([\w-]+) *=", extras, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative ones: the file is there, and so is the heading."""
    broken = []
    for link in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = PAGES[page].parent / name if name else PAGES[page]
        known = target.resolve().relative_to(ROOT).as_posix()
        if not target.exists() or (anchor and anchor not in anchors(known)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\(([\w.-]+)(?:#[^)]*)?\)", prose("docs/README.md"))
    pages = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert pages - {"README.md"} == {link for link in linked if link.endswith(".md")} - {"../README.md"}


@pytest.fixture
def api(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module("api")


def test_api_page_is_that_of_the_docstrings(api):
    assert api.api_page() == api.PATH.read_text(), "run python bench/api.py"


def test_every_argument_is_described(api):
    """Of what users call: among the parameters; in the text where that has no such list."""
    missing = []
    for module, names in api.EXPORTS.items():
        for name in names:
            thing = getattr(module, name)
            members = [inspect.getattr_static(thing, member) for member in api.MEMBERS.get(name, ())]
            members = [getattr(member, "fget", getattr(member, "__func__", member)) for member in members]
            for function in (*([] if name in api.NOT_BUILT else [thing]), *members):
                text = inspect.getdoc(function) or ""
                described = described_names(text)
                for reference in re.findall(r"rguments[^.]* as in :func:`(\w+)`", text):
                    described |= described_names(inspect.getdoc(getattr(module, reference)))
                arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
                missing += [(name, function.__name__, argument) for argument in arguments - described]
                missing += [(name, function.__name__)] * (not text)
    assert not missing


def described_names(docstring):
    parts = re.split(r"^(\w+)\n-{3,}\n", docstring, flags=re.MULTILINE)
    lists = [body for title, body in zip(parts[1::2], parts[2::2]) if title in ("Parameters", "Attributes")]
    if not lists:
        return set(re.findall(r"\w+", docstring))
    entries = [line.partition(" : ")[0] for body in lists for line in body.splitlines() if line[:1].strip()]
    return {name for entry in entries for name in re.findall(r"\w+", entry)}
