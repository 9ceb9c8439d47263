"""What a request really took, seen where the engine's outputs pass: tokens, and when they came.

An answer's ``usage`` field would tell the tokens too, but only after the fact, and not in a stream unless the client
asks for it. The request's task carries its ``Usage`` in a context variable, which the tasks that it starts inherit.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any


class Usage:
    """Counts of one HTTP request; it may have several prompts, and several answers to each."""

    __slots__ = ("answer_tokens", "first_at", "last_at", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.answer_tokens = 0
        self.first_at: float | None = None
        """When the first token came, by ``time.monotonic``."""
        self.last_at: float | None = None
        """When the last one came."""


current_usage: ContextVar[Usage | None] = ContextVar("current_usage", default=None)


def count_outputs(engine_client: Any) -> None:
    """Have the outputs of ``engine_client.generate`` counted into the ``current_usage`` of whoever asks.

    Args:
        engine_client: vLLM's ``EngineClient``. Each output holds the tokens since the one before, or all of them at
            once (``RequestOutputKind.DELTA`` and ``FINAL_ONLY``, the two that its OpenAI server asks for).
    """
    generate = engine_client.generate

    async def counted(*args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        usage = current_usage.get()
        outputs = generate(*args, **options)
        if usage is None:
            usage = Usage()
        is_first = True
        # Closed with us, not when it is collected: closing is what aborts a request in the engine.
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                now = time.monotonic()
                if is_first:
                    is_first = False
                    usage.prompt_tokens += len(output.prompt_token_ids or ())
                tokens = sum(len(answer.token_ids) for answer in output.outputs)
                if tokens:
                    usage.answer_tokens += tokens
                    usage.first_at = usage.first_at or now
                    usage.last_at = now
                yield output

    engine_client.generate = counted
