"""Data as users have them, as tensors: a CSV, Parquet or npz file, a dataset of the Hugging Face hub, plain text."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude._words import nearest
from etude.race._errors import InputError, one_line
from etude.race.task import plain_tensor

HUB = "hf:"
"""What a path begins with that is a name on the Hugging Face hub."""
_LEVELS = 32
"""A column of text with more different values than this is no category."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Examples. ``inputs``: [n, …]. ``targets``: numbers [n, 1], or the index [n] of one of ``classes``."""

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()

    def split(self, valid: float = 0.2, test: float = 0.2) -> tuple[Pair, Pair, Pair]:
        """Training, validation and test pairs, the same ones every time; the shares are of all examples.

        The columns of a table, and targets that are numbers, are standardised by the training examples.
        """
        n = len(self.targets)
        held = [int(n * share) for share in (valid, test)]
        if min(held) < 1 or sum(held) >= n:
            raise InputError(f"{n} examples do not split into training, {valid:g} validation and {test:g} test")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        rows = torch.split(order, [n - sum(held), *held])
        inputs = _standardised(self.inputs, rows[0]) if _is_table(self.inputs) else self.inputs
        targets = self.targets if self.classes else _standardised(self.targets, rows[0])
        one, two, three = ((inputs[part], targets[part]) for part in rows)
        return one, two, three


def read(path: str | Path, target: str, ignore: Iterable[str] = ()) -> Data:
    """The data in a CSV (with a header), Parquet or npz file, or of ``hf:name``; ``target`` names what is predicted.

    Every other column but those of ``ignore`` is an input: numbers as they are, few different texts as one column for
    each. The target's texts are classes, and so are the whole numbers 0 … k; other numbers are regressed. One array of
    more axes than one is the input as it stands: bytes become floats in [0, 1], other whole numbers stay.
    """
    if str(path).startswith(HUB):
        return hub(str(path).removeprefix(HUB), target, ignore=ignore)
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no data file {path}")
    if file.suffix not in _READERS:
        raise InputError(f"data come from {', '.join(_READERS)} or {HUB}name; this is {path}")
    return _read(file.resolve(), file.stat().st_mtime_ns, target, tuple(ignore))


