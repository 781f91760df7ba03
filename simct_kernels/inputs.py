"""What a loss reads: aligned units and an output head, beside the shared vocabulary of `shared`.

Knows no tokenizer and no loss. Everything that can be checked without a model is checked here, once, at construction:
the checks read the data, so on a GPU they wait for it, and the losses themselves need not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simct_kernels.host import moved
from simct_kernels.shared import SharedVocabulary
from simct_kernels.values import (
    check_device,
    check_float,
    check_least,
    check_type,
    check_vector,
    describe,
    is_dense,
    is_number,
    refuse_any,
)


@dataclass(frozen=True, eq=False)
class AlignedUnits:
    """G units of text, each realised by consecutive prediction rows of either side.

    Rows index the packed response rows of the student (N_s of them) and of the teacher (N_t); row i predicts token i.
    Rows in no unit are unsupervised. `left_out` lists what `candidates="disjoint"` leaves out of a unit's shared
    candidates, as rows (unit, index into the shared vocabulary) sorted by unit; only units with a continuation heed it.

    Raises ValueError for wrong shapes, dtypes or devices, lengths below 1, negative tokens, units that reach outside
    the tokens, units that overlap on a side, or a `left_out` that is unsorted or out of range.
    """

    student_start: Tensor  # int64 [G]
    student_length: Tensor  # int64 [G], >= 1
    teacher_start: Tensor  # int64 [G]
    teacher_length: Tensor  # int64 [G], >= 1
    student_tokens: Tensor  # int64 [N_s]
    teacher_tokens: Tensor  # int64 [N_t]
    left_out: Tensor | None = None  # int64 [E, 2]

    def __post_init__(self) -> None:
        check_vector("student_start", self.student_start)
        for name in ("student_length", "teacher_start", "teacher_length"):
            check_vector(name, getattr(self, name), like=("student_start", self.student_start))
        for side in ("student", "teacher"):
            start, length, tokens = (getattr(self, f"{side}_{part}") for part in ("start", "length", "tokens"))
            check_vector(f"{side}_tokens", tokens, device_of=("student_start", self.student_start))
            check_least(f"{side}_tokens", tokens, 0)
            check_least(f"{side}_length", length, 1)
            check_least(f"{side}_start", start, 0)
            beyond = (
                start > len(tokens) - length
            )  # start + length might pass the largest integer and come back negative
            if beyond.any():
                unit = int(beyond.nonzero()[0])
                raise ValueError(
                    f"{side}_start + {side}_length must not pass the {len(tokens)} rows of {side}_tokens, "
                    f"got {int(start[unit])} + {int(length[unit])}"
                )
            overlap = start[1:] < (start + length)[:-1]
            if overlap.any():  # units may come in any order, but mostly come in that of the text
                start, order = start.sort()
                overlap = start[1:] < (start + length[order])[:-1]
            refuse_any(f"{side}_start", start[1:], overlap, "starts inside another unit: units must not overlap")
            object.__setattr__(self, f"max_{side}_token", int(tokens.max()) if len(tokens) else -1)
        object.__setattr__(self, "max_left_out", self._check_left_out())

    def _check_left_out(self) -> int:
        """Returns the largest shared index left out, -1 if there is none."""
        if self.left_out is None:
            return -1
        dense = is_dense(self.left_out) and self.left_out.dtype == torch.int64
        if not dense or self.left_out.dim() != 2 or self.left_out.shape[1] != 2:
            raise ValueError(f"left_out must be int64 [E, 2], got {describe(self.left_out)}")
        check_device("left_out", self.left_out, "student_start", self.student_start)
        if len(self.left_out) == 0:
            return -1
        check_least("left_out", self.left_out, 0)
        unit = self.left_out[:, 0]
        refuse_any("left_out", unit, unit >= len(self), f"must name one of the {len(self)} units in its first column")
        refuse_any("left_out", unit[1:], unit.diff() < 0, "must be sorted by unit")
        return int(self.left_out[:, 1].max())

    def __len__(self) -> int:
        return self.student_start.shape[0]

    @property
    def student_covered(self) -> float:
        """The fraction of the student's rows that lie in a unit; 1.0 if there are no rows."""
        return _covered(self.student_length, self.student_tokens)

    @property
    def teacher_covered(self) -> float:
        """The fraction of the teacher's rows that lie in a unit; 1.0 if there are no rows."""
        return _covered(self.teacher_length, self.teacher_tokens)

    def has_continuation(self, shared: SharedVocabulary) -> Tensor:
        """bool [G]: the unit is not single, or the tokens that realise it are neither a shared pair nor of one class."""
        check_type("shared", shared, SharedVocabulary, "a SharedVocabulary")
        held = shared.holds(self.student_tokens[self.student_start], self.teacher_tokens[self.teacher_start])
        return ~(self._is_single() & held)

    def single(self) -> AlignedUnits:
        """The units with one token on each side, over the same rows."""
        return self.select(self._is_single())

    def select(
        self,
        index: Tensor,  # bool [G], or int64 [any] from 0 to G - 1, without repeats
    ) -> AlignedUnits:
        """The chosen units, in the order of `index`, over the same rows. Raises ValueError for any other index."""
        if not is_dense(index) or index.dtype not in (torch.bool, torch.int64) or index.dim() != 1:
            raise ValueError(f"index must be bool [{len(self)}] or int64 [any], got {describe(index)}")
        check_device("index", index, "the units", self.student_start)
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise ValueError(f"index must have a bool for each of the {len(self)} units, got {len(index)}")
            index = index.nonzero().squeeze(1)
        refuse_any("index", index, (index < 0) | (index >= len(self)), f"must name units 0 to {len(self) - 1}")
        ascending = index.sort().values
        refuse_any("index", ascending[1:], ascending.diff() == 0, "must not repeat a unit")
        left_out = self.left_out
        if left_out is not None:
            place = index.new_full((len(self),), -1)
            place[index] = torch.arange(len(index), device=index.device)
            left_out = torch.stack([place[left_out[:, 0]], left_out[:, 1]], dim=1)
            left_out = left_out[left_out[:, 0] >= 0]
            left_out = left_out[left_out[:, 0].argsort(stable=True)]
        per_unit = ("student_start", "student_length", "teacher_start", "teacher_length")
        return dataclasses.replace(self, left_out=left_out, **{name: getattr(self, name)[index] for name in per_unit})

    @classmethod
    def concatenate(cls, parts: Sequence[AlignedUnits]) -> AlignedUnits:
        """Packs samples one after the other: rows and `left_out` are shifted to the packed order.

        Either all of the parts carry `left_out` or none: ValueError otherwise, as for an empty sequence.
        """
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"parts must be a list of AlignedUnits, got {describe(parts)}")
        if not parts:
            raise ValueError("parts is empty: concatenate needs at least one AlignedUnits")
        for number, part in enumerate(parts):
            check_type(f"parts[{number}]", part, AlignedUnits, "AlignedUnits")
            check_device(f"parts[{number}]", part.student_start, "parts[0]", parts[0].student_start)
        without = [number for number, part in enumerate(parts) if part.left_out is None]
        if 0 < len(without) < len(parts):
            raise ValueError(f"parts[{without[0]}].left_out is None, but other parts have one: all or none must")
        fields: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(AlignedUnits)}
        rows = {"student": 0, "teacher": 0}
        unit = 0
        for part in parts:
            for side in rows:
                fields[f"{side}_start"].append(getattr(part, f"{side}_start") + rows[side])
                fields[f"{side}_length"].append(getattr(part, f"{side}_length"))
                fields[f"{side}_tokens"].append(getattr(part, f"{side}_tokens"))
                rows[side] += len(getattr(part, f"{side}_tokens"))
            if part.left_out is not None:
                fields["left_out"].append(part.left_out + part.left_out.new_tensor([unit, 0]))
            unit += len(part)
        return cls(**{name: torch.cat(tensors) for name, tensors in fields.items() if tensors})

    def to(self, device: torch.device | str) -> AlignedUnits:
        return moved(self, device)

    def _is_single(self) -> Tensor:
        return (self.student_length == 1) & (self.teacher_length == 1)


