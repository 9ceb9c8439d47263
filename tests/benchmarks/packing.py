"""Training tokens per second: K trials in one pack, against the same K one after another by peft + bitsandbytes.

    python -m tests.benchmarks.packing                      # two CPU cores, 4 layers, 256 wide: some five minutes
    python -m tests.benchmarks.packing --shape llama-8b     # a GPU of 80 GB: K = 1 ... 16 at batch 1 x 1024, 1 x 256

Both sides train on the same random NF4 base and the same rows, with the same ranks (mixed, on all linear layers), paged
AdamW and clipping. peft is used in the manner that is fastest on this machine: attention by torch's fused function or
written out, with autocast or without. Making adapters and optimizers is not counted on either side. Every figure is the
median of several rounds, each of which times both sides in turn, so that a machine whose speed drifts drifts for both.

The second table has rows of unequal length: a pack with `data.packing` against one that pads (`--ragged`).

A pack that does not fit into memory is trained in smaller passes, which the table says; `--gradient-checkpointing`
makes room on the packed side. The last line is one JSON object: {"speedup": {"K=8,b=1,t=64": x, ...}, "packing": {...},
"memory_gib": {...}, "smaller_passes": ["K=16,b=1,t=1024", ...]}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from tests.benchmarks.rivals import Manner, OneByOne, random_nf4, synchronise
from tests.benchmarks.surroundings import llama
from tuning.engine.base import Base
from tuning.engine.data import DataReport, Encoded, TokenisedData, Tokens
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

Result = TypeVar("Result")

SMALL = llama(1024, 256, 640, layers=4, heads=4, key_value_heads=2, pad_token_id=0)
ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
LLAMA_8B = llama(128_256, 4096, 14_336, layers=32, heads=32, key_value_heads=8, rope_parameters=ROPE)


@dataclass(frozen=True, slots=True)
class Shape:
    """A base and what is measured on it."""

    config: LlamaConfig
    ranks: tuple[int, ...]
    """Of the trials in turn."""
    batches: tuple[tuple[int, int], ...]
    """Rows and tokens of a row."""


SHAPES = {
    "small": Shape(SMALL, (4, 8, 16, 32), ((1, 64), (4, 128))),
    "llama-8b": Shape(LLAMA_8B, (32,), ((1, 1024), (1, 256))),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    warnings.filterwarnings("ignore")  # libraries' advice, on both sides
    torch.set_num_threads(options.threads)
    shape, device = SHAPES[options.shape], torch.device(options.device)
    dtype = getattr(torch, options.compute_dtype)
    console = Console(width=110, markup=False, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, device, dtype, options, Path(folder))
        rows = list(bench.rows())
        ragged = list(bench.ragged_rows()) if options.ragged else []
    spec = f"{options.shape}, {options.compute_dtype}, {options.threads} threads, {device_name(device)}"
    table = Table(title=f"packed against one by one ({spec})", title_justify="left")
    for heading in ("K", "batch x tokens", "packed tok/s", "one by one tok/s", "speed-up", "range", "peak GiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        memory = "" if row.peak_gib is None else f"{row.peak_gib:.1f}"
        memory += ", smaller passes" if row.notes else ""
        spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"
        ours, theirs, ratio = f"{row.ours:,.0f}", f"{row.theirs:,.0f}", f"{row.ratio:.2f}"
        table.add_row(str(row.trials), f"{row.batch} x {row.tokens}", ours, theirs, ratio, spread, memory)
    console.print(table)
    for (batch, tokens), manner in zip(bench.batches, bench.manners, strict=True):
        console.print(f"peft at {batch} x {tokens}: {manner.attention} attention, autocast {manner.autocast}")
    result: dict[str, Any] = {"speedup": {row.key: round(row.ratio, 3) for row in rows}}
    if ragged:
        other = Table(title="rows of unequal length: end to end against padded", title_justify="left")
        for heading in ("K", "batch x tokens", "end to end tok/s", "padded tok/s", "speed-up"):
            other.add_column(heading, justify="right")
        for row in ragged:
            other.add_row(
                str(row.trials),
                f"{row.batch} x {row.tokens}",
                f"{row.ours:,.0f}",
                f"{row.theirs:,.0f}",
                f"{row.ratio:.2f}",
            )
        console.print(other)
        result["packing"] = {row.key: round(row.ratio, 3) for row in ragged}
    result["smaller_passes"] = [row.key for row in rows if row.notes]
    if device.type == "cuda":
        result["memory_gib"] = {row.key: row.peak_gib for row in rows}
    print(json.dumps(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="the K to measure")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on the packed side")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of these lengths alone, of the shape's")
    parser.add_argument("--ragged", action=argparse.BooleanOptionalAction, help="default: on for the small shape")
    options = parser.parse_args(arguments)
    options.ragged = options.shape == "small" if options.ragged is None else options.ragged
    return options


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    trials: int
    batch: int
    tokens: int
    ours: float
    """Tokens per second."""
    theirs: float
    ratios: list[float]
    """Of each round."""
    peak_gib: float | None = None
    notes: Sequence[str] = ()
    """What the trainer has to say of memory."""

    @property
    def key(self) -> str:
        """As the JSON line names it."""
        return f"K={self.trials},b={self.batch},t={self.tokens}"

    @property
    def ratio(self) -> float:
        """The median round's."""
        return statistics.median(self.ratios)


