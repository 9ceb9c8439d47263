"""Keeps a replica's picture of the registry fresh, and loads ahead of requests what they will ask for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from cluster.errors import LoraloomError
from serving.adapters.catalogue import Catalogue, shortened
from serving.adapters.holdings import Holdings
from serving.http.api_error import MODEL_NOT_FOUND, REGISTRY_UNREACHABLE, ApiError, overloaded
from serving.manifest import LATEST, Manifest, is_reference, parse_reference
from serving.registry import Registry
from serving.registry.events import State
from serving.registry.split import versions_of

FOLLOW_S = 0.25
"""Seconds between two looks at the registry: a promotion counts on every replica within a second."""

_RETRY_S = 5.0
_MISS_S = 0.1
"""Names that nobody has published cost the registry at most one request in this time, however many ask for them; so
much later the first of them is answered."""

_log = logging.getLogger(__name__)


class Follower:
    """Follows one registry for one engine.

    Args:
        registry: Read by others of this replica at the same time.
        catalogue: Is told when something has changed.
        holdings: Is given what is to be loaded.
        pinned: References of adapters that stay loaded; an alias stays pinned wherever it moves.
    """

    def __init__(self, registry: Registry, catalogue: Catalogue, holdings: Holdings, pinned: Iterable[str]) -> None:
        self._registry = registry
        self._catalogue = catalogue
        self._holdings = holdings
        self._pinned = tuple(pinned)
        self._edition = registry.edition
        self._trouble: str | None = None
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._keeping: asyncio.Task[None] | None = None
        self._is_stale = False
        self._pins_fail_since: float | None = None

    async def begin(self, preload: Iterable[str]) -> None:
        """Load what is pinned, and what is wanted from the start."""
        await self._keep(self._manifests(preload))

    async def run(self) -> None:
        """Follow the registry for ever."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                await self.catch_up()
            except Exception:  # noqa: BLE001 - nobody would follow the registry if this ended
                _log.exception("the registry cannot be followed now")
            if self._pins_fail_since is not None and time.monotonic() - self._pins_fail_since > _RETRY_S:
                self._keep_soon()

    async def find(self, model: str, sticky: str | None = None) -> Manifest | None:
        """``Catalogue.find``, with another look at the registry for what is not known: whatever had been published when
        it was asked for is found.

        Raises:
            ApiError: as ``Catalogue.find``; 503 for what is not known while the registry cannot be reached.
        """
        asked_at = time.monotonic()
        try:
            return self._catalogue.find(model, sticky)
        except ApiError as error:
            if error.code != MODEL_NOT_FOUND or not is_reference(model):
                raise
        await self._catch_up_with(asked_at)
        try:
            return self._catalogue.find(model, sticky)
        except ApiError as error:
            if error.code != MODEL_NOT_FOUND or self._trouble is None:
                raise
        message = f"The model `{shortened(model)}` is not known, and the registry cannot be reached now"
        raise overloaded(message, REGISTRY_UNREACHABLE, _RETRY_S)

    async def catch_up(self) -> None:
        """Learn what has happened since the last look."""
        async with self._looking:
            await self._look()

    async def _catch_up_with(self, moment: float) -> None:
        """Learn what had happened by ``moment`` (of ``time.monotonic``); those who wait share one look."""
        async with self._looking:
            if self._looked_at < moment:
                await asyncio.sleep(self._looked_at + _MISS_S - time.monotonic())
                await self._look()

    async def _look(self) -> None:
        self._looked_at = time.monotonic()
        try:
            await asyncio.to_thread(self._registry.refresh)
        except LoraloomError as error:  # it does not answer, or not to these credentials, or its bucket is gone
            if str(error) != self._trouble:
                _log.warning("what is known of the registry stays: %s", error)
            self._trouble = str(error)
            return
        if self._trouble is not None:
            _log.warning("the registry answers again")
            self._trouble = None
        # Not what refresh() says: who writes through the same object has read its own event already.
        if self._registry.edition is not self._edition:
            before, self._edition = self._edition, self._registry.edition
            self._catalogue.forget()
            self._warm_what_has_moved(before)
            if self._pinned:
                self._keep_soon()

    def _keep_soon(self) -> None:
        """Bring the pins up to date, in a task of its own: it may have to wait for a place in the engine."""
        self._pins_fail_since = None
        if self._keeping is not None and not self._keeping.done():
            self._is_stale = True
            return
        self._keeping = asyncio.create_task(self._keep_up())

    async def _keep_up(self) -> None:
        self._is_stale = True
        while self._is_stale:
            self._is_stale = False
            await self._keep(())

    async def _keep(self, warm: Iterable[Manifest]) -> None:
        faults = await self._holdings.keep(self._manifests(self._pinned), warm)
        for fault in faults:
            _log.warning("not loaded ahead: %s", fault)
        self._pins_fail_since = time.monotonic() if faults else None

    def _manifests(self, references: Iterable[str]) -> list[Manifest]:
        """What ``references`` lead to now: several versions where an alias is split."""
        found: dict[str, Manifest] = {}
        for reference in references:
            try:
                name = parse_reference(reference).name
                for version in versions_of(self._registry.target(reference)):
                    manifest = self._catalogue.find(f"{name}@{version}")
                    if manifest is not None:
                        found[manifest.id] = manifest
            except (LoraloomError, ApiError) as error:
                _log.warning("not loaded ahead: %s", error)
        return list(found.values())

    def _warm_what_has_moved(self, before: State) -> None:
        """Load what an alias of an adapter that is in use here points to now; a new one may take over from ``latest``,
        which a bare name follows where there is no ``prod``. ``before``: what was known at the last look.
        """
        for name in {parse_reference(adapter).name for adapter in self._holdings.resident}:
            targets = self._registry.aliases(name, before)
            for alias, target in self._registry.aliases(name).items():
                if targets.get(alias, targets.get(LATEST)) != target:
                    for manifest in self._manifests(f"{name}@{version}" for version in versions_of(target)):
                        self._holdings.warm(manifest)
