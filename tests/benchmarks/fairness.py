"""What a flood does to a quiet tenant: 200 clients of one and 2 of another, with fair admission and without.

    python -m tests.benchmarks.fairness          # half a minute

The admission is the server's own, on a real event loop; the engine is a simulated one with so many places, in which a
request takes a fixed time and a time for each of its tokens, so that the scheduler alone is measured. Without
fairness all requests are one tenant's, which is first come, first served. The clients of both ask again as soon as
they are answered; one that is refused asks again after the Retry-After, shortened like all times here.

The last line is one JSON object: latencies in seconds, and the part of all service that the quiet tenant received.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from serving.access.admission import Admission
from serving.access.fairness import cost
from serving.http.api_error import ApiError

PROMPT_TOKENS = (20, 200)
ANSWER_TOKENS = (10, 100)
_SECONDS_A_TOKEN = 0.0002
_SECONDS_A_REQUEST = 0.002
_RETRY_PART = 0.05
"""Of a second of Retry-After: simulated requests take a twentieth or so of real ones' time."""


@dataclass
class Seen:
    """What the clients of one tenant saw."""

    latencies_s: list[float] = field(default_factory=list[float])
    service: float = 0.0
    refused: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flood", type=int, default=200, help="clients of the flooding tenant")
    parser.add_argument("--quiet", type=int, default=2, help="clients of the other")
    parser.add_argument("--running", type=int, default=8, help="places in the engine")
    parser.add_argument(
        "--waiting", type=int, default=512, help="places in the queue; fewer than the flood has clients are always full"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    options = parser.parse_args(arguments)
    runs = {
        "alone": asyncio.run(simulate(options, flood=0, is_fair=True)),
        "fair": asyncio.run(simulate(options, flood=options.flood, is_fair=True)),
        "unfair": asyncio.run(simulate(options, flood=options.flood, is_fair=False)),
    }
    table = Table(title=f"{options.quiet} clients beside a flood of {options.flood}", title_justify="left")
    for heading in ("", "requests", "median s", "95 % s", "refused", "share", "flood's requests"):
        table.add_column(heading, justify="left" if not heading else "right")
    result: dict[str, float | None] = {}
    for name, (quiet, flood) in runs.items():
        median, tail = _quantiles(quiet.latencies_s)
        share = quiet.service / ((quiet.service + flood.service) or 1.0)
        answered = len(quiet.latencies_s)
        table.add_row(
            name, str(answered), str(median), str(tail), str(quiet.refused), f"{share:.3f}",
            str(len(flood.latencies_s)),
        )  # fmt: skip
        result |= {f"{name}_median_s": median, f"{name}_p95_s": tail}
        result |= {f"{name}_share": round(share, 3), f"{name}_requests": answered, f"{name}_refused": quiet.refused}
    Console(width=100, markup=False, highlight=False).print(table)
    print(json.dumps(result))


async def simulate(options: argparse.Namespace, *, flood: int, is_fair: bool) -> tuple[Seen, Seen]:
    """What the quiet tenant and the flood saw in one run."""
    gate = Admission(running=options.running, waiting=options.waiting, timeout_s=60)
    quiet_seen, flood_seen = Seen(), Seen()
    clients = [
        client(gate, tenant if is_fair else "everybody", seen, random.Random(number))
        for tenant, seen, count in (("flood", flood_seen, flood), ("quiet", quiet_seen, options.quiet))
        for number in range(count)
    ]
    tasks = [asyncio.create_task(work) for work in clients]
    await asyncio.sleep(options.seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return quiet_seen, flood_seen


async def client(gate: Admission, tenant: str, seen: Seen, chance: random.Random) -> None:
    """Ask for ever, one request after the other."""
    while True:
        prompt, answer = chance.randint(*PROMPT_TOKENS), chance.randint(*ANSWER_TOKENS)
        began = time.perf_counter()
        while True:
            try:
                place = await gate.enter(tenant, prompt_tokens=prompt, max_tokens=2 * ANSWER_TOKENS[1])
                break
            except ApiError as error:
                seen.refused += 1
                await asyncio.sleep(float(error.headers["Retry-After"]) * _RETRY_PART)
        written = 0
        try:
            await asyncio.sleep(_SECONDS_A_REQUEST + _SECONDS_A_TOKEN * (prompt / 10 + answer))
            written = answer
        finally:
            place.leave(prompt, written)
        seen.latencies_s.append(time.perf_counter() - began)
        seen.service += cost(prompt, answer)


def _quantiles(seconds: list[float]) -> tuple[float | None, float | None]:
    """Median and 95th percentile; None where hardly anybody was answered."""
    if len(seconds) < 2:
        return None, None
    cuts = statistics.quantiles(seconds, n=20)
    return round(cuts[9], 4), round(cuts[18], 4)


if __name__ == "__main__":
    main()