class Bench:
    """Both sides, on one random base each."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, options: argparse.Namespace, folder: Path
    ) -> None:
        self.shape, self.device, self.options, self.folder = shape, device, options, folder
        self.manners: list[Manner] = []
        wanted = options.tokens
        self.batches = [pair for pair in shape.batches if not wanted or pair[1] in wanted]
        before = self._allocated()
        model = random_nf4(shape.config, device, dtype)
        self.rival = OneByOne(model, device)
        self._rival_bytes = self._allocated() - before
        spec = BaseSpec(
            model="random",
            compute_dtype=options.compute_dtype,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        self.base = Base(spec, device, random_nf4(shape.config, device, dtype))

    def rows(self) -> Iterator[Row]:
        """Every K and batch."""
        for batch, tokens in self.batches:
            data = self._tokens(tokens, tokens)
            sample = torch.full((batch, tokens), 5, device=self.device)
            self.manners.append(self._rival(lambda sample=sample: self.rival.choose_manner(sample)))
            for trials in self.options.trials:
                row = self._compare(data, trials, batch, tokens)
                told = f"{row.key}: {row.ours:,.0f} against {row.theirs:,.0f} tokens/s, {row.ratio:.2f}"
                told += f", {row.peak_gib} GiB" if row.peak_gib else ""
                print("; ".join([told, *row.notes]), file=sys.stderr, flush=True)
                yield row

    def ragged_rows(self) -> Iterator[Row]:
        """Rows of a quarter to all of the tokens, padded and end to end."""
        batch, tokens = max(self.shape.batches, key=lambda pair: pair[0] * pair[1])
        batch = max(batch, 4)
        data = self._tokens(tokens // 4, tokens)
        for trials in [count for count in self.options.trials if count <= 4]:
            both = [self._trainer(data, self._configs(trials, batch), packing=packing) for packing in (True, False)]
            times: list[list[float]] = [[], []]
            total = tokens_done = 0
            for _ in range(self.options.rounds):
                for trainer, seconds in zip(both, times, strict=True):
                    elapsed, tokens_done = self._train(trainer)
                    seconds.append(elapsed)
                total += tokens_done  # the same on both sides
            for trainer in both:
                self._leave(trainer)
            ours, theirs = (total / sum(seconds) for seconds in times)
            yield Row(trials, batch, tokens, ours, theirs, [b / a for a, b in zip(*times, strict=True)])

    def _compare(self, data: Tokens, trials: int, batch: int, tokens: int) -> Row:
        configs = self._configs(trials, batch)
        trainer = self._trainer(data, configs)
        generator = torch.Generator().manual_seed(0)
        shape = self.options.steps, batch, tokens
        ids = torch.randint(5, self.shape.config.vocab_size, shape, generator=generator).to(self.device)
        times: list[list[float]] = [[], []]
        peak = 0
        for _ in range(self.options.rounds):
            self._make_room()
            trainer.step()  # torch asks the GPU for memory again; the other side has such a step too
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            times[0].append(self._train(trainer)[0])
            if self.device.type == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated(self.device) - self._rival_bytes)
            self._make_room()
            times[1].append(self._rival(lambda: self.rival.run(configs, list(ids))))
        total = trials * batch * tokens * self.options.steps
        ours, theirs = (total / statistics.median(seconds) for seconds in times)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        self._leave(trainer)
        peak_gib = round(peak / 2**30, 2) if peak else None
        return Row(trials, batch, tokens, ours, theirs, ratios, peak_gib, trainer.notes)

    def _rival(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns; what its adapter keeps on the GPU is not the pack's."""
        before = self._allocated()
        result = work()
        self._rival_bytes += self._allocated() - before
        return result

    def _configs(self, trials: int, batch: int) -> list[TrialConfig]:
        ranks = self.shape.ranks
        return [
            TrialConfig(rank=ranks[index % len(ranks)], alpha=16.0, batch_size=batch, steps=10**6, seed=index)
            for index in range(trials)
        ]

    def _trainer(self, data: Tokens, configs: list[TrialConfig], *, packing: bool = False) -> Trainer:
        trainer = Trainer(self.base, data, data, packing=packing)
        for config in configs:
            trainer.attach(config)
        trainer.step()  # the optimizers' states and the stacks are made here
        return trainer

    def _leave(self, trainer: Trainer) -> None:
        for slot in list(trainer.slots):
            trainer.detach(slot)
        trainer.free_memory()

    def _train(self, trainer: Trainer) -> tuple[float, int]:
        """Seconds and tokens of a round."""
        synchronise(self.device)
        began = time.perf_counter()
        tokens = sum(report.tokens for _ in range(self.options.steps) for report in trainer.step())
        synchronise(self.device)
        return time.perf_counter() - began, tokens

    def _tokens(self, shortest: int, longest: int) -> Tokens:
        """Random rows, all of whose tokens count."""
        rng = np.random.default_rng(0)
        rows: list[Encoded] = []
        for length in rng.integers(shortest, longest + 1, 64):
            ids = rng.integers(5, self.shape.config.vocab_size, length).astype(np.int32)
            rows.append(Encoded(ids, ids))
        return TokenisedData(rows, rows[:1], DataReport()).write(self.folder / f"{shortest}-{longest}")[0]

    def _make_room(self) -> None:
        """Give back what torch keeps in reserve of the other side's: both would not fit, and each be slowed down."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    """For the table's title."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


if __name__ == "__main__":
    main()
