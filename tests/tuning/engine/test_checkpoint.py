"""A slot on disk: PEFT reads the adapter, training goes on bit for bit, a crash in writing loses nothing before it.

Logits are compared on the base that the trainer has: its weights rounded to NF4, float32 compute.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tuning.engine.peft_loop import load_nf4
from tests.tuning.limits import file_limit
from tuning.engine import checkpoint
from tuning.engine.base import Base
from tuning.engine.pack import Pack
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers by the old name
)
MakeTrainer = Callable[[], Trainer]
IDS = torch.arange(5, 45).view(2, 20)


def config(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 4, "alpha": 8.0, "learning_rate": 2e-2, "batch_size": 2, "steps": 6, **knobs}
    return TrialConfig(**fields)


def trained(trainer: Trainer, trial: TrialConfig, passes: int = 3) -> int:
    slot = trainer.attach(trial)
    for _ in range(passes):
        trainer.step([slot])
    return slot


def logits_of(trainer: Trainer, slot_id: int) -> Tensor:
    """The trainer's own, through its packed layers."""
    pack = Pack({slot_id: trainer.slots[slot_id]}, {slot_id: 2}, 20, trainer.base.dtype)
    pack.place([2 * 20])
    trainer.base.set_stacks(pack.prepare())
    try:
        with torch.no_grad():
            return trainer.base.head(trainer.base.features(IDS))
    finally:
        trainer.base.set_stacks({})


# The adapter

