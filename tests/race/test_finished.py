"""The verdict on a table of runs that etude did not train is the verdict of a race."""

import csv
import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from scipy import stats

from etude.race import InputError
from etude.race.finished import read_runs, verdict

SEEDS = range(10)


def rows(gap=-0.1, noise=0.03):
    draw = random.Random(2)
    found = []
    for seed in SEEDS:
        base = draw.gauss(1, 0.1)
        for name, shift in (("adamw", 0.0), ("muon", gap), ("lion", 0.0)):
            found.append({"optimizer": name, "seed": seed, "val_loss": base + shift + draw.gauss(0, noise)})
    return found


def write(path, found):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0].keys())
            writer.writeheader()
            writer.writerows(found)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(found))
    else:  # as W&B's API gives them: config and summary
        lines = [{"config": {k: v for k, v in row.items() if k != "val_loss"}, "summary": row} for row in found]
        path.write_text("\n".join(json.dumps({**line, "name": i}) for i, line in enumerate(lines)) + "\n")
    return path


def asked(path, **more):
    return verdict(path, "val_loss", "optimizer" if path.suffix != ".jsonl" else "config.optimizer", **more)


def by_name(found, name):
    return [row["val_loss"] for row in found if row["optimizer"] == name]


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "jsonl"])
def test_paired_runs_are_judged_by_the_paired_t_with_holm(tmp_path, kind):
    found = rows()
    result = asked(write(tmp_path / f"runs.{kind}", found), pair="seed" if kind != "jsonl" else "config.seed")
    base, muon, lion = result.standings
    want = [stats.ttest_rel(by_name(found, name), by_name(found, "adamw")) for name in ("muon", "lion")]
    assert (base.contender, base.word, muon.word) == ("adamw", "baseline", "better")
    assert muon.p == pytest.approx(want[0].pvalue)
    assert lion.p == pytest.approx(want[1].pvalue)
    assert muon.p_holm == pytest.approx(2 * want[0].pvalue)
    assert muon.difference_interval == pytest.approx(tuple(want[0].confidence_interval()))
    assert lion.word in ("no significant difference", "equivalent")


def test_r8_the_baseline_and_the_direction_are_as_asked(tmp_path):
    result = asked(write(tmp_path / "r.csv", rows()), pair="seed", baseline="muon", maximize=True)
    assert [(s.contender, s.word) for s in result.standings] == [
        ("muon", "baseline"), ("adamw", "better"), ("lion", "better"),
    ]  # fmt: skip


def test_without_pairs_the_runs_are_independent_samples(tmp_path):
    found = rows()
    random.Random(3).shuffle(found)
    found.sort(key=lambda row: row["optimizer"] != "adamw")
    muon = next(s for s in asked(write(tmp_path / "r.csv", found)).standings if s.contender == "muon")
    want = stats.ttest_ind(by_name(found, "muon"), by_name(found, "adamw"), equal_var=False)
    assert muon.p == pytest.approx(want.pvalue)
    assert muon.difference_interval == pytest.approx(tuple(want.confidence_interval()))
    assert (muon.rho, muon.bootstrap_interval) == (None, None)
    assert muon.visible > 0.1


def test_r9_repeats_of_a_seed_count_once(tmp_path):
    found = rows()
    doubled = [*found, *found, *found]
    assert [s.p for s in asked(write(tmp_path / "a.csv", doubled), pair="seed").standings] == [
        s.p for s in asked(write(tmp_path / "b.csv", found), pair="seed").standings
    ]


def test_only_seeds_that_all_have_are_compared_and_the_order_of_rows_is_nothing(tmp_path):
    found = [row for row in rows() if (row["optimizer"], row["seed"]) not in {("muon", 2), ("lion", 5)}]
    result = asked(write(tmp_path / "a.csv", found), pair="seed")
    assert result.lock["pairs"] == [str(s) for s in SEEDS if s not in (2, 5)]
    assert not result.standings[1].failures
    random.Random(0).shuffle(found)
    other = asked(write(tmp_path / "b.csv", found), pair="seed", baseline="adamw")
    assert {s.contender: s.p for s in other.standings} == {s.contender: s.p for s in result.standings}


def test_r6_a_run_without_a_metric_has_failed(tmp_path):
    found = rows(gap=-1.0)
    for row in found:
        if row["optimizer"] == "muon" and row["seed"] == 4:
            row["val_loss"] = "NaN"
    muon = asked(write(tmp_path / "a.csv", found), pair="seed").standings[1]
    assert muon.failures == ("final seed 4: no finite metric in the table",)
    assert muon.word == "no significant difference"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"metric": "val_los"}, "no column 'val_los'; nearest: val_loss"),
        ({"by": "optimiser"}, "no column 'optimiser'; nearest: optimizer"),
        ({"baseline": "adam"}, "no run has optimizer='adam'; nearest: adamw"),
        ({"metric": "optimizer"}, "the metric 'adamw' is not a number"),
        ({"by": "one"}, "a verdict needs two contenders; every run has one='1'"),
        ({"pair": "val_loss"}, "only 0 value"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, said):
    path = write(tmp_path / "r.csv", [{**row, "one": 1} for row in rows()])
    with pytest.raises(InputError, match=said):
        verdict(path, **{"metric": "val_loss", "by": "optimizer", **given})


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("r.csv", "", "holds no run"),
        ("r.csv", "a,b\n", "holds no run"),
        ("r.jsonl", "{nonsense", "is not a table"),
        ("r.jsonl", "[1, 2]", "a run is an object with names and values"),
        ("r.parquet", "no parquet", "is not a table"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_runs(tmp_path / name)


def test_the_command_prints_the_verdict_or_json(tmp_path):
    write(tmp_path / "runs.csv", rows())

    def etude(*args):
        words = ["verdict", "runs.csv", "--metric", "val_loss", "--by", "optimizer", *args]
        done = subprocess.run(
            [sys.executable, "-c", "from etude.cli import main; main()", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    code, out, _ = etude("--pair", "seed")
    assert code == 0
    assert "better" in out
    assert "No A/A control: etude did not train these runs." in out
    code, out, _ = etude("--json")
    assert code == 0
    assert json.loads(out)["plan"]["paired"] is False
    code, out, err = etude("--pair", "sed")
    assert (code, out, err.count("\n")) == (2, "", 1)
