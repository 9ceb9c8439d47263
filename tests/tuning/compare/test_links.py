"""An address shows what was seen where it was copied; so does the browser's history, and what is copied is right."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import visit
from tests.tuning.compare.make import make_sweep
from tests.tuning.compare.pages import Serve, becomes, document, ready, rows
from tests.tuning.make import write_checkpoint
from tests.waiting import wait_until
from tuning.results import read_sweep

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

Seen = dict[str, Any]
CHOICES = {"view", "off", "q", "sort", "down", "pin", "hide", "cols", "x", "loss", "mx", "my", "theme"}
SEEN = """() => {
  const all = (selector, of) => [...document.querySelectorAll(selector)].map(of);
  const text = element => element.innerText;
  const isOpen = id => !document.getElementById(id).hidden;
  const traces = id => (document.getElementById(id)?.data ?? []).map(trace => ({
    name: trace.name, type: trace.type, x: trace.x, y: trace.y, z: trace.z, keys: trace.customdata,
    colours: [trace.line?.color, trace.line?.dash, trace.marker?.color], dimensions: trace.dimensions,
  }));
  return {
    title: document.title,
    theme: document.documentElement.dataset.theme,
    ground: getComputedStyle(document.body).backgroundColor,
    count: text(document.getElementById('count')),
    query: document.getElementById('query').value,
    off: all('#sweeps input:not(:checked)', box => box.dataset.sweep),
    chips: all('#chips button', text),
    heads: all('#scroller th[data-column]', head => [head.dataset.column, head.getAttribute('aria-sort')]),
    rows: all('tr[data-key]', text),
    pinned: all('tr.pinned', row => row.dataset.key),
    columns_off: all('#columns input:not(:checked)', box => box.dataset.held),
    view: isOpen('panel') && all('[data-view][aria-selected=true]', tab => tab.dataset.view),
    choices: isOpen('panel') && Object.fromEntries(all('[data-choice]', one => [one.dataset.choice, one.value])),
    plot: isOpen('panel') && traces('plot'),
    remark: isOpen('panel') && text(document.getElementById('remark')),
    trial: isOpen('trial') && [text(document.getElementById('trial')), traces('trial-curve')],
  };
}"""


def look(page: Page) -> Seen:
    """All that the page shows and an address can tell."""
    return page.evaluate(SEEN)


def once(page: Page, condition: Callable[[Seen], bool]) -> Seen:
    """What the page shows, once it shows what is asked for."""
    becomes(lambda: condition(look(page)), True)
    return look(page)


def keys(seen: Seen) -> set[str]:
    """The trials in the plot."""
    return {key for trace in seen["plot"] for key in trace["keys"] or [] if isinstance(key, str)}


def maps(seen: Seen) -> int:
    return sum(trace["type"] == "heatmap" for trace in seen["plot"])


def words(page: Page) -> dict[str, str]:
    """What stands in the address."""
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).fragment).items()}


@pytest.mark.slow
def test_an_address_shows_elsewhere_what_was_seen(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    planned = {"a": 14, "b, c&d": 6, "e": 10}
    sweeps = [read_sweep(make_sweep(tmp_path / name, many, seed=many, name="s")) for name, many in planned.items()]
    url = serve(tmp_path)
    shown = [
        (trial.knobs["learning_rate"], f"{sweep.folder.name}/{trial.name}")
        for sweep in (sweeps[0], sweeps[2])
        for trial in sweep.trials
        if trial.knobs["rank"] >= 8
    ]
    *_, pinned, hidden = order = [key for _, key in sorted(shown, key=lambda each: (-each[0], each[1]))]
    with visit(browser) as seen:
        page = seen.page
        ready(page, url)
        page.locator("[data-sweep='b, c&d']").uncheck()
        page.locator("#query").press_sequentially("rank>=8")
        expect(page.locator("#count")).to_have_text(f"{len(order)} of 24 trials")
        for direction in ("ascending", "descending"):
            page.click("th[data-column=learning_rate] button")
            expect(page.locator("th[data-column=learning_rate]")).to_have_attribute("aria-sort", direction)
        assert page.locator("tr[data-key]").evaluate_all("rows => rows.map(row => row.dataset.key)") == order
        page.click(f"tr[data-key='{pinned}'] button:text-is('pin')")
        page.click(f"tr[data-key='{hidden}'] button:text-is('hide')")
        page.click("#columns summary")
        page.click("#columns label:has-text('dropout')")
        page.select_option("[data-choice=x]", "seconds")
        page.select_option("[data-choice=loss]", "train_loss")
        page.click("#theme")
        expect(page.locator("#theme")).to_have_text("light")
        left = {*order} - {hidden}
        times = {step / 10 for step in range(20, 101, 20)}
        curves = once(page, lambda seen: keys(seen) == left and {*seen["plot"][0]["x"]} - {None} <= times)
        assert rows(page) == [key.split("/")[-1] for key in [pinned, *order] if key != hidden][: len(left)]
        assert curves["count"] == f"{len(left)} of 24 trials"
        assert (curves["theme"], curves["ground"]) == ("dark", "rgb(20, 24, 29)")
        assert (curves["pinned"], curves["off"], curves["columns_off"]) == ([pinned], ["b, c&d"], ["dropout"])
        assert curves["choices"] == {"x": "seconds", "loss": "train_loss"}
        assert ["learning_rate", "descending"] in curves["heads"]
        assert "dropout" not in dict(curves["heads"])
        page.click("[data-view=maps]")
        page.select_option("[data-choice=mx]", "learning_rate")
        page.select_option("[data-choice=my]", "rank")
        both = {"mx": "learning_rate", "my": "rank"}
        drawn = once(page, lambda seen: maps(seen) == 1 and seen["choices"] == both and keys(seen) == left)
        assert words(page).keys() == CHOICES
        address = page.url
    with visit(browser) as seen:
        page = seen.page
        page.goto(address)
        becomes(lambda: look(page), drawn)
        page.click("[data-view=curves]")
        becomes(lambda: look(page), curves)
        # Typed over another address in the same page, too.
        page.goto(f"{url}#view=size")
        once(page, lambda seen: seen["count"] == "30 trials" and seen["plot"][-1]["name"] == "front")
        page.goto(address)
        becomes(lambda: look(page), drawn)
        page.reload()
        becomes(lambda: look(page), drawn)


@pytest.mark.slow
def test_back_and_forward(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    sweep = read_sweep(make_sweep(tmp_path / "a", 14))
    best = sweep.trials[0].name
    large = sum(trial.knobs["rank"] >= 8 for trial in sweep.trials[1:])
    assert 0 < large < 13
    make_sweep(tmp_path / "b", 8, seed=1)
    steps: list[tuple[Callable[[Page], None], Callable[[Seen], bool]]] = [
        (lambda page: page.click("[data-view=size]"), lambda seen: seen["plot"][-1]["name"] == "front"),
        (
            lambda page: page.click("th[data-column=learning_rate] button"),
            lambda seen: ["learning_rate", "ascending"] in seen["heads"],
        ),
        (
            lambda page: page.click(f"tr[data-key='a/{best}'] button:text-is('hide')"),
            lambda seen: seen["count"] == "21 of 22 trials" and f"a/{best}" not in keys(seen),
        ),
        (
            lambda page: page.locator("[data-sweep=b]").uncheck(),
            lambda seen: seen["off"] == ["b"] and [trace["name"] for trace in seen["plot"]] == ["a", "front"],
        ),
        (lambda page: page.click("[data-view=maps]"), lambda seen: maps(seen) == 10),
        (lambda page: _select(page, "mx", "rank"), lambda seen: maps(seen) == 4),
        (lambda page: _select(page, "my", "dropout"), lambda seen: maps(seen) == 1),
        (
            lambda page: page.click("tr[data-key='a/t003'] td[data-column=rank]"),
            lambda seen: bool(seen["trial"]) and "t003 of a" in seen["trial"][0] and len(seen["trial"][1]) == 2,
        ),
        (lambda page: page.click("#back"), lambda seen: not seen["trial"] and maps(seen) == 1),
        (
            lambda page: page.click("[data-view=curves]"),
            lambda seen: {trace["type"] for trace in seen["plot"]} == {"scatter"},
        ),
        (lambda page: _select(page, "x", "seconds"), lambda seen: 10 in seen["plot"][1]["x"]),
    ]
    with visit(browser) as visited:
        page = visited.page
        ready(page, serve(tmp_path))
        were = [once(page, lambda seen: len(seen["plot"]) > 10)]
        for act, condition in steps:
            assert not condition(were[-1])
            act(page)
            were.append(once(page, condition))
        # A filter and a theme make no step of their own: they belong to the one that they were chosen in.
        page.fill("#query", "rank>=8")
        expect(page.locator("#count")).to_have_text(f"{large} of 14 trials")
        page.click("#theme")
        were[-1] = once(page, lambda seen: seen["theme"] == "dark" and len(seen["rows"]) == len(keys(seen)) == large)
        for was in reversed(were[:-1]):
            page.go_back()
            becomes(lambda: look(page), was)
        for was in were[1:]:
            page.go_forward()
            becomes(lambda: look(page), was)


def _select(page: Page, choice: str, value: str) -> None:
    page.select_option(f"[data-choice={choice}]", value)


def test_the_theme(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "a", 3)
    url = serve(tmp_path)
    grounds = {"dark": "rgb(20, 24, 29)", "light": "rgb(255, 255, 255)"}

    def is_in(theme: str) -> None:
        other = {"dark": "light", "light": "dark"}[theme]
        expect(page.locator("#theme")).to_have_text(other)
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        expect(page.locator("body")).to_have_css("background-color", grounds[theme])
        drawn = "document.querySelector('#plot .main-svg').style.background"
        becomes(lambda: page.evaluate(drawn), grounds[theme])

    with visit(browser, scheme="dark") as seen:
        page = seen.page
        ready(page, url)
        is_in("dark")
        assert "theme" not in words(page), "as the system has it"
        page.click("#theme")
        is_in("light")
        assert words(page)["theme"] == "light"
        page.click("[data-view=size]")
        page.wait_for_selector("#plot .scatterlayer")
        page.click("#home")
        expect(page.locator("[data-view=curves]")).to_have_attribute("aria-selected", "true")
        is_in("light")
        assert words(page) == {"theme": "light"}
        page.reload()
        page.wait_for_selector("#plot .main-svg")
        is_in("light")
        page.click("#theme")
        is_in("dark")


CLIPBOARDS = {
    "granted": "",
    "refused": """
        Clipboard.prototype.writeText = () => Promise.reject(new DOMException('Write permission denied.'));
    """,
    "absent": "Object.defineProperty(navigator, 'clipboard', { value: undefined });",
}


def pasted(page: Page) -> str:
    """What a person gets who pastes now."""
    page.evaluate("document.body.append(Object.assign(document.createElement('textarea'), { id: 'paste' }))")
    page.focus("#paste")
    page.keyboard.press("Control+V")
    text = page.input_value("#paste")
    page.evaluate("document.getElementById('paste').remove()")
    return text


@pytest.mark.parametrize("clipboard", CLIPBOARDS)
def test_what_is_copied(tmp_path: Path, browser: Browser, serve: Serve, clipboard: str) -> None:
    folder = make_sweep(tmp_path / "it's a <b> & more", 12, state="interrupted", name="made")
    adapter = write_checkpoint(folder / "t003", 40, 0.001)
    url = serve(tmp_path)
    [sweep] = document(url).sweeps
    trial = next(trial for trial in sweep.trials or [] if trial.name == "t003")
    texts = [trial.reproduce, trial.publish, trial.adapter]
    assert trial.adapter == str(adapter)
    assert str(folder) in shlex.split(trial.publish or "")
    with visit(browser) as seen:
        page = seen.page
        if clipboard == "granted":
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.add_init_script(CLIPBOARDS[clipboard])
        ready(page, url, "size", "pin=none%2Ft%25001&q=rank%3E%3D8")
        expect(page.locator("#link")).to_have_text("copy link")
        copy(page, "#link", page.url)
        expect(page.locator("#link")).to_have_text("copy link")
        if clipboard == "granted":
            assert page.evaluate("navigator.clipboard.readText()") == page.url
        copy(page, "#resume .command button", sweep.resume)
        page.fill("#query", "")
        expect(page.locator("#count")).to_have_text("12 trials")
        page.click("tr[data-key$='/t003'] td[data-column=rank]")
        page.wait_for_selector("#trial-curve .main-svg")
        copy(page, "#link", page.url)
        assert words(page)["trial"] == f"{folder.name}/t003"
        assert page.locator("#trial .command code").all_text_contents() == texts
        for index, text in enumerate(texts):
            copy(page, f"#trial .command >> nth={index} >> button", text)
        assert page.locator("body > textarea").count() == 0


def copy(page: Page, button: str, text: str | None) -> None:
    """Press a button that says what it does, and be given the text."""
    assert text
    assert pasted(page) != text
    assert said(page, button) == "copied"
    assert pasted(page) == text


def said(page: Page, button: str) -> str:
    """What a button says once it is pressed; it does so for a second and a half."""
    page.locator(button).evaluate(
        "button => { button.said = ''; "
        "new MutationObserver((_, self) => { button.said = button.textContent; self.disconnect(); })"
        ".observe(button, { childList: true }); }"
    )
    page.click(button)
    return wait_until(lambda: page.locator(button).evaluate("button => button.said"))


def test_what_cannot_be_copied_is_not_said_to_be(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    make_sweep(tmp_path / "made", 12)
    with visit(browser) as seen:
        page = seen.page
        page.add_init_script(CLIPBOARDS["refused"] + "document.execCommand = () => false;")
        ready(page, serve(tmp_path))
        assert said(page, "#link") == "not copied"
        expect(page.locator("#link")).to_be_focused()


SLOW_TIMERS = """
    const later = window.setTimeout;
    window.setTimeout = (work, after, ...rest) => later(work, after === 120 ? 1e6 : after, ...rest);
"""


def test_what_is_typed_counts_when_the_hand_goes_elsewhere(tmp_path: Path, browser: Browser, serve: Serve) -> None:
    """Before the page has waited for the next letter; and where the hand goes back, it does not."""
    made = read_sweep(make_sweep(tmp_path / "made", 12))
    many = sum(trial.knobs["rank"] >= 8 for trial in made.trials)
    with visit(browser) as seen:
        page = seen.page
        page.add_init_script(SLOW_TIMERS)
        ready(page, serve(tmp_path))
        page.fill("#query", "rank>=8")
        page.click("#theme")
        expect(page.locator("#count")).to_have_text(f"{many} of 12 trials")
        assert words(page)["q"] == "rank>=8"
        page.click("[data-view=size]")
        page.fill("#query", "rank>=16")
        page.go_back()
        expect(page.locator("#query")).to_have_value("rank>=8")
        page.click("#theme")
        expect(page.locator("#theme")).to_have_text("dark")
        expect(page.locator("#count")).to_have_text(f"{many} of 12 trials")
        assert words(page)["q"] == "rank>=8"
