"""The built-in demo: sweep, publish, serve, ask; then everything is ended and cleaned up.

The base is a Llama of three million parameters that was trained for this, and the questions are held out from the
training rows (configs/demo/README.md). Nothing here is special to the demo but the file names: each step calls what
the commands call.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.connect import connect
from cluster.errors import ConflictError, LoraloomError
from cluster.schema import load_spec
from serving.app import prepare, serving
from serving.client import Answer, ask_all
from serving.registry import Registry
from serving.spec import ServeSpec
from tuning.live import Progress
from tuning.publish import publish_trial
from tuning.report import format_value, header_lines, trial_table
from tuning.results import Sweep, TrialResult, leaderboard
from tuning.spec import SweepSpec
from tuning.sweep import compared, dashboard_line, run_sweep

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUESTIONS = CONFIGS / "demo" / "eval.jsonl"
WINNER, LAST = "support", "support-last"
BASE_BELOW, WINNER_ABOVE = 0.1, 0.8
"""Exact match on the held-out questions that the demo promises."""
MAX_TOKENS = 16
"""Longer than any right answer (configs/demo/README.md), short enough that a base that rambles costs little."""
Watch = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True, slots=True)
class Score:
    """How a model did on the held-out questions."""

    exact_match: float
    """Share of the answers that are equal to the right one, blanks around them aside."""
    sample: str
    """Its answer to the first question."""


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """What ``loraloom demo --json`` prints."""

    base: Score
    adapters: dict[str, Score]
    trials: int
    sweep_s: float
    serve_start_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "base": {"exact_match": self.base.exact_match},
            "adapters": {name: {"exact_match": score.exact_match} for name, score in self.adapters.items()},
            "trials": self.trials,
            "sweep_s": round(self.sweep_s, 1),
            "serve_start_s": round(self.serve_start_s, 1),
        }


def run_demo(folder: Path | None, console: Console, watch: Watch) -> DemoOutcome:
    """Run the whole demo in ``folder``, which is kept, or in a temporary one, which is not.

    Raises:
        ConflictError: ``folder`` holds something already.
        LoraloomError: a step failed.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder}: already holds something; give the demo another --dir")
    with _workplace(folder) as place:
        spec = load_spec(CONFIGS / "sweep" / "demo.yaml", SweepSpec)
        registry = Registry(place / "registry")
        swept = place / "sweep"
        swept.mkdir()
        with (
            compared(spec, swept) as tab,
            connect(spec.cluster, job_name="demo", variables=tab.variables) as dashboard,
        ):
            if dashboard is not None:
                console.print(dashboard_line(dashboard, tab, spec.cluster), soft_wrap=True)
            sweep, sweep_s = _sweep(spec, swept, console, watch)
            names = _publish(sweep, registry, console)
            outcome = _serve_and_ask(sweep, names, registry, sweep_s, console)
        _show(outcome, names, console)
        if outcome.base.exact_match >= BASE_BELOW or outcome.adapters[WINNER].exact_match <= WINNER_ABOVE:
            raise LoraloomError(
                f"the demo promises a base below {BASE_BELOW:.0%} and a winner above {WINNER_ABOVE:.0%}; see the table"
            )
        if folder is not None:
            console.print(f"kept: {place}", soft_wrap=True)
        return outcome


def _sweep(spec: SweepSpec, folder: Path, console: Console, watch: Watch) -> tuple[Sweep, float]:
    console.rule(f"sweep: {spec.num_trials} trials, {spec.resources.slots} on each base", align="left")
    began = time.monotonic()
    with watch("demo") as progress:
        sweep = run_sweep(spec, folder, where="configs/sweep/demo.yaml", progress=progress)
    if sweep.record.state != "finished":
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    for line in header_lines(sweep.record):
        console.print(line, soft_wrap=True)
    console.print(trial_table(leaderboard(sweep), console.width, f"leaderboard after {seconds:.0f} s"))
    return sweep, seconds


def _publish(sweep: Sweep, registry: Registry, console: Console) -> dict[str, TrialResult]:
    """Publish the best trial and the worst that left an adapter: their answers show what the ranking means."""
    ranked = [trial for trial in sweep.trials if trial.adapter]
    if len(ranked) < 2:
        raise LoraloomError("the demo's sweep left fewer than two adapters; the leaderboard above says why")
    console.rule("publish: the first and the last of the leaderboard", align="left")
    names = {WINNER: ranked[0], LAST: ranked[-1]}
    for name, trial in names.items():
        manifest = publish_trial(sweep, registry, name, trial.name)
        console.print(f"{trial.name} -> {manifest.id} (rank {manifest.rank}, {manifest.parameters:,} parameters)")
    return names


def _serve_and_ask(
    sweep: Sweep, names: dict[str, TrialResult], registry: Registry, sweep_s: float, console: Console
) -> DemoOutcome:
    console.rule("serve: the base and both adapters, then ask the held-out questions", align="left")
    overrides = [f"registry={registry.root}", "http.port=0"]
    spec = load_spec(CONFIGS / "serve" / "demo.yaml", ServeSpec, overrides)
    questions, expected = read_questions(QUESTIONS)
    with serving(spec, prepare(spec), progress=console.print) as server:
        models = [spec.base.served_name, *names]
        console.print(f"asking {len(questions)} questions of {', '.join(models)} at {server.url}")
        base, *adapters = (
            grade(ask_all(server.url, model, questions, max_tokens=MAX_TOKENS), expected) for model in models
        )
    return DemoOutcome(base, dict(zip(names, adapters, strict=True)), len(sweep.trials), sweep_s, server.start_s)


def read_questions(path: Path) -> tuple[list[list[dict[str, str]]], list[str]]:
    """The conversations of a `messages` file without their last turn, and those last turns."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [messages[:-1] for messages in rows], [messages[-1]["content"] for messages in rows]


def grade(answers: list[Answer], expected: list[str]) -> Score:
    """Exact match of ``answers`` with what was ``expected``."""
    right = sum(answer.text.strip() == truth.strip() for answer, truth in zip(answers, expected, strict=True))
    return Score(right / len(expected), answers[0].text.strip())


def _show(outcome: DemoOutcome, names: dict[str, TrialResult], console: Console) -> None:
    questions, expected = read_questions(QUESTIONS)
    console.print(f"first question: {questions[0][-1]['content']!r}; right: {expected[0]!r}")
    table = Table(header_style="bold")
    for heading in ("model", "trial", "exact match", "answer to the first question"):
        table.add_column(heading, justify="right" if heading == "exact match" else "left")
    table.add_row("base", "", f"{outcome.base.exact_match:.0%}", repr(outcome.base.sample))
    for name, score in outcome.adapters.items():
        trial = names[name]
        targets = format_value("target_modules", trial.knobs["target_modules"])
        config = f"{trial.name}: rank {trial.knobs['rank']} on {targets}"
        table.add_row(name, config, f"{score.exact_match:.0%}", repr(score.sample))
    console.print(table)


@contextmanager
def _workplace(folder: Path | None) -> Generator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    place = Path(tempfile.mkdtemp(prefix="loraloom-demo-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
