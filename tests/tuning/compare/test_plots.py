"""What the page's plots show, against what the sweeps' files say."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import visit
from tests.tuning.compare.make import SPACE, change_reports, make_sweep, write_record
from tests.tuning.compare.pages import Serve, becomes, document, drag, keys_of, plot, ready, rows
from tuning.keep import is_number
from tuning.lock import locked
from tuning.results import Sweep, TrialResult, read_sweep

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

Point = tuple[float | None, float | None]


def make_endings(folder: Path) -> Sweep:
    """A sweep whose trials ended in every way, each at a pace of its own."""
    make_sweep(folder, 25)
    for pace, trial in enumerate(sorted(folder.glob("t*")), 3):
        change_reports(trial, lambda report, pace=pace: {**report, "time_total_s": report["steps"] * pace / 8})
    change_reports(folder / "t005", lambda report: report, most=3)
    lost = {"eval_loss": math.inf, "train_loss": math.inf, "diverged": True}
    change_reports(folder / "t021", lambda report: {**report, **lost}, most=1)
    write_record(folder, "finished", 25, {"t005": "failed"})
    sweep = read_sweep(folder)
    ways = [trial.state for trial in sweep.trials]
    assert {way: ways.count(way) for way in set(ways)} == {"finished": 17, "stopped": 5, "diverged": 2, "failed": 1}
    return sweep


def points(trial: TrialResult, x: str, loss: str) -> list[Point]:
    """A trial's curve by its files; what is not finite is None."""
    return [(report[x], report[loss] if is_number(report[loss]) else None) for report in trial.reports]


def is_mark(trace: dict[str, Any]) -> bool:
    return trace["mode"] == "markers"


def curves_of(traces: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """The points of each trial that lines are drawn through."""
    found: dict[str, list[Point]] = {}
    for trace in traces:
        assert len(trace["customdata"]) == len(trace["x"]) == len(trace["y"])
        for key, x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True):
            if key is not None:
                found.setdefault(key, []).append((x, y))
    return found


def test_curves_and_how_they_ended(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = make_endings(tmp_path / "made")
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path / "made"))
        check_curves(page, sweep, "steps", "eval_loss")
        for choice, value, field, loss in (
            ("x", "seconds", "time_total_s", "eval_loss"),
            ("loss", "train_loss", "time_total_s", "train_loss"),
            ("x", "steps", "steps", "train_loss"),
        ):
            page.select_option(f"[data-choice={choice}]", value)
            check_curves(page, sweep, field, loss)


def check_curves(page: Page, sweep: Sweep, field: str, loss: str) -> None:
    """The lines and the marks at their ends, by fields of the trials' reports."""
    wanted = {f"made/{trial.name}": points(trial, field, loss) for trial in sweep.trials}
    ends: dict[str, dict[str, list[Point]]] = {}
    for trial in sweep.trials:
        finite = [point for point in points(trial, field, loss) if point[1] is not None]
        if trial.state != "finished" and finite:
            ends.setdefault(f"{trial.state} here", {})[f"made/{trial.name}"] = finite[-1:]
    many = {name: len(places) for name, places in ends.items()}
    assert many == {"stopped here": 5, "failed here": 1, "diverged here": 1}, "one diverged before it had a loss"
    becomes(lambda: curves_of(trace for trace in plot(page) if not is_mark(trace)), wanted)
    marks = [trace for trace in plot(page) if is_mark(trace)]
    assert {trace["name"]: curves_of([trace]) for trace in marks} == ends
    assert len({trace["marker"]["symbol"] for trace in marks}) == 3, "each way has a mark of its own"


def test_the_best_are_in_colour(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = make_endings(tmp_path / "made")
    names = [trial.name for trial in sweep.trials]
    last = next(trial.name for trial in reversed(sweep.trials) if trial.state == "finished")

    def lines() -> list[str]:
        return [trace["name"] for trace in reversed(plot(page)) if not is_mark(trace)]

    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path / "made"))
        becomes(lines, [*names[:10], "15 others"])
        colours = [trace["line"]["color"] for trace in plot(page) if not is_mark(trace)]
        assert len(set(colours)) == 11, "ten colours, and that of the others"
        assert is_mark(plot(page)[-1]), "what comes last lies on top: the ends, and the best above the others"
        faint = plot(page)[0]
        assert keys_of([faint]) == {f"made/{name}" for name in names[10:]}
        strokes: list[str] = page.evaluate(
            "[...document.querySelectorAll('#plot .scatterlayer .js-line')].map(line => getComputedStyle(line).stroke)"
        )
        assert len(set(strokes)) == 11
        page.fill("#query", "state!=finished")
        some = [trial for trial in sweep.trials if trial.state != "finished"]
        assert [trial.name for trial in some if not trial.best] == ["t021"], "and the other 7 are fewer than ten"
        becomes(lines, [*(trial.name for trial in some if trial.best), "1 others"])
        page.fill("#query", "")
        becomes(lambda: len(lines()), 11)
        page.click(f"tr[data-key='made/{last}'] button:text-is('pin')")
        becomes(lambda: sorted(lines()), sorted([*names[:10], f"{last} (pinned)", "14 others"]))
        dashed = [trace["name"] for trace in plot(page) if trace.get("line", {}).get("dash") == "dash"]
        assert dashed == [f"{last} (pinned)"]