@dataclass(frozen=True, eq=False)
class LMHead:
    """A language model's output head: z = scale * (hidden @ weight.T + bias), then softcap * tanh(z / softcap).

    Raises ValueError for wrong shapes, dtypes or devices, a softcap that is not positive, or a scale that is zero.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        quantised = ": a quantised head must be dequantised first"
        if not is_dense(self.weight) or self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(f"weight must be floating point [V, H], got {describe(self.weight)}{quantised}")
        check_float("weight", self.weight, quantised)
        if self.bias is not None:
            rows = self.weight.shape[0]
            if not is_dense(self.bias) or self.bias.shape != (rows,) or not self.bias.is_floating_point():
                raise ValueError(
                    f"bias must be floating point [{rows}] as weight has {rows} rows, got {describe(self.bias)}"
                )
            check_float("bias", self.bias)
            check_device("bias", self.bias, "weight", self.weight)
        if self.softcap is not None and not (is_number(self.softcap) and 0 < self.softcap < float("inf")):
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap!r}")
        if not is_number(self.scale) or self.scale == 0 or not abs(self.scale) < float("inf"):
            raise ValueError(f"scale must be a finite number other than 0, got {self.scale!r}")

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """Reads the head of a Hugging Face causal language model, by its attributes only.

        What transformers 5.24 does between a model's last hidden state and its `.logits` is covered: soft-caps (Gemma,
        VaultGemma, NanoChat, RecurrentGemma, xLSTM), multiplied scales (Cohere, FalconH1, HyperCLOVA X) and divided
        ones (Granite, MiniCPM3, Inkling), on the configuration or its text configuration, and a padded vocabulary.

        Raises ValueError for a model without an output head, or whose head has parameters besides weight and bias
        (Dory's scale per token, an unmerged LoRA on the head).
        """
        if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
            raise ValueError(f"model must be a Hugging Face causal language model, got {type(model).__name__}")
        module = model.get_output_embeddings()
        if getattr(module, "weight", None) is None:
            raise ValueError(f"model {type(model).__name__} has no language modelling head (get_output_embeddings())")
        saved = getattr(module, "modules_to_save", None)
        if saved:  # PEFT trains a copy of the head: the adapter in use says which
            module = saved[next(name for name in module.active_adapters if name in saved)]
        extra = sorted(name for name, _ in module.named_parameters() if name not in ("weight", "bias"))
        if extra:
            raise ValueError(f"model {type(model).__name__} has a head with more than a weight and a bias: {extra}")
        config = model.config.get_text_config()

        def read(*names: str) -> float | None:
            values = (getattr(config, name, None) for name in names)
            return next((float(value) for value in values if value is not None), None)

        # The same field name can mean the opposite, or nothing at all, in another family.
        multiplies = ["lm_head_multiplier", "output_multiplier"]
        divides = ["logits_mup_width_multiplier"]
        if config.model_type.startswith("cohere"):
            multiplies.append("logit_scale")  # MPT has the field and never reads it
        (multiplies if config.model_type.startswith("hyperclovax") else divides).append("logits_scaling")
        scale = (read(*multiplies) or 1.0) / (read(*divides) or 1.0)

        rows = getattr(config, "unpadded_vocab_size", None) or module.weight.shape[0]
        bias = getattr(module, "bias", None)
        return cls(
            weight=module.weight if rows >= module.weight.shape[0] else module.weight[:rows],
            bias=bias if bias is None or rows >= bias.shape[0] else bias[:rows],
            softcap=read("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
            scale=scale,
        )

    def logits(
        self,
        hidden: Tensor,  # [N, H]
    ) -> Tensor:
        """The whole [N, V] logits, in the dtype of the operands: for small cases and for the oracle."""
        width = self.weight.shape[1]
        if not is_dense(hidden) or hidden.dim() != 2 or hidden.shape[1] != width or not hidden.is_floating_point():
            raise ValueError(f"hidden must be floating point [N, {width}] as weight, got {describe(hidden)}")
        check_float("hidden", hidden)
        check_device("hidden", hidden, "weight", self.weight)
        z = hidden @ self.weight.T
        if self.bias is not None:
            z = z + self.bias
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def rows(
        self,
        ids: Tensor,  # int64 [K]
        dtype: torch.dtype,
    ) -> Tensor:
        """weight[ids] as `dtype`, [K, H], detached. A frozen weight's copy is kept for the next call with these ids.

        It lives as long as the weight. It is made anew when the weight was changed in place; a write through
        `weight.data` goes unseen.
        """
        weight = self.weight.detach()
        if self.weight.requires_grad or self.weight.is_inference():  # inference tensors carry no version to watch
            return weight.index_select(0, ids).to(dtype)
        cached_ids, version, rows = _ROW_CACHE.get(self.weight, (None, None, None))
        if cached_ids is ids and version == self.weight._version and rows.dtype == dtype:
            return rows
        rows = weight.index_select(0, ids).to(dtype)
        _ROW_CACHE[self.weight] = (ids, self.weight._version, rows)
        return rows


# By weight, not by head: the custom ops put heads together again at every call.
_ROW_CACHE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _covered(length: Tensor, tokens: Tensor) -> float:
    return int(length.sum()) / len(tokens) if len(tokens) else 1.0
