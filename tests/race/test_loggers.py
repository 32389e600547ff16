"""Every finished run also stands in TensorBoard, MLflow or W&B: written by the real libraries and read back."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest

import etude
from etude.race import InputError, loggers
from etude.race import _run as running
from etude.race.pool import Worker
from etude.race.store import FILE

TINY = Path(__file__).parent / "tiny.py"


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """A race that logs while it runs."""
    folder = tmp_path_factory.mktemp("runs")
    asked = {"folder": folder, "seeds": 6, "workers": 1, "quiet": True, "log": f"tensorboard:{folder / 'tb'}"}
    return etude.race(str(TINY), ["adamw", "sgd(momentum=0.9)"], **asked)


@pytest.fixture
def nobody(monkeypatch):
    monkeypatch.setattr(Worker, "_start", lambda self: pytest.fail("a worker was started"))


def scalars(folder):
    """Tag → [(step, value)] of a folder of events, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in held.Scalars(tag)] for tag in held.Tags()["scalars"]}


def test_tensorboard_holds_every_curve_and_end_and_the_verdict(raced):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = raced.folder.parent / "tb"
    assert len(list(root.iterdir())) == len(raced.outcomes) + 1
    outcome = next(o for o in raced.outcomes if o.cell.stage == "final")
    named = loggers.title(outcome.cell).replace(" ", "_")
    (folder,) = root.glob(f"{named}*")
    found = scalars(folder)
    wanted = [(step, metric) for step, _, _, metric in outcome.curve]
    assert found["validation"] == [(s, pytest.approx(m, rel=1e-6)) for s, m in wanted]
    assert found["end/metric"] == [(wanted[-1][0], pytest.approx(outcome.metric, rel=1e-6))]
    text = EventAccumulator(str(root / "verdict")).Reload().Tensors("verdict")[0].tensor_proto.string_val[0].decode()
    assert all(f"{s.contender} | {s.word}" in text for s in raced.standings)


def test_a_finished_race_is_told_to_mlflow_afterwards_and_only_once(raced, nobody):
    import mlflow

    keys = [o.cell.key(raced.lock) for o in raced.outcomes]
    (raced.folder / "logged-mlflow").write_text("\n".join([*keys[:-3], ""]))  # as if it had been told of all but three
    for _ in range(2):
        running.resume(raced.folder, quiet=True, log="mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{raced.folder / 'mlflow.sqlite'}")
    experiment = client.get_experiment_by_name(raced.folder.name).experiment_id
    runs = [r for r in client.search_runs([experiment], max_results=1000) if r.info.run_name != "verdict"]
    assert sorted(r.data.tags["etude.key"] for r in runs) == sorted(keys[-3:])
    outcome = raced.outcomes[-1]
    key = outcome.cell.key(raced.lock)
    (run,) = client.search_runs([experiment], filter_string=f"tags.`etude.key` = '{key}'")
    assert run.data.params == {k: str(v) for k, v in loggers.settings(outcome.cell).items()}
    assert run.data.metrics["end.metric"] == pytest.approx(outcome.metric)
    curve = client.get_metric_history(run.info.run_id, "validation")
    assert [(m.step, m.value) for m in curve] == [(p[0], p[3]) for p in outcome.curve]
    assert (raced.folder / "logged-mlflow").read_text().split().count(key) == 1


def records(file):
    """The records of a W&B file: LevelDB's log format, blocks of 32 kB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_wandb_holds_each_run_offline_with_its_settings_curve_and_end(raced, nobody, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = loggers.Log("wandb", raced.folder, lambda *said: pytest.fail(str(said)))
    outcome = raced.outcomes[-1]
    failed = replace(outcome, cell=replace(outcome.cell, seed=7), metric=None, reason="diverged", curve=())
    for one in (outcome, outcome, failed):
        log.cell(one.cell.key(raced.lock), one)
    log.verdict(raced)
    files = sorted((raced.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3
    key = outcome.cell.key(raced.lock)
    (file,) = [f for f in files if f.stem == f"run-{key[:16]}"]
    held = list(records(file))
    run = next(r.run for r in held if r.HasField("run"))
    assert (run.run_group, run.job_type, run.display_name) == (raced.folder.name, "aa", loggers.title(outcome.cell))
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert {k: config[k] for k in ("contender", "lr", "seed")} == {
        "contender": "adamw", "lr": outcome.cell.lr, "seed": outcome.cell.seed,
    }  # fmt: skip
    history = [{"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in held if r.HasField("history")]  # fmt: skip
    assert [(h["_step"], h["validation"]) for h in history] == [(p[0], p[3]) for p in outcome.curve]
    ends = {}
    for r in held:
        if r.HasField("summary"):
            ends |= {"".join(u.nested_key) or u.key: json.loads(u.value_json) for u in r.summary.update}
    assert ends["metric"] == outcome.metric
    assert ends["failed"] == 0


def test_what_is_not_finite_is_left_out():
    outcome = etude.race.Outcome(etude.race.Cell("adamw", "final", 0.1, 1), math.nan, "", ((5, 1.0, math.inf, math.nan),), 1.0, None, None)  # fmt: skip
    assert loggers.points(outcome) == [(5, {"seconds": 1.0})]
    assert loggers.ends(outcome) == {"seconds": 1.0, "failed": 1.0}


def test_a_logger_that_breaks_is_said_once_and_the_race_goes_on(raced, nobody, monkeypatch, capsys):
    def broken(self, key, outcome):
        raise OSError("no network\nmore")

    monkeypatch.setattr(loggers._Tensorboard, "cell", broken)
    (raced.folder / "logged-tensorboard").unlink()
    again = running.resume(raced.folder, log=f"tensorboard:{raced.folder / 'other'}")
    assert again.standings == raced.standings
    said = capsys.readouterr().err
    assert said.count("tensorboard is not told any more: no network; the ledger holds every run") == 1
    assert not (raced.folder / "logged-tensorboard").exists()


@pytest.mark.parametrize(
    ("log", "said"),
    [("neptune", "it is wandb, tensorboard:DIR or mlflow"), ("wandb:here", "it is wandb"), ("", "it is wandb")],
)
def test_an_unknown_log_is_refused_before_anything_is_written(tmp_path, nobody, log, said):
    with pytest.raises(InputError, match=said):
        etude.race(str(TINY), ["adamw", "lion"], folder=tmp_path / "runs", quiet=True, log=log)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_one_line_that_says_how_to_get_it(tmp_path, nobody, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'log=\'wandb\' needs wandb; install it with: pip install "etude\[loggers\]"'):
        etude.race(str(TINY), ["adamw", "lion"], folder=tmp_path / "runs", quiet=True, log="wandb")
    assert not (tmp_path / "runs" / FILE).exists()
