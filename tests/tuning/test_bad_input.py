"""`loraloom sweep FILE` on input that cannot work: refused with file, field, rule and value, before anything is started
or written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from typer.testing import CliRunner

import loraloom
from cluster.machine import count_gpus
from tests.tiny import make_tokenizer
from tests.tuning.make import sweep_document, write_rows

Refused = Callable[..., list[str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def refused(tiny_base: Path, rows: Path, tmp_path: Path) -> Refused:
    """Asks for a sweep that must be refused; returns its faults, each without the name of the file.

    The command runs in this process, so that a process that it started, or a Ray, would be seen.
    """

    def ask(**sections: Any) -> list[str]:
        path, folder = tmp_path / "sweep.yaml", tmp_path / "runs" / "tiny"
        path.write_text(yaml.safe_dump(sweep_document(tiny_base, rows, **sections), sort_keys=False))
        before, was_running = psutil.Process().children(), ray.is_initialized()
        done = CliRunner().invoke(loraloom.app, ["sweep", str(path), "--dir", str(folder)])
        assert done.exit_code == 2, (done.stderr, done.exception)
        assert done.stdout == ""
        assert psutil.Process().children() == before
        assert ray.is_initialized() == was_running
        assert not folder.parent.exists()
        assert "Traceback" not in done.stderr
        return told(done.stderr, path)

    return ask


def told(stderr: str, path: Path) -> list[str]:
    """The faults that a command told of, without what the libraries print before them."""
    text = stderr[stderr.index("error: ") :].removeprefix("error: ")
    lines = text.splitlines()
    faults = [line.strip() for line in lines[1:]] if lines[0].endswith(" faults:") else lines
    if lines[0].endswith(" faults:"):
        assert lines[0] == f"{len(faults)} faults:"
    return [fault.removeprefix(f"{path}: ") for fault in faults]


def bare_base(folder: Path, config: Any, *, weights: Path | None = None) -> Path:
    """A model's folder as far as it is looked at: a configuration, a tokenizer, and weights of any model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    if weights:
        shutil.copy(weights / "model.safetensors", folder)
    return folder


@pytest.fixture
def base_of(tiny_base: Path, tmp_path: Path) -> Callable[[Any], Path]:
    return lambda config: bare_base(tmp_path / "base", config, weights=tiny_base)


def llama(tiny_base: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((tiny_base / "config.json").read_text()), **changes}


# The file


def test_numbers_that_mean_nothing_are_all_told_at_once(refused: Refused) -> None:
    bad = {"alpha": 0, "learning_rate": "fast", "rank": 0, "dropout": 1.0, "max_grad_norm": -1, "weight_decay": "none"}
    assert refused(space={}, train=bad) == [
        "train.rank: must be greater than or equal to 1, got 0",
        "train.alpha: must be greater than 0, got 0",
        "train.dropout: must be less than 1, got 1.0",
        "train.learning_rate: must be a valid number, got 'fast'",
        "train.max_grad_norm: must be greater than 0, got -1",
        "train.weight_decay: must be a valid number, got 'none'",
    ]


@pytest.mark.parametrize(
    ("alpha", "fault"),
    [
        (0, "must be greater than 0, got 0"),
        (-16, "must be greater than 0, got -16"),
        (-0.0, "must be greater than 0, got -0.0"),
        (float("nan"), "must be a finite number, got nan"),
        (float("inf"), "must be a finite number, got inf"),
        (True, "must be a valid number, got True"),
        ("16", "must be a valid number, got '16'"),
        ([16], "must be a valid number, got [16]"),
    ],
)
def test_an_alpha_that_is_no_positive_number(refused: Refused, alpha: Any, fault: str) -> None:
    assert refused(space={}, train={"alpha": alpha}) == [f"train.alpha: {fault}"]
    assert refused(space={}, train={"alpha_over_rank": alpha}) == [f"train.alpha_over_rank: {fault}"]


def test_more_gpus_than_this_machine_has(refused: Refused) -> None:
    many = count_gpus() + 1
    rule = f"must be at most {many - 1}, the GPUs of this machine (see loraloom doctor), got {many}"
    wanted = {"cluster": {"dashboard": False, "num_gpus": many}}
    assert refused(**wanted) == [f"cluster.num_gpus: {rule}"]
    both = refused(**wanted, space={}, train={"target_modules": ["nope"]})
    assert [fault.partition(":")[0] for fault in both] == ["cluster.num_gpus", "train.target_modules"]


