"""The page in a real browser, as a person uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import visit
from tests.tuning.compare.make import SPACE, add_report, make_sweep, write_record
from tests.tuning.compare.pages import Serve, becomes, drag, ready, rows
from tests.tuning.make import write_checkpoint
from tests.waiting import wait_until
from tuning.compare.reader import Comparer
from tuning.compare.server import self_contained
from tuning.compare.source import LocalShelf
from tuning.lock import locked
from tuning.results import read_sweep

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

HOSTILE = '<script>window.stung=1</script><img src=x onerror="window.stung=1">'
VIEWS = ("curves", "knobs", "importance", "size", "maps", "sweeps")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_drawn(tmp_path: Path, browser: Browser, serve: Serve, scheme: Any) -> None:
    make_sweep(tmp_path / "one", 24)
    make_sweep(tmp_path / "two", 12, seed=1)
    drawn = {
        "curves": ".scatterlayer .trace path.js-line", "knobs": ".parcoords .y-axis", "importance": ".bars .point path",
        "size": ".scatterlayer .trace", "maps": ".heatmaplayer image", "sweeps": "#sides tr.differs",
    }  # fmt: skip
    with visit(browser, scheme=scheme) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        expect(page.locator("#count")).to_have_text("36 trials")
        for view, selector in drawn.items():
            page.click(f"[data-view={view}]")
            expect(page.locator(f"[data-view={view}]")).to_have_attribute("aria-selected", "true")
            page.wait_for_selector(f"#plot {selector}", state="attached")
            if view == "maps":
                expect(page.locator("#plot .colorbar")).to_have_count(1)
            if view == "knobs":
                line = page.evaluate("getComputedStyle(document.querySelector('#plot .parcoords .axis path')).stroke")
                assert line == ("rgb(154, 166, 180)" if scheme == "dark" else "rgb(93, 105, 120)")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 24, 29)" if scheme == "dark" else "rgb(255, 255, 255)")


def test_sort_by_any_column_and_back(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "made", 12))
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        assert rows(page) == [trial.name for trial in sweep.trials], "by the metric, as the leaderboard"
        page.click("th[data-column=learning_rate] button")
        expect(page.locator("th[data-column=learning_rate]")).to_have_attribute("aria-sort", "ascending")
        rates = [trial.knobs["learning_rate"] for trial in map(sweep.trial, rows(page))]
        assert rates == sorted(rates)
        page.click("th[data-column=learning_rate] button")
        expect(page.locator("th[data-column=learning_rate]")).to_have_attribute("aria-sort", "descending")
        rates = [trial.knobs["learning_rate"] for trial in map(sweep.trial, rows(page))]
        assert rates == sorted(rates, reverse=True)
        page.go_back()
        page.go_back()
        expect(page.locator("th[data-column=eval_loss]")).to_have_attribute("aria-sort", "ascending")


FILTERS: dict[str, Callable[[Any, str], bool]] = {
    "rank>=16": lambda knobs, state: knobs["rank"] >= 16,
    "lr<1e-3 state=finished": lambda knobs, state: knobs["learning_rate"] < 1e-3 and state == "finished",
    "targets=all-linear": lambda knobs, state: knobs["target_modules"] == "all-linear",
    "targets!=all-linear rank=4": lambda knobs, state: knobs["target_modules"] != "all-linear" and knobs["rank"] == 4,
    "q_proj+v": lambda knobs, state: knobs["target_modules"] == ["q_proj", "v_proj"],
    "DIVERGED": lambda knobs, state: state == "diverged",
    "alpha/rank=2 steps<100": lambda knobs, state: knobs["alpha"] == 2 * knobs["rank"] and state != "finished",
}


def test_filter(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "made", 24))
    with visit(browser) as seen:
        ready(seen.page, serve(tmp_path))
        for words, passes in FILTERS.items():
            wanted = [trial.name for trial in sweep.trials if passes(trial.knobs, trial.state)]
            assert 0 < len(wanted) < 24, words
            seen.page.fill("#query", words)
            expect(seen.page.locator("#count")).to_have_text(f"{len(wanted)} of 24 trials")
            assert rows(seen.page) == wanted
        assert "alpha%2Frank" in seen.page.url


def test_a_filter_that_nothing_passes(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "made", 12)
    with visit(browser) as seen:
        ready(seen.page, serve(tmp_path))
        drawn = "[drawn.view, JSON.parse(drawn.wanted)[0].q]"
        for view in VIEWS:
            seen.page.click(f"[data-view={view}]")
            seen.page.fill("#query", "rank>1000 ((")
            expect(seen.page.locator("#count")).to_have_text("0 of 12 trials")
            becomes(lambda: seen.page.evaluate(drawn), [view, "rank>1000 (("])  # without a complaint, of nothing


def test_pin_shows_differences_and_hide_leaves_out(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "made", 12))
    third = sweep.trials[2]
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        page.click(f"tr[data-key='made/{third.name}'] button:text-is('pin')")
        expect(page.locator("tr.pinned")).to_have_count(1)
        assert rows(page)[0] == third.name
        first = page.locator(f"tr[data-key='made/{sweep.trials[0].name}']")
        by = sweep.trials[0].best["eval_loss"] - third.best["eval_loss"]
        expect(first.locator("td[data-column=eval_loss] .delta.better")).to_have_text(f"\N{MINUS SIGN}{abs(by):.4f}")
        differs = first.locator("td[data-column=learning_rate]")
        expect(differs).to_have_class(re.compile("differs"))
        page.click(f"tr[data-key='made/{sweep.trials[0].name}'] button:text-is('hide')")
        expect(page.locator("#count")).to_have_text("11 of 12 trials")
        assert sweep.trials[0].name not in rows(page)
        page.click("#chips button:has-text('1 hidden')")
        expect(page.locator("#count")).to_have_text("12 trials")


def test_columns_can_be_left_out(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "made", 3)
    with visit(browser) as seen:
        ready(seen.page, serve(tmp_path))
        seen.page.click("#columns summary")
        seen.page.click("#columns label:has-text('tokens_per_second')")
        expect(seen.page.locator("th[data-column=tokens_per_second]")).to_have_count(0)


def test_a_brush_filters_the_table_and_the_other_plots(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "made", 40))
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path), "knobs")
        # Drag over the upper half of the first axis: ranks 16 and 32 of 4, 8, 16, 32.
        drag(page, "rank", 0.05, 0.5)
        kept = [trial.name for trial in sweep.trials if trial.knobs["rank"] >= 16]
        expect(page.locator("#count")).to_have_text(f"{len(kept)} of 40 trials")
        assert set(rows(page)) <= set(kept)
        assert "brush=rank" in page.url
        url = page.url
        page.click("[data-view=size]")
        page.wait_for_selector("#plot .scatterlayer")
        wait_until(lambda: page.evaluate("at('plot').data.slice(0, -1).flatMap(t => t.x).length") == len(kept))
        page.click("#chips button:has-text('brush: rank')")
        expect(page.locator("#count")).to_have_text("40 trials")
    with visit(browser) as again:
        again.page.goto(url)
        expect(again.page.locator("#count")).to_have_text(f"{len(kept)} of 40 trials")
        ranges = "at('plot').data?.[0].dimensions?.[0].constraintrange"
        wait_until(lambda: again.page.evaluate(ranges) == [[1.75, 2.25], [2.75, 3.25]])


def test_maps_of_more_knobs_than_fit_can_all_be_chosen(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    space = {**SPACE, "weight_decay": {"uniform": [0.0, 0.1]}, "beta1": {"uniform": [0.8, 0.95]}}
    make_sweep(tmp_path / "wide", 24, space=space)
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path), "maps")
        expect(page.locator("#remark")).to_contain_text("Of 7 knobs, the pairs of the 5 that matter most")
        maps = "at('plot').data.filter(trace => trace.type === 'heatmap').length"
        wait_until(lambda: page.evaluate(maps) == 10)
        names = page.evaluate("[...document.querySelectorAll('[data-choice=mx] option')].map(one => one.value)")
        assert len(names) == 1 + 7
        for name in names[1:]:
            page.select_option("[data-choice=mx]", name)
            axis = f"{page.evaluate('title', name)} \N{RIGHTWARDS ARROW}"
            becomes(lambda: page.evaluate(f"[at('plot').layout.xaxis.title.text, {maps}]"), [axis, 6])
            expect(page.locator("#remark")).not_to_contain_text("matter most")
        page.select_option("[data-choice=my]", "rank")
        wait_until(lambda: page.evaluate(maps) == 1)


def test_a_trial_s_page(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    folder = make_sweep(tmp_path / "made", 12)
    adapter = write_checkpoint(folder / "t003", 40, 0.001)
    (folder / "t005" / "error.txt").write_text("Traceback\nRuntimeError: no room")
    write_record(folder, "finished", 12, {"t005": "failed"})
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        page.click("tr[data-key='made/t003'] td[data-column=rank]")
        expect(page.locator("#trial h2")).to_have_text("t003 of made")
        expect(page.locator("#trial")).to_contain_text(f"loraloom publish {folder} --trial t003 --name made")
        expect(page.locator("#trial")).to_contain_text(str(adapter))
        expect(page.locator("#trial")).to_contain_text(
            f"loraloom sweep {folder}/sweep.yaml --dir runs/reproduced/made-t003"
        )
        config = read_sweep(folder).spec.planned()
        assert config
        told = {
            "learning_rate": f"{config[3].learning_rate:.4g}", "base.model": "org/base", "data.max_length": "1024",
            "ray (version)": "2.60.0",
        }  # fmt: skip
        for name, value in told.items():
            expect(page.locator(f"#config tr:has(th:text-is('{name}')) td")).to_have_text(value)
        exactly = page.locator("#config tr:has(th:text-is('learning_rate')) td")
        expect(exactly).to_have_attribute("title", str(config[3].learning_rate))
        page.wait_for_selector("#trial-curve .scatterlayer .trace")
        page.click("#back")
        page.click("tr[data-key='made/t005'] td[data-column=rank]")
        expect(page.locator("#trial pre")).to_have_text("RuntimeError: no room")
        page.go_back()
        expect(page.locator("#trial")).to_be_hidden()
        page.goto(page.url.split("#")[0] + "#trial=made/nothing")
        expect(page.locator("#trial")).to_contain_text("No trial made/nothing here")


def test_a_running_sweep_is_followed(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    folder = make_sweep(tmp_path / "made", 12, state="running")
    with visit(browser) as seen, locked(folder):
        page = seen.page
        ready(page, serve(tmp_path))
        expect(page.locator("#live")).to_have_text("live")
        add_report(folder / "t006", 120, 0.0123)
        expect(page.locator("tr[data-key] td[data-column=eval_loss]").first).to_have_text("0.0123")
        assert rows(page)[0] == "t006"
        wait_until(lambda: page.evaluate("Math.max(...at('plot').data.flatMap(t => t.x))") == 120)
        make_sweep(tmp_path / "later", 3)
        expect(page.locator("[data-sweep=later]")).to_be_checked()
        expect(page.locator("#count")).to_have_text("15 trials")


def test_a_sweep_whose_driver_is_gone_is_not_live(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    folder = make_sweep(tmp_path / "made", 3, state="running")
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        expect(page.locator("#sweeps")).to_contain_text(
            re.compile(r"running, last news 20\d\d-\d\d-\d\d \d\d:\d\d UTC")
        )
        expect(page.locator("#live")).to_have_text("")
        expect(page.locator("#resume")).to_be_hidden()
        with locked(folder):
            expect(page.locator("#live")).to_have_text("live")
            expect(page.locator("#sweeps")).not_to_contain_text("last news")
        expect(page.locator("#resume")).to_contain_text("made was interrupted. To go on:")
        expect(page.locator("#resume code")).to_have_text(f"loraloom sweep --resume {folder}")
        expect(page.locator("#live")).to_have_text("")
        page.locator("[data-sweep=made]").uncheck()
        expect(page.locator("#resume")).to_be_hidden()


def test_a_server_that_is_gone_is_told_of(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "made", 3)
    page = browser.new_page()
    ready(page, serve(tmp_path))
    page.route("**/data.json*", lambda route: route.abort())
    expect(page.locator("#live")).to_contain_text("not up to date")
    page.unroute("**/data.json*")
    expect(page.locator("#live")).to_have_text("")
    page.close()


def test_what_is_hostile_is_text(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    space = {"target_modules": {"choice": [[HOSTILE], "attention"]}, "rank": {"choice": [2, 4, 8, 16, 32]}}
    base = {"model": f"org/{HOSTILE}"}
    folder = make_sweep(tmp_path / "a<b>&c", 10, space=space, search={"trials": 10}, base=base, name="made")
    (folder / "t000" / "error.txt").write_text(HOSTILE)
    write_record(folder, "finished", 10, {"t000": "failed", "t001": "stopped"})
    (tmp_path / "broken <b>").mkdir()
    (tmp_path / "broken <b>" / "sweep.json").write_text(HOSTILE)
    url = serve(tmp_path)
    with visit(browser) as seen:
        page = seen.page
        for view in VIEWS:
            ready(page, url, view)
            assert page.evaluate("window.stung") is None
            assert page.locator("#plot img, #plot script, #scroller img, main script").count() == 0
        expect(page.locator(f"td[data-column=target_modules][title={json.dumps(HOSTILE)}]").first).to_have_text(HOSTILE)
        expect(page.locator("#sweeps")).to_contain_text("a<b>&c")
        expect(page.locator("#troubles")).to_contain_text("broken <b>")
        page.click(f"tr[data-key={json.dumps('a<b>&c/t000')}] td[data-column=rank]")
        expect(page.locator("#trial pre")).to_have_text(HOSTILE)
        page.click("#back")
        expect(page.locator("#trial")).to_be_hidden()
        page.locator(f"td[data-column=target_modules][title={json.dumps(HOSTILE)}]").first.click()
        expect(page.locator("#config")).to_be_visible()
        expect(page.locator("#config")).to_contain_text(HOSTILE)
        page.fill("#query", HOSTILE)
        expect(page.locator("#chips .unknown")).to_have_count(2)  # it reads as a filter of columns src and onerror
        assert page.evaluate("window.stung") is None
        for key in ("trial", "view", "brush", "pin", "sort", "mx", "my", "x", "off", "hide", "cols", "theme", "q"):
            page.goto("about:blank")
            page.goto(f"{url}#{key}={quote(HOSTILE)}")
            becomes(lambda: page.evaluate("Boolean(drawn.view || drawn.trial)"), True)
            assert page.locator("body img, main script").count() == 0, key
            assert page.evaluate("window.stung") is None


def test_an_address_that_is_damaged_shows_the_page_all_the_same(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "made", 12)
    url = serve(tmp_path)
    words = (
        "brush=rank",
        "brush=rank=:%25",
        "hide=100%25",
        "sort=constructor",
        "view=toString",
        "x=foo",
        "loss=__proto__",
    )
    with visit(browser) as seen:
        for view, word in (*(("curves", word) for word in words), ("knobs", words[0]), ("maps", "mx=valueOf")):
            seen.page.goto("about:blank")
            ready(seen.page, url, view, word)
            expect(seen.page.locator("#count")).to_have_text("12 trials")


def test_a_brush_means_numbers_whatever_the_axis_becomes(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    folder = make_sweep(tmp_path / "made", 12, state="running")
    scores = [trial.best["eval_loss"] for trial in read_sweep(folder).trials]
    low, high = scores[2] - 1e-6, scores[6] + 1e-6
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path), "knobs", f"brush=eval_loss%3D{low}~{high}")
        expect(page.locator("#count")).to_have_text("5 of 12 trials")
        assert page.evaluate("parallelAxes().at(-1).log") is False
        for steps in (120, 140):
            add_report(folder / "t011", steps, 0.001)
        wait_until(lambda: page.evaluate("parallelAxes().at(-1).log"))
        expected = sum(low <= trial.best["eval_loss"] <= high for trial in read_sweep(folder).trials)
        expect(page.locator("#count")).to_have_text(f"{expected} of 12 trials")


def test_a_trial_s_page_is_left_alone_while_other_trials_report(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    folder = make_sweep(tmp_path / "made", 3, state="running")
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path), choice="trial=made/t000")
        page.evaluate("at('trial').querySelector('h2').dataset.mine = '1'")
        add_report(folder / "t001", 120, 0.0123)
        expect(page.locator("tr[data-key='made/t001'] td[data-column=eval_loss]")).to_have_text("0.0123")
        expect(page.locator("#trial h2")).to_have_attribute("data-mine", "1")
        add_report(folder / "t000", 120, 0.0456)
        expect(page.locator("#trial .facts").first).to_contain_text("0.0456")


def test_a_press_is_a_click_whatever_comes_before_the_hand_lets_go(
    tmp_path: Path, browser: Browser, serve: Serve
) -> None:
    folder = make_sweep(tmp_path / "made", 12, state="running")
    with visit(browser) as seen:
        page = seen.page
        steps = page.locator("tr[data-key='made/t001'] td[data-column=steps]")

        def press(target: str, reported: int) -> None:
            """Hold it down until the page has been told of another report, and would have drawn it."""
            page.focus("#query")
            page.locator(target).hover()
            page.mouse.down()
            before = page.evaluate("loom.news")
            add_report(folder / "t001", reported, 0.5)
            wait_until(lambda: page.evaluate("loom.news") > before)
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

        ready(page, serve(tmp_path), choice="brush=rank%3D0~100")
        press("#chips button:has-text('brush: rank')", 500)
        page.mouse.up()
        expect(page.locator("#chips button")).to_have_count(0)
        press("tr[data-key='made/t001'] button:text-is('pin')", 600)
        page.mouse.up()
        expect(page.locator("tr.pinned")).to_have_attribute("data-key", "made/t001")
        press("tr[data-key='made/t001'] td[data-column=rank]", 700)
        assert "600" in steps.inner_text()
        page.locator("#count").hover()
        page.mouse.up()
        expect(steps).to_contain_text("700")  # no click, and nothing is lost
        assert page.locator("#trial").is_hidden()
        press("tr[data-key='made/t001'] td[data-column=rank]", 800)
        page.mouse.up()
        expect(page.locator("#trial h2")).to_have_text("t001 of made")
        expect(steps).to_contain_text("800")


def test_a_tap_is_a_click_on_what_was_tapped(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    """A finger's click comes after its release, to whatever is at its place by then."""
    sweep = read_sweep(make_sweep(tmp_path / "made", 12))
    first = sweep.trials[0].name
    with visit(browser, touch=True) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        # As if it were drawn at the worst moments: when the finger comes down, and when it lifts.
        page.evaluate("""() => {
            addEventListener('pointerdown', () => choose({ sort: 'trial', down: '1' }, true));
            for (const moment of ['pointerdown', 'pointerup']) addEventListener(moment, () => unpressed(render));
        }""")
        page.locator(f"tr[data-key='made/{first}'] td[data-column=rank]").tap()
        expect(page.locator("#trial h2")).to_have_text(f"{first} of made")
        page.go_back()
        becomes(lambda: rows(page), sorted((trial.name for trial in sweep.trials), reverse=True))


