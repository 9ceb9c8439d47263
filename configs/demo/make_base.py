"""Trains the demo's base model from scratch: a Llama of 3 million parameters that reads a small shop's messages.

    python configs/demo/make_base.py [--out DIR] [--steps N]

It invents conversations (``make_data.py`` has the words), trains a byte-level BPE tokenizer and then the model on them,
prints how well each skill came out on messages that it has not seen, and writes a Hugging Face folder in bfloat16.
Everything is seeded: the same versions of torch and transformers on the same kind of processor give the same weights.

The base is asked about one message at a time, in one or several turns. The tickets of ``train.jsonl`` are nowhere in
its training text: they are what adapters are for.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from make_data import HERE, ITEM_DEPARTMENT, Message, any_message
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
THREADS = 1  # the sums' order, and so the last bits of the weights, depend on it
STEPS = 1500
BATCH = 16
PEAK_LR = 1e-3
WARMUP_STEPS = 100
PROMPT_WEIGHT = 0.1
"""Weight in the loss of what the customer writes (answers weigh 1): mostly chance, but it teaches the words."""
MAX_TURNS = 4
POOL_BATCHES = 16
VOCAB_SIZE = 1024

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, END_ID = 0, 1  # the trainer numbers the special tokens first, in their order
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM_PROMPTS = ("You work in a shop.", "You help the customers of a shop.", "You are a helpful assistant.")

console = Console()


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Skill(NamedTuple):
    """Something the base can be asked about a message: ways to ask, and the one right answer."""

    questions: tuple[str, ...]
    answer: Callable[[Message], str]


SKILLS = {
    "item": Skill(("Which item?", "What is it about?"), lambda m: m.topic.item),
    "city": Skill(("Which city?", "Where do they live?"), lambda m: m.city),
    "name": Skill(("Who writes?", "What is their name?"), lambda m: m.name),
    "department": Skill(("Which department?", "Who sells it?"), lambda m: m.topic.department),
    "wish": Skill(("What do they want?", "What is the wish?"), lambda m: m.topic.wish),
    "urgency": Skill(("How urgent?", "What is the urgency?"), lambda m: m.topic.urgency),
    "spell": Skill(("Spell the item.",), lambda m: " ".join(m.topic.item)),
    "twice": Skill(("Say the item twice.",), lambda m: f"{m.topic.item} {m.topic.item}"),
    "pair": Skill(("Name and city?",), lambda m: f"{m.name}/{m.city}"),
    "reply": Skill(("Write a reply.",), lambda m: f"Dear {m.name}, thank you, we will look at your {m.topic.item}."),
}


def conversation(rng: random.Random) -> list[Turn]:
    """One message and up to ``MAX_TURNS`` questions about it; now and then a system prompt, or a fact."""
    turns: list[Turn] = []
    if rng.random() < 0.1:
        turns.append(Turn("system", rng.choice(SYSTEM_PROMPTS)))
    if rng.random() < 0.05:
        item, department = rng.choice(tuple(ITEM_DEPARTMENT.items()))
        return [*turns, Turn("user", f"Which department sells the {item}?"), Turn("assistant", department)]
    message = any_message(rng)
    for skill in rng.sample(tuple(SKILLS.values()), rng.randint(1, MAX_TURNS)):
        question = rng.choice(skill.questions)
        first = not turns or turns[-1].role == "system"
        turns.append(Turn("user", f"{message.text} {question}" if first else question))
        turns.append(Turn("assistant", skill.answer(message)))
    return turns


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE that reads digits in pairs, so that numbers are easy to copy, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [turn.content for _ in range(5000) for turn in conversation(rng)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model() -> LlamaForCausalLM:
    """The untrained model; heads of 64 and widths in multiples of 64 suit vLLM on CPUs and NF4's blocks."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> tuple[list[int], list[float]]:
    """Token ids of a conversation as the chat template writes it, and each token's weight in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    for turn in turns:
        content: list[int] = tokenizer.backend_tokenizer.encode(f"<|{turn.role}|>{turn.content}{END}").ids
        ids += content
        # The role's own token is given, never predicted in use; the end of an answer is predicted.
        weight = 1.0 if turn.role == "assistant" else PROMPT_WEIGHT
        weights += [0.0] + [weight] * (len(content) - 1)
    return ids, weights


def pad(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of ``rows``, both ``[len(rows), longest]``, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    weights = torch.zeros(len(rows), longest)
    for row, (row_ids, row_weights) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
    return ids, weights


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """New conversations without end, in batches of like length: a third of the tokens would be padding otherwise."""
    while True:
        pool = [encode(tokenizer, conversation(rng)) for _ in range(BATCH * POOL_BATCHES)]
        pool.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(pool), BATCH))
        rng.shuffle(starts)
        for start in starts:
            yield pad(pool[start : start + BATCH])


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int) -> None:
    """AdamW with warm-up and a linear decay to zero; float32 weights, bfloat16 matrix products."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
    )
    warmup = min(WARMUP_STEPS, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    columns = (
        TextColumn("training"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss="-")
        for step, (ids, weights) in zip(range(steps), batches(tokenizer, rng), strict=False):
            # No attention mask: padding stands on the right, where a causal model's real tokens never look.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids).logits[:, :-1]
            losses = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=f"{loss.item():.3f}")
            if step % 100 == 99 and not console.is_terminal:
                console.print(f"step {step + 1}/{steps} loss {loss.item():.3f}")


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> list[str]:
    """The greedy answers to ``questions``, each asked alone through the chat template."""
    tokenizer.padding_side = "left"
    prompts = [[{"role": "user", "content": question}] for question in questions]
    inputs: Any = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = cast(Any, model).generate(**inputs, max_new_tokens=32, do_sample=False)
    tokenizer.padding_side = "right"
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def report_skills(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Print each skill's exact match on 100 messages that were not trained on."""
    model.eval()
    for name, skill in SKILLS.items():
        messages = [any_message(rng) for _ in range(100)]
        replies = answers(model, tokenizer, [f"{message.text} {rng.choice(skill.questions)}" for message in messages])
        right = sum(reply == skill.answer(message) for reply, message in zip(replies, messages, strict=True))
        console.print(f"{name:12} {right:3d} %   {replies[0]}")


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder to write (default: base/ beside me)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    options = parser.parse_args()
    out: Path = options.out
    steps: int = options.steps
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)  # noqa: S311
    started = time.perf_counter()
    tokenizer = train_tokenizer(rng)
    model = make_model()
    console.print(f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)}")
    train(model, tokenizer, rng, steps)
    cast(torch.nn.Module, model).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID)
    report_skills(model, tokenizer, rng)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    console.print(f"{out}: {size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
