"""The strict base of every configuration: YAML in, a frozen model out, or all faults at once.

YAML is read by the rules of YAML 1.2's core schema where PyYAML's older rules surprise people: ``2e-4`` is a number,
and ``on``/``off``/``yes``/``no`` are words. A key that stands twice is an error
(https://yaml.org/spec/1.2.2/#3213-node-comparison).

Paths: a value that starts with ``./``, ``../``, ``/`` or ``~`` is a path on this machine, one with ``://`` is a URI,
anything else is a Hugging Face hub id. Relative paths are relative to the file that they stand in; those given by
``--set`` to the current folder.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError, ValidationInfo

from cluster.errors import ABSENT, Fault, InputError
from cluster.rules import BrokenRules, SecretValueError, StrictModel, broken_rules
from cluster.storage import read_file

_ALTERNATIVE = "must be a valid "
_RULES = {
    "extra_forbidden": "unknown key",
    "missing": "is required",
    "invalid_key": "keys must be strings",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
}
"""Types of pydantic errors whose own words say less to who wrote the file."""
LOCAL_PREFIXES = ("./", "../", "/", "~")


def is_local(reference: str) -> bool:
    """True if ``reference`` names a place on this machine rather than a hub id or a URI."""
    return reference.startswith(LOCAL_PREFIXES) or reference in (".", "..")


def absolute(reference: str, root: Path) -> str:
    """``reference`` with a local path made absolute under ``root``; hub ids and URIs come back as they are."""
    if not is_local(reference):
        return reference
    return str((root / Path(reference).expanduser()).resolve())


def _anchor(value: str, info: ValidationInfo) -> str:
    return absolute(value, Path((info.context or {}).get("root", ".")))


Reference = Annotated[str, AfterValidator(_anchor)]
"""A local path, a URI or a hub id (see the head of this file)."""

Model = TypeVar("Model", bound=StrictModel)


def load_spec(path: str | Path, model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read ``path`` as ``model``, with ``overrides`` such as ``train.steps=50`` laid over it.

    Raises:
        NotFoundError: there is no such file.
        InputError: all faults of the file and of the overrides together.
        MachineError: the system does not let us read it.
    """
    path = Path(path)
    try:
        text = read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            [Fault(str(path), f"must be UTF-8 text ({error.reason} at byte {error.start})", ABSENT)]
        ) from None
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise InputError([Fault(str(path), "must be a mapping of keys to values", document)])
    faults = _lay_all_over(document, overrides)
    return parse_spec(document, model, str(path), path.parent, faults)


def default_spec(model: type[Model], overrides: Sequence[str] = ()) -> Model:
    """``model`` with its defaults, with ``overrides`` such as ``num_cpus=4`` laid over them.

    Raises:
        InputError: all faults of the overrides.
    """
    document: dict[str, Any] = {}
    faults = _lay_all_over(document, overrides)
    return parse_spec(document, model, "--set", faults=faults)


def parse_spec(
    document: object, model: type[Model], where: str, root: Path | str = ".", faults: Sequence[Fault] = ()
) -> Model:
    """Validate a parsed ``document``; ``where`` names its source in messages, ``root`` anchors its relative paths.

    Raises:
        InputError: ``faults`` and those of the document together.
    """
    found = list(faults)
    context = {"root": Path(root).absolute()}
    try:
        spec = model.model_validate(document, context=context)
    except ValidationError as error:
        found += _join_alternatives(fault for detail in error.errors() for fault in _faults(where, detail, document))
        told = {(fault.where, fault.rule) for fault in found}
        hidden = [Fault(_place(where, field), rule, ABSENT) for field, rule in broken_rules(model, document, context)]
        raise InputError([*found, *(fault for fault in hidden if (fault.where, fault.rule) not in told)]) from None
    if found:
        raise InputError(found)
    return spec


