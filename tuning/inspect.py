"""What can be known of a base without its weights: its linear layers, their shapes, its size and tokenizer.

Used before anything is started. Reads `config.json` and the tokenizer's files; the layers come from the architecture
itself, built on the meta device, which takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ABSENT, Fault, InputError
from serving.weights.architecture import build, reason
from tuning.engine.base import select_targets
from tuning.spec import BaseSpec, TrialConfig
from tuning.suitable import end_to_end_obstacle, mixed_layers


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

    model, sites = build(spec)
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
