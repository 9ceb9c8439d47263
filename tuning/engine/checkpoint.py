"""A slot on disk: its adapter in PEFT's format and what training needs to go on, written whole or not at all.

    FOLDER/adapter/adapter_config.json, adapter_model.safetensors    loads with peft.PeftModel.from_pretrained
    FOLDER/state.pt                                                  weights, optimizer, step, data position
    FOLDER/trial.json                                                the trial's configuration
    FOLDER/metrics.json                                              the report, and the size of each file

All is written and synced in another folder beside, which is then renamed: a FOLDER is complete, or it is not there. A
crash or a full disk loses the checkpoint that was being written, never one in another folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cluster.folder_cache import sync
from tuning.keep import ADAPTER, METRICS, SCRATCH, STATE, TRIAL, Saved, file_sizes, saved, sweep_up
from tuning.spec import TrialConfig

if TYPE_CHECKING:
    from torch import Tensor

    from tuning.engine.slot import Slot


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A slot's state at one moment, in memory of its own: it is written while training goes on."""

    config: TrialConfig
    state: dict[str, Any]
    """See ``Slot.state``."""
    weights: dict[str, tuple[Tensor, Tensor]]
    """Site -> (A (r i), B (o r)), views of the state's flat tensor."""

    @classmethod
    def of(cls, slot: Slot) -> Snapshot:
        """Copy ``slot``; between two passes."""
        state = slot.state()
        return cls(slot.config, state, slot.cut(state["flat"]))


def save(
    snapshot: Snapshot,
    folder: Path,
    base_model: str,
    revision: str | None,
    sites: Iterable[str],
    report: Mapping[str, Any] | None = None,
) -> None:
    """Write ``snapshot`` to ``folder``, in place of what is there.

    Args:
        snapshot: the slot.
        folder: the checkpoint; its parent is on the same disk.
        base_model: what the adapter is for, by name.
        revision: and by revision.
        sites: all linear layers of the base.
        report: what metrics.json holds beside the sizes.

    Raises:
        OSError: it could not be written; what is in ``folder`` stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder.parent))
    try:
        new = scratch / "new"
        export_adapter(snapshot, new / ADAPTER, base_model, revision, sites)
        (new / TRIAL).write_text(snapshot.config.model_dump_json(indent=2) + "\n")
        with (new / STATE).open("wb") as file:  # given a path, torch forgets why it could not write
            torch.save(snapshot.state, file)
        document = {"steps": snapshot.state["step"], **(report or {}), "files": file_sizes(new)}
        (new / METRICS).write_text(json.dumps(document, indent=2) + "\n")
        for path in (*new.rglob("*"), new):
            sync(path)
        if folder.exists():  # a damaged one, passed over and now made again
            folder.rename(scratch / "old")
        new.rename(folder)
        sync(folder.parent)
    except (RuntimeError, SafetensorError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise cause from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(folder: Path) -> dict[str, Any]:
    """What ``Slot.restore`` takes.

    Raises:
        FileNotFoundError: the folder holds no complete checkpoint.
        ValueError: it is damaged.
    """
    path = folder / STATE
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums that it writes
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    raise ValueError(f"{path} is damaged: wrong checksum of {damaged}")


def newest(trial: Path) -> tuple[Saved | None, dict[str, Any] | None, list[str]]:
    """The last checkpoint in a trial's folder that training can go on from, and its state; then what was passed over,
    and why. Clears away what a crash left half written: nobody else may write there.
    """
    sweep_up(trial)
    passed_over: list[str] = []
    for one in reversed(saved(trial)):
        if not (one.folder / STATE).exists():
            continue
        if not one.has_state:
            passed_over.append(f"{one.folder / STATE} is damaged: cut short")
            continue
        try:
            return one, load(one.folder), passed_over
        except (OSError, ValueError) as error:
            passed_over.append(str(error))
    return None, None, passed_over


def export_adapter(
    snapshot: Snapshot, folder: Path, base_model: str, revision: str | None, sites: Iterable[str]
) -> None:
    """Write the weights as a PEFT LoRA adapter (float32 safetensors); ``sites`` as in ``save``."""
    from peft import LoraConfig, TaskType

    config = snapshot.config
    folder.mkdir(parents=True)
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        revision=revision,
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - peft divides it; a float is as good
        lora_dropout=config.dropout,
        target_modules=target_names(snapshot.weights, sites, config.target_modules),
        use_rslora=config.rslora,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors: dict[str, torch.Tensor] = {}
    for site, (a, b) in snapshot.weights.items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{site}.lora_B.weight"] = b.contiguous()
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


def _os_error(error: Exception) -> OSError | None:
    """What the system said, from under an error of torch or safetensors; None where it said nothing."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError):
            return OSError(inner.errno, inner.strerror)
        inner = inner.__cause__ or inner.__context__
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
