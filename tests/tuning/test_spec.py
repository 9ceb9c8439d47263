"""SweepSpec: what is read from YAML, and every fault of it at once."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.schema import load_spec, parse_spec, parse_yaml, to_yaml
from tuning.spec import MAX_TRIALS, SEARCHABLE, DataSpec, SweepSpec, TrainSpec, TrialConfig

MINIMAL = """
name: demo
base: {model: ./base}
data: {train: rows/of-the-hub}
search: {trials: 1}
"""


def document(**sections: Any) -> dict[str, Any]:
    parsed = parse_yaml(MINIMAL, "x")
    assert isinstance(parsed, dict)
    return {**parsed, **sections}


def sweep(**sections: Any) -> SweepSpec:
    return parse_spec(document(**sections), SweepSpec, "demo.yaml")


def faults(**sections: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        sweep(**sections)
    return [str(fault) for fault in error.value.faults]


def choices(*values: Any) -> dict[str, Any]:
    return {"choice": list(values)}


# Reading


def test_defaults_are_qlora_s() -> None:
    train = sweep().train
    assert (train.learning_rate, train.max_grad_norm, train.beta2, train.schedule) == (2e-4, 0.3, 0.999, "constant")
    assert (train.optimizer, train.target_modules, train.dropout) == ("paged_adamw_32bit", "all-linear", 0.0)
    assert sweep().base.compute_dtype == "auto"


def test_paths_are_relative_to_the_file_and_hub_ids_are_left(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(MINIMAL)
    spec = load_spec(tmp_path / "demo.yaml", SweepSpec)
    assert spec.base.model == str(tmp_path / "base")
    assert spec.data.train == "rows/of-the-hub"


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(
        MINIMAL + "train: {learning_rate: 2e-4, max_grad_norm: null, weight_decay: 1E+1}"
    )
    train = load_spec(tmp_path / "demo.yaml", SweepSpec, ["train.dropout=5e-2"]).train
    assert (train.learning_rate, train.max_grad_norm, train.weight_decay, train.dropout) == (2e-4, None, 10.0, 0.05)


def test_a_number_in_quotes_is_refused_with_field_rule_and_value(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(MINIMAL + 'train: {learning_rate: "2e-4"}')
    with pytest.raises(InputError) as error:
        load_spec(tmp_path / "demo.yaml", SweepSpec)
    assert str(error.value) == f"{tmp_path}/demo.yaml: train.learning_rate: must be a valid number, got '2e-4'"


def test_yaml_reads_back_to_an_equal_sweep() -> None:
    space = {
        "rank": choices(1, 8),
        "alpha": choices(1, 2.5),
        "learning_rate": {"loguniform": [1e-5, 1e-2]},
        "target_modules": choices("attention", ["q_proj", "v_proj"]),
        "rslora": choices(True, False),
        "warmup_steps": {"int_range": [0, 9]},
        "dropout": {"uniform": [0, 0.5]},
    }
    for spec in (
        sweep(),
        sweep(space=space),
        sweep(space=space, search={"algorithm": "tpe", "trials": 4, "asha": {"grace_steps": 20}, "time_budget_s": 9}),
        sweep(train={"max_grad_norm": None, "alpha_over_rank": 0.5, "target_modules": ["a"], "eval_every": 7}),
    ):
        again = parse_spec(parse_yaml(to_yaml(spec), "x"), SweepSpec, "x")
        assert again.planned() == spec.planned()
        assert to_yaml(again) == to_yaml(spec)
        assert again.model_dump() == spec.model_dump()


# Faults


def test_all_faults_of_a_file_come_at_once() -> None:
    found = faults(
        name="My Sweep",
        base={"model": "x", "compute_dtype": "float16", "revison": "main"},
        data={"train": "./x", "eval": "./y", "eval_fraction": 0.1, "format": "text"},
        train={
            "steps": 10,
            "warmup_steps": 10,
            "alpha": 1,
            "alpha_over_rank": 2,
            "eval_every": 11,
            "target_modules": [],
        },
        search={"algorithm": "bayes", "trials": 0},
        resources={"slots": "four"},
        spaces={},
    )
    fields = [re.sub(r"^demo\.yaml: ([^:]+):.*", r"\1", fault) for fault in found]
    assert sorted(fields) == [
        "base.compute_dtype",
        "base.revison",
        "data.eval_fraction",
        "data.loss_on",
        "name",
        "resources.slots",
        "search.algorithm",
        "search.trials",
        "spaces",
        "train.alpha_over_rank",
        "train.eval_every",
        "train.target_modules",
        "train.warmup_steps",
    ]


def test_combinations_are_told_with_single_faults() -> None:
    found = faults(
        name="No Name",
        data={"train": "x", "eval": "y", "eval_fraction": 0.5, "max_length": "long"},
        space={"rnak": choices(4), "dropout": {"uniform": [0.3, "x"]}, "rank": choices(0), "alpha": {"choice": []}},
        train={"steps": 10, "eval_every": 5, "warmup_steps": 10, "rslora": 1},
        search={"algorithm": "random", "asha": {"grace_steps": 7}, "seed": -1},
    )
    assert [fault.removeprefix("demo.yaml: ").partition(":")[0] for fault in found] == [
        "name", "data.max_length", "space.dropout.uniform.1", "space.alpha.choice", "train.rslora", "search.seed",
        "data.eval_fraction", "train.warmup_steps", "space.rnak", "space.rank", "search.trials",
        "search.asha.grace_steps",
    ]  # fmt: skip


def test_an_empty_domain_and_a_value_that_is_wrong_twice_are_one_fault_each() -> None:
    found = faults(space={"dropout": {}, "rank": choices(0, 4, 0)}, search={"algorithm": "random", "trials": 2})
    assert [fault.removeprefix("demo.yaml: ") for fault in found] == [
        "space.dropout: give exactly one of choice, uniform, loguniform, int_range",
        "space.rank: choice holds the same value twice",
        "space.rank: must be greater than or equal to 1, got 0",
    ]


def test_a_domain_that_is_no_mapping_hides_no_other_knob() -> None:
    search = {"algorithm": "grid"}
    found = faults(space={"rank": [4, 8], "rnak": choices(1), "dropout": choices(7)}, search=search)
    assert [fault.removeprefix("demo.yaml: ").partition(",")[0] for fault in found] == [
        "space.rank: must be a mapping of keys to values",
        "space.rnak: must be a knob that can vary: accumulation",
        "space.dropout: must be less than 1",
    ]
    assert faults(space={"rank": {}}, search=search) == [
        "demo.yaml: space.rank: give exactly one of choice, uniform, loguniform, int_range"
    ]


@pytest.mark.parametrize("key", [1, None, (1,)])
def test_a_knob_whose_name_is_no_string(key: Any) -> None:
    (fault,) = faults(space={key: {"uniform": [0, 1]}}, search={"algorithm": "grid"})
    assert "must be a valid string" in fault


def test_numbers_beyond_64_bits_are_refused() -> None:
    huge = 10**400
    (fault,) = faults(space={"rank": {"int_range": [1, huge]}}, search={"algorithm": "random", "trials": 2})
    assert fault.startswith("demo.yaml: space.rank.int_range.1: must be less than 9223372036854775808")
    for domain in ({"uniform": [0, huge]}, {"choice": [huge]}):
        assert faults(space={"learning_rate": domain}, search={"algorithm": "random", "trials": 2})


def test_splits_of_what_has_none() -> None:
    assert faults(data={"train": "./x.jsonl", "train_split": "train[:5%]", "eval_split": "dev"}) == [
        "demo.yaml: data.train_split: has no effect: train is a file, which has no splits",
        "demo.yaml: data.eval_split: has no effect without eval",
    ]
    assert sweep(data={"train": "./saved", "train_split": "first"}).data.train_split == "first"


def test_configurations_and_revisions_are_of_hub_ids() -> None:
    assert faults(data={"train": "./x.jsonl", "train_config": "main", "eval_revision": "v1"}) == [
        "demo.yaml: data.train_config: has no effect: train is no hub id",
        "demo.yaml: data.eval_revision: has no effect: eval is no hub id",
    ]
    assert sweep(data={"train": "openai/gsm8k", "train_config": "main"}).data.train_config == "main"
    told = ["demo.yaml: base.revision: has no effect: model is no hub id"]
    assert faults(base={"model": "./b", "revision": "main"}) == told
    assert sweep(base={"model": "org/b", "revision": "main"}).base.revision == "main"


def test_all_faults_of_the_space_and_the_search_come_at_once() -> None:
    found = faults(
        space={
            "steps": choices(10, 20),
            "learning_rat": choices(1e-3),
            "learning_rate": {"loguniform": [1e-4, 1e-2]},
            "rank": choices(0, 8, 2000, 2.5),
            "target_modules": choices("atention", ["q_proj"], 3),
            "alpha": choices(4),
            "alpha_over_rank": choices(2),
            "dropout": {"uniform": [0, 1]},
            "warmup_steps": {"int_range": [0, 50]},
        },
        train={"learning_rate": 1e-3, "steps": 20},
        search={"algorithm": "grid", "trials": 3, "asha": {"grace_steps": 20}},
    )
    expected = [
        "space.steps: must be a knob that can vary: accumulation, alpha, ",
        "space.learning_rat: must be a knob that can vary: ",
        "space.learning_rate: also stands in train, where it would have no effect: give it once",
        "space.rank: must be greater than or equal to 1, got 0",
        "space.rank: must be less than or equal to 1024, got 2000",
        "space.rank: must be a valid integer, got 2.5",
        "space.target_modules: must be 'attention', 'mlp' or 'all-linear' or a valid list, got 'atention'",
        "space.target_modules: must be 'attention', 'mlp' or 'all-linear' or a valid list, got 3",
        "space.dropout: must be less than 1, got 1.0",
        "space.warmup_steps: must be below train.steps (20), got 50",
        "space.alpha_over_rank: excludes alpha, in space and in train: give one of them",
        "search.algorithm: grid needs choices, but these are ranges: learning_rate, dropout, warmup_steps",
        "search.trials: has no effect with grid, which tries every combination: leave it out",
        "search.asha.grace_steps: must be below train.steps (20), or no trial is ever stopped, got 20",
    ]
    assert len(found) == len(expected)
    for fault, start in zip(found, expected, strict=True):
        assert fault.startswith(f"demo.yaml: {start}"), fault


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"search": {}}, "search.trials: is required with random"),
        ({"search": {"algorithm": "tpe"}, "space": {"rank": choices(1)}}, "search.trials: is required with tpe"),
        ({"search": {"algorithm": "tpe", "trials": 2}}, "space: must hold at least one knob for tpe"),
        ({"search": {"trials": MAX_TRIALS + 1}}, "search.trials: must be less than or equal to 100000, got 100001"),
        (
            {
                "search": {"algorithm": "grid"},
                "space": {"rank": choices(*range(1, 400)), "seed": choices(*range(400))},
            },
            "search.algorithm: grid has 159600 combinations, more than 100000",
        ),
        (
            {"space": {"alpha": choices(4)}, "train": {"alpha_over_rank": 2}},
            "space.alpha_over_rank: excludes alpha, in space and in train: give one of them",
        ),
        (
            {"space": {"warmup_steps": choices(5, 100)}, "search": {"algorithm": "tpe", "trials": 2}},
            "space.warmup_steps: must be below train.steps (100), got 100",
        ),
        (
            {"space": {"rank": choices(1, 2), "seed": {"int_range": [3, 5]}}, "search": {"trials": 7}},
            "search.trials: must be at most 6, the different combinations in space, got 7",
        ),
        (
            {"space": {"rank": choices(1, 2)}, "search": {"algorithm": "tpe", "trials": 3}},
            "search.trials: must be at most 2, the different combinations in space, got 3",
        ),
        (
            {"search": {"trials": 2}},
            "search.trials: must be 1 where space is empty, for all trials would be the same, got 2",
        ),
        ({"resources": {"threads": 100_000}}, "resources.threads: must be less than or equal to 1024, got 100000"),
        ({"output": "s3://bucket/x"}, "output: must be a folder of this machine"),
        ({"name": ""}, "name: must be 1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit, got ''"),
        ({"name": "../x"}, "name: must be 1 to 63 of a-z, 0-9"),
        ({"base": {}}, "base.model: is required"),
        ({"train": {"batch_size": True}}, "train.batch_size: must be a valid integer, got True"),
        ({"train": {"learning_rate": math.inf}}, "train.learning_rate: must be a finite number, got inf"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate: must be greater than 0, got 0"),
        ({"train": {"dropout": 1.0}}, "train.dropout: must be less than 1, got 1.0"),
        ({"train": {"seed": 2**31}}, "train.seed: must be less than 2147483648"),
        ({"data": {"train": "x", "eval_fraction": 0}}, "data.eval_fraction: must be greater than 0, got 0"),
        ({"data": {"train": "x", "format": "chat"}}, "data.format: must be 'text', 'prompt_completion' or 'messages'"),
        ({"data": {"train": "x", "max_length": 4}}, "data.max_length: must be greater than or equal to 8, got 4"),
    ],
)
def test_one_fault(sections: dict[str, Any], fault: str) -> None:
    found = faults(**sections)
    assert len(found) == 1
    assert found[0].startswith(f"demo.yaml: {fault}")


# Trials


def test_alpha_follows_the_rank_unless_it_is_given() -> None:
    ranks = {"rank": choices(4, 16)}
    grids = {"algorithm": "grid"}
    assert [trial.alpha for trial in sweep(space=ranks, search=grids).planned() or []] == [8.0, 32.0]
    half = sweep(space=ranks, search=grids, train={"alpha_over_rank": 0.5})
    assert [trial.alpha for trial in half.planned() or []] == [2.0, 8.0]
    fixed = sweep(space=ranks, search=grids, train={"alpha": 6})
    assert [trial.alpha for trial in fixed.planned() or []] == [6.0, 6.0]
    varied = sweep(space={**ranks, "alpha_over_rank": choices(1, 2)}, search=grids)
    assert [trial.alpha for trial in varied.planned() or []] == [4.0, 8.0, 16.0, 32.0]
    assert all(trial.alpha_over_rank is None for trial in varied.planned() or [])


def test_scaling_is_lora_s_or_rslora_s() -> None:
    assert TrialConfig(rank=16, alpha=8.0).scaling == 0.5
    assert TrialConfig(rank=16, alpha=8.0, rslora=True).scaling == 2.0
    with pytest.raises(ValidationError):
        TrialConfig.model_validate({"rank": 16})


def test_a_grid_has_as_many_trials_as_combinations() -> None:
    spec = sweep(space={"rank": choices(1, 2, 3), "seed": choices(1, 2)}, search={"algorithm": "grid"})
    planned = spec.planned() or []
    assert spec.num_trials == len(planned) == 6
    assert [(trial.rank, trial.seed) for trial in planned] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    assert sweep(search={"algorithm": "grid"}).num_trials == 1


def test_a_random_search_is_a_function_of_its_seed() -> None:
    space = {"rank": choices(1, 8), "learning_rate": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"int_range": [1, 4]}}

    def planned(seed: int, **search: Any) -> list[TrialConfig]:
        return sweep(space=space, search={"trials": 6, "seed": seed, **search}).planned() or []

    assert planned(1) == planned(1)
    assert planned(1) != planned(2)
    assert planned(1, trials=10)[:6] == planned(1)
    assert len({trial.learning_rate for trial in planned(1)}) == 6
    assert sweep(space=space, search={"trials": 6}).num_trials == 6


def test_a_sweep_does_not_go_through_ray_s_client() -> None:
    assert sweep(cluster={"address": "10.0.0.1:6379"}).cluster.address == "10.0.0.1:6379"
    (fault,) = faults(cluster={"address": "ray://head:10001"})
    assert fault.startswith("demo.yaml: cluster.address: must be auto or HOST:PORT for a sweep")
    assert fault.endswith("got 'ray://head:10001'")


def test_tpe_plans_nothing_beforehand() -> None:
    assert sweep(space={"rank": choices(1, 2)}, search={"algorithm": "tpe", "trials": 2}).planned() is None


def test_fixed_knobs_reach_every_trial() -> None:
    spec = sweep(space={"rank": choices(1, 2)}, train={"steps": 7, "dropout": 0.1, "max_grad_norm": None})
    for trial in spec.planned() or []:
        assert (trial.steps, trial.dropout, trial.max_grad_norm) == (7, 0.1, None)


def test_every_knob_of_training_can_be_searched_but_the_length() -> None:
    assert set(TrainSpec.model_fields) - SEARCHABLE == {"steps", "eval_every", "eval_batch_size"}
    assert set(TrialConfig.model_fields) == set(TrainSpec.model_fields)


@pytest.mark.parametrize(("steps", "every", "expected"), [(100, None, 20), (3, None, 1), (7, None, 2), (10, 10, 10)])
def test_reports_come_five_times_or_as_asked(steps: int, every: int | None, expected: int) -> None:
    assert TrainSpec(steps=steps, eval_every=every).report_every == expected


def test_what_is_held_out() -> None:
    assert DataSpec(train="x").held_out == 0.1
    assert DataSpec(train="x", eval_fraction=0.3).held_out == 0.3
    assert DataSpec(train="x", eval="y").held_out == 0.0
