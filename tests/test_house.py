"""The house: floors, exports, size, citations, and a paper test for every method. All of it is read from the code."""

import ast
import importlib
import re
import shutil
from pathlib import Path

import pytest

import etude
from etude import catalogue
from etude._method import ROOMS, methods

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "etude"
RECORDS = catalogue.records()
FLOORS = {"recipes": 2, "step": 2, "race": 3, "doctor": 3, "catalogue": 4, "cli": 4, "_commands": 4, "__init__": 5}
FLOORS |= {room: 1 for room in ROOMS if room != "recipes"}  # every other module is floor 0

# What may be imported inside a function: the extras, which `import etude` must not need, and what stands behind them.
EXTRAS = {
    "datasets", "jinja2", "numpy", "optuna", "pyarrow", "pynvml", "ray", "rich", "safetensors", "scipy", "sklearn",
    "submitit", "transformers", "typer", "vl_convert",
}  # fmt: skip
EDGES = {
    ("cli.py", "etude._commands"),
    ("_commands.py", "etude.race._cli"),
    ("_commands.py", "etude.race._cli_branch"),
    ("_commands.py", "etude.race._cli_verdict"),
}
EXTRAS |= {"mlflow", "tensorboard", "wandb"}
EDGES |= {("_commands.py", f"etude.race._cli_{name}") for name in ("bundle", "claims")}


def place(module):
    """etude.norms.named → norms; etude._method → _method; etude → __init__."""
    return (module.split(".") + ["__init__"])[1]


def imports(file, src):
    """(module, whether it stands inside a function) for each import; ``from x import y`` is x.y where y is a module."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                path = src.parent / whole.replace(".", "/")
                yield (whole if path.is_dir() or path.with_suffix(".py").is_file() else node.module), node in inside


def uphill(src):
    """Every import that does not run downhill, as a sentence."""
    for file in sorted(src.rglob("*.py")):
        here = file.relative_to(src).parts[0].removesuffix(".py")
        for module, _ in imports(file, src):
            there = place(module)
            if module.split(".")[0] != "etude" or there == here:
                continue
            mine, its = FLOORS.get(here, 0), FLOORS.get(there, 0)
            edge = (file.relative_to(src).as_posix(), module) in EDGES or (there == "__init__" and mine >= 3)
            if not edge and (its > mine or its == mine == 1):
                yield f"{file.relative_to(src)}: {here} (floor {mine}) may not import {there} (floor {its})"


def test_imports_run_downhill():
    assert list(uphill(SRC)) == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("rules/gate.py", "from etude.norms import layer_norm"),
        ("rules/gate.py", "from etude import norms"),
        ("rules/gate.py", "import etude.recipes"),
        ("_method.py", "from etude.rules import adamw"),
        ("recipes/__init__.py", "import etude.race"),
        ("norms/__init__.py", "import etude"),
    ],
)
def test_a_planted_uphill_import_is_seen(tmp_path, file, line):
    src = shutil.copytree(SRC, tmp_path / "etude", ignore=shutil.ignore_patterns("__pycache__"))
    with (src / file).open("a", encoding="utf-8") as f:
        f.write(f"\n{line}\n")
    assert len({*uphill(src)} - {*uphill(SRC)}) == 1


def test_imports_inside_functions_are_extras_only():
    hidden = [
        f"{file.relative_to(SRC)}: {module}"
        for file in SRC.rglob("*.py")
        for module, inside in imports(file, SRC)
        if inside and module.split(".")[0] not in EXTRAS and (file.relative_to(SRC).as_posix(), module) not in EDGES
    ]
    assert hidden == []


def test_no_import_cycle():
    needs = {}
    for file in SRC.rglob("*.py"):
        parts = ("etude", *file.relative_to(SRC).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        needs[name] = {m for m, inside in imports(file, SRC) if m.split(".")[0] == "etude" and not inside} - {name}
    while leaves := {n for n, ms in needs.items() if not ms & needs.keys()}:
        needs = {n: ms for n, ms in needs.items() if n not in leaves}
    assert not needs, f"these modules import each other, or stand above those that do: {sorted(needs)}"


def test_the_registry_finds_every_decorated_method():
    """Counted in the text: a `@method(` that no import reaches would be in no list, no test and no page."""
    written = sum(len(re.findall(r"^@method\(", f.read_text(encoding="utf-8"), re.M)) for f in SRC.glob("*/*.py"))
    assert written == len(methods())
    assert {room for room, _ in methods()} <= set(ROOMS)
    assert [r["room"] for r in RECORDS] == sorted((r["room"] for r in RECORDS), key=ROOMS.index)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_what_it_says_and_all_its_methods(room):
    package = importlib.import_module(f"etude.{room}")
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    unlisted = [name for place, name in methods() if place == room and name not in package.__all__]
    other = [m.name for m in methods().values() if m.room == room and getattr(package, m.name, None) is not m.fn]
    assert (missing, unlisted, other) == ([], [], [])
    assert list(package.__all__) == sorted(set(package.__all__), key=package.__all__.index), "a name twice"
    assert (package.__doc__ or "").strip(), "the first line of its docstring is the room's arrow"


def test_etude_exports_what_it_says():
    assert set(ROOMS) <= set(etude.__all__)
    assert all(hasattr(etude, name) for name in etude.__all__)


@pytest.mark.parametrize("r", RECORDS, ids=lambda r: f"{r['room']}.{r['name']}")
def test_a_method_keeps_the_house_rules(r):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", r["name"]), "snake_case"
    assert len(r["knobs"]) <= 6, "the seventh knob asks for a part"
    assert r["summary"].rstrip().endswith("."), "the docstring begins with one sentence"
    assert r["title"].strip(" ,") == r["title"]
    assert len(r["title"]) > 5
    assert 1800 <= r["year"] <= 2100
    arxiv = r["url"].removeprefix("https://arxiv.org/abs/")
    ids = r"(0[7-9]|1[0-4])\d\d\.\d{4}|(1[5-9]|[2-9]\d)\d\d\.\d{5}|[a-z-]+(\.[A-Z]{2})?/\d{7}"  # five digits since 2015
    assert arxiv == r["url"] or re.fullmatch(ids, arxiv), r["url"]
    assert re.match(r"https?://[\w.-]+\.\w+/\S+$", r["url"])
    assert r["tests"], f"write tests/papers/test_{r['room']}_{r['family']}.py::test_{r['name']}_<what the paper says>"


def test_every_paper_test_belongs_to_a_method():
    written = [t for tests in catalogue._tests.scan(ROOT / "tests" / "papers").values() for t in tests]
    claimed = {t for r in RECORDS for t in r["tests"]}
    assert [t for t in written if t not in claimed] == []


def ours():
    for folder in ("src", "tests", "benchmarks", "docs", ".ci"):
        for suffix in ("py", "md", "toml", "html", "css", "sh"):
            yield from (ROOT / folder).rglob(f"*.{suffix}")
    yield from (f for f in ROOT.iterdir() if f.is_file() and f.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ""})


def test_files_are_short():
    long = {f.name: n for f in SRC.rglob("*.py") if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"above 400 lines a file is two families: {long}"


def test_nothing_names_a_path_of_one_machine():
    path = re.compile(r"(?<![\w.~])/(?:work|home|root|Users|mnt|tmp)/\w|\b[A-Z]:\\\\?Users")
    found = [f"{f.relative_to(ROOT)}: {hit[0]}" for f in ours() for hit in path.finditer(f.read_text(encoding="utf-8"))]
    assert found == []
