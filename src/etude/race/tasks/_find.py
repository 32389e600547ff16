"""How a task is found: by a built-in name, in a file, or put together from a model and a data file."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, urlencode

from etude._words import nearest
from etude.race._checkpoint import from_checkpoint
from etude.race._errors import InputError, one_line
from etude.race.data import HUB
from etude.race.task import Factory
from etude.race.tasks._parts import from_parts

OPTIONS = ("data", "target", "checkpoint")
"""What may stand after the ``?`` of a reference: a data file, what is predicted, the weights that runs start from."""
_importing: list[str] = []


@dataclass(frozen=True)
class Found:
    """A task's factory and short name, the reference that finds it from another process, its source's sha256.

    ``checkpoint``: the sha256 of the weights that runs start from, or "".
    """

    name: str
    ref: str
    factory: Factory
    source: str
    checkpoint: str = ""


@functools.cache
def builtin() -> dict[str, Factory]:
    """The built-in tasks by name: the public functions of the modules here that make a Task."""
    package = importlib.import_module("etude.race.tasks")
    found: dict[str, Factory] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")):
        module = importlib.import_module(f"etude.race.tasks.{name}")
        own = [f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        makers = [f for f in own if f.__annotations__.get("return") == "Task" and not f.__name__.startswith("_")]
        found |= {name if f.__name__ == "task" else f"{name}:{f.__name__}": f for f in makers}
    return found


def find_task(asked: str | Factory, **options: Any) -> Found:
    """A built-in name, ``path/to/my_task.py[:factory]`` (default ``task``), or a factory that stands in a file.

    ``options``: with ``data`` and ``target`` the task is put together, and ``asked`` is its model, see `from_parts`;
    ``checkpoint`` holds the weights from which every run starts. They ride in the reference, after a ``?``.
    """
    if callable(asked):
        plain = inspect.unwrap(asked)
        path = inspect.getsourcefile(plain) if inspect.isfunction(plain) else None
        if path is None or not Path(path).is_file() or plain.__globals__.get(plain.__name__) is not asked:
            raise InputError("a task's factory is a top-level function in a file, so that every process can find it")
        asked = f"{path}:{plain.__name__}"
    if not isinstance(asked, str):
        raise InputError(f"a task is a name, path/to/my_task.py[:factory] or a factory; this is {asked!r}")
    asked, _, held = asked.partition("?")
    given = {**dict(parse_qsl(held)), **{k: str(v) for k, v in options.items() if v is not None}}
    if unknown := given.keys() - set(OPTIONS):
        raise InputError(f"a task takes no {', '.join(sorted(unknown))} after ?; it takes {', '.join(OPTIONS)}")
    files = {k: _file(k, v) for k, v in given.items() if k != "target"}
    found = _assembled(asked, given, files) if {"data", "target"} & given.keys() else _named(asked)
    if not given:
        return found
    ref = f"{found.ref}?{urlencode({k: str(files.get(k) or v) for k, v in sorted(given.items())}, safe='/:')}"
    if (start := files.get("checkpoint")) is None:
        return replace(found, ref=ref)
    return replace(found, ref=ref, factory=from_checkpoint(found.factory, start), checkpoint=_sha(start))


def _named(asked: str) -> Found:
    """A built-in task, or a factory in a file."""
    known = builtin()
    if asked in known:
        name = asked.replace(":", "-")  # it names a folder
        return Found(name, asked, known[asked], _sha(Path(inspect.getfile(known[asked]))))
    if not asked.endswith(".py") and ".py:" not in asked:
        there = f"there is {', '.join(known)}, or path/to/my_task.py[:factory]"
        raise InputError(f"no task {asked!r}; nearest: {nearest(asked, known)}; {there}")
    file, name = _parted(asked)
    factory = _in_module(_load(file), name or "task", file.name)
    return Found(file.stem, f"{file}:{name or 'task'}", factory, _sha(file))


def _assembled(asked: str, given: Mapping[str, str], files: Mapping[str, Path | None]) -> Found:
    """A task from a model and a data file."""
    if missing := {"data", "target"} - given.keys():
        raise InputError(f"a task from parts needs data and target; there is no {', '.join(missing)}")
    models = importlib.import_module("etude.race.models")
    source = ""
    if asked in models.__all__:
        model, ref = getattr(models, asked), asked
    elif asked.endswith(".py") or ".py:" in asked:
        file, name = _parted(asked)
        model, ref, source = (
            _in_module(_load(file), name or "model", file.name),
            f"{file}:{name or 'model'}",
            _sha(file),
        )
    elif ":" in asked:
        where, _, name = asked.partition(":")
        module = _import(where)
        model, ref = _in_module(module, name, where), asked
        source = _sha(Path(module.__file__)) if module.__file__ else ""
    else:
        there = f"{', '.join(models.__all__)}, module:Class or path/to/file.py:Class"
        raise InputError(f"no model {asked!r}; nearest: {nearest(asked, models.__all__)}; a model is {there}")
    data = str(files["data"] or given["data"])
    return Found(ref.split(":")[-1], ref, from_parts(ref, model, data, given["target"]), source)


def refuse_while_importing() -> None:
    """A race started by the very file that holds its task would start itself again in every process."""
    if _importing:
        raise InputError(f'{_importing[-1]} races while it is imported; put the race under if __name__ == "__main__":')


def _parted(asked: str) -> tuple[Path, str]:
    """``path/to/file.py[:name]`` as the file and the name."""
    path, _, name = asked.partition(".py:")
    path = f"{path}.py" if name else asked
    if not (file := Path(path).resolve()).is_file():
        raise InputError(f"no task file {path}")
    return file, name


def _file(option: str, path: str) -> Path | None:
    if option == "data" and path.startswith(HUB):
        return None
    if not (file := Path(path).resolve()).is_file():
        raise InputError(f"no {option} file {path}")
    return file


def _load(file: Path) -> ModuleType:
    own = f"_task_{file.stem}"  # not the file's bare name, which may be that of a library
    spec = importlib.util.spec_from_file_location(own, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module  # so that dataclasses and pickles inside it find their module
    loader = spec.loader
    _run_import(file.name, str(file.parent), lambda: loader.exec_module(module))  # as `python my_task.py` would
    return module


def _import(name: str) -> ModuleType:
    """A module by its name, from the folder one stands in too, as ``python -m`` would find it."""
    _run_import(name, str(Path.cwd()), lambda: importlib.import_module(name))
    return sys.modules[name]


def _run_import(name: str, beside: str, load: Any) -> None:
    _importing.append(name)
    sys.path.insert(0, beside)
    try:
        load()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} does not import: {type(error).__name__}: {one_line(error)}") from error
    finally:
        _importing.pop()
        sys.path.remove(beside)


def _in_module(module: ModuleType, name: str, where: str) -> Any:
    found = getattr(module, name, None)
    if not callable(found):
        here = [n for n, f in vars(module).items() if callable(f) and getattr(f, "__module__", "") == module.__name__]
        raise InputError(f"{where} has no function {name!r}; it has {', '.join(here) or 'none'}")
    return found


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