SHAPES = {
    "group": config(target_modules="mlp"),
    "all": config(rank=3, alpha=5.0, dropout=0.4),
    "rsLoRA": config(target_modules="attention", rslora=True, rank=8, alpha=3.5),
    "list": config(target_modules=["v_proj", "down_proj"]),
    "one layer": config(target_modules=["model.layers.1.self_attn.q_proj"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_loads_the_adapter_and_has_the_trainer_s_logits(
    shape: str, make_trainer: MakeTrainer, base: Base, base_spec: BaseSpec, tmp_path: Path
) -> None:
    trainer = make_trainer()
    slot = trained(trainer, SHAPES[shape])
    trainer.save(slot, tmp_path, base_spec.model, None)
    ours = logits_of(trainer, slot)
    assert float((ours - base.head(base.features(IDS))).abs().max()) > 5e-3  # it learnt something to compare

    # peft warns of a key that it misses, and warnings are errors here.
    quantised: Any = PeftModel.from_pretrained(load_nf4(base_spec.model), str(tmp_path / "adapter"))
    embedded = quantised.get_input_embeddings()(IDS).detach().requires_grad_()
    torch.testing.assert_close(quantised(inputs_embeds=embedded).logits, ours, rtol=1e-4, atol=1e-5)

    plain = AutoModelForCausalLM.from_pretrained(base_spec.model, dtype=torch.float32)
    for name, site in base.sites.items():
        linear: Any = plain.get_submodule(name)
        linear.weight.data.copy_(site._dequantise())
    rounded: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(rounded(IDS).logits, ours, rtol=1e-4, atol=1e-5)
    adapted = {name for name, module in rounded.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.{site}" for site in trainer.slots[slot].shapes}


def test_the_adapter_s_files_say_what_it_is(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trial = SHAPES["rsLoRA"]
    folder = tmp_path / "c"
    trainer.save(trained(trainer, trial), folder, "some/model", "abc123")
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "trial.json",
        "state.pt",
        "metrics.json",
    }
    written = json.loads((folder / "adapter/adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "revision": "abc123",
        "r": 8,
        "lora_alpha": 3.5,
        "use_rslora": True,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "inference_mode": True,
        "bias": "none",
    }
    assert {key: sorted(value) if isinstance(value := written[key], list) else value for key in expected} == expected
    assert TrialConfig.model_validate_json((folder / "trial.json").read_text()) == trial


@pytest.mark.parametrize(
    ("chosen", "others", "targets", "names"),
    [
        (["a.0.attn.q", "a.1.attn.q", "a.0.attn.v"], ["a.0.mlp.up"], "attention", ["q", "v"]),
        (["a.0.attn.q"], ["a.0.mlp.up"], ["q"], ["q"]),
        (["a.0.attn.q", "a.0.attn.Wo"], ["a.0.mlp.Wo"], "attention", ["a.0.attn.Wo", "a.0.attn.q"]),
    ],
)
def test_target_names_mean_the_chosen_sites_and_no_others(
    chosen: list[str], others: list[str], targets: str | list[str], names: list[str]
) -> None:
    assert checkpoint.target_names(chosen, [*chosen, *others], targets) == names


# Going on


def run_passes(trainer: Trainer, passes: int) -> list[float]:
    return [report.loss for _ in range(passes) for report in trainer.step()]


@pytest.mark.parametrize("stop_after", [4, 5], ids=["between steps", "in the middle of a step"])
@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_trial_goes_on_from_a_checkpoint_bit_for_bit(
    optimizer: str, stop_after: int, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trial = config(
        optimizer=optimizer, dropout=0.3, accumulation=2, schedule="cosine", warmup_steps=1, weight_decay=0.1, seed=3
    )
    whole = make_trainer()
    slot = whole.attach(trial)
    losses = run_passes(whole, 12)

    first = make_trainer()
    interrupted = first.attach(trial)
    seen = run_passes(first, stop_after)
    first.save(interrupted, tmp_path, "x", None)
    run_passes(first, 1)  # what came after the checkpoint is lost

    second = make_trainer()
    resumed = second.attach(trial, checkpoint.load(tmp_path))
    assert second.slots[resumed].step == 2
    assert seen + run_passes(second, 8) == losses
    assert second.slots[resumed].finished
    assert torch.equal(second.slots[resumed].flat, whole.slots[slot].flat)


def test_a_finished_trial_s_checkpoint_is_finished(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    slot = trained(trainer, config(steps=2))
    trainer.save(slot, tmp_path, "x", None)
    again = make_trainer()
    resumed = again.attach(config(steps=2), checkpoint.load(tmp_path))
    assert again.step() == []
    assert again.evaluate([resumed])[resumed] == trainer.evaluate([slot])[slot]


# Writing

FILES = ["adapter", "metrics.json", "state.pt", "trial.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_replaces_the_one_before(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer, folder = make_trainer(), tmp_path / "c"
    slot = trained(trainer, config(), passes=1)
    trainer.save(slot, folder, "x", None)
    before = (folder / "adapter/adapter_model.safetensors").read_bytes()
    trainer.step()
    trainer.save(slot, folder, "x", None)
    assert checkpoint.load(folder)["step"] == 2
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() != before
    assert names(folder) == FILES
    assert names(tmp_path) == ["c"]


def test_a_snapshot_is_of_its_moment(make_trainer: MakeTrainer, base: Base, tmp_path: Path) -> None:
    """It is written while training goes on."""
    trainer = make_trainer()
    slot = trained(trainer, config(), passes=2)
    snapshot = trainer.snapshot(slot)
    before = trainer.slots[slot].flat.detach().clone()
    trainer.step()
    checkpoint.save(snapshot, tmp_path / "c", "x", None, base.sites)
    written = checkpoint.load(tmp_path / "c")
    assert written["step"] == 2
    assert torch.equal(written["flat"], before)
    assert not torch.equal(trainer.slots[slot].flat, before)


def test_a_checkpoint_that_fails_leaves_the_one_before(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer, folder = make_trainer(), tmp_path / "c"
    slot = trained(trainer, config(), passes=1)
    trainer.save(slot, folder, "x", None)
    trainer.step()
    not_json: Any = object()
    with pytest.raises(TypeError):
        trainer.save(slot, folder, not_json, None)
    assert checkpoint.load(folder)["step"] == 1
    assert names(folder) == FILES
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("fails_at", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "state.pt"])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    fails_at: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer, folder = make_trainer(), tmp_path / "c"
    slot = trained(trainer, config(), passes=1)
    trainer.save(slot, folder, "x", None)
    trainer.step()
    with file_limit((folder / fails_at).stat().st_size - 10), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        trainer.save(slot, folder, "x", None)
    assert names(tmp_path) == ["c"]
    assert names(folder) == FILES
    assert checkpoint.load(folder)["step"] == 1
    trainer.save(slot, folder, "x", None)  # there is room again
    assert checkpoint.load(folder)["step"] == 2


def test_a_folder_without_a_complete_checkpoint_is_not_found(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "nowhere")
    trainer, folder = make_trainer(), tmp_path / "c"
    trainer.save(trained(trainer, config()), folder, "x", None)
    (folder / "state.pt").unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.load(folder)


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    """One bit of the weights, as a bad disk does it; the size stays, and torch alone would not notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose(path: Path) -> None:
    path.unlink()


@pytest.fixture
def two_checkpoints(make_trainer: MakeTrainer, tmp_path: Path) -> Path:
    """After 1 and 2 steps, and what a crash leaves of a third."""
    trainer = make_trainer()
    slot = trainer.attach(config())
    for step in (1, 2):
        trainer.step([slot])
        trainer.save(slot, tmp_path / f"checkpoint_{step:06d}", "x", None)
    (tmp_path / ".writing-abc" / "new").mkdir(parents=True)
    (tmp_path / ".writing-abc" / "new" / "state.pt").write_text("half")
    return tmp_path


def test_the_last_checkpoint_is_gone_on_from(two_checkpoints: Path) -> None:
    found, state, passed_over = checkpoint.newest(two_checkpoints)
    assert found is not None
    assert state is not None
    assert (found.steps, state["step"], passed_over) == (2, 2, [])
    assert names(two_checkpoints) == ["checkpoint_000001", "checkpoint_000002"]


@pytest.mark.parametrize(("damage", "told"), [(cut, "cut short"), (flip, "wrong checksum"), (lose, None)])
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], told: str | None, two_checkpoints: Path
) -> None:
    damage(two_checkpoints / "checkpoint_000002" / "state.pt")
    found, state, passed_over = checkpoint.newest(two_checkpoints)
    assert found is not None
    assert state is not None
    assert (found.steps, state["step"]) == (1, 1)
    assert [told in note for note in passed_over if told] == [True] * bool(told)
    damage(two_checkpoints / "checkpoint_000001" / "state.pt")
    assert checkpoint.newest(two_checkpoints)[:2] == (None, None)


def test_a_damaged_checkpoint_is_written_again(two_checkpoints: Path, make_trainer: MakeTrainer) -> None:
    last = two_checkpoints / "checkpoint_000002"
    whole = checkpoint.load(last)
    cut(last / "state.pt")
    trainer = make_trainer()
    slot = trainer.attach(config(), checkpoint.newest(two_checkpoints)[1])
    trainer.step([slot])
    trainer.save(slot, last, "x", None)
    again = checkpoint.load(last)
    assert torch.equal(again["flat"], whole["flat"])
    assert names(two_checkpoints) == ["checkpoint_000001", "checkpoint_000002"]


WRITER = """
import sys
from pathlib import Path
import torch
from tuning.engine.base import Base
from tuning.engine.data import Tokens
from tuning.engine.trainer import Trainer
from tuning.spec import BaseSpec, TrialConfig

model, train, evaluation, folder = sys.argv[1:]
torch.set_num_threads(1)
base = Base(BaseSpec(model=model, compute_dtype="float32"))
trainer = Trainer(base, Tokens(Path(train)), Tokens(Path(evaluation)))
config = TrialConfig(rank=4, alpha=8.0, learning_rate=2e-2, batch_size=2, steps=100_000, dropout=0.3)
slot = trainer.attach(config)
for step in range(1, 100_000):
    trainer.step([slot])
    trainer.save(slot, Path(folder) / f"checkpoint_{step:06d}", "x", None)
    print(step, flush=True)
"""


def test_kill_9_while_it_writes_costs_one_checkpoint_at_most(
    make_trainer: MakeTrainer, base_spec: BaseSpec, tmp_path: Path
) -> None:
    """A process that does little else than write checkpoints is killed; from what is there, training goes on bit for
    bit as it would have without a break.
    """
    trainer = make_trainer()
    arguments = [base_spec.model, str(trainer.train.path), str(trainer.evaluation.path), str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(3)][-1]
        time.sleep(0.05)  # somewhere in the next step or its checkpoint
        writer.kill()
        told = max([told, *map(int, writer.stdout.read().split())])
    found, state, passed_over = checkpoint.newest(tmp_path)
    assert found is not None
    assert state is not None
    assert passed_over == []
    assert found.steps in (told, told + 1)
    trial = config(steps=100_000, dropout=0.3)
    resumed = trainer.attach(trial, state)
    whole = trainer.attach(trial)
    for _ in range(found.steps + 2):
        trainer.step([whole])
    for _ in range(2):
        trainer.step([resumed])
    assert torch.equal(trainer.slots[resumed].flat, trainer.slots[whole].flat)
