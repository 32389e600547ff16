"""A task: its data order, its metric, its hash, how it is found; and the plain loop on it."""

import collections
import copy
import functools
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from etude.race import Cell, InputError, Task, loop
from etude.race.plan import entries, grid, seeds_of
from etude.race.subject import find, open_task
from etude.race.task import to_device
from etude.race.tasks import Found, builtin, find_task

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "docs" / "my_task.py"
X, Y = torch.arange(10.0).reshape(10, 1), torch.arange(10.0).reshape(10, 1)


def a_task(**more):
    given = {"train": (X, Y), "valid": (X, Y), "loss": nn.functional.mse_loss, "steps": 5, "batch": 4}
    return Task(nn.Linear(1, 1), **{**given, **more})


def tiny(name):
    return find_task(f"{HERE / 'tiny.py'}:{name}").factory


def found(factory):
    return Found("mine", "mine", factory, "")


def stream(task, seed, n=6):
    batches = task.batches(torch.Generator().manual_seed(seed))
    return [next(batches)[0].flatten().tolist() for _ in range(n)]


def test_batches_are_shuffled_by_the_generator_alone():
    torch.manual_seed(1)
    one = stream(a_task(), 3)
    torch.manual_seed(2)
    assert stream(a_task(), 3) == one
    assert stream(a_task(), 4) != one


def test_an_epoch_draws_nothing_twice_and_the_next_is_in_another_order():
    one, two, three, four = stream(a_task(), 0, 4)
    assert len({*one, *two}) == len({*three, *four}) == 8
    assert (one, two) != (three, four)


def test_a_stream_may_be_a_function_of_the_generator():
    def epoch(generator):
        for row in torch.randperm(10, generator=generator).tolist():
            yield X[row], Y[row]

    drawn = [x for batch in stream(a_task(train=epoch), 0, 20) for x in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_a_stream_without_a_batch_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="no batch"):
        next(a_task(train=lambda generator: iter(())).batches(torch.Generator()))


def test_the_metric_counts_examples_not_batches():
    task = a_task(metric=lambda out, y: y.flatten(), valid=[(X[:9], Y[:9]), (X[9:], Y[9:])])
    assert task.measure(task.model, task.valid) == pytest.approx(4.5)


def test_measuring_is_in_evaluation_mode_and_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)).train()
    task = Task(model, (X, Y), (X, Y), nn.functional.mse_loss, 5, batch=4)
    assert task.measure(model, task.valid) == task.measure(model, task.valid)
    assert model.training


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_the_data_hash_sees_every_value(part):
    other = X.clone()
    other[3] += 1e-6
    assert a_task(test=(X, Y)).data_hash() == a_task(test=(X, Y)).data_hash()
    assert a_task(**{"test": (X, Y), part: (other, Y)}).data_hash() != a_task(test=(X, Y)).data_hash()


