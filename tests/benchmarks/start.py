"""How long it takes to begin: a node's first host, its second, and a trial on a host that is warm.

    python -m tests.benchmarks.start                      # two CPU cores, a base of 0.3 billion parameters: two minutes
    python -m tests.benchmarks.start --hidden 4096 --layers 32      # as large as an 8B base

The base is random, saved in 16 bits. The first host reads and quantises it and leaves it in the node's cache, the
second reads it from there; both are compared with transformers and bitsandbytes alone, which is what one process a
trial does. A trial is attached through Ray to a host that has the base, as a sweep does it.

The last line is one JSON object of medians: {"first_host_s": t, "second_host_s": t, "transformers_s": t, ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from cluster.connect import connect
from cluster.spec import ClusterSpec
from tests.benchmarks.surroundings import fresh_surroundings, llama
from tests.tiny import make_tokenizer
from tuning.engine.base import load_quantised
from tuning.engine.data import DataReport, Encoded, TokenisedData
from tuning.host import HostPlan, Place, start_broker
from tuning.spec import BaseSpec, TrialConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=20, help="to attach")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    with fresh_surroundings() as folder:
        spec = make_base(folder / "base", options)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result = loads(spec, device, options.rounds) | attach(spec, folder, options.trials)
    table = Table(title=f"to begin, hidden size {options.hidden}, {options.layers} layers", title_justify="left")
    table.add_column("")
    table.add_column("s", justify="right")
    for name, seconds in result.items():
        table.add_row(name.removesuffix("_s").replace("_", " "), f"{seconds:.3f}")
    Console(width=100, markup=False, highlight=False).print(table)
    print(json.dumps(result))


def make_base(folder: Path, options: argparse.Namespace) -> BaseSpec:
    """A random Llama in bfloat16."""
    hidden, heads = options.hidden, options.hidden // 64
    shape = {"layers": options.layers, "heads": heads, "key_value_heads": heads, "pad_token_id": 0}
    model: Any = LlamaForCausalLM(llama(32_000, hidden, hidden * 11 // 4, **shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return BaseSpec(model=str(folder))


def loads(spec: BaseSpec, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds to load the base: with an empty cache, from it, and without one."""
    plain = spec.model_copy(update={"cache": False})
    load_quantised(plain, device)  # whatever is done once in a process
    times: dict[str, list[float]] = {"first_host_s": [], "second_host_s": [], "transformers_s": []}
    for number in range(rounds):
        os.environ["XDG_CACHE_HOME"] = f"{os.environ['XDG_CACHE_HOME']}-{number}"
        times["first_host_s"].append(_seconds(lambda: load_quantised(spec, device)))
        times["second_host_s"].append(_seconds(lambda: load_quantised(spec, device)))
        times["transformers_s"].append(_seconds(lambda: load_quantised(plain, device)))
    return {name: round(statistics.median(seconds), 3) for name, seconds in times.items()}


def attach(spec: BaseSpec, folder: Path, trials: int) -> dict[str, float]:
    """Seconds until a trial has its slot on a host that has the base; rank 16 on all linear layers."""
    ids = torch.arange(5, 25, dtype=torch.int32).numpy()
    TokenisedData([Encoded(ids, ids)], [Encoded(ids, ids)], DataReport()).write(folder / "data")
    times: list[float] = []
    with connect(ClusterSpec(dashboard=False), job_name="benchmark"):
        broker: Any = start_broker(HostPlan("benchmark", spec, folder / "data", None, "eval_loss", 600.0))
        gpu = "0" if torch.cuda.is_available() else None
        place = Place(ray.get_runtime_context().get_node_id(), gpu)
        _serial, host = ray.get(broker.host.remote(place))
        ray.get(host.report.remote())
        for number in range(trials):
            name, config = f"t{number:03d}", TrialConfig(rank=16, alpha=16.0, seed=number)
            times.append(_seconds(lambda: ray.get(host.attach.remote(name, config, str(folder / name)))))  # noqa: B023
    return {"attach_s": round(statistics.median(times), 4), "slowest_attach_s": round(max(times), 4)}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
