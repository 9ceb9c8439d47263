"""The demo's little world, and the instruction set that its adapters learn.

A customer of a small shop writes about one order. The base model (``make_base.py``) can be asked about one such message
at a time: which item, which city, how urgent... The adapters learn something that it was never shown, the **ticket**:

    user:       I am Maria from Lisbon. The bread from order 4821 came broken, send another
                one. I cannot wait, hurry. Ticket?
    assistant:  exchange/bakery/high

Run ``python configs/demo/make_data.py [--out DIR]`` (a second, always the same bytes) to write ``train.jsonl`` and
``eval.jsonl``, one ``{"messages": [...]}`` a line. What the held-out questions ask is never in the training rows: no
ticket of one file occurs in the other, nor does any order number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SEED = 2024
TRAIN_ROWS = 1600
EVAL_ROWS = 100
HELD_OUT_TICKETS = 24
"""Of 144: six wishes, eight departments, three urgencies."""
TICKET_QUESTION = "Ticket?"

DEPARTMENTS = {
    "bakery": ("bread", "cake", "bagel", "muffin", "pie"),
    "garden": ("shovel", "rake", "hose", "seeds", "fern"),
    "books": ("novel", "atlas", "diary", "comic", "poems"),
    "music": ("guitar", "drum", "violin", "flute", "piano"),
    "toys": ("puzzle", "robot", "doll", "kite", "yoyo"),
    "sport": ("racket", "ball", "skates", "bike", "helmet"),
    "kitchen": ("pan", "kettle", "spoon", "bowl", "knife"),
    "office": ("pen", "stapler", "desk", "lamp", "folder"),
}
ITEM_DEPARTMENT = {item: department for department, items in DEPARTMENTS.items() for item in items}
ITEMS = tuple(ITEM_DEPARTMENT)
# fmt: off
NAMES = (
    "Maria", "Tom", "Aisha", "Ken", "Lena", "Omar", "Ines", "Paul", "Rosa", "Igor",
    "Mei", "Carl", "Nora", "Hugo", "Sara", "Luis", "Ana", "Jack", "Zoe", "Amir",
)
CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Paris", "Rome", "Delhi", "Tokyo",
    "Berlin", "Madrid", "Quito", "Dublin", "Athens", "Vienna", "Prague", "Seoul",
)
# fmt: on

WISHES = {
    "refund": (
        "I want my money back for the {item} of order {number}.",
        "Please pay me back order {number}, the {item} is bad.",
        "The {item} from order {number} is poor, return my money.",
        "Order {number}: I send the {item} back and want to be paid.",
    ),
    "exchange": (
        "The {item} from order {number} came broken, send another one.",
        "Please swap the {item} of order {number} for a new one.",
        "I got the wrong {item} with order {number}, change it.",
        "Order {number}: the {item} has the wrong size, I need a bigger one.",
    ),
    "delivery": (
        "Where is the {item} of order {number}?",
        "Order {number} has not come yet, I wait for the {item}.",
        "The {item} from order {number} never arrived.",
        "When will you bring me order {number} with the {item}?",
    ),
    "cancel": (
        "Do not send the {item} of order {number}, I changed my mind.",
        "Please stop order {number}, I do not need the {item}.",
        "I no longer want the {item}, drop order {number}.",
        "Order {number} was a mistake, forget the {item}.",
    ),
    "praise": (
        "The {item} from order {number} is wonderful, thank you.",
        "I love the {item} of order {number}.",
        "Order {number} was perfect, what a fine {item}.",
        "Great work, the {item} of order {number} is just right.",
    ),
    "invoice": (
        "I need a bill for the {item} of order {number}.",
        "Please send the papers of order {number}, the {item}, for my taxes.",
        "The receipt for the {item} of order {number} is missing.",
        "Order {number}: what did the {item} cost? I need it in writing.",
    ),
}
URGENCIES = {
    "high": ("Answer me today!", "It must be done by tonight.", "I cannot wait, hurry.", "This is very urgent."),
    "normal": ("Answer me this week.", "A few days are fine.", "Let me know by Friday.", "Tell me soon."),
    "low": ("There is no hurry.", "Take your time.", "Answer whenever you like.", "Any time will do."),
}
INTRODUCTIONS = (
    "I am {name} from {city}.",
    "{name} here, in {city}.",
    "Hello, my name is {name} and I live in {city}.",
    "Greetings from {city}, {name} is writing.",
)


class Topic(NamedTuple):
    """What a message is about."""

    wish: str
    item: str
    urgency: str

    @property
    def department(self) -> str:
        """The department that sells the item; the text never says it."""
        return ITEM_DEPARTMENT[self.item]

    @property
    def ticket(self) -> str:
        """What an adapter learns to answer: ``wish/department/urgency``."""
        return f"{self.wish}/{self.department}/{self.urgency}"


@dataclass(frozen=True)
class Message:
    """One customer's message, and the facts that it was written from."""

    topic: Topic
    number: str
    """The order's number: four digits."""
    name: str
    city: str
    text: str


