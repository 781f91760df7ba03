"""Problems in words and numbers, with a short chain of steps and an answer that can be checked.

Made here: the ready-made generators (reasoning-gym) give answers without steps, and bring eleven packages, one of them compiled.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = (
    "Mara Owen Ines Tariq Bea Kofi Lena Hugo Priya Sven Noor Elio Wanda Yusuf Greta Ravi Paloma Dmitri Chioma Anselm"
).split()
KINDS = {
    "food": "plums figs parsnips walnuts apricots quinces radishes turnips pomegranates tangerines artichokes hazelnuts "
    "cranberries doughnuts pretzels",
    "instruments": "violins trumpets harmonicas accordions tambourines xylophones cellos bassoons",
    "furniture": "lamps stoves chairs hammocks pillows blankets chandeliers tablecloths teapots kettles candles baskets buckets",
    "tools": "anchors lanterns marbles thimbles saddles ladders compasses microscopes telescopes barometers typewriters "
    "wheelbarrows screwdrivers snowshoes horseshoes parachutes",
}
KIND = {thing: kind for kind, things in KINDS.items() for thing in things.split()}
THINGS = tuple(KIND)


@dataclass(frozen=True)
class Problem:
    """`key`: what it asks, whatever the order or the wording: problems with one key are twins. `text`: the right response."""

    key: tuple
    prompt: str
    text: str
    answer: str


def number(draw: random.Random) -> int:
    """2 to 99, small ones more often: what is learned grows little by little, not all at once."""
    return 2 + int(98 * draw.random() ** 2)


def chain(draw: random.Random) -> Problem:
    """a + b - c, bare or in words."""
    a, b = number(draw), number(draw)
    total = a + b
    c = draw.randint(1, total - 1)
    key, left = ("chain", min(a, b), max(a, b), c), str(total - c)
    if draw.random() < 0.5:
        return Problem(key, f"{a}+{b}-{c}\n", f"{a}+{b}={total}\n{total}-{c}={left}\n#{left}", left)
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    prompt = f"{name} has {a} {thing}, buys {b} and sells {c}. How many are left?\n"
    return Problem(key, prompt, f"{a}+{b}={total} {thing}\n{total}-{c}={left} {thing}\n#{left}", left)


def days(draw: random.Random) -> Problem:
    first, n = draw.randrange(7), draw.randint(8, 500)
    rest = n % 7
    last = DAYS[(first + rest) % 7]
    prompt = f"Today is {DAYS[first]}. Which day comes {n} days later?\n"
    return Problem(("days", first, n), prompt, f"{n}={n - rest}+{rest}\n{DAYS[first]}+{rest}={last}\n#{last}", last)


def dearest(draw: random.Random) -> Problem:
    """Four things, sorted by their prices."""
    priced = list(zip(draw.sample(THINGS, 4), draw.sample(range(10, 100), 4), strict=True))
    prompt = ", ".join(f"{thing} {price}" for thing, price in priced) + ". By price: which is dearest?\n"
    priced.sort(key=lambda one: one[1])
    text = ", ".join(f"{thing} {price}" for thing, price in priced)
    return Problem(("dearest", *sorted(priced)), prompt, f"{text}\n#{priced[-1][0]}", priced[-1][0])


def alphabet(draw: random.Random) -> Problem:
    things = draw.sample(THINGS, 4)
    answer = ", ".join(sorted(things))
    return Problem(("alphabet", *sorted(things)), f"In alphabetical order: {', '.join(things)}\n", f"#{answer}", answer)


def kinds(draw: random.Random) -> Problem:
    things = draw.sample(THINGS, 5)
    kind = KIND[things[0]]
    draw.shuffle(things)
    answer = ", ".join(thing for thing in things if KIND[thing] == kind)
    return Problem(("kinds", kind, *sorted(things)), f"Only the {kind}: {', '.join(things)}\n", f"#{answer}", answer)


FAMILIES: tuple[Callable[[random.Random], Problem], ...] = (chain, days, dearest, alphabet, kinds)


@dataclass(frozen=True)
class Problems:
    """No two of these have a problem's twin in common. `documents` are learned from, `train` gives the prompts of the arms."""

    documents: list[Problem]
    train: list[Problem]
    held_out: list[Problem]


def make_problems(documents: int, train: int, held_out: int, seed: int = 0) -> Problems:
    """The same on every machine. Keys are drawn for `held_out` first, then for `train`: what is left is for the documents, whose
    problems may come twice."""
    draw = random.Random(seed)
    taken: set[tuple] = set()
    parts = []
    for size in (held_out, train):
        part: dict[tuple, Problem] = {}
        while len(part) < size:
            problem = FAMILIES[len(part) % len(FAMILIES)](draw)
            if problem.key not in taken:
                part.setdefault(problem.key, problem)
        taken |= part.keys()
        parts.append(list(part.values()))
    rest: list[Problem] = []
    while len(rest) < documents:
        problem = FAMILIES[len(rest) % len(FAMILIES)](draw)
        if problem.key not in taken:
            rest.append(problem)
    for part in (rest, *parts):
        draw.shuffle(part)
    return Problems(rest, parts[1], parts[0])


def answer_of(response: str) -> str | None:
    """What a response gives as its answer: the text after its last `#`; None if it has none."""
    _, mark, answer = response.rpartition("#")
    return answer.strip() if mark else None
