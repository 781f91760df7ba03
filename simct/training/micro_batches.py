"""What goes through the models at once: samples of one teacher, within a budget of tokens.

A budget changes how the work is cut, never its result: the loss is a sum over samples, divided by the tokens of the whole step.
"""

from dataclasses import dataclass, replace

from accelerate.utils import gather_object

from simct.models.hidden import Layout, PackedSequences, first_fit
from simct.pairing.pair import Alignment
from simct.teachers.local import Rows, ServedRows
from simct.training.samples import Samples


@dataclass
class MicroBatch:
    """Samples of one teacher, the student's batch of them, and, once scored, what the loss compares it with."""

    samples: Samples
    packed: PackedSequences
    teacher: str
    alignment: Alignment | None = None
    teacher_rows: Rows | ServedRows | None = None  # [N_t]

    @classmethod
    def build(cls, samples: Samples, layout: Layout, teacher: str) -> "MicroBatch":
        return cls(samples, layout.build(samples.student_prompts, samples.student_responses), teacher)

    def halves(self, layout: Layout) -> "list[MicroBatch]":
        """The same samples in two, not yet scored. They are not fewer than two."""
        halves: tuple[list[int], list[int]] = ([], [])
        tokens = [0, 0]
        for i in sorted(range(len(self.samples)), key=lambda i: -self.samples[i].student_length):
            lighter = int(tokens[1] < tokens[0])
            halves[lighter].append(i)
            tokens[lighter] += self.samples[i].student_length
        return [MicroBatch.build(self.samples.pick(sorted(half)), layout, self.teacher) for half in halves]


def out_of_memory(part: MicroBatch, error: Exception, tried: str = "") -> RuntimeError:
    """`error`, and what to do about it. `tried`: what else there was no memory for."""
    most = part.packed.input_ids.numel()
    fewer = max(1, most // (4 if tried else 2))
    longest = max((sample.student_length for sample in part.samples), default=0)
    return RuntimeError(
        f"out of memory with {most} tokens in a forward pass{tried}: set max_tokens_per_batch to {fewer} or less "
        f"(longest sequence here: {longest}), gradient_checkpointing=True or offload_teacher=True ({error})"
    )


def split(samples: Samples, layout: Layout, budget: int | None, default_teacher: str) -> list[MicroBatch]:
    """Micro-batches of at most `budget` student tokens, filling included (more only for one long sample); None: one for each
    teacher. No samples give one empty micro-batch: every process must take part in every step."""
    found = []
    for teacher in dict.fromkeys(sample.teacher for sample in samples):
        own = samples.pick([i for i, sample in enumerate(samples) if sample.teacher == teacher])
        lengths, layout_of = [sample.student_length for sample in own], layout
        if budget is None:
            bins = [list(range(len(own)))]
        elif layout.one_row:
            bins = first_fit(lengths, budget)
        else:
            bins, layout_of = _cut(lengths, budget, layout)
        found += [MicroBatch.build(own.pick(members), layout_of, teacher) for members in bins]
    return found or [empty(layout, default_teacher)]


def fill_up(
    batches: list[list[MicroBatch]], layout: Layout, teachers: list[str] | None, default_teacher: str
) -> list[list[MicroBatch]]:
    """Each list with empty micro-batches at its end, so that it is as long in every process: with as many of each of `teachers`, or
    in all. Every process must call it, with as many lists."""

    def count(found: list[MicroBatch], name: str) -> int:
        return len(found) if teachers is None else sum(part.teacher == name for part in found)

    names = [default_teacher] if teachers is None else teachers
    own = [[count(found, name) for name in names] for found in batches]
    filled = []
    for found, here, everywhere in zip(batches, own, zip(*gather_object([own]), strict=True), strict=True):
        most = [max(counts) for counts in zip(*everywhere, strict=True)]
        more = [(name, n - had) for name, had, n in zip(names, here, most, strict=True)]
        filled.append(found + [empty(layout, name) for name, n in more for _ in range(n)])
    return filled


def _cut(lengths: list[int], budget: int, layout: Layout) -> tuple[list[list[int]], Layout]:
    """The bins, and the layout that they are within the budget with: rows are shared in all of them or in none."""
    if not layout.packed:
        return _in_rows(lengths, budget, share_rows=False), layout
    shared = _in_rows(lengths, budget, share_rows=True)
    if not layout.hidden_size:
        return shared, layout
    alone = _in_rows(lengths, budget, share_rows=False)

    def sizes(bins: list[list[int]], share: bool) -> list[tuple[int, int]]:
        widths = [max(lengths[i] for i in members) for members in bins]
        rows = [
            len(first_fit([lengths[i] for i in b], w)) if share else len(b) for b, w in zip(bins, widths, strict=True)
        ]
        return list(zip(rows, widths, strict=True))

    if layout.shares_rows(sizes(shared, True), sizes(alone, False)):
        return shared, replace(layout, hidden_size=0)
    return alone, replace(layout, packed=False)


def empty(layout: Layout, teacher: str) -> MicroBatch:
    """Nothing to learn from: one token through the student, a loss of zero."""
    return MicroBatch.build(Samples(), layout, teacher)


def _in_rows(lengths: list[int], budget: int, share_rows: bool) -> list[list[int]]:
    """Bins whose rows, as long as their longest sequence, hold at most `budget` tokens, filling included."""
    bins: list[list[int]] = []
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        longest, members, room, rest = lengths[left[0]], [], [], []
        most = max(1, budget // longest)
        for i in left:
            row = next((r for r, free in enumerate(room) if share_rows and lengths[i] <= free), None)
            if row is not None:
                room[row] -= lengths[i]
            elif len(room) < most:
                room.append(longest - lengths[i])
            else:
                rest.append(i)
                continue
            members.append(i)
        bins.append(members)
        left = rest
    return sorted(sorted(members) for members in bins)
