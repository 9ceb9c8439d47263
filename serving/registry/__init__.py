"""The shelf of published adapters, in a folder or in an object store; ``registry.py`` says what is atomic."""

from serving.registry.changes import UNSET
from serving.registry.errors import CorruptAdapterError, CorruptRegistryError, RegistryUnreachableError
from serving.registry.events import Event, Score
from serving.registry.registry import Registry
from serving.registry.split import AliasTarget

__all__ = [
    "UNSET",
    "AliasTarget",
    "CorruptAdapterError",
    "CorruptRegistryError",
    "Event",
    "Registry",
    "RegistryUnreachableError",
    "Score",
]
