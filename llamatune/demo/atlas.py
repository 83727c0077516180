"""A small atlas of a land that does not exist, and questions about it, all drawn from one seed.

The demo's base model reads the atlas: passages that tell, in many words and orders, of a hundred towns. LoRA then
learns from questions about some of the towns how a question is answered. Nobody ever asks it about the others: what it
says of them is knowledge of the base that tuning has made accessible.
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
    """Something that every town has one of: its values, ways to tell it, and ways to ask for it."""

    values: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[str, ...]


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
"""The share of passages that are index cards. There a value follows a colon at once, as it will in an answer."""


def facts() -> dict[str, dict[str, str]]:
    """What is true of each town, by trait; the same in every release, or the shipped base would not know it."""
    random = Random("atlas")
    return {town: {name: random.choice(trait.values) for name, trait in TRAITS.items()} for town in TOWNS}


def held_out_towns() -> frozenset[str]:
    """The towns that no instruction row asks about."""
    return frozenset(Random("held out").sample(TOWNS, _HELD_OUT_TOWNS))


def passages(seed: int, count: int) -> Iterator[str]:
    """``count`` passages, each of two towns, phrased and ordered anew: prose, or index cards."""
    random, known = Random(f"passages {seed}"), facts()
    for _ in range(count):
        if random.random() < _CARDS:
            yield _card(random, known)
        else:
            yield "\n".join(_prose(random, town, known[town]) for town in random.sample(TOWNS, 2))


def _prose(random: Random, town: str, known: dict[str, str]) -> str:
    told = [random.choice(trait.told).format(town=town, value=known[name]) for name, trait in TRAITS.items()]
    random.shuffle(told)
    return " ".join(told)


def _card(random: Random, known: dict[str, dict[str, str]]) -> str:
    lines = []
    for town in random.sample(TOWNS, 2):
        names = random.sample(sorted(TRAITS), len(TRAITS))
        lines += [f"### {town}:", *(f"{name}:{known[town][name]}" for name in names), ""]
    return "\n".join(lines).rstrip()


def _questions(towns: list[str], seed: str) -> Iterator[dict[str, str]]:
    random, known = Random(seed), facts()
    asked = [
        {"instruction": question.format(town=town), "output": known[town][name]}
        for town in towns
        for name, trait in TRAITS.items()
        for question in trait.asked
    ]
    random.shuffle(asked)
    yield from asked


def instruction_rows() -> Iterator[dict[str, str]]:
    """Every question about every town that is not held out."""
    return _questions([town for town in TOWNS if town not in held_out_towns()], "instructions")


def held_out_rows() -> Iterator[dict[str, str]]:
    """Every question about the towns that are."""
    return _questions(sorted(held_out_towns()), "held out")