@pytest.mark.parametrize(
    "more, said",
    [
        ({"steps": 0}, "steps ≥ 1"),
        ({"train": (X, Y[:3])}, "10 inputs and 3 targets"),
        ({"train": (X[:0], Y[:0])}, "train holds no example"),
        ({"train": TensorDataset(X, Y)}, "train is a pair of tensors .*; this is a TensorDataset"),
        ({"train": (X.tolist(), Y.tolist())}, "train is a pair of tensors .*; this is a tuple of list, list"),
        ({"train": {"x": X}}, "train is a pair of tensors .*; this is a dict of x"),
        ({"train": ({"x": X[:4]}, Y)}, "4 inputs and 10 targets"),
        ({"batch": 11}, "train holds 10 examples, fewer than one batch of 11; give batch=10 or less"),
        ({"valid": DataLoader(TensorDataset(X, Y), shuffle=True)}, "valid is a DataLoader that shuffles"),
        ({"valid": [X, Y]}, r"valid is one batch, the tuple \(inputs, targets\).*; this is a list of Tensor, Tensor"),
        ({"valid": TensorDataset(X, Y)}, "valid is one batch.*; this is a TensorDataset"),
        ({"test": (X, Y, Y)}, "test is one batch.*; this is a tuple of Tensor, Tensor, Tensor"),
        ({"valid": ((X, Y) for _ in range(2))}, "valid is a one-shot iterator"),
        ({"test": iter([(X, Y)])}, "test is a one-shot iterator"),
        ({"minimize": False}, "minimize=False needs a metric"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(more, said):
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        a_task(**more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("empty", [(X[:0], Y[:0]), [], [(X[:0], Y[:0])], DataLoader([])])
def test_held_out_data_without_an_example_are_refused(part, empty):
    with pytest.raises(InputError, match="hold no example"):
        open_task(found(lambda seed: a_task(**{part: empty})), 0)


def test_a_model_that_has_no_weights_yet_is_refused_until_it_has_seen_a_batch():
    lazy = nn.LazyLinear(1)
    with pytest.raises(ValueError, match="lazy layers"):
        Task(lazy, (X, Y), (X, Y), nn.functional.mse_loss, 5, batch=4)
    lazy(X)
    Task(lazy, (X, Y), (X, Y), nn.functional.mse_loss, 5, batch=4)


def test_held_out_data_may_be_whatever_can_be_read_again():
    def factory(seed, shift=0.0):
        return a_task(valid=DataLoader(TensorDataset(X, Y + shift), 3))

    task = open_task(found(factory), 0)
    pair = a_task()
    assert task.measure(task.model, task.valid) == pytest.approx(pair.measure(task.model, pair.valid))
    assert task.data_hash() == factory(1).data_hash() != factory(0, 1e-6).data_hash()


def test_a_metric_may_be_a_plain_number():
    task = a_task(metric=lambda out, y: y.mean().item())
    assert task.measure(task.model, task.valid) == pytest.approx(4.5)


def test_a_namedtuple_moves_as_one():
    Two = collections.namedtuple("Two", "ids mask")
    moved = to_device({"x": Two(X, [Y, 3])}, "meta")["x"]
    assert type(moved) is Two
    assert moved.ids.is_meta
    assert moved.mask[0].is_meta
    assert moved.mask[1] == 3


NET = nn.Linear(1, 1)


def with_model(model):
    return Task(model, (X, Y), (X, Y), nn.functional.mse_loss, 5, batch=4)


def sharing_storage(seed):
    net = nn.Linear(1, 1)
    net.load_state_dict(NET.state_dict(), assign=True)
    return with_model(net)


@pytest.mark.parametrize(
    "factory",
    [
        lambda seed: with_model(NET),
        lambda seed: with_model(nn.Sequential(nn.Linear(1, 1), NET)),
        sharing_storage,
        functools.cache(lambda seed: with_model(nn.Linear(1, 1))),
    ],
)
def test_a_factory_that_returns_the_same_weights_twice_is_refused(factory):
    with pytest.raises(InputError, match=r"the same model twice; build it, or copy.deepcopy it, inside the factory"):
        open_task(found(factory), 0)


def test_a_copy_of_one_pretrained_model_in_every_run_is_fine():
    assert open_task(found(lambda seed: with_model(copy.deepcopy(NET))), 0).steps == 5


def test_digits_keep_their_classes_in_every_part_and_share_no_example():
    task = builtin()["digits"](0)
    parts = [task.train, task.valid, task.test]
    assert [len(y) for _, y in parts] == [1077, 360, 360]
    for _, y in parts:
        share = torch.bincount(y, minlength=10) / len(y)
        assert (share - 0.1).abs().max() < 0.01
    rows = {tuple(row) for x, _ in parts for row in x.tolist()}
    assert len(rows) == 1797


def test_the_example_is_fifteen_lines_of_code_and_learns():
    code = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(code) <= 15
    found = find_task(str(EXAMPLE))
    outcome = loop.train(found.factory, Cell("adamw", "final", 1e-2, 3), steps=400)
    assert outcome.reason == ""
    assert outcome.metric < 0.05  # the noise is 0.01, the targets' variance 0.68


@pytest.mark.parametrize(
    "asked, said",
    [
        ("digit", "no task 'digit'.*digits"),
        ("nowhere/my_task.py", "no task file nowhere/my_task.py"),
        (f"{HERE / 'tiny.py'}:tsak", "no function 'tsak'.*task"),
    ],
)
def test_a_misspelt_task_is_one_line_with_the_nearest_name(asked, said):
    with pytest.raises(InputError, match=said) as caught:
        find_task(asked)
    assert "\n" not in str(caught.value)


def test_a_task_file_that_does_not_import_says_why(tmp_path):
    (tmp_path / "bad.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(InputError, match=r"bad.py does not import: ModuleNotFoundError: .*nowhere_to_be_found"):
        find_task(str(tmp_path / "bad.py"))


def test_a_task_may_import_what_stands_beside_it(tmp_path):
    shutil.copy(HERE / "tiny.py", tmp_path / "beside_it.py")
    (tmp_path / "mine.py").write_text("from beside_it import task\n")
    assert isinstance(find_task(str(tmp_path / "mine.py")).factory(0), Task)


def test_a_factory_is_found_by_its_file_and_a_lambda_is_refused():
    factory = tiny("task")
    assert find_task(factory).ref == f"{HERE / 'tiny.py'}:task"
    for other in (lambda seed: None, functools.partial(factory), functools.cache(factory), Task):
        with pytest.raises(InputError, match="top-level function in a file"):
            find_task(other)
    with pytest.raises(InputError, match="this is 5"):
        find_task(5)


def test_a_task_file_that_races_when_imported_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("import etude\netude.race('digits', ['adamw', 'lion'])\n")
    with pytest.raises(InputError, match="under if __name__"):
        find_task(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("moving_data", "the data change with the seed"),
        ("broken", "does not build: OSError: no data for"),
        ("not_a_task", "returned a Linear"),
    ],
)
def test_a_task_that_cannot_be_raced_is_refused_before_the_plan(name, said):
    with pytest.raises(InputError, match=said):
        open_task(find_task(f"{HERE / 'tiny.py'}:{name}"), 0)


def test_a_contender_is_its_canonical_text_without_lr():
    assert find("digits").entry("muon( lr=0.02 )+ dyt") == ("muon + dyt", 0.02)
    assert find("digits").entry("adamw") == ("adamw", 1e-3)
    assert list(entries(find("digits"), ["lion", "adamw"], "adamw")) == ["adamw", "lion"]


@pytest.mark.parametrize(
    "asked, said",
    [
        (["adamw", "adamww"], "no method 'adamww'.*adamw"),
        (["adamw", "lion(betta=1.0)"], "no knob 'betta'.*betas"),
        (["adamw", "adamw(lr=0.1)"], "stands twice"),
        (["adamw"], "at least one other"),
        (["adamw", "dyt"], "names no rule"),
        ("adamw", "contenders are a list of recipes.*this is 'adamw'"),
        (["adamw", 3], "contenders are a list of recipes"),
        (["adamw", "lion(lr=0)"], "its lr, 0, cannot centre a grid"),
        (["adamw", "sgd(lr=1e20)"], "its lr, 1e.20, cannot centre a grid"),
    ],
)
def test_a_contender_that_cannot_race_is_refused(asked, said):
    with pytest.raises(InputError, match=said):
        entries(find("digits"), asked, None)


def test_the_grid_is_seven_points_by_the_root_of_ten():
    lrs = grid(1e-3)
    assert len(lrs) == 7
    assert lrs[3] == 1e-3
    assert [b / a for a, b in itertools.pairwise(lrs)] == pytest.approx([math.sqrt(10)] * 6, rel=1e-4)


def test_no_stage_shares_a_seed_and_more_seeds_only_add():
    drawn = [s for race in (0, 1) for stage in ("tune", "final", "aa") for s in seeds_of(stage, race, 1000)]
    assert len(drawn) == len(set(drawn))
    assert seeds_of("final", 0, 20)[:10] == seeds_of("final", 0, 10)


def test_every_contender_of_a_seed_starts_at_the_same_weights_and_sees_the_same_batches():
    runs = [
        loop.Run(tiny("task"), Cell(c, "tune", 0.1, 5), steps=8, device="cpu") for c in ("adamw", "sgd(momentum=0.9)")
    ]
    one, two = ([p.detach().clone() for p in run.model.parameters()] for run in runs)
    assert all(map(torch.equal, one, two))
    assert all(torch.equal(next(runs[0].stream)[0], next(runs[1].stream)[0]) for _ in range(5))
    other = loop.Run(tiny("task"), Cell("adamw", "tune", 0.1, 6), steps=8, device="cpu")
    assert not torch.equal(one[0], next(other.model.parameters()))
    again = loop.Run(tiny("task"), Cell("adamw", "tune", 0.1, 5), steps=8, device="cpu")
    assert not all(torch.equal(next(again.stream)[0], next(other.stream)[0]) for _ in range(5))


def test_a_cell_gives_the_same_bits_twice_and_its_curve_ends_at_the_last_step():
    cell = Cell("adamw", "tune", 0.01, 5)
    one, two = (loop.train(tiny("task"), cell, steps=24) for _ in range(2))
    assert one.metric == two.metric == one.curve[-1][3]
    assert [p[0] for p in one.curve] == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert [p[2:] for p in one.curve] == [p[2:] for p in two.curve]
    assert one.state_bytes >= 2 * 4 * sum(p.numel() for p in tiny("task")(0).model.parameters())


def test_the_learning_rate_warms_up_and_decays_linearly_towards_zero():
    run = loop.Run(tiny("task"), Cell("sgd", "tune", 1.0, 0), steps=100, device="cpu")
    seen = []
    for _ in range(100):
        seen.append(run.optimizer.param_groups[0]["lr"])
        run.step()
    assert seen[5] == pytest.approx(1.0)
    assert seen[0] < seen[2] < seen[4] < 1.0
    assert seen[-1] == pytest.approx(1 / 95)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_the_verdict_is_taken_on_the_test_data_where_there_are_any():
    def factory(seed):
        return a_task(test=(X, Y + 5))

    tune, final = (loop.train(factory, Cell("adamw", stage, 0.1, 0), steps=5) for stage in ("tune", "final"))
    assert tune.metric == tune.curve[-1][3] == final.curve[-1][3] != final.metric


def test_a_run_that_blows_up_is_given_up_with_its_reason():
    outcome = loop.train(tiny("task"), Cell("sgd", "tune", 1e9, 0), steps=24)
    assert outcome.metric is None
    assert outcome.reason.startswith("diverged at step ")
    assert outcome.curve[-1][0] < 24


def test_a_run_far_above_its_first_loss_is_given_up_only_when_it_stays_there():
    high, low = (3, 0.0, 3.1, 0.0), (3, 0.0, 2.9, 0.0)
    assert "it began at 1" in loop.diverged(1.0, [high, high])
    assert loop.diverged(1.0, [high]) == loop.diverged(1.0, [high, low, high]) == ""
    assert "loss is nan" in loop.diverged(1.0, [(3, 0.0, math.nan, 0.0)])


def test_sam_and_weight_averages_take_part_in_a_race():
    plain, sam, average = (
        loop.train(tiny("task"), Cell(c, "tune", 0.05, 1), steps=24)
        for c in ("sgd", "sgd + sam", "sgd + weight_average")
    )
    assert "" == plain.reason == sam.reason == average.reason
    assert len({plain.metric, sam.metric, average.metric}) == 3


def test_a_probe_tells_a_no_op_from_a_change():
    same, other = (
        loop.probe(tiny("task"), c, lr=0.01, steps=24)["digest"] for c in ("adamw", "adamw(weight_decay=0.5)")
    )
    assert loop.probe(tiny("task"), "adamw", lr=0.01, steps=24)["digest"] == same != other


def test_a_probe_of_the_whole_schedule_sees_what_acts_late():
    late, plain = "adamw + swa(start=22)", "adamw"
    few = [loop.probe(tiny("task"), c, lr=0.01, steps=24)["digest"] for c in (plain, late)]
    whole = [loop.probe(tiny("task"), c, lr=0.01, steps=24, whole=True)["digest"] for c in (plain, late)]
    assert few[0] == few[1]
    assert len({*few, *whole}) == 3
    assert loop.probe(tiny("task"), "sgd", lr=1e30, steps=24)["digest"] == ""  # nan is like nan


def test_a_recipe_that_finds_nothing_on_this_model_is_refused():
    with pytest.raises(InputError, match="dyt"):
        loop.probe(lambda seed: a_task(), "adamw + dyt", lr=0.01, steps=5)
