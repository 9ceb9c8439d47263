"""NF4 as it was published: Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314), measured on a loaded base.

Its 16 codes (appendix E), its bits per parameter with and without double quantisation (section 3), and the error of
weights that go through it, against what that error must be for normally distributed weights and against the 4-bit types
that the paper compares it with (table 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny import make_base
from tuning.engine.base import Base
from tuning.spec import BaseSpec

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""Appendix E."""
INT4 = [code / 7 for code in range(-7, 8)]
FLOAT4 = [sign * code / 6 for sign in (-1, 1) for code in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
"""E2M1: a sign, two bits of exponent, one of mantissa."""
TYPES = {"NF4": PUBLISHED, "Float4": FLOAT4, "Int4": INT4}
BLOCK, SECOND_BLOCK = 64, 256
HIDDEN = 256
PARAMETERS = HIDDEN * (HIDDEN + HIDDEN // 2 + HIDDEN // 2 + HIDDEN) + 3 * HIDDEN * 2 * HIDDEN
"""Of the linear layers of one layer of the base below: 655,360, whole blocks of both levels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of normally distributed weights, as transformers initialises them."""
    return make_base(tmp_path_factory.mktemp("bases") / "normal", hidden=HIDDEN, layers=1)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Base:
    return Base(BaseSpec(model=str(folder), compute_dtype="float32"))


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The same base, saved in NF4 without double quantisation and taken as it is."""
    saved = tmp_path_factory.mktemp("bases") / "single"
    model = load(folder, double=False)
    model.save_pretrained(saved)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        return Base(BaseSpec(model=str(saved), compute_dtype="float32"))


def load(folder: Path, *, double: bool) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def multiplied_by(base: Base) -> dict[str, Tensor]:
    """The weight that each site really multiplies by, (o i): what it makes of the unit vectors."""
    with torch.no_grad():
        return {name: site(torch.eye(site.base.in_features)[None])[0].t() for name, site in base.sites.items()}  # pyright: ignore[reportArgumentType, reportCallIssue]


def scaled_blocks(weight: Tensor) -> Tensor:
    """Blocks of 64 weights in the order in which they lie, each divided by its largest magnitude, (n 64)."""
    blocks = weight.reshape(-1, BLOCK)
    return blocks / blocks.abs().amax(dim=1, keepdim=True)


# Codes


def test_the_published_codes_are_quantiles_of_the_normal_distribution() -> None:
    """Section 3: equally likely values from quantiles, an exact zero, 8 of them above it and 7 below."""
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = [NormalDist().inv_cdf(outermost + (0.5 - outermost) * step / 8) for step in range(8)]
    below = [-NormalDist().inv_cdf(outermost + (0.5 - outermost) * step / 7) for step in range(7)]
    codes = torch.tensor(sorted([*below, 0.0, *above]))
    torch.testing.assert_close(codes / codes.max(), torch.tensor(PUBLISHED), rtol=0, atol=5e-7)


def test_a_loaded_base_multiplies_by_the_published_codes_and_uses_all_of_them(loaded: Base) -> None:
    """Every block is divided by its largest magnitude, whose code is 1 or -1: nothing of bitsandbytes is asked."""
    codes = torch.tensor(PUBLISHED)
    for name, weight in multiplied_by(loaded).items():
        blocks = scaled_blocks(weight)
        nearest = (blocks[..., None] - codes).abs().min(dim=-1)
        assert float(nearest.values.max()) < 1e-6, name
        assert nearest.indices.unique().tolist() == list(range(16)), name


def test_every_weight_goes_to_the_nearest_code(loaded: Base, folder: Path) -> None:
    codes = torch.tensor(PUBLISHED)
    originals = load_file(folder / "model.safetensors")
    for name, weight in multiplied_by(loaded).items():
        wanted, got = scaled_blocks(originals[f"{name}.weight"]), scaled_blocks(weight)
        least = (wanted[..., None] - codes).abs().amin(dim=-1)
        assert float(((wanted - got).abs() - least).abs().max()) < 1e-6, name


# Bits per parameter


def bits(model: Any) -> float:
    """Bits of a linear layer's parameter, with its constants, of what lies in memory."""
    weights = [module.weight for module in model.modules() if type(module).__name__ == "Linear4bit"]
    parameters = sum(weight.quant_state.shape.numel() for weight in weights)
    assert parameters == PARAMETERS
    tensors = [tensor for weight in weights for tensor in (weight.data, weight.quant_state.absmax)]
    tensors += [weight.quant_state.state2.absmax for weight in weights if weight.quant_state.nested]
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / parameters


def test_bits_per_parameter_are_4_5_and_4_127(folder: Path, loaded: Base, single: Base) -> None:
    plain, double = bits(load(folder, double=False)), bits(load(folder, double=True))
    assert plain == 4 + 32 / BLOCK == 4.5
    assert double == 4 + 8 / BLOCK + 32 / (BLOCK * SECOND_BLOCK)
    assert double == pytest.approx(4.127, abs=5e-4)
    assert plain - double == pytest.approx(0.373, abs=5e-4)  # what the paper says that it saves
    assert (single.report.bits_per_parameter, loaded.report.bits_per_parameter) == (plain, double)
    assert single.report.quantised_parameters == loaded.report.quantised_parameters == PARAMETERS


# Error


def expected_error(codes: Sequence[float]) -> float:
    """Root mean square error of standard normal weights in blocks of 64, each rounded to the nearest of ``codes`` times
    the block's largest magnitude m.

    By integrals, not by quantising: over the density of m, the largest of 64 magnitudes, of the mean square distance of
    the 63 others, normal between -m and m, from their codes; the largest itself is exact.
    """
    levels = torch.tensor(sorted(set(codes)), dtype=torch.float64)
    m = torch.linspace(0.3, 7.0, 4000, dtype=torch.float64)[:, None]
    inside = 2 * torch.special.ndtr(m) - 1

    def density(x: Tensor) -> Tensor:
        return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    edges = torch.cat([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]]) * m
    mass = torch.special.ndtr(edges).diff()
    first = -density(edges).diff()
    second = mass - (edges * density(edges)).diff()
    squares = (second - 2 * levels * m * first + (levels * m) ** 2 * mass).sum(dim=1, keepdim=True) / inside
    largest = BLOCK * inside ** (BLOCK - 1) * 2 * density(m)
    mean = torch.trapezoid((largest * squares).flatten(), m.flatten()) * (BLOCK - 1) / BLOCK
    return math.sqrt(float(mean))


def error(restored: Tensor, weight: Tensor) -> float:
    return float((restored - weight).norm() / weight.norm())


def test_the_error_of_a_loaded_base_is_what_the_codes_make_it(loaded: Base, single: Base, folder: Path) -> None:
    """9.2 % of the weights' norm; 655,360 weights show it to a few tenths of a percent."""
    originals = load_file(folder / "model.safetensors")
    expected = expected_error(PUBLISHED)
    assert expected == pytest.approx(0.092, abs=5e-4)
    for base in (loaded, single):
        found = multiplied_by(base)
        whole = torch.cat([originals[f"{name}.weight"].flatten() for name in found])
        assert error(torch.cat([weight.flatten() for weight in found.values()]), whole) == pytest.approx(
            expected, rel=0.01
        )


def test_double_quantisation_costs_no_accuracy(loaded: Base, single: Base, folder: Path) -> None:
    originals = load_file(folder / "model.safetensors")
    errors = [
        [error(weight, originals[f"{name}.weight"]) for name, weight in multiplied_by(base).items()]
        for base in (loaded, single)
    ]
    for double, plain in zip(*errors, strict=True):
        assert plain < double < 1.002 * plain


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


def rounded(weight: Tensor, codes: Sequence[float]) -> Tensor:
    """``weight`` in blocks of 64, each element to the nearest code times its block's largest magnitude."""
    scaled = scaled_blocks(weight)
    levels = torch.tensor(sorted(set(codes)))
    nearest = levels[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)]
    return (nearest * weight.view(-1, BLOCK).abs().amax(dim=1, keepdim=True)).view_as(weight)


