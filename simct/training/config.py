"""`SimCTConfig`: every option of a run, on top of `transformers.TrainingArguments`."""

import copy
import json
import os
from dataclasses import asdict, dataclass, fields

import torch
from transformers import TrainingArguments

from simct.data.prompts import PROMPT_FORMATS
from simct.pairing.coverage import digits_differ
from simct.pairing.endings import STOPS
from simct.pairing.pair import TokenizerPair
from simct.rollouts.protocol import ENGINES, Sampling
from simct.secrets import hide_options, read_address, read_key, shown_text, without_secrets
from simct.training.options import SimCTOptions
from simct_kernels.options import CANDIDATES, SCORES

PREFIX_OBJECTIVES = ("bpm", "escd")  # they read `simct_kernels.PrefixTables`
OBJECTIVES = ("auto", "simct", *PREFIX_OBJECTIVES, "uld", "alm")
# Options of SimCT's loss and its units: who sets one of them means that loss.
SIMCTS_OWN = ("beta", "score", "candidates", "top_k", "teacher_mass_floor", "stop", "units", "alignment", "mask_longer")


def one_of(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(repr, choices))}")


def is_on(variable: str) -> bool:
    """Whether a variable of the environment says yes, as accelerate reads it."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def from_json(name: str, value):
    """A mapping given as JSON on the command line; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value

    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key is there twice among {', '.join(key for key, _ in pairs)}")
        return found

    try:
        return json.loads(value, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {shown_text(repr(value))}: expected a JSON object ({error})") from None


def mapping(name: str, value, otherwise: str = ""):
    """`from_json`, or None. ValueError for what is no mapping; `otherwise`: text is as good, and this says what it stands for."""
    found = from_json(name, value)
    if found is None or isinstance(found, dict) or otherwise and isinstance(found, str):
        return found
    raise ValueError(
        f"{name} is {shown_text(repr(value))}: expected {otherwise}a mapping (on the command line, a JSON object)"
    )


@dataclass
class SimCTConfig(SimCTOptions, TrainingArguments):  # type: ignore[misc]  # bf16 may be None here until it is chosen
    """Arguments of `SimCTTrainer`. Defaults of the method follow the paper (arXiv 2605.07711, Table 4).

    An optimiser step reads `per_device_train_batch_size * gradient_accumulation_steps` prompts per process and samples
    `num_generations` responses to each, all at once. How many of them go through the models at a time is `max_tokens_per_batch`'s
    matter, and changes no result.
    """

    unsaid = frozenset[str]()  # names of what `defaults` may choose; no field

    def __post_init__(self) -> None:
        # There is no evaluation loss, and the reverse KL alone would choose a student that has narrowed down.
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            raise ValueError(
                "metric_for_best_model is not given: expected 'accuracy' (eval records with an answer), 'forward_kl_per_byte' "
                "(eval records with the teacher's answers in full) or another that `evaluate` measures"
            )
        if "_kl_per_" in (self.metric_for_best_model or "") and self.greater_is_better is None:
            self.greater_is_better = False
        self._check_numbers()
        # What a run on a GPU chooses (`defaults`).
        again = (self.gradient_checkpointing, getattr(self, "activation_checkpointing", None))
        precision = True if self._names_a_precision() else self.bf16
        known = {"bf16": precision, "gradient_checkpointing": None if again == (None, None) else True}
        self.unsaid = frozenset(name for name, value in known.items() if value is None)
        # transformers 5.21 and later have a new name, and warn of the one that all supported versions know.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        self._refuse_deepspeed()
        if self.bf16 is None:
            self.bf16 = self._takes_bf16()
        super().__post_init__()
        if self.fsdp_checkpoints:
            self.unsaid -= {"gradient_checkpointing"}
        for name in (
            "model_init_kwargs",
            "teacher_model_init_kwargs",
            "chat_template_kwargs",
            "teacher_chat_template_kwargs",
            "teacher_server_kwargs",
            "vllm_kwargs",
            "lr_scheduler_kwargs",
        ):
            setattr(self, name, mapping(name, getattr(self, name)))
        self.special_tokens = from_json("special_tokens", self.special_tokens)
        self.teacher_url = mapping("teacher_url", self.teacher_url, "an address or ")
        self._read_secrets()
        if self.special_tokens != "auto" and not isinstance(self.special_tokens, dict):
            raise ValueError(
                f"special_tokens is {self.special_tokens!r}: expected 'auto' or a mapping of student to teacher tokens"
            )
        one_of("rollout_engine", self.rollout_engine, ENGINES)
        one_of("prompt_format", self.prompt_format, PROMPT_FORMATS)
        one_of("score", self.score, SCORES)
        one_of("candidates", self.candidates, CANDIDATES)
        one_of("alignment", self.alignment, ("bytes", "anchored"))
        one_of("stop", self.stop, STOPS)
        one_of("units", self.units, ("all", "single", "merged"))
        one_of("objective", self.objective, OBJECTIVES)
        one_of("packing", self.packing, ("auto", "on", "off"))
        one_of("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        one_of("on_bad_row", self.on_bad_row, ("stop", "skip"))
        one_of("rollout_dtype", self.rollout_dtype, (None, "float32", "bfloat16", "float16"))
        for name in "on_policy_fraction", "merge_ratio", "mask_longer":
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a number in [0, 1]")
        for name in "num_generations", "num_iterations", "eval_num_generations":
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if isinstance(self.stop_strings, str):
            raise ValueError(f"stop_strings is {self.stop_strings!r}: expected a list of texts")
        if self.inspect_samples < 0:
            raise ValueError(f"inspect_samples is {self.inspect_samples}: expected at least 0")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch is {self.max_tokens_per_batch}: expected at least 1, or none")
        share = self.vllm_gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"vllm_gpu_memory_utilization is {share}: expected a number in (0, 1], or none")
        if self.kv_cache_gb is not None and not 0 < self.kv_cache_gb < float("inf"):
            raise ValueError(f"kv_cache_gb is {self.kv_cache_gb}: expected a number above 0, or none")
        if not self.max_logprob_gap > 0:
            raise ValueError(f"max_logprob_gap is {self.max_logprob_gap}: expected a number above 0")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}: expected a number in [0, 1]")
        if not 0 < self.loss_temperature < float("inf"):
            raise ValueError(f"loss_temperature is {self.loss_temperature}: expected a number above 0")
        if self.teacher_mass_floor is not None and not 0 <= self.teacher_mass_floor <= 1:
            raise ValueError(f"teacher_mass_floor is {self.teacher_mass_floor}: expected a number in [0, 1], or none")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}: expected at least 1, or none")
        if self.rollout_engine == "vllm-server" and not self.vllm_server_url:
            raise ValueError(
                "rollout_engine is 'vllm-server', but vllm_server_url is not given: expected http://host:port"
            )
        if self.units == "merged" and self.candidates == "disjoint":
            raise ValueError(
                "units is 'merged' and candidates is 'disjoint': expected candidates='paper' with merged units"
            )
        if self.stop == "class" and self.objective not in ("auto", "simct"):
            raise ValueError(
                f"stop is 'class' and objective is {self.objective!r}, which has no shared candidates: expected stop='pair' with it"
            )
        self.sampling(end_ids=(0,), pad_id=0)  # checks its own settings
        if not 0 <= self.eval_temperature < float("inf"):
            raise ValueError(f"eval_temperature is {self.eval_temperature}: expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: expected at least 1, or none")
        if self.teacher_top_k < 1:
            raise ValueError(f"teacher_top_k is {self.teacher_top_k}: expected at least 1")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns is True: expected False, the trainer renders the prompt columns itself"
            )

    def _takes_bf16(self) -> bool:
        """Whether a run that names no precision computes in bfloat16: on a GPU that has it."""
        if self._names_a_precision() or self.use_cpu or not torch.cuda.is_available():
            return False
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def _names_a_precision(self) -> bool:
        return self.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"

    @property
    def fsdp_checkpoints(self) -> bool:
        """Whether FSDP makes activations anew by an option of its own, beside which the Trainer refuses its one."""
        own = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
        said = own.get("activation_checkpointing", os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", False))
        return str(said).lower() in ("true", "1", "yes", "on")

    def _check_numbers(self) -> None:
        """What the Trainer's own arguments would let through, into a run without a step or with weights that are no numbers."""
        for name in (known.name for known in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and value != value:
                raise ValueError(f"{name} is {value}: expected a number")
        for name in "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps":
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not 0 <= float(self.learning_rate) < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}: expected a number of at least 0")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < float("inf"):
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}: expected a number above 0, or max_steps")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: expected a number in [0, 2^32)")

    def _refuse_deepspeed(self) -> None:
        by_launcher = is_on("ACCELERATE_USE_DEEPSPEED")
        if self.deepspeed or by_launcher:
            given = f"{shown_text(repr(self.deepspeed))}" if self.deepspeed else "on, by accelerate's configuration"
            raise ValueError(
                f"deepspeed is {given}: expected none. An optimiser step here has several backward passes, and DeepSpeed's engine "
                "would make a step of its own with each; --fsdp true (FSDP2) shards the student"
            )

    def _read_secrets(self) -> None:
        """Keys and addresses stripped and checked, and hidden from every message from here on."""
        hide_options(vars(self))
        self.hub_token = read_key("hub_token", self.hub_token)
        for name in "model_init_kwargs", "teacher_model_init_kwargs":
            options = getattr(self, name) or {}
            if isinstance(options.get("token"), str):
                setattr(self, name, {**options, "token": read_key(f"token of {name}", options["token"])})
        if self.vllm_server_url:
            self.vllm_server_url = read_address("vllm_server_url", self.vllm_server_url)
        if isinstance(self.teacher_url, dict):
            self.teacher_url = {name: read_address("teacher_url", url) for name, url in self.teacher_url.items()}
        elif self.teacher_url:
            self.teacher_url = read_address("teacher_url", self.teacher_url)

    def to_dict(self) -> dict:
        """As TrainingArguments', for those who log it; no key in it."""
        return {name: without_secrets(name, value) for name, value in super().to_dict().items()}

    def __str__(self) -> str:
        shown = ((name, without_secrets(name, value)) for name, value in sorted(asdict(self).items()))
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    __repr__ = __str__

    def __getstate__(self) -> dict:
        """What is pickled, as the Trainer does into training_args.bin: no key in it. (A copy has all.)"""
        return {name: without_secrets(name, value) for name, value in vars(self).items()}

    def __copy__(self) -> "SimCTConfig":
        new = object.__new__(type(self))
        new.__dict__.update(vars(self))
        return new

    def __deepcopy__(self, memo: dict) -> "SimCTConfig":
        new = memo[id(self)] = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new

    def sampling(self, end_ids: tuple[int, ...], pad_id: int) -> Sampling:
        """How the rollouts are drawn."""
        stops = tuple(self.stop_strings or ())
        return Sampling(end_ids, pad_id, self.max_new_tokens, self.temperature, self.top_p, stops)

    def rollout_precision(self, student) -> torch.dtype | None:
        """The precision of a copy to sample from; None: from the student itself.

        float32 master weights under --bf16 would be sampled from in float32 (a paged cache has one precision, the weights'), at
        half the speed or less on a GPU: two bytes a parameter buy a copy.
        """
        if self.rollout_dtype is not None:
            return getattr(torch, self.rollout_dtype)
        # The run's device, not the student's: to be sharded it still waits in main memory.
        on_gpu = self.rollout_engine == "vllm" or self.device.type != "cpu"
        return torch.bfloat16 if self.bf16 and student.dtype == torch.float32 and on_gpu else None

    @property
    def shards_student(self) -> bool:
        """FSDP, by an option or by accelerate's own configuration."""
        return bool(self.fsdp) or is_on("ACCELERATE_USE_FSDP")

    def shares_teacher(self, processes: int) -> bool:
        """Whether so many processes share a teacher's weights out among them: as said, else as the student's."""
        return processes > 1 and (self.shards_student if self.shard_teacher is None else self.shard_teacher)

    def engine_options(self, student) -> dict:
        """The keyword arguments of `simct.rollouts.engines.build_engine`."""
        share, more = self.vllm_gpu_memory_utilization, mapping("vllm_kwargs", self.vllm_kwargs)
        return dict(
            dtype=self.rollout_precision(student),
            kv_cache_gb=self.kv_cache_gb,
            max_logprob_gap=self.max_logprob_gap,
            vllm_options={**({} if share is None else {"gpu_memory_utilization": share}), **(more or {})},
            server_url=self.vllm_server_url,
            sync_folder=self.vllm_sync_dir,
        )

    def objective_for(self, pair: TokenizerPair, *, served: bool = False) -> str:
        """`objective`, or what "auto" means for this pair: "escd" where the student writes digits one by one and the teacher in
        groups (docs/evidence.md says why), else the paper's "simct"; that also with a served teacher, and where an option is set
        that shapes SimCT's loss or its units."""
        if self.objective != "auto":
            return self.objective
        usual = {field.name: field.default for field in fields(SimCTOptions)}
        if served or any(getattr(self, name) != usual[name] for name in SIMCTS_OWN):
            return "simct"
        return "escd" if digits_differ(pair) else "simct"

    def loss_options(self) -> dict:
        """The keyword arguments of `simct_kernels.linear_simct_loss`."""
        return dict(
            beta=self.beta,
            temperature=self.loss_temperature,
            score=self.score,
            candidates=self.candidates,
            top_k=self.top_k,
            teacher_mass_floor=self.teacher_mass_floor,
            backend=self.backend,
            chunk_rows="auto" if self.chunk_rows is None else self.chunk_rows,
        )
