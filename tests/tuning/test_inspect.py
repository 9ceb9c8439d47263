"""What is known of a base before its weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AttentionInterface,
    BloomConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
)

from cluster.errors import InputError
from tuning.inspect import BaseOutline, load_tokenizer, outline, trial_faults
from tuning.spec import BaseSpec, TrialConfig


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> BaseOutline:
    return outline(BaseSpec(model=str(tiny_base)))


def trial(**knobs: Any) -> TrialConfig:
    fields: dict[str, Any] = {"rank": 4, "alpha": 8.0, **knobs}
    return TrialConfig(**fields)


def fault_of(call: Any, model: Path) -> str:
    with pytest.raises(InputError) as error:
        call(BaseSpec(model=str(model)))
    assert len(error.value.faults) == 1
    return str(error.value)


def test_layers_shapes_and_size_come_without_weights(tiny_base: Path, tiny: BaseOutline, tmp_path: Path) -> None:
    assert len(tiny.sites) == 2 * 7
    assert tiny.sites["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert tiny.sites["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert tiny.sites["model.layers.1.mlp.down_proj"] == (64, 128)
    assert not any("lm_head" in site for site in tiny.sites)
    per_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    assert tiny.parameters == 2 * per_layer + 64 + 2 * 261 * 64
    assert tiny.model_type == "llama"
    shutil.copy(tiny_base / "config.json", tmp_path)
    assert outline(BaseSpec(model=str(tmp_path))) == tiny


def test_the_tokenizer_is_the_base_s(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(BaseSpec(model=str(tiny_base)))
    assert tokenizer.is_fast
    assert tokenizer.chat_template


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert fault_of(outline, tmp_path / "missing").startswith(
        "base.model: must be a model's folder, with a config.json"
    )
    assert fault_of(outline, tmp_path).startswith("base.model: must be a model's folder, with a config.json")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    assert fault_of(outline, tmp_path).startswith("base.model: must be a model folder or hub id")
    (tmp_path / "config.json").write_text("{broken")
    assert fault_of(outline, tmp_path).startswith("base.model: must be a model folder or hub id")


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert fault_of(outline, tmp_path).startswith("base.model: must be a causal language model")


def test_a_folder_without_a_tokenizer_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    assert fault_of(load_tokenizer, tmp_path).startswith("base.model: must have a tokenizer")


def test_trials_that_fit_have_no_faults(tiny: BaseOutline) -> None:
    groups = ["all-linear", "attention", "mlp", ["q_proj", "model.layers.1.mlp.up_proj"]]
    trials = [("train.", trial(target_modules=targets, rank=32)) for targets in groups]
    assert trial_faults(tiny, [*trials, ("train.", trial(rank=64, target_modules=["q_proj"]))]) == []


@pytest.mark.parametrize(
    ("config", "mixed"),
    [
        (OPTConfig(num_hidden_layers=1), {"fc1", "fc2"}),
        (LlamaConfig(num_hidden_layers=1), set[str]()),
        (GPT2Config(n_layer=1), set[str]()),
        (BloomConfig(n_layer=1), set[str]()),
        (Gemma3TextConfig(num_hidden_layers=1), set[str]()),
        (DeepseekV3Config(num_hidden_layers=1), {"kv_b_proj"}),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_layers_that_mix_rows_are_found_without_weights(config: Any, mixed: set[str], tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    found = outline(BaseSpec(model=str(tmp_path)))
    assert {name.rpartition(".")[2] for name in found.mixed} == mixed
    assert found.mixed <= found.sites.keys()


def test_every_fault_of_every_trial_is_told_once(tiny: BaseOutline) -> None:
    trials = [
        ("space.", trial(target_modules=["c_attn"])),
        ("space.", trial(rank=33)),
        ("space.", trial(target_modules=["c_attn"], rank=2)),
        ("space.", trial(rank=65, target_modules="mlp")),
        ("space.", trial(rank=8)),
    ]
    leaves = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    k_proj, gate_proj = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.gate_proj"
    assert [str(fault) for fault in trial_faults(tiny, trials)] == [
        f"space.target_modules: 'c_attn' matches no linear layer of the base; it has {leaves}",
        f"space.rank: must be at most 32, the smaller side of {k_proj}, got 33",
        f"space.rank: must be at most 64, the smaller side of {gate_proj}, got 65",
    ]


def test_looking_for_what_keeps_rows_apart_leaves_nothing_behind(tiny_base: Path) -> None:
    """transformers keeps each attention function that it is told of, and all of a process share them."""
    spec = BaseSpec(model=str(tiny_base))
    assert outline(spec, packing=True).end_to_end_obstacle is None
    before = set(AttentionInterface._global_mapping)
    assert outline(spec, packing=True).end_to_end_obstacle is None
    assert set(AttentionInterface._global_mapping) == before


def test_a_fault_of_our_own_attention_is_not_taken_for_the_architecture_s(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BaseSpec(model=str(tiny_base))
    monkeypatch.setattr("tuning.engine.attention.NOT_UNDERSTOOD", None)
    assert outline(spec).end_to_end_obstacle is None  # not asked for
    with pytest.raises(TypeError):
        outline(spec, packing=True)


def test_what_an_architecture_itself_cannot_do_without_numbers_is_not_known(tmp_path: Path) -> None:
    """Mixtral's router hands its experts rows that torch multiplies in BF16 only on the meta device."""
    MixtralConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert outline(BaseSpec(model=str(tmp_path)), packing=True).end_to_end_obstacle is None
