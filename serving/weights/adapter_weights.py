"""An adapter's weights file: what stands in its header, and what its numbers amount to. Nothing is ever unpickled.

Shapes: A is (rank, in) and B is (out, rank); a site is the module path of a linear layer of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.errors import ABSENT, Fault

if TYPE_CHECKING:
    import torch

Sites = Mapping[str, tuple[int, int]]
"""Module path of each linear layer of the base -> (out features, in features)."""

_TENSOR = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<factor>[AB])\.weight")
_DTYPES = ("BF16", "F16", "F32", "F64")
_STRANGERS = (
    (re.compile(r"lora_magnitude_vector"), "DoRA"),
    (re.compile(r"lora_embedding_[AB]"), "an adapter of embeddings"),
    (re.compile(r"\.modules_to_save\.|(embed_tokens|wte|lm_head|embed_out)\.weight$"), "a whole layer"),
    (re.compile(r"\.bias$"), "a bias"),
)
"""What other methods leave in a weights file, none of which vLLM serves."""
_CHUNK_ROWS = 1024
_ROUNDING = 1e-9
"""What is left of a sum in 64 bits whose parts cancel each other, at most, as a share of the parts."""


class AdapterWeights(NamedTuple):
    """What stands in a weights file, without the weights."""

    sites: dict[str, dict[str, tuple[int, ...]]]
    """Module path -> shapes of its factors: ``A`` is (rank, in), ``B`` is (out, rank)."""
    parameters: int


def read_weights(path: Path, faults: list[Fault]) -> AdapterWeights | None:
    """Read names and shapes, and look through every weight for NaN and infinity, one tensor at a time.

    What is wrong is added to ``faults``; None where the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    strangers: list[str] = []
    broken: list[str] = []
    parameters = 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                header: Any = file.get_slice(name)
                match, dtype = _TENSOR.fullmatch(name), header.get_dtype()
                if match is None or dtype not in _DTYPES:
                    strangers.append(f"{name} ({_kind(name) or dtype})")
                    continue
                tensor: torch.Tensor = file.get_tensor(name)
                sites.setdefault(match["site"], {})[match["factor"]] = tuple(tensor.shape)
                parameters += tensor.numel()
                if not bool(tensor.isfinite().all()):
                    broken.append(name)
    except (SafetensorError, OSError) as error:
        faults.append(Fault(str(path), f"must be a whole safetensors file ({error})", ABSENT))
        return None
    if strangers:
        rule = "must hold nothing but floating-point lora_A and lora_B weights, of 16, 32 or 64 bits"
        faults.append(Fault(str(path), rule, strangers))
    if broken:
        faults.append(Fault(str(path), "every weight must be finite; these tensors hold NaN or infinity", broken))
    if not sites:
        faults.append(Fault(str(path), "must hold at least one pair of lora_A and lora_B", ABSENT))
    return AdapterWeights(sites, parameters)


def _kind(name: str) -> str | None:
    return next((kind for pattern, kind in _STRANGERS if pattern.search(name)), None)


def pair_faults(where: str, weights: AdapterWeights, rank: object) -> list[Fault]:
    """Both factors of every site are there, two-dimensional, and of the rank that the configuration states."""
    halves = [
        f"{site}.lora_{missing}" for site, pair in weights.sites.items() for missing in "AB" if missing not in pair
    ]
    shaped: list[str] = []
    for site, pair in weights.sites.items():
        shape_a, shape_b = pair.get("A"), pair.get("B")
        if shape_a is not None and (len(shape_a) != 2 or shape_a[0] != rank):
            shaped.append(f"{site}.lora_A is {shape_a}")
        if shape_b is not None and (len(shape_b) != 2 or shape_b[1] != rank):
            shaped.append(f"{site}.lora_B is {shape_b}")
    faults: list[Fault] = []
    if halves:
        faults.append(Fault(where, "every site needs both factors; these are missing", halves))
    if shaped:
        faults.append(Fault(where, f"A must be (rank, in) and B (out, rank), with rank {rank}", shaped))
    return faults


def site_faults(where: str, weights: AdapterWeights, sites: Sites) -> list[Fault]:
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
        rule = "must hold weights for linear layers of the base only, its head left out; it has none of these"
        faults.append(Fault(where, rule, unknown))
    if misfits:
        faults.append(Fault(where, "the shapes must fit the base's layers", misfits))
    return faults


def changes_nothing(path: Path, weights: AdapterWeights) -> bool:
    """True if B A is zero at every site, of whole pairs with finite weights.

    Reads until the first site that changes something, which in an adapter that was trained is the first of all.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for site in weights.sites:
            a, b = (file.get_tensor(f"base_model.model.{site}.lora_{factor}.weight").double() for factor in "AB")
            used = (a != 0).any(1) & (b != 0).any(0)
            a, b = a[used], b[:, used]
            # The products of used ranks may still cancel each other, but for rounding: an adapter less itself.
            if any(
                bool(((rows @ a).abs() > _ROUNDING * (rows.abs() @ a.abs())).any()) for rows in b.split(_CHUNK_ROWS)
            ):
                return False
    return True
