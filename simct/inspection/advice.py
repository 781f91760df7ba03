"""What the figures of a pair mean for a run, in words. Every line names the figure that it stands on."""

from collections.abc import Sequence
from dataclasses import dataclass

from simct.console import printable, show_bytes
from simct.inspection.report import Answer, Inspection
from simct.pairing.coverage import in_words, most_digits
from simct.pairing.pair import TokenizerPair

MANY_LONGER = 0.15  # of the response tokens; the pairs of docs/choosing-an-objective.md have 0.23 and more
LENGTHS_DIFFER = 1.25  # tokens of one side to those of the other
FEW_SHARED = 0.25  # of the student's vocabulary
WORDS = "the time of the year and all that is in it for a day or two at the end"


@dataclass(frozen=True)
class Advice:
    """A heading, and what it rests on and what can be done, with `code` between back-quotes."""

    title: str
    text: str


def advise(
    inspection: Inspection, pair: TokenizerPair, student_tokenizer, teacher_tokenizer, answers: Sequence[Answer]
) -> list[Advice]:
    """Advice for this pair and these responses, what matters most first. Never empty."""
    found = [
        _same_vocabulary(inspection),
        *_dropped(inspection),
        _digits(pair),
        _spaces(pair),
        _longer(inspection),
        _string_rule(inspection, pair, answers),
        _few_shared(inspection),
        _special_tokens(pair, student_tokenizer, teacher_tokenizer),
        _lengths(inspection),
    ]
    return [advice for advice in found if advice is not None] or [
        Advice(
            "Nothing stands out",
            "Nearly all tokens are in single units, and nothing was dropped: the defaults will do.",
        )
    ]


def _same_vocabulary(inspection: Inspection) -> Advice | None:
    shared, sizes = inspection.coverage.shared, (inspection.student.size, inspection.teacher.size)
    if inspection.coverage.rules["simct"].single < 1 or shared < 0.99 * max(sizes):
        return None
    return Advice(
        "One vocabulary",
        f"All units are single and {shared:,} of {max(sizes):,} tokens are shared: the loss is ordinary distillation, for which "
        "TRL's `DistillationTrainer` is made.",
    )


_MENDS = {
    "text_differs": "Look at the teacher's normaliser: what it changes in the text cannot be compared.",
    "anchored_tail": "`--alignment bytes` supervises these tokens.",
    "no_teacher_tokens": "The teacher's tokenizer gave nothing for these responses: look at what they hold.",
    "no_teacher_end": "A shorter `--max_new_tokens`, or a teacher with a longer context, keeps the end of the turn.",
    "invalid_utf8": "Usual at the end of a response that was cut off; elsewhere the student does not write text.",
    "special_token": "`--special_tokens` maps those that both sides know; others in a response are best trained away first.",
    "after_end": "A student that goes on behind its end of turn has another end than the pair knows: `--special_tokens` names it.",
    "left_out": "These are the run's own options: `--units`, `--mask_longer`, `--teacher_mass_floor`.",
}


def _dropped(inspection: Inspection) -> list[Advice]:
    total = max(inspection.tokens(), 1)
    return [
        Advice(f"{count:,} of {total:,} response tokens without supervision: {in_words(reason)}", _MENDS[reason])
        for reason, count in inspection.dropped().items()
    ]


def _digits(pair: TokenizerPair) -> Advice | None:
    student, teacher = most_digits(pair)
    if student == teacher:
        return None
    what = f"The student's tokens hold up to {student} digit{'s' * (student != 1)} of a number, the teacher's up to {teacher}."
    if student < teacher:
        return Advice(
            "Digits are grouped differently: the student's are shorter",
            f"{what} The student's `1` stands for 1, 12 and 123, the teacher's token of the same byte does not: a student of "
            "sums may get worse, with SimCT and with `--units single`; `--objective escd` did not in the "
            "study (docs/choosing-an-objective.md).",
        )
    return Advice(
        "Digits are grouped differently: the student's are longer",
        f"{what} A group of digits is one longer unit, with one score a side for all of them. Compare "
        "`--units single` if the task is arithmetic.",
    )


def _spaces(pair: TokenizerPair) -> Advice | None:
    cuts = pair.cut(WORDS)
    behind = {}
    for side in ("student", "teacher"):
        pieces = [piece for cut in cuts for piece in getattr(cut, side) if piece and len(piece) > 1]
        behind[side] = sum(piece.endswith(b" ") for piece in pieces) > sum(piece.startswith(b" ") for piece in pieces)
    if behind["student"] == behind["teacher"]:
        return None
    return Advice(
        "Words carry their space on different sides",
        f"The student's tokens hold the space {'behind' if behind['student'] else 'before'} a word, the teacher's the one "
        f"{'behind' if behind['teacher'] else 'before'} it. `--objective bpm` and `escd` collapsed on such a pair in "
        "the study (docs/choosing-an-objective.md); `simct`, with `--units single` or without, did not.",
    )