def hub(name: str, target: str, split: str = "train", ignore: Iterable[str] = (), **options: Any) -> Data:
    """A dataset as ``datasets.load_dataset(name, split=split, **options)`` finds it; columns as in `read`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("datasets of the hub need the package datasets: pip install 'etude[hf]'") from None
    try:
        found = load_dataset(name, split=split, **options)
    except Exception as error:
        raise InputError(f"{HUB}{name} does not load: {type(error).__name__}: {one_line(error)}") from error
    return _data(f"{HUB}{name}", {column: found[column][:] for column in found.column_names}, target, tuple(ignore))


def byte_blocks(texts: Iterable[str | bytes], length: int) -> Tensor:
    """The texts end to end as bytes, in blocks [n, length]; the last, short one is left out."""
    whole = b"".join(text.encode() if isinstance(text, str) else text for text in texts)
    if len(whole) < length:
        raise InputError(f"{len(whole)} bytes of text make no block of {length}")
    used = len(whole) // length * length
    return torch.frombuffer(bytearray(whole[:used]), dtype=torch.uint8).view(-1, length).long()


@functools.lru_cache(maxsize=4)
def _read(file: Path, _changed: int, target: str, ignore: tuple[str, ...]) -> Data:
    """Read once a process, unless the file has changed since."""
    try:
        columns = _READERS[file.suffix](file)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file.name} cannot be read: {type(error).__name__}: {one_line(error)}") from error
    return _data(file.name, columns, target, ignore)


def _csv(file: Path) -> dict[str, Any]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.reader(lines))
    head, rows = (rows[0] if rows else []), [row for row in rows[1:] if row]
    if len(set(head)) < len(head) or not rows:
        raise InputError(f"{file.name} needs a header of different names, and rows below it")
    for i, row in enumerate(rows):
        if len(row) != len(head):
            raise InputError(f"{file.name}: row {i + 1} has {len(row)} values under a header of {len(head)}")
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(head)}


def _parquet(file: Path) -> dict[str, Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("Parquet files need the package pyarrow: pip install 'etude[parquet]'") from None
    return dict(parquet.read_table(file).to_pydict())


def _npz(file: Path) -> dict[str, Any]:
    import numpy as np

    with np.load(file, allow_pickle=False) as held:
        return dict(held)


_READERS = {".csv": _csv, ".parquet": _parquet, ".npz": _npz}


def _data(name: str, columns: Mapping[str, Any], target: str, ignore: tuple[str, ...]) -> Data:
    """The data of named columns, each an array or a list of numbers, texts or images."""
    for asked in (target, *ignore):
        if asked not in columns:
            near = nearest(asked, columns)
            raise InputError(f"{name} has no column {asked!r}; nearest: {near}; it has {', '.join(columns)}")
    held = {column: _array(f"{name}, column {column!r}", v) for column, v in columns.items() if column not in ignore}
    lengths = {column: len(array) for column, array in held.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"{name}: columns of different lengths, {', '.join(f'{c} {n}' for c, n in lengths.items())}")
    targets, classes = _targets(f"{name}, column {target!r}", held.pop(target))
    wide = [column for column, array in held.items() if array.ndim > 1]
    if not held or (wide and len(held) > 1):
        several = f"an array of more axes beside others: {', '.join(held)}; ignore all but one" if held else "no input"
        raise InputError(f"{name} has {several}")
    if wide:
        return Data(_whole(held[wide[0]]), targets, classes)
    parts = [part for column, array in held.items() for part in _columns(f"{name}, column {column!r}", array)]
    return Data(torch.stack(parts, 1), targets, classes)


def _array(where: str, values: Any) -> Any:
    """As a numpy array of numbers or of texts; images get their channels in front."""
    import numpy as np

    gaps = sum(v is None or (isinstance(v, str) and not v) for v in values) if isinstance(values, list) else 0
    if gaps:
        raise InputError(f"{where}: {gaps} of {len(values)} values are missing; fill them, or ignore the column")
    images = isinstance(values, list) and bool(values) and hasattr(values[0], "getbands")  # PIL's
    try:
        array = np.stack([np.asarray(v) for v in values]) if images else np.asarray(values)
        if array.dtype.kind in "UO":
            array = _numbers(array)
    except ValueError as error:
        raise InputError(f"{where}: its values differ in shape") from error
    if array.dtype.kind not in "biufU":
        raise InputError(f"{where}: values of type {array.dtype} are neither numbers nor texts")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{where}: {(~np.isfinite(array)).sum()} values are not finite; fill them, or ignore it")
    return np.moveaxis(array, -1, 1) if images and array.ndim == 4 else array


def _numbers(array: Any) -> Any:
    """Texts as whole numbers or floats where all of them are; else as they are."""
    for kind in (int, float):
        try:
            return array.astype(kind)
        except (ValueError, TypeError, OverflowError):
            continue
    return array.astype(str)


def _targets(where: str, array: Any) -> tuple[Tensor, tuple[str, ...]]:
    import numpy as np

    if array.ndim > 1:
        return _whole(array), ()
    levels, index = np.unique(array, return_inverse=True)
    few = len(levels) <= len(array) // 2
    labels = few and array.dtype.kind in "biu" and np.array_equal(levels, np.arange(len(levels)))
    if len(levels) < 2:
        raise InputError(f"{where}: all {len(array)} values are the same")
    if labels or array.dtype.kind == "U":
        if not few:
            raise InputError(f"{where}: {len(levels)} classes among {len(array)} examples")
        return torch.as_tensor(index.reshape(-1)), tuple(map(str, levels))
    return torch.as_tensor(array.astype("float32"))[:, None], ()


def _columns(where: str, array: Any) -> list[Tensor]:
    """One column of numbers, or one for each of a few texts."""
    import numpy as np

    if array.dtype.kind != "U":
        return [torch.as_tensor(array.astype("float32"))]
    levels = np.unique(array)
    if len(levels) > _LEVELS:
        raise InputError(f"{where}: {len(levels)} different texts are no category; ignore the column")
    return [torch.as_tensor((array == level).astype("float32")) for level in levels]


def _whole(array: Any) -> Tensor:
    """An array as it stands; bytes, as those of an image, become floats in [0, 1]."""
    tensor: Tensor = plain_tensor(array)
    return tensor.float() / 255 if str(array.dtype) == "uint8" else tensor


def _is_table(inputs: Tensor) -> bool:
    return inputs.ndim == 2 and inputs.is_floating_point()


def _standardised(values: Tensor, rows: Tensor) -> Tensor:
    """Mean 0 and variance 1 over ``rows``; what does not vary there is only centred."""
    std, mean = torch.std_mean(values[rows].double(), 0, correction=0)
    return ((values - mean) / torch.where(std > 0, std, 1.0)).float()
