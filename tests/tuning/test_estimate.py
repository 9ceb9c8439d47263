"""A host's bytes from a configuration alone, the published figures among them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.schema import load_spec
from tests.tuning.make import sweep_spec, write_rows
from tuning.engine.data import DataReport, Encoded, TokenisedData
from tuning.estimate import Case, Estimator, RowShape, largest_trials, row_shape
from tuning.fit import fit
from tuning.memory import Device
from tuning.spec import BaseSpec, DataSpec, SweepSpec, TrialConfig

ROOT = Path(__file__).parents[2]
ROWS = RowShape(512, 511, 512, 511, "data.max_length")
LLAMA_1 = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40), "33B": (6656, 17920, 60), "65B": (8192, 22016, 80)}


def llama(folder: Path, hidden: int, inner: int, layers: int, **more: Any) -> Path:
    """A folder with nothing but the config.json of a Llama of that shape."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "max_position_embeddings": 2048,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    return folder


def in_qlora(folder: Path, size: str) -> tuple[Estimator, Case]:
    """A LLaMA as QLoRA trains it: rank 64 on all linear layers, a row of 512 tokens, gradient checkpointing."""
    estimator = Estimator(BaseSpec(model=str(llama(folder / size, *LLAMA_1[size]))))
    return estimator, Case(TrialConfig(rank=64, alpha=16.0, batch_size=1, eval_batch_size=1), ROWS, True)


@pytest.mark.parametrize(
    ("size", "published_gb", "within"), [("7B", 5, 0.03), ("13B", 10, 0.085), ("33B", 21, 0.02), ("65B", 41, 0.01)]
)
def test_qlora_as_published(tmp_path: Path, size: str, published_gb: int, within: float) -> None:
    """The 5, 10, 21 and 41 GB of QLoRA (Dettmers et al. 2023, table 6: Guanaco).

    The paper does not list their parts. Weights, constants, what is not quantised, and 8 bytes for each of the
    adapter's parameters, itself and its gradient in 32 bits, come closest; its optimizer is paged. This engine has a
    16-bit copy of the adapter and one of its gradient on top, and the pass.
    """
    estimator, case = in_qlora(tmp_path, size)
    host = estimator.host(case, 1)
    adapters = host.paged // 8
    static = host.weights + host.constants + host.unquantised + 8 * adapters
    assert static / 1e9 == pytest.approx(published_gb, rel=within)
    assert host.least == static + 4 * adapters + host.passing
    assert host.passing < 0.07 * static
    assert host.total == host.least + 8 * adapters


def test_benchmarks_tells_each_sum_of_qlora(tmp_path: Path) -> None:
    """What BENCHMARKS.md says, to its last digit."""
    rows = {
        cells[0].strip(): [float(cell) for cell in cells[1:5]]
        for line in (ROOT / "BENCHMARKS.md").read_text().splitlines()
        if len(cells := line.strip("|").split("|")) == 5 and re.fullmatch(r"[ \d.|]+", "|".join(cells[1:]))
    }
    (static,), (least,), (total,) = (
        [numbers for words, numbers in rows.items() if words.startswith(start)]
        for start in ("the base, adapter and its gradient in 32 bits", "the least that this engine needs", "all of it")
    )
    for column, size in enumerate(LLAMA_1):
        estimator, case = in_qlora(tmp_path, size)
        host = estimator.host(case, 1)
        adapters = host.paged // 8  # parameters: two moments in 32 bits each
        parts = host.weights + host.constants + host.unquantised + 8 * adapters
        for said, found in ((static, parts), (least, host.least), (total, host.total)):
            assert said[column] == pytest.approx(found / 1e9, abs=0.06), (size, said)


def test_65b_trains_on_one_gpu_of_48_gb_with_its_optimizer_paged(tmp_path: Path) -> None:
    """Of 48 GiB; on a card that reports 46,068 MiB, as one sold as 48 GB may, only with shorter rows."""
    estimator, case = in_qlora(tmp_path, "65B")
    found = fit(estimator, case, Device("gpu", 48.0))
    assert (found.slots, found.paged, found.runs) == (0, True, 1)
    assert fit(estimator, case, Device("gpu", 80.0)).slots > 1
    assert fit(estimator, case, Device("gpu", 40.0)).runs == 0
    assert fit(estimator, replace(case, gradient_checkpointing=False), Device("gpu", 48.0)).runs == 0
    card = Device("gpu", 46068 / 1024)
    assert fit(estimator, case, Device("gpu", 45.1)).runs == 1
    assert fit(estimator, case, card).runs == 0
    shorter = RowShape(456, 455, 456, 455, "data.max_length")
    assert fit(estimator, replace(case, rows=shorter), card).runs == 1


