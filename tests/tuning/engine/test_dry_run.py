"""A pass on the meta device allocates what the real one does: the truth is what torch's allocator saw in real steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
)

from tests.tiny import make_base
from tuning.engine.base import Base
from tuning.engine.counting import ArchitectureError, counting
from tuning.engine.data import Tokens, prepare
from tuning.engine.dry_run import DryRun, LayerStack, dry_rms_norm
from tuning.engine.trainer import Trainer
from tuning.estimate import Case, Estimator, RowShape
from tuning.inspect import load_tokenizer
from tuning.memory import CODE_BYTES, GIB, HostBytes
from tuning.spec import BaseSpec, DataSpec, TrialConfig

TOKENS = 64
"""Of a row: a CPU without bfloat16 instructions needs two minutes for these tests, and more than three with 128."""
GPU_TOKENS = 128
WITHIN = 0.1
LAYERS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More layers than are run one by one, wide enough that tensors and not objects are what counts."""
    return make_base(tmp_path_factory.mktemp("base"), hidden=256, layers=LAYERS)


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokens, Tokens]:
    return write_rows(model, tmp_path_factory.mktemp("rows"), TOKENS)


def write_rows(model: Path, folder: Path, tokens: int) -> tuple[Tokens, Tokens]:
    """Rows of so many tokens, all of which count but the first."""
    line = json.dumps({"text": "x" * (tokens - 1)}) + "\n"
    (folder / "rows.jsonl").write_text(line * 64)
    spec = DataSpec(train=str(folder / "rows.jsonl"), format="text", loss_on="all", max_length=tokens)
    train, evaluation, report = prepare(spec, load_tokenizer(BaseSpec(model=str(model))), folder / "tokens", 0)
    assert report.longest == tokens
    return train, evaluation


def allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes at one time, and those that are left, of what ``work`` allocates, by torch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    in_order = sorted(events.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in in_order if event.name() == "[memory]"]
    del kept
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak, now


def host_of(
    spec: BaseSpec, trial: TrialConfig, slots: int, kind: Literal["gpu", "cpu"], *, packing: bool = False
) -> HostBytes:
    tokens = GPU_TOKENS if kind == "gpu" else TOKENS
    rows = RowShape(tokens, tokens - 1, tokens, tokens - 1, "the rows")
    return Estimator(spec, kind, packing=packing).host(Case(trial, rows, spec.gradient_checkpointing), slots)


@pytest.mark.parametrize(
    ("slots", "packing", "checkpointing"), [(1, False, False), (4, False, False), (3, True, False), (2, True, True)]
)
@pytest.mark.parametrize(
    ("dtype", "knobs"),
    [
        ("float32", {"batch_size": 2, "rank": 8}),
        ("float32", {"batch_size": 1, "rank": 64, "target_modules": ["q_proj", "down_proj"]}),
        ("bfloat16", {"batch_size": 3, "rank": 4, "target_modules": "attention", "dropout": 0.1}),
        ("bfloat16", {"batch_size": 2, "rank": 32, "optimizer": "paged_adamw_8bit", "eval_batch_size": 4}),
    ],
)
def test_a_host_needs_what_real_steps_allocate(
    model: Path,
    data: tuple[Tokens, Tokens],
    dtype: Any,
    knobs: dict[str, Any],
    slots: int,
    packing: bool,
    checkpointing: bool,
) -> None:
    spec = BaseSpec(model=str(model), compute_dtype=dtype, gradient_checkpointing=checkpointing)
    trial = TrialConfig.model_validate({"alpha": 16.0, "steps": 8, "eval_batch_size": 2, **knobs})
    told = host_of(spec, trial, slots, "cpu", packing=packing)
    base = Base(spec)
    trainer = Trainer(base, *data, packing=packing)
    tables = len(base.sites) * CODE_BYTES  # which the report leaves out, as the paper does
    measured = base.report.memory_mib * 2**20 + tables
    assert told.weights + told.constants + told.unquantised == pytest.approx(measured, rel=1e-6)

    for _ in range(slots):
        trainer.attach(trial)
    # What the first step leaves is the optimizers' state and the stacks of the pack.
    _, first = allocated(trainer.step)
    state = sum(slot.flat.nbytes + slot.grad.nbytes for slot in trainer.slots.values())
    assert told.adapters + told.gradients + told.optimizer == pytest.approx(state + first, rel=0.02)
    peak, left = allocated(trainer.step)
    assert left <= 0
    assert max(told.activations + max(told.logits, told.layer), told.step) == pytest.approx(peak, rel=WITHIN)
    peak, _ = allocated(lambda: trainer.evaluate(list(trainer.slots)))
    assert told.evaluation == pytest.approx(peak, rel=WITHIN)


