"""From files to tokens: every format and source, what counts in the loss, every kind of malformed row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from cluster.errors import InputError
from tests.tiny import SPECIAL, make_tokenizer
from tuning.engine.data import BATCH_ROWS, IGNORED, DataReport, RowStream, Tokens, check_rows, encode, prepare, tokenise
from tuning.engine.rows import MAX_FAULTS
from tuning.spec import DataSpec

Prepare = Callable[..., tuple[Tokens, Tokens, DataReport]]

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "täglich?"},
    {"role": "assistant", "content": "ja\n 🙂 "},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Prepare:
    """Prepares a file given by name and content: rows for JSONL, text or bytes as they are, None for what is there."""

    def run(
        name: str, content: Any, *, seed: int = 0, other: Any = None, **fields: Any
    ) -> tuple[Tokens, Tokens, DataReport]:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        if isinstance(content, (str, bytes)):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        given: dict[str, Any] = {"train": str(path), "max_length": 64, **fields}
        spec = DataSpec(**given)
        return prepare(spec, other or tokenizer, tmp_path / "tokens", seed)

    return run


def texts(tokens: Tokens) -> list[str]:
    tokenizer = make_tokenizer()
    return [str(tokenizer.decode(tokens.row(index)[0])) for index in range(len(tokens))]


def targets_of(row: dict[str, Any], tokenizer: Any, **fields: Any) -> str:
    encoded = encode(row, DataSpec(train="./x", **fields), tokenizer)
    assert len(encoded.ids) == len(encoded.labels)
    assert all(label in (token, IGNORED) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def faults_of(error: pytest.ExceptionInfo[InputError]) -> list[str]:
    return [str(fault) for fault in error.value.faults]


# What counts in the loss


def test_of_a_chat_exactly_the_assistant_s_turns_and_their_ends_count(tokenizer: PreTrainedTokenizerFast) -> None:
    assert targets_of({"messages": CHAT}, tokenizer) == "ho<|end|>ja\n 🙂 <|end|>"
    encoded = encode({"messages": CHAT}, DataSpec(train="./x"), tokenizer)
    assert tokenizer.decode(encoded.ids) == (
        "<|system|>be brief<|user|>hi<|assistant|>ho<|end|><|user|>täglich?<|assistant|>ja\n 🙂 <|end|>"
    )


def test_loss_on_all_counts_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode({"messages": CHAT}, DataSpec(train="./x", loss_on="all"), tokenizer)
    assert encoded.labels.tolist() == encoded.ids.tolist()
    text = encode({"text": "any"}, DataSpec(train="./x", format="text", loss_on="all"), tokenizer)
    assert text.labels.tolist() == text.ids.tolist()
    assert tokenizer.decode(text.ids) == "any<|end|>"


def test_a_prompt_does_not_count_its_completion_and_the_end_do(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "2 + 2 = ", "completion": "vier ✓"}
    assert targets_of(row, tokenizer, format="prompt_completion") == "vier ✓<|end|>"
    assert targets_of(row, tokenizer, format="prompt_completion", loss_on="all") == "2 + 2 = vier ✓<|end|>"
    assert targets_of({"prompt": "", "completion": "x"}, tokenizer, format="prompt_completion") == "x<|end|>"


def test_an_end_that_is_there_is_not_added_again(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a", "completion": "b<|end|>"}
    assert targets_of(row, tokenizer, format="prompt_completion") == "b<|end|>"


def with_post_processor(processor: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    inner.post_processor = processor
    plain = make_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", chat_template=plain.chat_template
    )


def test_a_first_token_that_the_tokenizer_adds_is_kept_and_does_not_count() -> None:
    tokenizer = with_post_processor(
        processors.TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 4)])
    )
    row = {"prompt": "", "completion": "b"}
    encoded = encode(row, DataSpec(train="./x", format="prompt_completion"), tokenizer)
    assert tokenizer.decode(encoded.ids) == "<|system|>b<|end|>"
    assert encoded.labels[0] == IGNORED
    chat = encode({"messages": CHAT}, DataSpec(train="./x"), tokenizer)
    assert tokenizer.decode(chat.ids).count("<|system|>") == 1  # the template writes its own


def test_an_end_that_the_tokenizer_adds_counts_once() -> None:
    tokenizer = with_post_processor(
        processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", SPECIAL.index("<|end|>"))])
    )
    assert targets_of({"prompt": "a", "completion": "b"}, tokenizer, format="prompt_completion") == "b<|end|>"
    assert targets_of({"text": "b"}, tokenizer, format="text", loss_on="all") == "b<|end|>"


def test_blanks_count_where_the_tokenizer_trims_them_from_its_spans() -> None:
    tokenizer = with_post_processor(processors.ByteLevel(add_prefix_space=False, trim_offsets=True))
    row = {"prompt": "a \n", "completion": "\n  b \n"}
    assert targets_of(row, tokenizer, format="prompt_completion") == "\n  b \n<|end|>"
    assert targets_of({"messages": CHAT}, tokenizer) == "ho<|end|>ja\n 🙂 <|end|>"


REWRITING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'] | upper }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_loss_on_all(prepared: Prepare) -> None:
    rewriting = make_tokenizer()
    rewriting.chat_template = REWRITING
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", [{"messages": CHAT}] * 2, other=rewriting)
    assert len(error.value.faults) == 2
    assert "rows.jsonl: line 1: cannot be put through the chat template" in faults_of(error)[0]
    assert "rewrites earlier turns" in faults_of(error)[0]
    assert "loss_on" in faults_of(error)[0]
    train, _, _ = prepared("rows.jsonl", [{"messages": CHAT}] * 4, other=rewriting, loss_on="all", eval_fraction=0.5)
    assert "HO<|end|>" in texts(train)[0]


def test_a_template_that_refuses_a_row_names_the_row(prepared: Prepare) -> None:
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"rows\.jsonl: line 1: cannot be put .*: roles must alternate"):
        prepared("rows.jsonl", [{"messages": CHAT}], other=strict)


def test_a_tokenizer_without_a_template_is_refused_for_messages_only(prepared: Prepare) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(InputError, match=r"base\.model: has a tokenizer without a chat template"):
        prepared("rows.jsonl", [{"messages": CHAT}], other=plain)
    rows = [{"text": "one"}, {"text": "two"}]
    prepared("rows.jsonl", rows, other=plain, format="text", loss_on="all", eval_fraction=0.5)


# Sources

PAIRS = [{"prompt": f"q{n}: ", "completion": f"a{n}"} for n in range(10)]
PAIR_TEXTS = {f"q{n}: a{n}<|end|>" for n in range(10)}


def assert_pairs(train: Tokens, evaluation: Tokens) -> None:
    assert len(train) == 9
    assert set(texts(train)) | set(texts(evaluation)) == PAIR_TEXTS


def test_jsonl(prepared: Prepare) -> None:
    text = "\ufeff" + "\n\n".join(json.dumps({**pair, "other": [1]}) for pair in PAIRS)
    assert_pairs(*prepared("rows.jsonl", text, format="prompt_completion")[:2])


def test_csv(prepared: Prepare) -> None:
    lines = ["completion,prompt,n", *(f'"a{n}",q{n}: ,{n}' for n in range(10))]
    assert_pairs(*prepared("rows.csv", "\r\n".join(lines), format="prompt_completion")[:2])


def test_csv_values_over_several_lines(prepared: Prepare) -> None:
    train, _, _ = prepared("rows.csv", 'text\n"a\nb"\n"c,""d"""\n', format="text", loss_on="all", eval_fraction=0.5)
    assert texts(train)[0] in ("a\nb<|end|>", 'c,"d"<|end|>')


