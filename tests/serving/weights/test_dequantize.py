"""The base through NF4 and back: the weights that training computes with, bit for bit, in a folder of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, MixtralConfig

from cluster import storage
from cluster.errors import InputError, MachineError
from serving.manifest import base_identity
from serving.spec import ServeSpec
from serving.weights import dequantize
from serving.weights.architecture import ModelSource
from serving.weights.dequantize import KEPT, dequantized_base, engine_spec
from tests.tiny import make_base
from tuning.engine.base import Base
from tuning.spec import BaseSpec


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraloom" / "dequantized"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_base(tmp_path / "model")


@pytest.mark.parametrize(
    ("wanted", "has_instructions", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float16", True, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_the_weights_are_of_the_type_that_training_computes_in(
    model: Path, wanted: str, has_instructions: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine.cpu_multiplies_bfloat16", lambda: has_instructions)
    fields = {"base": {"model": str(model)}, "registry": "/r", "serve_base": "dequantized", "engine": {"dtype": wanted}}
    folder = engine_spec(ServeSpec.model_validate(fields)).base.model
    assert {weight.dtype for weight in load_file(f"{folder}/model.safetensors").values()} == {expected}


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def assert_the_trainer_s(folder: Path, model: Path, dtype: Any) -> None:
    """``folder`` holds what the trainer of ``model`` computes with: layer by layer, and all the rest."""
    base = Base(BaseSpec(model=str(model), compute_dtype=dtype, cache=False))
    served: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    weights, before = served.state_dict(), plain.state_dict()
    assert weights.keys() == before.keys()
    assert base.sites
    for name, site in base.sites.items():
        weight = weights.pop(f"{name}.weight")
        expected = site._dequantise()
        if weight.shape != expected.shape or type(served.get_submodule(name)).__name__ == "Conv1D":
            weight = weight.T
        assert torch.equal(weight, expected), name
        assert weight.dtype == getattr(torch, dtype)
        assert not torch.equal(weight.reshape(-1), before[f"{name}.weight"].reshape(-1))
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_weights_are_the_trainer_s(model: Path, dtype: Any) -> None:
    assert_the_trainer_s(dequantized_base(ModelSource(str(model)), dtype), model, dtype)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=261),
        MixtralConfig(
            num_hidden_layers=1,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=261,
            num_local_experts=2,
        ),
        LlamaConfig(
            num_hidden_layers=1,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=2,
            vocab_size=261,
            tie_word_embeddings=True,
            attention_bias=True,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_what_training_leaves_alone_is_left_alone(config: Any, tmp_path: Path) -> None:
    """Transposed layers, experts, heads tied to the embeddings, biases."""
    model = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert_the_trainer_s(dequantized_base(ModelSource(str(model)), "float32"), model, "float32")


@pytest.mark.parametrize("config", [None, GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=261)])
def test_a_base_that_is_nf4_already_is_dequantised_as_it_is(config: Any, model: Path, tmp_path: Path) -> None:
    source = model
    if config is not None:
        source = tmp_path / "other"
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
    quantised = tmp_path / "nf4"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=settings)
    loaded.save_pretrained(quantised)
    folder = dequantized_base(ModelSource(str(quantised)), "float32")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert_the_trainer_s(folder, source, "float32")


def test_another_quantisation_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="tells of a quantisation"):
        dequantized_base(ModelSource(str(model)))


def test_it_is_made_once_and_is_the_same_base(model: Path, own_cache: Path) -> None:
    told: list[str] = []
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    first = dequantized_base(ModelSource(str(model)), progress=told.append)
    written = (first / "model.safetensors").stat()
    assert dequantized_base(ModelSource(str(model)), progress=told.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    assert len(told) == 1
    assert base_identity(str(first)).fits(base_identity(str(model)))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (first / name).read_bytes() == (model / name).read_bytes()
    assert kept(own_cache) == [first.name]


def test_whatever_it_depends_on_makes_another(model: Path) -> None:
    source = ModelSource(str(model))
    first = dequantized_base(source)
    assert dequantized_base(source, "float32") != first
    os.utime(model / "tokenizer_config.json", ns=(0, 0))
    assert dequantized_base(source) != first


def test_those_used_last_are_kept(model: Path, own_cache: Path, tmp_path: Path) -> None:
    folders: list[Path] = []
    for seed in range(KEPT + 1):
        folders.append(dequantized_base(ModelSource(str(make_base(tmp_path / f"base{seed}", seed=seed)))))
        os.utime(folders[-1], (seed, seed))
    assert kept(own_cache) == sorted(folder.name for folder in folders[1:])


def test_a_damaged_one_is_made_anew(model: Path) -> None:
    first = dequantized_base(ModelSource(str(model)))
    path = first / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert dequantized_base(ModelSource(str(model))) == first
    assert path.read_bytes() == whole


def test_a_disk_that_is_too_full_is_told_before(model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize, "SPARE_GIB", storage.free_gib(model) + 1)
    with pytest.raises(MachineError, match="GiB free, but the dequantised base needs"):
        dequantized_base(ModelSource(str(model)))
    assert kept(own_cache) == []


def test_what_breaks_off_leaves_nothing(model: Path, own_cache: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="must have weights that can be read"):
        dequantized_base(ModelSource(str(model)))
    assert kept(own_cache) == []


def test_no_place_for_a_cache_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="the cache of dequantised bases: cannot write"):
        dequantized_base(ModelSource(str(model)))
