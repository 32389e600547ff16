"""The commands: what they print, at which width, and how they refuse."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from etude import _commands, catalogue
from etude._method import ROOMS

RECORDS = catalogue.records()
ETUDE = [sys.executable, "-c", "from etude.cli import main; main()"]


def command(*args, **env):
    """The real program, in a process of its own."""
    return subprocess.run([*ETUDE, *args], capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def prints(*args, width=80):
    """The same command in this process."""
    result = CliRunner(env={"COLUMNS": str(width), "TERM": "dumb"}).invoke(_commands.app, list(args))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_json_is_every_record():
    assert json.loads(prints("list", "--json")) == RECORDS
    assert json.loads(prints("list", "--room", "norms", "--json")) == [r for r in RECORDS if r["room"] == "norms"]


def test_list_names_every_method_under_its_room():
    lines = prints("list").splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [r["name"] for r in RECORDS]
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")] == [
        room for room in ROOMS if any(r["room"] == room for r in RECORDS)
    ]
    assert all(line == line.rstrip() for line in lines), "no padding: what is copied is what is seen"
    assert not any("\x1b" in line for line in lines), "a pipe gets no colours"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_lines_that_fit(width, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    plain = re.sub(r"\x1b\[[\d;]*m", "", prints("list", width=width))
    assert max(map(cell_len, plain.splitlines())) <= width
    for r in RECORDS:
        page = re.sub(r"\x1b\[[\d;]*m", "", prints("show", f"{r['room']}.{r['name']}", width=width))
        wide = [line for line in page.splitlines() if cell_len(line) > width]
        assert not [line for line in wide if not re.fullmatch(r"\s*\S+|.*(https?://|tests/)\S+\)?", line)], wide


@pytest.mark.parametrize("r", RECORDS, ids=lambda r: f"{r['room']}.{r['name']}")
def test_show_tells_all(r):
    said = " ".join(prints("show", f"{r['room']}.{r['name']}", width=120).split())
    for told in (r["summary"], r["details"], r["title"], r["url"], r["source"], r["off"] or "", r["note"], *r["knobs"]):
        assert " ".join(told.replace("``", "").split()) in said
    for test in r["tests"]:
        assert test.partition("::")[0] in said


def test_show_draws_the_family():
    lion, signum = prints("show", "lion"), prints("show", "signum")
    assert re.search(r"^parent +signum$", lion, re.M)
    assert re.search(r"^children +.*lion", signum, re.M)
    assert re.search(r"^siblings +.*lion", prints("show", "adamw"), re.M)


def test_find_prints_the_best_first():
    found = [line.split()[0] for line in prints("find", "sharpness").splitlines()]
    assert found == [f"{r['room']}.{r['name']}" for r in catalogue.find("sharpness")]
    assert json.loads(prints("find", "sharpness", "--json")) == catalogue.find("sharpness")


def test_without_a_command_it_prints_the_help_as_it_is_set():
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == command("--help").stdout.strip()
    assert len(done.stderr.splitlines()) > 10


def test_version_and_help():
    assert prints("--version") == f"etude {version('etude')}\n"
    assert all(name in prints("--help") for name in ("list", "show", "find", "race"))


@pytest.mark.parametrize(
    "args, says",
    [
        (["show", "adamww"], r"no method 'adamww'; nearest: adamw, .*; `etude list` shows all \d+"),
        (["list", "--room", "norm"], r"no room 'norm'; the rooms are init, weights, norms, .*"),
        (["find", "xylophone"], r"no method speaks of 'xylophone'; nearest words: xylophone: .*"),
        (["find", ""], "give words of need, as: etude find loss spikes"),
        (["find", "of", "the"], "give words of need, as: etude find loss spikes"),
        (["lst"], r"No such command 'lst'.*list.*"),
        (["list", "--jsn"], r"No such option: --jsn.*--json.*"),
        (["show"], r"Missing argument '(name|NAME)'\."),
        (["race", "no_such_task", "adamw", "lion"], r".*no_such_task.*digits.*"),
        (["race", "digits", "adamw", "lionn"], r".*lionn.*lion.*"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(args, says, tmp_path):
    done = subprocess.run([*ETUDE, *args], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"etude: {says}\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra, args", [("typer", "list"), ("rich", "list"), ("scipy", "race digits adamw lion")])
def test_a_missing_extra_is_one_line(extra, args, tmp_path):
    hide = f"import sys; sys.modules[{extra!r}] = None; from etude.cli import main; main()"
    asked = [sys.executable, "-c", hide, *args.split()]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf'etude: .*{extra}.* pip install "etude\[race\]"\n', done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_listing_does_not_load_the_race():
    code = (
        "import sys; from etude.cli import main; sys.argv = ['etude', 'list', '--room', 'norms']\n"
        "try: main()\nexcept SystemExit: print([m for m in sys.modules if m.startswith(('scipy', 'etude.race'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("args", [["list", "--json"], ["--version"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(args):
    """As in `etude list | head`: no traceback, whether the pipe breaks while printing or at the end."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen([*ETUDE, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as run:
        run.stdout.close()
        assert run.stderr.read() == b""


def test_a_terminal_without_unicode_is_no_error():
    done = command("list", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "layer_norm" in done.stdout


def test_no_color(monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    colours = re.compile(r"\x1b\[[\d;]*3[0-7]m")
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": ""})
    assert colours.search(runner.invoke(_commands.app, ["list"]).stdout)
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "xterm-256color", "NO_COLOR": "1"})
    assert not colours.search(runner.invoke(_commands.app, ["list"]).stdout)


def test_the_console_script_is_main():
    scripts = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'etude = "etude.cli:main"' in scripts