def test_nf4_errs_least_then_float4_then_int4_as_in_table_2(normal: Tensor) -> None:
    """Table 2 has perplexities: 27.41 (NF4), 31.07 (Float4 E2M1), 34.34 (Int4). Its Float4 E3M0 (29.48) errs more than
    Int4 on weights, so that line is no matter of this error.
    """
    found = {name: error(rounded(normal, codes), normal) for name, codes in TYPES.items()}
    assert found["NF4"] < found["Float4"] < found["Int4"]
    for name, codes in TYPES.items():
        assert found[name] == pytest.approx(expected_error(codes), rel=0.005), name
    restored = dequantize_4bit(*quantize_4bit(normal, blocksize=BLOCK, quant_type="nf4"))
    assert error(restored, normal) == pytest.approx(found["NF4"], rel=1e-5)


def test_bitsandbytes_own_fp4_errs_a_third_more_than_nf4(normal: Tensor) -> None:
    """Its smallest code is a sixteenth of E2M1's: it is no Float4 of the paper's, and no substitute for NF4."""
    codes = [sign * code / 12 for sign in (-1, 1) for code in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)]
    restored = dequantize_4bit(*quantize_4bit(normal, blocksize=BLOCK, quant_type="fp4"))
    assert error(restored, normal) == pytest.approx(expected_error(codes), rel=0.005)
    assert expected_error(codes) / expected_error(PUBLISHED) == pytest.approx(4 / 3, abs=0.02)
