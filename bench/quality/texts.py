"""What the study's models read: prose that every Python carries, and sums with a short chain of steps.

Both are written as a first line, which serves as the prompt, and what follows it. The line end between them is a token of its own
for every tokenizer of the study, so that no tokenizer is favoured where a response begins.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from simct.demo.make_models import paragraphs

WORDS = 6  # of a paragraph's first line
LARGEST = 19  # operand of a sum


@dataclass(frozen=True)
class Texts:
    """Documents to learn the language from, and prompts: records with `prompt`, and `answer` for a sum."""

    documents: list[str]
    train: list[dict]
    validation: list[dict]
    test: list[dict]


def make_texts(prompts: int = 1_024, held_out: int = 128) -> Texts:
    """The same on every machine with the same Python. Half of the prompts of each split are sums, and none is in two splits.

    Args:
        prompts: of the training split. held_out: of the validation and the test split, each.
    """
    draw = random.Random(0)
    prose = [found for text in paragraphs() if (found := _prose(text))]
    prose = list({prompt: (prompt, rest) for prompt, rest in prose}.values())
    draw.shuffle(prose)
    numbers = range(1, LARGEST + 1)
    chains = [make_sum(a, b, c) for a in numbers for b in numbers for c in range(1, a + b + 1)]
    draw.shuffle(chains)
    half, rest = held_out // 2, prompts // 2
    records = [
        [{"prompt": prompt} for prompt, _ in prose[: 2 * half + rest]],
        [{"prompt": prompt, "answer": answer(text)} for prompt, text in chains[: 2 * half + rest]],
    ]
    validation, test, train = (
        [record for pair in zip(*(part[a:b] for part in records), strict=True) for record in pair]
        for a, b in ((0, half), (half, 2 * half), (2 * half, 2 * half + rest))
    )
    # The language is learned from what is in no split.
    documents = [prompt + text for prompt, text in prose[2 * half + rest :] + chains[2 * half + rest :]]
    draw.shuffle(documents)
    return Texts(documents, train, validation, test)


def make_sum(a: int, b: int, c: int) -> tuple[str, str]:
    """A prompt and its right response: 17+5-8, in two steps."""
    return f"{a}+{b}-{c}\n", f"{a}+{b}={a + b}\n{a + b}-{c}={a + b - c}\n#{a + b - c}"


def answer(text: str) -> str | None:
    """What a response gives as its result, None if it gives none."""
    found = re.findall(r"#(-?\d+)", text)
    return found[-1] if found else None


def _prose(text: str) -> tuple[str, str] | None:
    words = re.findall(r"\s*\S+", " ".join(text.split()))
    if len(words) < 2 * WORDS:
        return None
    return "".join(words[:WORDS]).strip() + "\n", "".join(words[WORDS : 8 * WORDS]).strip()
