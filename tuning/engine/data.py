"""Rows to tokens: template, tokenise, mark the targets, keep in a memory-mapped Arrow file.

Tokenised once per sweep; every host maps the same file and every trial reads its own order through a ``RowStream``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import ABSENT
from tuning.engine.rows import Faults, Row, Source, is_well_formed, read_rows
from tuning.spec import DataSpec

IGNORED = -100
"""Label of a token that does not count in the loss (torch's cross_entropy default)."""
TRAIN_FILE, EVAL_FILE = "train.arrow", "eval.arrow"
BATCH_ROWS = 512
"""Rows that go through the tokenizer in one call, which a fast one spreads over the cores."""
Ints = NDArray[np.int32]
Spans = list[tuple[int, int]] | None
"""Characters that count in the loss; None for all."""
OnRows = Callable[[int], None]
"""Called with the number of rows that are through so far."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: ``labels[t]`` is ``ids[t]`` where token t is a target, else ``IGNORED``."""

    ids: Ints
    labels: Ints


@dataclass(slots=True)
class DataReport:
    """What became of the rows."""

    train_rows: int = 0
    eval_rows: int = 0
    cut_rows: int = 0
    """Longer than max_length: cut at the end."""
    dropped_rows: int = 0
    """Without a target, after cutting."""
    train_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row before cutting."""

    def as_dict(self) -> dict[str, int]:
        """The report for JSON."""
        return asdict(self)


class Tokens:
    """Tokenised rows in an Arrow file, memory-mapped: processes of one node share the pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = pa.memory_map(str(path))
        table = pa.ipc.open_file(self._source).read_all().combine_chunks()
        ids, labels = (table.column(name).chunk(0) for name in ("ids", "labels"))
        self._offsets: NDArray[np.int64] = ids.offsets.to_numpy()
        self._ids: Ints = ids.values.to_numpy()
        self._labels: Ints = labels.values.to_numpy()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def mean_length(self) -> float:
        """Tokens of a row on average."""
        return len(self._ids) / len(self)

    def row(self, index: int) -> tuple[Ints, Ints]:
        """Ids and labels of a row."""
        start, stop = self._offsets[index], self._offsets[index + 1]
        return self._ids[start:stop], self._labels[start:stop]

    def length(self, index: int) -> int:
        """Tokens of a row."""
        return int(self._offsets[index + 1] - self._offsets[index])


class RowStream:
    """A trial's endless order of rows: a new permutation each epoch, a function of the seed and ``position`` alone."""

    def __init__(self, data: Tokens, seed: int) -> None:
        self.data = data
        self.position = 0
        """Rows taken so far; set it to go on from a checkpoint."""
        self._seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, count: int) -> list[int]:
        """The next ``count`` row indices."""
        rows = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return rows

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.data))
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(len(self.data))
            self._epoch = epoch
        return int(self._order[place])


