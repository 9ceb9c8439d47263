"""Loading and unloading as with vLLM, into a real registry."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from serving.adapters.catalogue import ServedBase
from serving.adapters.uploads import Uploads
from serving.http.api_error import ApiError
from serving.http.pages import LoadAdapter, UnloadAdapter
from serving.registry import Registry
from serving.registry.events import Event
from tests.serving.make import edit_weights, identity, make_adapter


class Setting:
    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.roots = folder / "roots"
        self.adapter = make_adapter(self.roots / "mine", base)
        self.registry = Registry(folder / "registry")
        self.caught_up = 0
        served = ServedBase("tiny", identity(base), 16, 128, datetime.now(UTC))
        self.uploads = Uploads(self.registry, served, (str(self.roots),), self._catch_up)

    async def _catch_up(self) -> None:
        self.caught_up += 1

    def load(self, name: str = "mine", folder: Path | None = None, *, inplace: bool = False) -> str:
        path = str(folder or self.adapter)
        return asyncio.run(self.uploads.load(LoadAdapter(lora_name=name, lora_path=path, load_inplace=inplace)))

    def unload(self, name: str = "mine") -> str:
        return asyncio.run(self.uploads.unload(UnloadAdapter(lora_name=name)))

    def refusal(self, folder: Path) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.load("refused", folder)
        assert self.registry.versions("refused") == []
        return caught.value


@pytest.fixture
def here(tmp_path: Path, base: Path) -> Setting:
    return Setting(tmp_path, base)


def test_the_answer_tells_a_new_version_from_a_new_name(here: Setting) -> None:
    said = "Success: LoRA adapter 'mine' added successfully."
    assert here.load() == said
    assert here.load(inplace=True) == f"{said} It is the version mine@2, which `mine` now leads to."
    here.registry.move("mine", "prod", 1)
    assert here.load(inplace=True) == f"{said} It is the version mine@3; `mine` goes on following its alias prod."
    assert here.registry.resolve("mine").version == 1
    assert here.registry.resolve("mine").lineage["folder"] == str(here.adapter)
    assert here.caught_up == 3


def test_links_within_the_roots_are_followed(here: Setting) -> None:
    linked = here.roots / "linked"
    linked.mkdir()
    for file in here.adapter.iterdir():
        (linked / file.name).symlink_to(file)
    here.load("linked", linked)
    here.load()
    assert here.registry.resolve("linked").files == here.registry.resolve("mine").files


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_the_roots_are_not(here: Setting, name: str) -> None:
    secret = here.folder / "secret"
    (here.adapter / name).rename(secret)
    (here.adapter / name).symlink_to(secret)
    error = here.refusal(here.adapter)
    assert (error.status, error.code, error.param) == (403, "insufficient_scope", "lora_path")


def test_a_link_that_is_put_in_while_the_file_is_opened(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a folder when its path was looked at, and leads out of the root when it is opened."""
    outside = here.folder / "outside"
    here.adapter.rename(outside)
    make_link, opening = os.symlink, os.open

    def exchange(path: str | Path, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if Path(path) == here.roots:
            here.adapter.rename(here.folder / "away")
            make_link(outside, here.adapter)
        return opening(path, flags, *args, dir_fd=dir_fd)

    here.adapter.mkdir()
    for file in outside.iterdir():
        (here.adapter / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(os, "open", exchange)
    error = here.refusal(here.adapter)
    monkeypatch.undo()
    assert error.status in (400, 403)
    assert here.adapter.is_symlink()


def test_what_is_no_file(here: Setting) -> None:
    (here.adapter / "adapter_config.json").unlink()
    error = here.refusal(here.adapter)
    assert error.status == 400
    assert str(here.adapter) in error.message
    os.mkfifo(here.adapter / "adapter_config.json")
    error = here.refusal(here.adapter)
    assert (error.status, error.param) == (400, "lora_path")
    assert "must be a file" in error.message


def test_shapes_are_checked(here: Setting) -> None:
    site = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_weights(here.adapter, **{site: torch.ones(4, 7)})
    error = here.refusal(here.adapter)
    assert error.status == 400
    assert "q_proj" in error.message


def test_unloading(here: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    here.load()
    here.load(inplace=True)
    remove = here.registry.remove

    def somebody_is_faster(reference: str, *, force: bool = False) -> Event:
        remove(reference, force=force)
        return remove(reference, force=force)

    monkeypatch.setattr(here.registry, "remove", somebody_is_faster)
    with pytest.raises(ApiError) as caught:
        here.unload()
    assert caught.value.status == 404
    monkeypatch.undo()
    assert here.unload() == "Success: LoRA adapter 'mine' removed successfully."
    with pytest.raises(ApiError) as caught:
        here.unload()
    assert caught.value.status == 404
