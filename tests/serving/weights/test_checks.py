from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import InputError
from serving.weights.checks import CheckedAdapter, check_adapter
from tests.serving.make import edit_config, edit_weights, identity, linear_sites, make_adapter
from tests.tiny import make_base

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def faults(adapter: Path, base: Path, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        check_adapter(adapter, identity(base), **options)
    return [str(fault).removeprefix(f"{adapter}/").removeprefix(f"{adapter}: ") for fault in caught.value.faults]


def test_a_good_adapter(adapter: Path, base: Path) -> None:
    checked = check_adapter(adapter, identity(base), max_rank=4, sites=linear_sites(base))
    parameters = sum(
        4 * (size_out + size_in)
        for site, (size_out, size_in) in linear_sites(base).items()
        if "k_proj" not in site and "gate" not in site
    )
    assert checked == CheckedAdapter(4, 8.0, False, ("down_proj", "o_proj", "q_proj", "up_proj", "v_proj"), parameters)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a name that transformers renamed
def test_what_peft_saves_is_good(tmp_path: Path, base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=8,
        lora_alpha=4,
        target_modules="all-linear",
        use_rslora=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # B is not zero, as after training
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(tmp_path / "saved"))
    checked = check_adapter(tmp_path / "saved", identity(base), sites=linear_sites(base))
    assert (checked.rank, checked.alpha, checked.rslora, len(checked.target_modules)) == (8, 4.0, True, 7)


def test_a_pattern_of_targets(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, targets=("q_proj",))
    edit_config(adapter, target_modules=r".*\.q_proj")
    assert check_adapter(adapter, identity(base), sites=linear_sites(base)).rank > 0


def test_some_layers_only(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, targets=("q_proj",))
    edit_weights(adapter, **{f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None})
    assert any("every matching layer" in fault for fault in faults(adapter, base, sites=linear_sites(base)))
    edit_config(adapter, layers_to_transform=[1])
    check_adapter(adapter, identity(base), sites=linear_sites(base))


def test_a_folder_that_is_not_there(tmp_path: Path, base: Path) -> None:
    assert faults(tmp_path / "none", base) == ["must be a folder with a LoRA in PEFT's format"]


def test_an_empty_folder(tmp_path: Path, base: Path) -> None:
    assert faults(tmp_path, base) == ["adapter_config.json: is required", "adapter_model.safetensors: is required"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "X.PKL", "model.ckpt"])
