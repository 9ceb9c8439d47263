"""Whether an adapter folder may be published: every rule that it breaks, found without loading the base.

The rules are those of safety (no pickle is ever opened, nothing that a stranger wrote takes unbounded time or memory),
of sanity (finite weights that change something, complete pairs, shapes that fit), and of vLLM's loader, which reads
less of ``adapter_config.json`` than peft does: it ignores ``rank_pattern`` and ``alpha_pattern`` silently
(vllm/lora/peft_helper.py), so that such an adapter would answer wrongly rather than fail. Links to files are followed:
a hub's cache is made of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import regex

from cluster.errors import ABSENT, Fault, InputError
from serving.manifest import BaseIdentity, base_identity
from serving.weights.adapter_weights import (
    AdapterWeights,
    Sites,
    changes_nothing,
    pair_faults,
    read_weights,
    site_faults,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
"""A configuration takes one or two thousand."""
MAX_ALPHA = 1e6
PATTERN_S = 1.0
"""A pattern of target modules may come from a stranger, and take exponential time to match."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_MUST_BE_EMPTY = {
    "rank_pattern": "one rank for all modules; vLLM ignores this",
    "alpha_pattern": "one alpha for all modules; vLLM ignores this",
    "modules_to_save": "vLLM serves LoRA weights only",
    "trainable_token_indices": "vLLM serves LoRA weights only",
    "layer_replication": "vLLM serves the base as it is",
    "target_parameters": "vLLM serves LoRA of linear layers only",
    "use_dora": "vLLM serves plain LoRA only",
    "use_qalora": "vLLM serves plain LoRA only",
    "use_bdlora": "vLLM serves plain LoRA only",
    "alora_invocation_tokens": "vLLM serves plain LoRA only",
    "lora_bias": "vLLM does not serve adapter biases",
    "fan_in_fan_out": "the base's layers must be linear layers",
}
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ) need a changed
base."""


@dataclass(frozen=True)
class CheckedAdapter:
    """What was read from an adapter folder that broke no rule."""

    rank: int
    alpha: float
    rslora: bool
    target_modules: tuple[str, ...]
    parameters: int


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter in ``folder``, before anything is known of its base.

    Raises:
        InputError: there is none to be read, or files are missing or of a kind that is refused.
    """
    faults = _folder_faults(folder)
    config = None if faults else _read_config(folder / CONFIG_FILE, faults)
    if config is None:
        raise InputError(faults)
    return config


def check_adapter(
    folder: Path, base: BaseIdentity | None, *, max_rank: int | None = None, sites: Sites | None = None
) -> CheckedAdapter:
    """Check ``folder``, which must hold a LoRA in PEFT's format, trained on ``base``; None: whichever it was.

    Raises:
        InputError: every rule that is broken; no file has been changed.
    """
    faults = _folder_faults(folder)
    if faults:
        raise InputError(faults)
    config = _read_config(folder / CONFIG_FILE, faults)
    weights_file, where = folder / WEIGHTS_FILE, str(folder / CONFIG_FILE)
    broken: list[Fault] = []
    weights = read_weights(weights_file, broken)
    if config is not None:
        faults += _config_faults(where, config, max_rank)
        faults += [] if base is None else _base_faults(where, config, base)
    if config is not None and weights is not None:
        broken += pair_faults(str(weights_file), weights, config.get("r"))
        faults += _target_faults(where, weights, config, sites)
        if not broken and changes_nothing(weights_file, weights):
            rule = "must change the base: B A is zero at every site, as before the first step of training"
            broken.append(Fault(str(weights_file), rule, ABSENT))
    faults += broken
    if weights is not None and sites is not None:
        faults += site_faults(str(weights_file), weights, sites)
    if faults or config is None or weights is None:
        raise InputError(faults)
    names = {site.rsplit(".", 1)[-1] for site in weights.sites}
    return CheckedAdapter(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        target_modules=tuple(sorted(names)),
        parameters=weights.parameters,
    )


def _folder_faults(folder: Path) -> list[Fault]:
    if not folder.is_dir():
        return [Fault(str(folder), "must be a folder with a LoRA in PEFT's format", ABSENT)]
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        return [Fault(str(folder), f"must be a folder that can be read ({error.strerror})", ABSENT)]
    faults = [
        Fault(str(path), "must not be a pickle: loading one runs whatever code it holds; save as safetensors", ABSENT)
        for path in files
        if path.suffix.lower() in PICKLES
    ]
    faults += [
        Fault(str(folder / name), "is required", ABSENT)
        for name in (CONFIG_FILE, WEIGHTS_FILE)
        if not (folder / name).is_file()
    ]
    return faults