@pytest.mark.slow
def test_a_brush_shrinks_the_table_and_every_other_plot(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "made", 40))
    rates = [math.log10(trial.knobs["learning_rate"]) for trial in sweep.trials]
    with visit(browser, height=1300) as seen:
        page = seen.page
        ready(page, serve(tmp_path / "made"), "knobs")
        drag(page, "learning_rate", 0.2, 0.7)
        expect(page.locator("#count")).to_have_text(re.compile(" of 40 trials"))
        brush = parse_qs(urlsplit(page.url).fragment)["brush"][0]
        low, high = map(float, brush.removeprefix("learning_rate=").split("~"))
        # Where the hand was: on a logarithmic axis, from a fifth below its top to seven tenths.
        span = max(rates) - min(rates)
        assert math.log10(high) == pytest.approx(max(rates) - 0.2 * span, abs=0.08 * span)
        assert math.log10(low) == pytest.approx(max(rates) - 0.7 * span, abs=0.08 * span)
        kept = [trial for trial in sweep.trials if low <= trial.knobs["learning_rate"] <= high]
        assert 5 < len(kept) < 35
        becomes(lambda: rows(page), [trial.name for trial in kept])
        drag(page, "rank", 0.05, 0.5)  # 16 and 32 of 4, 8, 16, 32
        kept = [trial for trial in kept if trial.knobs["rank"] >= 16]
        assert kept
        becomes(lambda: rows(page), [trial.name for trial in kept])
        expect(page.locator("#count")).to_have_text(f"{len(kept)} of 40 trials")
        keys = {f"made/{trial.name}" for trial in kept}
        page.click("[data-view=curves]")
        becomes(lambda: (len(plot(page)) > 1, keys_of(plot(page))), (True, keys))
        page.click("[data-view=size]")
        becomes(lambda: (plot(page)[-1]["name"], keys_of(plot(page)[:-1])), ("front", keys))
        page.click("[data-view=maps]")
        becomes(lambda: [keys_of([trace]) for trace in plot(page) if trace["type"] != "heatmap"], [keys] * 10)
        page.click("#chips button:has-text('brush: lr')")
        every = {f"made/{trial.name}" for trial in sweep.trials if trial.knobs["rank"] >= 16}
        becomes(lambda: keys_of(plot(page)), every)


def test_bars_of_importance_are_the_document_s(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "one", 30)
    make_sweep(tmp_path / "two", 24, seed=1, space={**SPACE, "weight_decay": {"uniform": [0.0, 0.1]}})
    url = serve(tmp_path)
    told = {
        sweep.id: {share.knob: (share.share, share.low, share.high) for share in sweep.importance.shares}
        for sweep in document(url).sweeps
        if sweep.importance
    }
    assert [*map(len, told.values())] == [5, 6]
    assert all(low < share < high for share, low, high in told["one"].values())
    with visit(browser) as seen:
        page = seen.page
        # Of all trials, whatever is filtered.
        ready(page, url, "importance", "q=rank%3D4")
        words: list[str] = page.evaluate("names => names.map(title)", [*told["two"]])
        knobs = dict(zip(words, told["two"], strict=True))
        traces = plot(page)
        assert [trace["name"] for trace in traces] == ["one", "two"]
        for trace in traces:
            bars = zip(trace["y"], trace["x"], trace["error_x"]["arrayminus"], trace["error_x"]["array"], strict=True)
            found = {knobs[name]: (x, x - minus, x + plus) for name, x, minus, plus in bars if x is not None}
            assert found.keys() == told[trace["name"]].keys()
            for knob, numbers in found.items():
                assert numbers == pytest.approx(told[trace["name"]][knob]), knob
        # They are drawn: as long as they say, each with its line.
        becomes(page.locator("#plot .errorbar .xerror").count, 11)
        boxes = [path.bounding_box() or {} for path in page.locator("#plot .bars .point path").all()[:6]]
        widths = [box.get("width", 0.0) for box in boxes]
        shares = [x or 0.0 for x in traces[0]["x"]]
        for (one, width), (other, its) in itertools.pairwise(sorted(zip(shares, widths, strict=True))):
            assert (one < other) == (width < its)


Sized = tuple[int, float]


def front_of(trials: Sequence[TrialResult]) -> set[Sized]:
    """The trials that no other is as good as in both, and better than in one: each against each."""
    found = [(trial.best["adapter_parameters"], trial.best["eval_loss"]) for trial in trials]

    def beats(one: Sized, other: Sized) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    return {one for one in found if not any(beats(other, one) for other in found)}


