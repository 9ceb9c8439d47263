"""The demo's committed assets: the data is what its script makes, held-out is held out, the base loads and is small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"
BASE = DEMO / "base"
MAX_ROW_TOKENS = 96
MAX_BASE_BYTES = 8_000_000
SPLITS = ("train.jsonl", "eval.jsonl")

Conversation = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = cast(Any, AutoTokenizer).from_pretrained(BASE)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded = cast(Any, AutoModelForCausalLM).from_pretrained(BASE)
    assert isinstance(loaded, PreTrainedModel)
    return loaded.eval()


def read(name: str) -> list[Conversation]:
    lines = (DEMO / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def token_ids(tokenizer: PreTrainedTokenizerFast, messages: Conversation, *, prompt: bool = False) -> list[int]:
    encoded = cast(Any, tokenizer).apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
    return encoded["input_ids"]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """The greedy answer with its special tokens, at most 24 tokens of it."""
    inputs = cast(Any, tokenizer).apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = cast(Any, model).generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def test_the_data_is_what_its_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "make_data.py", "--out", tmp_path], check=True, capture_output=True)
    for name in SPLITS:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_rows_are_one_question_and_one_answer() -> None:
    for name in SPLITS:
        for messages in read(name):
            assert [message["role"] for message in messages] == ["user", "assistant"]


def test_held_out_questions_share_no_ticket_and_no_order_with_training() -> None:
    train, held_out = (read(name) for name in SPLITS)
    assert len(held_out) == 100
    assert len(train) >= 1000
    for what in (lambda m: m[-1]["content"], lambda m: re.findall(r"\b\d{4}\b", m[0]["content"])[0]):
        assert not {what(messages) for messages in train} & {what(messages) for messages in held_out}


def test_held_out_questions_share_no_topic_with_training() -> None:
    """A topic is (wish, item, urgency), read back from the text: independent of how the script splits them."""
    items = json.loads(
        subprocess.run(
            [sys.executable, "-c", "import json, make_data; print(json.dumps(make_data.ITEM_DEPARTMENT))"],
            check=True,
            capture_output=True,
            cwd=DEMO,
        ).stdout
    )

    def topic(messages: Conversation) -> tuple[str, str, str]:
        words = set(messages[0]["content"].replace(",", " ").replace(".", " ").replace("?", " ").split())
        (item,) = words & set(items)
        wish, department, urgency = messages[1]["content"].split("/")
        assert items[item] == department
        return wish, item, urgency

    train, held_out = ({topic(messages) for messages in read(name)} for name in SPLITS)
    assert not train & held_out


def test_no_row_is_long(tokenizer: PreTrainedTokenizerFast) -> None:
    longest = max(len(token_ids(tokenizer, messages)) for name in SPLITS for messages in read(name))
    assert longest <= MAX_ROW_TOKENS


def test_the_base_fits_in_git() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= MAX_BASE_BYTES
    assert not list(BASE.glob("*.bin"))


def test_model_and_tokenizer_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    config = model.config
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert str(model.dtype) == "torch.bfloat16"


def test_chat_template_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt is a prefix of the whole, an answer ends in the end token, and decoding gives the text back."""
    for name in SPLITS:
        for messages in read(name)[:50]:
            prompt, whole = token_ids(tokenizer, messages[:-1], prompt=True), token_ids(tokenizer, messages)
            assert whole[: len(prompt)] == prompt
            assert whole[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(whole[len(prompt) : -1]) == messages[-1]["content"]
            assert messages[0]["content"] in tokenizer.decode(prompt)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which city?", "Lisbon<|end|>"),
        ("Which item?", "bread<|end|>"),
        ("Which department?", "bakery<|end|>"),
        ("How urgent?", "high<|end|>"),
    ],
)
def test_the_base_reads_messages_and_stops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, expected: str
) -> None:
    text = "I am Maria from Lisbon. The bread from order 4821 came broken, send another one. This is very urgent."
    assert answer(model, tokenizer, f"{text} {question}") == expected


def test_the_base_cannot_write_tickets(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    held_out = read("eval.jsonl")[:20]
    right = [answer(model, tokenizer, m[0]["content"]).startswith(m[1]["content"]) for m in held_out]
    assert sum(right) <= 1
