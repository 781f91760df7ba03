"""Both models' scores of the units of responses, and the units' losses: what an inspection draws as a heat map."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simct.inspection.report import Answer, Scored
from simct.models.checks import context_length
from simct.models.hidden import PackedSequences, forward_through, response_hidden_states
from simct.pairing.pair import Alignment, TokenizerPair
from simct.teachers.local import LocalTeacher, ServedRows
from simct.training.collector import Scorer
from simct.training.micro_batches import MicroBatch, split
from simct.training.objectives import Rows, unit_loss
from simct.training.samples import Samples
from simct_kernels import LMHead, linear_simct_loss, token_statistics


def unit_scores(student: Rows, teacher: Rows | ServedRows, units: Alignment, losses: Tensor) -> Scored:
    """`units`: of rows [N_s] and [N_t]; `losses`: [G], theirs."""
    sides = []
    for rows, tokens, start, length in (
        (student, units.student_tokens, units.student_start, units.student_length),
        (teacher, units.teacher_tokens, units.teacher_start, units.teacher_length),
    ):
        if isinstance(rows, ServedRows):
            logprob = rows.token_logprobs
        else:
            logprob = token_statistics(*rows, tokens.to(rows[0].device)).logprob
        total = torch.cat([torch.zeros(1, dtype=torch.float64), logprob.double().cpu().cumsum(0)])
        start, length = start.cpu(), length.cpu()
        sides.append(((total[start + length] - total[start]) / length).float())
    return Scored(*sides, losses.float().cpu())


@torch.no_grad()
def score_answer(
    student: PreTrainedModel,
    teacher: LocalTeacher,
    pair: TokenizerPair,
    answer: Answer,
    prompts: tuple[list[int], list[int]],
) -> Answer:
    """An answer with its units scored by both models, with the default options of the loss.

    `prompts`: what student and teacher read before it, at least one token each. ValueError for an answer that does not fit a
    model's context behind them.
    """
    sides = (("student", student, answer.student_ids), ("teacher", teacher.model, answer.teacher_ids))
    for (name, model, ids), prompt in zip(sides, prompts, strict=True):
        if len(prompt) + len(ids) - 1 > context_length(model):
            raise ValueError(
                f"{answer.title!r} has {len(ids):,} {name} tokens, behind a prompt of {len(prompt):,}: expected at most "
                f"{context_length(model):,} in the {name}'s context"
            )
    packed = PackedSequences.build([prompts[0]], [answer.student_ids]).to(student.device)
    ours = (response_hidden_states(student, packed), LMHead.from_model(student))
    theirs = (teacher.hidden_states([prompts[1]], [answer.teacher_ids]), teacher.head)
    units = pair.align(answer.student_ids, answer.teacher_ids)
    rows = (*ours, *theirs, units.to(student.device), pair.shared.to(student.device))
    _, losses = linear_simct_loss(*rows, return_unit_losses=True)
    return replace(answer, units=units, scored=unit_scores(ours, theirs, units, losses))


@torch.no_grad()
def score_samples(trainer, samples: Samples) -> list[Answer]:
    """Samples of a `SimCTTrainer` with their units under the run's own objective, in order, its student in evaluation mode.

    Every process must call it, also one without samples: sharded models are gathered in it.
    """
    args, answers = trainer.args, []
    one_by_one = [samples.pick([i]) for i in range(len(samples))]
    batches = [b for one in one_by_one for b in split(one, trainer.layout, None, trainer.default_teacher)]
    batches = trainer.as_many_everywhere([batches])[0]
    trainer._score(batches)
    student = trainer.accelerator.unwrap_model(trainer.model)
    for batch in batches:
        scorer = trainer.scorers[batch.teacher]

        def compute(batch: MicroBatch = batch, scorer: Scorer = scorer) -> Scored:
            ours, theirs = trainer.student_rows(student, batch.packed), batch.teacher_rows
            units = batch.alignment.to(args.device)
            _, losses = unit_loss(ours, theirs, units, batch.samples.response_lengths, scorer, args)
            return unit_scores(ours, theirs, units, losses)

        scored = forward_through(trainer.model_wrapped, student, compute)
        if not batch.samples:  # another process had more
            continue
        units = batch.alignment
        if args.teacher_mass_floor is not None:  # a masked unit has no loss at all
            kept = scored.loss != 0
            units, scored = units.select(kept), Scored(scored.student[kept], scored.teacher[kept], scored.loss[kept])
        (sample,) = batch.samples
        answers.append(Answer(sample.response.token_ids, sample.teacher_response, "", units=units, scored=scored))
    return answers
