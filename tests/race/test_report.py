"""The report: a table that fits a terminal, JSON that round-trips, one HTML file that asks nothing of anyone."""

import html.parser
import json
import math
import random
import re
from dataclasses import replace

import pytest
from rich.console import Console

from etude.race import _cards, _draw, _forest, _sheet, _text, report, verdict
from etude.race._model import Cell, Outcome, Plan, Result
from etude.race.search import search_of

STEPS = 1500
CONTENDERS = {  # final error, its slope in log lr, lr, seconds per step, bytes, correlation with the seed
    "adamw": (0.0412, 0.012, 3.16228e-3, 2.1e-4, 27_600, 0.7),
    "muon": (0.0371, 0.009, 2e-2, 4.0e-4, 14_300, 0.4),
    "adamw + dyt + zero_init": (0.0399, 0.012, 3.16228e-3, 1.9e-4, 27_000, 0.8),
    "lion": (0.0410, 0.015, 3.16228e-4, 1.8e-4, 13_800, 0.7),
    "sgd(momentum=0.9)": (0.0478, 0.02, 0.1, 1.5e-4, 13_800, 0.5),
    "prodigy": (0.0441, 0.01, 1.0, 3.3e-4, 55_200, 0.6),
}


def curve(rng, end, step_seconds, until=STEPS):
    points = []
    for step in range(STEPS // 10, until + 1, STEPS // 10):
        rest = 1 - step / STEPS
        noise = 1 + 0.06 * rest * rng.gauss(0, 1)
        points.append((step, step * step_seconds, noise * (end * 2.2 + 1.1 * rest**3), noise * (end + 0.1 * rest**2)))
    return tuple(points)


def run(contender, stage, lr, seed):
    end, slope, best, step_seconds, state, rho = CONTENDERS[contender]
    rng = random.Random(f"{contender}{stage}{lr}{seed}")
    shared = random.Random(f"{stage}{seed}").gauss(0, 1)
    off = math.log10(lr / best) - (0.9 if contender == "prodigy" else 0)
    metric = end + slope * off**2 + 0.0022 * (rho * shared + math.sqrt(1 - rho**2) * rng.gauss(0, 1))
    cell = Cell(contender, stage, lr, seed)
    if off > 0.7 or (contender == "sgd(momentum=0.9)" and stage == "final" and seed % 3):
        reason = f"diverged at step {450 + 30 * (seed % 3)}: loss is nan"
        until = curve(rng, end, step_seconds, 450)
        return Outcome(cell, None, reason, (*until, (450, 0.1, math.nan, math.inf)), 0.1, step_seconds, state)
    points = curve(rng, metric, step_seconds)
    return Outcome(cell, metric, "", points, STEPS * step_seconds, step_seconds, state)


def fake(minimize=True):
    """A race of six: one better, one equal or nearly, one that diverges on most seeds, one at the edge of its grid."""
    grids = {c: tuple(float(f"{v[2] * 10 ** (k / 2):.6g}") for k in range(-3, 4)) for c, v in CONTENDERS.items()}
    plan = Plan(
        task="digits", metric="test error", minimize=minimize, steps=STEPS, baseline="adamw",
        contenders=tuple(CONTENDERS), grids=grids, tune_seeds=(0, 1, 2), final_seeds=tuple(range(1000, 1010)),
        aa_seeds=tuple(range(2000, 2010)),
        visible=verdict.visible_effect(10, 5),
    )  # fmt: skip
    outcomes = []
    for contender in plan.contenders:
        tuning = []
        search = search_of(plan, contender)
        while trials := search.ask(tuning):
            tuning += [run(contender, "tune", lr, plan.tune_seeds[i]) for (lr, _), i in trials]
        lr = search.choose(tuning).lr
        outcomes += tuning + [run(contender, "final", lr, seed) for seed in plan.final_seeds]
        if contender == plan.baseline:
            outcomes += [run(contender, "aa", lr, seed) for seed in plan.aa_seeds]
    standings, aa = verdict.judge(plan, outcomes)
    return Result(plan, standings, aa, tuple(outcomes), {"torch": "2.13.0", "data": "sha256:</script>1f"}, None)


@pytest.fixture(scope="module")
def result():
    return fake()


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_html(result, path)
    return path.read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """What a browser would load, the text it would show, and the tags it would have to guess the end of."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.loads, self.text, self.ids, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [found[k] for k in ("src", "href", "srcset", "data", "xlink:href") if found.get(k)]
        self.ids += [found["id"]] if "id" in found else []
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def printed(result, width):
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(report.table(result))
    return captured.get()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_holds_every_word_and_interval_uncut(result, width):
    shown = printed(result, width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    words = " ".join(shown.split())
    for standing in result.standings:
        assert _text.rate(standing.lr) in words
        if standing.interval:
            low, high = (_text.number(v, (standing.interval[1] - standing.interval[0]) / 2) for v in standing.interval)
            assert f"[{low}, {high}]" in words
    for word in {s.word for s in result.standings} - {"no significant difference"}:
        assert word in words
    open_ = sum(s.word == "no significant difference" for s in result.standings)
    assert len(re.findall(r"\bsignificant\b", shown)) == open_ > 0
    assert len(re.findall(r"difference(?!s|,)", shown)) == open_
    assert verdict.SAME in words


def test_r8_the_table_tells_what_was_visible_what_is_open_and_what_failed(result):
    words = " ".join(printed(result, 120).split())
    assert "This race could see differences of" in words
    undecided = next(s for s in result.standings if s.more)
    assert f"bout {undecided.more:,} more seeds would probably decide {undecided.contender} (" in words
    failed = next(s for s in result.standings if s.word == "failed")
    assert f"{failed.contender}: {len(failed.failures)} of 10 final runs failed (diverged at step" in words


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({"lion": 990}, "About 990 more seeds would probably decide lion (11.1 min)"),
        ({"lion": 1}, "About 1 more seed would probably decide lion (673 ms)"),
        ({"lion": 991}, "No number of seeds this race allows would decide lion"),
        ({"lion": None}, "No number of seeds this race allows would decide lion"),
        (
            {"lion": 2, "muon": 3, "prodigy": None},
            "About 3 more seeds would probably decide muon (2.02 s), about 2 lion (1.35 s); "
            "no number of seeds this race allows would decide prodigy",
        ),
    ],
)
def test_r8_what_more_seeds_cost_is_all_that_would_run_again_over_the_workers(result, more, shown):
    seconds = dict.fromkeys(CONTENDERS, 0.1) | {"adamw": 0.423}  # 5 · 0.1 + 2 · 0.423, for the control runs again too
    plan = replace(result.plan, workers=2, seconds_per_run=seconds)

    def undecided(s):
        word = "no significant difference" if s.contender in more else "worse"
        return replace(s, word=word, more=more.get(s.contender))

    base, *others = result.standings
    assert _text._open(replace(result, plan=plan, standings=(base, *map(undecided, others)))) == shown


def test_more_seeds_are_not_offered_where_they_would_mend_nothing(result):
    base, other = (replace(s, failures=()) for s in result.standings[:2])
    other = replace(other, word="no significant difference", more=5)
    for broken in (replace(other, failures=("…",)), replace(other, difference=0.0), replace(other, word="better")):
        assert _text._open(replace(result, standings=(base, other))) != ""
        assert _text._open(replace(result, standings=(base, broken))) == ""


def test_r13_without_test_data_it_is_said_that_tuning_and_verdict_share_the_validation_data(result):
    said = "learning rates and verdict are taken on the same validation data"
    shared = replace(result, plan=replace(result.plan, metric="validation error"))
    assert [sum(said in line for _, line in _text.notes(r)) for r in (result, shared)] == [0, 1]


def test_earlier_looks_are_noted(result):
    lines = [line for _, line in _text.notes(replace(result, looks=(6, 8)))]
    assert "Judged before at 6 and 8 seeds: p-values are of a single look." in lines


@pytest.mark.parametrize("width", [80, 100, 200])
def test_names_break_only_after_spaces_commas_and_parentheses(result, width):
    long = "sgd(momentum=0.9, nesterov=True) + zero_init"
    renamed = {"sgd(momentum=0.9)": long}

    def rename(s):
        return replace(s, contender=renamed.get(s.contender, s.contender))

    plan = replace(result.plan, contenders=tuple(renamed.get(c, c) for c in result.plan.contenders))
    shown = printed(replace(result, plan=plan, standings=tuple(map(rename, result.standings))), width)
    assert max(map(len, shown.splitlines())) <= width
    rows = shown.split("A/A control")[0]
    for part in ("sgd(", "momentum=0.9,", "nesterov=True)", "zero_init"):
        assert part in rows
    assert (f"{long} " in rows) == (width == 200)
    assert _text.folded("sgd(weight_decay=0.001)", 14) == "sgd(\nweight_decay=\n0.001)"


def test_a_contender_of_which_every_run_failed_has_a_dash_for_its_learning_rate(result, tmp_path):
    odd = everything_failed(result)
    assert all(_sheet.line(odd, s).lr == "–" for s in odd.standings)
    assert "at the edge" not in printed(odd, 120)
    report.write_html(odd, tmp_path / "odd.html")
    assert "lr –</small>" in (tmp_path / "odd.html").read_text(encoding="utf-8")


def test_what_is_taken_on_validation_data_is_called_so_where_the_verdict_is_on_test_data(page):
    assert "<h3>validation error, by step</h3>" in page
    assert "adamw: validation error by learning rate" in page
    assert "first stands at adamw's median final validation error" in page
    assert not re.search(r"test error(, by| by (learning|step|second))", page)


def test_r12_the_target_of_a_curve_is_taken_on_the_data_of_the_curve(result):
    """With test data apart, metrics far from the curves change nothing about who reaches what."""
    far = tuple(replace(o, metric=o.metric and o.metric + 100) for o in result.outcomes)
    standings, aa = verdict.judge(result.plan, far)
    moved = replace(result, standings=standings, aa=aa, outcomes=far)
    for s, t in zip(result.standings, standings):
        assert _cards._reach(result, s) == _cards._reach(moved, t)
    assert sum(r is not None for r in _cards._reach(moved, standings[0])) == 5


def test_the_page_loads_nothing(page):
    reader = Reader(page)
    assert reader.open == []
    assert [place for place in reader.loads if not place.startswith("#")] == ["data:,"]
    assert {place[1:] for place in reader.loads if place.startswith("#")} <= set(reader.ids)
    assert not re.search(r"@import|https?:|url\((?!#)|<script(?! type=\"application/json\")", page)


def test_the_page_holds_every_contender_word_and_number_of_the_table(result, page):
    text = " ".join(" ".join(Reader(page).text).split())
    for standing in result.standings:
        assert text.count(standing.contender) >= 4  # table, cost, panel, card
        assert standing.word in text
        if standing.word not in ("baseline", "failed"):
            assert text.count(_text.difference(standing, result.standings[0])) >= 2  # forest and table
    assert verdict.SAME in text


def test_the_figures_take_their_colours_from_the_page_and_their_ids_are_unique(page):
    assert len(page.split("<svg ")) - 1 == 2 + len(CONTENDERS) + 6 + 1
    used = set(re.findall(r"(?:fill|stroke)=\"(?!none|transparent)([^\"]*)\"", page))
    assert all(colour.startswith("var(--") for colour in used), used
    for name in used:
        assert f"{name[4:-1]}:" in page  # defined by the page
    ids = Reader(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_the_same_result_gives_the_same_page(result, page, tmp_path):
    report.write_html(result, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_json_round_trips_and_has_no_nan_though_the_curves_do(result, page):
    assert any(math.isnan(p[2]) for o in result.outcomes for p in o.curve)
    plain = report.to_json(result)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [s["word"] for s in plain["standings"]] == [s.word for s in result.standings]
    assert plain["standings"][1]["difference"] == result.standings[1].difference
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(embedded) == plain


def test_the_forest_ranks_the_best_first_and_the_failed_last(result):
    ranked = sorted(result.standings[1:], key=lambda s: _draw.rank(s, True))
    assert [ranked[0].contender, ranked[-1].word] == ["muon", "failed"]
    differences = [s.difference for s in ranked[:-1]]
    assert differences == sorted(differences)
    survivors = replace(ranked[-1], difference=-1.0)  # its few survivors may look the best
    assert sorted([survivors, *ranked], key=lambda s: _draw.rank(s, True))[0] is ranked[0]


def test_a_bar_beyond_the_axis_is_cut_and_carries_an_arrow(result):
    base, *others = result.standings
    others[0] = replace(others[0], difference=1.0, difference_interval=(0.9, 1.1), bootstrap_interval=None, values=())
    factor, _ = _text.scale(base)
    span = _forest._span(others, base, factor, 1.0)
    bar = _forest._bar(0, others[0], base, span)
    assert span[1] < factor * 0.9
    assert bar["outside"]
    assert bar["arrows"] == [(span[1], "▶")]
    assert bar["low"] == bar["high"] == span[1]
    assert bar["blow"] is None
    others[0] = replace(others[0], difference_interval=(0.0, 0.0), bootstrap_interval=(-1.0, 0.0))
    bar = _forest._bar(0, others[0], base, span)
    assert (bar["blow"], bar["bhigh"]) == (span[0], 0.0)
    assert (bar["thin"], bar["arrows"]) == ([(span[0], "◀")], [])


def test_the_forest_says_that_its_intervals_are_before_holm(page):
    assert "intervals before Holm's adjustment" in page


def test_r12_time_to_target_counts_runs_that_never_arrive_as_infinitely_late(result):
    by_name = {s.contender: s for s in result.standings}
    cost = _cards.cost(result, by_name["adamw"])
    assert cost["reached"] == "5 of 10"  # half of the baseline's runs are at or below their median
    assert _cards.cost(result, by_name["prodigy"])["steps"] == "–"
    assert _cards._middle([(10, 1.0), None, (20, 2.0)], 0) == 20
    assert _cards._middle([None, None, (20, 2.0)], 0) is None
    assert _cards._middle([(10, 1.0), None], 0) == 10  # half arrive: so does the baseline by its own target
    assert cost["steps"] != "–"


def everything_failed(result):
    dead = tuple(replace(o, metric=None, reason="raised MemoryError: …", curve=()) for o in result.outcomes)
    standings, aa = verdict.judge(result.plan, dead)
    return replace(result, standings=standings, aa=aa, outcomes=dead)


def identical(result):
    flat = tuple(replace(o, metric=0.0, reason="", curve=((10, 0.1, 0.0, 0.0),)) for o in result.outcomes)
    standings, aa = verdict.judge(result.plan, flat)
    return replace(result, standings=standings, aa=aa, outcomes=flat)


@pytest.mark.parametrize("change", [everything_failed, identical])
def test_an_odd_race_is_reported_too(result, tmp_path, change):
    odd = change(result)
    report.write_html(odd, tmp_path / "odd.html")
    text = (tmp_path / "odd.html").read_text(encoding="utf-8")
    assert Reader(text).open == []
    assert not re.search(r">[^<]*\b(nan|inf|None)\b", text.split('<script type="application/json"')[0])
    assert odd.aa.word in " ".join(printed(odd, 80).split())
    json.dumps(report.to_json(odd), allow_nan=False)


def test_a_race_not_to_be_trusted_says_so_first(result):
    standing = replace(result.aa, word=verdict.DIFFERENT, p=0.001)
    kind, line = _text.notes(replace(result, aa=standing))[0]
    assert (kind, line) == ("bad", "A/A control: different: do not trust this race (p = 0.001).")


def test_the_baseline_at_the_edge_of_its_grid_is_pointed_out(result):
    base = replace(result.standings[0], at_edge=True)
    lines = [line for _, line in _text.notes(replace(result, standings=(base, *result.standings[1:])))]
    assert "adamw's lr is at the edge of its grid; mistrust “better”." in lines


def test_markup_in_a_name_is_text(result, tmp_path):
    def rename(s):
        return replace(s, failures=("final seed 1: <script src=x>",)) if s.word == "failed" else s

    renamed = replace(result, standings=tuple(map(rename, result.standings)))
    report.write_html(renamed, tmp_path / "x.html")
    assert "<script src" not in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "half", "signed", "shown"),
    [
        (-8.31, 2.7, True, "−8.3"), (0.03123, 0.0022, False, "0.0312"), (17.2, 12.0, True, "+17"),
        (1234.6, 50, False, "1235"),
        (-0.004, 2.7, True, "0.0"), (0.0, None, True, "0.00"), (3.14159, None, False, "3.14"),
        (1e-9, 1e-10, False, "1.00e−09"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_their_uncertainty_earns(value, half, signed, shown):
    assert _text.number(value, half, signed) == shown


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (_text.seconds(2.1e-4), "210 µs"), (_text.seconds(0.0135), "13.5 ms"), (_text.seconds(47), "47 s"),
        (_text.seconds(600), "10 min"), (_text.seconds(9000), "2.5 h"), (_text.seconds(None), "–"),
        (_text.size(27_600), "27.6 kB"), (_text.size(0), "0 B"), (_text.size(1000), "1 kB"), (_text.size(None), "–"),
        (_text.chance(1e-9), "< 0.0001"), (_text.listed(["a", "b", "c"]), "a, b and c"),
        (_text.ratio(3.0, 2.0), "1.50×"),
    ],
)  # fmt: skip
def test_units_fit(shown, expected):
    assert shown == expected


def test_colours_follow_the_plan_and_the_baseline_is_ink(result):
    assert _draw.colour(result, "adamw") == "var(--c0)"
    assert len({_draw.colour(result, c) for c in CONTENDERS}) == len(CONTENDERS)
