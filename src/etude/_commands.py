"""What the commands print. ``etude race`` is imported only when it is called: the catalogue must open at once."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import etude
from etude import catalogue
from etude._method import ROOMS
from etude._words import nearest

Record = dict[str, Any]
BadInput: Any = typer.BadParameter.__mro__[2]  # typer's own base of everything a user can mistype

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
_HELP = {"help_option_names": ["-h", "--help"]}
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
Json = Annotated[bool, typer.Option("--json", help="An array of objects, with everything known of each method.")]


def run(args: list[str]) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # formulas need Unicode; where a terminal has none, a ? will do
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return app(args, prog_name="etude", standalone_mode=False) or 0
    except BadInput as wrong:
        said = wrong.format_message()
        print(f"etude: {' '.join(said.split())}" if args else said, file=sys.stderr)  # bare: the help, as it is set
        return 2


def _version(asked: bool) -> None:
    if asked:
        print(f"etude {etude.__version__}")
        raise typer.Exit


@app.callback(context_settings=_HELP)
def etude_(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Every published way to train a network, each tied to its paper, and a race that tells which helps."""


@app.command("list", context_settings=_HELP)
def list_(
    room: Annotated[str, typer.Option(help=f"One of: {', '.join(ROOMS)}.")] = "",
    as_json: Json = False,
) -> None:
    """All methods, or those of one room."""
    if room and room not in ROOMS:
        raise BadInput(f"no room {room!r}; the rooms are {', '.join(ROOMS)}")
    found = [r for r in catalogue.records() if room in ("", r["room"])]
    if as_json:
        return _print_json(found)
    console, wide = _console(cut=True), max((len(r["name"]) for r in found), default=0)
    for i, r in enumerate(found):
        if i == 0 or r["room"] != found[i - 1]["room"]:
            arrow = (getattr(etude, r["room"]).__doc__ or "").strip().partition("\n")[0]
            gap = "\n" if i else ""
            _print_line(console, gap, (r["room"], "bold cyan"), "  ", (_plain(arrow), "dim"))
        _print_row(console, r, r["name"].ljust(wide))
    return None


@app.command("show", context_settings=_HELP)
def show(name: Annotated[str, typer.Argument(help="A method, as adamw or rules.adamw.")]) -> None:
    """One method: formula, paper, knobs, paper tests, relatives."""
    among = catalogue.records()
    try:
        _print_page(catalogue.lookup(name, among), among)
    except ValueError as wrong:
        raise BadInput(str(wrong)) from None


@app.command("find", context_settings=_HELP)
def find(
    words: Annotated[list[str], typer.Argument(help="Words of need, as: loss spikes.")],
    as_json: Json = False,
) -> None:
    """Methods that speak of these words, best first."""
    if not catalogue.tokens(" ".join(words)):
        raise BadInput("give words of need, as: etude find loss spikes")
    among = catalogue.records()
    found = catalogue.find(" ".join(words), among)
    unheard = [w for w in catalogue.tokens(" ".join(words)) if not catalogue.find(w, among)]
    if not found:
        known = catalogue.tokens(" ".join(f"{r['name']} {r['title']} {r['summary']} {r['details']}" for r in among))
        near = "; ".join(f"{w}: {nearest(w, known)}" for w in unheard)
        raise BadInput(f"no method speaks of {' '.join(words)!r}; nearest words: {near or 'none'}")
    if unheard:
        print(f"etude: no method speaks of {', '.join(map(repr, unheard))}", file=sys.stderr)
    if as_json:
        return _print_json(found)
    console, wide = _console(cut=True), max(len(r["room"] + r["name"]) + 1 for r in found)
    for r in found:
        _print_row(console, r, f"{r['room']}.{r['name']}".ljust(wide))
    return None


@app.command("race", add_help_option=False, context_settings=_PASS_ON)
def race(ctx: typer.Context) -> None:
    """Race contenders on a task and say which helps."""
    from etude.race._cli import race_command

    before = ctx.args.index("--") if "--" in ctx.args else len(ctx.args)
    command = ctx.args[before + 1 :] if before < len(ctx.args) else None  # what is raced trains by itself
    raise typer.Exit(_alone(race_command, "race", ctx.args[:before], command))


@app.command("verdict", add_help_option=False, context_settings=_PASS_ON)
def verdict(ctx: typer.Context) -> None:
    """The verdict of a race on a table of runs that etude did not train."""
    from etude.race._cli_verdict import verdict_command

    raise typer.Exit(_alone(verdict_command, "verdict", ctx.args))


@app.command("report", add_help_option=False, context_settings=_PASS_ON)
def report(ctx: typer.Context) -> None:
    """Judge a finished race again and write its report again, also as LaTeX."""
    from etude.race._cli_bundle import report_command

    raise typer.Exit(_alone(report_command, "report", ctx.args))


