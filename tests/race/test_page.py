"""The report's page: for thirty contenders and for runs that etude did not train; on a phone, in print, in the dark."""

import random
import re
import time

import pytest
import test_report
from browser import Browser, found
from test_report import Reader

from etude.race import _draw, _forest, _text, report
from etude.race.finished import verdict as verdict_of

OTHERS = (
    "lamb", "normuon + rms_norm", "adamw(betas=(0.9, 0.95), weight_decay=0.1) + qk_norm",
    "cautious(adamw) + dyt(alpha=0.8) + zero_init + swa(start=1200)", "soap", "shampoo", "adan", "nadamw", "radam",
    "schedule_free", "adopt", "mars", "grams", "lars", "novograd", "yogi", "adabelief", "adagrad", "rmsprop", "signum",
    "tiger", "ademamix", "sophia", "came",
)  # fmt: skip
browsed = pytest.mark.skipif(found() is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def many():
    """A race of thirty."""
    rng = random.Random(5)
    more = {
        name: (0.036 + 0.012 * rng.random(), 0.01, 10 ** rng.uniform(-4, -1), 1e-4 * rng.uniform(1.5, 5), 13_800, 0.5)
        for name in OTHERS
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_report, "CONTENDERS", {**test_report.CONTENDERS, **more})
        return test_report.fake()


@pytest.fixture(scope="module")
def pages(many, tmp_path_factory):
    """Name → file: thirty contenders, two, and a table of runs, paired and not."""
    folder = tmp_path_factory.mktemp("pages")
    base, *others = many.standings
    plan = test_report.replace(many.plan, contenders=("adamw", "muon"))
    two = test_report.replace(many, plan=plan, standings=(base, others[0]))
    rows = [
        f"{rule},{seed},{0.5 + 0.01 * (seed % 3) - 0.02 * (rule == 'b')}"
        for rule in ("a", "b", "c")
        for seed in range(8)
    ]
    (folder / "runs.csv").write_text("\n".join(["rule,seed,loss", *rows]), "utf-8")
    results = {"many": many, "two": two}
    results |= {
        name: verdict_of(folder / "runs.csv", "loss", "rule", p) for name, p in (("paired", "seed"), ("free", None))
    }
    for name, result in results.items():
        report.write_html(result, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in results}


@pytest.fixture(scope="module")
def browser():
    with Browser() as page:
        yield page


def shown(file):
    """The text of a page."""
    return " ".join(" ".join(Reader(file.read_text("utf-8")).text).split())


# ---- what the file says


def test_of_many_contenders_a_sentence_names_a_few_and_counts_the_others(many):
    for _, said in _text.headline(many):
        assert len(re.findall(r", | and ", re.sub(r"\([^()]*(\([^()]*\))?[^()]*\)", "", said))) < _text.NAMED
    word = "no significant difference"
    open_ = sum(s.word == word for s in many.standings)
    said = dict(_text.headline(many))[word]
    assert f"and {open_ - _text.NAMED + 1} others show" in said
    undecided = next(line for kind, line in _text.notes(many) if kind == "open")
    assert re.search(r"more for \d+ others", undecided)
    counts = [int(n) for n in re.findall(r"bout ([\d,]+)", undecided)]
    assert counts == sorted(counts)


def test_of_many_the_baseline_and_the_best_keep_their_colours_and_stand_open(many, pages):
    own = _draw.shown(many)
    assert own[0] == "adamw"
    assert own[1:] == [s.contender for s in _draw.ranked(many)[1 : _draw.COLOURS]]
    assert len({_draw.colour(many, name) for name in own}) == len(own) == _draw.COLOURS
    assert {_draw.colour(many, s.contender) for s in many.standings} - {_draw.colour(many, n) for n in own} == {"var(--faint)"}  # fmt: skip
    text = pages["many"].read_text("utf-8")
    folded = re.findall(r'<details class="more">(.*?)</details>', text, re.DOTALL)
    assert [part.count("<h3>") for part in folded] == [22, 22]  # panels, cards
    heads = {re.split(" <small", head)[0] for part in folded for head in re.findall(r"<h3>(.*?)</h3>", part)}
    assert heads == {s.contender for s in many.standings} - {*own}


def test_the_page_has_the_best_first_in_every_table(many, pages):
    text = pages["many"].read_text("utf-8")
    for table in re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL):
        names = re.findall(r'<td class="name"[^>]*>([^<]*)</td>', table)
        assert names == [s.contender for s in _draw.ranked(many)]


def test_names_never_take_more_lines_than_their_row_has(many):
    _, *others = many.standings
    bars = [_forest._bar(i, s, many.standings[0], (-30.0, 30.0), 2) for i, s in enumerate(others)]
    assert max(bar["name"].count("\n") for bar in bars) == 1
    assert any(bar["name"].endswith("…") for bar in bars)