def test_the_same_in_the_space(refused: Refused) -> None:
    space = {
        "alpha": {"choice": [16, 0, -1.0]},
        "learning_rate": {"choice": ["fast", 1e-3]},
        "weight_decay": {"uniform": [-1, 0.5]},
        "rank": {"int_range": [0, 4]},
    }
    assert refused(space=space) == [
        "space.alpha: must be greater than 0, got 0",
        "space.alpha: must be greater than 0, got -1.0",
        "space.learning_rate: must be a valid number, got 'fast'",
        "space.weight_decay: must be greater than or equal to 0, got -1.0",
        "space.rank: must be greater than or equal to 1, got 0",
    ]


# The rows

EMPTY_ROWS = {
    "blank lines": (
        "rows.jsonl",
        "\n   \n\t\n",
        {},
        ["data.train: must leave at least one row to train on, got {path}"],
    ),
    "empty objects": (
        "rows.jsonl",
        "{}\n{}\n",
        {},
        [
            "{file}: line 1: messages: is required by the format messages; the row has no field",
            "{file}: line 2: messages: is required by the format messages; the row has no field",
        ],
    ),
    "no messages": (
        "rows.jsonl",
        '{"messages": []}\n',
        {},
        ["{file}: line 1: messages: must be a list of {{role, content}}, got []"],
    ),
    "silent assistants": (
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": " "}]}\n',
        {},
        ["{file}: line 1: messages: must have an assistant's turn to learn from, one that is not empty"],
    ),
    "empty texts": (
        "rows.jsonl",
        '{"text": ""}\n{"text": " \\n"}\n',
        {"format": "text", "loss_on": "all"},
        ["{file}: line 1: text: must not be empty, got ''", "{file}: line 2: text: must not be empty, got ' \\n'"],
    ),
    "commas": (
        "rows.csv",
        "prompt,completion\n,\n",
        {"format": "prompt_completion"},
        ["{file}: line 2: completion: must not be empty, got ''"],
    ),
    "a header": (
        "rows.csv",
        "prompt,completion\n\n",
        {"format": "prompt_completion"},
        ["data.train: must leave at least one row to train on, got {path}"],
    ),
    "nothing": ("rows.jsonl", "", {}, ["data.train: the file is empty, got {path}"]),
}


@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_a_file_of_only_empty_rows(refused: Refused, tmp_path: Path, kind: str) -> None:
    name, text, knobs, faults = EMPTY_ROWS[kind]
    path = tmp_path / name
    path.write_text(text)
    expected = [fault.format(file=path, path=repr(str(path))) for fault in faults]
    assert refused(data={"train": str(path), "max_length": 64, **knobs}) == expected


# Trials on the base


