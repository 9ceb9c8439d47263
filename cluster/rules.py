"""Models whose rules between fields are told together with the faults of single fields.

pydantic runs a model's own validators only once all its fields are valid, so a file with one wrong number would hide
every combination that is impossible, to be told in a second round. Here such a rule is a method marked ``@rule``. On
a whole model all rules run as a validator of the model; on a faulty document, ``broken_rules`` runs each on the fields
that are valid, and leaves out those that read one that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

Broken = tuple[str, str]
"""A field path below the model ("" for the model as a whole), and what it breaks."""

AnyModel = TypeVar("AnyModel")


class SecretValueError(ValueError):
    """A broken rule of a value that may hold secrets: who is told of it is not shown the value."""


class BrokenRules(ValueError):
    """Several broken rules at once: each becomes a fault of its own."""

    def __init__(self, rules: Sequence[Broken]) -> None:
        super().__init__("; ".join(f"{field}: {text}" if field else text for field, text in rules))
        self.rules = list(rules)


def rule(method: Callable[[AnyModel], Iterator[Broken]]) -> Callable[[AnyModel], Iterator[Broken]]:
    """Mark a method of a ``StrictModel`` that yields what is wrong between fields.

    It reads fields as attributes, and only those that it needs: one that is missing ends this rule and no other.
    """
    method.is_rule = True  # pyright: ignore[reportFunctionMemberAccess]
    return method


class StrictModel(BaseModel):
    """A frozen model that refuses unknown keys and converts no types (``"3"`` is not 3; 3 is fine where 3.0 is)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    def broken(self) -> list[Broken]:
        """The rules of this model, without those of nested ones, that it breaks: none, once it is validated."""
        return [found for check in _rules(type(self)) for found in check(self)]

    @property
    def is_whole(self) -> bool:
        """False for a nested model that a rule sees without the fields that were refused."""
        return vars(self).keys() == type(self).model_fields.keys()

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        broken = self.broken()
        if broken:
            raise BrokenRules(broken)
        return self


def broken_rules(model: type[StrictModel], document: object, context: Mapping[str, Any]) -> list[Broken]:
    """The rules that a faulty ``document`` for ``model`` breaks, here and in nested models, as far as its valid fields
    tell.

    Args:
        model: what the document should be.
        document: as parsed.
        context: pydantic's validation context.
    """
    found: list[Broken] = []
    if isinstance(document, dict):
        _salvage(model, document, context, "", found)
    return found


def _salvage(
    model: type[StrictModel],
    document: Mapping[str, Any],
    context: Mapping[str, Any],
    path: str,
    found: list[Broken],
) -> StrictModel:
    """``model`` with its valid fields only (reading another raises AttributeError); broken rules go to ``found``."""
    valid: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name not in document:
            if not field.is_required():
                valid[name] = field.get_default(call_default_factory=True, validated_data=valid)
            continue
        value = document[name]
        inside = f"{path}{name}."
        section, is_mapping = _section(field.annotation)
        if section and isinstance(value, dict) and not is_mapping:
            valid[name] = _salvage(section, value, context, inside, found)
        elif section and isinstance(value, dict) and all(isinstance(key, str) for key in value):
            valid[name] = {
                key: _salvage(section, entry, context, f"{inside}{key}.", found)
                if isinstance(entry, dict)
                else _hollow(section)
                for key, entry in value.items()
            }
        else:
            try:
                valid[name] = validated(field, value, context)
            except ValidationError:
                continue
    salvaged = model.model_construct(_fields_set=set(document) & set(model.model_fields), **valid)
    for name in set(model.model_fields) - set(valid):
        vars(salvaged).pop(name, None)
    for check in _rules(model):
        try:
            for field_path, text in check(salvaged):
                found.append((f"{path}{field_path}".removesuffix("."), text))
        except AttributeError:  # it reads a field that is not there
            continue
    return salvaged


def _hollow(model: type[StrictModel]) -> StrictModel:
    """``model`` without a field: a rule that looks into it ends, one that counts or names it does not."""
    hollow = model.model_construct()
    vars(hollow).clear()
    return hollow


def validated(field: FieldInfo, value: object, context: Mapping[str, Any] | None = None) -> Any:
    """``value`` as a strict model takes it for ``field``.

    Raises:
        ValidationError: it does not.
    """
    kind: Any = Annotated[field.annotation, field]  # pyright: ignore[reportInvalidTypeForm]
    return TypeAdapter[Any](kind).validate_python(value, strict=True, context=dict(context or {}))


def _section(annotation: Any) -> tuple[type[StrictModel] | None, bool]:
    """The model that a field holds, if it does: as itself or None (False), or as the values of a mapping (True)."""
    if get_origin(annotation) is dict:
        return _section(get_args(annotation)[1])[0], True
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, StrictModel):
            return option, False
    return None, False


def _rules(model: type[StrictModel]) -> list[Callable[[StrictModel], Iterator[Broken]]]:
    """A model's rules, inherited ones first, in the order of their definition."""
    return [
        method
        for ancestor in reversed(model.__mro__)
        for method in vars(ancestor).values()
        if getattr(method, "is_rule", False)
    ]
