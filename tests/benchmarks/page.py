"""How long the comparison page takes with many trials: its data, and what a person waits for in a browser.

    python -m tests.benchmarks.page                         # 1,000 trials of 50 reports: a minute
    python -m tests.benchmarks.page --trials 10000

Losses come from a formula. The browser is a Chromium without a window whose WebGL is computed by the CPU, so that plots
are slower than on any desktop. There is no rival: figures are milliseconds, medians of the rounds.

The last line is one JSON object: {"first_ms": t, "same_ms": t, "one_changed_ms": t, "megabytes": x, "importance_ms": t,
"filter_ms": t, ...}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console
from rich.table import Table

from tests.browser import chromium, visit
from tests.tuning.compare.make import add_report, make_sweep
from tests.waiting import wait_until
from tuning.compare.importance import importance, points
from tuning.compare.reader import Comparer
from tuning.compare.server import LOOPBACK, make_app
from tuning.compare.source import LocalShelf
from tuning.results import read_sweep

VIEWS = ("curves", "knobs", "importance", "size", "maps", "sweeps")
# Two frames: the first draws what was asked for, the second begins when that is on the screen.
IN_PAGE = """async rounds => {
  const onScreen = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const timed = async work => { const began = performance.now(); await work(); return performance.now() - began; };
  const found = { filter: [], sort: [], draw: [] };
  for (let round = 0; round < rounds; round++) {
    found.filter.push(await timed(async () => { choose({ q: round % 2 ? '' : 'rank>=8' }, true); await onScreen(); }));
    await new Promise(done => setTimeout(done, 1500));
    found.sort.push(await timed(async () => { choose({ sort: round % 2 ? '' : 'rank' }, true); await onScreen(); }));
    found.draw.push(await timed(async () => { await views[choice.view].draw(shown()); await onScreen(); }));
  }
  return found;
}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--reports", type=int, default=50, help="of each trial")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="loraloom-page-") as folder:
        train = {"steps": 20 * options.reports, "eval_every": 20}
        sweep = make_sweep(Path(folder) / "many", options.trials, train=train, search={"trials": options.trials})
        figures = {**measure_data(sweep, options.rounds), **measure_page(sweep, options.rounds)}
    table = Table("what", "ms", title=f"{options.trials} trials of {options.reports} reports")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}")
    Console().print(table)
    print(json.dumps({"trials": options.trials, **{name: round(value, 1) for name, value in figures.items()}}))


def measure_data(sweep: Path, rounds: int) -> dict[str, float]:
    """The server's part."""
    figures: dict[str, list[float]] = {"first_ms": [], "same_ms": [], "one_changed_ms": []}
    size = 0
    for number in range(rounds):
        comparer = Comparer([LocalShelf(sweep)])
        comparer._weigher._pool.shutdown()  # what it computes beside is measured alone
        comparer._weigher.importance = lambda *_, **__: (None, None)  # pyright: ignore[reportAttributeAccessIssue]
        document = _timed(figures["first_ms"], comparer.document)
        size = len(document.model_dump_json())
        _timed(figures["same_ms"], lambda comparer=comparer, after=document.revision: comparer.document(after))
        add_report(sweep / "t000", 10_000 + number, 1.0)
        _timed(figures["one_changed_ms"], lambda comparer=comparer, after=document.revision: comparer.document(after))
    read = read_sweep(sweep)
    weighed: list[float] = []
    _timed(weighed, lambda: importance(read.spec.space, points(read)))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {**medians, "megabytes": size / 1e6, "importance_ms": weighed[0]}


def measure_page(sweep: Path, rounds: int) -> dict[str, float]:
    """The browser's part: from a choice until it is on the screen, and each plot by itself."""
    comparer = Comparer([LocalShelf(sweep)], live=False)
    comparer.document(wait=True)
    server = uvicorn.Server(
        uvicorn.Config(make_app(comparer.document, hosts=LOOPBACK), port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    figures: dict[str, float] = {}
    filters: list[float] = []
    sorts: list[float] = []
    with chromium() as browser:
        for view in VIEWS:
            with visit(browser) as seen:
                began = time.perf_counter()
                seen.page.goto(f"{url}#view={view}")
                seen.page.wait_for_selector("tr[data-key]")
                figures.setdefault("open_ms", (time.perf_counter() - began) * 1000)
                seen.page.wait_for_timeout(3000)
                found = seen.page.evaluate(IN_PAGE, rounds)
                filters += found["filter"]
                sorts += found["sort"]
                figures[f"draw_{view}_ms"] = statistics.median(found["draw"])
    server.should_exit = server.force_exit = True
    thread.join()
    return {"filter_ms": statistics.median(filters), "sort_ms": statistics.median(sorts), **figures}


def _timed(into: list[float], work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    into.append((time.perf_counter() - began) * 1000)
    return result


if __name__ == "__main__":
    main()