def test_no_pickle_is_accepted_or_opened(adapter: Path, base: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (adapter / "exploded",)

    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    assert any(name in fault and "pickle" in fault for fault in faults(adapter, base))
    assert not (adapter / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"r": 0}, "r: must be an integer of at least 1, got 0"),
        ({"r": 4.0}, "r: must be an integer"),
        ({"r": True}, "r: must be an integer"),
        ({"r": ...}, "r: must be an integer of at least 1"),
        ({"r": 8}, "A must be (rank, in) and B (out, rank), with rank 8"),
        ({"lora_alpha": 0}, "lora_alpha: must be a number above 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha: must be at most 1e+06"),
        ({"use_rslora": "false"}, "use_rslora: must be true or false"),
        ({"revision": 7}, "revision: must be a branch, tag or commit"),
        ({"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*x" + "(a|a)*" * 12}, "target_modules: must"),
        ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path: must be the base"),
        ({"peft_type": "IA3"}, "peft_type: must be LORA, got 'IA3'"),
        ({"bias": "all"}, "bias: must be none"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: must not be set (one rank"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: must leave the base's weights"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"target_modules": []}, "target_modules: must be a list of module names"),
        ({"target_modules": None}, "target_modules: must be a list of module names"),
        ({"target_modules": ["q_proj", 3]}, "target_modules: must be a list of module names"),
        ({"target_modules": "(("}, "target_modules: must be a valid regular expression"),
        ({"target_modules": ["q_proj", "nowhere"]}, "these have none, got ['nowhere']"),
        ({"base_model_name_or_path": "/no/such/base"}, "base_model_name_or_path: must be the base"),
    ],
)
def test_faults_of_the_configuration(adapter: Path, base: Path, changes: dict[str, Any], fault: str) -> None:
    edit_config(adapter, **changes)
    assert any(fault in found for found in faults(adapter, base))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\xff\xfe", "[" * 100_000, '{"r": 4, "r": 4}', " " * (1 << 20) + "{}"]
)
def test_a_configuration_that_is_no_json(adapter: Path, base: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_bytes(content.encode("latin-1"))
    assert any(fault.startswith("adapter_config.json: must be") for fault in faults(adapter, base))


def test_the_base_of_another_folder_counts_by_its_architecture(tmp_path: Path, base: Path, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path=str(make_base(tmp_path / "twin", seed=7, hidden=256)))
    check_adapter(adapter, identity(base))
    edit_config(adapter, base_model_name_or_path=str(make_base(tmp_path / "other", hidden=128)))
    assert any("must have the architecture" in fault for fault in faults(adapter, base))


def test_the_rank_limit(adapter: Path, base: Path) -> None:
    assert faults(adapter, base, max_rank=3) == ["adapter_config.json: r: the rank must be at most 3, got 4"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight_that_is_not_finite(adapter: Path, base: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(256, 4, dtype=dtype)
    weight[255, 3] = value
    edit_weights(adapter, **{f"{Q0}.lora_B.weight": weight})
    (fault,) = faults(adapter, base)
    assert "finite" in fault
    assert f"{Q0}.lora_B.weight" in fault


def test_a_missing_factor(adapter: Path, base: Path) -> None:
    edit_weights(adapter, **{f"{Q0}.lora_B.weight": None})
    (fault,) = faults(adapter, base)
    assert "needs both factors" in fault
    assert "layers.0.self_attn.q_proj.lora_B" in fault


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", f"{Q0}.lora_magnitude_vector", f"{Q0}.lora_A.bias", "q_proj.lora_A.weight", f"{Q0}.weight"],
)
def test_weights_that_are_no_lora(adapter: Path, base: Path, name: str) -> None:
    edit_weights(adapter, **{name: torch.zeros(4, 256)})
    (fault,) = faults(adapter, base)
    assert "nothing but floating-point lora_A and lora_B" in fault
    assert name in fault


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.lm_head.weight", "a whole layer"),
        (f"{Q0}.modules_to_save.default.weight", "a whole layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "an adapter of embeddings"),
        (f"{Q0}.lora_magnitude_vector", "DoRA"),
        (f"{Q0}.bias", "a bias"),
    ],
)
def test_what_other_methods_leave_is_named(adapter: Path, base: Path, name: str, kind: str) -> None:
    edit_weights(adapter, **{name: torch.ones(4, 256)})
    assert any(f"{name} ({kind})" in fault for fault in faults(adapter, base))


def test_an_adapter_of_the_head_is_refused(tmp_path: Path, base: Path) -> None:
    """vLLM could serve it on some architectures; training here never makes one, and the sites do not know it."""
    adapter = make_adapter(tmp_path / "a", base)
    head = "base_model.model.lm_head"
    edit_weights(adapter, **{f"{head}.lora_A.weight": torch.ones(4, 256), f"{head}.lora_B.weight": torch.ones(261, 4)})
    (fault,) = faults(adapter, base, sites=linear_sites(base))
    assert "its head left out" in fault


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool])
def test_types_that_no_adapter_is_served_in(adapter: Path, base: Path, dtype: torch.dtype) -> None:
    edit_weights(adapter, **{f"{Q0}.lora_A.weight": torch.ones(4, 256).to(dtype)})
    assert any("of 16, 32 or 64 bits" in fault for fault in faults(adapter, base))


NOTHING = "must change the base: B A is zero at every site"


