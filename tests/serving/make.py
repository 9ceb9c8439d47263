"""Adapters for the tests: small LoRAs whose second factor is large enough to change every answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from serving.manifest import BaseIdentity, base_identity

TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def linear_sites(base: Path) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of the linear layers of a base, the head left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def make_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8,
    targets: tuple[str, ...] = TARGETS,
    **config: Any,
) -> Path:
    """Write a random LoRA of ``base`` in PEFT's format and return its folder; no model is loaded."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for site, (size_out, size_in) in linear_sites(base).items():
        if site.rsplit(".", 1)[-1] in targets:
            prefix = f"base_model.model.{site}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, size_in, generator=generator) / size_in**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(size_out, rank, generator=generator) * 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document | config))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``adapter_config.json``; ``...`` removes one."""
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by name, or remove them (None)."""
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def identity(base: Path) -> BaseIdentity:
    """The identity of a base, by the real function."""
    return base_identity(str(base))
