"""What can be known of a base without its weights: its linear layers, their shapes, its size and tokenizer.

Used before anything is started. Reads `config.json` and the tokenizer's files; the layers come from the architecture
itself, built on the meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ABSENT, Fault, InputError
from cluster.schema import is_local
from tuning.engine.base import select_targets
from tuning.spec import BaseSpec, TrialConfig


@dataclass(frozen=True, slots=True)
class BaseOutline:
    """A base without weights."""

    sites: Mapping[str, tuple[int, int]]
    """Linear layers that can carry an adapter: path -> (output features, input features)."""
    parameters: int
    model_type: str
    max_length: int | None
    """Positions that it was made for, where its configuration says."""


def load_tokenizer(spec: BaseSpec) -> Any:
    """The base's tokenizer.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError([Fault("base.model", f"must have a tokenizer ({_first_line(error)})", spec.model)]) from None


def outline(spec: BaseSpec) -> BaseOutline:
    """Build the base of ``spec`` on the meta device.

    Raises:
        InputError: it cannot be found, is no causal language model, or has no linear layers.
    """
    return outline_of(build_on_meta(spec), spec)


def build_on_meta(spec: BaseSpec) -> Any:
    """The transformers model of ``spec`` on the meta device.

    Raises:
        InputError: it cannot be found, or is no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_local(spec.model) and not (Path(spec.model) / "config.json").is_file():
        raise InputError([Fault("base.model", "must be a model's folder, with a config.json, or a hub id", spec.model)])
    try:
        config = AutoConfig.from_pretrained(
            spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(
            [Fault("base.model", f"must be a model folder or hub id ({_first_line(error)})", spec.model)]
        ) from None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
    except ValueError as error:
        rule = f"must be a causal language model ({_first_line(error)})"
        raise InputError([Fault("base.model", rule, spec.model)]) from None


def outline_of(model: Any, spec: BaseSpec) -> BaseOutline:
    """What ``outline`` tells, of a model that is built already.

    Raises:
        InputError: it has no linear layers.
    """
    from torch import nn

    head = model.get_output_embeddings()
    sites = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not sites:
        raise InputError([Fault("base.model", "must have linear layers that can be quantised to 4 bits", spec.model)])
    size = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    return BaseOutline(
        sites, size, config.model_type, getattr(config.get_text_config(), "max_position_embeddings", None)
    )


def trial_faults(base: BaseOutline, trials: Sequence[tuple[str, TrialConfig]]) -> list[Fault]:
    """What the base forbids of ``trials``, given as (place in the spec, configuration); each fault once."""
    faults: dict[str, Fault] = {}
    for place, trial in trials:
        try:
            chosen = select_targets(base.sites, trial.target_modules)
        except ValueError as error:
            fault = Fault(f"{place}target_modules", str(error), ABSENT)
            faults[str(fault)] = fault
            continue
        smallest = min(chosen, key=lambda name: min(base.sites[name]))
        limit = min(base.sites[smallest])
        if trial.rank > limit:
            fault = Fault(f"{place}rank", f"must be at most {limit}, the smaller side of {smallest}", trial.rank)
            faults[str(fault)] = fault
    return list(faults.values())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