def test_parquet(prepared: Prepare, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "rows.parquet", row_group_size=3)
    assert_pairs(*prepared("rows.parquet", None, format="prompt_completion")[:2])


def test_parquet_messages(prepared: Prepare, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}] * 2), tmp_path / "rows.parquet")
    train, _, _ = prepared("rows.parquet", None, eval_fraction=0.5, max_length=200)
    assert texts(train)[0].endswith("ja\n 🙂 <|end|>")


def test_a_saved_dataset(prepared: Prepare, tmp_path: Path) -> None:
    datasets.Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"))
    assert_pairs(*prepared("saved", None, format="prompt_completion")[:2])


def test_a_saved_dataset_of_splits(prepared: Prepare, tmp_path: Path) -> None:
    splits = {"first": PAIRS[:9], "second": PAIRS[9:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    own = str(tmp_path / "saved")
    names = {"eval": own, "train_split": "first", "eval_split": "second", "format": "prompt_completion"}
    train, evaluation, _ = prepared("saved", None, **names)
    assert_pairs(train, evaluation)
    assert texts(evaluation) == ["q9: a9<|end|>"]
    with pytest.raises(InputError) as error:
        prepared("saved", None, **{**names, "train_split": "train"})
    assert faults_of(error) == ["data.train_split: must be one of first, second, got 'train'"]


def test_only_the_columns_of_the_format_are_decoded(prepared: Prepare, tmp_path: Path) -> None:
    images: Any = [{"bytes": b"no image", "path": None}] * 2
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict({"text": ["a", "b"], "image": images}, features).save_to_disk(str(tmp_path / "saved"))
    train, _, _ = prepared("saved", None, format="text", loss_on="all", eval_fraction=0.5)
    assert texts(train)[0] in ("a<|end|>", "b<|end|>")

    features = datasets.Features({"text": datasets.Image()})
    datasets.Dataset.from_dict({"text": images}, features).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(InputError) as error:
        prepared("broken", None, format="text", loss_on="all")
    assert faults_of(error)[0].startswith(f"{tmp_path}/broken: train row 1: cannot be read: ")


def test_chats_of_a_saved_dataset(prepared: Prepare, tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"messages": CHAT}] * 2).save_to_disk(str(tmp_path / "saved"))
    train, _, _ = prepared("saved", None, eval_fraction=0.5, max_length=200)
    assert texts(train)[0].startswith("<|system|>be brief<|user|>hi")


