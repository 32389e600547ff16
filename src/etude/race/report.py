"""What a race found: a table for the terminal, JSON, and one HTML file that needs neither network nor script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from etude.race import _cards, _charts, _text
from etude.race._draw import colour, ranked, shown
from etude.race._forest import forest
from etude.race._model import Result
from etude.race._sheet import STYLES, Sheet, line
from etude.race.verdict import DIFFERENT, SAME


def table(result: Result) -> Sheet:
    """The standings, to print on a rich console."""
    return Sheet(result)


def to_json(result: Result) -> dict[str, Any]:
    """The whole result as plain JSON values; what is not finite is None."""
    plain = _plain(asdict(result))
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_html(result: Result, path: str | Path) -> None:
    """One self-contained file: figures are inline SVG, the data are embedded as JSON, nothing is loaded."""
    loader = jinja2.PackageLoader("etude.race", ".")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    Path(path).write_text(env.get_template("report.html").render(_page(result)), encoding="utf-8")


def _page(result: Result) -> dict[str, Any]:
    """What the template fills in; best first, and what nobody knows of these runs is left out."""
    standings, plan, own = ranked(result), result.plan, shown(result)
    spent = sum(o.seconds for o in result.outcomes)
    lines = [line(result, s) for s in standings]
    return {
        "plan": plan,
        "base": standings[0],
        "trained": bool(plan.aa_seeds),
        "trusted": {SAME: "yes", DIFFERENT: "no"}.get(result.aa.word, "unknown"),
        "headline": [(_slug(word), said) for word, said in _text.headline(result)],
        "notes": _text.notes(result),
        "lines": lines,
        "known": {
            name: any(getattr(each, name) not in ("", "–") for each in lines) for name in ("step", "state", "lr")
        },
        "slug": _slug,
        "forest": Markup(forest(result, wide=True)),
        "forest_narrow": Markup(forest(result, wide=False)),
        "panels": [(s, Markup(_charts.sensitivity(result, s))) for s in standings if s.tuned],
        "own": own,
        "legend": [(name, colour(result, name)) for name in own],
        "curves": [
            (f"{what}, {by}", Markup(_charts.curves(result, across, up, unit)))
            for what, up in ((_text.watched(plan), _charts.METRIC), ("train loss", _charts.LOSS))
            for by, across, unit in (("by step", _charts.STEP, "step"), ("by second", _charts.SECONDS, "seconds"))
            if any(o.curve for o in result.outcomes)
        ],
        "profiles": [
            (by, Markup(_charts.profile(_cards.reach(result), result, which, unit)))
            for by, which, unit in (("by step", 0, "step"), ("by second", 1, "seconds"))
            if any(o.curve for o in result.outcomes)
        ],
        "control": Markup(_charts.control(result)) if plan.aa_seeds else "",
        "columns": _cards.columns(result),
        "costs": [_cards.cost(result, s) for s in standings],
        "cards": [_cards.card(result, s) for s in standings],
        "total": _text.seconds(spent) if spent else "",
        "runs": len(result.outcomes),
        "failures": [(s.contender, s.failures) for s in standings if s.failures],
        "lock": json.dumps(_plain(result.lock), indent=2, ensure_ascii=False, sort_keys=True),
        "data": Markup(_embedded(result)),
        "watched": _text.watched(plan),
        "chosen": _text.chosen,
    }


def _embedded(result: Result) -> str:
    """The whole result, as it may stand in a script element; of one race always the same text."""
    text = json.dumps(to_json(result), separators=(",", ":"), allow_nan=False, sort_keys=True)
    return text.replace("<", "\\u003c")


def _slug(word: str) -> str:
    return word if word in STYLES else "neutral"
