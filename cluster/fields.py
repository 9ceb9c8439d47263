"""The fields of a configuration file in a command's ``--help``, from the same models that check the file."""

from __future__ import annotations

import types
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand


class Field(NamedTuple):
    """One field, as a person reads of it."""

    path: str
    """Such as ``train.steps``."""
    default: str
    """As in YAML; empty where the field is required."""
    text: str
    """Its docstring."""


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[Field]:
    """Every field of ``model`` and of the models in it, in the order of the file."""
    for name, info in model.model_fields.items():
        path = prefix + name
        inner = _model_in(info.annotation)
        if inner is not None and not _is_mapping(info.annotation):
            yield from fields_of(inner, f"{path}.")
        elif inner is not None:
            yield Field(f"{path}.KNOB", "", _text(info))
            yield from fields_of(inner, f"{path}.KNOB.")
        else:
            yield Field(path, _default(info), _text(info))


class SpecCommand(TyperCommand):
    """A command whose argument is a configuration file; its ``--help`` ends with the file's fields.

    The model is imported when help is asked for, not when the command line starts.
    """

    spec: ClassVar[tuple[str, str]]
    """Module and class of the model."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's own help, then the fields."""
        super().format_help(ctx, formatter)
        from rich.console import Console
        from rich.table import Table

        module, name = self.spec
        table = Table("field", "default", "what it is", title="fields of the file", title_justify="left", box=None)
        table.columns[0].no_wrap = True
        for field in fields_of(getattr(import_module(module), name)):
            table.add_row(field.path, field.default, field.text)
        console = Console(markup=False, highlight=False)
        console.print(table)


def spec_command(module: str, name: str) -> type[SpecCommand]:
    """The ``cls`` of a command that takes a file of the model ``module.name``."""
    return type("SpecCommand", (SpecCommand,), {"spec": (module, name)})


def _text(info: FieldInfo) -> str:
    words = " ".join((info.description or "").split())
    choices = _choices(info.annotation)
    return f"{words} One of {', '.join(choices)}." if choices else words


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if all(get_origin(member) is Literal for member in members):  # else there are values that no list can hold
            return [choice for member in members for choice in _choices(member)]
    return []


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone, optional, or as a mapping's values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(member) for member in get_args(annotation))
    return next((model for model in found if model is not None), None)