@pytest.fixture
def hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of two configurations that `datasets` finds by its id: it looks below the current folder first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "team" / "pairs"
    folder.mkdir(parents=True)
    (folder / "one.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "two.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:4]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: one\n  data_files: [{split: train, path: one.jsonl}]\n"
        "- config_name: two\n  data_files: [{split: train, path: two.jsonl}, {split: test, path: one.jsonl}]\n---\n"
    )
    return "team/pairs"


def test_a_hub_id_by_configuration_and_split(prepared: Prepare, hub_id: str) -> None:
    both = {"train": hub_id, "eval": hub_id, "format": "prompt_completion"}
    train, evaluation, _ = prepared("", None, **both, train_config="two", eval_config="one", eval_split="train[9:]")
    assert sorted(texts(train)) == [f"q{n}: a{n}<|end|>" for n in range(4)]
    assert texts(evaluation) == ["q9: a9<|end|>"]


def test_a_wrong_configuration_or_split_of_a_hub_id_is_named_with_what_there_is(prepared: Prepare, hub_id: str) -> None:
    both = {"train": hub_id, "eval": hub_id, "format": "prompt_completion"}
    with pytest.raises(InputError) as error:
        prepared("", None, **both, eval_config="three")
    assert faults_of(error) == [
        "data.train_config: must be one of one, two, got None",
        "data.eval_config: must be one of one, two, got 'three'",
    ]
    with pytest.raises(InputError) as error:
        prepared("", None, **both, train_config="two", train_split="tran[:10%]", eval_config="one")
    assert faults_of(error) == [
        "data.train_split: must be one of train, test, or a part of it, got 'tran[:10%]'",
        "data.eval_split: must be one of train, or a part of it, got 'test'",
    ]
    with pytest.raises(InputError) as error:
        prepared("", None, **both, train_config="two", train_split="train[:50%", eval_config="two", eval_split="test+x")
    assert faults_of(error) == [
        "data.train_split: must be a split or a part of one, such as train[:90%], got 'train[:50%'",
        "data.eval_split: must be one of train, test, or a part of it, got 'test+x'",
    ]
    train, _, _ = prepared("", None, **{**both, "eval": None}, train_config="two", train_split="train+test[:2]")
    assert len(train) == 5  # of 6, one held out