def test_ranks_and_targets_that_the_base_does_not_have_are_told_together(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    space = {"rank": {"choice": [2, 33]}, "target_modules": {"choice": [["c_attn"], "all-linear"]}}
    leaves = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert refused(space=space, search={"algorithm": "grid"}) == [
        f"space.target_modules: 'c_attn' matches no linear layer of the base; it has {leaves}",
        "space.rank: must be at most 32, the smaller side of model.layers.0.self_attn.k_proj, got 33",
        f"{tmp_path}/rows.jsonl: line 1: messages: must be a list of {{role, content}}, got []",
    ]


def test_the_output_head_is_no_target(refused: Refused) -> None:
    (fault,) = refused(space={}, train={"target_modules": ["lm_head"]})
    assert fault.startswith("train.target_modules: 'lm_head' matches no linear layer of the base")


# The base


def one_layer(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_hidden_layers": 1, **more}


NOT_CAUSAL = {
    "t5": (one_layer("t5"), "transformers has none of the type t5"),
    "vit": (one_layer("vit"), "transformers has none of the type vit"),
    "bart": (one_layer("bart"), "a bart is an encoder with a decoder"),
    # transformers builds these, and would train them to foretell tokens that they see.
    "bert": (one_layer("bert"), "this bert attends to the tokens that it should foretell"),
    "roberta": (
        one_layer("roberta", architectures=["RobertaForMaskedLM"]),
        "this roberta attends to the tokens that it should foretell",
    ),
    "xlnet": (one_layer("xlnet"), "this xlnet attends to the tokens that it should foretell"),
    # and these with a random output head.
    "a classifier": (
        one_layer("llama", architectures=["LlamaForSequenceClassification"]),
        "its config.json says LlamaForSequenceClassification",
    ),
    "an embedder": (one_layer("mistral", architectures=["MistralModel"]), "its config.json says MistralModel"),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_a_base_that_is_no_causal_language_model(refused: Refused, base_of: Any, kind: str) -> None:
    config, why = NOT_CAUSAL[kind]
    base = base_of(config)
    assert refused(base={"model": str(base)}, space={}) == [
        f"base.model: must be a causal language model ({why}), got '{base}'"
    ]


def test_a_bert_that_is_a_decoder_is_one(tiny_base: Path, tmp_path: Path) -> None:
    from tuning.inspect import outline
    from tuning.spec import BaseSpec

    config = one_layer("bert", is_decoder=True, architectures=["BertLMHeadModel"])
    found = outline(BaseSpec(model=str(bare_base(tmp_path / "base", config))))
    assert len(found.sites) == 7


QUANTISED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4}, "awq"),
    "fp8": ({"quant_method": "fp8"}, "fp8"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "mlx": ({"bits": 4, "group_size": 64}, "an unnamed one"),
    "one of tomorrow": ({"quant_method": "int3"}, "int3"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    "fp4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits, fp4"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_base_in_another_quantisation(refused: Refused, base_of: Any, tiny_base: Path, kind: str) -> None:
    own, method = QUANTISED[kind]
    base = base_of(llama(tiny_base, quantization_config=own))
    rule = "must have 16- or 32-bit weights, or bitsandbytes' NF4: its config.json tells of a quantisation"
    assert refused(base={"model": str(base)}) == [f"base.model: {rule} ({method}), got '{base}'"]


def test_a_base_whose_linear_layers_bitsandbytes_leaves_alone(refused: Refused, base_of: Any) -> None:
    base = base_of({"model_type": "falcon", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4})
    rule = "must have linear layers that can be quantised to 4 bits; bitsandbytes leaves its FalconLinear as they are"
    assert refused(base={"model": str(base)}, space={}) == [f"base.model: {rule}, got '{base}'"]


OPT = {
    "model_type": "opt",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "vocab_size": 261,
}


def test_targets_where_a_base_mixes_its_rows(refused: Refused, base_of: Any) -> None:
    """OPT flattens rows and tokens before its feed-forward layers."""
    base = {"model": str(base_of(OPT))}
    rule = "must leave out model.decoder.layers.0.fc1, where this base mixes the rows of the trials that share a pass"
    assert refused(base=base, space={}) == [f"train.target_modules: {rule}, got 'all-linear'"]
    space = {"target_modules": {"choice": ["attention", ["fc1"], ["fc2", "q_proj"]]}}
    assert refused(base=base, space=space, search={"algorithm": "grid"}) == [
        f"space.target_modules: {rule}, got ['fc1']",
        f"space.target_modules: {rule.replace('fc1', 'fc2')}, got ['fc2', 'q_proj']",
    ]


SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 261,
}
NOT_END_TO_END = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "lfm2 has layers of the kind conv"),
    "qwen3_next": ({"full_attention_interval": 2}, "qwen3_next has layers of the kind linear_attention"),
    "gemma2": ({}, "attention with softcap is not that of a causal row"),
    "bloom": ({}, "bloom computes its attention itself, over the whole batch"),
}


@pytest.mark.parametrize("kind", NOT_END_TO_END)
def test_rows_laid_end_to_end_where_a_base_would_mix_them(
    refused: Refused, base_of: Any, rows: Path, kind: str
) -> None:
    config, why = NOT_END_TO_END[kind]
    base = base_of({"model_type": kind, **SMALL, **config})
    carries = "" if kind in ("gemma2", "bloom") else ", which would carry one row into the next"
    data = {"train": str(rows), "max_length": 64, "packing": True}
    assert refused(
        base={"model": str(base)}, data=data, space={}, train={"rank": 4, "target_modules": "attention"}
    ) == [f"data.packing: must be false for this base: {why}{carries}, got True"]


def test_a_base_that_looks_at_its_layers_weights(refused: Refused, base_of: Any) -> None:
    base = base_of(one_layer("mamba"))
    rule = "must call its linear layers, but it reads their weights itself: they could carry no adapter"
    assert refused(base={"model": str(base)}, space={}) == [f"base.model: {rule}, got '{base}'"]


