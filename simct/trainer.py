"""`SimCTTrainer`: cross-tokenizer on-policy distillation on `transformers.Trainer`.

One optimiser step: the student samples a response to each prompt of the accumulated batch; the teacher's tokenizer spells the same
text; the two are aligned by bytes; both models run over their own tokens, up to their last hidden states; the fused loss compares
them and makes the gradient. Everything else (optimiser, schedule, checkpoints, logging, callbacks) is the Trainer's.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from simct.checks import (
    check_datasets,
    check_disk_space,
    check_head,
    check_records,
    check_vocabulary,
    check_writable,
    context_length,
)
from simct.config import SimCTConfig
from simct.hidden import PackedSequences, forward_through, response_hidden_states, under_autocast
from simct.loading import load_model, load_tokenizer
from simct.metrics import PhaseTimer, Ratios, peak_memory_gb, ratio_with_standard_error
from simct.pair import Alignment, TokenizerPair
from simct.prompts import prompt_of, render_prompt
from simct.rollout import Sampling, make_engine
from simct.samples import Samples, log_ratios
from simct.teacher import LocalTeacher
from simct_kernels import AlignedUnits, LMHead, candidate_mass, linear_simct_loss, token_statistics
from simct_kernels.backends import choose as choose_backend


class SimCTTrainer(Trainer):
    """Distils `teacher` into `model` on the student's own samples; the two may have different tokenizers.

    Args:
        model: the student, a path or hub name, or a causal language model.
        teacher: a path or hub name, a causal language model, or a `LocalTeacher`.
        args: `SimCTConfig`.
        train_dataset, eval_dataset: records with a `prompt` (string or messages) or `messages`; a list of dicts or a
            `datasets.Dataset`.
        processing_class, teacher_processing_class: the tokenizers; loaded from the models' own names if not given.
        peft_config: a PEFT configuration that the student is wrapped in.

    Raises:
        ValueError: before any long work, for a pair of tokenizers that cannot be paired, a model without a head or with a head that
            does not cover its tokenizer, an empty data set or one without prompts, an option out of range.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the response tokens of the whole accumulated batch

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher: str | PreTrainedModel | LocalTeacher,
        args: SimCTConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        peft_config=None,
        **kwargs,
    ) -> None:
        args = args if args is not None else SimCTConfig()
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: expected one process for each (torchrun, accelerate launch)"
            )
        check_datasets(train_dataset, eval_dataset)
        check_writable(args.output_dir)
        choose_backend(args.backend, args.device.type)
        set_seed(args.seed)  # before an adapter is initialised

        # Master weights in float32 unless the user says otherwise: at learning rates of 1e-6 bfloat16 weights would not move.
        options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
        model = load_model(model, "student", **options)
        processing_class = load_tokenizer(processing_class, model, "student", **options)
        if not isinstance(teacher, LocalTeacher):
            dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
            options = {"dtype": dtype, **(args.teacher_model_init_kwargs or {})}
            teacher = load_model(teacher, "teacher", **options)
            if teacher is model:
                raise ValueError("teacher is the student's own model object: it would be frozen, load it twice")
            teacher = LocalTeacher(teacher, load_tokenizer(teacher_processing_class, teacher, "teacher", **options))
        check_vocabulary(model, processing_class, "student")
        self.teacher = teacher
        self.pair = TokenizerPair(
            processing_class,
            teacher.tokenizer,
            args.special_tokens,
            alignment=args.alignment,
            student_generation_config=model.generation_config,
            teacher_generation_config=teacher.model.generation_config,
            student_vocabulary_size=model.get_output_embeddings().weight.shape[0],
            chat=args.prompt_format != "text",
        )
        if peft_config is not None:
            from peft import get_peft_model

            if peft_config.is_prompt_learning:
                raise ValueError(
                    f"peft_config is {type(peft_config).__name__}: expected an adapter in the layers, such as LoRA"
                )
            model = get_peft_model(model, peft_config)
        check_head(model, "student")
        check_disk_space(args, model)
        sides = {"student": (model, processing_class), "teacher": (teacher.model, teacher.tokenizer)}
        check_records("train_dataset", train_dataset, sides, args)
        for part in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            check_records("eval_dataset", part, sides, args)

        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # records stay records: prompts are rendered when they are sampled from
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # On early 5.x, which does not know `loss_is_scaled_for_ga`, this with our token count says the same.
        self.model_accepts_loss_kwargs = True
        self.teacher.model.to(self.args.device)
        self.shared = self.pair.shared.to(self.args.device)
        self.engine = make_engine(self.accelerator.unwrap_model(self.model), args.rollout_engine)
        self.sampling = args.sampling(self.pair.student_end_ids, pad_id=processing_class.pad_token_id or 0)
        self.ratios = Ratios()
        self.phase = PhaseTimer(self.args.device)
        self.add_callback(StartOfWindow(self))

    # ---- Rollouts: once per optimiser step, for all its micro-batches together ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], Tensor | None]:
        """Samples responses to the next `num_batches` batches of prompts. Returns the micro-batches and, over all
        processes, the number of response tokens that normalises their loss."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        records = list(itertools.chain.from_iterable(batches))
        # A function of the step alone, so that a resumed run draws what an uninterrupted one would have drawn.
        seed = self._seed(self.state.global_step + 1)
        samples = self._sample(records, self.sampling, seed)
        ends = itertools.accumulate(map(len, batches))
        micro_batches = [
            self._micro_batch(samples[end - len(batch) : end]) for batch, end in zip(batches, ends, strict=True)
        ]
        tokens = torch.tensor(sum(map(len, samples.student_responses)), device=device)
        return micro_batches, self.accelerator.reduce(tokens, "sum")

    def _seed(self, step: int) -> int:
        """One for each run's seed, step and process."""
        return (self.args.seed * 1_000_003 + step) * 8_191 + self.args.process_index

    def _sample(self, records: list[dict[str, Any]], sampling: Sampling, seed: int) -> Samples:
        prompts = [prompt_of(record) for record in records]
        student_prompts, teacher_prompts = (
            [render_prompt(prompt, tokenizer, self.args.prompt_format) for prompt in prompts]
            for tokenizer in (self.processing_class, self.teacher.tokenizer)
        )
        with self.phase("rollout"), self.accelerator.autocast():
            responses = self.engine.generate(student_prompts, sampling, seed=seed)
        with self.phase("align"):
            teacher_responses = self.pair.encode_teacher([response.token_ids for response in responses])
            limit = context_length(self.teacher.model)
            if limit < float("inf"):  # what does not fit the teacher's context is unsupervised, and counted so
                pairs = zip(teacher_prompts, teacher_responses, strict=True)
                teacher_responses = [response[: limit - len(prompt) + 1] for prompt, response in pairs]
        return Samples(student_prompts, teacher_prompts, responses, teacher_responses)

    def _micro_batch(self, samples: Samples) -> dict[str, Any]:
        with self.phase("align"):
            alignment = self.pair.align_batch(
                samples.student_responses, samples.teacher_responses, disjoint=self.args.candidates == "disjoint"
            )
            packed = PackedSequences.build(samples.student_prompts, samples.student_responses)
        # `input_ids` by that name: the Trainer counts tokens and floating-point operations with it.
        return {"input_ids": packed.input_ids, "packed": packed, "alignment": alignment, "samples": samples}

    # ---- The loss ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        with self.phase("student"):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        samples = inputs["samples"]
        with self.phase("teacher"):
            teacher_hidden = self.teacher.hidden_states(samples.teacher_prompts, samples.teacher_responses)
        student = self.accelerator.unwrap_model(model)
        loss = forward_through(model, student, lambda: self._student_loss(student, inputs, teacher_hidden))
        if num_items_in_batch is None:  # called outside the training loop
            num_items_in_batch = torch.tensor(len(inputs["alignment"].student_tokens))
        # Data parallelism averages gradients over the processes; the loss is a sum over the global batch divided by its tokens.
        loss = loss * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, None) if return_outputs else loss

    def _student_loss(self, student: nn.Module, inputs: dict[str, Any], teacher_hidden: Tensor) -> Tensor:
        device = self.args.device
        student_hidden, head = self._student_rows(student, inputs["packed"])
        alignment: Alignment = inputs["alignment"]
        if self.args.units == "single":
            alignment = alignment.single()
        units = alignment.to(device)
        with self.phase("loss"):
            loss, unit_losses = linear_simct_loss(
                student_hidden,
                head,
                teacher_hidden,
                self.teacher.head,
                units,
                self.shared,
                **self.args.loss_options(),
                return_unit_losses=True,
            )
        self._record_units(inputs["samples"], inputs["packed"], alignment, unit_losses.cpu())
        if self._logs_this_step():
            with self.phase("metrics"):
                self._record_statistics(inputs, units, student_hidden.detach(), head, teacher_hidden)
        return loss

    def _student_rows(self, student: nn.Module, packed: PackedSequences) -> tuple[Tensor, LMHead]:
        """The student's hidden rows and head, in the precision of the run (bf16 and fp16 are autocast, as in the Trainer)."""
        with self.accelerator.autocast():
            hidden = response_hidden_states(student, packed.to(self.args.device))
            head = LMHead.from_model(student)
            if torch.is_autocast_enabled(self.args.device.type):
                hidden, head = under_autocast(hidden, head, torch.get_autocast_dtype(self.args.device.type))
        return hidden, head

    # ---- Metrics ----

    def _logs_this_step(self) -> bool:
        """Whether the statistics over the whole vocabulary are worth their time: only what is about to be logged is measured
        (with logging_strategy="epoch" every step, since the last one is not known)."""
        if self.args.logging_strategy == "no":
            return False
        step = self.state.global_step + 1
        every = self.state.logging_steps
        return (
            self.args.logging_strategy != "steps" or step % every == 0 or (self.args.logging_first_step and step == 1)
        )

    def _record_units(self, samples: Samples, packed: PackedSequences, units: Alignment, unit_losses: Tensor) -> None:
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

        responses = samples.responses
        ended = sum(response.finish_reason == "stop" for response in responses)
        texts = [b"".join(p or b"" for p in self.pair.student_pieces(ids)) for ids in samples.student_responses]
        count("responses", len(responses))
        count("bytes", sum(map(len, texts)))
        add("response/length", tokens, per="responses")
        add("response/ended", ended, per="responses")
        add("response/cut_off", len(responses) - ended, per="responses")
        add("response/whitespace", sum(len(text) - len(b"".join(text.split())) for text in texts), per="bytes")

        add("tokens_per_second/rollout", tokens, per="seconds/rollout")
        teacher_tokens = sum(map(len, samples.teacher_prompts)) + len(units.teacher_tokens)
        add("tokens_per_second/teacher", teacher_tokens, per="seconds/teacher")
        add("tokens_per_second/student", packed.attention_mask.sum(), per="seconds/student+loss")

    @torch.no_grad()
    def _record_statistics(
        self, inputs: dict[str, Any], units: AlignedUnits, student_hidden: Tensor, head: LMHead, teacher_hidden: Tensor
    ) -> None:
        student = token_statistics(student_hidden, head, units.student_tokens)
        teacher = token_statistics(teacher_hidden, self.teacher.head, units.teacher_tokens)
        self.ratios.count("measured tokens", len(student.entropy))
        self.ratios.add("response/entropy", student.entropy.sum(), per="measured tokens")
        options = {"score": self.args.score, "candidates": self.args.candidates}
        mass = candidate_mass(teacher_hidden, self.teacher.head, units, self.shared, **options)
        self.ratios.count("measured units", len(mass))
        self.ratios.add("teacher_mass", mass.sum(), per="measured units")
        ratios, lengths = log_ratios(self.pair, inputs["samples"], student.logprob, teacher.logprob)
        self.ratios.count("measured bytes", sum(lengths))
        self.ratios.add("reverse_kl_per_byte", sum(ratios), per="measured bytes")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log; evaluation and the end of a run log other keys
            self._record_time()
            logs.update(self.ratios.flush(self.accelerator))
            logs["peak_memory_gb"] = peak_memory_gb(self.args.device)
        super().log(logs, start_time)

    def _record_time(self) -> None:
        """Seconds of each phase per optimiser step; tokens per second are those of one process."""
        seconds = self.phase.flush()
        elapsed = time.perf_counter() - self._window_start
        self.ratios.count("steps", self.state.global_step - self._window_step)
        for name, value in {**seconds, "other": elapsed - sum(seconds.values())}.items():
            self.ratios.count(f"seconds/{name}", value)
            self.ratios.add(f"seconds/{name}", value, per="steps")
        self.ratios.count("seconds/student+loss", seconds.get("student", 0.0) + seconds.get("loss", 0.0))
        self._start_window()

    def _start_window(self) -> None:
        self._window_step, self._window_start = self.state.global_step, time.perf_counter()
        self.phase.flush()

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The sequence reverse KL per byte on held-out prompts, with its standard error over the samples.

        One response to each prompt, drawn from the student's own distribution (temperature 1, no truncation: the estimate of
        KL(student || teacher) of whole texts is then unbiased) with the run's seed, so that two evaluations of one student agree.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        if dataset is None:
            raise ValueError("eval_dataset is None: expected records with a prompt or messages")
        check_datasets(None, dataset)
        if self.is_in_train:  # an evaluation between two logs is no part of their training time
            self._record_time()
        started = time.perf_counter()
        student = self.accelerator.unwrap_model(self.model)
        records = [dataset[i] for i in range(self.args.process_index, len(dataset), self.args.world_size)]
        samples = self._sample(records, replace(self.sampling, temperature=1.0, top_p=1.0), self._seed(0))
        training = student.training
        student.eval()
        rows = []  # one of each response: log ratio, bytes, tokens, whether it ended
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(records), size):
            part = samples[start : start + size]
            packed = PackedSequences.build(part.student_prompts, part.student_responses)
            student_tokens, teacher_tokens = (
                torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int64, device=self.args.device)
                for ids in (part.student_responses, part.teacher_responses)
            )
            ours = token_statistics(*self._student_rows(student, packed), student_tokens)
            hidden = self.teacher.hidden_states(part.teacher_prompts, part.teacher_responses)
            theirs = token_statistics(hidden, self.teacher.head, teacher_tokens)
            ratios, lengths = log_ratios(self.pair, part, ours.logprob, theirs.logprob)
            for ratio, length, response in zip(ratios, lengths, part.responses, strict=True):
                rows.append((ratio, length, len(response.token_ids), response.finish_reason == "stop"))
        student.train(training)
        rows = gather_object(rows) if self.accelerator.num_processes > 1 else rows

        scored = [row for row in rows if row[1]]
        value, error = ratio_with_standard_error([row[0] for row in scored], [row[1] for row in scored])
        metrics = {
            "reverse_kl_per_byte": value,
            "reverse_kl_per_byte_stderr": error,
            "response_length": sum(row[2] for row in rows) / len(rows),
            "response_ended": sum(row[3] for row in rows) / len(rows),
            "samples": len(scored),
            "samples_unscored": len(rows) - len(scored),
            "runtime": time.perf_counter() - started,
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self._start_window()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StartOfWindow(TrainerCallback):
    """Starts the first logging window where training starts: the step is known by then, also of a resumed run."""

    def __init__(self, trainer: SimCTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.ratios.flush()
        self.trainer._start_window()