def test_more_slots_and_rows_are_told_without_running_them(model: Path) -> None:
    """Of seven rows at once, the same as a run of seven rows."""
    trial = TrialConfig(rank=8, alpha=16.0)
    dry = DryRun(on_meta(AutoConfig.from_pretrained(model)), torch.bfloat16)
    growth = dry.training(trial, TOKENS, gradient_checkpointing=False)
    with counting_all_layers(dry):
        run = dry._pass(trial, 7, TOKENS, training=True)
    assert growth.saved(7) == run.kept
    assert growth.peak(7) == max(run.timeline)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"], ["model.layers.2.mlp.up_proj", "q_proj"]])
def test_layers_that_are_left_out_count(model: Path, targets: Any, checkpointing: bool) -> None:
    trial = TrialConfig(rank=8, alpha=16.0, target_modules=targets)
    dry = DryRun(on_meta(AutoConfig.from_pretrained(model)), torch.float32)
    few = dry.training(trial, TOKENS, gradient_checkpointing=checkpointing)
    with counting_all_layers(dry):
        whole = dry.training(trial, TOKENS, gradient_checkpointing=checkpointing)
    assert (few.left_out, whole.left_out) == (2 if isinstance(targets, str) or len(targets) == 1 else 0, 0)
    for rows in (1, 2, 9):
        assert few.saved(rows) == whole.saved(rows)
        assert few.peak(rows) == whole.peak(rows)


@contextmanager
def counting_all_layers(dry: DryRun) -> Generator[None]:
    stack, dry._stack = dry._stack, None
    yield
    dry._stack = stack


def test_gradient_checkpointing_keeps_the_layers_inputs_only(model: Path) -> None:
    trial = TrialConfig(rank=8, alpha=16.0)
    dry = DryRun(on_meta(AutoConfig.from_pretrained(model)), torch.bfloat16)
    growth = dry.training(trial, TOKENS, gradient_checkpointing=True)
    every_layer = LAYERS * TOKENS * 256 * 2
    a_row = growth.saved(9) - growth.saved(8)
    assert every_layer < a_row < 2 * every_layer  # and the last norm, the features, their gradient
    free = dry.training(trial, TOKENS, gradient_checkpointing=False)
    assert free.saved(8) > 5 * growth.saved(8)
    # The layer that is computed again is on top.
    assert growth.peak(8) - growth.saved(8) > (free.saved(8) - growth.saved(8)) / LAYERS