def test_a_thousand_trials(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "many", 1000)
    with visit(browser) as seen:
        page = seen.page
        ready(page, serve(tmp_path))
        expect(page.locator("#count")).to_have_text("1,000 trials")
        assert page.locator("tr[data-key]").count() < 100, "only the rows in sight are in the page"
        page.evaluate("at('scroller').scrollTop = at('scroller').scrollHeight")
        last = read_sweep(tmp_path / "many").trials[-1].name
        expect(page.locator("tr[data-key] td[data-column=trial]").last).to_have_text(last)
        page.fill("#query", "rank=4")
        expect(page.locator("#count")).to_have_text(re.compile(r"^2\d\d of 1,000 trials$"))


def test_a_narrow_screen_needs_no_sideways_scrolling(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    folder = make_sweep(tmp_path / "a-sweep-with-quite-a-long-name-that-goes-on", 12)
    with visit(browser, width=360, height=740) as seen:
        page = seen.page
        url = serve(folder)
        for view in VIEWS:
            ready(page, url, view)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
            # The axes of the knobs need room: their plot alone scrolls, by itself.
            becomes(lambda: page.evaluate("at('panel').scrollWidth > at('panel').clientWidth"), view == "knobs")
            assert page.locator("#plot .colorbar").count() == 0
        expect(page.locator("#link")).to_be_visible()
        page.click("tr[data-key] td[data-column=state] >> nth=0")
        page.wait_for_selector("#trial-curve .scatterlayer .trace")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_one_file_is_the_same_page_without_a_server(tmp_path: Path, browser: Browser) -> None:
    folder = make_sweep(tmp_path / "made", 24)
    document = Comparer([LocalShelf(folder)], live=False).document(wait=True)
    (tmp_path / "page.html").write_text(self_contained(document), encoding="utf-8")
    with visit(browser) as seen:
        for view in VIEWS:
            ready(seen.page, (tmp_path / "page.html").as_uri(), view)
        expect(seen.page.locator("#count")).to_have_text("24 trials")
        assert rows(seen.page)[:3] == [trial.name for trial in read_sweep(folder).trials[:3]]


def test_the_place_of_grafana_takes_ray_s_theme_and_says_what_it_is(
    tmp_path: Path, browser: Browser, serve: Serve
) -> None:
    make_sweep(tmp_path / "made", 3)
    url = serve(tmp_path)
    with visit(browser, scheme="light") as seen:
        seen.page.goto(f"{url}d/rayDefaultDashboard/?orgId=1&theme=dark&kiosk=1&refresh=5s")
        seen.page.wait_for_selector("tr[data-key]")
        expect(seen.page.locator("#note")).to_contain_text("not Grafana")
        expect(seen.page.locator("#link")).to_have_attribute("title", re.compile("as long as this Ray runs.*secret"))
        assert seen.page.evaluate("document.documentElement.dataset.theme") == "dark"
        seen.page.goto(url)
        expect(seen.page.locator("#link")).to_have_attribute("title", "Copy the address of this view")
