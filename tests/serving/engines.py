"""An engine that only writes down which adapters it is told to load and unload, and refuses what it is told to."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file


class RecordingEngine:
    """vLLM's two methods; a path is read as vLLM would."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.refuses: set[str] = set()
        self.order: list[str] = []

    async def add_lora(self, request: Any) -> bool:
        load_file(f"{request.lora_path}/adapter_model.safetensors")
        if request.lora_name in self.refuses:
            raise RuntimeError("no room in this engine")
        self.held[request.lora_int_id] = request.lora_name
        self.order.append(f"+{request.lora_name}")
        return True

    async def remove_lora(self, number: int) -> bool:
        self.order.append(f"-{self.held.pop(number)}")
        return True
