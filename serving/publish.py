"""From a LoRA in PEFT's format, in a folder or on the Hugging Face hub, to a version in the registry.

Of a hub id nothing but ``adapter_config.json`` and ``adapter_model.safetensors`` is ever fetched, whatever else lies
there. Everything is checked on this machine before the registry is touched.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import ABSENT, Fault, InputError, MachineError, NotFoundError
from serving.manifest import NAME_RULE, Manifest, base_identity, is_safe_name
from serving.registry import Registry
from serving.registry.changes import text_faults
from serving.spec import MAX_LORA_RANKS
from serving.weights.architecture import ModelSource, linear_sites, reason
from serving.weights.checks import CONFIG_FILE, WEIGHTS_FILE, check_adapter, read_adapter_config

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@(?P<revision>[\w./-]+))?")


class HubId(NamedTuple):
    """A repository of the hub, written ``org/name`` or ``org/name@revision``."""

    repo: str
    revision: str | None
    """Branch, tag or commit; None is the default branch."""


class FoundAdapter(NamedTuple):
    """An adapter's files on this machine."""

    folder: Path
    lineage: dict[str, str | int | float | None]
    """Where they come from."""


def parse_hub_id(reference: str) -> HubId | None:
    """``reference`` as a hub id; None if it is none."""
    match = _HUB_ID.fullmatch(reference)
    return HubId(match["repo"], match["revision"]) if match else None


def is_folder(reference: str) -> bool:
    """True if a folder of that name is here; False also for what cannot be a name."""
    try:
        return Path(reference).is_dir()
    except OSError:  # too long for a name
        return False


def publish_adapter(
    source: str,
    registry: Registry,
    name: str,
    *,
    base: str | None = None,
    max_rank: int | None = None,
    trust_remote_code: bool = False,
    by: str | None = None,
    note: str | None = None,
) -> Manifest:
    """Publish the adapter in a folder, or of a hub id, as the next version of ``name``.

    Args:
        source: A folder with an adapter, or ``org/name[@revision]``.
        registry: Where to.
        name: The adapter's name there.
        base: Folder or hub id (``org/name[@revision]``) of the base that it was trained on; None means what its
            configuration names. One that is given counts also where the named one cannot be read.
        max_rank: Largest rank to accept; None means the largest that vLLM serves.
        trust_remote_code: Run Python code that comes with the base.
        by: Who publishes it; user@host if left out.
        note: Why.

    Raises:
        InputError: every rule that is broken by name, base, adapter, ``by`` or ``note``. Nothing has been published.
        NotFoundError: there is no such folder or hub id.
        MachineError: the hub does not answer, or the registry cannot be written.
    """
    found = find_adapter(source)
    config = read_adapter_config(found.folder)
    limit = MAX_LORA_RANKS[-1] if max_rank is None else max_rank
    faults = [*([] if is_safe_name(name) else [Fault("--name", NAME_RULE, name)]), *text_faults(by, note)]
    try:
        model = _base_of(config, found.folder, base, trust_remote_code=trust_remote_code)
        identity, sites = base_identity(*model), linear_sites(model)
    except InputError as error:
        where = "--base" if base else f"{found.folder / CONFIG_FILE}: base_model_name_or_path"
        faults += [_placed(fault, where) for fault in error.faults]
        try:
            check_adapter(found.folder, None, max_rank=limit)
        except InputError as more:
            faults += more.faults
        raise InputError(faults) from None
    if faults or (base and _is_unreadable(config)):
        _check_all(found.folder, faults, limit, sites)
    with _naming_base(found, config, model, is_stated=bool(base)) as stated:
        return registry.publish(
            name,
            stated.folder,
            identity,
            metrics={},
            lineage=stated.lineage,
            max_rank=limit,
            sites=sites,
            by=by,
            note=note,
        )


