"""`python docs/figures.py`: the figures of docs/method.md, from the demo's own models. Needs no network.

`python docs/figures.py GEMMA`: the strip at the head of the README, too, cut by the tokenizer in that folder (`python -m
bench.real_models` writes one) and by Qwen's, which a package of the tests brings.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import texts
from simct import TokenizerPair
from simct.demo import ASSETS

IMAGES = Path(__file__).parent / "images"
STRIP = "def unhappiness(values: list[float]) -> float:\n    return sum(values) / 1024  # naïve café"
TEXT = "It is unnecessarily slow: 1024 bytes."
SINGLE, LONGER = "#9ecae1", "#fdae6b"
STUDENT, TEACHER = "#3182bd", "#e6550d"


def main() -> None:
    tokenizers = {role: AutoTokenizer.from_pretrained(ASSETS / role) for role in ("student", "teacher")}
    pair = TokenizerPair(tokenizers["student"], tokenizers["teacher"])
    models = {role: AutoModelForCausalLM.from_pretrained(ASSETS / role).float().eval() for role in tokenizers}
    IMAGES.mkdir(exist_ok=True)
    draw_units(pair)
    draw_candidates(pair, models)
    if len(sys.argv) > 1:
        draw_strip(AutoTokenizer.from_pretrained(sys.argv[1]), texts.qwen())


def visible(piece: bytes | None) -> str:
    return "end" if piece is None else piece.decode("utf-8", "backslashreplace").replace(" ", "␣").replace("\n", "↵")


def draw_units(pair: TokenizerPair) -> None:
    """One box a token, as wide as its bytes; the colour says which unit it is in."""
    size = len(TEXT.encode())
    figure, axis = pyplot.subplots(figsize=(11, 1.9), layout="constrained")
    at = 0
    for cut in pair.cut(TEXT):
        colour = SINGLE if len(cut.student) == len(cut.teacher) == 1 else LONGER
        for height, pieces in ((1, cut.student), (0, cut.teacher)):
            left = at
            for piece in pieces:
                axis.add_patch(Rectangle((left, height + 0.08), len(piece), 0.84, fc=colour, ec="white", lw=1.5))
                axis.text(
                    left + len(piece) / 2,
                    height + 0.5,
                    visible(piece),
                    ha="center",
                    va="center",
                    size=9,
                    family="monospace",
                )
                left += len(piece)
        at = left
        axis.plot([at, at], [0, 2], color="black", lw=1.2)
    axis.plot([0, 0], [0, 2], color="black", lw=1.2)
    axis.set_xlim(0, size)
    axis.set_ylim(0, 2)
    axis.set_yticks([1.5, 0.5], ["student", "teacher"], size=11)
    axis.tick_params(length=0)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.set_xlabel("a black line: a boundary that both have; blue: single units, orange: longer ones")
    figure.savefig(IMAGES / "units.png", dpi=130)
    pyplot.close(figure)


def draw_strip(student, teacher) -> None:
    """Wide and low: the student's tokens above the teacher's, coloured as everywhere."""
    cuts = TokenizerPair(student, teacher).cut(STRIP)
    cuts = [cut for cut in cuts if None not in (*cut.student, *cut.teacher)]
    gap, at = 0.25, 0.0
    figure, axis = pyplot.subplots(figsize=(15, 0.85))
    for cut in cuts:
        single = len(cut.student) == len(cut.teacher) == 1
        sides = [[visible(piece) for piece in pieces] for pieces in (cut.student, cut.teacher)]
        width = max(sum(map(len, side)) + gap * (len(side) - 1) for side in sides)
        for height, side in ((1, sides[0]), (0, sides[1])):
            left, letters = at, sum(map(len, side))
            share = (width - gap * (len(side) - 1)) / letters
            for piece in side:
                size = len(piece) * share
                axis.add_patch(Rectangle((left, height + 0.06), size, 0.88, fc=SINGLE if single else LONGER, lw=0))
                axis.text(left + size / 2, height + 0.47, piece, ha="center", va="center", size=10, family="monospace")
                left += size + gap
        at += width + 2 * gap
    axis.set_xlim(0, at)
    axis.set_ylim(0, 2)
    axis.set_yticks([1.5, 0.5], ["Gemma", "Qwen"], size=11)
    axis.tick_params(length=0)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    figure.savefig(IMAGES / "strip.png", dpi=110, bbox_inches="tight", pad_inches=0.03)
    pyplot.close(figure)


@torch.no_grad()
def draw_candidates(pair: TokenizerPair, models: dict) -> None:
    """Both candidate softmaxes (Eq. 8) at the longest unit of the text: the likeliest shared tokens, and the continuation."""
    student = AutoTokenizer.from_pretrained(ASSETS / "student")(TEXT, add_special_tokens=False)["input_ids"]
    (teacher,) = pair.encode_teacher([student])
    units = pair.align(student, teacher)
    unit = int((units.student_length * (units.student_start > 0)).argmax())  # the first token has nothing before it
    found = {}
    for role, ids, shared in (
        ("student", student, pair.shared.student_ids),
        ("teacher", teacher, pair.shared.teacher_ids),
    ):
        start, length = (int(getattr(units, f"{role}_{part}")[unit]) for part in ("start", "length"))
        rows = (
            models[role](torch.tensor([ids[: start + length]])).logits[0].log_softmax(1)[start - 1 : start - 1 + length]
        )
        tokens = torch.tensor(ids[start : start + length])
        continuation = rows.gather(1, tokens[:, None]).mean()
        found[role] = torch.cat([rows[0, shared], continuation[None]]).softmax(0)
        pieces = getattr(pair, f"{role}_pieces")(tokens.tolist())
        found[f"{role} spelling"] = " + ".join(map(visible, pieces))
    best = (found["student"] + found["teacher"])[:-1].topk(8).indices.tolist()
    names = [visible(piece) for piece in pair.student_pieces(pair.shared.student_ids[best].tolist())]
    names.append(f"continuation\n{found['student spelling']}\n{found['teacher spelling']}")
    figure, axis = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    places = torch.arange(len(names))
    for shift, role, colour in ((-0.2, "student", STUDENT), (0.2, "teacher", TEACHER)):
        axis.barh(places + shift, found[role][[*best, -1]], height=0.38, color=colour, label=role)
    axis.set_yticks(places, names, family="monospace", size=9)
    axis.invert_yaxis()
    axis.set_xlabel(f"probability among the {len(pair.shared)} shared tokens and the continuation (Eq. 8)")
    before = b"".join(pair.student_pieces(student[: int(units.student_start[unit])])).decode()
    axis.set_title(f"after “{before}”", size=10)
    axis.legend()
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(IMAGES / "candidates.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