BUILT = "must be a model that can be built as its config.json says"
READ = "must have a config.json that transformers can read"
FOUND = "must be a model folder or hub id"
HOSTILE: dict[str, tuple[Any, str]] = {
    "no object": (7, f"{READ} (TypeError: "),
    "no type": ({}, f"{FOUND} (Unrecognized model"),
    "a list as type": ({"model_type": ["llama"]}, f"{READ} (TypeError: "),
    "a type of tomorrow": ({"model_type": "zork"}, f"{FOUND} (The checkpoint"),
    "a word as size": ({"hidden_size": "64"}, f"{READ} (StrictDataclassFieldValidationError: "),
    "a negative size": ({"hidden_size": -64}, f"{BUILT} (RuntimeError: "),
    "no size": ({"hidden_size": 0}, "must have linear layers that can be quantised to 4 bits, got "),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, f"{READ} (ZeroDivisionError: "),
    "no layers": ({"num_hidden_layers": 0}, "must have linear layers that can be quantised to 4 bits, got "),
    "an activation of tomorrow": ({"hidden_act": "zork"}, f"{BUILT} (KeyError: 'zork')"),
    "a padding token outside": ({"pad_token_id": 10**6}, f"{BUILT} (AssertionError: "),
    "a number type of tomorrow": ({"dtype": "float3"}, f"{READ} (AttributeError: "),
    "a list as quantisation": ({"quantization_config": [1]}, f"{READ} (AttributeError: "),
    "a quantisation of the text": ({"text_config": {"quantization_config": [1]}}, f"{BUILT} (AttributeError: "),
    "a kernel that is not here": ({"attn_implementation": "flash_attention_2"}, f"{BUILT} (FlashAttention2"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_config_that_makes_transformers_raise(refused: Refused, base_of: Any, tiny_base: Path, kind: str) -> None:
    changes, rule = HOSTILE[kind]
    standalone = not isinstance(changes, dict) or not changes or "model_type" in changes
    base = base_of(changes if standalone else llama(tiny_base, **changes))
    fault = refused(base={"model": str(base)})[0]
    assert fault.startswith(f"base.model: {rule}")
    assert fault.endswith(f", got '{base}'")


def test_a_base_with_code_of_its_own_is_not_run_unasked(refused: Refused, base_of: Any, tmp_path: Path) -> None:
    own = {"AutoConfig": "code.ZorkConfig", "AutoModelForCausalLM": "code.Zork"}
    base = base_of({"model_type": "zork", "auto_map": own})
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    rule = "must be true for this base, which is Python code of its own: read it before you run it"
    assert refused(base={"model": str(base)})[0] == f"base.trust_remote_code: {rule}, got False"
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_absent_or_cut_short(refused: Refused, tiny_base: Path, tmp_path: Path) -> None:
    base = bare_base(tmp_path / "base", llama(tiny_base))
    asked: dict[str, Any] = {"base": {"model": str(base)}}
    assert refused(**asked) == [f"base.model: must hold weights, such as model.safetensors, got '{base}'"]

    whole = (tiny_base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-1])
    (fault,) = refused(**asked)
    assert fault.startswith(f"{base}/model.safetensors: must be whole safetensors (")

    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    cut, missing = refused(**asked)
    assert cut.startswith(f"{base}/model-00001-of-00002.safetensors: must be whole safetensors (")
    assert missing == f"{base}/model-00002-of-00002.safetensors: no such file, but the index of weights names it"

    (base / "model.safetensors.index.json").write_text("[]")
    (fault,) = refused(**asked)
    assert fault.startswith(f"{base}/model.safetensors.index.json: must be an index of weights (")


def test_faults_of_base_tokenizer_weights_and_rows_together(refused: Refused, tmp_path: Path) -> None:
    """As a user sees it: the command in a process of its own."""
    base, data = bare_base(tmp_path / "base", one_layer("t5")), tmp_path / "none.jsonl"
    (base / "tokenizer.json").write_text("{")
    data.write_text('{"messages": []}\n')
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_document(base, data)))
    command = [sys.executable, "-m", "loraloom", "sweep", str(path), "--dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    faults = told(done.stderr, path)
    assert [fault.partition("(")[0].partition(", got")[0] for fault in faults] == [
        "base.model: must be a causal language model ",
        "base.model: must have a tokenizer ",
        "base.model: must hold weights, such as model.safetensors",
        f"{data}: line 1: messages: must be a list of {{role, content}}",
    ]
    assert not (tmp_path / "runs").exists()
