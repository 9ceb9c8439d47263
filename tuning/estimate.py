"""How much memory a sweep's hosts need, before anything is started: its largest trial, and a host with so many of it.

Reads `config.json` and, where they can be had, the rows; no weights, no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from serving.weights.architecture import build_on_meta
from tuning.engine.base import select_targets
from tuning.inspect import BaseOutline, outline
from tuning.memory import CPU_8BIT_STEP_BYTES, BaseBytes, HostBytes, base_bytes, slot_bytes
from tuning.spec import BaseSpec, DataSpec, SweepSpec, TrialConfig

if TYPE_CHECKING:
    from tuning.engine.data import Encoded, TokenisedData
    from tuning.engine.dry_run import Growth, LossBytes

KNOBS = ("rank", "target_modules", "batch_size", "optimizer", "dropout")
"""Knobs that change what a trial needs; `eval_batch_size` cannot vary."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """The largest rows of a sweep, in tokens and targets; the tokens with the padding of a batch."""

    train_tokens: int
    train_targets: int
    eval_tokens: int
    eval_targets: int
    source: Literal["the rows", "data.max_length"]


def row_shape(spec: DataSpec, data: TokenisedData | None) -> RowShape:
    """The largest rows: of ``data``, or where there is none, rows of `max_length` all of whose tokens count."""
    if data is None:
        tokens = _padded(spec.max_length)
        return RowShape(tokens, spec.max_length - 1, tokens, spec.max_length - 1, "data.max_length")
    return RowShape(*_largest(data.train), *_largest(data.evaluation), "the rows")


def rows_on_disk(folder: Path) -> RowShape:
    """The largest rows of a sweep that has tokenised them."""
    from tuning.engine.data import EVAL_FILE, TRAIN_FILE, Encoded, Tokens

    train, evaluation = (
        [Encoded(*tokens.row(index)) for index in range(len(tokens))]
        for tokens in (Tokens(folder / name) for name in (TRAIN_FILE, EVAL_FILE))
    )
    return RowShape(*_largest(train), *_largest(evaluation), "the rows")


def _largest(rows: Sequence[Encoded]) -> tuple[int, int]:
    from tuning.engine.data import IGNORED

    return _padded(max(len(row.ids) for row in rows)), max(int((row.labels[1:] != IGNORED).sum()) for row in rows)


def _padded(tokens: int) -> int:
    from tuning.engine.batch import TOKEN_MULTIPLE

    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


@dataclass(frozen=True, slots=True)
class Case:
    """What decides on a host's memory beside the base and the number of slots."""

    trial: TrialConfig
    rows: RowShape
    gradient_checkpointing: bool