def test_a_hub_id_that_cannot_be_had(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"data\.train: cannot be loaded: .*got 'team/none'"):
        prepared("", None, train="team/none")


def test_a_folder_that_is_no_saved_dataset(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"data\.train: cannot be loaded: .*got '.*folder'"):
        prepared("folder", None)


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("missing.jsonl", None, "no such file or folder"),
        ("rows.json", "[]", "must be a folder, a hub id or a file ending in .jsonl, .csv, .parquet"),
        ("rows.jsonl", "", "the file is empty"),
        ("rows.jsonl", b'{"text": "\xff"}', "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("rows.parquet", "not parquet", "cannot be read: "),
        ("rows.csv", "text\n" + "x" * 200_000, "cannot be read: field larger than field limit"),
    ],
)
def test_a_source_that_cannot_be_read(prepared: Prepare, name: str, content: Any, rule: str) -> None:
    with pytest.raises(InputError) as error:
        prepared(name, content, format="text", loss_on="all")
    assert len(error.value.faults) == 1
    assert faults_of(error)[0].startswith(f"data.train: {rule}")
    assert name in faults_of(error)[0]


# Malformed rows


def check_faults(error: pytest.ExceptionInfo[InputError], path: Path, expected: list[str]) -> None:
    assert faults_of(error) == [f"{path}: {fault}" for fault in expected]


def test_every_malformed_chat_is_named_by_file_line_and_field(prepared: Prepare, tmp_path: Path) -> None:
    good = {"role": "assistant", "content": "x"}
    rows = [
        {"messages": [good]},
        {"text": "x"},
        {"messages": "hello"},
        {"messages": []},
        {"messages": [good, "x"]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"content": "x"}, good]},
        {"messages": [good, {"role": "user", "content": None}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "only a question"}]},
        {"messages": [{"role": "assistant", "content": ""}, {"role": "assistant", "content": " \n"}]},
    ]
    lines = [json.dumps(row) for row in rows]
    lines[1:1] = ["", "{broken", "[1]", "[" * 10_000, "9" * 5000]
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", "\n".join(lines))
    found = faults_of(error)
    assert found[2].startswith(f"{tmp_path}/rows.jsonl: line 5: must be JSON that can be read: ")
    assert found[3].startswith(f"{tmp_path}/rows.jsonl: line 6: must be JSON that can be read: ")
    error.value.faults[2:4] = []
    check_faults(
        error,
        tmp_path / "rows.jsonl",
        [
            "line 3: must be JSON: Expecting property name enclosed in double quotes at column 2",
            "line 4: must be a JSON object, got [1]",
            "line 7: messages: is required by the format messages; the row has text",
            "line 8: messages: must be a list of {role, content}, got 'hello'",
            "line 9: messages: must be a list of {role, content}, got []",
            "line 10: messages[1]: must be {role, content}, got 'x'",
            "line 11: messages[0].role: must be system, user, assistant or tool, got 'robot'",
            "line 12: messages[0].role: must be system, user, assistant or tool",
            "line 13: messages[1].content: must be a string, got None",
            "line 14: messages[0].content: must be a string",
            "line 15: messages: must have an assistant's turn to learn from, one that is not empty",
            "line 16: messages: must have an assistant's turn to learn from, one that is not empty",
        ],
    )


