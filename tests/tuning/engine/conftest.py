"""What the engine's tests share: one float32 base, rows of many lengths, one CPU thread."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.tuning.engine.alike import Alone
from tuning.engine.base import Base
from tuning.engine.data import Tokens, prepare
from tuning.engine.trainer import Trainer
from tuning.inspect import load_tokenizer
from tuning.spec import BaseSpec, DataSpec

Data = tuple[Tokens, Tokens]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small lose more to the threads' meetings than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_spec(tiny_base: Path) -> BaseSpec:
    return BaseSpec(model=str(tiny_base), compute_dtype="float32")


@pytest.fixture(scope="session")
def base(base_spec: BaseSpec) -> Base:
    """Shared: a test must leave no slots behind, which the trainer never does."""
    return Base(base_spec)


@pytest.fixture(scope="session")
def data(base_spec: BaseSpec, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """90 rows to train on and 10 to evaluate on, of 14 to 61 tokens, about half of them targets."""
    folder = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "ab" * rng.randint(3, 15)},
                {"role": "assistant", "content": "".join(rng.choices("xyz ", k=rng.randint(5, 28)))},
            ]
        }
        for _ in range(100)
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(train=str(source), max_length=128)
    train, evaluation, report = prepare(spec, load_tokenizer(base_spec), folder / "tokens", 0)
    assert (report.train_rows, report.eval_rows, report.cut_rows, report.dropped_rows) == (90, 10, 0, 0)
    return train, evaluation


@pytest.fixture(scope="session")
def alone(base_spec: BaseSpec, base: Base, data: Data) -> Alone:
    """Trains single trials with peft on the shared base."""
    return Alone(base_spec, base, data)


@pytest.fixture
def make_trainer(base: Base, data: Data) -> Callable[..., Trainer]:
    """Trainers on the shared base; the tests use them one pass at a time, so they do not meet."""
    return lambda **options: Trainer(base, *data, **options)
