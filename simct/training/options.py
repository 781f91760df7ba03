"""The options of a run: what each is and when to change it. `simct train --help`, docs/options.md and `SimCTConfig` read it here.

Imports nothing that takes time: help does not wait for PyTorch. A help text has two lines: what the option is, when to change it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


def option(default: Any, what: str, when: str, **metadata: Any) -> Any:
    """A field of a dataclass of options. `metadata` goes to argparse as it is."""
    return field(default=default, metadata={"help": f"{what}\n{when}", **metadata})


def required(what: str, when: str) -> Any:
    return field(metadata={"help": f"{what}\n{when}"})


@dataclass
class SimCTOptions:
    """What `SimCTConfig` adds to `transformers.TrainingArguments`, or has another default for. Defaults of the method follow the
    paper (arXiv 2605.07711, Table 4)."""

    # The paper's optimisation (Table 4) where it differs from the TrainingArguments' defaults.
    learning_rate: float = option(
        1e-6,
        "Peak learning rate.",
        "First of all: 1e-6 suits models of billions of parameters, adapters and small models take 1e-4 and more. Lower it where "
        "the log shows blanks or collapse.",
    )
    lr_scheduler_type: str = option(
        "cosine", "Learning-rate schedule.", "`constant` for short trials that are compared."
    )
    warmup_steps: float = option(
        0.05, "Warm-up: a number of steps, or below 1 a share of the run.", "More where the first steps' loss jumps."
    )
    logging_steps: float = option(10, "Steps from one log to the next.", "1 for a run of few steps.")
    logging_first_step: bool = option(
        True, "Log the first ten steps, each: a new run should be seen.", "Off for a log of equal distances."
    )
    remove_unused_columns: bool = option(False, "Prompts are rendered by the trainer.", "Never.")
    logging_nan_inf_filter: bool = option(False, "Log a loss that is no number as it is.", "Never: it should be seen.")

    # Rollouts
    max_new_tokens: int = option(
        1024,
        "Longest response, in student tokens.",
        "When `ended` in the log is low: a student that is always cut off never learns to end. Lower it for time and memory.",
    )
    temperature: float = option(
        0.6,
        "Sampling temperature of the rollouts; 0 is greedy.",
        "1.0 for more variety on few prompts, as the demo has it.",
    )
    top_p: float = option(0.95, "Nucleus sampling of the rollouts.", "1.0 to sample from the student as it is.")
    stop_strings: list[str] | None = option(
        None, "Texts that end a response.", "For models without an end of turn of their own, such as base models."
    )
    num_generations: int = option(1, "Responses to each prompt.", "More where prompts are few.")
    num_iterations: int = option(
        1,
        "Optimiser steps that each batch of rollouts is used for.",
        "2 or more where sampling takes most of the time (timeline.png); the samples are then less the student's own.",
    )
    on_policy_fraction: float = option(
        1.0,
        "Share of responses sampled by the student; the others are answers from the data, where it has one.",
        "Lower it where the student is too weak to come upon good answers.",
    )
    rollout_engine: str = option(
        "auto",
        "Where samples come from: auto, continuous, static, vllm, vllm-server.",
        "`vllm` on a GPU with room for a second copy of the student, `vllm-server` with a GPU of its own; `static` where "
        "`rollout/logprob_gap` warns.",
    )
    rollout_dtype: str | None = option(
        None,
        "Sample from a copy of the student in this precision: float32, bfloat16, float16. Not given: bfloat16 where float32 "
        "weights are trained with --bf16 on a GPU, else no copy. (Of a student that FSDP shares out samples always come from a "
        "whole copy, else in its own precision.)",
        "`float32` to save the copy's memory, at half the speed.",
    )
    kv_cache_gb: float | None = option(
        None,
        "Memory for the rollouts' keys and values; by free memory if not given.",
        "Where the dry run says so, or where sampling leaves too little memory for the step.",
    )
    max_logprob_gap: float = option(
        0.2,
        "Warn if the engine's log-probabilities of its samples are this far from the trainer's own, on average. A vLLM that is, "
        "right after a change of weights, ends the run.",
        "Lower it to watch an engine closely.",
    )
    vllm_gpu_memory_utilization: float | None = option(
        None,
        "rollout_engine=vllm, in this process: its share of the GPU's memory; what the training leaves if not given.",
        "Lower it where training runs out of memory beside it.",
    )
    vllm_server_url: str | None = option(
        None, "rollout_engine=vllm-server: where it listens, http://host:port.", "With that engine, always."
    )
    vllm_sync_dir: str | None = option(
        None,
        "rollout_engine=vllm-server: a folder that trainer and server both see, for the weights.",
        "With that engine, always, unless weights go by NCCL; in memory (/dev/shm) on one machine.",
    )
    vllm_kwargs: dict | str | None = option(
        None,
        "More options of a vLLM engine, as JSON. vllm: max_model_len, sleep, tensor_parallel_size, max_num_seqs and those of "
        "vllm.LLM; vllm-server: max_model_len, concurrency, timeout, wait, sync_dtype ...",
        "For a student that wants several GPUs, or streamed prompts, whose longest is not known.",
    )

    # Prompts
    prompt_format: str = option(
        "auto",
        "How prompts are rendered, for each model on its own: auto (its chat template where it has one), chat, text.",
        "`text` for base models, and where a template refuses the prompts.",
    )
    chat_template_kwargs: dict | str | None = option(
        None,
        "Options of the student's chat template, as JSON: '{\"enable_thinking\": false}' (what the template does by itself if not "
        "given).",
        "For templates that can do several things.",
    )
    teacher_chat_template_kwargs: dict | str | None = option(
        None,
        "Options of the teacher's chat template, as JSON ('{}': none). If not given the student's, and enable_thinking as the "
        "student thinks.",
        "Where the two differ.",
    )
    teacher_system_prompt: str | None = option(
        None,
        "A system prompt that the teacher reads and the student does not.",
        "To teach the student what the teacher does only when told to.",
    )
    on_bad_row: str = option(
        "stop",
        "A record that cannot be used: stop the run, or skip the record and count it.",
        "`skip` for large data with some prompts that are too long.",
    )

    # Memory and speed
    bf16: bool | None = option(
        None,
        "Compute in bfloat16, weights stay in float32. Not given: on a GPU that has it.",
        "`false` for float32 on a GPU, at several times the time.",
        nargs="?",
        const=True,
    )
    max_tokens_per_batch: int | None = option(
        None,
        "Most student tokens of one forward pass. Not given: the whole per-device batch, or on a GPU as many as its memory has "
        "room for. Changes no result.",
        "First, when memory runs out: down to one prompt and its response.",
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Compute activations again in the backward pass, in place of keeping them. Not given: on a GPU where they would not fit.",
        "When memory runs out in the student's forward pass; costs a fifth of the time.",
        nargs="?",
        const=True,
    )
    packing: str = option(
        "auto",
        "Packed forward passes without padding: auto (where the model allows it), on, off.",
        "`off` to rule it out as a cause.",
    )
    offload_teacher: bool = option(
        False,
        "Keep the teacher in main memory except while it scores.",
        "When teacher and student do not fit together.",
    )
    shard_teacher: bool | None = option(
        None,
        "Share the teacher's weights out among the processes, in place of a copy in each. Not given: under --fsdp only.",
        "`true` for a teacher that fits no device beside a student that does; `false` under --fsdp where a copy fits, for speed.",
        nargs="?",
        const=True,
    )
    on_nonfinite: str = option(
        "stop",
        "A loss or gradient that is no number, or a step without a unit to learn from: stop the run, or skip the step. Either is "
        "written down.",
        "`skip` for long runs in half precision, with an eye on `skipped_steps`.",
    )
    allow_changed_run: bool = option(
        False,
        "Resume though data, held-out prompts, seed, batch size or num_generations are not the checkpoint's: a warning, not an "
        "error; rollouts in use are drawn anew.",
        "To go on with other data on purpose.",
    )

    # Objective
    beta: float = option(
        1.0,
        "Divergence: 1 reverse KL, 0 forward KL, between them the generalised JSD.",
        "Lower it where the student keeps to few of the teacher's answers.",
    )
    loss_temperature: float = option(1.0, "Temperature of the candidate softmax (Eq. 8).", "For ablations.")
    score: str = option(
        "mean_logprob",
        "Score of a continuation: mean_logprob (Eq. 7), sum_logprob or mean_logit.",
        "`mean_logit` to compute what the authors' public code does.",
    )
    candidates: str = option(
        "paper",
        "Candidates of a unit: paper, or disjoint (no shared token overlaps the continuation).",
        "`disjoint` where many units are longer ones (`simct inspect` says so).",
    )
    stop: str = option(
        "pair",
        "The end of the turn as a candidate: pair, the two mapped ids; class, the sum of all ids that end a turn on each side.",
        "`class` where a model ends its turns with several ids, and `response/ended` falls.",
    )
    top_k: int | None = option(
        None,
        "Keep only the student's own k most probable shared tokens of each unit.",
        "16 where the loss takes too much memory or time.",
    )
    teacher_mass_floor: float | None = option(
        None,
        "Mask units on whose candidates the teacher puts less than this mass.",
        "0.5 where few tokens are shared and `teacher_mass` in the log is low.",
    )
    alignment: str = option(
        "bytes",
        "bytes: the finest units; anchored: the rule of the authors' public code.",
        "`anchored` to compare with that code.",
    )
    objective: str = option(
        "simct",
        "simct: the paper's; on byte prefixes: bpm, escd (forward KL); baselines on the same alignment: uld, alm; auto: escd where "
        "the student writes digits one by one and the teacher in groups, else simct, as with a served teacher and where an option "
        "of SimCT's own is set.",
        "`auto` or `escd` where the student writes digits one by one and the teacher in groups.",
    )
    units: str = option(
        "all",
        "all: SimCT; single: one-to-one tokens only (SimpleOPD on the alignment by bytes); merged: neighbours merged at random.",
        "`single` as the baseline, or where longer units teach the wrong thing (arithmetic).",
    )
    merge_ratio: float = option(
        0.3, "units=merged: the share of units that is merged with the next one.", "With `units=merged`."
    )
    mask_longer: float = option(
        0.0, "Share of the longer units that is left out, at random.", "For the paper's ablation of lost supervision."
    )
    special_tokens: dict | str | None = option(
        "auto",
        "Student to teacher special tokens, as JSON; auto maps the end of turn.",
        "For a model without an end of turn, and for tool or thinking marks that both sides know.",
    )
    backend: str = option(
        "auto", "Backend of the loss: auto, triton, torch or reference.", "`torch` to rule out a kernel as a cause."
    )
    chunk_rows: int | None = option(
        None,
        "Rows of logits that the loss holds at a time; chosen by device if not given.",
        "When memory runs out in the loss.",
    )

    # A teacher behind a server
    teacher_url: dict | str | None = option(
        None,
        "The teacher is served there, http://host:port (vLLM or SGLang), and `teacher` names its tokenizer; of several teachers, "
        "addresses by name, as JSON.",
        "For a teacher too large for this machine.",
    )
    teacher_top_k: int = option(
        64,
        "A served teacher's log-probabilities of each row; at most its server's limit.",
        "More where `teacher_mass` in the log is below 0.9.",
    )
    teacher_server_kwargs: dict | str | None = option(
        None,
        "More options of ServedTeacher, as JSON: timeout, patience, wait, concurrency, readers, vocab_size, model_name ...",
        "For slow servers, or servers of several models.",
    )

    # Evaluation
    eval_num_generations: int = option(
        1,
        "Graded answers to each held-out prompt with an `answer`.",
        "More for smaller standard errors on few prompts.",
    )
    eval_temperature: float = option(
        0.0, "Sampling temperature of graded answers; 0 is greedy.", "Above 0 with several answers a prompt."
    )
    inspect_samples: int = option(
        0,
        "Responses of each evaluation that are drawn with both models' scores, as inspect-STEP.html.",
        "8, to see what the student is taught where.",
    )

    # Models given as paths
    model_init_kwargs: dict | str | None = option(
        None,
        "Keyword arguments of from_pretrained for the student, as JSON.",
        "For `revision`, `attn_implementation`, quantisation.",
    )
    teacher_model_init_kwargs: dict | str | None = option(
        None, "Keyword arguments of from_pretrained for the teacher, as JSON.", "As the student's; 8 bits save memory."
    )
    allow_missing_weights: bool = option(
        False,
        "Train though a model's files lack some of its weights, which are then random: a warning, not an error.",
        "For models that add a part on purpose.",
    )


class Inherited(NamedTuple):
    """An option of the Trainer's own that belongs to a subject here: its default, what it is and when to change it."""

    default: Any
    what: str
    when: str


