"""The cases of the run on a GPU, each also at toy size for a rehearsal."""

from __future__ import annotations

from ..cases import GEMMA, QWEN, Case, Model

_TOY = Model("", 300, 16, softcap=30.0), Model("", 250, 24)


def headline(toy: bool) -> Case:
    """Gemma-2-2B <- Qwen2.5-7B, 8,192 rows of the student's."""
    if toy:
        return Case("headline", *_TOY, 150, 12, dtype="float32")
    return Case("headline", GEMMA, QWEN, 97_675, 8192)


def one_vocabulary(toy: bool) -> Case:
    if toy:
        return Case("one vocabulary", Model("", 300, 16), Model("", 300, 24), 300, 12, dtype="float32")
    model = Model("", 128_256, 4096)
    return Case("one vocabulary", model, model, 128_256, 8192)


def all_cases(toy: bool) -> list[Case]:
    first, one = headline(toy), one_vocabulary(toy)
    return [
        first,
        one,
        first.replace(name="logits", form="logits"),
        one.replace(name="logits, one vocabulary", form="logits"),
        first.replace(name="served", form="served"),
    ]
