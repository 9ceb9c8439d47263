"""`loraloom evaluate` and lm-evaluation-harness against a real server: vLLM on CPUs, two adapters of the demo's base.

The rows' references are what `support@2` itself answers, so that it must score 1 and the others must not.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from loraloom import app
from serving.client import ask_all
from serving.registry import Registry
from tests.serving.make import identity, make_adapter

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
BASE = ROOT / "configs/demo/base"
ROWS = 8
MAX_TOKENS = 6
Chat = list[dict[str, str]]


@dataclass
class Served:
    """A running server and the rows that it is asked."""

    url: str
    registry: Registry
    folder: Path
    rows: Path
    adapters: dict[str, Path | None]
    """Model id -> PEFT folder."""

    def conversations(self) -> list[Chat]:
        return [json.loads(line)["messages"] for line in self.rows.read_text().splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[Served]:
    folder = tmp_path_factory.mktemp("evaluate")
    registry = Registry(folder / "registry")
    adapters: dict[str, Path | None] = {"base": None}
    for version in (1, 2):
        path = make_adapter(folder / f"adapter-{version}", BASE, seed=version)
        manifest = registry.publish("support", path, identity(BASE), metrics={}, lineage={})
        adapters[manifest.id] = path
    config = {
        "base": {"model": str(BASE), "name": "base"},
        "registry": str(folder / "registry"),
        "engine": {"max_loras": 2, "max_lora_rank": 8, "max_model_len": 256, "dtype": "float32"},
        "http": {"port": 0},
        "cluster": {"num_cpus": 2, "dashboard": False},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "loraloom.py"), "serve", str(folder / "serve.yaml"), "--json"]
    with (
        (folder / "stderr").open("w") as stderr,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout
            line = next((line for line in process.stdout if line.startswith("{")), None)
            assert line, (folder / "stderr").read_text()
            url = json.loads(line)["url"]
            yield Served(url, registry, folder, write_rows(folder / "rows.jsonl", url), adapters)
            process.terminate()
            process.wait(60)
        finally:
            process.kill()


def write_rows(path: Path, url: str) -> Path:
    """Held-out questions of the demo to which `support@2` answers with a word, and those answers."""
    lines = (ROOT / "configs/demo/eval.jsonl").read_text().splitlines()
    asked = [json.loads(line)["messages"][:1] for line in lines]
    answers = ask_all(url, "support@2", asked, max_tokens=MAX_TOKENS)
    rows = [
        {"messages": [*chat, {"role": "assistant", "content": answer.text}]}
        for chat, answer in zip(asked, answers, strict=True)
        if re.search("[a-z]{4}", answer.text)
    ]
    assert len(rows) >= ROWS
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]))
    return path


def evaluate(served: Served, models: str, *options: str) -> dict[str, Any]:
    fixed = ["--data", str(served.rows), "--url", served.url, "--registry", str(served.folder / "registry")]
    fixed += ["--max-tokens", str(MAX_TOKENS), "--out", str(served.folder / "out"), "--json"]
    result = CliRunner().invoke(app, ["evaluate", "--models", models, *fixed, *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def reference_model(adapter: Path | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter))


def nats(model: Any, before: list[int], whole: list[int]) -> tuple[float, int]:
    """Negative log-likelihood of the tokens of ``whole`` that ``before`` lacks, and how many there are."""
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    found = [logits[place - 1, whole[place]].item() for place in range(len(before), len(whole))]
    return -sum(found), len(found)


def encode(chat: Chat) -> tuple[list[int], list[int]]:
    """A conversation without its last turn, and with it, as the chat template has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = (
        tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(chat, tokenize=False),
    )
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return before, whole


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads a name that transformers renamed
def test_models_are_scored_as_they_are(served: Served) -> None:
    every = [
        word for metric in ("exact_match", "contains", "rouge", "f1", "perplexity") for word in ("--metric", metric)
    ]
    document = evaluate(served, "base,support@1,support@2", *every)
    found = {model["id"]: model for model in document["models"]}
    assert list(found) == ["base", "support@1", "support@2"]
    assert document["requests"] == {"asked": 3 * 2 * ROWS, "kept": 0, "retried": 0}
    for metric in ("exact_match", "contains", "rouge", "f1"):
        assert found["support@2"]["metrics"][metric]["value"] == pytest.approx(1), metric
        assert found["base"]["metrics"][metric]["value"] < 1
    pairs = [encode(chat) for chat in served.conversations()]
    for model_id, adapter in served.adapters.items():
        model = reference_model(adapter)
        parts = [nats(model, *pair) for pair in pairs]
        expected = math.exp(sum(part for part, _ in parts) / sum(tokens for _, tokens in parts))
        assert found[model_id]["metrics"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-3), model_id
    for version in (1, 2):
        served.registry.refresh()
        scores = served.registry.scores("support", version)
        for metric, score in found[f"support@{version}"]["metrics"].items():
            recorded = scores[metric]
            assert (recorded.value, recorded.count) == (score["value"], ROWS)
            assert recorded.data_sha256 == document["data_sha256"]


