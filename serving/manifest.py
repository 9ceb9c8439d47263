"""What a published adapter is: its names, the references that lead to it, and the manifest that describes it.

A reference is ``name@2`` (a version), ``name@alias``, or ``name``: the alias ``prod`` where there is one, else
``latest``. A version never changes once it is there, so ``name@2`` is an identity: the engine, the logs and the answers
carry nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AwareDatetime, Field, FiniteFloat, NonNegativeInt, PositiveInt

from cluster.errors import Fault, InputError
from cluster.rules import StrictModel

LATEST = "latest"
"""The alias that always names the highest version; nobody moves it."""

DEFAULT_ALIAS = "prod"
"""The alias that a bare name follows where there is one."""

SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
NAME_RULE = "must start with a-z or 0-9, hold only a-z, 0-9, '.', '_' and '-', and have at most 63 characters"
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")

_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


def is_safe_name(name: str) -> bool:
    """True if ``name`` may name an adapter: it is a folder's name, part of a URL and of a metric's label at once."""
    return SAFE_NAME.fullmatch(name) is not None


def is_alias(name: str) -> bool:
    """True if ``name`` may be an alias: it never reads as a version."""
    return _ALIAS.fullmatch(name) is not None


class AdapterReference(NamedTuple):
    """A parsed reference; at most one of ``version`` and ``alias`` is set, and neither where a name stands alone."""

    name: str
    version: int | None
    alias: str | None

    def __str__(self) -> str:
        tail = self.alias if self.version is None else self.version
        return self.name if tail is None else f"{self.name}@{tail}"


def parse_reference(reference: str, where: str = "adapter") -> AdapterReference:
    """Parse ``name``, ``name@2`` or ``name@alias``.

    Raises:
        InputError: it is none of these; ``where`` says whose value it is.
    """
    name, separator, tail = reference.partition("@")
    faults: list[Fault] = []
    if not is_safe_name(name):
        faults.append(Fault(where, f"the name {NAME_RULE}", name))
    version = int(tail) if _VERSION.fullmatch(tail) else None
    if separator and version is None and not is_alias(tail):
        faults.append(Fault(where, "after '@' must come a version (1, 2, ...) or an alias (such as latest)", tail))
    if faults:
        raise InputError(faults)
    return AdapterReference(name, version, None if version is not None else tail or None)


def is_reference(text: str) -> bool:
    """True if ``text`` can be a reference to an adapter, whether there is one or not."""
    try:
        parse_reference(text)
    except InputError:
        return False
    return True


class BaseIdentity(StrictModel):
    """Which base an adapter was trained on, or a server serves."""

    model: str
    """Hub id, or the folder as it was called where the adapter was trained."""
    revision: str | None = None
    """Hub revision: as it was given, or else the commit that the hub id meant then; null for folders."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the architecture (layers, widths, heads, vocabulary); see ``architecture_fingerprint``."""

    def fits(self, other: BaseIdentity) -> bool:
        """True if an adapter of one is an adapter of the other: the same architecture, wherever the weights lie."""
        return self.fingerprint == other.fingerprint


class Manifest(StrictModel):
    """What a published version is, for good; the event that publishes it holds this (``serving.registry.events``)."""

    name: str
    """Name of the adapter."""
    version: PositiveInt
    """Number of the version, counted from 1."""
    created_at: AwareDatetime
    """When it was published, in UTC."""
    base: BaseIdentity
    """The base that it was trained on."""
    rank: PositiveInt
    """LoRA rank."""
    alpha: float
    """LoRA alpha; the delta is scaled by alpha / rank, or by alpha / sqrt(rank) with ``rslora``."""
    rslora: bool
    """True if scaled by alpha / sqrt(rank)."""
    target_modules: tuple[str, ...]
    """Names of the linear layers that it changes, such as ``q_proj``."""
    parameters: NonNegativeInt
    """Number of its weights."""
    metrics: dict[str, FiniteFloat]
    """What was measured on it, by the publisher's names."""
    lineage: dict[str, str | int | FiniteFloat | None]
    """Where it comes from: sweep, trial, configuration."""
    files: dict[str, str]
    """SHA-256 of every file of the version, by file name."""

    @property
    def id(self) -> str:
        """The immutable identity, such as ``support@2``."""
        return f"{self.name}@{self.version}"

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of all files: equal exactly if the contents are."""
        return _sha256(sorted(self.files.items()))


def architecture_fingerprint(architecture: dict[str, object]) -> str:
    """SHA-256 over the fields of a Hugging Face configuration that decide which adapters fit.

    Neither weights nor tokenizer take part: an adapter of a base also loads on a fine-tuned copy of it.
    """
    return _sha256({field: architecture.get(field) for field in _ARCHITECTURE})


def base_identity(model: str, revision: str | None = None, trust_remote_code: bool = False) -> BaseIdentity:
    """Read the configuration of a Hugging Face folder or hub id and return its identity.

    Args:
        model: Folder or hub id.
        revision: Hub revision; where it is None, the identity names the commit that was read.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            [Fault("base.model", f"must be a Hugging Face model with a readable config.json ({reason})", model)]
        ) from None
    fields: dict[str, object] = config.get_text_config().to_dict()
    if revision is None and not Path(model).is_dir():
        revision = _commit_read(model)
    return BaseIdentity(model=model, revision=revision, fingerprint=architecture_fingerprint(fields))


def _commit_read(model: str) -> str | None:
    """The commit of a hub id that the cache holds as its default branch: the one that has just been read."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, "config.json")  # CACHE/models--x--y/snapshots/COMMIT/config.json
    return Path(path).parent.name if isinstance(path, str) else None


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
