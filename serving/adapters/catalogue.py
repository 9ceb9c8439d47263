"""What a server can serve: the base, and those adapters of the registry that fit it.

Each replica follows the registry's log several times a second and answers from memory, so a request waits for no disk
and no network, and goes on being answered while the registry cannot be reached.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from cluster.errors import InputError, LoraloomError, NotFoundError
from serving.http.api_error import ADAPTER_CORRUPT, ADAPTER_UNFIT, ApiError, model_not_found
from serving.manifest import BaseIdentity, Manifest
from serving.registry import CorruptAdapterError, Registry
from serving.registry.events import Score
from serving.registry.split import AliasTarget

OWNER = "loraloom"
_LONGEST_GUESS = 8192


class ServedBase(NamedTuple):
    """What a server serves, as plain data that travels to its replicas."""

    name: str
    """What clients call the base."""
    identity: BaseIdentity
    max_rank: int
    """Largest rank that the engine serves."""
    max_model_len: int | None
    started_at: datetime

    def unfit(self, manifest: Manifest) -> str | None:
        """Why the engine cannot serve an adapter; None if it can."""
        if not self.identity.fits(manifest.base):
            bases = f"{manifest.base.model}, whose architecture is not that of {self.identity.model}"
            return f"{manifest.id} was trained on {bases}"
        if manifest.rank > self.max_rank:
            return f"{manifest.id} has rank {manifest.rank}, and engine.max_lora_rank is {self.max_rank}"
        return None


class Catalogue:
    """What can be asked for now. All methods answer from memory; threads may call them while the registry changes."""

    def __init__(self, base: ServedBase, registry: Registry) -> None:
        self.base = base
        self.base_name = base.name
        self._registry = registry
        self._changes = 0
        self._cards: tuple[int, list[tuple[str, bytes]]] | None = None
        """All cards, and how many changes they know of: a thread may be making them while another change comes."""

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer, or a guess of it where the engine decides."""
        return self.base.max_model_len or _LONGEST_GUESS

    def forget(self) -> None:
        """The registry has changed: make the cards anew when they are next asked for."""
        self._changes += 1

    def find(self, model: str, sticky: str | None = None) -> Manifest | None:
        """The version that a request for ``model`` gets; None for the base.

        Args:
            model: The base's name, or a reference to an adapter.
            sticky: Keeps requests with the same value on the same version of a split alias.

        Raises:
            ApiError: 404 where nothing of that name exists, 422 where it cannot be served here, 503 where it is
                corrupt.
        """
        if model == self.base_name:
            return None
        try:
            manifest = self._registry.resolve(model, sticky)
        except (InputError, NotFoundError):
            raise model_not_found(shortened(model)) from None
        except CorruptAdapterError as error:
            raise ApiError(503, f"The adapter `{model}` cannot be loaded: {error}", ADAPTER_CORRUPT, "model") from None
        reason = self.base.unfit(manifest)
        if reason:
            raise ApiError(422, f"The adapter `{model}` cannot be served: {reason}", ADAPTER_UNFIT, "model")
        return manifest

    def card(self, model: str, manifest: Manifest | None) -> bytes:
        """OpenAI's model object of one model, as JSON; ``manifest`` is what ``find`` gave for it.

        Raises:
            ApiError: 404 where it was removed since.
        """
        if manifest is None:
            return self._base_card()
        try:
            return self._adapter_card(model, manifest, self._registry.target(model))
        except LoraloomError:  # it was removed since
            raise model_not_found(shortened(model)) from None

    def cards(self, may_see: Callable[[str], bool]) -> bytes:
        """OpenAI's list of all models that can be served now and that ``may_see`` lets through, as JSON: the base, and
        each adapter by its name, by each alias, and by each version.
        """
        changes, made = self._changes, self._cards
        if made is None or made[0] != changes:
            made = self._cards = (changes, [(self.base_name, self._base_card()), *self._adapter_cards()])
        shown = b", ".join(card for model, card in made[1] if may_see(model))
        return b'{"object": "list", "data": [' + shown + b"]}"

    def _adapter_cards(self) -> list[tuple[str, bytes]]:
        cards: list[tuple[str, bytes]] = []
        for name in self._registry.names():
            aliases = self._registry.aliases(name)
            references: dict[str, AliasTarget | None] = {name: None}
            references |= {f"{name}@{alias}": target for alias, target in sorted(aliases.items())}
            references |= {f"{name}@{version}": None for version in self._registry.versions(name)}
            for reference, target in references.items():
                # What cannot be served, or was removed since the names were read, is not shown.
                with contextlib.suppress(LoraloomError):
                    manifest = self.find(reference)
                    if manifest is not None:
                        cards.append((reference, self._adapter_card(reference, manifest, target)))
        return cards

    def _base_card(self) -> bytes:
        card = _card(self.base_name, self.base.started_at, root=self.base.identity.model, parent=None)
        return json.dumps(card | {"max_model_len": self.base.max_model_len}).encode()

    def _adapter_card(self, model: str, manifest: Manifest, target: AliasTarget | None) -> bytes:
        card = _card(model, manifest.created_at, root=manifest.id, parent=self.base_name)
        about = manifest.model_dump(mode="json", include={"rank", "alpha", "target_modules", "metrics", "lineage"})
        scores: dict[str, Score] = self._registry.scores(manifest.name, manifest.version)
        about["lineage"].pop("folder", None)  # where it lay on the publisher's machine concerns no client
        about["scores"] = {metric: score.model_dump(mode="json") for metric, score in scores.items()}
        if isinstance(target, dict):
            about["split"] = {f"{manifest.name}@{version}": share for version, share in target.items()}
        return json.dumps(card | {"max_model_len": self.base.max_model_len, "metadata": about}).encode()


def shortened(model: str, limit: int = 100) -> str:
    """``model`` as far as it may stand in a message."""
    return model if len(model) <= limit else f"{model[:limit]}..."


def _card(model: str, created: datetime, *, root: str, parent: str | None) -> dict[str, Any]:
    """OpenAI's fields, and ``root`` and ``parent`` with vLLM's meaning: what answers, and the base of an adapter."""
    return {
        "id": model,
        "object": "model",
        "created": int(created.timestamp()),
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
    }