def test_prompts_completions_and_texts(served: Served) -> None:
    plain = served.folder / "plain.jsonl"
    plain.write_text(
        '{"prompt": "Where is the", "completion": " caf\u00e9 of order 7?"}\n{"prompt": "I", "completion": " want"}\n'
    )
    found = evaluate(served, "base", "--data", str(plain), "--metric", "perplexity", "--metric", "exact_match")
    parts = [nats(reference_model(None), *pair) for pair in plain_pairs(plain)]
    expected = math.exp(sum(part for part, _ in parts) / sum(tokens for _, tokens in parts))
    assert found["models"][0]["metrics"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)
    text = served.folder / "text.jsonl"
    text.write_text('{"text": "Where is the guitar of order 7?"}\n')
    (only,) = evaluate(served, "base", "--data", str(text))["models"]
    assert list(only["metrics"]) == ["perplexity"]
    assert only["metrics"]["perplexity"]["value"] > 1


def plain_pairs(path: Path) -> list[tuple[list[int], list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"])
        for row in rows
    ]


def test_the_better_one_is_promoted_and_answers(served: Served) -> None:
    first = evaluate(served, "support@1,support@2", "--promote-if", "exact_match > prod")
    assert first["against"] == "base"  # there is no prod yet
    assert first["promotion"]["winner"] == "support@2"
    served.registry.refresh()
    assert served.registry.aliases("support")["prod"] == 2
    again = evaluate(served, "support@1", "--promote-if", "exact_match > prod")
    assert again["against"] == "support@2"
    assert again["promotion"]["winner"] is None
    assert again["requests"]["asked"] == 0


def lm_eval(served: Served, task: str, model: str, limit: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and samples of lm-evaluation-harness, run as its users run it."""
    out = served.folder / f"{task}-{model}"
    arguments = f"model={model},base_url={served.url}/completions,tokenizer={BASE},num_concurrent=4,max_retries=1"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", task, "--include_path", str(ROOT / "configs/evaluate"), "--apply_chat_template"]
    command += ["--limit", str(limit), "--log_samples", "--output_path", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    kept = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][task], sorted(kept, key=lambda sample: sample["doc_id"])


def test_lm_evaluation_harness_generates(served: Served) -> None:
    results, samples = lm_eval(served, "demo_ticket", "support@2", ROWS)
    assert len(samples) == ROWS
    asked = [[{"role": "user", "content": sample["doc"]["question"]}] for sample in samples]
    answers = ask_all(served.url, "support@2", asked, max_tokens=16)
    written = [sample["resps"][0][0] for sample in samples]
    assert written == [answer.text.partition("\n")[0] for answer in answers]
    assert any(written)
    right = sum(text == sample["doc"]["ticket"] for text, sample in zip(written, samples, strict=True))
    assert results["exact_match,none"] == pytest.approx(right / ROWS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lm_evaluation_harness_weighs_choices(served: Served) -> None:
    limit = 3
    results, samples = lm_eval(served, "demo_wish", "support", limit)
    version = served.registry.resolve("support").id
    model = reference_model(served.adapters[version])
    right = 0
    for sample in samples:
        question = sample["doc"]["question"]
        expected: list[float] = []
        for ticket, (found, *_) in zip(sample["doc"]["tickets"], sample["resps"], strict=True):
            before, whole = encode([{"role": "user", "content": question}, {"role": "assistant", "content": ticket}])
            loss, _ = nats(model, before, whole[:-1])  # the harness does not ask for the end
            expected.append(-loss)
            assert float(found[0]) == pytest.approx(-loss, rel=1e-3)
        right += expected.index(max(expected)) == sample["doc"]["right"]
    assert results["acc,none"] == pytest.approx(right / limit)