def find_adapter(source: str) -> FoundAdapter:
    """The files of a folder, or of a hub id, which are fetched.

    Raises:
        NotFoundError, InputError, MachineError: as ``publish_adapter``.
    """
    if is_folder(source):
        return FoundAdapter(Path(source), {"source": "folder", "folder": str(Path(source).absolute())})
    hub = parse_hub_id(source)
    if hub is None:
        raise NotFoundError(f"{source}: no such folder, and no hub id (org/name, or org/name@revision)")
    folder = _fetch(source, hub)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        rule = f"must hold {CONFIG_FILE} and {WEIGHTS_FILE} (pickled weights are not fetched); it lacks"
        raise InputError([Fault(source, f"{rule} {' and '.join(missing)}", ABSENT)])
    return FoundAdapter(folder, {"source": "hub", "hub_id": hub.repo, "hub_commit": folder.name})


def _fetch(source: str, hub: HubId) -> Path:
    """The snapshot of a repository in the hub's cache on this machine, with the two files."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
    except errors.HFValidationError as error:
        raise InputError([Fault("SOURCE", f"must be a folder or a hub id ({reason(error)})", source)]) from None
    except errors.GatedRepoError:
        rule = "the hub wants its terms accepted on its page, and HF_TOKEN or `hf auth login`"
        raise MachineError(f"{source}: {rule}") from None
    except errors.RepositoryNotFoundError:
        where = "no folder is here, and the hub has no such repository, or a private one (HF_TOKEN)"
        raise NotFoundError(f"{source}: {where}") from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{source}: the hub has no revision {hub.revision} of {hub.repo}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        told = "no folder is here, it is not in the hub's cache on this machine, and the hub cannot be asked"
        raise MachineError(f"{source}: {told} ({reason(error)})") from None
    return Path(folder)


def _base_of(config: dict[str, Any], folder: Path, base: str | None, *, trust_remote_code: bool) -> ModelSource:
    """The base that is stated, or else the one that the adapter's configuration names."""
    if base is not None:
        hub = None if is_folder(base) else parse_hub_id(base)
        return ModelSource(*(hub or (base, None)), trust_remote_code)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    where = str(folder / CONFIG_FILE)
    if not isinstance(named, str) or not named:
        raise InputError([Fault(f"{where}: base_model_name_or_path", "must name the base, or --base must", named)])
    if revision is not None and not isinstance(revision, str):
        raise InputError([Fault(f"{where}: revision", "must be a branch, tag or commit of the base", revision)])
    return ModelSource(named, None if is_folder(named) else revision, trust_remote_code)


def _placed(fault: Fault, where: str) -> Fault:
    """A fault of the base under the name that the user gave it by."""
    places = {"base.model": where, "base.trust_remote_code": "--trust-remote-code"}
    return fault._replace(where=places.get(fault.where, fault.where))


def _is_unreadable(config: dict[str, Any]) -> bool:
    """True if the base that the adapter names is not here, and is none that the hub or its cache gives."""
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(named, str) or not named or not isinstance(revision, str | None):
        return False
    try:
        base_identity(named, revision)
    except InputError:
        return True
    return False


def _check_all(folder: Path, faults: list[Fault], max_rank: int, sites: Any) -> None:
    """Check the adapter as it lies there, whatever base it names, and raise all that is wrong together."""
    try:
        check_adapter(folder, None, max_rank=max_rank, sites=sites)
    except InputError as error:
        raise InputError(faults + error.faults) from None
    if faults:
        raise InputError(faults)


@contextmanager
def _naming_base(
    found: FoundAdapter, config: dict[str, Any], model: ModelSource, *, is_stated: bool
) -> Generator[FoundAdapter]:
    """The adapter as it is; or, where a base is stated and the one that it names cannot be read, one that names the
    stated base, and whose lineage keeps the other name.
    """
    if not is_stated or not _is_unreadable(config):
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="loraloom-publish-") as scratch:
        folder = Path(scratch)
        renamed = config | {"base_model_name_or_path": model.model, "revision": model.revision}
        (folder / CONFIG_FILE).write_text(json.dumps(renamed, indent=2, sort_keys=True), encoding="utf-8")
        (folder / WEIGHTS_FILE).symlink_to((found.folder / WEIGHTS_FILE).resolve())
        yield FoundAdapter(folder, {**found.lineage, "trained_on": config["base_model_name_or_path"]})
