"""The end of a model by itself: the same logits and gradients, for some positions only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
)

from tests.tiny import make_tokenizer
from tests.tuning.engine.test_base import SHAPE
from tests.tuning.engine.test_dry_run import on_meta
from tuning.engine.base import Base
from tuning.engine.dry_run import DryRun
from tuning.engine.head import OwnHead
from tuning.spec import BaseSpec, TrialConfig

SMALL: dict[str, Any] = {**SHAPE, "vocab_size": 300}
MORE_THAN_A_PRODUCT: dict[str, PretrainedConfig] = {
    "soft caps": Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.1),
    "divided": GraniteConfig(**SMALL, logits_scaling=7.0),
    "scaled": CohereConfig(**SMALL, logit_scale=0.3),
}
IDS = torch.arange(5, 45).view(2, 20)


def save(config: PretrainedConfig, folder: Path) -> BaseSpec:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return BaseSpec(model=str(folder), compute_dtype="float32")


@pytest.mark.parametrize("kind", MORE_THAN_A_PRODUCT)
def test_whatever_else_a_model_does_to_its_logits_is_done(kind: str, tmp_path: Path) -> None:
    base = Base(save(MORE_THAN_A_PRODUCT[kind], tmp_path))
    assert isinstance(base.head, OwnHead)
    assert base.notes == []
    whole = base.model(input_ids=IDS, use_cache=False).logits[0, 7:12]
    features = base.features(IDS)[0, 7:12].detach().requires_grad_()
    assert features.shape == (5, 64)
    logits = base.head(features)
    torch.testing.assert_close(logits, whole)
    embedding: Any = base.model.get_output_embeddings()
    assert not torch.allclose(embedding(features), logits)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((logits * weight).sum(), features)
    step = 1e-3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = ((base.head(features + step) - base.head(features - step)) * weight).sum() / 2
    assert float((grad * step).sum()) == pytest.approx(float(slope), rel=1e-2)


def test_a_head_that_fails_leaves_the_model_whole(tmp_path: Path) -> None:
    base = Base(save(MORE_THAN_A_PRODUCT["divided"], tmp_path))
    decoder = base.model.base_model
    with pytest.raises(RuntimeError):
        base.head(torch.zeros(3, 5))
    assert base.model.base_model is decoder


def test_where_no_head_is_found_all_logits_are_made_and_the_user_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuning.engine.base.heads_of", lambda _model: [])
    base = Base(save(LlamaConfig(**SMALL), tmp_path))
    assert base.features(IDS).shape == (2, 20, 300)
    assert torch.equal(base.head(base.features(IDS)), base.features(IDS))
    assert "all tokens at once" in base.notes[0]


@pytest.mark.parametrize("config", [*MORE_THAN_A_PRODUCT.values(), GPT2Config(vocab_size=300, n_embd=64, n_head=4)])
def test_a_dry_run_keeps_no_logits_either(config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(config)
    config.vocab_size = 50_000
    kept = DryRun(on_meta(config), torch.float32)
    monkeypatch.setattr("tuning.engine.dry_run.heads_of", lambda _model: [])
    all_at_once = DryRun(on_meta(config), torch.float32)
    trial = TrialConfig(rank=4, alpha=8.0, target_modules=["c_attn"] if config.model_type == "gpt2" else "all-linear")
    logits = 4 * 64 * 50_000 * 4
    saved, all_saved = (dry.training(trial, 64, gradient_checkpointing=False).saved(4) for dry in (kept, all_at_once))
    assert saved < logits < all_saved