def test_malformed_pairs(prepared: Prepare, tmp_path: Path) -> None:
    rows = [{"prompt": 1, "completion": None}, {"prompt": "", "completion": " \n"}, {"completion": "x"}, {}]
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", rows, format="prompt_completion")
    check_faults(
        error,
        tmp_path / "rows.jsonl",
        [
            "line 1: prompt: must be a string, got 1",
            "line 1: completion: must be a string, got None",
            "line 2: completion: must not be empty, got ' \\n'",
            "line 3: prompt: is required by the format prompt_completion; the row has completion",
            "line 4: prompt: is required by the format prompt_completion; the row has no field",
            "line 4: completion: is required by the format prompt_completion; the row has no field",
        ],
    )


@pytest.mark.parametrize(
    ("kind", "row", "field"),
    [
        ("text", {"text": "a \ud800 b"}, "text"),
        ("prompt_completion", {"prompt": "\udfff", "completion": "b"}, "prompt"),
        ("messages", {"messages": [{"role": "assistant", "content": "\ud83d"}]}, "messages[0].content"),
    ],
)
def test_half_a_character_is_a_fault_of_its_row(
    prepared: Prepare, tmp_path: Path, kind: str, row: dict[str, Any], field: str
) -> None:
    good = {"text": "c", "prompt": "a", "completion": "b", "messages": [{"role": "assistant", "content": "\U0001f9f6"}]}
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", [good, row], format=kind, loss_on="all")
    (fault,) = error.value.faults
    assert fault.where == f"{tmp_path}/rows.jsonl: line 2: {field}"
    assert fault.rule.startswith("must be text, but holds half of a surrogate pair")
    str(error.value).encode()  # and can be printed


def test_malformed_csv_and_parquet_rows(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        prepared("rows.csv", 'prompt,completion\na,"b\nc",d\nx\n', format="prompt_completion")
    check_faults(
        error,
        tmp_path / "rows.csv",
        [
            "line 2: has more values than the header's 2 columns, got ['d']",
            "line 4: completion: must be a string, got None",
        ],
    )
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "rows.parquet")
    with pytest.raises(InputError) as error:
        prepared("rows.parquet", None, format="text", loss_on="all")
    check_faults(error, tmp_path / "rows.parquet", ["row 2: text: must be a string, got None"])