def _longer(inspection: Inspection) -> Advice | None:
    share = inspection.tokens("longer") / max(inspection.tokens(), 1)
    if share < MANY_LONGER:
        return None
    single, longer = inspection.mean_loss("single"), inspection.mean_loss("longer")
    cost = ""
    if single and longer:
        cost = f" A longer unit costs {longer:.3g} nats on average, a single one {single:.3g}."
    return Advice(
        f"{share:.0%} of the response tokens are in longer units",
        f"That much is lost with `--units single`.{cost} The student's own first token competes with the continuation that "
        "holds it: `--candidates disjoint` is worth a run beside the default (docs/choosing-an-objective.md). Watch "
        "`tokens/longer` in the log: a student also gets closer by avoiding such text.",
    )


def _string_rule(inspection: Inspection, pair: TokenizerPair, answers: Sequence[Answer]) -> Advice | None:
    rules = inspection.coverage.rules
    if rules["simpleopd_public"].lost < rules["simpleopd"].lost + 0.1:
        return None
    stopped = []
    for answer in answers:
        matched = pair.match_strings(answer.student_ids, answer.teacher_ids)
        end = matched[-1][0] + 1 if matched else 0
        if end < len(answer.student_ids):
            stopped.append((end / len(answer.student_ids), end, answer))
    if not stopped:
        return None
    _, end, answer = min(stopped, key=lambda row: row[0])
    (piece,) = pair.student_pieces(answer.student_ids[end : end + 1])
    return Advice(
        f"Matching strings would lose {rules['simpleopd_public'].lost:.0%} of the response tokens",
        f"The rule of the public code stops for good at the first two tokens that do not begin alike: in {len(stopped):,} of "
        f"{len(answers):,} texts before the end, in {answer.title!r} after {end:,} of {len(answer.student_ids):,} tokens, at "
        f"`{show_bytes(piece)}`. The alignment by bytes, the default here, does not stop.",
    )


def _few_shared(inspection: Inspection) -> Advice | None:
    share = inspection.coverage.shared / inspection.student.size
    if share >= FEW_SHARED:
        return None
    return Advice(
        f"Only {share:.0%} of the student's tokens are shared",
        f"{inspection.coverage.shared:,} of {inspection.student.size:,}: where the teacher's mass lies on others, a unit teaches "
        "little. Watch `teacher_mass` in the log; `--teacher_mass_floor 0.5` masks such units.",
    )


def _special_tokens(pair: TokenizerPair, student_tokenizer, teacher_tokenizer) -> Advice | None:
    """Special tokens of one name in both vocabularies that are no pair."""
    shared = set(pair.shared.student_ids.tolist())
    vocabulary = teacher_tokenizer.get_vocab()
    fillings = {student_tokenizer.pad_token, student_tokenizer.unk_token, student_tokenizer.bos_token}
    names = {*student_tokenizer.all_special_tokens}
    names |= {t.content for t in student_tokenizer.added_tokens_decoder.values() if t.special}
    same = sorted(
        name
        for name in names - fillings
        if name in vocabulary and student_tokenizer.convert_tokens_to_ids(name) not in shared
    )
    if not same:
        return None
    shown = ", ".join(f"`{printable(name)}`" for name in same[:6]) + (
        f" and {len(same) - 6:,} more" if len(same) > 6 else ""
    )
    return Advice(
        f"{len(same):,} special token{'s' * (len(same) != 1)} of one name in both vocabularies, not mapped",
        f"{shown}: in a response such a token spells nothing, and its unit is dropped. `--special_tokens` as JSON, student's name "
        "to teacher's, maps those that the student writes.",
    )


def _lengths(inspection: Inspection) -> Advice | None:
    student, teacher = inspection.coverage.student_tokens, inspection.coverage.teacher_tokens
    if not teacher or 1 / LENGTHS_DIFFER < student / teacher < LENGTHS_DIFFER:
        return None
    return Advice(
        f"{teacher / student:.2f} teacher tokens to one of the student's",
        f"A response of 1,024 student tokens is about {1024 * teacher / student:,.0f} for the teacher: its context and its memory "
        "must hold them.",
    )