def _read_config(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            faults.append(Fault(str(path), f"must be of at most {MAX_CONFIG_BYTES} bytes", size))
            return None
        config: object = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, OSError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        faults.append(Fault(str(path), f"must be JSON ({error})", ABSENT))
        return None
    if not isinstance(config, dict):
        faults.append(Fault(str(path), "must be a mapping of keys to values", config))
        return None
    return cast("dict[str, Any]", config)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice readers take one or the other."""
    known = dict(pairs)
    if len(known) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"these keys stand twice: {', '.join(sorted({key for key in keys if keys.count(key) > 1}))}")
    return known


def _config_faults(where: str, config: dict[str, Any], max_rank: int | None) -> list[Fault]:
    faults: list[Fault] = []
    if config.get("peft_type") != "LORA":
        faults.append(Fault(f"{where}: peft_type", "must be LORA", config.get("peft_type", ABSENT)))
    rank, alpha = config.get("r", ABSENT), config.get("lora_alpha", ABSENT)
    if not _is_number(rank) or not isinstance(rank, int) or rank < 1:
        faults.append(Fault(f"{where}: r", "must be an integer of at least 1", rank))
    elif max_rank is not None and rank > max_rank:
        faults.append(Fault(f"{where}: r", f"the rank must be at most {max_rank}", rank))
    if not _is_number(alpha) or not cast("float", alpha) > 0:
        faults.append(Fault(f"{where}: lora_alpha", "must be a number above 0", alpha))
    elif cast("float", alpha) > MAX_ALPHA:
        faults.append(Fault(f"{where}: lora_alpha", f"must be at most {MAX_ALPHA:g}", alpha))
    if not isinstance(config.get("use_rslora", False), bool):
        faults.append(Fault(f"{where}: use_rslora", "must be true or false", config["use_rslora"]))
    targets = config.get("target_modules", ABSENT)
    if not isinstance(targets, str) and not _is_list_of_names(targets):
        faults.append(Fault(f"{where}: target_modules", "must be a list of module names, or one pattern", targets))
    for key, reason in _MUST_BE_EMPTY.items():
        if config.get(key):
            faults.append(Fault(f"{where}: {key}", f"must not be set ({reason})", config[key]))
    if config.get("bias", "none") != "none":
        faults.append(Fault(f"{where}: bias", "must be none (vLLM does not serve adapter biases)", config["bias"]))
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        rule = "must leave the base's weights as they are (true, false, gaussian, orthogonal or eva)"
        faults.append(Fault(f"{where}: init_lora_weights", rule, config["init_lora_weights"]))
    return faults


def _base_faults(where: str, config: dict[str, Any], base: BaseIdentity) -> list[Fault]:
    """The base that the adapter names must be the one that the publisher says: by its path, or else by its
    architecture.
    """
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if revision is not None and not isinstance(revision, str):
        return [Fault(f"{where}: revision", "must be a branch, tag or commit of the base", revision)]
    if not isinstance(named, str) or not named or named == base.model:
        return []
    where = f"{where}: base_model_name_or_path"
    try:
        identity = base_identity(named, revision)
    except InputError:
        return [Fault(where, f"must be the base {base.model}, or a copy of it that can be read", named)]
    if not identity.fits(base):
        return [Fault(where, f"must have the architecture of the base {base.model}", named)]
    return []


def _target_faults(where: str, weights: AdapterWeights, config: dict[str, Any], sites: Sites | None) -> list[Fault]:
    """Each target has weights; with the base's sites known, each site of each target has them."""
    targets = config.get("target_modules")
    where = f"{where}: target_modules"
    if isinstance(targets, str):
        names = [targets] if targets != "all-linear" else []
    elif _is_list_of_names(targets):
        names = cast("list[str]", targets)
    else:
        return []
    try:
        return _unmatched_faults(where, names, weights, config, sites)
    except regex.error:
        return [Fault(where, "must be a valid regular expression, where it is not a list", targets)]
    except TimeoutError:
        return [Fault(where, f"must be a pattern that is matched within {PATTERN_S:g} s", targets)]


def _unmatched_faults(
    where: str, names: list[str], weights: AdapterWeights, config: dict[str, Any], sites: Sites | None
) -> list[Fault]:
    """``_target_faults`` for a list of names, or for one pattern.

    Raises:
        regex.error, TimeoutError: the pattern is none, or takes too long.
    """
    is_pattern = isinstance(config.get("target_modules"), str)
    idle = [name for name in names if not _matching(weights.sites, name, is_pattern)]
    faults = (
        [Fault(where, "must name modules that the weights file has weights for; these have none", idle)] if idle else []
    )
    if sites is None or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return faults
    unknown = [name for name in idle if not _matching(sites, name, is_pattern)]
    if unknown:
        faults.append(Fault(where, "must name linear layers of the base; these are none", unknown))
    missing = [site for name in names for site in _matching(sites, name, is_pattern) if site not in weights.sites]
    if missing:
        faults.append(Fault(where, "every matching layer of the base needs weights; these have none", missing))
    return faults


def _matching(sites: Iterable[str], target: str, is_pattern: bool) -> list[str]:
    """The sites that peft would adapt for ``target``: the whole path by a pattern, its last parts by a name."""
    if is_pattern:
        pattern = regex.compile(target)
        return [site for site in sites if pattern.fullmatch(site, timeout=PATTERN_S)]
    return [site for site in sites if site == target or site.endswith(f".{target}")]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_names(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in cast("list[object]", value))
    )
