"""What can be wrong with a registry, beyond a caller's mistakes."""

from __future__ import annotations

from cluster.errors import LoraloomError


class CorruptAdapterError(LoraloomError):
    """A published version is not what was published: files are missing, changed or unreadable."""


class CorruptRegistryError(LoraloomError):
    """Events of the registry's log are missing or unreadable. Reading goes on without them; writing is refused, because
    the number of a version could be given twice.
    """


class RegistryUnreachableError(LoraloomError):
    """The registry's storage does not answer. What has been read stays usable; the next call may succeed."""

    exit_code = 5
