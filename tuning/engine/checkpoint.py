"""A slot on disk: its adapter in PEFT's format and what training needs to go on, written whole or not at all.

    FOLDER/adapter/adapter_config.json, adapter_model.safetensors    loads with peft.PeftModel.from_pretrained
    FOLDER/state.pt                                                  weights, optimizer, step, data position
    FOLDER/trial.json                                                the trial's configuration

Files are written under other names in the same folder, synced and renamed, ``state.pt`` last: a folder with a
``state.pt`` is complete. A crash loses the checkpoint that was being written, never one in another folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from tuning.spec import TrialConfig

if TYPE_CHECKING:
    from tuning.engine.slot import Slot

STATE, ADAPTER, TRIAL = "state.pt", "adapter", "trial.json"


def save(slot: Slot, folder: Path, base_model: str, revision: str | None, sites: Iterable[str]) -> None:
    """Write ``slot`` to ``folder``, replacing what is there; ``sites`` are all linear layers of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        export_adapter(slot, scratch / ADAPTER, base_model, revision, sites)
        (scratch / TRIAL).write_text(slot.config.model_dump_json(indent=2) + "\n")
        torch.save(slot.state(), scratch / STATE)
        for path in scratch.rglob("*"):
            if path.is_file():
                _sync(path)
        (folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        for name in (ADAPTER, TRIAL, STATE):
            (scratch / name).rename(folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """What ``Slot.restore`` takes.

    Raises:
        FileNotFoundError: the folder holds no complete checkpoint.
    """
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def export_adapter(slot: Slot, folder: Path, base_model: str, revision: str | None, sites: Iterable[str]) -> None:
    """Write the slot's weights as a PEFT LoRA adapter (float32 safetensors); ``sites`` as in ``save``."""
    from peft import LoraConfig, TaskType

    config: TrialConfig = slot.config
    folder.mkdir(parents=True)
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        revision=revision,
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - peft divides it; a float is as good
        lora_dropout=config.dropout,
        target_modules=target_names(slot.shapes, sites, config.target_modules),
        use_rslora=config.rslora,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors: dict[str, torch.Tensor] = {}
    for site, (a, b) in slot.weights().items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{site}.lora_B.weight"] = b.cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def target_names(chosen: Collection[str], sites: Iterable[str], targets: str | list[str]) -> list[str]:
    """The names for adapter_config.json: the user's own, or for a group the last parts of its sites' paths.

    A last part also stands for every other layer that ends in it. Where the base has such layers outside the group
    (ModernBERT's decoder calls both an attention and an mlp layer `Wo`), whole paths say exactly which are meant.
    """
    if isinstance(targets, list):
        return sorted(targets)
    leaves = {site.rpartition(".")[2] for site in chosen}
    ambiguous = any(site.rpartition(".")[2] in leaves and site not in chosen for site in sites)
    return sorted(chosen) if ambiguous else sorted(leaves)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