def changed(adapter: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = adapter / "adapter_model.safetensors"
    edit_weights(adapter, **{name: change(name, weight.clone()) for name, weight in load_file(path).items()})


def test_an_adapter_that_changes_nothing(adapter: Path, base: Path) -> None:
    changed(adapter, lambda name, weight: torch.zeros_like(weight) if "lora_B" in name else weight)
    assert faults(adapter, base) == [f"adapter_model.safetensors: {NOTHING}, as before the first step of training"]


def test_factors_that_never_meet_change_nothing(adapter: Path, base: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if "lora_A" in name:
            weight[2:] = 0
        else:
            weight[:, :2] = 0
        return weight

    changed(adapter, change)
    assert any(NOTHING in fault for fault in faults(adapter, base))


def test_an_adapter_less_itself_changes_nothing(adapter: Path, base: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if "lora_A" in name:
            weight[2:] = weight[:2]
        else:
            weight[:, 2:] = -weight[:, :2]
        return weight

    changed(adapter, change)
    assert any(NOTHING in fault for fault in faults(adapter, base))


def test_one_number_at_one_site_is_a_change(adapter: Path, base: Path) -> None:
    changed(adapter, lambda name, weight: torch.zeros_like(weight) if "lora_B" in name else weight)
    weight = torch.zeros(256, 4)
    weight[255, 3] = 1e-30
    edit_weights(adapter, **{"base_model.model.model.layers.1.mlp.down_proj.lora_B.weight": weight})
    assert check_adapter(adapter, identity(base)).rank == 4


def test_tensors_of_one_name_are_refused(adapter: Path, base: Path) -> None:
    """Readers would take one or the other."""
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].rstrip()
    first = next(iter(json.loads(header)))
    second = [name for name in json.loads(header) if name not in ("__metadata__", first)][-1]
    twins = header.replace(f'"{second}"'.encode(), b'"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"')
    path.write_bytes(len(twins).to_bytes(8, "little") + twins + whole[8 + size :])
    assert faults(adapter, base)


def test_links_to_files_are_followed_and_links_to_nowhere_are_not_there(
    tmp_path: Path, adapter: Path, base: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (linked / name).symlink_to(adapter / name)
    check_adapter(linked, identity(base))
    (adapter / "adapter_config.json").rename(adapter / "moved")
    assert faults(linked, base) == ["adapter_config.json: is required"]


def test_what_is_no_file_is_not_read(tmp_path: Path, adapter: Path, base: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    assert faults(adapter, base) == ["adapter_model.safetensors: is required"]


def test_integer_weights(adapter: Path, base: Path) -> None:
    edit_weights(adapter, **{f"{Q0}.lora_A.weight": torch.zeros(4, 256, dtype=torch.int8)})
    assert any("floating-point" in fault for fault in faults(adapter, base))


@pytest.mark.parametrize("shape", [(), (256,), (4, 255), (4, 256, 1)])
def test_shapes_that_do_not_fit(adapter: Path, base: Path, shape: tuple[int, ...]) -> None:
    edit_weights(adapter, **{f"{Q0}.lora_A.weight": torch.zeros(shape)})
    assert any("q_proj.lora_A is" in fault for fault in faults(adapter, base, sites=linear_sites(base)))


def test_a_layer_that_the_base_does_not_have(adapter: Path, base: Path) -> None:
    other = "base_model.model.model.layers.9.self_attn.q_proj"
    edit_weights(
        adapter, **{f"{other}.lora_A.weight": torch.zeros(4, 256), f"{other}.lora_B.weight": torch.zeros(256, 4)}
    )
    (fault,) = faults(adapter, base, sites=linear_sites(base))
    assert "it has none of these, got ['model.layers.9.self_attn.q_proj']" in fault


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
def test_a_weights_file_that_is_not_whole(adapter: Path, base: Path, damage: str) -> None:
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = (2**60).to_bytes(8, "little") + whole[8:]
    path.write_bytes({"empty": b"", "text": b"version https://git-lfs", "cut": whole[:-10], "header": header}[damage])
    (fault,) = faults(adapter, base)
    assert "must be a whole safetensors file" in fault


def test_everything_at_once(adapter: Path, base: Path) -> None:
    edit_config(adapter, r=99, lora_alpha=-1, use_dora=True, base_model_name_or_path="/nowhere")
    edit_weights(adapter, **{f"{Q0}.lora_A.weight": torch.full((4, 256), float("nan")), "x": torch.zeros(1)})
    found = "\n".join(faults(adapter, base, max_rank=16, sites=linear_sites(base)))
    for part in ("r: the rank", "lora_alpha", "use_dora", "base_model_name", "nothing but", "finite", "with rank 99"):
        assert part in found