@dataclass(frozen=True, slots=True)
class TokenisedData:
    """All rows of a sweep, in memory."""

    train: list[Encoded]
    evaluation: list[Encoded]
    report: DataReport

    def write(self, folder: Path) -> tuple[Tokens, Tokens]:
        """Write train.arrow and eval.arrow, each whole or not at all, and map them."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / TRAIN_FILE, folder / EVAL_FILE
        for path, rows in zip(paths, (self.train, self.evaluation), strict=True):
            _write(path, rows)
        return Tokens(paths[0]), Tokens(paths[1])


def prepare(spec: DataSpec, tokenizer: Any, folder: Path, seed: int) -> tuple[Tokens, Tokens, DataReport]:
    """``tokenise`` and write to ``folder``; returns both files, mapped, and what became of the rows.

    Raises:
        InputError: as ``tokenise``; nothing has been written.
    """
    data = tokenise(spec, tokenizer, seed)
    return *data.write(folder), data.report


def tokenise(spec: DataSpec, tokenizer: Any, seed: int, on_rows: OnRows | None = None) -> TokenisedData:
    """Read, check and tokenise all rows. Rows are held out, where that is asked for, by a permutation of ``seed``.

    Args:
        spec: where the rows are and what they look like.
        tokenizer: the base's fast tokenizer.
        seed: decides which rows are held out.
        on_rows: told of the progress.

    Raises:
        InputError: files that cannot be read, malformed rows (named by file, line and field), or no rows left.
    """
    report = DataReport()
    faults = Faults()
    fault = _tokenizer_fault(spec, tokenizer)
    if fault:
        faults.add("base.model", fault)
        _check_rows(spec, faults)
        faults.check()
    done = _Progress(on_rows)
    rows, *others = (list(_encode_all(source, spec, tokenizer, report, faults, done)) for source in Source.of(spec))
    if others:
        (held,) = others
    else:
        order = np.random.Generator(np.random.Philox(key=[seed, 2**32])).permutation(len(rows))
        count = round(len(rows) * spec.held_out)
        held = [rows[index] for index in sorted(order[:count])]
        rows = [rows[index] for index in sorted(order[count:])]
    faults.check()
    held = held[: spec.max_eval_rows]
    if not rows:
        faults.add("data.train", "must leave at least one row to train on", spec.train)
    if not held:
        rule = "must leave at least one row to evaluate on" + (
            f" (eval_fraction is {spec.held_out})" if not spec.eval else ""
        )
        faults.add("data.eval" if spec.eval else "data.eval_fraction", rule, spec.eval or ABSENT)
    faults.check()
    report.train_rows, report.eval_rows = len(rows), len(held)
    report.train_tokens = sum(len(row.ids) for row in rows)
    return TokenisedData(rows, held, report)


def check_rows(spec: DataSpec) -> None:
    """What ``tokenise`` would find in the rows, as far as it can be told without a tokenizer.

    Raises:
        InputError: as ``tokenise``.
    """
    faults = Faults()
    _check_rows(spec, faults)
    faults.check()


def _check_rows(spec: DataSpec, faults: Faults) -> None:
    for source in Source.of(spec):
        for row in read_rows(source, faults):
            is_well_formed(row, spec, faults)


def encode(row: Mapping[str, Any], spec: DataSpec, tokenizer: Any) -> Encoded:
    """One well-formed row as ids and labels, uncut.

    Raises:
        ValueError: the chat template rewrites earlier turns.
        Exception: whatever else a chat template or a tokenizer raises.
    """
    return _encode([_text_and_spans(row, spec, tokenizer)], spec, tokenizer)[0]


def _text_and_spans(row: Mapping[str, Any], spec: DataSpec, tokenizer: Any) -> tuple[str, Spans]:
    if spec.format == "messages" and spec.loss_on == "all":
        return tokenizer.apply_chat_template(row["messages"], tokenize=False), None
    if spec.format == "messages":
        return _render_messages(row["messages"], tokenizer)
    if spec.format == "prompt_completion":
        text = row["prompt"] + row["completion"]
        return text, None if spec.loss_on == "all" else [(len(row["prompt"]), len(text))]
    return row["text"], None


def _encode(texts: Sequence[tuple[str, Spans]], spec: DataSpec, tokenizer: Any) -> list[Encoded]:
    # A chat template writes the special tokens itself. Without `verbose=False`, rows that are about to be cut draw a
    # warning.
    encodings = tokenizer(
        [text for text, _ in texts],
        add_special_tokens=spec.format != "messages",
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    end = tokenizer.eos_token_id if spec.format != "messages" else None
    encoded: list[Encoded] = []
    for numbers, offsets, (_, spans) in zip(encodings["input_ids"], encodings["offset_mapping"], texts, strict=True):
        ids = np.asarray(numbers, np.int32)
        targets = np.ones(len(ids), bool)
        if spans is not None:
            # A special token that the tokenizer adds has the empty span (0, 0) and is no target; a blank that the
            # tokenizer trims from its spans has an empty one at its end, and is.
            first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
            targets[:] = False
            for start, stop in spans:
                targets |= (start <= first) & (start < last) & (last <= stop)
        labels = np.where(targets, ids, np.int32(IGNORED))
        if end is not None and numbers and numbers[-1] == end:
            labels[-1] = end  # also where the tokenizer has added it
        elif end is not None:
            ids, labels = np.append(ids, np.int32(end)), np.append(labels, np.int32(end))
        encoded.append(Encoded(ids, labels))
    return encoded


def _render_messages(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans of the assistant's turns.

    A turn begins where the generation prompt of the turns before it ends, and closes with what the template puts after
    it, so that the model learns to stop.

    Raises:
        ValueError: the template changes earlier turns when later ones are added.
    """

    def render(count: int, *, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages))
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, prompt=True) if index else ""
        through = render(index + 1)
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                "the chat template rewrites earlier turns, so completions cannot be told apart: set loss_on to all"
            )
        spans.append((len(before), len(through)))
    return text, spans


