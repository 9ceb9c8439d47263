from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, PositiveInt

from cluster.errors import ABSENT, InputError, MachineError, NotFoundError
from cluster.rules import Broken, StrictModel, rule
from cluster.schema import Reference, absolute, load_spec, parse_spec, parse_yaml, to_yaml


class Train(StrictModel):
    steps: PositiveInt
    rate: float = 1e-3
    warm_up: PositiveInt | None = None

    @rule
    def _warm(self) -> Iterator[Broken]:
        if self.warm_up and self.warm_up > self.steps:
            yield "warm_up", "must not exceed steps"
            yield "", "must be sensible"


class Spec(StrictModel):
    base: Reference
    train: Train
    ranks: list[int] | int = 8
    env: dict[str, str] = {}
    note: str | None = None


GOOD = "base: ./model\ntrain:\n  steps: 3\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_spec(path, Spec, overrides)
    return [str(fault).removeprefix(f"{path}: ") for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("3.", 3.0),
        ("+2e3", 2000.0),
        (".inf", math.inf),
        ("7", 7),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("2026-01-01", "2026-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("~", None),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(f"x: {text}", "here")
    assert parsed == {"x": value}
    assert type(next(iter(parsed.values()))) is type(value)  # pyright: ignore[reportAttributeAccessIssue]


def test_nan_is_a_number() -> None:
    parsed = parse_yaml("x: .nan", "here")
    assert isinstance(parsed, dict)
    assert math.isnan(parsed["x"])


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a:\n  b: 1\n  b: 2\n", "- {a: 1, a: 2}"])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="stands twice"):
        parse_yaml(text, "here")


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x", "a: !!python/object:os.system {}"])
def test_broken_yaml_names_the_line(text: str) -> None:
    with pytest.raises(InputError, match=r"here: line \d"):
        parse_yaml(text, "here")


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 0\n  rate: fast\n  stepz: 4\nranks: [1, two]\nunknown: 1\n")
    assert faults_of(path, "note=3", "nonsense") == [
        "--set nonsense: must look like section.field=value",
        "base: is required",
        "train.steps: must be greater than 0, got 0",
        "train.rate: must be a valid number, got 'fast'",
        "train.stepz: unknown key, got 4",
        "ranks.1: must be a valid integer, got 'two'",
        "ranks: must be a valid integer, got [1, 'two']",
        "note: must be a valid string, got 3",
        "unknown: unknown key, got 1",
    ]


def test_a_models_own_rules_become_faults_of_their_fields(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  warm_up: 9\n")
    assert faults_of(path) == ["train.warm_up: must not exceed steps", "train: must be sensible"]


def test_types_are_not_converted(tmp_path: Path) -> None:
    assert faults_of(write(tmp_path, GOOD.replace("3", '"3"'))) == ["train.steps: must be a valid integer, got '3'"]
    assert load_spec(write(tmp_path, GOOD + "  rate: 3\n"), Spec).train.rate == 3.0


def test_the_types_that_a_value_could_have_had_are_one_fault(tmp_path: Path) -> None:
    class Loose(StrictModel):
        value: int | bool | str | list[str]
        section: Loose | None = None

    path = write(tmp_path, "value: 1.5\nsection: [1]\n")
    with pytest.raises(InputError) as error:
        load_spec(path, Loose)
    assert [str(fault).removeprefix(f"{path}: ") for fault in error.value.faults] == [
        "value: must be a valid integer or boolean or string or list, got 1.5",
        "section: must be a mapping of keys to values, got [1]",
    ]


@pytest.mark.parametrize("key", ["FOO", "Foo", "int", "a[0]"])
def test_a_users_keys_stay_in_the_path(tmp_path: Path, key: str) -> None:
    assert faults_of(write(tmp_path, GOOD + f"env: {{'{key}': 1}}\n")) == [f"env.{key}: must be a valid string, got 1"]


def test_a_list_of_a_wrong_length(tmp_path: Path) -> None:
    class Pairs(StrictModel):
        pair: Annotated[list[int], Field(min_length=2, max_length=2)]

    for pair, limit in (([1], "least"), ([1, 2, 3], "most")):
        with pytest.raises(InputError, match=rf"pair: must hold at {limit} 2, got"):
            load_spec(write(tmp_path, f"pair: {pair}\n"), Pairs)


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"])
def test_a_file_must_be_a_mapping(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match="must be a mapping"):
        load_spec(path, Spec)


def test_what_is_no_file_is_told_as_what_it_is(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", write(tmp_path, GOOD) / "x.yaml"):
        with pytest.raises(NotFoundError, match="no such file"):
            load_spec(path, Spec)
    with pytest.raises(InputError, match=f"^{tmp_path}: must be a file, but is a folder$"):
        load_spec(tmp_path, Spec)
    with pytest.raises(MachineError, match="cannot be read \\(File name too long\\)"):
        load_spec(tmp_path / (300 * "x"), Spec)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"base: \xff\xfe")
    with pytest.raises(InputError, match="UTF-8") as caught:
        load_spec(path, Spec)
    assert caught.value.faults[0].value is ABSENT


def test_overrides_reach_into_sections_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    spec = load_spec(path, Spec, ["train.steps=50", "train.rate=2e-4", "ranks=[4, 8]", "note=a=b", "env.A=x"])
    assert (spec.train.steps, spec.train.rate, spec.ranks, spec.note, spec.env) == (50, 2e-4, [4, 8], "a=b", {"A": "x"})


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("train.steps", "must look like section.field=value"),
        ("=3", "must look like section.field=value"),
        ("train..steps=3", "must look like section.field=value"),
        ("base.x=3", "must be a section, but holds a value"),
        ("ranks=[1", "must be valid YAML"),
        ("train.steps=0x_", "must be valid YAML"),
        (f"train.steps={'[' * 3000}", "must be valid YAML, not nested so deeply"),
    ],
)
def test_bad_overrides_are_faults(tmp_path: Path, override: str, rule: str) -> None:
    (fault,) = faults_of(write(tmp_path, GOOD), override)
    assert fault.startswith(f"--set {override}")
    assert rule in fault


def test_an_override_makes_a_section_that_is_missing_or_empty(tmp_path: Path) -> None:
    for text in ("base: x\n", "base: x\ntrain:\n"):
        assert load_spec(write(tmp_path, text), Spec, ["train.steps=2"]).train.steps == 2


def test_relative_paths_are_relative_to_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(inner, GOOD)
    assert load_spec(path, Spec).base == str(inner / "model")
    assert load_spec("inner/spec.yaml", Spec).base == str(inner / "model")
    assert load_spec(path, Spec, ["base=./other"]).base == str(tmp_path / "other")
    assert load_spec(path, Spec, ["base=../other"]).base == str(tmp_path.parent / "other")


@pytest.mark.parametrize("reference", ["org/model", "s3://bucket/key", "model"])
def test_hub_ids_and_uris_stay_as_they_are(reference: str, tmp_path: Path) -> None:
    assert absolute(reference, tmp_path) == reference


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/model", Path("/elsewhere")) == str(tmp_path / "model")


def test_yaml_reads_back_to_an_equal_spec(tmp_path: Path) -> None:
    spec = parse_spec({"base": "./m", "train": {"steps": 3, "rate": 2e-5}, "note": "yes"}, Spec, "here", tmp_path)
    assert load_spec(write(tmp_path, to_yaml(spec)), Spec) == spec


def test_specs_are_frozen(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD), Spec)
    with pytest.raises(ValueError, match="frozen"):
        spec.note = "x"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("text", ["1e5", "on", "2e-4", "null", "2026-01-01", "x: y", "1_000", "", "#"])
def test_a_string_that_looks_like_something_else_comes_back_as_it_was(text: str) -> None:
    class Named(StrictModel):
        name: str

    dumped = to_yaml(Named(name=text))
    assert parse_spec(parse_yaml(dumped, "x"), Named, "x").name == text