def parse_yaml(text: str, where: str) -> object:
    """Parse one YAML document.

    Raises:
        InputError: the text is not YAML, or a mapping has the same key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 -- _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise InputError([Fault(f"{where}: line {line}", f"must be valid YAML: {error.problem}", ABSENT)]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as 0x_, which looks like a number and is none
        raise InputError([Fault(where, f"must be valid YAML: {error}", ABSENT)]) from None
    except RecursionError:
        raise InputError([Fault(where, "must be valid YAML, not nested so deeply", ABSENT)]) from None


def to_yaml(spec: BaseModel) -> str:
    """``spec`` as YAML that ``load_spec`` reads back to an equal model."""
    document = spec.model_dump(mode="json")
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats and booleans, and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that ``_Loader``, or a reader of older YAML, would not take for a string."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _lay_all_over(document: dict[str, Any], overrides: Sequence[str]) -> list[Fault]:
    return [fault for override in overrides if (fault := _lay_over(document, override))]


def _lay_over(document: dict[str, Any], override: str) -> Fault | None:
    """Set one ``a.b.c=value`` in ``document`` in place; the value is YAML."""
    where = f"--set {override}"
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        return Fault(where, "must look like section.field=value", ABSENT)
    try:
        value = parse_yaml(text, where)
    except InputError as error:
        return error.faults[0]
    place: dict[str, Any] = document
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            return Fault(where, f"{part} must be a section, but holds a value", inner)
        place = inner
    place[parts[-1]] = absolute(value, Path.cwd()) if isinstance(value, str) else value
    return None


def _faults(where: str, detail: Any, document: object) -> list[Fault]:
    """One pydantic error in our words: field path, rule, value; several where a validator raised ``BrokenRules``."""
    path = _path(detail, document)
    place = _place(where, path)
    if detail["type"] != "value_error":
        return [Fault(place, _rule(detail), ABSENT if detail["type"] == "missing" else detail["input"])]
    error = detail["ctx"]["error"]
    is_hidden = isinstance(detail["input"], dict) or isinstance(error, SecretValueError)
    received = ABSENT if is_hidden else detail["input"]
    if not isinstance(error, BrokenRules):
        return [Fault(place, str(error), received)]
    inside = f"{path}." if path else ""
    return [Fault(_place(where, f"{inside}{field}" if field else path), rule, received) for field, rule in error.rules]


def _rule(detail: Any) -> str:
    """What a pydantic error says, in our words."""
    kind, message = detail["type"], detail["msg"]
    if kind in _RULES:
        return _RULES[kind].format_map(detail.get("ctx", {}))
    rule = message.removeprefix("Input should be ").removeprefix("Value should be ")
    return rule if rule == message else f"must be {rule}"


def _join_alternatives(faults: Iterable[Fault]) -> list[Fault]:
    """Several types that one value could have had, and has not, are one fault."""
    joined: list[Fault] = []
    places: dict[tuple[str, str], int] = {}
    for fault in faults:
        if not fault.rule.startswith(_ALTERNATIVE):
            joined.append(fault)
            continue
        place = places.setdefault((fault.where, repr(fault.value)), len(joined))
        if place == len(joined):
            joined.append(fault)
        else:
            other = fault.rule.removeprefix(_ALTERNATIVE)
            joined[place] = joined[place]._replace(rule=f"{joined[place].rule} or {other}")
    return joined


def _place(where: str, path: str) -> str:
    return f"{where}: {path}" if path else where


def _path(detail: Any, document: Any) -> str:
    """Where in ``document`` a pydantic error is: its path without the tried members of a union that pydantic puts there
    (``int``, ``list[str]``, ``PlainModel``), which no user wrote.
    """
    path: list[str] = []
    parts, here = detail["loc"], document
    for number, part in enumerate(parts, 1):
        in_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if in_list or (isinstance(here, dict) and part in here):
            here = here[part]
        elif not (detail["type"] == "missing" and number == len(parts)):
            continue
        path.append(str(part))
    return ".".join(path)