def test_faults_of_both_files_are_told_together_and_the_many_are_counted(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text("{}\n" * 3)
    files = {"eval": str(tmp_path / "eval.jsonl"), "format": "text", "loss_on": "all"}
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", [{}], **files)
    assert ["eval.jsonl" in fault for fault in faults_of(error)] == [False, True, True, True]
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", [{}] * 30, **files)
    assert len(error.value.faults) == MAX_FAULTS + 1
    assert faults_of(error)[-1] == "...: and 13 more"
    assert not (tmp_path / "tokens").exists()


# Cut, dropped and held-out rows


def test_longer_rows_are_cut_at_the_end_and_counted(prepared: Prepare) -> None:
    rows = [{"prompt": "p" * size, "completion": "c" * 10} for size in (2, 10, 12, 20, 22, 23, 24, 40)]
    train, evaluation, report = prepared(
        "rows.jsonl", rows, format="prompt_completion", max_length=24, eval_fraction=0.3
    )
    lengths = sorted(part.length(index) for part in (train, evaluation) for index in range(len(part)))
    # 12 + 10 characters and the end fit; a row without a target left (24 of prompt, 40 of prompt) is dropped.
    assert lengths == [13, 21, 23, 24, 24, 24]
    assert report.as_dict() == {
        "train_rows": 4,
        "eval_rows": 2,
        "cut_rows": 5,
        "dropped_rows": 2,
        "train_tokens": sum(train.length(index) for index in range(4)),
        "longest": 51,
    }
    assert any(text == "p" * 23 + "c" for text in texts(train) + texts(evaluation))


def test_a_row_of_one_token_has_nothing_to_predict(prepared: Prepare) -> None:
    rows = [{"text": "<|end|>"}, {"text": "ab"}, {"text": "cd"}]
    _, _, report = prepared("rows.jsonl", rows, format="text", loss_on="all", eval_fraction=0.5)
    assert (report.train_rows, report.eval_rows, report.dropped_rows) == (1, 1, 1)


def test_the_held_out_rows_are_a_function_of_the_seed_and_disjoint(prepared: Prepare) -> None:
    rows = [{"text": f"row {n}"} for n in range(40)]

    def split(seed: int) -> tuple[list[str], list[str]]:
        train, evaluation, _ = prepared("rows.jsonl", rows, seed=seed, format="text", loss_on="all", eval_fraction=0.25)
        return texts(train), texts(evaluation)

    train, held = split(3)
    assert (len(train), len(held)) == (30, 10)
    assert not set(train) & set(held)
    assert set(train) | set(held) == {f"row {n}<|end|>" for n in range(40)}
    assert split(3) == (train, held)
    assert split(4) != (train, held)


def test_max_eval_rows_takes_the_first(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text("".join(f'{{"text": "e{n}"}}\n' for n in range(5)))
    _, evaluation, report = prepared(
        "rows.jsonl", [{"text": "x"}], eval=str(tmp_path / "eval.jsonl"), max_eval_rows=2, format="text", loss_on="all"
    )
    assert texts(evaluation) == ["e0<|end|>", "e1<|end|>"]
    assert (report.train_rows, report.eval_rows) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "fraction", "where"),
    [(4, 0.1, "data.eval_fraction"), (2, 0.9, "data.train"), (1, 0.5, "data.eval_fraction")],
)
def test_a_split_that_leaves_no_rows_is_refused(prepared: Prepare, rows: int, fraction: float, where: str) -> None:
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", [{"text": "ab"}] * rows, format="text", loss_on="all", eval_fraction=fraction)
    assert len(error.value.faults) == 1
    assert faults_of(error)[0].startswith(f"{where}: must leave at least one row to ")


def test_progress_counts_the_rows_of_both_files(tmp_path: Path, tokenizer: Any) -> None:
    for name, count in (("train", BATCH_ROWS + 5), ("eval", 3)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "ab"}\n' * count)
    train, evaluation = (str(tmp_path / f"{name}.jsonl") for name in ("train", "eval"))
    told: list[int] = []
    spec = DataSpec(train=train, eval=evaluation, format="text", loss_on="all")
    data = tokenise(spec, tokenizer, 0, told.append)
    assert told == [BATCH_ROWS, BATCH_ROWS + 5, BATCH_ROWS + 8]
    assert len(data.train) == BATCH_ROWS + 5


def test_a_row_is_encoded_in_a_batch_as_alone(prepared: Prepare, tokenizer: Any) -> None:
    rows = [{"messages": [*CHAT[:3], *CHAT[1:3] * turns]} for turns in range(9)]
    train, evaluation, _ = prepared("rows.jsonl", rows, max_length=500)
    found = {
        tuple(part.row(n)[0].tolist()): part.row(n)[1].tolist()
        for part in (train, evaluation)
        for n in range(len(part))
    }
    alone = [encode(row, DataSpec(train="./x"), tokenizer) for row in rows]
    assert found == {tuple(row.ids.tolist()): row.labels.tolist() for row in alone}


def test_one_row_that_the_tokenizer_refuses_is_named_among_many(prepared: Prepare, tmp_path: Path) -> None:
    """Its template reads a field that no rule speaks of."""
    named = make_tokenizer()
    named.chat_template = "{% for message in messages %}{{ message['name'] }}{{ message['content'] }}{% endfor %}"
    rows = [{"messages": [{"role": "assistant", "content": "ab", "name": "x"}]} for _ in range(20)]
    rows[7]["messages"][0]["name"] = "\ud800"
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", rows, loss_on="all", other=named)
    (fault,) = error.value.faults
    assert fault.where == f"{tmp_path}/rows.jsonl: line 8"
    assert fault.rule.startswith("cannot be put through the tokenizer")


