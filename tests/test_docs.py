"""Every code block runs: a file's python blocks one after another, each ``$ etude …`` line to exit code 0.

``<!-- long -->`` on the line before a block sends it to the tests marked long.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import HIGHLIGHTS, RESULTS, sections, shown
from etude import recipes
from etude.catalogue._choose import written

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- long -->\n)?```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KNOWN = re.compile(r"^```(\w*)$", re.MULTILINE)


def blocks(page, language):
    """(line number, text, whether it is long)."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found[2] == language:
            yield text.count("\n", 0, found.start(3)) + 1, found[3], bool(found[1])


def commands():
    for page in PAGES:
        for line, text, long in blocks(page, "console"):
            for asked in re.findall(r"^\$ (etude .*)$", text, re.MULTILINE):
                marks = [pytest.mark.long] if long else []
                yield pytest.param(asked, marks=marks, id=f"{page.name}:{line} {asked}")


def pages():
    for page in PAGES:
        found = list(blocks(page, "python"))
        if found:
            marks = [pytest.mark.long] if any(long for _, _, long in found) else []
            yield pytest.param(page, found, marks=marks, id=page.name)


@pytest.mark.parametrize("page, found", [*pages()])
def test_python_blocks_run(page, found, tmp_path):
    """In a process of its own: one namespace per file, and an error points at the page's own line."""
    padded, written = [], 0
    for line, text, _ in found:
        padded.append("\n" * (line - 1 - written) + text)
        written = line - 1 + text.count("\n")
    (tmp_path / page.name).write_text("".join(padded), encoding="utf-8")
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, str(tmp_path / page.name)], cwd=tmp_path / "run", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", [*commands()])
def test_commands_run(asked, tmp_path):
    """As if in the checkout, but with a folder of its own to write into."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    program = [sys.executable, "-c", "from etude.cli import main; main()"]
    done = subprocess.run(
        [*program, *shlex.split(asked, comments=True)[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_block_escapes(page):
    """A fence this file does not read (``pycon``, ``py``) would go stale unseen; ``text`` and ``bash`` are prose."""
    fences = KNOWN.findall(page.read_text(encoding="utf-8"))
    assert set(fences[::2]) <= {"python", "console", "bash", "text"}
    assert set(fences[1::2]) <= {""}


def test_the_readme_tells_which_optimizer_as_the_catalogue_does():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written(page) == page, "run: make docs"


def test_the_readme_shows_what_was_measured():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert shown(page, sections(RESULTS.read_text(encoding="utf-8"))) == page
    rows = re.findall(r"^\| .* \| \d+\.\d\d \| .* \| \d+\.\d\d \|$", page, re.MULTILINE)
    assert len(rows) == sum(map(len, HIGHLIGHTS.values()))


def test_every_contender_the_readme_names_is_one():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^etude race (.*)$", page, re.MULTILINE)]
    assert lines
    for task, *words in lines:
        named = itertools.takewhile(
            lambda word: not word.startswith("--"), words if "--" not in words else [task, *words]
        )
        assert all(recipes.parse(contender).rule for contender in named)
