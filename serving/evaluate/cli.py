"""The command ``evaluate``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.errors import NotFoundError
from cluster.options import JsonOption, QuietOption
from serving.registry.cli import DEFAULT_REGISTRY

if TYPE_CHECKING:
    from serving.evaluate.run import Tick
    from serving.evaluate.session import Outcome
    from serving.registry import Registry

DEFAULT_OUT = Path("runs/evaluations")
FILE_WIDTH = 160
"""Columns where there is no terminal, so that nothing is cut in a file."""


def evaluate(
    models: Annotated[
        str,
        typer.Option("--models", metavar="REF,...", help="Such as base,support@1,support@prod; base is the server's."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="FILE", help="JSONL: messages, prompt and completion, or text, as for training."
        ),
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="METRIC",
            help="exact_match, contains, rouge, f1 or perplexity; repeatable (default: exact_match, or for rows of "
            "text perplexity).",
        ),
    ] = None,
    url: Annotated[str, typer.Option("--url", help="The server.")] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Where the server wants one.")
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            "--registry", metavar="DIR|URI", help=f"Gets the scores (default: {DEFAULT_REGISTRY} if it is there)."
        ),
    ] = None,
    promote_if: Annotated[
        str | None,
        typer.Option("--promote-if", metavar="CONDITION", help='Such as "exact_match > prod + 0.02" or "f1 >= 0.8".'),
    ] = None,
    alias: Annotated[str, typer.Option("--alias", help="The alias that --promote-if moves.")] = "prod",
    confident: Annotated[
        bool, typer.Option("--confident", help="Promote only where the 95 % interval excludes the contrary.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling, where --temperature is above 0.")] = 0,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Requests under way at once, 1 to 1000.")] = 16,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Keeps the answers.")] = DEFAULT_OUT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Ask models of a running server the rows of a file, and score what they answer.

    Each answer is kept in --out as it comes, by model, data and settings: what was asked once is not asked again, by
    the next run with another metric either, and after Ctrl-C the same command goes on. Aliases are resolved once, at
    the start: a promotion meanwhile changes nothing of what is measured.

    Metrics: exact_match and contains (share of rows; white space is evened out, case counts), rouge (ROUGE-L F1), f1
    (words in common, as SQuAD counts them), perplexity (of the reference, per token, by the server's log-probabilities;
    lower is better). Each comes with its 95 % interval, and with the paired difference to the first model, or to the
    one that --promote-if compares with.

    --promote-if METRIC > MODEL [+ MARGIN], or METRIC > NUMBER (>=; < and <= for perplexity): the best version of
    --models that satisfies it is moved onto the alias, unless somebody has moved that meanwhile. MODEL is an alias of
    the adapter such as prod, base, or a reference, and is evaluated too. Where the alias does not exist yet, the base
    takes its place.

    Exit codes: 0 done (also where nothing satisfied the condition), 1 the server failed, 2 bad input, 3 not found,
    4 somebody moved the alias, or fills the same answer files.
    """
    from serving.evaluate.check import Request, check_request
    from serving.evaluate.endpoint import Settings
    from serving.evaluate.session import run_session

    settings = Settings(max_tokens, temperature, seed)
    request = Request(
        models, data, tuple(metrics or ()), url, api_key, promote_if, alias, confident, settings, concurrency, out
    )
    plan, references, promotion = check_request(request)
    shelf = _open(registry, needed=promotion is not None)
    errors = Console(stderr=True, highlight=False)
    try:
        with _progress(errors, shown=not (quiet or as_json)) as tick:
            outcome = run_session(plan, references, shelf, promotion, tick)
    except KeyboardInterrupt:
        errors.print(f"the answers so far are in {escape(str(out))}; the same command goes on from there")
        raise
    _show(outcome, errors, as_json=as_json, quiet=quiet, registry=shelf.where if shelf else "")


def _open(registry: str | None, *, needed: bool) -> Registry | None:
    """The registry that gets the scores; None where none was named and none is at the default place.

    Raises:
        NotFoundError: it was named, or is needed, and is not there.
        InputError, MachineError, RegistryUnreachableError: it cannot be opened.
    """
    from serving.registry import Registry

    shelf = Registry(registry or DEFAULT_REGISTRY)
    if shelf.exists():
        return shelf
    if registry is None and not needed:
        return None
    raise NotFoundError(f"{shelf.where}: no registry is here; --registry names another")


@contextlib.contextmanager
def _progress(console: Console, *, shown: bool) -> Generator[Tick]:
    """A bar in a terminal, a line now and then anywhere else."""
    if not shown:
        yield lambda _done, _all: None
        return
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """One line at the start and one for each tenth."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tenth = -1

    def __call__(self, done: int, total: int) -> None:
        tenth = done * 10 // total
        if tenth > self._tenth:
            self._tenth = tenth
            self._console.print(f"{done} of {total} answers", style="dim")


def _show(outcome: Outcome, errors: Console, *, as_json: bool, quiet: bool, registry: str) -> None:
    from serving.evaluate.report import report_document, report_table

    report, decision = outcome.report, outcome.decision
    if as_json:
        document = report_document(report)
        document["recorded"] = list(outcome.recorded)
        document["promotion"] = asdict(decision) if decision else None
        typer.echo(json.dumps(document, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(report_table(report))
    if decision:
        said = f"promoted {decision.winner}" if decision.winner else "promoted nothing"
        console.print(escape(f"{said}: {decision.reason}"), soft_wrap=True)
    if quiet:
        return
    for measured in report.models:
        if measured.cut:
            errors.print(
                f"[yellow]{escape(measured.model.id)}:[/] {measured.cut} answers were cut at --max-tokens",
                soft_wrap=True,
            )
    where = (
        f"scores of {', '.join(outcome.recorded)} are in {registry}" if outcome.recorded else "no scores are recorded"
    )
    spent = f"{report.asked} answers in {report.seconds:.1f} s, {report.kept} from before, {report.retries} retries"
    errors.print(escape(f"{spent}; {where}"), style="dim", soft_wrap=True)
