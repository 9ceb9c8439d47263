"""Votes over HTTP: which of several answers is the better one, kept in the registry beside the scores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cluster.errors import InputError, LoraloomError, NotFoundError
from serving.access.keys import Key
from serving.adapters.catalogue import shortened
from serving.http.api_error import REGISTRY_UNREACHABLE, ApiError, model_not_found, overloaded
from serving.playground.routes import Vote
from serving.registry import Registry
from serving.registry.votes import BASE, PREFERRED, version_of, vote_faults

_RETRY_AFTER_S = 5.0
_MOST_WAITING = 32
"""Votes that wait for the store, one after another: it may hang, and its threads are also those of other duties."""


class Votes:
    """Takes votes for one registry.

    Args:
        registry: Where they are kept.
        base_name: What clients call the base.
        caught_up: Called when a vote was written, so that this replica shows what it changed.
    """

    def __init__(self, registry: Registry, base_name: str, caught_up: Callable[[], Awaitable[None]]) -> None:
        self._registry = registry
        self._base_name = base_name
        self._caught_up = caught_up
        self._writing = asyncio.Lock()
        self._waiting = 0

    async def cast(self, key: Key, vote: Vote) -> dict[str, Any]:
        """Keep ``vote``, by the name of ``key``.

        Returns:
            The vote as it was kept, and the score ``preferred`` of each version that it names.

        Raises:
            ApiError: 400 where it is no vote, 403 where the key may not ask one of the models, 404 where one is not
                there, 503 if the registry cannot be written, or too many votes wait for that.
        """
        for model in vote.models:
            key.authorise(model, self._base_name)
        models, better = [self._kept(model) for model in vote.models], vote.better and self._kept(vote.better)
        faults = list(vote_faults(models, better))
        if faults:
            raise ApiError(400, f"Invalid request: {InputError(faults)}", "invalid_request", faults[0].where)
        if self._waiting >= _MOST_WAITING:
            raise overloaded("Too many votes wait for the registry", REGISTRY_UNREACHABLE, _RETRY_AFTER_S)
        self._waiting += 1
        try:
            async with self._writing:
                await asyncio.to_thread(self._write, models, better, key.id)
        finally:
            self._waiting -= 1
        await self._caught_up()
        return {"models": vote.models, "better": vote.better, "scores": self._scores(models)}

    def _kept(self, model: str) -> str:
        if model == BASE != self._base_name:  # not what this base is called, whatever the registry calls it
            raise model_not_found(model)
        return BASE if model == self._base_name else model

    def _write(self, models: Sequence[str], better: str | None, by: str) -> None:
        try:
            self._registry.record_vote(models, better, by=by)
        except NotFoundError as error:
            missing = next((model for model in models if not self._has(model)), models[0])
            raise model_not_found(shortened(missing)) from error
        except LoraloomError as error:
            raise overloaded(f"The registry cannot be written: {error}", REGISTRY_UNREACHABLE, _RETRY_AFTER_S) from None

    def _has(self, model: str) -> bool:
        reference = version_of(model)
        return reference is None or reference.version in self._registry.versions(reference.name)

    def _scores(self, models: Sequence[str]) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for reference in filter(None, map(version_of, models)):
            with contextlib.suppress(NotFoundError):  # somebody has removed it since
                score = self._registry.scores(reference.name, reference.version or 0).get(PREFERRED)
                scores[str(reference)] = score and score.model_dump(mode="json")
        return scores