def test_checkpointing_is_off_again_afterwards(model: Path) -> None:
    trial = TrialConfig(rank=8, alpha=16.0)
    dry = DryRun(on_meta(AutoConfig.from_pretrained(model)), torch.bfloat16)
    before = dry.training(trial, TOKENS, gradient_checkpointing=False).saved(4)
    dry.training(trial, TOKENS, gradient_checkpointing=True)
    assert dry.training(trial, TOKENS, gradient_checkpointing=False).saved(4) == before


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_transposed_layers_are_counted_as_the_linear_ones_that_they_become() -> None:
    """GPT-2's own class of linear layer."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    dry = DryRun(on_meta(config), torch.float32)
    trial = TrialConfig(rank=4, alpha=8.0, target_modules=["c_attn"])
    assert dry.training(trial, 8, gradient_checkpointing=False).saved(2) > 0


def test_layers_of_two_forms_are_all_run() -> None:
    assert LayerStack.of(on_meta(Gemma2Config(**SMALL))) is None  # sliding windows in every other layer
    stack = LayerStack.of(on_meta(LlamaConfig(**SMALL)))
    assert stack is not None
    with stack.first(2):
        assert len(stack.parent.layers) == 2
    assert len(stack.parent.layers) == 4


def test_a_pass_that_looks_at_values_is_told_with_its_place() -> None:
    with pytest.raises(ArchitectureError, match="JetMoeTopKGating does other work for other values"):
        DryRun(on_meta(JetMoeConfig(**SMALL)), torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_needs_what_real_steps_allocate(
    data: tuple[Tokens, Tokens], dtype: Any, checkpointing: bool, tmp_path: Path
) -> None:
    """Whatever the router says, experts work on as many rows."""
    shape: dict[str, Any] = {**SMALL, "vocab_size": 261, "hidden_size": 128}
    config = MixtralConfig(**shape, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path), compute_dtype=dtype, gradient_checkpointing=checkpointing)
    trial = TrialConfig(rank=8, alpha=16.0, steps=8, eval_batch_size=2, batch_size=2)
    told = host_of(spec, trial, 2, "cpu")
    base = Base(spec)
    assert told.unquantised > 4 * told.weights
    tables = len(base.sites) * CODE_BYTES
    whole = told.weights + told.constants + told.unquantised
    assert whole == pytest.approx(base.report.memory_mib * 2**20 + tables, rel=1e-6)
    trainer = Trainer(base, *data)
    for _ in range(2):
        trainer.attach(trial)
    trainer.step()
    peak, _ = allocated(trainer.step)
    assert max(told.activations + max(told.logits, told.layer), told.step) == pytest.approx(peak, rel=WITHIN)
    peak, _ = allocated(lambda: trainer.evaluate(list(trainer.slots)))
    assert told.evaluation == pytest.approx(peak, rel=WITHIN)


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x


class Looking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


@pytest.mark.parametrize(
    ("module", "told"), [(Wrong(), r"Wrong fails: a and b must have same.*"), (Looking(), "Looking does other work.*")]
)
def test_a_pass_that_torch_refuses_is_told_as_that(module: nn.Module, told: str) -> None:
    """Not as one that looks at values."""
    with pytest.raises(ArchitectureError, match=f"^{told}$"), counting():
        module(torch.empty(2, 3, device="meta"))


def test_experts_of_equally_many_rows_are_a_product_of_three_dimensions() -> None:
    rows = torch.empty(4, 8, 16, dtype=torch.bfloat16, device="meta")
    weights = torch.empty(4, 16, 32, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    with counting():
        assert torch.ops.aten._grouped_mm(rows, weights).shape == (4, 8, 32)
        assert torch.ops.aten._grouped_mm(rows[0], weights, ends).shape == (8, 32)


def test_the_counter_sees_what_lives_and_what_was_there_before() -> None:
    before = torch.empty(1000, device="meta")
    with counting() as count:
        view = before[10:].t() if before.dim() > 1 else before[10:]
        assert count.now == 0
        one = view + 1
        assert count.now == 990 * 4
        two = one.view(99, 10).float().double()
        assert count.now == 990 * 12
        del one
        assert count.now == 990 * 8
        del two
    assert count.now == 0
    assert max(count.timeline) == 990 * 12


def test_a_norm_on_a_gpu_keeps_its_input_and_a_number_a_row() -> None:
    x = torch.empty(3, 5, 1000, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    with counting() as count:
        y = dry_rms_norm(x, [1000], weight, 1e-6)
        assert count.now == y.nbytes + 15 * 4
        y.backward(torch.empty_like(y))
        assert max(count.timeline) == 3 * y.nbytes + 15 * 4
        assert count.now == 2 * y.nbytes  # y and the gradient of x


def test_the_norms_of_a_gpu_are_counted_as_that(model: Path) -> None:
    """Of bfloat16 the written-out ones keep float32, which is twice as much."""
    trial = TrialConfig(rank=8, alpha=16.0)
    config = AutoConfig.from_pretrained(model)
    written = on_meta(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuning.engine.dry_run.fuse_norms", lambda *_: 0)
        more = DryRun(written, torch.bfloat16).training(trial, TOKENS, gradient_checkpointing=False)
    less = DryRun(on_meta(config), torch.bfloat16).training(trial, TOKENS, gradient_checkpointing=False)
    x = 9 * TOKENS * 256 * 2
    assert more.saved(9) - less.saved(9) == pytest.approx((2 * LAYERS + 1) * x, rel=0.1)


def test_a_loss_has_so_many_logits_at_once(model: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = 50_000
    dry = DryRun(on_meta(config), torch.bfloat16)
    small, chunk, more = (dry.losses(targets, training=True).peak for targets in (1024, 2048, 8192))
    assert small == pytest.approx(
        1024 * 50_000 * 12, rel=0.05
    )  # logits twice in float32, and in bfloat16 with gradient
    assert chunk == pytest.approx(2 * small, rel=0.01)
    assert more < 1.1 * chunk
    assert dry.losses(1024, training=False).peak < small


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_a_host_needs_what_a_gpu_allocates(tmp_path: Path, slots: int) -> None:
    """Against torch.cuda.max_memory_allocated; paged optimizer state is not in torch's books, so it is left out."""
    model = make_base(tmp_path / "base", hidden=1024, layers=8)
    spec = BaseSpec(model=str(model))
    trial = TrialConfig(rank=32, alpha=16.0, batch_size=16, steps=4, eval_batch_size=16)
    told = host_of(spec, trial, slots, "gpu")
    torch.cuda.empty_cache()
    some = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.addmm(some, some, some).sum().backward()  # cuBLAS' own memory, forward and backward, is not the host's
    del some
    before = torch.cuda.memory_allocated()
    trainer = Trainer(Base(spec, "cuda"), *write_rows(model, tmp_path, GPU_TOKENS))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(slots):
        trainer.attach(trial)
    trainer.step()
    trainer.step()
    trainer.evaluate(list(trainer.slots))
    measured = torch.cuda.max_memory_allocated() - before
    assert told.least == pytest.approx(measured, rel=WITHIN)
    assert measured < GIB * 8
