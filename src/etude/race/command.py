"""A command as what is raced on: its runs are processes, and the metric is what they print or write."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from etude import recipes
from etude._words import nearest
from etude.race import _supervise
from etude.race._errors import InputError
from etude.race._model import Cell, Opened, Outcome

SCHEME = "command:"
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
OWN = ("rule", "lr", "seed")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
TAIL = 4_000
"""Bytes of stderr that are read for the reason of a failure."""
Point = tuple[int, float, float, float]


@dataclass(frozen=True)
class Command:
    """``{rule}``, ``{lr}`` and ``{seed}`` in ``argv`` are filled in for each run, as is any ``{name}`` of a contender.

    A contender is a word for ``{rule}`` and ``name=value`` for other places: ``"muon momentum=0.9"``. The ``metric`` is
    read from the last line of JSON on stdout that holds it, or from ``metric_file``: JSON, lines of JSON or one number.
    ``lr``: the centre of the grid where the catalogue does not know the rule. ``timeout``: seconds of one run.
    """

    argv: tuple[str, ...]
    metric: str = "val_loss"
    maximize: bool = False
    metric_file: str | None = None
    lr: float | None = None
    timeout: float | None = None
    cwd: str = "."
    threads: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, ref: str) -> Command:
        """The command behind its ``ref``."""
        held = json.loads(ref.removeprefix(SCHEME))
        return cls(**{**held, "argv": tuple(held["argv"]), "threads": tuple(map(tuple, held["threads"]))})

    @property
    def ref(self) -> str:
        return SCHEME + json.dumps(self.__dict__)

    @property
    def name(self) -> str:
        """The first file that the program is given, else the program."""
        files = (Path(word) for word in self.argv[1:] if (Path(self.cwd) / word).is_file())
        return next(files, Path(self.argv[0])).stem

    @property
    def places(self) -> set[str]:
        """The names in braces."""
        return {name for text in (*self.argv, self.metric_file or "") for name in PLACE.findall(text)}

    def entry(self, asked: str) -> tuple[str, float]:
        """The contender with its words set apart by one blank, and its learning rate; 0 where there is none to tune."""
        words = dict(_words(asked))
        centre = words.pop("lr", None) if "lr" in self.places else None
        if missing := sorted(self.places - {*OWN} - words.keys()):
            raise InputError(f"the command has {{{missing[0]}}}; say it with the contender: '{asked} {missing[0]}=…'")
        if extra := sorted(words.keys() - self.places - {"rule"}):
            raise InputError(f"the contender {asked!r} gives {extra[0]}, but the command has no {{{extra[0]}}}")
        rule = words.pop("rule")
        if "rule" not in self.places and rule:
            raise InputError(f"the contender {asked!r} names {rule!r}, but the command has no {{rule}}")
        text = " ".join([rule] * bool(rule) + [f"{name}={value}" for name, value in words.items()])
        return text, self._centre(rule, centre, asked) if "lr" in self.places else 0.0

    def knobs(self, contender: str) -> dict[str, Any]:
        """What beside lr can be tuned: nothing, a contender says its other values itself."""
        return {}

    def _centre(self, rule: str, given: str | None, asked: str) -> float:
        """What the contender says, else the command's ``lr``, else the catalogue."""
        try:
            found = float(given) if given is not None else self.lr or recipes.parse(rule).parts[0].method.knobs["lr"]
            if 0 < float(found) < 1000:
                return float(found)
        except (ValueError, KeyError, TypeError):
            pass
        wrong = f"lr={given}" if given is not None else "no learning rate to start from"
        raise InputError(f"the contender {asked!r} has {wrong}; give one with --lr, or as '{rule} lr=0.001'")

    def open(self, seed: int) -> Opened:
        """Its lock: the words of the command, and the content of the files among them."""
        if "seed" not in self.places:
            raise InputError(
                "the command has no {seed}: without fresh seeds there is no verdict; add e.g. --seed {seed}"
            )
        files = {word: _sha(path) for word in self.argv if (path := Path(self.cwd) / word).is_file()}
        lock = {"command": list(self.argv), "metric_file": self.metric_file, "files": files, "timeout": self.timeout}
        return Opened(0, self.metric, not self.maximize, lock, probed=False, workers=1)

    def probe(self, contender: str, *, lr: float, steps: int, device: str, whole: bool) -> dict[str, Any]:
        """A command cannot be tried for a few steps: its first runs tell what it costs."""
        raise InputError(f"{self.name}: a command is not probed")

    def train(self, cell: Cell, *, steps: int, device: str) -> Outcome:
        """One process, to its end or its timeout. Whatever goes wrong is an outcome with its reason."""
        values = {**dict(_words(cell.contender)), **dict(cell.more), "lr": f"{cell.lr:.6g}", "seed": str(cell.seed)}
        argv = [_filled(word, values) for word in self.argv]
        file = Path(self.cwd, _filled(self.metric_file, values)) if self.metric_file else None
        before = file.stat().st_mtime_ns if file and file.is_file() else None
        began = time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            code, late, lines = self._run(argv, errors)
            said = _last_line(errors)
        seconds = time.perf_counter() - began
        curve = tuple(p for at, held in lines if (p := self._point(at, held)) is not None)
        metric, reason = None, ""
        if late:
            reason = f"timed out after {self.timeout:g} s"
        elif code:
            reason = f"exit {code}: {said}" if code < 128 else f"killed by signal {code - 128}: {said}"
        else:
            metric, reason = self._metric([held for _, held in lines], file, before)
        return Outcome(cell, metric, reason, curve, seconds, None, None)

    def _run(self, argv: Sequence[str], errors: IO[bytes]) -> tuple[int, bool, list[tuple[float, dict[str, Any]]]]:
        """Exit code, whether it was late, and every line of JSON with the seconds at which it came."""
        env = {k: v for k, v in os.environ.items() if k not in THREADS} | dict(self.threads)
        lines, late = [], threading.Event()
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-I", _supervise.__file__, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, cwd=self.cwd, env=env,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None

            def stop() -> None:
                late.set()
                process.stdin.close()  # type: ignore[union-attr]

            timer = threading.Timer(self.timeout or threading.TIMEOUT_MAX, stop)
            timer.daemon = True
            timer.start()
            told = ((time.perf_counter() - began, _json(line)) for line in process.stdout)
            lines = [(at, held) for at, held in told if held is not None]
            code = process.wait()
            timer.cancel()
        return code, late.is_set(), lines

    def _metric(
        self, lines: Sequence[Mapping[str, Any]], file: Path | None, before: int | None
    ) -> tuple[float | None, str]:
        """The metric, or why there is none."""
        where = "a line of JSON on stdout"
        if file is not None:
            where = str(file)
            if not file.is_file() or file.stat().st_mtime_ns == before:
                return None, f"it wrote no {file}"
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            lines = [held for held in [_json(text.encode()), *map(_json, text.encode().splitlines())] if held]
            if not lines and (number := _number(text)) is not None:
                lines = [{self.metric: number}]
        found = [value for held in lines if (value := _number(_get(held, self.metric))) is not None]
        if not found:
            known = {key for held in lines for key in held}
            near = f"; nearest: {nearest(self.metric, known)}" if known else ""
            return None, f"no {self.metric!r} in {where}{near}"
        return (found[-1], "") if math.isfinite(found[-1]) else (None, f"the metric is {found[-1]} at the end")

    def _point(self, seconds: float, held: Mapping[str, Any]) -> Point | None:
        """A point of the curve, where a line tells step, training loss and metric."""
        step, metric = _number(held.get("step")), _number(_get(held, self.metric))
        loss = _number(held.get("train_loss", held.get("loss")))
        return None if step is None or metric is None or loss is None else (int(step), seconds, loss, metric)


