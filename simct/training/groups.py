"""The options of a run in groups: the order of `simct train --help` and of docs/options.md. Imports nothing: help must be quick."""

from typing import NamedTuple


class Group(NamedTuple):
    """Options of one subject; `own` are those of `SimCTConfig` and `simct train`, `inherited` the Trainer's that belong to it."""

    title: str
    own: tuple[str, ...]
    inherited: tuple[str, ...] = ()


GROUPS = {
    "data": Group(
        "Data and prompts",
        (
            "data", "data_split", "streaming", "on_bad_row", "prompt_format", "chat_template_kwargs",
            "teacher_chat_template_kwargs", "teacher_system_prompt", "remove_unused_columns",
        ),
    ),
    "rollouts": Group(
        "Rollouts",
        (
            "max_new_tokens", "temperature", "top_p", "stop_strings", "num_generations", "num_iterations", "on_policy_fraction",
            "rollout_engine", "rollout_dtype", "kv_cache_gb", "max_logprob_gap", "vllm_gpu_memory_utilization", "vllm_server_url",
            "vllm_sync_dir", "vllm_kwargs",
        ),
    ),
    "objective": Group(
        "Objective",
        (
            "objective", "beta", "loss_temperature", "score", "candidates", "top_k", "teacher_mass_floor", "alignment", "units",
            "special_tokens", "stop",
        ),
    ),
    "ablations": Group("Ablations", ("merge_ratio", "mask_longer")),
    "optimisation": Group(
        "Optimisation",
        ("learning_rate", "lr_scheduler_type", "warmup_steps", "on_nonfinite"),
        (
            "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay",
            "max_grad_norm", "seed", "full_determinism",
        ),
    ),
    "models": Group(
        "Models and adapters",
        ("student", "teacher", "model_init_kwargs", "teacher_model_init_kwargs", "peft_config", "merge_adapter",
            "allow_missing_weights"),
    ),
    "memory": Group(
        "Memory and speed",
        (
            "bf16", "max_tokens_per_batch", "packing", "gradient_checkpointing", "offload_teacher", "shard_teacher", "backend",
            "chunk_rows", "dry_run", "assume_memory_gb", "assume_processes",
        ),
        ("fp16", "use_cpu", "fsdp", "torch_compile"),
    ),
    "served": Group("A teacher behind a server", ("teacher_url", "teacher_top_k", "teacher_server_kwargs")),
    "saving": Group(
        "Evaluation, log and saving",
        (
            "eval_data", "eval_prompts", "eval_num_generations", "eval_temperature", "inspect_samples", "allow_changed_run",
            "logging_steps",
            "logging_first_step", "logging_nan_inf_filter",
        ),
        (
            "output_dir", "resume_from_checkpoint", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy",
            "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "report_to", "run_name",
        ),
    ),
}  # fmt: skip

# What `simct train --help` shows: name, what stands for its value, what it is.
FIRST = (
    ("student", "MODEL", "the model that learns: a folder or hub name"),
    ("teacher", "MODEL", "the model that it learns from"),
    ("data", "FILE", "prompts: JSONL, Parquet, a folder of either, a hub data set"),
    ("output_dir", "FOLDER", "for the student, its checkpoints, curves and log"),
    ("config", "FILE.yaml", "any of these options; the command line wins"),
    ("recipe", "NAME", "an option file of this package (simct recipes)"),
    ("max_steps", "N", "optimiser steps; one pass over the data if not given"),
    ("learning_rate", "X", "peak learning rate (1e-6)"),
    ("per_device_train_batch_size", "N", "prompts of a step and device (8)"),
    ("max_new_tokens", "N", "longest response, in student tokens (1024)"),
    ("bf16", "false", "compute in bfloat16: what a GPU does if not told"),
    ("use_cpu", "", "without a GPU"),
    ("eval_prompts", "N", "hold out N prompts, evaluated before and after (0)"),
    ("resume_from_checkpoint", "latest", "go on from the newest whole checkpoint"),
    ("dry_run", "", "print options, coverage and memory by part, and stop"),
)

EXAMPLE = (
    "simct train --student google/gemma-2-2b-it --teacher Qwen/Qwen2.5-7B-Instruct \\",
    "    --data prompts.jsonl --output_dir runs/gemma --max_steps 200",
)

# The Trainer's, without a meaning here, or deprecated: `--help all` does not list them; they are taken as ever.
HIDDEN = (
    "label_names", "label_smoothing_factor", "include_for_metrics", "prediction_loss_only", "eval_accumulation_steps",
    "length_column_name", "train_sampling_strategy", "batch_eval_metrics", "neftune_noise_alpha",
    "include_num_input_tokens_seen", "do_train", "do_eval", "do_predict", "debug", "eval_do_concat_batches", "eval_on_start",
    "average_tokens_across_devices", "auto_find_batch_size", "activation_checkpointing",
)  # fmt: skip
