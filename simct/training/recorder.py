"""What a training run measures of itself: units, responses, both models' distributions, seconds by phase."""

import time
import warnings

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from simct.pairing.pair import Alignment, TokenizerPair
from simct.teachers.local import Rows, ServedRows
from simct.training.metrics import PhaseTimer, Ratios, peak_memory_gb
from simct.training.micro_batches import MicroBatch
from simct.training.samples import Samples, end_rows, log_ratios
from simct_kernels import (
    AlignedUnits,
    LMHead,
    SharedVocabulary,
    candidate_mass,
    token_statistics,
    topk_candidate_counts,
)
from simct_kernels.statistics import ids_probability

MEASURED_ROWS = 512  # of a micro-batch, by whole responses: at least one
FIRST_STEPS = 10  # logged one by one with `logging_first_step`


class Recorder:
    """Ratios and phases of one logging window. `flush` gathers them from all processes: every process must call it."""

    def __init__(self, args, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.ratios = Ratios()
        self.phase = PhaseTimer(args.device)
        self._step, self._since = 0, time.perf_counter()
        self._warned = False

    def will_log(self, state: TrainerState) -> bool:
        """Whether this step's statistics over the whole vocabulary are worth their time: only what is about to be logged is
        measured (with logging_strategy="epoch" every step, since the last one is not known)."""
        if self.args.logging_strategy != "steps":
            return self.args.logging_strategy != "no"
        step = state.global_step + 1
        return step % state.logging_steps == 0 or (self.args.logging_first_step and step <= FIRST_STEPS)

    # ---- Time ----

    def start_window(self, step: int) -> None:
        """Forgets the seconds since the last window: what happened in between is no part of a training step."""
        self.phase.flush()  # first: it waits for a GPU
        self._step, self._since = step, time.perf_counter()

    def close_window(self, step: int) -> None:
        """Seconds of each phase per optimiser step; tokens per second are those of one process."""
        seconds = self.phase.flush()
        elapsed = time.perf_counter() - self._since
        self.ratios.count("steps", step - self._step)
        for name, value in {**seconds, "other": elapsed - sum(seconds.values())}.items():
            self.ratios.count(f"seconds/{name}", value)
            self.ratios.add(f"seconds/{name}", value, per="steps")
        self.ratios.count("seconds/student+loss", seconds.get("student", 0.0) + seconds.get("loss", 0.0))
        self.start_window(step)

    def flush(self, step: int) -> dict[str, float]:
        self.close_window(step)
        logs = self.ratios.flush(self.accelerator)
        logs["peak_memory_gb"] = peak_memory_gb(self.args.device)
        return logs

    # ---- One micro-batch ----

    def responses(self, batch: MicroBatch, pair: TokenizerPair) -> None:
        """Counted once for each batch of rollouts."""
        add, count = self.ratios.add, self.ratios.count
        samples = batch.samples
        tokens = sum(map(len, samples.student_responses))
        ended = sum(response.finish_reason != "length" for response in samples.responses)
        texts = [b"".join(p or b"" for p in pair.student_pieces(ids)) for ids in samples.student_responses]
        count("responses", len(samples))
        count("bytes", sum(map(len, texts)))
        add("response/length", tokens, per="responses")
        add("response/ended", ended, per="responses")
        add("response/cut_off", len(samples) - ended, per="responses")
        add("response/off_policy", sum(not sample.on_policy for sample in samples), per="responses")
        add("response/whitespace", sum(len(text) - len(b"".join(text.split())) for text in texts), per="bytes")
        sampled = sum(len(sample.response.token_ids) for sample in samples if sample.on_policy)
        add("tokens_per_second/rollout", sampled, per="seconds/rollout")
        teacher_tokens = sum(map(len, samples.teacher_prompts)) + sum(map(len, samples.teacher_responses))
        add("tokens_per_second/teacher", teacher_tokens, per="seconds/teacher")

    def units(self, batch: MicroBatch, units: Alignment, unit_losses: Tensor) -> None:
        """Everything here is on the CPU: one copy from the device a micro-batch."""
        add, count = self.ratios.add, self.ratios.count
        reasons = dict(units.dropped)
        if self.args.teacher_mass_floor is not None:  # a masked unit has no loss at all
            masked = unit_losses == 0
            reasons["teacher_mass_floor"] = int(units.student_length[masked].sum())
            units, unit_losses = units.select(~masked), unit_losses[~masked]
        single = (units.student_length == 1) & (units.teacher_length == 1)
        tokens, in_single = len(units.student_tokens), int(single.sum())
        in_longer = int(units.student_length[~single].sum())
        count("single units", in_single)
        count("longer units", len(single) - in_single)
        add("loss/single", unit_losses[single].sum(), per="single units")
        add("loss/longer", unit_losses[~single].sum(), per="longer units")

        count("tokens", tokens)
        add("tokens/single", in_single, per="tokens")
        add("tokens/longer", in_longer, per="tokens")
        add("tokens/unsupervised", tokens - in_single - in_longer, per="tokens")
        if self.args.units == "single":
            reasons["longer_unit"] = tokens - in_single - sum(reasons.values())
        for reason, lost in reasons.items():
            add(f"unsupervised/{reason}", lost, per="tokens")
        add("tokens_per_second/student", batch.packed.tokens, per="seconds/student+loss")

    @torch.no_grad()
    def distributions(
        self,
        batch: MicroBatch,
        units: AlignedUnits,
        pair: TokenizerPair,
        shared: SharedVocabulary,
        student: tuple[Tensor, LMHead],
        teacher: Rows | ServedRows,
    ) -> None:
        """Statistics over both whole vocabularies, of a served teacher over what it said: of some whole responses of a micro-batch
        with more than `MEASURED_ROWS` rows, since they would cost more than the loss does."""
        samples = batch.samples
        chosen = evenly_chosen(samples.response_lengths, MEASURED_ROWS)
        served = isinstance(teacher, ServedRows)
        teacher_logprob = self._served(units, shared, teacher) if served else None
        if len(chosen) < len(samples):
            inside, ours_of, theirs_of = _rows_of(samples, chosen, batch.alignment.student_start)
            tokens = units.student_tokens[ours_of.to(units.student_tokens.device)]
            student = student[0][ours_of.to(student[0].device)], student[1]
            samples = samples.pick(chosen)
        else:
            inside, tokens, theirs_of = None, units.student_tokens, slice(None)
        ours = token_statistics(*student, tokens)
        weight = len(batch.samples) / max(1, len(samples))  # those measured stand for the others of their micro-batch
        self.ratios.count("measured tokens", weight * len(ours.entropy))
        self.ratios.add("response/entropy", weight * ours.entropy.sum(), per="measured tokens")
        if served:
            teacher_logprob = teacher_logprob[theirs_of]
            theirs = teacher.topk_ids[theirs_of], teacher.topk_logprobs[theirs_of]
            self._stop_mass(pair, samples, weight, (*student, ours.logsumexp), theirs)
        else:
            hidden, head = teacher
            hidden = hidden[theirs_of]
            found = token_statistics(hidden, head, units.teacher_tokens[theirs_of])
            teacher_logprob = found.logprob
            self._stop_mass(pair, samples, weight, (*student, ours.logsumexp), (hidden, head, found.logsumexp))
            options = {"score": self.args.score, "candidates": self.args.candidates}
            measured = units if inside is None else batch.alignment.select(inside).to(hidden.device)
            mass = candidate_mass(*teacher, measured, shared, **options)
            self.ratios.count("measured units", weight * len(mass))
            self.ratios.add("teacher_mass", weight * mass.sum(), per="measured units")
        ratios, lengths = log_ratios(pair, samples, ours.logprob, teacher_logprob)
        self.ratios.count("measured bytes", weight * sum(lengths))
        self.ratios.add("reverse_kl_per_byte", weight * sum(ratios), per="measured bytes")
        self._logprob_gap(samples, ours.logprob)

    def _stop_mass(self, pair: TokenizerPair, samples: Samples, weight: float, *sides: tuple) -> None:
        """The probability of the pair's `stop_ids` where a response ends: by both sides, whatever the loss compares.

        `sides`: student and teacher, each hidden states, head and log-sum-exps of the samples' rows; or a served teacher's k best
        ids and log-probabilities, of which it counts what came."""
        rows = end_rows(pair, samples)
        self.ratios.count("measured ends", weight * len(rows[0]))
        for name, side, at, ids in zip(("student", "teacher"), sides, rows, pair.stop_ids, strict=True):
            at, ids = at.to(side[0].device), torch.tensor(ids, device=side[0].device)
            if len(side) == 3:
                hidden, head, logsumexp = side
                mass = ids_probability(hidden[at], head, ids, logsumexp[at])
            else:
                topk_ids, logprobs = side
                mass = logprobs[at].exp().masked_fill(~torch.isin(topk_ids[at], ids), 0).sum(dim=1)
            self.ratios.add(f"stop_mass/{name}", weight * mass.sum(), per="measured ends")

    def _served(self, units: AlignedUnits, shared: SharedVocabulary, teacher: ServedRows) -> Tensor:
        """How much of the teacher came over the wire: the probability of its k best tokens, and the share of units that have fewer
        than two candidates among them, whose loss is 0 whatever the student does. Returns the tokens' log-probabilities, exact."""
        ids, logprobs = teacher.topk_ids, teacher.topk_logprobs
        counts = topk_candidate_counts(ids, logprobs, units, shared, candidates=self.args.candidates)
        self.ratios.count("served units", len(counts))
        self.ratios.add("served/units_without_choice", (counts < 2).sum(), per="served units")
        self.ratios.count("served rows", len(logprobs))
        self.ratios.add("served/topk_mass", logprobs.exp().sum(), per="served rows")
        return teacher.token_logprobs

    def _logprob_gap(self, samples: Samples, logprob: Tensor) -> None:
        """How far the engine's log-probabilities of its samples are from the trainer's own."""
        own = logprob.cpu().split(samples.response_lengths)
        total, tokens = 0.0, 0
        for sample, values in zip(samples, own, strict=True):
            if sample.on_policy and sample.response.logprobs is not None:
                total += float((values - torch.tensor(sample.response.logprobs)).abs().sum())
                tokens += len(values)
        if not tokens:
            return
        self.ratios.count("compared tokens", tokens)
        self.ratios.add("rollout/logprob_gap", total, per="compared tokens")
        if total / tokens > self.args.max_logprob_gap and not self._warned:
            self._warned = True
            warnings.warn(
                f"the rollout engine's log-probabilities of its samples are {total / tokens:.3g} from the student's own on "
                f"average (max_logprob_gap {self.args.max_logprob_gap}): stale weights, another precision or another model",
                stacklevel=2,
            )


def evenly_chosen(lengths: list[int], rows: int) -> list[int]:
    """Every so many-th response, so that all together have about so many rows, or the first alone has more."""
    step = max(1, -(-sum(lengths) // rows))
    return list(range(0, len(lengths), step))


def _rows_of(samples: Samples, chosen: list[int], starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which units are in the chosen responses (bool [G], by their first student rows `starts`), and the rows of these responses of
    the student and of the teacher."""
    wanted = torch.zeros(len(samples), dtype=torch.bool)
    wanted[chosen] = True
    sides = []
    for responses in (samples.student_responses, samples.teacher_responses):
        lengths = torch.tensor([len(ids) for ids in responses])
        sides.append(wanted.repeat_interleave(lengths))
    return sides[0][starts], *(side.nonzero().flatten() for side in sides)