def test_the_front_of_sizes(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    rng = random.Random(4)
    for name, seed in (("one", 0), ("two", 1)):
        for trial in sorted(make_sweep(tmp_path / name, 30, seed=seed).glob("t*")):
            size = rng.choice([1000, 2000, 3000, 5000, 8000, 13000, 21000])
            change_reports(trial, lambda report, size=size: {**report, "adapter_parameters": size})
    change_reports(tmp_path / "one" / "t003", lambda report: {**report, "adapter_parameters": None})
    sweeps = [read_sweep(tmp_path / name) for name in ("one", "two")]

    def check(passes: Callable[[TrialResult], bool]) -> set[Sized]:
        sized: dict[str, dict[str, Sized]] = {}
        every: list[TrialResult] = []
        for sweep in sweeps:
            some = [trial for trial in sweep.trials if trial.best["adapter_parameters"] and passes(trial)]
            sized[sweep.folder.name] = {
                f"{sweep.folder.name}/{trial.name}": (trial.best["adapter_parameters"], trial.best["eval_loss"])
                for trial in some
            }
            every += some
        places = {key: place for some in sized.values() for key, place in some.items()}

        def drawn() -> dict[str, dict[str, Point]]:
            traces = plot(page)[:-1]
            return {trace["name"]: {key: at for key, [at] in curves_of([trace]).items()} for trace in traces}

        becomes(drawn, sized)
        front = plot(page)[-1]
        found = [*zip(front["x"], front["y"], strict=True)]
        assert found == sorted(front_of(every)), "smallest first"
        whole = {
            f"{sweep.folder.name}/{one.name}" for sweep in sweeps for one in sweep.trials if one.state == "finished"
        }
        for trace in plot(page)[:-1]:
            symbols = dict(zip(trace["customdata"], trace["marker"]["symbol"], strict=True))
            assert symbols == {key: "circle" if key in whole else "x" for key in symbols}
        assert [places[key] for key in front["customdata"]] == found
        expect(page.locator("#remark")).to_contain_text(f"{len(found)} trials that no smaller adapter beats")
        expect(page.locator("#remark")).to_contain_text(", ".join(front["customdata"]))
        return {*found}

    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path), "size")
        whole = check(lambda trial: True)
        assert 3 <= len(whole) < 30
        page.fill("#query", "targets!=all-linear")
        assert check(lambda trial: trial.knobs["target_modules"] != "all-linear") != whole


def sides(page: Page) -> dict[str, tuple[bool, list[str]]]:
    """The table of sweeps: by its rows' heads, whether a row is marked, and its cells."""
    return {
        head: (marked, cells)
        for head, marked, cells in page.evaluate("""[...document.querySelectorAll('#sides tbody tr')].map(row => [
            row.querySelector('th').textContent,
            getComputedStyle(row.querySelector('td')).backgroundColor === 'rgb(255, 243, 196)',
            [...row.querySelectorAll('td')].map(cell => cell.textContent),
        ])""")
    }


def test_sweeps_side_by_side(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "one", 24)
    base, train = {"model": "org/other", "revision": "v2"}, {"steps": 200, "eval_every": 40}
    live = make_sweep(tmp_path / "two", 20, seed=1, state="running", base=base, train=train)
    write_record(live, "running", 40, {})  # half of them have not begun
    with locked(live), visit(browser) as seen:
        sweeps = [read_sweep(tmp_path / name) for name in ("one", "two")]
        page = seen.page
        ready(page, serve(tmp_path), "sweeps")
        assert page.locator("#sides thead th").all_text_contents() == ["", " one", " two"]

        def wanted(passes: Callable[[TrialResult], bool]) -> dict[str, tuple[bool, list[str]]]:
            best = [next(trial for trial in sweep.trials if passes(trial)) for sweep in sweeps]
            ended = [sum(trial.state not in ("running", "waiting") for trial in sweep.trials) for sweep in sweeps]
            assert ended[0] == 24
            assert 0 < ended[1] < 20
            cells = {
                "state": ["finished", "running"],
                "trials ended of those planned": [f"{ended[0]} of 24", f"{ended[1]} of 40"],
                "best eval loss": [f"{trial.best['eval_loss']:.4f}" for trial in best],
                "its trial": [trial.name for trial in best],
                "its rank": [str(trial.knobs["rank"]) for trial in best],
                "base.model": ["org/base", "org/other"],
                "base.revision": ["\u2013", "v2"],
                "data.train": ["org/rows", "org/rows"],
                "steps of a trial": ["100", "200"],
                "searched": [", ".join(SPACE)] * 2,
                "ray (version)": ["2.60.0", "2.60.0"],
                "folder": [str(sweep.folder) for sweep in sweeps],
            }
            return {head: (one != other, [one, other]) for head, (one, other) in cells.items()}

        every = wanted(lambda trial: True)
        becomes(lambda: {head: row for head, row in sides(page).items() if head in every}, every)
        assert all(marked == (len(set(cells)) > 1) for marked, cells in sides(page).values())
        assert {marked for marked, _ in sides(page).values()} == {False, True}
        page.fill("#query", "targets=attention")
        some = wanted(lambda trial: trial.knobs["target_modules"] == "attention")
        assert some["its trial"] != every["its trial"]
        becomes(lambda: {head: row for head, row in sides(page).items() if head in some}, some)
        page.locator("[data-sweep=two]").uncheck()
        becomes(lambda: {marked for marked, _ in sides(page).values()}, {False})
