"""The frozen base: what is quantised, what it measures, which layers a target means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconH1Config,
    Gemma2Config,
    Glm4MoeConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    MistralConfig,
    OPTConfig,
    Qwen3NextConfig,
)

from tests.tiny import make_base, make_tokenizer
from tests.tuning.engine.peft_loop import load_nf4
from tuning.engine.base import Base, may_use_row_attention, select_targets
from tuning.engine.lora import PackedLinear, Stack, Stretch
from tuning.inspect import outline
from tuning.spec import BaseSpec

LLAMA = [
    f"model.layers.{layer}.{leaf}"
    for layer in range(2)
    for leaf in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]
IDS = torch.arange(5, 45).view(2, 20)


def test_every_linear_layer_but_the_head_is_a_site(base: Base) -> None:
    assert list(base.sites) == LLAMA


def test_the_outline_knew_the_sites_before_the_weights_were_read(base: Base, base_spec: BaseSpec) -> None:
    expected = outline(base_spec)
    assert {name: tuple(site.base.weight.quant_state.shape) for name, site in base.sites.items()} == expected.sites  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert base.report.parameters == expected.parameters


def test_nothing_of_it_is_trained_and_it_evaluates(base: Base) -> None:
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    modules = [module for module in base.model.modules() if not isinstance(module, PackedLinear)]
    assert not any(module.training for module in modules)


def test_without_stacks_it_is_the_model_that_bitsandbytes_quantises(base: Base, base_spec: BaseSpec) -> None:
    plain = load_nf4(base_spec.model).requires_grad_(False)
    # With a gradient on its way bitsandbytes multiplies by the dequantised weight, as in training.
    embedded = plain.get_input_embeddings()(IDS).requires_grad_()
    torch.testing.assert_close(base.head(base.features(IDS)), plain(inputs_embeds=embedded).logits)


def test_head_of_features_saves_the_logits_of_other_positions(base: Base) -> None:
    assert isinstance(base.head, torch.nn.Linear)
    assert base.features(IDS).shape == (2, 20, 64)


def test_padding_on_the_right_changes_no_real_token(base: Base) -> None:
    padded = torch.nn.functional.pad(IDS, (0, 12))
    torch.testing.assert_close(base.features(padded)[:, :20], base.features(IDS), rtol=1e-5, atol=1e-6)


def test_bits_per_parameter_are_those_of_nf4_with_double_quantisation(tmp_path: Path) -> None:
    # In a base of this size every first-level block of 64 weights and every second-level block of 256 of them is full.
    spec = BaseSpec(model=str(make_base(tmp_path, hidden=256, layers=1)), compute_dtype="bfloat16")
    report = Base(spec).report
    linear = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
    assert report.quantised_parameters == linear
    assert report.bits_per_parameter == pytest.approx(4.127, abs=0.01)  # the paper's figure
    assert report.bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-6)
    plain = report.parameters - linear
    assert plain == 2 * 261 * 256 + 3 * 256
    expected = linear * report.bits_per_parameter / 8 + plain * 2  # bfloat16
    assert report.memory_mib == pytest.approx(expected / 2**20)


def test_tied_embeddings_are_counted_once_and_stay_unquantised(tmp_path: Path) -> None:
    spec = BaseSpec(model=str(make_base(tmp_path, layers=1, tied=True)), compute_dtype="float32")
    base = Base(spec)
    assert base.report.parameters - base.report.quantised_parameters == 261 * 64 + 3 * 64
    assert outline(spec).parameters == base.report.parameters
    assert not any("head" in site or "embed" in site for site in base.sites)


def test_bfloat16_is_the_dtype_of_features(tiny_base: Path) -> None:
    base = Base(BaseSpec(model=str(tiny_base), compute_dtype="bfloat16"))
    assert base.dtype == torch.bfloat16
    assert base.features(IDS).dtype == torch.bfloat16


def test_another_architecture_with_biases_and_a_fused_projection(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path), compute_dtype="float32")
    base = Base(spec)
    leaves = {name.rpartition(".")[2] for name in base.sites}
    assert leaves == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert set(base.sites) == set(outline(spec).sites)
    assert len(select_targets(base.sites, "attention")) == 2
    assert len(select_targets(base.sites, ["dense"])) == 1
    plain = load_nf4(str(tmp_path)).requires_grad_(False)
    embedded = plain.get_input_embeddings()(IDS).requires_grad_()
    torch.testing.assert_close(base.head(base.features(IDS)), plain(inputs_embeds=embedded).logits)


def test_set_stacks_replaces_those_of_the_pass_before(base: Base) -> None:
    a, b = torch.zeros(1, 1, 64), torch.zeros(1, 1, 64)
    stack = Stack(Stretch(), 0, a, b, torch.ones(1, 1, 1), a, b)
    base.set_stacks({LLAMA[0]: [stack]})
    assert [name for name, site in base.sites.items() if site.stacks] == [LLAMA[0]]
    base.set_stacks({LLAMA[3]: [stack]})
    assert [name for name, site in base.sites.items() if site.stacks] == [LLAMA[3]]
    base.set_stacks({})
    assert not any(site.stacks for site in base.sites.values())


SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES = {
    "sliding window": (MistralConfig(**SHAPE, sliding_window=8), True, True),
    "convolution along the row": (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), True, False),
    "recurrent state": (
        Qwen3NextConfig(
            **SHAPE,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        True,
        False,
    ),
    "layers of one kind, state included": (FalconH1Config(**SHAPE, mamba_d_ssm=64, mamba_n_heads=4), True, False),
    "scores that are capped": (Gemma2Config(**SHAPE, head_dim=16), False, False),
    "experts": (Glm4MoeConfig(**SHAPE, **EXPERTS), True, True),
    "attention of its own": (BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4), False, False),
}


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_an_architecture_allows_is_found_out(name: str, compute_dtype: Any, tmp_path: Path) -> None:
    config, attention, end_to_end = ARCHITECTURES[name]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path), compute_dtype=compute_dtype)
    base = Base(spec)
    assert (base.attention is not None, base.can_lie_end_to_end) == (attention, end_to_end)
    assert (outline(spec, packing=True).end_to_end_obstacle is None) == end_to_end


def test_the_base_s_own_dropout_stays_off_where_layers_are_checkpointed(tmp_path: Path) -> None:
    """OPT's layers call their dropout by their own mode."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    assert config.dropout > 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = BaseSpec(model=str(tmp_path), compute_dtype="float32")
    plain, checkpointed = Base(spec), Base(spec.model_copy(update={"gradient_checkpointing": True}))
    ids = torch.arange(5, 25).view(2, 10)
    assert torch.equal(checkpointed.features(ids), checkpointed.features(ids))
    assert torch.equal(checkpointed.features(ids), plain.features(ids))
    with torch.no_grad():
        assert torch.equal(checkpointed.features(ids), plain.features(ids))


