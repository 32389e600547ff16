"""The worked examples of the docs race, each as a user would start it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import etude
from etude.race._cli import race_command

NO_COMMAND = SimpleNamespace(obj=None)

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = sorted(file.stem for file in (DOCS / "examples").glob("*.py"))
STEPS = {"causal_lm": 4}


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_worked_example_races(name, tmp_path):
    if name == "causal_lm":
        pytest.importorskip("transformers")
    result = etude.race(
        str(DOCS / "examples" / f"{name}.py"), ["adamw", "sgd(lr=0.1, momentum=0.9)"], seeds=6,
        steps=STEPS.get(name, 12), folder=tmp_path, quiet=True,
    )  # fmt: skip
    assert result.lock["metric"].startswith("test ")
    assert not [o.reason for o in result.outcomes if o.reason.startswith("raised")]
    assert (result.folder / "report.html").is_file()


@pytest.mark.long
def test_a_task_from_parts_races_on_the_command_line(tmp_path, capsys):
    code = race_command(
        NO_COMMAND, "residual_mlp", ["adamw", "lion"], data=str(DOCS / "examples" / "diabetes.csv"), target="progress", quick=True,
        steps=6, folder=tmp_path,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "squared error" in out
    assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == ["residual_mlp"]


def test_parts_that_are_missing_are_one_line_and_write_nothing(tmp_path, capsys):
    assert (
        race_command(NO_COMMAND, "residual_mlp", ["adamw", "lion"], data="nowhere.csv", target="y", folder=tmp_path)
        == 2
    )
    assert race_command(NO_COMMAND, "digits", ["adamw", "lion"], checkpoint="nowhere.pt", folder=tmp_path) == 2
    assert race_command(NO_COMMAND, "digits", ["adamw", "lion"], target="y", folder=tmp_path) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("etude: ") for line in told] == [True] * 3
    assert not list(tmp_path.iterdir())
