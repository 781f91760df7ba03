"""What the study's models read: prose that every Python carries, and sums with a short chain of steps.

Both are written as a first line, which serves as the prompt, and what follows it. The line end between them is a token of its own
for every tokenizer of the study, so that no tokenizer is favoured where a response begins.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from simct.demo.make_models import paragraphs

WORDS = 5  # of a paragraph's first line, and of what follows it
LARGEST = 19  # operand of a sum


@dataclass(frozen=True)
class Texts:
    """Documents to learn the language from, and prompts: records with `prompt`, and for a sum `answer` and the whole right
    response, `solution`. `validation` holds sums alone; in `test` they come first."""

    documents: list[str]
    train: list[dict]
    validation: list[dict]
    test: list[dict]


def make_texts(prompts: int = 1_024, validation: int = 256, sums: int = 500, prose: int = 250) -> Texts:
    """The same on every machine with the same Python. a+b-c and b+a-c are in the same split, and no prompt is in two.

    Args:
        prompts: of the training split, half of them sums. validation: sums of the validation split. sums, prose: of the test split.
    """
    draw = random.Random(0)
    passages = [found for text in paragraphs() if (found := _prose(text))]
    passages = list({prompt: (prompt, rest) for prompt, rest in passages}.values())
    draw.shuffle(passages)
    numbers = range(1, LARGEST + 1)
    twins = [(a, b, c) for a in numbers for b in range(a, LARGEST + 1) for c in range(1, a + b + 1)]
    draw.shuffle(twins)
    half = prompts // 2

    def held_out(size: int) -> list[dict]:
        """A sum of each of the next twins, in either order."""
        found = []
        for a, b, c in (twins.pop() for _ in range(size)):
            a, b = draw.choice(((a, b), (b, a)))
            prompt, solution = make_sum(a, b, c)
            found.append({"prompt": prompt, "answer": answer(solution), "solution": solution})
        return found

    known = [{"prompt": prompt} for prompt, _ in passages[: prose + half]]
    test = held_out(sums) + known[:prose]
    checked = held_out(validation)
    train = [record for both in zip(known[prose:], held_out(half), strict=True) for record in both]
    # The language is learned from what is in no split.
    chains = [make_sum(*operands, c) for a, b, c in twins for operands in dict.fromkeys(((a, b), (b, a)))]
    documents = [prompt + text for prompt, text in passages[prose + half :] + chains]
    draw.shuffle(documents)
    return Texts(documents, train, checked, test)


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
    return "".join(words[:WORDS]).strip() + "\n", "".join(words[WORDS : 2 * WORDS]).strip()