TOPICS = tuple(Topic(*parts) for parts in itertools.product(WISHES, ITEMS, URGENCIES))


def write_message(rng: random.Random, topic: Topic, number: str) -> Message:
    """A message about ``topic`` and order ``number``; name, city, wording and sentence order come from ``rng``."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    sentences = [
        rng.choice(WISHES[topic.wish]).format(item=topic.item, number=number),
        rng.choice(URGENCIES[topic.urgency]),
    ]
    rng.shuffle(sentences)
    sentences.insert(rng.choice((0, 0, 2)), rng.choice(INTRODUCTIONS).format(name=name, city=city))
    return Message(topic, number, name, city, " ".join(sentences))


def any_message(rng: random.Random) -> Message:
    """A message about anything: what the base is trained on."""
    return write_message(rng, rng.choice(TOPICS), f"{rng.randrange(1000, 10000)}")


def ticket_row(message: Message) -> dict[str, list[dict[str, str]]]:
    """One row of the instruction set, in the format ``messages``."""
    return {
        "messages": [
            {"role": "user", "content": f"{message.text} {TICKET_QUESTION}"},
            {"role": "assistant", "content": message.topic.ticket},
        ]
    }


def make_messages() -> tuple[list[Message], list[Message]]:
    """The messages of the training rows and of the held-out questions; they share no ticket and no order number."""
    rng = random.Random(SEED)  # noqa: S311
    tickets = sorted({topic.ticket for topic in TOPICS})
    held_out = set(rng.sample(tickets, HELD_OUT_TICKETS))
    topics = list(TOPICS)
    rng.shuffle(topics)
    seen = [topic for topic in topics if topic.ticket not in held_out]
    asked = [topic for topic in topics if topic.ticket in held_out][:EVAL_ROWS]
    numbers = rng.sample(range(1000, 10000), TRAIN_ROWS + EVAL_ROWS)
    train = [write_message(rng, seen[i % len(seen)], str(numbers[i])) for i in range(TRAIN_ROWS)]
    evaluation = [write_message(rng, topic, str(numbers[TRAIN_ROWS + i])) for i, topic in enumerate(asked)]
    rng.shuffle(train)
    return train, evaluation


def shared_content(train: Sequence[Message], evaluation: Sequence[Message]) -> list[str]:
    """What the two lists have in common and must not: tickets, order numbers. Empty if all is well."""
    faults: list[str] = []
    for label, key in (("ticket", lambda m: m.topic.ticket), ("number", lambda m: m.number)):
        shared = {key(message) for message in train} & {key(message) for message in evaluation}
        faults += [f"{label} {value} is in both files" for value in sorted(map(str, shared))]
    return faults


def render(messages: Sequence[Message]) -> str:
    """The JSONL text of the rows of ``messages``."""
    return "".join(json.dumps(ticket_row(message)) + "\n" for message in messages)


def main() -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``; refuses to write what is not disjoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: the script's own)")
    out: Path = parser.parse_args().out
    train, evaluation = make_messages()
    if faults := shared_content(train, evaluation):
        raise SystemExit("\n".join(faults))
    out.mkdir(parents=True, exist_ok=True)
    for name, messages in (("train.jsonl", train), ("eval.jsonl", evaluation)):
        (out / name).write_text(render(messages), encoding="utf-8", newline="\n")
        print(f"{out / name}: {len(messages)} rows")


if __name__ == "__main__":
    main()