@app.command("verify", add_help_option=False, context_settings=_PASS_ON)
def verify(ctx: typer.Context) -> None:
    """Run some cells of a finished race again and compare."""
    from etude.race._cli_bundle import verify_command

    raise typer.Exit(_alone(verify_command, "verify", ctx.args))


@app.command("compare", add_help_option=False, context_settings=_PASS_ON)
def compare(ctx: typer.Context) -> None:
    """Two finished races side by side."""
    from etude.race._cli_bundle import compare_command

    raise typer.Exit(_alone(compare_command, "compare", ctx.args))


@app.command("export", add_help_option=False, context_settings=_PASS_ON)
def export(ctx: typer.Context) -> None:
    """The runs of a finished race as CSV or Parquet."""
    from etude.race._cli_bundle import export_command

    raise typer.Exit(_alone(export_command, "export", ctx.args))


@app.command("claims", add_help_option=False, context_settings=_PASS_ON)
def claims(ctx: typer.Context) -> None:
    """What papers claim, as races that anyone can run again."""
    from etude.race._cli_claims import claims_command

    raise typer.Exit(_alone(claims_command, "claims", ctx.args))


def _alone(command: Callable[..., int], name: str, args: list[str], obj: Any = None) -> int:
    """Run a command of the race, which is imported only when it is called."""
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(context_settings=_HELP)(command)
    return alone(args, prog_name=f"etude {name}", standalone_mode=False, obj=obj) or 0


@app.command("branch", add_help_option=False, context_settings=_PASS_ON)
def branch(ctx: typer.Context) -> None:
    """Train up to a branch point, from which a race can go on."""
    from etude.race._cli_branch import branch_command

    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(context_settings=_HELP)(branch_command)
    raise typer.Exit(alone(ctx.args, prog_name="etude branch", standalone_mode=False) or 0)


def _print_json(found: list[Record]) -> None:
    print(json.dumps(found, indent=2, ensure_ascii=False))


def _console(cut: bool) -> Console:
    """A terminal's own width; a pipe gets whole lines where there is one line per method (``cut``)."""
    console = Console(highlight=False, markup=False)
    return Console(highlight=False, markup=False, width=10_000) if cut and not console.is_terminal else console


def _plain(text: str) -> str:
    """A docstring without its reStructuredText."""
    return text.replace("``", "")


def _print_line(console: Console, *parts: str | tuple[str, str]) -> None:
    console.print(Text.assemble(*parts), no_wrap=True, overflow="ellipsis")


def _print_row(console: Console, r: Record, name: str) -> None:
    _print_line(console, "  ", (name, "bold"), f"  {r['year']}  ", _plain(r["summary"]))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _print_page(r: Record, among: list[Record]) -> None:
    console = _console(cut=False)
    width = min(console.width, 120)

    def row(label: str, text: str, style: str = "") -> None:
        for i, line in enumerate(_wrapped(text, width - 11)):
            console.print(Text.assemble((f"{label if i == 0 else '':9}", "dim"), "  ", (line, style)), soft_wrap=True)

    console.print(Text.assemble((f"{r['room']}.{r['name']}", "bold cyan")))
    console.print(*_wrapped(_plain(r["summary"]), width), sep="\n", soft_wrap=True)
    for paragraph in _plain(r["details"]).split("\n\n") if r["details"] else []:
        flows = not re.search(r"^\s", paragraph, re.MULTILINE)  # an indented one is set as it was written
        console.print("", *(_wrapped(paragraph, width) if flows else [paragraph]), sep="\n", soft_wrap=True)
    console.print()
    row("paper", f"{r['authors']} {r['year']}, {r['title']}")
    row("", r["url"], "blue")
    row("use", r["call"])
    row("code", r["source"])
    row("note", _plain(r["note"]))
    row("off", r["off"] or "")
    wide = max((len(k) for k in r["knobs"]), default=0)
    for i, (k, v) in enumerate(r["knobs"].items()):
        row("" if i else "knobs", f"{k.ljust(wide)}  {tuple(v) if isinstance(v, list) else v!r}")
    for i, test in enumerate(r["tests"]):
        file, _, claim = test.partition("::")
        said = claim.removeprefix(f"test_{r['name']}_").replace("_", " ")
        row("" if i else "tests", f"{said}  ({file})")
    for label, names in _relatives(r, among).items():
        row(label, ", ".join(names))


def _relatives(r: Record, among: list[Record]) -> dict[str, list[str]]:
    room = [o for o in among if o["room"] == r["room"] and o["name"] != r["name"]]
    return {
        "parent": [r["parent"]] if r["parent"] else [],
        "children": [o["name"] for o in room if o["parent"] == r["name"]],
        "siblings": [o["name"] for o in room if o["family"] == r["family"]],
    }
