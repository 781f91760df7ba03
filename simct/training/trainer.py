"""`SimCTTrainer`: cross-tokenizer on-policy distillation on `transformers.Trainer`.

One optimiser step: the student samples responses to the prompts of the accumulated batch; the teacher's tokenizer spells the same
texts; the teacher runs over them once, while the two token sequences are aligned by bytes; then the student runs over them in
micro-batches, and the fused loss compares both models' last hidden states and makes the gradient. Everything else (optimiser,
schedule, checkpoints, logging, callbacks) is the Trainer's.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from simct.data.sampler import RepeatedBatches
from simct.models.checks import check_vocabulary
from simct.models.hidden import (
    Layout,
    PackedSequences,
    forward_through,
    response_hidden_states,
    under_autocast,
)
from simct.models.loading import load_model, load_tokenizer, with_adapter
from simct.models.out_of_memory import is_out_of_memory, release_memory
from simct.pairing.pair import TokenizerPair
from simct.rollouts.engines import build_engine
from simct.rollouts.protocol import Response, Sampling
from simct.teachers.loading import Teacher, load_teachers
from simct.teachers.local import LocalTeacher
from simct.training import checks
from simct.training.callbacks import AroundSteps
from simct.training.checkpoints import Checkpoints
from simct.training.collector import Collector, Scorer, generator, numbered_seed, student_renderer
from simct.training.config import SimCTConfig
from simct.training.defaults import settle
from simct.training.evaluation import Evaluation
from simct.training.guards import Guards
from simct.training.micro_batches import MicroBatch, fill_up, out_of_memory, split
from simct.training.model_card import ModelCards
from simct.training.objectives import say_objective, supervised_units, unit_loss
from simct.training.placement import float32_masters, place_student, place_teachers, student_options
from simct.training.recorder import Recorder
from simct.training.samples import Samples
from simct_kernels import LMHead, token_statistics
from simct_kernels.backends import choose as choose_backend
from simct_kernels.host import to_device


class SimCTTrainer(Guards, Checkpoints, ModelCards, Evaluation, Trainer):
    """Distils `teacher` into `model` on the student's own samples; the two may have different tokenizers.

    Args:
        model: the student, a path or hub name, or a causal language model.
        teacher: a path or hub name, a causal language model, a `LocalTeacher` or a `ServedTeacher`; or several of them by name, of
            which a record's `teacher` column picks the one that scores it. With `args.teacher_url` a name is that of its tokenizer.
        args: `SimCTConfig`.
        train_dataset, eval_dataset: records with a `prompt` (string or messages) or `messages`; a list of dicts or a
            `datasets.Dataset`. To train on, a data set may be iterable (streamed): then `max_steps` says how long.
        processing_class, teacher_processing_class: the tokenizers; loaded from the models' own names if not given. With several
            teachers: by name.
        peft_config: a PEFT configuration that the student is wrapped in.

    Raises:
        ValueError: before any long work, for a pair of tokenizers that cannot be paired, a model without a head or with a head that
            does not cover its tokenizer, an empty data set or one without prompts, an option out of range.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the response tokens of the whole accumulated batch

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher: Teacher | dict[str, Teacher],
        args: SimCTConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | dict[str, PreTrainedTokenizerBase] | None = None,
        peft_config=None,
        **kwargs,
    ) -> None:
        args = args if args is not None else SimCTConfig()
        checks.check_run(args, train_dataset, eval_dataset)
        choose_backend(args.backend, args.device.type)
        set_seed(args.seed)  # before an adapter is initialised

        options = student_options(args, peft_config)
        model = load_model(model, "student", allow_missing_weights=args.allow_missing_weights, **options)
        processing_class = load_tokenizer(processing_class, model, "student", **options)
        check_vocabulary(model, processing_class, "student")
        teachers = load_teachers(teacher, teacher_processing_class, args, student=model)
        render = student_renderer(processing_class, args)
        render.check("student")
        scorers = {name: Scorer.build(found, model, render, args) for name, found in teachers.items()}
        say_objective(args, scorers)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
            if args.bf16 or args.fp16:
                float32_masters(model)
        checks.check_disk_space(args, model)
        self.skipped_records: dict[str, int] = {}
        train_dataset = self._usable("train_dataset", train_dataset, model, render, scorers, args)
        eval_dataset = self._usable("eval_dataset", eval_dataset, model, render, scorers, args)
        settle(args, model, scorers, render.longest if hasattr(train_dataset, "__len__") else 0)
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # records stay records: prompts are rendered when they are sampled from
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        student = place_student(self)
        self.layout = Layout.of(student, args.packing, self.accelerator.autocast, device=args.device)
        place_teachers(self, teachers)
        self.scorers = {name: scorer.to(args.device) for name, scorer in scorers.items()}
        self.default_teacher, first = next(iter(self.scorers.items()))
        self.teacher, self.pair, self.shared = first.teacher, first.pair, first.shared
        self.recorder = Recorder(args, self.accelerator)
        self.phase, self.ratios = self.recorder.phase, self.recorder.ratios
        self.sampling = args.sampling(self.pair.student_end_ids, pad_id=processing_class.pad_token_id or 0)
        # Every prompt has been rendered, unless they are streamed.
        known = hasattr(train_dataset, "__len__")
        options = {
            "max_model_len": render.longest + args.max_new_tokens if known else None,
            **args.engine_options(student),
        }
        self.engine = build_engine(
            args.rollout_engine, student, processing_class, sharded=self.is_fsdp_enabled, device=args.device, **options
        )
        self.collector = Collector(self.engine, processing_class, render, self.scorers, args, self.phase)
        self.student_prompt = render
        self._aligner = ThreadPoolExecutor(1, thread_name_prefix="simct-align")
        # The batch of rollouts in use: its records, its inputs, for how many steps it was used, and over all processes its
        # response tokens, units and responses.
        self._records, self._inputs, self._used = None, [], 0
        self._totals = torch.zeros(3, dtype=torch.int64)
        self._drawn = Samples()
        self._problem, self._grad_norm, self._in_forward = None, None, False
        self.first_evaluations: dict[str, dict[str, float]] = {}  # by prefix, what later ones are compared with
        self.evaluated: Samples | None = None  # this process's samples of the last evaluation, for callbacks
        self.add_callback(AroundSteps(self))

    def _usable(self, name: str, dataset, *run):
        if isinstance(dataset, dict):
            return {part: self._usable(f"{name} {part}", found, *run) for part, found in dataset.items()}
        dataset, skipped = checks.usable_records(name, dataset, *run)
        if skipped:
            self.skipped_records[name] = skipped
        return dataset

    # ---- Rollouts: once per optimiser step (or every `num_iterations`), for all its micro-batches together ----

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.num_iterations == 1:
            return sampler
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return RepeatedBatches(sampler, size, self.args.num_iterations)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], Tensor | None]:
        """Responses to the next `num_batches` batches of prompts, scored by their teachers. Returns the micro-batches and, over all
        processes, the number of response tokens that normalises their loss."""
        if (
            self.state.global_step >= self.state.max_steps
        ):  # resumed from its last checkpoint: the Trainer would make one more step
            self.control.should_training_stop = True
            return [], None
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        if batches != self._records or self._used == self.args.num_iterations:
            self._roll_out(batches)
        self._used += 1
        return list(self._inputs), self._totals[0]

    def _usable_of_stream(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Its records that fit both models, the others counted and the first of them told."""
        student = self.accelerator.unwrap_model(self.model)
        good, problems = checks.usable_of_stream(batch, student, self.student_prompt, self.scorers, self.args)
        before = self.skipped_records.get("train_dataset", 0)
        for problem in problems[: max(0, 3 - before)]:
            warnings.warn(f"{problem}; skipped", stacklevel=2)
        if problems:
            self.skipped_records["train_dataset"] = before + len(problems)
        self.ratios.count("streamed records", len(batch))
        self.ratios.add("skipped_records", len(problems), per="streamed records")
        return good

    def _roll_out(self, given: list[list[dict[str, Any]]]) -> None:
        for part in itertools.chain.from_iterable(inputs["parts"] for inputs in self._inputs):
            part.teacher_rows = None  # of the last batch: memory
        streamed = not hasattr(self.train_dataset, "__len__")
        batches = [self._usable_of_stream(batch) for batch in given] if streamed else given
        times = self.args.num_generations
        records = [record for batch in batches for record in batch for _ in range(times)]
        responses, used = self.resumed_responses(records)
        seed = numbered_seed(self.args.seed, self.state.global_step + 1 - used, self.args.process_index)
        if responses is None:
            self._update_engine()
        with self.accelerator.autocast():
            samples = self.collector.collect(
                records, self.sampling, seed, on_policy_fraction=self.args.on_policy_fraction, responses=responses
            )
        self._drawn = samples
        ends = itertools.accumulate(len(batch) * times for batch in batches)
        parts = [
            split(
                samples.pick(list(range(end - len(batch) * times, end))),
                self.layout,
                self.args.max_tokens_per_batch,
                self.default_teacher,
            )
            for batch, end in zip(batches, ends, strict=True)
        ]
        parts = self.as_many_everywhere(parts)
        every = list(itertools.chain.from_iterable(parts))
        self._score(every)
        for part in every:
            self.recorder.responses(part, self.scorers[part.teacher].pair)
        units = sum(len(part.alignment.student_start) for part in every)
        counts = [sum(map(len, samples.student_responses)), units, len(samples)]
        self._totals = self.accelerator.reduce(to_device(torch.tensor(counts), self.args.device), "sum")
        # `input_ids` by that name: the Trainer counts tokens and floating-point operations with it.
        self._inputs = [
            {"input_ids": torch.cat([part.packed.input_ids.flatten() for part in found])[None], "parts": found}
            for found in parts
        ]
        self._records, self._used = given, used

    def as_many_everywhere(self, batches: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """With several processes: each list filled up with empty micro-batches, so that every process goes through the student, and
        through each teacher that is sharded, as often (the collectives of sharded models are made there)."""
        if self.accelerator.num_processes == 1:
            return batches
        teachers = list(self.scorers) if self.has_sharded_teacher else None
        return fill_up(batches, self.layout, teachers, self.default_teacher)

    @property
    def has_sharded_teacher(self) -> bool:
        return any(scorer.teacher.sharded for scorer in self.scorers.values())

    def _update_engine(self) -> None:
        with self.phase("rollout"):
            self.engine.update_weights(self.accelerator.unwrap_model(self.model))

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Response]:
        """Responses of the student as it is now, to prompts in its token ids."""
        self._update_engine()
        with self.accelerator.autocast():
            return self.collector.generate(prompts, sampling, seed)

    def _score(self, parts: list[MicroBatch]) -> None:
        """The teachers' rows of each part, and its alignment, made while the teacher runs."""
        # One stream of random numbers through all parts, in order (one thread aligns): the draws
        # do not depend on how the work is cut into calls.
        seed = numbered_seed(self.args.seed, self.state.global_step + 1, self.args.process_index)
        draws = generator(seed)
        for name, scorer in self.scorers.items():
            own = [part for part in parts if part.teacher == name]
            if not own:
                continue
            # A GPU works on its own once it has been told all: a thread of Python beside would keep the host from telling it.
            behind = self.args.device.type != "cpu" and isinstance(scorer.teacher, LocalTeacher)
            with self.phase("teacher"), scorer.teacher.on_device():
                for part in own:
                    align = partial(self._align, part, scorer.pair, draws)
                    alignment = None if behind else self._aligner.submit(align)
                    part.teacher_rows = scorer.teacher.rows(
                        part.samples.teacher_prompts, part.samples.teacher_responses
                    )
                    with self.phase("align"):  # what takes longer than the teacher
                        part.alignment = align() if alignment is None else alignment.result()

    def _align(self, part: MicroBatch, pair: TokenizerPair, draws: torch.Generator):
        disjoint = self.args.candidates == "disjoint"
        samples = part.samples
        alignment = pair.align_batch(samples.student_responses, samples.teacher_responses, disjoint=disjoint)
        return supervised_units(alignment, self.args, samples.response_lengths, pair.student_end_ids, draws)

    # ---- The loss ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of one batch, a micro-batch at a time. Returns the batch's loss."""
        parts: list[MicroBatch] = inputs["parts"]
        total = torch.zeros((), device=self.args.device)
        with self.phase("student"):
            for i, part in enumerate(parts):
                total += self._part_step(model, part, num_items_in_batch, last=i == len(parts) - 1)
        return total

    def _part_step(self, model: nn.Module, part: MicroBatch, tokens: Tensor | None, last: bool) -> Tensor:
        # A sharded student adds up its shares of the gradients: not synchronised, each process would hold all of them whole.
        together = last or self.is_fsdp_enabled
        sharded = self.is_fsdp_enabled or self.has_sharded_teacher  # the other processes would wait for the second try
        try:
            with contextlib.nullcontext() if together else self.accelerator.no_sync(model):
                return super().training_step(model, {"part": part}, tokens)
        except Exception as error:
            # In the backward pass some gradients are already added up: it cannot be done again.
            if not is_out_of_memory(error):
                raise
            if not self._in_forward or sharded or len(part.samples) < 2:
                raise out_of_memory(part, error) from error
            message = str(error)
        # Outside of the handler: the error holds on to what was allocated.
        release_memory(self.args.device)
        most = part.packed.input_ids.numel()
        warnings.warn(f"out of memory with {most} tokens at once: once more in halves ({message})", stacklevel=2)
        halves = part.halves(self.layout)
        self._score(halves)
        try:
            total = torch.zeros((), device=self.args.device)
            for i, half in enumerate(halves):
                with contextlib.nullcontext() if last and i else self.accelerator.no_sync(model):
                    total += super().training_step(model, {"part": half}, tokens)
            return total
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(part, error, ", and with half of them") from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        part: MicroBatch = inputs["part"]
        student = self.accelerator.unwrap_model(model)
        in_step = num_items_in_batch is not None
        self._in_forward = True
        loss = forward_through(model, student, lambda: self._student_loss(student, part, in_step))
        self._in_forward = False
        if not in_step:  # called outside the training loop
            num_items_in_batch = torch.tensor(len(part.alignment.student_tokens))
        # Data parallelism averages gradients over the processes; the loss is a sum over the global batch divided by its tokens.
        loss = loss * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, None) if return_outputs else loss

    def _student_loss(self, student: nn.Module, part: MicroBatch, in_step: bool) -> Tensor:
        student_hidden, head = self.student_rows(student, part.packed)
        scorer, units = self.scorers[part.teacher], part.alignment.to(self.args.device)
        ours, theirs = (student_hidden, head), part.teacher_rows
        with self.phase("loss"):
            loss, unit_losses = unit_loss(ours, theirs, units, part.samples.response_lengths, scorer, self.args)
        # One copy, so that the device is waited for once.
        both = torch.cat([unit_losses, loss.detach().to(unit_losses.dtype)[None]]).cpu()
        unit_losses, finite = both[:-1], both[-1].isfinite()
        if not finite:
            return self._nonfinite(loss, part, unit_losses, in_step)
        self.recorder.units(part, part.alignment, unit_losses)
        if self.recorder.will_log(self.state) and part.samples:
            with self.phase("metrics"):
                detached = (student_hidden.detach(), head)
                self.recorder.distributions(part, units, scorer.pair, scorer.shared, detached, theirs)
        return loss

    def student_rows(self, student: nn.Module, packed: PackedSequences) -> tuple[Tensor, LMHead]:
        """The student's hidden rows and head, in the precision of the run (bf16 and fp16 are autocast, as in the Trainer)."""
        with self.accelerator.autocast():
            hidden = response_hidden_states(student, packed.to(self.args.device))
            head = LMHead.from_model(student)
            if torch.is_autocast_enabled(self.args.device.type):
                hidden, head = under_autocast(hidden, head, torch.get_autocast_dtype(self.args.device.type))
        return hidden, head

    @torch.no_grad()
    def student_logprobs(self, part: MicroBatch, tokens: Tensor) -> Tensor:
        """Log-probabilities [N] of response tokens under the student as it is now."""
        student = self.accelerator.unwrap_model(self.model)

        def compute() -> Tensor:
            return token_statistics(*self.student_rows(student, part.packed), tokens).logprob

        return forward_through(self.model_wrapped, student, compute)

    # ---- Metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation and the end of a run log other keys
            logs.update(self.recorder.flush(self.state.global_step))
        super().log(logs, start_time)