def test_the_shipped_sweep_fits_what_its_head_says(tmp_path: Path) -> None:
    path = ROOT / "configs/sweep/llama-8b.yaml"
    more = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    model = llama(tmp_path / "8B", 4096, 14336, 32, **more)
    spec = load_spec(path, SweepSpec, [f"base.model={model}"])
    estimator = Estimator(spec.base)
    case = estimator.largest(spec, row_shape(spec.data, None))
    said = re.findall(r"(\d+)(?: trials)? fit\s+(?:# )?(\d+)", path.read_text())
    assert len(said) == 4
    found = [(fit(estimator, case, Device("gpu", float(gib))).slots, int(gib)) for _, gib in said]
    assert found == [(int(slots), int(gib)) for slots, gib in said]


def test_hub_id_of_which_only_the_configuration_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--someone--llama"
    llama(cache / "snapshots" / "abc", 256, 512, 4)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    estimator = Estimator(BaseSpec(model="someone/llama"))
    assert estimator.outline.parameters == 2 * 32000 * 256 + 4 * (4 * 256**2 + 3 * 256 * 512 + 2 * 256) + 256


def test_a_pack_is_the_base_and_its_slots(tiny_base: Path) -> None:
    estimator = Estimator(BaseSpec(model=str(tiny_base)))
    case = Case(TrialConfig(rank=8, alpha=16.0, batch_size=3), RowShape(64, 20, 32, 5, "the rows"), False)
    one, two, five = (estimator.host(case, slots) for slots in (1, 2, 5))
    assert (one.weights, one.constants, one.unquantised) == (five.weights, five.constants, five.unquantised)
    for part in ("adapters", "gradients", "optimizer"):
        assert getattr(five, part) == 5 * getattr(one, part)
    assert five.activations - two.activations == 3 * (two.activations - one.activations)


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    apart, tied = (
        Estimator(BaseSpec(model=str(llama(tmp_path / str(tied), 256, 512, 2, tie_word_embeddings=tied)))).base
        for tied in (False, True)
    )
    assert apart.unquantised - tied.unquantised == 32000 * 256 * 2


# Rows


def row(tokens: int, targets: int) -> Encoded:
    labels = np.full(tokens, -100, np.int32)
    if targets:
        labels[-targets:] = 1
    return Encoded(np.ones(tokens, np.int32), labels)


def test_rows_that_are_known_count_as_they_are() -> None:
    spec = DataSpec(train="./rows.jsonl", max_length=100)
    data = TokenisedData([row(60, 3), row(41, 30)], [row(17, 17)], DataReport())
    # Padded to a multiple of eight; the first token of a row is no target.
    assert row_shape(spec, data) == RowShape(64, 30, 24, 16, "the rows")
    assert row_shape(spec, None) == RowShape(104, 99, 104, 99, "data.max_length")


# The largest trial


def test_of_planned_trials_the_one_that_needs_most(tiny_base: Path, tmp_path: Path) -> None:
    spec = sweep_spec(
        tiny_base,
        write_rows(tmp_path / "rows.jsonl"),
        space={
            "rank": {"choice": [4, 32]},
            "batch_size": {"choice": [1, 8]},
            "target_modules": {"choice": [["q_proj"], "all-linear"]},
        },
        search={"algorithm": "grid"},
        train={"steps": 4},
    )
    assert len(largest_trials(spec)) == 8
    case = Estimator(spec.base).largest(spec, ROWS)
    assert (case.trial.rank, case.trial.batch_size, case.trial.target_modules) == (32, 8, "all-linear")


def test_trials_that_no_other_covers_are_compared_by_their_bytes(tiny_base: Path, tmp_path: Path) -> None:
    spec = sweep_spec(
        tiny_base,
        write_rows(tmp_path / "rows.jsonl"),
        space={"rank": {"choice": [1, 32]}, "target_modules": {"choice": ["mlp", "attention"]}},
        search={"algorithm": "grid"},
        train={"steps": 4, "batch_size": 1},
    )
    estimator = Estimator(spec.base)
    case = estimator.largest(spec, ROWS)
    needs = {
        (trial.rank, str(trial.target_modules)): estimator.host(Case(trial, ROWS, False), 1).total
        for trial in largest_trials(spec)
    }
    assert needs[case.trial.rank, str(case.trial.target_modules)] == max(needs.values())


def test_a_search_that_decides_as_it_goes_may_meet_all_that_is_large(tiny_base: Path, tmp_path: Path) -> None:
    spec = sweep_spec(
        tiny_base,
        write_rows(tmp_path / "rows.jsonl"),
        space={
            "rank": {"int_range": [2, 24]},
            "batch_size": {"choice": [8, 2]},
            "optimizer": {"choice": ["paged_adamw_8bit", "paged_adamw_32bit"]},
            "learning_rate": {"loguniform": [1e-4, 1e-2]},
        },
        search={"algorithm": "tpe", "trials": 5},
        train={"steps": 4},
    )
    assert {(trial.rank, trial.batch_size) for trial in largest_trials(spec)} == {(24, 8)}
    case = Estimator(spec.base).largest(spec, ROWS)
    assert (case.trial.rank, case.trial.batch_size, case.trial.optimizer) == (24, 8, "paged_adamw_32bit")