def command(argv: str | Sequence[str], *, cwd: str | Path | None = None, **given: Any) -> str:
    """A command line as the task of a race: ``etude.race(command("python train.py … {seed}"), ["adamw", "muon"])``.

    ``given``: the fields of `Command` (metric, maximize, metric_file, lr, timeout).
    """
    words = tuple(shlex.split(argv) if isinstance(argv, str) else argv)
    if not words:
        raise InputError("a command has at least one word: … -- python train.py --lr {lr} --seed {seed}")
    threads = tuple((name, os.environ[name]) for name in THREADS if name in os.environ)
    return Command(words, cwd=str(Path(cwd or ".").resolve()), threads=threads, **given).ref


def _words(contender: str) -> list[tuple[str, str]]:
    """``"muon momentum=0.9"`` → rule and values by name; a recipe's own calls, ``lion(betas=…)``, are the rule."""
    try:
        words = shlex.split(contender)
    except ValueError as error:
        raise InputError(f"the contender {contender!r}: {error}") from error
    named = [w.partition("=") for w in words if re.match(r"[A-Za-z_]\w*=", w)]
    rule = " ".join(w for w in words if not re.match(r"[A-Za-z_]\w*=", w))
    return [("rule", rule), *((name, value) for name, _, value in named)]


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return PLACE.sub(lambda m: str(values.get(m[1], m[0])), text)


def _json(line: bytes) -> dict[str, Any] | None:
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        held = json.loads(line)
    except ValueError:
        return None
    return held if isinstance(held, dict) else None


def _get(held: Mapping[str, Any], name: str) -> Any:
    """``held[name]``, or ``held["a"]["b"]`` for ``a.b``."""
    if name in held:
        return held[name]
    head, dot, rest = name.partition(".")
    return _get(held[head], rest) if dot and isinstance(held.get(head), Mapping) else None


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _last_line(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - TAIL))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it said nothing on stderr"


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
