"""How a registry is shown: versions as a table, one version as a sheet, the history as lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any, cast

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from serving.registry import Registry
from serving.registry.events import Adopted, Event, Moved, Published, Removed, Score, Voted
from serving.registry.split import spelled

_NUMERIC = {"rank", "eval loss"}
_SHORTENED = {"by", "targets"}
_SHORT_WIDTH = 12
_MOST_VOTES = 5
"""In a row of the history; promotions would be lost among more."""


def described(registry: Registry, name: str, version: int) -> dict[str, Any]:
    """One version as a JSON object: its manifest, who published it, its aliases (alias -> share) and its scores."""
    entry = registry.entry(name, version)
    return {
        "id": entry.manifest.id,
        **entry.manifest.model_dump(mode="json"),
        "by": entry.by,
        "note": entry.note,
        "aliases": _shares(registry, name, version),
        "scores": {metric: score.model_dump(mode="json") for metric, score in entry.scores.items()},
        "votes": {other: asdict(tally) for other, tally in entry.votes.against.items()},
    }


def table(registry: Registry, versions: Iterable[tuple[str, int]]) -> Table:
    """What tells versions apart; ``adapters show`` has all of it."""
    grid = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("adapter", "aliases", "published", "by", "rank", "targets", "eval loss", "scores"):
        is_short = heading in _SHORTENED
        grid.add_column(
            heading,
            justify="right" if heading in _NUMERIC else "left",
            no_wrap=is_short or heading in _NUMERIC or heading in {"adapter", "published"},
            overflow="ellipsis" if is_short else "fold",
            min_width=len(heading),
            max_width=_SHORT_WIDTH if is_short else None,
        )
    for name, version in versions:
        entry = registry.entry(name, version)
        manifest = entry.manifest
        targets = manifest.lineage.get("target_modules") or ", ".join(manifest.target_modules)
        loss = manifest.metrics.get("eval_loss")
        aliases = _shares(registry, name, version).items()
        grid.add_row(
            escape(manifest.id),
            escape(" ".join(alias if share == 1 else f"{alias}:{share:.3g}" for alias, share in aliases)),
            f"{entry.at.astimezone():%m-%d %H:%M}",
            escape(entry.by),
            str(manifest.rank),
            escape(str(targets)),
            "" if loss is None else f"{loss:.4g}",
            escape(" ".join(f"{metric}={_score(score)}" for metric, score in entry.scores.items())),
        )
    return grid


def sheet(about: dict[str, Any]) -> Table:
    """Fields and values, one a line; what lies deeper is indented by its name."""
    grid = Table(box=None, show_header=False, pad_edge=False)
    for field, value in about.items():
        if field == "scores":
            for metric, score in cast("dict[str, dict[str, Any]]", value).items():
                grid.add_row(f"score.{escape(metric)}", escape(_score(Score.model_validate(score, strict=False))))
        elif field == "votes":
            for other, tally in cast("dict[str, dict[str, int]]", value).items():
                grid.add_row(f"votes.{escape(other)}", ", ".join(f"{count} {how}" for how, count in tally.items()))
        elif isinstance(value, dict):
            for name, part in cast("dict[str, Any]", value).items():
                grid.add_row(f"{field}.{escape(name)}", escape(_text(part)))
        else:
            grid.add_row(field, escape(_text(value)))
    return grid


def history_lines(events: Iterable[Event]) -> Iterator[str]:
    """Who did what when, one event a line; of many votes in a row, how many."""
    for are_votes, group in groupby(events, lambda event: isinstance(event, Voted)):
        row = list(group)
        if are_votes and len(row) > _MOST_VOTES:
            voters = ", ".join(sorted({event.by for event in row}))
            yield f"{_when(row[0])} to {_when(row[-1])}  {len(row)} votes  by {voters}"
            continue
        for event in row:
            note = f" ({event.note})" if event.note else ""
            yield f"{_when(event)}  {event.by}  {_deed(event)}{note}"


def _when(event: Event) -> str:
    return f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}"


def _deed(event: Event) -> str:
    if isinstance(event, Published):
        return f"published {event.manifest.id}"
    if isinstance(event, Moved):
        verb = "rolled back" if event.rollback else "moved" if event.target is not None else "took away"
        return f"{verb} {event.name}@{event.alias}: {spelled(event.before)} -> {spelled(event.target)}"
    if isinstance(event, Removed):
        also = f", and with it {', '.join(event.aliases)}" if event.aliases else ""
        return f"removed {event.name}@{event.version}{also}"
    if isinstance(event, Adopted):
        return f"adopted {', '.join(manifest.id for manifest in event.manifests)}"
    if isinstance(event, Voted):
        others = ", ".join(model for model in event.models if model != event.better)
        return f"preferred none of {others}" if event.better is None else f"preferred {event.better} to {others}"
    return f"scored {event.name}@{event.version}: {', '.join(event.scores)}"


def _shares(registry: Registry, name: str, version: int) -> dict[str, float]:
    """The aliases that lead to a version, and which share of them does."""
    shares: dict[str, float] = {}
    for alias, target in registry.aliases(name).items():
        share = float(target == version) if isinstance(target, int) else target.get(version, 0.0)
        if share:
            shares[alias] = share
    return shares


def _score(score: Score) -> str:
    interval = "" if score.low is None or score.high is None else f" [{score.low:.3g}, {score.high:.3g}]"
    return f"{score.value:.4g}{interval}"


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in cast("list[object]", value))
    return "" if value is None else str(value)