def test_an_architecture_whose_attention_is_in_chunks_keeps_its_own() -> None:
    class Chunked:
        config = MistralConfig(**SHAPE)

        def _can_set_attn_implementation(self) -> bool:
            return True

    model = Chunked()
    assert may_use_row_attention(model)
    model.config.attention_chunk_size = 16
    assert not may_use_row_attention(model)


def test_only_the_layers_are_in_training_mode_where_they_are_checkpointed(tiny_base: Path) -> None:
    base = Base(BaseSpec(model=str(tiny_base), compute_dtype="float32", gradient_checkpointing=True))
    training = [name for name, module in base.model.named_modules() if module.training and "." in name]
    assert [name for name in training if not isinstance(base.model.get_submodule(name), PackedLinear)] == [
        "model.layers.0",
        "model.layers.1",
    ]


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (["v_proj", "q_proj"], {"q_proj", "v_proj"}),
        (["mlp.up_proj"], {"up_proj"}),
    ],
)
def test_what_targets_mean(targets: str | list[str], leaves: set[str]) -> None:
    chosen = select_targets(LLAMA, targets)
    assert chosen == [name for name in LLAMA if name.rpartition(".")[2] in leaves]


def test_a_target_may_be_one_layer_by_its_whole_path() -> None:
    assert select_targets(LLAMA, ["model.layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("targets", [["q_proj", "c_attn"], ["proj"], ["attention"], ["q_pro"], ["lm_head"]])
def test_a_target_that_matches_nothing_is_named_with_what_there_is(targets: list[str]) -> None:
    with pytest.raises(ValueError, match=f"'{targets[-1]}' matches no linear layer of the base; it has .*q_proj"):
        select_targets(LLAMA, targets)


def test_a_group_that_the_architecture_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="'mlp' matches no linear layer"):
        select_targets(["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.fc1"], "mlp")
