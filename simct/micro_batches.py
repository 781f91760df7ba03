"""What goes through the models at once: samples of one teacher, within a budget of tokens.

A budget changes how the work is cut, never its result: the loss is a sum over samples, divided by the tokens of the whole step.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from simct.hidden import Layout, PackedSequences, first_fit
from simct.pair import Alignment
from simct.samples import Samples


@dataclass
class MicroBatch:
    """Samples of one teacher, the student's batch of them, and, once scored, what the loss compares it with."""

    samples: Samples
    packed: PackedSequences
    teacher: str
    alignment: Alignment | None = None
    teacher_hidden: Tensor | None = None  # [N_t, H_t]

    @classmethod
    def build(cls, samples: Samples, layout: Layout, teacher: str) -> "MicroBatch":
        return cls(samples, layout.build(samples.student_prompts, samples.student_responses), teacher)

    def halves(self, layout: Layout) -> "list[MicroBatch]":
        """The same samples in two, not yet scored. They are not fewer than two."""
        middle = len(self.samples) // 2
        every = range(len(self.samples))
        parts = (self.samples.pick(list(every[:middle])), self.samples.pick(list(every[middle:])))
        return [MicroBatch.build(part, layout, self.teacher) for part in parts]

    def without_scores(self) -> "MicroBatch":
        return replace(self, alignment=None, teacher_hidden=None)


def split(samples: Samples, layout: Layout, budget: int | None, default_teacher: str) -> list[MicroBatch]:
    """Micro-batches of at most `budget` student tokens, padding included where the layout pads (more only for one long sample);
    None: one for each teacher. No samples give one empty micro-batch: every process must take part in every step."""
    found = []
    for teacher in dict.fromkeys(sample.teacher for sample in samples):
        own = samples.pick([i for i, sample in enumerate(samples) if sample.teacher == teacher])
        lengths = [sample.student_length for sample in own]
        if budget is None:
            bins = [list(range(len(own)))]
        elif layout.packed:
            bins = first_fit(lengths, budget)
        else:
            bins = _padded(lengths, budget)
        found += [MicroBatch.build(own.pick(members), layout, teacher) for members in bins]
    return found or [empty(layout, default_teacher)]


def empty(layout: Layout, teacher: str) -> MicroBatch:
    """Nothing to learn from: one token through the student, a loss of zero."""
    return MicroBatch.build(Samples(), layout, teacher)


def _padded(lengths: list[int], budget: int) -> list[list[int]]:
    """Sequences of like length together, as many as fit the budget when padded to the longest."""
    bins: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if bins and longest * (len(bins[-1]) + 1) <= budget:
            bins[-1].append(i)
        else:
            bins.append([i])
            longest = lengths[i]
    return sorted(sorted(members) for members in bins)
