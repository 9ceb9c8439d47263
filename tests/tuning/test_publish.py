"""From a sweep's folder to the registry, with real adapters from a real trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InputError, NotFoundError
from serving.registry import Registry
from tests.tiny import make_base
from tests.tuning.make import (
    finish_checkpoint,
    report,
    sweep_spec,
    write_checkpoint,
    write_rows,
    write_sweep,
    write_trial,
)
from tuning.engine.base import Base
from tuning.engine.data import prepare
from tuning.engine.trainer import Trainer
from tuning.inspect import load_tokenizer
from tuning.publish import publish_trial
from tuning.results import Sweep, read_sweep
from tuning.spec import TrialConfig


@pytest.fixture(scope="module")
def sweep(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep with two trained trials, t000 the better, and t002 without an adapter."""
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "s", base=tiny_base)
    spec = sweep_spec(tiny_base, write_rows(folder / "rows.jsonl"))
    train, evaluation, _ = prepare(spec.data, load_tokenizer(spec.base), folder / "data", 0)
    trainer = Trainer(Base(spec.base), train, evaluation)
    for index, loss in enumerate((1.0, 2.0)):
        trial = write_trial(folder / f"t{index:03d}", [loss, loss])
        config = TrialConfig(rank=2, alpha=4.0, target_modules=["q_proj"], learning_rate=1e-2, batch_size=2, steps=2)
        slot = trainer.attach(config)
        trainer.step()
        checkpoint = trial / "checkpoint_000000"
        trainer.save(slot, checkpoint, spec.base.model, None)
        trainer.detach(slot)
        finish_checkpoint(checkpoint, report(loss, 4))
    write_trial(folder / "t002", [3.0])
    return read_sweep(folder)


def test_the_winner_becomes_the_next_version(sweep: Sweep, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first = publish_trial(sweep, registry, "support", by="ann", note="better wording")
    second = publish_trial(sweep, registry, "support", "t001")
    assert (first.id, second.id) == ("support@1", "support@2")
    assert registry.resolve("support").id == "support@2"
    assert (first.rank, first.alpha, first.target_modules) == (2, 4.0, ("q_proj",))
    assert first.metrics["eval_loss"] == 1.0
    assert first.lineage["trial"] == "t000"
    assert first.lineage["sweep"] == "tiny"
    assert first.lineage["learning_rate"] == 0.1
    assert first.lineage["target_modules"] == "q_proj"
    assert (registry.path(first) / "adapter_model.safetensors").is_file()
    entry = registry.entry("support", 1)
    assert (entry.by, entry.note) == ("ann", "better wording")
    assert registry.entry("support", 2).note is None


def test_what_cannot_be_published(sweep: Sweep, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(NotFoundError, match="no trial 't9'; there are t000, t001, t002"):
        publish_trial(sweep, registry, "support", "t9")
    with pytest.raises(NotFoundError, match="t002 has left no adapter"):
        publish_trial(sweep, registry, "support", "t002")
    with pytest.raises(InputError, match="name"):
        publish_trial(sweep, registry, "../support")
    with pytest.raises(InputError, match=r"by: must be one line .*\n.*note: must be one line"):
        publish_trial(sweep, registry, "support", by="", note="two\nlines")
    assert registry.names() == []


def test_a_sweep_without_results_has_no_winner(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no trial has left an adapter"):
        publish_trial(read_sweep(write_sweep(tmp_path / "s")), Registry(tmp_path / "r"), "support")


def test_another_base_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    """The sweep's folder says one base, the adapter another: someone mixed up folders."""
    other = make_base(tmp_path / "other", hidden=128)
    folder = write_sweep(tmp_path / "s", base=other)
    trial = write_trial(folder / "t000", [1.0, 1.0])
    assert sweep.winner is not None
    assert sweep.winner.adapter is not None
    (trial / "checkpoint_000000").symlink_to(sweep.winner.adapter.parent)
    with pytest.raises(InputError, match="base"):
        publish_trial(read_sweep(folder), Registry(tmp_path / "r"), "support")


def test_a_base_that_is_gone_is_told_with_its_file_and_field(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", base=Path("/nonexist"))
    write_checkpoint(write_trial(folder / "t000", [3.0, 2.0]), 4, 2.0)
    with pytest.raises(InputError, match=rf"^{folder}/sweep\.yaml: base\.model: must be a model's folder"):
        publish_trial(read_sweep(folder), Registry(tmp_path / "registry"), "support")
