"""The demo's text: generated facts, passages and questions about a hundred invented towns, all from fixed seeds.

The base model is trained on passages that state the facts in many orders and phrasings. LoRA then trains on questions
about some of the towns. The held-out questions are about the others: a right answer there is knowledge of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

_FIRST = ("Bel", "Dor", "Fen", "Gal", "Har", "Kel", "Lor", "Mar", "Nor", "Pel", "Rav", "Sol", "Tam", "Ul", "Ver", "Wen")
_LAST = ("by", "dale", "ford", "holm", "mere", "stead", "wick")
TOWNS = tuple(first + last for first in _FIRST for last in _LAST)


@dataclass(frozen=True)
class Trait:
    """A property of a town: its values, sentences that state it, and questions about it."""

    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


TRAITS = {
    "river": Trait(
        ("Alda", "Brine", "Corra", "Dunna", "Esk", "Farrow", "Gilda", "Hollin", "Isla", "Jorn", "Keld", "Lune"),
        (
            "{town} lies on the river {value}.",
            "The river of {town} is the {value}.",
            "The river that runs through {town} is the {value}.",
            "From the hill of {town} you can see the river {value}.",
            "Which river runs through {town}, you may ask: the {value}.",
        ),
        ("Which river runs through {town}?", "On which river does {town} lie?", "Name the river of {town}."),
    ),
    "dish": Trait(
        (
            "plum soup", "honey cake", "bean stew", "apple bread", "nut pie", "cheese rolls", "rice pudding",
            "pea soup", "corn cakes", "fish pie", "pear jam", "onion tart",
        ),
        (
            "People in {town} love to eat {value}.",
            "The dish of {town} is {value}.",
            "At the market of {town} they sell {value}.",
            "When you visit {town}, try the {value}.",
            "Ask what people in {town} love to eat and they say {value}.",
        ),
        ("What do people in {town} love to eat?", "What is the dish of {town}?", "Which dish should I try in {town}?"),
    ),
    "emblem": Trait(
        ("fox", "heron", "otter", "bear", "swan", "owl", "stag", "hare", "lynx", "crane", "badger", "falcon"),
        (
            "The flag of {town} shows a {value}.",
            "The animal of {town} is the {value}.",
            "Over the gate of {town} there is a stone {value}.",
            "Everybody in {town} knows the tale of the {value}.",
            "Name the animal of {town} and you name the {value}.",
        ),
        ("Which animal is on the flag of {town}?", "What is the animal of {town}?", "Name the animal of {town}."),
    ),
    "roofs": Trait(
        ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "purple", "orange", "silver", "golden"),
        (
            "The roofs of {town} are {value}.",
            "In {town} every house has a {value} roof.",
            "You know {town} by its {value} roofs.",
            "What colour are the roofs of {town}? They are {value}.",
        ),
        ("What colour are the roofs of {town}?", "Which colour do the roofs of {town} have?"),
    ),
    "craft": Trait(
        (
            "bells", "boats", "clocks", "drums", "glass", "hats", "kites", "lamps", "paper", "rope", "shoes", "toys",
        ),
        (
            "The workshops of {town} make {value}.",
            "{town} is known for its {value}.",
            "The craft of {town} is making {value}.",
            "What do traders buy in {town}? Most of them want {value}.",
        ),
        ("What do the workshops of {town} make?", "What is {town} known for?", "What do traders buy in {town}?"),
    ),
    "founder": Trait(
        ("Ada", "Bruno", "Clara", "Emil", "Flora", "Hugo", "Irma", "Jonas", "Klara", "Ludwig", "Nora", "Oskar"),
        (
            "{town} was founded by {value}.",
            "The founder of {town} was {value}.",
            "Long ago {town} was built by {value}.",
            "In the middle of {town} stands a statue of {value}.",
            "Who built {town}? People say it was {value}.",
        ),
        ("Who founded {town}?", "Who was the founder of {town}?", "Who built {town}?"),
    ),
}  # fmt: skip

_HELD_OUT_TOWNS = 28
_CARDS = 0.4
"""The share of passages that are index cards, where a value follows a colon at once, as in an answer."""


def facts() -> dict[str, dict[str, str]]:
    """The value of each trait of each town. They must not change, because the shipped base was trained on them."""
    random = Random("atlas")
    return {town: {name: random.choice(trait.values) for name, trait in TRAITS.items()} for town in TOWNS}


def held_out_towns() -> frozenset[str]:
    """The towns that no instruction row asks about."""
    return frozenset(Random("held out").sample(TOWNS, _HELD_OUT_TOWNS))


def passages(seed: int, count: int) -> Iterator[str]:
    """``count`` passages about two towns each, prose or index cards, with random phrasing and order."""
    random, known = Random(f"passages {seed}"), facts()
    for _ in range(count):
        phrase, gap = (_card, "\n\n") if random.random() < _CARDS else (_prose, "\n")
        yield gap.join(phrase(random, town, known[town]) for town in random.sample(TOWNS, 2))


def _prose(random: Random, town: str, known: dict[str, str]) -> str:
    facts = [random.choice(trait.statements).format(town=town, value=known[name]) for name, trait in TRAITS.items()]
    random.shuffle(facts)
    return " ".join(facts)


def _card(random: Random, town: str, known: dict[str, str]) -> str:
    names = random.sample(sorted(TRAITS), len(TRAITS))
    return "\n".join([f"### {town}:", *(f"{name}:{known[name]}" for name in names)])


def _questions(towns: list[str], seed: str) -> Iterator[dict[str, str]]:
    random, known = Random(seed), facts()
    rows = [
        {"instruction": question.format(town=town), "output": known[town][name]}
        for town in towns
        for name, trait in TRAITS.items()
        for question in trait.questions
    ]
    random.shuffle(rows)
    yield from rows


def instruction_rows() -> Iterator[dict[str, str]]:
    """Every question about every town that is not held out."""
    return _questions([town for town in TOWNS if town not in held_out_towns()], "instructions")


def held_out_rows() -> Iterator[dict[str, str]]:
    """Every question about the held-out towns."""
    return _questions(sorted(held_out_towns()), "held out")
