"""Both models' scores of the units of responses, and the units' losses: what an inspection draws as a heat map."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simct.checks import context_length
from simct.hidden import PackedSequences, forward_through, response_hidden_states
from simct.inspection import Answer, Scored
from simct.micro_batches import split
from simct.objectives import Rows, unit_loss
from simct.pair import Alignment, TokenizerPair
from simct.samples import Samples
from simct.teacher import LocalTeacher
from simct_kernels import LMHead, linear_simct_loss, token_statistics


def unit_scores(student: Rows, teacher: Rows, units: Alignment, losses: Tensor) -> Scored:
    """`units`: of rows [N_s] and [N_t]; `losses`: [G], theirs."""
    sides = []
    for (hidden, head), tokens, start, length in (
        (student, units.student_tokens, units.student_start, units.student_length),
        (teacher, units.teacher_tokens, units.teacher_start, units.teacher_length),
    ):
        logprob = token_statistics(hidden, head, tokens.to(hidden.device)).logprob
        total = torch.cat([torch.zeros(1, dtype=torch.float64), logprob.double().cpu().cumsum(0)])
        start, length = start.cpu(), length.cpu()
        sides.append(((total[start + length] - total[start]) / length).float())
    return Scored(*sides, losses.float().cpu())


@torch.no_grad()
def score_text(
    student: PreTrainedModel,
    teacher: LocalTeacher,
    pair: TokenizerPair,
    student_ids: list[int],
    teacher_ids: list[int],
    student_prompt: list[int],
    teacher_prompt: list[int],
) -> Scored:
    """The units of one response behind a prompt, scored by both models with the default options of the loss.

    The prompts hold at least one token. ValueError for a text that is longer than a model's context.
    """
    sides = (("student", student, student_prompt, student_ids), ("teacher", teacher.model, teacher_prompt, teacher_ids))
    for name, model, prompt, ids in sides:
        if len(prompt) + len(ids) - 1 > context_length(model):
            raise ValueError(
                f"the text has {len(ids):,} {name} tokens behind a prompt of {len(prompt):,}: expected at most "
                f"{context_length(model):,} for the {name}'s context"
            )
    device = student.device
    packed = PackedSequences.build([student_prompt], [student_ids]).to(device)
    ours = (response_hidden_states(student, packed), LMHead.from_model(student))
    theirs = (teacher.hidden_states([teacher_prompt], [teacher_ids]), teacher.head)
    units = pair.align(student_ids, teacher_ids)
    _, losses = linear_simct_loss(*ours, *theirs, units.to(device), pair.shared.to(device), return_unit_losses=True)
    return unit_scores(ours, theirs, units, losses)


@torch.no_grad()
def score_samples(trainer, samples: Samples) -> list[Answer]:
    """Samples of a `SimCTTrainer` with their units under the run's own objective, in order, its student in evaluation mode.

    Every process must call it, with as many samples or not: sharded models are gathered in it.
    """
    args, answers = trainer.args, []
    batches = [
        batch
        for i in range(len(samples))
        for batch in split(samples.pick([i]), trainer.layout, None, trainer.default_teacher)
    ]
    batches = trainer.as_many_everywhere([batches])[0]
    trainer._score(batches)
    student = trainer.accelerator.unwrap_model(trainer.model)
    for batch in batches:
        scorer, units = trainer.scorers[batch.teacher], batch.alignment
        theirs = (batch.teacher_hidden, scorer.teacher.head)
        lengths = batch.samples.response_lengths

        def compute(batch=batch, scorer=scorer, units=units, theirs=theirs, lengths=lengths) -> Scored:
            ours = trainer.student_rows(student, batch.packed)
            _, losses = unit_loss(ours, theirs, units.to(args.device), lengths, scorer, args)
            return unit_scores(ours, theirs, units, losses)

        scored = forward_through(trainer.model_wrapped, student, compute)
        if not batch.samples:  # another process had more
            continue
        if args.teacher_mass_floor is not None:  # a masked unit has no loss at all
            kept = scored.loss != 0
            units, scored = units.select(kept), Scored(scored.student[kept], scored.teacher[kept], scored.loss[kept])
        (sample,) = batch.samples
        answers.append(Answer(sample.response.token_ids, sample.teacher_response, "", units=units, scored=scored))
    return answers
