"""Whether an adapter folder may be published: every rule that it breaks, found without loading the base.

The rules are those of safety (no pickle is ever opened), of sanity (finite weights, complete pairs, shapes that fit),
and of vLLM's loader, which reads less of ``adapter_config.json`` than peft does: it ignores ``rank_pattern`` and
``alpha_pattern`` silently (vllm/lora/peft_helper.py), so that such an adapter would answer wrongly rather than fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from cluster.errors import ABSENT, Fault, InputError
from serving.manifest import BaseIdentity, base_identity

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Sites = Mapping[str, tuple[int, int]]
"""Module path of each linear layer of the base -> (out features, in features)."""

_TENSOR = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<factor>[AB])\.weight")
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


class AdapterWeights(NamedTuple):
    """What stands in a weights file, without the weights."""

    sites: dict[str, dict[str, tuple[int, ...]]]
    """Module path -> shapes of its factors: ``A`` is (rank, in), ``B`` is (out, rank)."""
    parameters: int


def check_adapter(
    folder: Path, base: BaseIdentity, *, max_rank: int | None = None, sites: Sites | None = None
) -> CheckedAdapter:
    """Check ``folder``, which must hold a LoRA in PEFT's format, trained on ``base``.

    Raises:
        InputError: every rule that is broken; no file has been changed.
    """
    faults = _folder_faults(folder)
    if faults:
        raise InputError(faults)
    config = _read_config(folder / CONFIG_FILE, faults)
    weights = _read_weights(folder / WEIGHTS_FILE, faults)
    where = str(folder / CONFIG_FILE)
    if config is not None:
        faults += _config_faults(where, config, max_rank) + _base_faults(where, config, base)
    if config is not None and weights is not None:
        faults += _weights_faults(str(folder / WEIGHTS_FILE), weights, config)
        faults += _target_faults(where, weights, config, sites)
    if weights is not None and sites is not None:
        faults += _site_faults(str(folder / WEIGHTS_FILE), weights, sites)
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
    faults = [
        Fault(str(path), "must not be a pickle: loading one runs whatever code it holds; save as safetensors", ABSENT)
        for path in sorted(folder.iterdir())
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
        config: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # ValueError: neither UTF-8 nor JSON
        faults.append(Fault(str(path), f"must be JSON ({error})", ABSENT))
        return None
    if not isinstance(config, dict):
        faults.append(Fault(str(path), "must be a mapping of keys to values", config))
        return None
    return cast("dict[str, Any]", config)


def _config_faults(where: str, config: dict[str, Any], max_rank: int | None) -> list[Fault]:
    faults: list[Fault] = []
    if config.get("peft_type") != "LORA":
        faults.append(Fault(f"{where}: peft_type", "must be LORA", config.get("peft_type", ABSENT)))
    rank, alpha = config.get("r", ABSENT), config.get("lora_alpha", ABSENT)
    if not _is_number(rank) or not isinstance(rank, int) or rank < 1:
        faults.append(Fault(f"{where}: r", "must be an integer of at least 1", rank))
    elif max_rank is not None and rank > max_rank:
        faults.append(Fault(f"{where}: r", f"the rank must be at most {max_rank}", rank))
    if not _is_number(alpha) or not 0 < cast("float", alpha) < float("inf"):
        faults.append(Fault(f"{where}: lora_alpha", "must be a number above 0", alpha))
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
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or named == base.model:
        return []
    where = f"{where}: base_model_name_or_path"
    try:
        identity = base_identity(named, config.get("revision"))
    except InputError:
        return [Fault(where, f"must be the base {base.model}, or a copy of it that can be read", named)]
    if not identity.fits(base):
        return [Fault(where, f"must have the architecture of the base {base.model}", named)]
    return []


def _read_weights(path: Path, faults: list[Fault]) -> AdapterWeights | None:
    """Read names and shapes, and look through every weight for NaN and infinity, one tensor at a time."""
    from safetensors import SafetensorError, safe_open

    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    strangers: list[str] = []
    broken: list[str] = []
    parameters = 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor: torch.Tensor = file.get_tensor(name)
                match = _TENSOR.fullmatch(name)
                if match is None or not tensor.is_floating_point():
                    strangers.append(name)
                    continue
                sites.setdefault(match["site"], {})[match["factor"]] = tuple(tensor.shape)
                parameters += tensor.numel()
                if not bool(tensor.isfinite().all()):
                    broken.append(name)
    except (SafetensorError, OSError) as error:
        faults.append(Fault(str(path), f"must be a whole safetensors file ({error})", ABSENT))
        return None
    if strangers:
        faults.append(Fault(str(path), "must hold nothing but floating-point lora_A and lora_B weights", strangers))
    if broken:
        faults.append(Fault(str(path), "every weight must be finite; these tensors hold NaN or infinity", broken))
    if not sites:
        faults.append(Fault(str(path), "must hold at least one pair of lora_A and lora_B", ABSENT))
    return AdapterWeights(sites, parameters)


def _weights_faults(where: str, weights: AdapterWeights, config: dict[str, Any]) -> list[Fault]:
    """Both factors of every site are there, two-dimensional, and of the rank that the configuration states."""
    halves = [
        f"{site}.lora_{missing}" for site, pair in weights.sites.items() for missing in "AB" if missing not in pair
    ]
    shaped: list[str] = []
    for site, pair in weights.sites.items():
        shape_a, shape_b = pair.get("A"), pair.get("B")
        if shape_a is not None and (len(shape_a) != 2 or shape_a[0] != config.get("r")):
            shaped.append(f"{site}.lora_A is {shape_a}")
        if shape_b is not None and (len(shape_b) != 2 or shape_b[1] != config.get("r")):
            shaped.append(f"{site}.lora_B is {shape_b}")
    faults: list[Fault] = []
    if halves:
        faults.append(Fault(where, "every site needs both factors; these are missing", halves))
    if shaped:
        faults.append(Fault(where, f"A must be (rank, in) and B (out, rank), with rank {config.get('r')}", shaped))
    return faults


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
    is_pattern = isinstance(targets, str)
    if is_pattern and not _is_pattern(targets):
        return [Fault(where, "must be a valid regular expression, where it is not a list", targets)]
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


def _site_faults(where: str, weights: AdapterWeights, sites: Sites) -> list[Fault]:
    """Every pair belongs to a linear layer of the base, and fits it."""
    unknown = [site for site in weights.sites if site not in sites]
    misfits: list[str] = []
    for site, pair in weights.sites.items():
        if site not in sites:
            continue
        size_out, size_in = sites[site]
        shape_a, shape_b = pair.get("A"), pair.get("B")
        if shape_a and shape_a[-1] != size_in:
            misfits.append(f"{site}.lora_A is {shape_a}, the layer has {size_in} inputs")
        if shape_b and shape_b[0] != size_out:
            misfits.append(f"{site}.lora_B is {shape_b}, the layer has {size_out} outputs")
    faults: list[Fault] = []
    if unknown:
        faults.append(
            Fault(where, "must hold weights for linear layers of the base only; it has none of these", unknown)
        )
    if misfits:
        faults.append(Fault(where, "the shapes must fit the base's layers", misfits))
    return faults


def _matching(sites: Iterable[str], target: str, is_pattern: bool) -> list[str]:
    """The sites that peft would adapt for ``target``: the whole path by a pattern, its last parts by a name."""
    if is_pattern:
        return [site for site in sites if re.fullmatch(target, site)]
    return [site for site in sites if site == target or site.endswith(f".{target}")]


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_names(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in cast("list[object]", value))
    )
