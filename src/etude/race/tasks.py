"""The tasks that come with etude, on data that comes with its dependencies; how a task is found by name or path."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from etude._words import nearest
from etude.race._errors import InputError, one_line
from etude.race.task import Factory, Task

_importing: list[Path] = []


def digits(seed: int) -> Task:
    """Handwritten digits, 8 × 8 (scikit-learn): an MLP 64-64-64-10 with LayerNorm, judged by cross-entropy."""
    train, valid, test = _digits()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64),
        nn.LayerNorm(64),
        nn.GELU(),
        nn.Linear(64, 64),
        nn.LayerNorm(64),
        nn.GELU(),
        nn.Linear(64, 10),
    )
    return Task(model, train, valid, nn.functional.cross_entropy, steps=600, test=test)


@functools.cache
def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, targets = load_digits(return_X_y=True)
    rest_x, test_x, rest_y, test_y = train_test_split(inputs, targets, test_size=360, stratify=targets, random_state=0)
    train_x, valid_x, train_y, valid_y = train_test_split(
        rest_x, rest_y, test_size=360, stratify=rest_y, random_state=0
    )
    pairs = ((train_x, train_y), (valid_x, valid_y), (test_x, test_y))
    return tuple((torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)) for x, y in pairs)


@dataclass(frozen=True)
class Found:
    """A task's factory and short name, the reference that finds it from another process, its source's sha256."""

    name: str
    ref: str
    factory: Factory
    source: str


def builtin() -> dict[str, Factory]:
    """The built-in tasks by name: the public functions of this module that make a Task."""
    here = {n: f for n, f in globals().items() if inspect.isfunction(f) and f.__module__ == __name__}
    return {n: f for n, f in here.items() if f.__annotations__.get("return") == "Task" and not n.startswith("_")}


def find_task(asked: str | Factory) -> Found:
    """A built-in name, ``path/to/my_task.py[:factory]`` (default ``task``), or a factory that stands in a file."""
    if callable(asked):
        plain = inspect.unwrap(asked)
        path = inspect.getsourcefile(plain) if inspect.isfunction(plain) else None
        if path is None or not Path(path).is_file() or plain.__globals__.get(plain.__name__) is not asked:
            raise InputError("a task's factory is a top-level function in a file, so that every process can find it")
        asked = f"{path}:{plain.__name__}"
    if not isinstance(asked, str):
        raise InputError(f"a task is a name, path/to/my_task.py[:factory] or a factory; this is {asked!r}")
    if asked in (known := builtin()):
        return Found(asked, asked, known[asked], _sha(Path(__file__)))
    path, _, name = asked.partition(".py:")
    path, name = (f"{path}.py", name) if name else (asked, "task")
    if not path.endswith(".py"):
        there = f"there is {', '.join(known)}, or path/to/my_task.py[:factory]"
        raise InputError(f"no task {asked!r}; nearest: {nearest(asked, known)}; {there}")
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"no task file {path}")
    return Found(file.stem, f"{file}:{name}", _factory(file, name), _sha(file))


def refuse_while_importing() -> None:
    """A race started by the very file that holds its task would start itself again in every process."""
    if _importing:
        raise InputError(
            f'{_importing[-1].name} races while it is imported; put the race under if __name__ == "__main__":'
        )


def _factory(file: Path, name: str) -> Factory:
    own = f"_task_{file.stem}"  # not the file's bare name, which may be that of a library
    spec = importlib.util.spec_from_file_location(own, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # so that dataclasses and pickles inside it find their module
    _importing.append(file)
    sys.path.insert(0, str(file.parent))  # as `python my_task.py` would, for the modules beside it
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file.name} does not import: {type(error).__name__}: {one_line(error)}") from error
    finally:
        _importing.pop()
        sys.path.remove(str(file.parent))
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == own]
        raise InputError(f"{file.name} has no function {name!r}; it has {', '.join(functions) or 'none'}")
    return factory  # type: ignore[no-any-return]


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