INHERITED = {
    "max_steps": Inherited(
        -1, "Optimiser steps; passes over the data (num_train_epochs) if -1.", "For streamed data, always; for a trial."
    ),
    "num_train_epochs": Inherited(3.0, "Passes over the prompts.", "The paper makes 2."),
    "per_device_train_batch_size": Inherited(
        8,
        "Prompts of a step and device, all sampled at once.",
        "With gradient_accumulation_steps, to 64 prompts a step as in the paper.",
    ),
    "gradient_accumulation_steps": Inherited(
        1, "Batches of an optimiser step.", "Its product with the batch size is what matters."
    ),
    "optim": Inherited("adamw_torch_fused", "Optimiser.", "`adamw_bnb_8bit` when its states do not fit."),
    "weight_decay": Inherited(0.0, "Weight decay.", "Seldom."),
    "max_grad_norm": Inherited(1.0, "Gradients are scaled to this norm at most.", "Lower it for runs that jump."),
    "seed": Inherited(42, "Of everything that is drawn.", "For another run of the same options."),
    "full_determinism": Inherited(False, "The same bits on a GPU, slowly.", "To find out why two runs differ."),
    "fp16": Inherited(False, "Compute in float16.", "On GPUs without bfloat16."),
    "use_cpu": Inherited(False, "Train on the CPU.", "Without a GPU, or to try options."),
    "fsdp": Inherited(None, "Shard the student over several GPUs.", "When it does not fit on one."),
    "torch_compile": Inherited(
        False, "Compile the models.", "For long runs on a GPU; the losses compile as one operation."
    ),
    "output_dir": Inherited(None, "For the student, its checkpoints, curves and log.", "Always."),
    "resume_from_checkpoint": Inherited(
        None, "A checkpoint's folder, or `latest`.", "To go on with a run that was ended."
    ),
    "eval_strategy": Inherited(
        "no",
        "When held-out prompts are evaluated in between: no, steps, epoch.",
        "To see the KL fall, or to keep the best.",
    ),
    "eval_steps": Inherited(
        None, "Steps from one evaluation to the next; logging_steps if not given.", "With eval_strategy=steps."
    ),
    "per_device_eval_batch_size": Inherited(8, "Held-out prompts that are sampled at once.", "More on a large GPU."),
    "save_strategy": Inherited("steps", "When checkpoints are written: no, steps, epoch, best.", "`no` for trials."),
    "save_steps": Inherited(500, "Steps from one checkpoint to the next.", "By how much work may be lost."),
    "save_total_limit": Inherited(None, "Checkpoints that are kept.", "2, for the disk's sake."),
    "load_best_model_at_end": Inherited(
        False, "Save the best checkpoint's student, not the last.", "With eval_strategy."
    ),
    "metric_for_best_model": Inherited(
        None, "What the best checkpoint is known by.", "With load_best_model_at_end: `accuracy`, `forward_kl_per_byte`."
    ),
    "report_to": Inherited("none", "Where logs go: wandb, trackio, tensorboard ...", "To watch a run from elsewhere."),
    "run_name": Inherited(None, "What it is called there.", "With report_to."),
}