@pytest.mark.parametrize("kind", ["paired", "free"])
def test_of_runs_that_etude_did_not_train_nothing_is_told_that_nobody_knows(pages, kind):
    text = shown(pages[kind])
    page = pages[kind].read_text("utf-8").split('<script type="application/json"')[0]
    assert "No A/A control: etude did not train these runs." in text
    for word in ("Learning rates", "Training", "Cost", "Can this race", "tuning run", "steps", "step", " lr ", "state"):
        assert word not in text, word
    assert "fresh" not in text
    assert "0 runs" not in text
    assert set(re.findall(r'href="#(\w+)"', page)) == {"verdict", "fair", "behind"}
    assert ("on the same seeds" in text) == (kind == "paired")
    assert ("Welch's t (unpaired) decides" in text) == (kind == "free")
    assert ("Dots: one per seed" in text) == (kind == "paired")
    dots = page.partition("<table>")[0].count('opacity="0.42"')
    assert dots == (2 * 2 * 8 if kind == "paired" else 0)  # two figures, two contenders, eight seeds
    assert ("<h1>Loss: 2 contenders against a</h1>") in page
    table = test_report.printed(verdict_of(pages[kind].parent / "runs.csv", "loss", "rule", "seed"), 80)
    assert not re.search(r"\bstep\b|\bstate\b|\blr\b", table)


def test_a_page_of_500_runs_is_small(many, pages):
    assert pages["many"].stat().st_size * 500 / len(many.outcomes) < 3e6


def test_the_profile_ends_at_the_share_of_runs_that_arrived(many):
    """R12: runs that never arrive hold the line down."""
    from etude.race import _cards, _charts

    reached = _cards.reach(many)
    seen = []

    def spy(layers, *a, **k):
        seen.extend(layers[0]["data"]["values"])
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_charts, "draw", spy)
        _charts.profile(reached, many, 0, "step")
    for name, runs in reached.items():
        line = [row for row in seen if row["contender"] == name]
        share = 100 * sum(r is not None for r in runs) / len(runs)
        assert line[-1]["y"] == pytest.approx(share)
        assert [row["x"] for row in line] == sorted(row["x"] for row in line)
        assert line[-1]["x"] == test_report.STEPS


# ---- what a browser shows

SMALL = """[...document.querySelectorAll('svg')].filter(s => s.clientWidth).map(s => {
  const scale = s.getBoundingClientRect().width / s.viewBox.baseVal.width;
  return Math.min(...[...s.querySelectorAll('text')].filter(t => /[\\p{L}\\d]/u.test(t.textContent)).map(
    t => parseFloat(getComputedStyle(t).fontSize) * scale));
}).filter(isFinite)"""
OVERLAPS = """[...document.querySelectorAll('.forest svg')].filter(s => s.clientWidth).flatMap(s => {
  const found = [...s.querySelectorAll('text')].filter(t => /[\\p{L}\\d]/u.test(t.textContent)).map(
    t => [t.textContent, t.getBoundingClientRect()]);
  return found.flatMap(([a, r], i) => found.slice(i + 1).filter(([b, q]) =>
    Math.min(r.right, q.right) - Math.max(r.left, q.left) > 1 &&
    Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top) > 4).map(([b]) => [a, b]));
})"""
OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length &&
  !e.closest('pre, .skip, thead') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
LIGHT = "getComputedStyle(document.body).%s.match(/[\\d.]+/g).slice(0, 3).map(Number)"


@browsed
@pytest.mark.parametrize("kind", ["many", "two", "paired", "free"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_and_reads_at_every_width(browser, pages, kind, width):
    browser.size(width)
    browser.open(pages[kind])
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OUTSIDE) == []
    assert browser.run(OVERLAPS) == []
    assert min(browser.run(SMALL)) >= 9.5  # px
    sizes = "[...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && e.innerText?.trim()).map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.run(sizes)) >= 12


@browsed
def test_it_is_dark_where_that_is_preferred_and_never_on_paper(browser, pages):
    bright = {}
    for name, how in {"light": {}, "dark": {"dark": True}, "paper": {"dark": True, "media": "print"}}.items():
        browser.size(1280, **how)
        browser.open(pages["two"])
        bright[name] = [sum(browser.run(LIGHT % what)) / 765 for what in ("backgroundColor", "color")]
    assert bright["light"][0] > 0.9 > 0.2 > bright["light"][1]
    assert bright["dark"][0] < 0.2 < 0.8 < bright["dark"][1]
    assert bright["paper"][0] > 0.9 > 0.2 > bright["paper"][1]


@browsed
def test_it_prints_on_few_pages_without_what_only_a_screen_can_do(browser, pages, tmp_path):
    browser.size(1280)
    browser.open(pages["many"])
    browser.pdf(tmp_path / "page.pdf")
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) <= 12
    hidden = browser.run(
        "[...document.querySelectorAll('nav, .narrow, details:not([open])')].map(e => e.getClientRects().length)"
    )
    assert set(hidden) == {0}
    assert browser.run("document.querySelector('.forest svg').getBoundingClientRect().height") < 1000  # one sheet of A4


@browsed
def test_the_keyboard_reaches_the_verdict_the_sections_and_what_is_folded(browser, pages):
    browser.size(1280)
    browser.open(pages["many"])
    browser.key("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    reached = []
    for _ in range(20):
        browser.key("Tab", 9)
        reached.append(browser.run("document.activeElement.getAttribute('href') || document.activeElement.tagName"))
        if reached[-1] == "SUMMARY":
            break
    assert reached[0] == "#verdict"
    assert reached[-1] == "SUMMARY"
    assert not browser.run("document.activeElement.parentElement.open")
    browser.key("Enter", 13, text="\r")
    assert browser.run("document.activeElement.parentElement.open")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") != "none"


@browsed
def test_it_opens_in_under_two_seconds(browser, pages):
    browser.size(360)
    began = time.perf_counter()
    browser.open(pages["many"])
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert time.perf_counter() - began < 2
