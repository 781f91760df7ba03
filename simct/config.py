"""`SimCTConfig`: every option of a run, on top of `transformers.TrainingArguments`."""

import json
from dataclasses import dataclass, field

from transformers import TrainingArguments

from simct.prompts import PROMPT_FORMATS
from simct.rollout import ENGINES, Sampling
from simct_kernels.options import CANDIDATES, SCORES


def option(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


def one_of(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(repr, choices))}")


def from_json(name: str, value):
    """A mapping given as JSON on the command line; anything else as it is."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {value!r}: expected a JSON object ({error})") from None


@dataclass
class SimCTConfig(TrainingArguments):
    """Arguments of `SimCTTrainer`. Defaults of the method follow the paper (arXiv 2605.07711, Table 4).

    A training step samples `per_device_train_batch_size * gradient_accumulation_steps` responses per process at once, one for each
    prompt, and uses each once.
    """

    # The paper's optimisation (Table 4) where it differs from the TrainingArguments' defaults.
    learning_rate: float = option(1e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    warmup_steps: float = option(0.05, "Warm-up: a number of steps, or below 1 a share of the run.")
    remove_unused_columns: bool = option(False, "Leave off: prompts are rendered by the trainer.")
    logging_nan_inf_filter: bool = option(False, "Leave off: a NaN loss should be seen.")

    # Rollouts
    max_new_tokens: int = option(1024, "Longest response, in student tokens.")
    temperature: float = option(0.6, "Sampling temperature of the rollouts; 0 is greedy.")
    top_p: float = option(0.95, "Nucleus sampling of the rollouts.")
    rollout_engine: str = option("auto", f"Where samples come from: {', '.join(ENGINES)}.")
    prompt_format: str = option(
        "auto", f"How prompts are rendered, for each model on its own: {', '.join(PROMPT_FORMATS)}."
    )

    # Objective
    beta: float = option(1.0, "Divergence: 1 reverse KL, 0 forward KL, between them the generalised JSD.")
    loss_temperature: float = option(1.0, "Temperature of the candidate softmax (Eq. 8).")
    score: str = option("mean_logprob", "Score of a continuation: mean_logprob (Eq. 7), sum_logprob or mean_logit.")
    candidates: str = option(
        "paper", "Candidates of a unit: paper, or disjoint (no shared token overlaps the continuation)."
    )
    top_k: int | None = option(None, "Keep only the student's own k most probable shared tokens of each unit.")
    teacher_mass_floor: float | None = option(
        None, "Mask units on whose candidates the teacher puts less than this mass."
    )
    alignment: str = option("bytes", "bytes: the minimal partition; anchored: the rule of the authors' public code.")
    units: str = option("all", "all: SimCT; single: only one-to-one units (SimpleOPD on the byte alignment).")
    special_tokens: dict | str | None = option(
        "auto", "Student to teacher special tokens, as JSON; auto maps the end of turn."
    )
    backend: str = option("auto", "Backend of the loss: auto, triton, torch or reference.")
    chunk_rows: int | None = option(
        None, "Rows of logits that the loss holds at a time; chosen by device if not given."
    )

    # Models given as paths
    model_init_kwargs: dict | str | None = option(
        None, "Keyword arguments of from_pretrained for the student, as JSON."
    )
    teacher_model_init_kwargs: dict | str | None = option(
        None, "Keyword arguments of from_pretrained for the teacher, as JSON."
    )

    def __post_init__(self) -> None:
        # What `evaluate` measures, and less of it is better; there is no evaluation loss.
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "reverse_kl_per_byte"
        if (self.metric_for_best_model or "").endswith("reverse_kl_per_byte") and self.greater_is_better is None:
            self.greater_is_better = False
        super().__post_init__()
        for name in "special_tokens", "model_init_kwargs", "teacher_model_init_kwargs":
            setattr(self, name, from_json(name, getattr(self, name)))
        if self.special_tokens != "auto" and not isinstance(self.special_tokens, dict):
            raise ValueError(
                f"special_tokens is {self.special_tokens!r}: expected 'auto' or a mapping of student to teacher tokens"
            )
        one_of("rollout_engine", self.rollout_engine, ENGINES)
        one_of("prompt_format", self.prompt_format, PROMPT_FORMATS)
        one_of("score", self.score, SCORES)
        one_of("candidates", self.candidates, CANDIDATES)
        one_of("alignment", self.alignment, ("bytes", "anchored"))
        one_of("units", self.units, ("all", "single"))
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}: expected a number in [0, 1]")
        if not 0 < self.loss_temperature < float("inf"):
            raise ValueError(f"loss_temperature is {self.loss_temperature}: expected a number above 0")
        if self.teacher_mass_floor is not None and not 0 <= self.teacher_mass_floor <= 1:
            raise ValueError(f"teacher_mass_floor is {self.teacher_mass_floor}: expected a number in [0, 1], or none")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows is {self.chunk_rows}: expected at least 1, or none")
        self.sampling(end_ids=(0,), pad_id=0)  # checks its own settings
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: expected at least 1, or none")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns is True: expected False, the trainer renders the prompt columns itself"
            )

    def sampling(self, end_ids: tuple[int, ...], pad_id: int) -> Sampling:
        """How the rollouts are drawn."""
        return Sampling(end_ids, pad_id, self.max_new_tokens, self.temperature, self.top_p)

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