class Estimator:
    """Bytes of a host on one base; what has been counted once is remembered."""

    def __init__(self, spec: BaseSpec, kind: Literal["gpu", "cpu"] = "gpu", *, packing: bool = False) -> None:
        """Build the base of ``spec`` on the meta device, to run on a GPU or CPUs; ``packing`` is `data.packing`.

        Raises:
            InputError: as ``inspect.outline``.
            ArchitectureError: its passes cannot be run without values.
        """
        from tuning.engine.dry_run import DryRun
        from tuning.engine.dtype import compute_dtype

        model = build_on_meta(spec)
        self.outline: BaseOutline = outline(spec)
        device_type = "cuda" if kind == "gpu" else "cpu"
        dtype = compute_dtype(spec, device_type)
        self._dtype_bytes = dtype.itemsize
        self.base: BaseBytes = base_bytes(self.outline.sites.values(), self.outline.parameters, self._dtype_bytes)
        self._kind: Literal["gpu", "cpu"] = kind
        self._dry = DryRun(model, dtype, device_type, end_to_end=packing)
        self._remembered: dict[Any, Any] = {}

    def host(self, case: Case, slots: int) -> HostBytes:
        """A host with ``slots`` trials like ``case.trial``.

        Raises:
            ArchitectureError: the passes of this base cannot be run without values.
        """
        trial, rows = case.trial, case.rows
        shapes = [self.outline.sites[name] for name in self._targets(trial)]
        slot = slot_bytes(shapes, trial.rank, trial.optimizer, self._dtype_bytes, self._kind)
        count, eval_count = slots * trial.batch_size, slots * trial.eval_batch_size
        training, evaluation = self._training(case), self._evaluation(case)
        saved, eval_saved = training.saved(count), evaluation.saved(eval_count)
        losses = self._losses(count * rows.train_targets, training=True)
        # The dry run had one slot: of each, a layer makes gradients of its own before they are added up.
        gradients = (slots - 1) * trial.rank * max(map(sum, shapes)) * self._dtype_bytes
        in_8_bits = trial.optimizer == "paged_adamw_8bit"
        parameters = trial.rank * sum(map(sum, shapes))
        return HostBytes(
            slots=slots,
            weights=self.base.weights,
            constants=self.base.constants,
            unquantised=self.base.unquantised,
            adapters=slots * slot.adapters,
            gradients=slots * slot.gradients,
            optimizer=slots * slot.optimizer,
            paged=slots * slot.paged,
            activations=saved,
            logits=losses.peak,
            layer=training.peak(count) - saved + losses.left + gradients,
            evaluation=max(
                evaluation.peak(eval_count),
                eval_saved + self._losses(trial.eval_batch_size * rows.eval_targets, training=False).peak,
            ),
            step=CPU_8BIT_STEP_BYTES * parameters if in_8_bits and self._kind == "cpu" else 0,
        )

    def largest(self, spec: SweepSpec, rows: RowShape) -> Case:
        """The case of the trial of ``spec`` that needs most.

        Raises:
            ArchitectureError: as ``host``.
        """
        trials = list(_maximal(largest_trials(spec), self._targets))
        cases = [Case(trial, rows, spec.base.gradient_checkpointing) for trial in trials]
        return max(cases, key=lambda case: self.host(case, 1).total)

    def _targets(self, trial: TrialConfig) -> tuple[str, ...]:
        return tuple(select_targets(self.outline.sites, trial.target_modules))

    def _training(self, case: Case) -> Growth:
        trial = case.trial
        masked = trial.dropout > 0 and trial.batch_size
        key = self._targets(trial), trial.rank, masked, case.rows.train_tokens, case.gradient_checkpointing
        return self._once(
            ("train", *key),
            lambda: self._dry.training(
                case.trial, case.rows.train_tokens, gradient_checkpointing=case.gradient_checkpointing
            ),
        )

    def _evaluation(self, case: Case) -> Growth:
        key = self._targets(case.trial), case.trial.rank, case.rows.eval_tokens
        return self._once(("eval", *key), lambda: self._dry.evaluation(case.trial, case.rows.eval_tokens))

    def _losses(self, targets: int, *, training: bool) -> LossBytes:
        return self._once(("loss", targets, training), lambda: self._dry.losses(targets, training=training))

    def _once(self, key: Any, count: Callable[[], Any]) -> Any:
        if key not in self._remembered:
            self._remembered[key] = count()
        return self._remembered[key]


def largest_trials(spec: SweepSpec) -> list[TrialConfig]:
    """Trials of which one needs most: all that are planned, or, where the search decides as it goes, every combination
    of the largest values.
    """
    planned = spec.planned()
    if planned is not None:
        return planned
    first = {knob: domain.examples()[0] for knob, domain in spec.space.items()}
    choices: dict[str, list[Any]] = {}
    for knob in KNOBS:
        if knob in spec.space:
            values: list[Any] = spec.space[knob].examples()
            choices[knob] = values if knob in ("target_modules", "optimizer") else [max(values)]
    return [
        spec.trial({**first, **dict(zip(choices, values, strict=True))})
        for values in itertools.product(*choices.values())
    ]


def _maximal(trials: Sequence[TrialConfig], targets: Callable[[TrialConfig], tuple[str, ...]]) -> Iterator[TrialConfig]:
    """The trials that no other is at least as large as in every respect; of equal ones, the first."""
    sizes: dict[tuple[Any, ...], TrialConfig] = {}
    for trial in trials:
        states = trial.optimizer == "paged_adamw_32bit"
        sizes.setdefault((trial.rank, trial.batch_size, states, trial.dropout > 0, frozenset(targets(trial))), trial)
    for size, trial in sizes.items():
        if not any(other != size and all(a >= b for a, b in zip(other, size, strict=True)) for other in sizes):
            yield trial
