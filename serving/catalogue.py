"""What a server can serve: the base, and those adapters of the registry that fit it.

The registry is asked for news at each call: on a local disk that takes a tenth of a millisecond, and what was published
a moment ago is there. While it does not answer, what is known of it is served on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from cluster.errors import InputError, NotFoundError
from serving.api_error import ADAPTER_CORRUPT, ADAPTER_UNFIT, ApiError, model_not_found
from serving.engine import RoutedId
from serving.manifest import BaseIdentity, Manifest
from serving.registry import CorruptAdapterError, Registry, RegistryUnreachableError

OWNER = "loraloom"


@dataclass(frozen=True)
class Catalogue:
    """Plain data that travels to the gateway."""

    base_name: str
    """What clients call the base."""
    base: BaseIdentity
    registry: str
    """Folder or URI of the registry."""
    max_rank: int
    """Largest rank that the engine serves."""
    max_model_len: int | None
    started_at: datetime

    def route(self, model: str | None) -> str:
        """The immutable id under which the engine answers for ``model``: the base's name, or a routed id.

        Raises:
            ApiError: 404 where nothing of that name exists, 400 where it cannot be served, 500 where it is corrupt.
        """
        if not model:
            raise ApiError(400, "The request must say which model to use", "model_required", "model")
        if model == self.base_name:
            return model
        manifest = self._find(model)
        return str(RoutedId(self.base_name, manifest.id, manifest.digest))

    def card(self, model: str) -> dict[str, Any]:
        """OpenAI's model object of one model.

        Raises:
            ApiError: as ``route``.
        """
        if model == self.base_name:
            return self._base_card()
        return self._adapter_card(model, self._find(model))

    def cards(self) -> list[dict[str, Any]]:
        """The model objects of all that can be served now. Corrupt adapters are left out: asking for them tells why."""
        registry = _newest(self.registry)
        cards = [self._base_card()]
        for name in registry.names():
            references = [name, *(f"{name}@{version}" for version in registry.versions(name))]
            for reference in references:
                try:
                    cards.append(self._adapter_card(reference, self._find(reference)))
                except ApiError:
                    continue
        return cards

    def unfit(self, manifest: Manifest) -> str | None:
        """Why the engine cannot serve an adapter; None if it can."""
        if not self.base.fits(manifest.base):
            bases = f"{manifest.base.model}, whose architecture is not that of {self.base.model}"
            return f"{manifest.id} was trained on {bases}"
        if manifest.rank > self.max_rank:
            return f"{manifest.id} has rank {manifest.rank}, and engine.max_lora_rank is {self.max_rank}"
        return None

    def _find(self, model: str) -> Manifest:
        try:
            manifest = _newest(self.registry).resolve(model)
        except (InputError, NotFoundError):
            raise model_not_found(model) from None
        except RegistryUnreachableError as error:
            raise ApiError(503, f"The adapter `{model}` cannot be looked up: {error}", None, "model") from None
        except CorruptAdapterError as error:
            raise ApiError(500, f"The adapter `{model}` cannot be loaded: {error}", ADAPTER_CORRUPT, "model") from None
        reason = self.unfit(manifest)
        if reason:
            raise ApiError(400, f"The adapter `{model}` cannot be served: {reason}", ADAPTER_UNFIT, "model")
        return manifest

    def _base_card(self) -> dict[str, Any]:
        card = _card(self.base_name, self.started_at, root=self.base.model, parent=None)
        return card | {"max_model_len": self.max_model_len}

    def _adapter_card(self, model: str, manifest: Manifest) -> dict[str, Any]:
        card = _card(model, manifest.created_at, root=manifest.id, parent=self.base_name)
        about = manifest.model_dump(mode="json", include={"rank", "alpha", "target_modules", "metrics", "lineage"})
        return card | {"max_model_len": self.max_model_len, "metadata": about}


@cache
def _opened(root: str) -> Registry:
    return Registry(root)


def _newest(root: str) -> Registry:
    registry = _opened(root)
    with contextlib.suppress(RegistryUnreachableError):
        registry.refresh()
    return registry


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
