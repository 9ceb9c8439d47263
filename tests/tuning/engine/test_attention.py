"""Attention within rows against torch's own, row by row; and against transformers' on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from tuning.engine.attention import CPU_SHORT, RowAttention
from tuning.engine.batch import RowIndex

LENGTHS = (5, 1, 9)


def layer() -> nn.Module:
    module = nn.Module()
    module.register_buffer("num_key_value_groups", torch.tensor(2))  # as transformers' layers have it
    return module


def states(*shape: int) -> list[Tensor]:
    """Query with 4 heads, key and value with 2."""
    batch, tokens = shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, heads, tokens, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]


def call(attention: RowAttention, states: list[Tensor], **others: Any) -> Tensor:
    query, key, value = states
    return attention(layer(), query, key, value, None, **others)[0]


def torch_s_own(states: list[Tensor], window: int | None = None) -> Tensor:
    """(b h t d) -> (b t h d)."""
    query, key, value = states
    tokens = query.shape[2]
    places = torch.arange(tokens)
    seen = places[:, None] >= places[None]
    if window is not None:
        seen &= places[:, None] - places[None] < window
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("tokens", [7, CPU_SHORT + 8], ids=["written out", "fused"])
def test_rows_of_a_batch_and_their_gradients(tokens: int, window: int | None) -> None:
    ours, theirs = states(3, tokens), states(3, tokens)
    out = call(RowAttention(), ours, sliding_window=window)
    expected = torch_s_own(theirs, window)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, yours.grad)


def laid_out() -> RowIndex:
    """Rows of LENGTHS with a token of nobody between the second and the third, and one at the end."""
    starts = (0, 5, 7)
    longest = max(LENGTHS)
    cells = torch.tensor(
        [
            [start + min(place, length - 1) if place < length else start for place in range(longest)]
            for start, length in zip(starts, LENGTHS, strict=True)
        ]
    )
    real = torch.tensor([[place < length for place in range(longest)] for length in LENGTHS])
    return RowIndex(cells, cells[real], real.flatten().nonzero().flatten())


def test_rows_laid_end_to_end_see_only_themselves() -> None:
    ours, theirs = states(1, 17), states(1, 17)
    attention = RowAttention()
    attention.rows = laid_out()
    out = call(attention, ours)
    spans = (slice(0, 5), slice(5, 6), slice(7, 16))
    expected = torch.zeros_like(out)
    for span in spans:
        expected[:, span] = torch_s_own([part[:, :, span] for part in theirs])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, yours.grad)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    sound, broken = states(1, 17), states(1, 17)
    attention = RowAttention()
    attention.rows = laid_out()
    outs: list[Tensor] = []
    for parts, bad in ((sound, 0.5), (broken, float("nan"))):
        with torch.no_grad():
            for part in parts:
                part[:, :, :5] = bad
        out = call(attention, parts)
        out.backward(torch.ones_like(out))
        outs.append(out.detach())
    assert torch.equal(outs[0][:, 5:], outs[1][:, 5:])
    for one, other in zip(sound, broken, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad[:, :, 5:], other.grad[:, :, 5:])


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}])
def test_what_it_does_not_do_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not that of a causal row"):
        call(RowAttention(), states(1, 4), **extra)


SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def test_a_model_with_a_sliding_window_is_the_same_with_it() -> None:
    model: Any = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        attention = RowAttention()
        model.set_attn_implementation(attention.name)
        torch.testing.assert_close(model(ids).logits, expected)
        cells = torch.arange(24).view(2, 12)
        attention.rows = RowIndex(cells, cells.flatten(), cells.flatten())
        together = model(ids.view(1, -1), position_ids=cells.remainder(12).view(1, -1)).logits
    torch.testing.assert_close(together.view(2, 12, -1), expected)


def test_a_model_that_caps_its_scores_keeps_its_own() -> None:
    model: Any = Gemma2ForCausalLM(Gemma2Config(**SHAPE)).eval()
    model.set_attn_implementation(RowAttention().name)
    with pytest.raises(ValueError, match="softcap"), torch.no_grad():
        model(torch.arange(8)[None])
