"""From records to samples: prompts rendered for both sides, responses sampled (or taken from the data), their texts in the
teacher's tokens."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from simct.data.records import reference_answer
from simct.data.renderer import Renderer, compare_thoughts
from simct.pairing.pair import TokenizerPair
from simct.rollouts.protocol import Response, RolloutEngine, Sampling, cut_at_stop_string
from simct.teachers.local import LocalTeacher
from simct.teachers.served import ServedTeacher
from simct.training.config import PREFIX_OBJECTIVES, SimCTConfig
from simct.training.metrics import PhaseTimer
from simct.training.placement import release_cache
from simct.training.samples import Sample, Samples
from simct_kernels import LMHead, PrefixTables, SharedVocabulary


@dataclass(frozen=True)
class Scorer:
    """One teacher, its tokenizer's pairing with the student's, and how its prompts are rendered."""

    teacher: LocalTeacher | ServedTeacher
    pair: TokenizerPair
    shared: SharedVocabulary  # on the device of the loss
    render: Renderer
    tables: PrefixTables | None = None  # there too, for the objectives that read them
    objective: str = "simct"  # of `SimCTConfig`, never "auto"

    @classmethod
    def build(
        cls,
        teacher: LocalTeacher | ServedTeacher,
        student: PreTrainedModel,
        student_render: Renderer,
        args: SimCTConfig,
    ) -> "Scorer":
        """ValueError for tokenizers that cannot be paired, or a template of the teacher that drops the prompt."""
        pair = TokenizerPair(
            student_render.tokenizer,
            teacher.tokenizer,
            args.special_tokens,
            alignment=args.alignment,
            student_generation_config=student.generation_config,
            teacher_generation_config=teacher.generation_config,
            student_vocabulary_size=student.get_output_embeddings().weight.shape[0],
            chat=args.prompt_format != "text",
            stop=args.stop,
        )
        render = teacher_renderer(teacher.tokenizer, student_render, args)
        render.check("teacher")
        compare_thoughts(student_render, render)
        tables = None
        objective = args.objective_for(pair, served=isinstance(teacher, ServedTeacher))
        if objective in PREFIX_OBJECTIVES:
            heads = (LMHead.from_model(student), LMHead.from_model(teacher.model))
            tables = pair.prefix_tables(*(head.weight.shape[0] for head in heads))
        return cls(teacher, pair, pair.shared, render, tables, objective)

    def to(self, device: torch.device) -> "Scorer":
        """What the loss reads of it there; the teacher is placed on its own."""
        tables = None if self.tables is None else self.tables.to(device)
        return replace(self, shared=self.shared.to(device), tables=tables)


def student_renderer(tokenizer: PreTrainedTokenizerBase, args: SimCTConfig) -> Renderer:
    """How the student's prompts are rendered."""
    return Renderer(tokenizer, args.prompt_format, args.chat_template_kwargs or {}).with_thinking()


def teacher_renderer(tokenizer: PreTrainedTokenizerBase, student: Renderer, args: SimCTConfig) -> Renderer:
    """How a teacher's are, beside this student's."""
    own = args.teacher_chat_template_kwargs
    options = (args.chat_template_kwargs or {}) if own is None else own
    render = Renderer(tokenizer, args.prompt_format, options, args.teacher_system_prompt, context=True)
    return render.with_thinking(like=student if own is None else None)


class Collector:
    """Makes samples of records. `engine` samples; everything about tokens and text happens here."""

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        render: Renderer,
        scorers: dict[str, Scorer],
        args: SimCTConfig,
        phase: PhaseTimer,
    ) -> None:
        self.engine, self.tokenizer, self.render = engine, tokenizer, render
        self.scorers, self.args, self.phase = scorers, args, phase
        self.pair = next(iter(scorers.values())).pair

    def teacher_of(self, record: dict[str, Any]) -> str:
        """The name of the teacher that a record is scored by: its `teacher` column, needed only if there are several."""
        name = record.get("teacher")
        if len(self.scorers) == 1 and (name is None or name not in self.scorers):
            return next(iter(self.scorers))
        if name not in self.scorers:
            raise ValueError(f"field 'teacher' is {name!r}: expected one of {', '.join(map(repr, self.scorers))}")
        return name

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Response]:
        """Responses to prompts given as student ids, cut at stop strings."""
        responses = self.engine.generate(prompts, sampling, seed=seed)
        release_cache(self.engine)
        if not sampling.stop_strings:
            return responses
        pieces = self.pair.student_pieces
        return [cut_at_stop_string(r, pieces(r.token_ids), sampling.stop_strings) for r in responses]

    def collect(
        self,
        records: list[dict[str, Any]],
        sampling: Sampling,
        seed: int,
        *,
        on_policy_fraction: float = 1.0,
        responses: list[Response] | None = None,
    ) -> Samples:
        """A sample of each record, in order. `responses`: those of an earlier call with the same arguments, not to be drawn again.

        With an `on_policy_fraction` below 1 the others are the records' own answers, where they have one, chosen by `seed`.
        """
        names = [self.teacher_of(record) for record in records]
        student_prompts = [self.render(record) for record in records]
        teacher_prompts = [self.scorers[name].render(record) for name, record in zip(names, records, strict=True)]
        answers = self._answers(records, on_policy_fraction, seed)
        if responses is None:
            with self.phase("rollout"):
                sampled = iter(
                    self.generate(
                        [p for p, answer in zip(student_prompts, answers, strict=True) if answer is None],
                        sampling,
                        seed,
                    )
                )
            responses = [
                next(sampled) if answer is None else self._encode(answer, sampling.max_new_tokens) for answer in answers
            ]
        with self.phase("align"):
            teacher_responses = self._teacher_responses(names, teacher_prompts, responses)
        columns = (student_prompts, teacher_prompts, responses, teacher_responses, names, answers, records)
        return Samples(
            Sample(prompt, teacher_prompt, response, theirs, name, answer is None, record)
            for prompt, teacher_prompt, response, theirs, name, answer, record in zip(*columns, strict=True)
        )

    def _answers(self, records: list[dict[str, Any]], fraction: float, seed: int) -> list[str | None]:
        """The data's answer where a response is taken from it, None where it is sampled."""
        if fraction >= 1:
            return [None] * len(records)
        draw = random.Random(seed)
        chosen = [draw.random() >= fraction for _ in records]
        return [reference_answer(r) if off else None for r, off in zip(records, chosen, strict=True)]

    def _encode(self, answer: str, budget: int) -> Response:
        """An answer as the student would have written it: text only, then the end of the turn."""
        # As text, also where it spells a special token's name.
        ids = self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) >= budget:
            return Response(list(ids[:budget]), "length")
        return Response([*ids, self.pair.student_end_ids[0]], "stop")

    def _teacher_responses(
        self, names: list[str], prompts: list[list[int]], responses: list[Response]
    ) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in responses]
        for name, scorer in self.scorers.items():
            members = [i for i, own in enumerate(names) if own == name]
            encoded = scorer.pair.encode_teacher([responses[i].token_ids for i in members]) if members else []
            limit = scorer.teacher.context_length
            for i, ids in zip(members, encoded, strict=True):
                # What does not fit the teacher's context is unsupervised, and counted so.
                found[i] = ids if limit == float("inf") else ids[: max(0, int(limit) - len(prompts[i]) + 1)]
        return found


def numbered_seed(seed: int, step: int, process: int) -> int:
    """One for each run's seed, step and process: a resumed run draws what an uninterrupted one would have drawn."""
    return (seed * 1_000_003 + step) * 8_191 + process


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
