"""What can be known of a base without its weights: its linear layers, their shapes, its size and tokenizer.

Used before anything is started. Reads `config.json` and the tokenizer's files; the layers come from the architecture
itself, built on the meta device, which takes no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ABSENT, Fault, InputError
from cluster.schema import is_local
from tuning.engine.base import select_targets
from tuning.spec import BaseSpec, TrialConfig
from tuning.suitable import (
    brings_code,
    broken_by_config,
    end_to_end_obstacle,
    has_class,
    is_causal_class,
    mixed_layers,
    nf4_layers,
    reason,
)


@dataclass(frozen=True, slots=True)
class BaseOutline:
    """A base without weights."""

    sites: Mapping[str, tuple[int, int]]
    """Linear layers that can carry an adapter: path -> (output features, input features)."""
    parameters: int
    model_type: str
    max_length: int | None
    """Positions that it was made for, where its configuration says."""
    mixed: frozenset[str] = frozenset()
    """Those of ``sites`` that are not called with rows x tokens x features: they can carry no adapter."""
    end_to_end_obstacle: str | None = None
    """Why its rows cannot be laid end to end, where that was asked for and is known beforehand."""
    has_checkpoints: bool = True
    """Whether its layers can be checkpointed."""


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
    except Exception as error:  # noqa: BLE001 - so can a tokenizer's files
        raise InputError([Fault("base.model", f"must have a tokenizer ({reason(error)})", spec.model)]) from None


def outline(spec: BaseSpec, *, packing: bool = False) -> BaseOutline:
    """Build the base of ``spec`` on the meta device.

    ``packing``: also look for what keeps its rows from being laid end to end, which takes as long as all the rest.

    Raises:
        InputError: it cannot be found or built, is no causal language model, or cannot be quantised to NF4.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, sites = _build(spec)
    size = sum(parameter.numel() for parameter in model.parameters())
    if not sites or not size:
        kinds = {type(module).__name__ for module in model.modules()} - {"Linear"}
        other = sorted(kind for kind in kinds if "Linear" in kind)
        there = f"; bitsandbytes leaves its {', '.join(other)} as they are" if other else ""
        rule = f"must have linear layers that can be quantised to 4 bits{there}"
        raise InputError([Fault("base.model", rule, spec.model)])
    obstacle = end_to_end_obstacle(model) if packing else None
    try:
        mixed = mixed_layers(model, sites)
    except ValueError as error:
        raise InputError([Fault("base.model", str(error), spec.model)]) from None
    max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return BaseOutline(
        sites,
        size,
        model.config.model_type,
        max_length,
        mixed,
        obstacle,
        any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()),
    )


def build_on_meta(spec: BaseSpec) -> Any:
    """The transformers model of ``spec`` on the meta device.

    Raises:
        InputError: it cannot be found or built, or is no causal language model.
    """
    return _build(spec)[0]


def _load_config(spec: BaseSpec) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - a config.json can make a configuration class raise anything
        _demand_trust(spec, wanted="trust_remote_code" in str(error))
        known = isinstance(error, (OSError, ValueError))
        rule = "must be a model folder or hub id" if known else "must have a config.json that transformers can read"
        raise InputError([Fault("base.model", f"{rule} ({reason(error)})", spec.model)]) from None
    if not is_causal_class(config):
        rule = f"must be a causal language model (transformers has none of the type {config.model_type})"
        raise InputError([Fault("base.model", rule, spec.model)])
    _demand_trust(spec, wanted=brings_code(config) and not has_class(config))
    return config


def _demand_trust(spec: BaseSpec, *, wanted: bool) -> None:
    """Say so where nothing but the model's own code is missing."""
    if wanted and not spec.trust_remote_code:
        rule = "must be true for this base, which is Python code of its own: read it before you run it"
        raise InputError([Fault("base.trust_remote_code", rule, spec.trust_remote_code)])


def _build(spec: BaseSpec) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The model on the meta device, and its layers that NF4 can hold."""
    import torch
    from transformers import AutoModelForCausalLM

    if is_local(spec.model) and not (Path(spec.model) / "config.json").is_file():
        raise InputError([Fault("base.model", "must be a model's folder, with a config.json, or a hub id", spec.model)])
    config = _load_config(spec)
    faults = [Fault("base.model", rule, spec.model) for rule in broken_by_config(config)]
    if faults:
        raise InputError(faults)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty layers: a fault says so
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)
        return model, nf4_layers(model)
    except Exception as error:  # noqa: BLE001 - numbers that do not go together can fail anywhere in an architecture
        rule = f"must be a model that can be built as its config.json says ({reason(error)})"
        raise InputError([Fault("base.model", rule, spec.model)]) from None


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
        mixed = next((name for name in chosen if name in base.mixed), None)
        if mixed:
            rule = f"must leave out {mixed}, where this base mixes the rows of the trials that share a pass"
            fault = Fault(f"{place}target_modules", rule, trial.target_modules)
            faults[str(fault)] = fault
        smallest = min(chosen, key=lambda name: min(base.sites[name]))
        limit = min(base.sites[smallest])
        if trial.rank > limit:
            fault = Fault(f"{place}rank", f"must be at most {limit}, the smaller side of {smallest}", trial.rank)
            faults[str(fault)] = fault
    return list(faults.values())
