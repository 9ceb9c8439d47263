"""One trial in a process of its own, by transformers, peft and bitsandbytes: what a Tune function does today."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from tests.tuning.engine.peft_loop import PeftLoop, pad_rows
from tuning.engine.base import select_targets
from tuning.engine.data import EVAL_FILE, TRAIN_FILE, Tokens
from tuning.engine.slot import Slot
from tuning.inspect import outline
from tuning.spec import BaseSpec, TrialConfig


def train_alone(base: BaseSpec, config: TrialConfig, data: Path, report: Callable[[float, int], None]) -> None:
    """Train ``config`` on the rows in ``data``, reporting the evaluation loss as often as the trial is to."""
    train, evaluation = Tokens(data / TRAIN_FILE), Tokens(data / EVAL_FILE)
    sites = outline(base).sites
    shapes = {name: sites[name] for name in select_targets(sites, config.target_modules)}
    first = Slot(config, shapes, train, torch.device("cpu")).weights()
    loop = PeftLoop(base.model, config, train, first, dtype=getattr(torch, base.compute_dtype))
    for step in range(1, config.steps + 1):
        loop.step()
        if step % config.report_every == 0 or step == config.steps:
            report(mean_loss(loop, evaluation, config.eval_batch_size), step)


@torch.no_grad()
def mean_loss(loop: PeftLoop, evaluation: Tokens, batch_size: int) -> float:
    """Mean loss over the targets of the evaluation rows.

    In training mode, for without dropout it is the same, and in evaluation mode bitsandbytes would lay its weights out
    for CPUs anew.
    """
    order = sorted(range(len(evaluation)), key=evaluation.length)
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        ids, attention, labels = pad_rows(evaluation, order[start : start + batch_size])
        logits = loop.model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
        count += int((labels[:, 1:] != -100).sum())
    return total / count