def test_rows_are_checked_even_where_the_tokenizer_will_not_do(prepared: Prepare) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", [{"messages": []}], other=plain)
    assert ["base.model" in faults_of(error)[0], "line 1" in faults_of(error)[1]] == [True, True]
    with pytest.raises(InputError, match=r"rows\.jsonl: line 1: messages"):
        check_rows(DataSpec(train=str(Path(error.value.faults[1].where.partition(":")[0]))))


def test_rows_that_are_all_dropped_leave_none(prepared: Prepare) -> None:
    rows = [{"prompt": "p" * 30, "completion": "c"}] * 5
    with pytest.raises(InputError) as error:
        prepared("rows.jsonl", rows, format="prompt_completion", max_length=8)
    (fault,) = error.value.faults
    assert (fault.where, fault.rule) == (
        "data.train",
        "must leave at least one row to train on (of its 5 rows none has a token to learn)",
    )


@pytest.mark.parametrize("text", ["\n \n\t\n", "text\n\n\n"], ids=["blank lines", "a header"])
def test_a_file_without_rows_is_told_once_with_a_tokenizer_or_without(
    prepared: Prepare, tmp_path: Path, text: str
) -> None:
    name = "rows.csv" if "text" in text else "rows.jsonl"
    with pytest.raises(InputError) as error:
        prepared(name, text, format="text", loss_on="all")
    assert faults_of(error) == [f"data.train: must leave at least one row to train on, got '{tmp_path}/{name}'"]
    with pytest.raises(InputError) as error:
        check_rows(DataSpec(train=str(tmp_path / name), format="text", loss_on="all"))
    assert faults_of(error) == [f"data.train: must hold at least one row, got '{tmp_path}/{name}'"]


# The mapped file and a trial's order


def test_rows_come_back_from_the_file_as_they_were_encoded(prepared: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    train, _, _ = prepared("rows.jsonl", PAIRS, format="prompt_completion")
    again = Tokens(train.path)
    spec = DataSpec(train="./x", format="prompt_completion")
    encoded = [encode(pair, spec, tokenizer) for pair in PAIRS]
    expected = {tuple(row.ids.tolist()): row.labels.tolist() for row in encoded}
    for index in range(len(again)):
        ids, labels = again.row(index)
        assert expected[tuple(ids.tolist())] == labels.tolist()
        assert again.length(index) == len(ids)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["eval.arrow", "train.arrow"]


def test_a_stream_gives_every_row_once_an_epoch_in_a_new_order(prepared: Prepare) -> None:
    train, _, _ = prepared("rows.jsonl", PAIRS, format="prompt_completion")
    stream = RowStream(train, seed=5)
    epochs = [stream.take(9) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(9))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert RowStream(train, seed=6).take(9) != epochs[0]


def test_a_stream_goes_on_from_any_position_however_it_was_taken(prepared: Prepare) -> None:
    train, _, _ = prepared("rows.jsonl", PAIRS, format="prompt_completion")
    whole = RowStream(train, seed=5).take(40)
    stream = RowStream(train, seed=5)
    assert [row for size in (1, 7, 2, 13, 17) for row in stream.take(size)] == whole
    resumed = RowStream(train, seed=5)
    resumed.position = 25
    assert resumed.take(15) == whole[25:]


def test_a_row_is_int32_and_cannot_be_written_to(prepared: Prepare) -> None:
    train, _, _ = prepared("rows.jsonl", PAIRS, format="prompt_completion")
    ids, labels = train.row(0)
    assert ids.dtype == labels.dtype == np.int32
    assert not ids.flags.writeable
