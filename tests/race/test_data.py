"""Data from files and from the Hugging Face hub's own library, as tensors."""

import csv

import numpy as np
import pytest
import torch

from etude.race import InputError, data

ROWS = [[i, i * 0.5, "ab"[i % 2], ["red", "green", "blue"][i % 3]] for i in range(30)]
HEAD = ["count", "size", "side", "color"]


@pytest.fixture
def table(tmp_path):
    def write(rows=ROWS, head=HEAD, name="table.csv"):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *rows])
        return path

    return write


def test_numbers_are_columns_and_texts_are_classes_or_one_column_each(table):
    found = data.read(table(), "color")
    assert found.classes == ("blue", "green", "red")
    assert found.inputs.shape == (30, 4)  # count, size, side a, side b
    assert [found.classes[i] for i in found.targets[:3]] == ["red", "green", "blue"]
    assert found.inputs[:3].tolist() == [[0, 0, 1, 0], [1, 0.5, 0, 1], [2, 1, 1, 0]]


def test_numbers_that_do_not_count_from_zero_are_regressed(table):
    regression = data.read(table(), "size", ignore=["color", "side"])
    assert regression.classes == ()
    assert regression.targets.shape == (30, 1)
    labels = data.read(table([[i % 3, i] for i in range(30)], ["kind", "x"]), "kind")
    assert labels.classes == ("0", "1", "2")
    assert labels.targets.dtype == torch.int64


def test_a_split_is_the_same_every_time_disjoint_and_standardised_by_its_training_part(table):
    whole = data.read(table(), "size", ignore=["color"])
    train, valid, test = whole.split()
    again = whole.split()[0]
    assert torch.equal(train[0], again[0])
    assert [len(y) for _, y in (train, valid, test)] == [18, 6, 6]
    assert train[0].mean(0).abs().max() < 1e-6
    assert train[1].std(correction=0) == pytest.approx(1, abs=1e-6)
    rows = torch.cat([x for x, _ in (train, valid, test)])
    assert len({tuple(row) for row in rows.tolist()}) == 30
    assert valid[0].mean(0).abs().max() > 1e-3  # by the training part, not by their own


def test_the_same_table_in_three_formats_is_the_same_data(table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = table()
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(HEAD)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    np.savez(tmp_path / "table.npz", **{name: np.array(column) for name, column in columns.items()})
    found = [data.read(path.with_suffix(kind), "color") for kind in (".csv", ".parquet", ".npz")]
    assert all(torch.equal(f.inputs, found[0].inputs) and torch.equal(f.targets, found[0].targets) for f in found)
    assert {f.classes for f in found} == {found[0].classes}


def test_a_file_that_changes_is_read_again(table):
    path = table()
    before = data.read(path, "color").inputs
    path.write_text(path.read_text().replace("29,14.5", "30,14.5"))
    assert data.read(path, "color").inputs[29, 0] == before[29, 0] + 1


def test_one_array_of_more_axes_is_the_input_as_it_stands(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, label=np.arange(12) % 4)
    found = data.read(tmp_path / "images.npz", "label")
    assert torch.equal(found.inputs, torch.as_tensor(images).float() / 255)
    assert torch.equal(found.split()[0][0].flatten(1).max(1).values <= 1, torch.ones(8, dtype=torch.bool))
    np.savez(tmp_path / "tokens.npz", ids=images[:, 0].reshape(12, -1).astype("int32"), label=np.arange(12) % 4)
    assert data.read(tmp_path / "tokens.npz", "label").inputs.dtype == torch.int64


@pytest.mark.parametrize(
    "rows, head, target, said",
    [
        (ROWS, HEAD, "colour", "has no column 'colour'; nearest: color, count; it has count, size"),
        ([*ROWS, [1, "", "a", "red"]], HEAD, "color", "'size': 1 of 31 values are missing"),
        ([*ROWS, [1, "nan", "a", "red"]], HEAD, "color", "'size': 1 values are not finite"),
        ([*ROWS, [1, 2]], HEAD, "color", "row 31 has 2 values under a header of 4"),
        ([], HEAD, "color", "needs a header of different names, and rows"),
        (ROWS, ["a", "a", "b", "c"], "c", "a header of different names"),
        ([[f"text {i}", i / 2] for i in range(40)], ["name", "y"], "y", "'name': 40 different texts are no category"),
        ([[i, f"text {i}"] for i in range(40)], ["x", "name"], "name", "40 classes among 40 examples"),
        ([[i, 7] for i in range(40)], ["x", "y"], "y", "all 40 values are the same"),
        ([[i] for i in range(40)], ["y"], "y", "has no input"),
    ],
)
def test_a_table_that_cannot_be_learned_is_one_line(table, rows, head, target, said):
    with pytest.raises(InputError, match=said) as caught:
        data.read(table(rows, head), target)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_data_are_one_line(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no zip")
    (tmp_path / "x.xlsx").write_bytes(b"")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    np.savez(tmp_path / "uneven.npz", x=np.zeros(3), y=np.zeros(4))
    np.savez(tmp_path / "two.npz", x=np.zeros((4, 2)), z=np.zeros(4), y=np.arange(4) / 2)
    for name, said in [
        ("none.csv", "no data file"), ("x.xlsx", r"data come from \.csv"), ("x.npz", "x.npz cannot be read"),
        ("pickled.npz", "pickled.npz cannot be read"), ("uneven.npz", "different lengths, x 3, y 4"),
        ("two.npz", "more axes beside others: x, z; ignore all but one"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            data.read(tmp_path / name, "y")
    with pytest.raises(InputError, match="3 examples do not split"):
        data.Data(torch.zeros(3, 1), torch.zeros(3, 1)).split()


def test_a_dataset_of_the_hub_by_its_own_library(table, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = {"data_files": str(table()), "cache_dir": str(tmp_path / "cache")}
    found = data.hub("csv", "color", **options)
    plain = data.read(table(), "color")
    assert torch.equal(found.inputs, plain.inputs)
    assert found.classes == plain.classes
    with pytest.raises(InputError, match="hf:csv does not load: "):
        data.hub("csv", "color", data_files=str(tmp_path / "none.csv"))
    with pytest.raises(InputError, match="hf:csv has no column 'hue'"):
        data.hub("csv", "hue", **options)


def test_images_of_a_dataset_have_their_channels_in_front():
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), dtype=np.uint8)
    columns = {"image": [image.fromarray(p) for p in pixels], "label": [i % 2 for i in range(10)]}
    found = data._data("mine", columns, "label", ())
    assert torch.equal(found.inputs, torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255)


def test_bytes_come_in_blocks_in_order():
    blocks = data.byte_blocks(["abc", b"de", "é"], 3)
    assert blocks.tolist() == [[97, 98, 99], [100, 101, 195]]
    with pytest.raises(InputError, match="2 bytes of text make no block of 3"):
        data.byte_blocks(["ab"], 3)