class _Progress:
    """Counts rows for whoever wants to know."""

    def __init__(self, on_rows: OnRows | None) -> None:
        self.rows = 0
        self._on_rows = on_rows

    def add(self, rows: int) -> None:
        self.rows += rows
        if self._on_rows:
            self._on_rows(self.rows)


def _tokenizer_fault(spec: DataSpec, tokenizer: Any) -> str | None:
    if spec.format == "messages" and not tokenizer.chat_template:
        return "has a tokenizer without a chat template, which the format messages needs"
    if not tokenizer.is_fast:
        return "must have a fast tokenizer (one with a tokenizer.json), to tell completions apart"
    return None


def _encode_all(
    source: Source, spec: DataSpec, tokenizer: Any, report: DataReport, faults: Faults, done: _Progress
) -> Iterator[Encoded]:
    """The rows of ``source`` that have something to learn, cut to ``max_length``; faults and counts go to the rest."""
    rows = iter(read_rows(source, faults))
    while batch := list(islice(rows, BATCH_ROWS)):
        for encoded in _encode_batch(batch, spec, tokenizer, faults):
            report.longest = max(report.longest, len(encoded.ids))
            cut = encoded
            if len(encoded.ids) > spec.max_length:
                report.cut_rows += 1
                cut = Encoded(encoded.ids[: spec.max_length].copy(), encoded.labels[: spec.max_length].copy())
            # The first token has nothing before it to be predicted from.
            if (cut.labels[1:] == IGNORED).all():
                report.dropped_rows += 1
            else:
                yield cut
        done.add(len(batch))


def _encode_batch(batch: Iterable[Row], spec: DataSpec, tokenizer: Any, faults: Faults) -> list[Encoded]:
    """The well-formed rows of a batch; the others become faults."""
    through = "chat template" if spec.format == "messages" else "tokenizer"
    texts: list[tuple[str, tuple[str, Spans]]] = []
    for row in batch:
        if not is_well_formed(row, spec, faults):
            continue
        try:
            texts.append((row.where, _text_and_spans(row.fields, spec, tokenizer)))
        except Exception as error:  # noqa: BLE001 - a chat template may raise anything; the row is what to look at
            faults.add(row.where, f"cannot be put through the {through}: {error}")
    try:
        return _encode([text for _, text in texts], spec, tokenizer) if texts else []
    except Exception:  # noqa: BLE001 - one of the rows, but which?
        encoded: list[Encoded] = []
        for where, text in texts:
            try:
                encoded += _encode([text], spec, tokenizer)
            except Exception as error:  # noqa: BLE001 - the same
                faults.add(where, f"cannot be put through the tokenizer: {error}")
        return encoded


def _write(path: Path, rows: list[Encoded]) -> None:
    """Write the Arrow file beside its place, then rename it there."""
    kind = pa.large_list(pa.int32())
    table = pa.table(
        {
            "ids": pa.array([row.ids for row in rows], kind),
            "labels": pa.array([row.labels for row in rows], kind),
        }
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    temporary.replace(path)
