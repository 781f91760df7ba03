"""The losses as `torch.library` custom ops, which torch.compile keeps whole instead of tracing into them.

Without torch.compile the losses run as ordinary autograd functions, so that profilers and dispatch modes see what they
do. An op takes tensors and scalars: the dataclasses are taken apart before it and put together again, unchecked, inside.
A summed loss makes its gradients in the forward op, because each logit is then made once; the backward scales and
rounds them. Losses by unit are weighted in the backward pass only, where the `_backward` op makes the logits again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from simct_kernels import backends, torch_backend
from simct_kernels.checks import check_left_out
from simct_kernels.inputs import AlignedUnits, LMHead, SharedVocabulary
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend.job import compute_dtype

_UNITS = tuple(field.name for field in dataclasses.fields(AlignedUnits))
_SHARED = {
    **dict.fromkeys(("student_ids", "teacher_ids", "ascending_teacher_ids", "teacher_order"), "Tensor"),
    **dict.fromkeys(("student_classes", "teacher_classes"), "Tensor?"),
    "class_count": "SymInt",
}
# What every op takes after its own inputs. A chunk_rows of None is "auto".
_COMMON = (
    ", ".join(f"Tensor{'?' * (name == 'left_out')} {name}" for name in _UNITS)
    + "".join(f", {kind} {name}" for name, kind in _SHARED.items())
    + ", float beta, float temperature, str score, str candidates, SymInt? top_k, float? teacher_mass_floor"
    + ", SymInt? chunk_rows, str backend"
)
_HEAD_OPTIONS = "float? {0}_softcap, float {0}_scale"
_STUDENT_HEAD = f"Tensor student_weight, Tensor? student_bias, {_HEAD_OPTIONS.format('student')}"


def simct_loss(
    student_logits: Tensor,  # [N_s, V_s]
    teacher_logits: Tensor,  # [N_t, V_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, one number if `summed` or else [G], and the units' losses [G] without gradient."""
    common = _flatten(units, shared, options, "auto", backend)
    return _call(torch.ops.simct.simct_loss, (student_logits,), (teacher_logits, *common), summed)


def linear_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_hidden: Tensor,  # [N_t, H_t]
    teacher_head: LMHead,
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `simct_loss`, from hidden states and heads."""
    student = (student_hidden, student_head.weight, student_head.bias)
    rest = (
        *(student_head.softcap, student_head.scale),
        *(teacher_hidden, teacher_head.weight, teacher_head.bias, teacher_head.softcap, teacher_head.scale),
        *_flatten(units, shared, options, chunk_rows, backend),
    )
    return _call(torch.ops.simct.linear_simct_loss, student, rest, summed)


def topk_simct_loss(
    student_hidden: Tensor,  # [N_s, H_s]
    student_head: LMHead,
    teacher_topk_ids: Tensor,  # int64 [N_t, k]
    teacher_topk_logprobs: Tensor,  # [N_t, k]
    teacher_token_logprobs: Tensor,  # [N_t]
    units: AlignedUnits,
    shared: SharedVocabulary,
    options: LossOptions,
    *,
    summed: bool,
    chunk_rows: int | str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `simct_loss`, from the student's hidden states and head and what a served teacher says."""
    student = (student_hidden, student_head.weight, student_head.bias)
    rest = (
        *(student_head.softcap, student_head.scale),
        *(teacher_topk_ids, teacher_topk_logprobs, teacher_token_logprobs),
        *_flatten(units, shared, options, chunk_rows, backend),
    )
    return _call(torch.ops.simct.topk_simct_loss, student, rest, summed)


def _call(op, student: tuple[Tensor | None, ...], rest: tuple, summed: bool) -> tuple[Tensor, Tensor]:
    make_gradients = summed and torch.is_grad_enabled()
    needs_grad = [make_gradients and tensor is not None and tensor.requires_grad for tensor in student]
    loss, unit_losses, *_ = op(*student, *rest, summed, needs_grad)
    return (loss, unit_losses) if summed else (unit_losses, unit_losses.detach())


def _flatten(
    units: AlignedUnits, shared: SharedVocabulary, options: LossOptions, chunk_rows: int | str, backend: str
) -> tuple:
    """The arguments named in _COMMON."""
    return (
        *(getattr(units, name) for name in _UNITS),
        *(getattr(shared, name) for name in _SHARED),
        *(float(options.beta), float(options.temperature), options.score, options.candidates, options.top_k),
        None if options.teacher_mass_floor is None else float(options.teacher_mass_floor),
        *(None if chunk_rows == "auto" else chunk_rows, backend),
    )


def _unflatten(common: tuple) -> tuple[AlignedUnits, SharedVocabulary, LossOptions, int | str, str]:
    units = _unchecked(AlignedUnits, _UNITS, common)
    shared = _unchecked(SharedVocabulary, _SHARED, common[len(_UNITS) :])
    *options, chunk_rows, backend = common[len(_UNITS) + len(_SHARED) :]
    options = LossOptions(*options)
    check_left_out(units, shared, options)
    return units, shared, options, "auto" if chunk_rows is None else chunk_rows, backend


def _unchecked(cls, names: Iterable[str], values: tuple):
    """An instance that was checked before it was taken apart: checking reads the data, which waits for a GPU."""
    made = object.__new__(cls)
    for name, value in zip(names, values, strict=False):
        object.__setattr__(made, name, value)
    return made


# What each op runs, bound to its arguments: a function of the flags of what needs a gradient and of the units' weights
# (None: all 1) to the units' losses and the gradients.


def _logits_run(student_logits, teacher_logits, *common):
    units, shared, options, _, backend = _unflatten(common)
    if backend == "torch":
        dtype = compute_dtype(student_logits, teacher_logits)
        job = torch_backend.LossJob(units, shared, options, None, None, "auto", dtype)
        return functools.partial(job.run, student_logits, teacher_logits)

    def run(needs_grad, unit_weights=None):
        """By the backend's own autograd function, whose gradient comes in the logits' dtype."""
        wanted = needs_grad[0]
        leaf = student_logits.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            loss = backends.load(backend).simct_loss
            total, losses = loss(leaf, teacher_logits, units, shared, options, summed=unit_weights is None)
        gradient = torch.autograd.grad(total, leaf, unit_weights)[0] if wanted else None
        return losses, (gradient, None, None)

    return run


def _linear_run(
    student_hidden, weight, bias, softcap, scale, teacher_hidden, t_weight, t_bias, t_cap, t_scale, *common
):
    units, shared, options, chunk_rows, backend = _unflatten(common)
    head, teacher_head = LMHead(weight, bias, softcap, scale), LMHead(t_weight, t_bias, t_cap, t_scale)
    dtype = compute_dtype(student_hidden, weight, teacher_hidden, t_weight)
    job = backends.load(backend).linear_job(units, shared, options, head, teacher_head, chunk_rows, dtype)
    return functools.partial(job.run, student_hidden, teacher_hidden)


def _topk_run(student_hidden, weight, bias, softcap, scale, topk_ids, topk_logprobs, token_logprobs, *common):
    units, shared, options, chunk_rows, backend = _unflatten(common)
    head = LMHead(weight, bias, softcap, scale)
    dtype = compute_dtype(student_hidden, weight)
    job = backends.load(backend).topk_job(units, shared, options, head, topk_ids, topk_logprobs, chunk_rows, dtype)
    return functools.partial(job.run, student_hidden, token_logprobs)


@torch.library.custom_op("simct::scale_gradient", mutates_args=())
def _scale_gradient(gradient: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """gradient * scale, rounded once, to the dtype of `like`.

    An op because it must seem to depend on `like`: a compiled backward that does not depend on the loss's inputs would
    pass a second differentiation by, where it now is refused.
    """
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=like.dtype))


@_scale_gradient.register_fake
def _(gradient, scale, like):
    return torch.empty_like(gradient, dtype=like.dtype)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """One loss's two ops: simct::name and, where its gradients come with the backward pass, simct::name_backward."""

    name: str
    inputs: str  # the schema of what comes before _COMMON, the student's tensors first
    count: int  # of the student's tensors, which may need a gradient: 1, or hidden, weight and bias
    run: Callable[..., Callable]
    dtype: Callable[..., torch.dtype]  # of the losses, from the inputs
    gradients_as_inputs: bool  # the gradients' dtype: that of the student's tensors, or that of the losses

    def register(self) -> None:
        tensors = ", ".join(["Tensor"] * self.count)
        arguments = f"{self.inputs}, {_COMMON}"
        forward = torch.library.custom_op(
            f"simct::{self.name}",
            self.forward,
            mutates_args=(),
            schema=f"({arguments}, bool summed, bool[] needs_grad) -> (Tensor, Tensor, {tensors})",
        )
        forward.register_fake(self.fake_forward)
        forward.register_autograd(self.backward, setup_context=self.setup_context)
        remake = torch.library.custom_op(
            f"simct::{self.name}_backward",
            self.remake,
            mutates_args=(),
            schema=f"({arguments}, Tensor unit_weights, bool[] needs_grad) -> ({tensors})",
        )
        remake.register_fake(self.fake_remake)

    def forward(self, *arguments):
        *arguments, _, needs_grad = arguments
        losses, gradients = self.run(*arguments)(self._flags(needs_grad))
        return losses.sum(), losses, *self._filled(gradients, losses)

    def fake_forward(self, *arguments):
        *arguments, _, needs_grad = arguments
        losses = arguments[0].new_empty(self._units(arguments), dtype=self.dtype(*arguments))
        return losses.new_empty(()), losses, *self._fake_gradients(arguments, needs_grad)

    def remake(self, *arguments):
        *arguments, unit_weights, needs_grad = arguments
        losses, gradients = self.run(*arguments)(self._flags(needs_grad), unit_weights)
        gradients = self._filled(gradients, losses)
        return tuple(gradients) if self.count > 1 else gradients[0]

    def fake_remake(self, *arguments):
        *arguments, _, needs_grad = arguments
        gradients = self._fake_gradients(arguments, needs_grad)
        return tuple(gradients) if self.count > 1 else gradients[0]

    def setup_context(self, ctx, inputs, output) -> None:
        loss, losses, *gradients = output
        *arguments, ctx.summed, made = inputs
        ctx.set_materialize_grads(False)  # or zeros as large as the head would be made for the outputs below
        ctx.mark_non_differentiable(losses if ctx.summed else loss, *gradients)
        ctx.made = ctx.summed and list(made) == list(ctx.needs_input_grad[: self.count])
        ctx.scalars = [None if isinstance(argument, Tensor) else (argument,) for argument in arguments]
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        ctx.save_for_backward(*tensors, *(gradients if ctx.made else ()))

    def backward(self, ctx, grad_loss, grad_losses, *_):
        if torch.is_grad_enabled():
            raise RuntimeError("a SimCT loss cannot be differentiated twice: backward without create_graph=True")
        rest = (None,) * (len(ctx.scalars) - self.count + 2)
        upstream = grad_loss if ctx.summed else grad_losses
        if upstream is None:
            return *(None,) * self.count, *rest
        saved = list(ctx.saved_tensors)
        arguments = [saved.pop(0) if scalar is None else scalar[0] for scalar in ctx.scalars]
        needed = ctx.needs_input_grad[: self.count]
        if ctx.made:
            scale = torch.ops.simct.scale_gradient
            gradients = [
                scale(gradient, upstream, tensor) if need else None
                for gradient, tensor, need in zip(saved, arguments, needed, strict=False)
            ]
        else:
            unit_weights = upstream.expand(self._units(arguments)) if ctx.summed else upstream
            remake = getattr(torch.ops.simct, f"{self.name}_backward")
            gradients = remake(*arguments, unit_weights, list(needed))
            gradients = gradients if self.count > 1 else [gradients]
            # float32 until here: the one rounding to the inputs' dtype comes last.
            gradients = [
                gradient.to(tensor.dtype) if need else None
                for gradient, tensor, need in zip(gradients, arguments, needed, strict=False)
            ]
        return *gradients, *rest

    def _units(self, arguments) -> int:
        return arguments[len(self.inputs.split(", "))].shape[0]  # student_start

    def _flags(self, needs_grad) -> tuple[bool, bool, bool]:
        return (*needs_grad, False, False)[:3]

    def _filled(self, gradients, like: Tensor) -> list[Tensor]:
        """An op returns tensors only: an empty one stands for None."""
        return [
            gradient if isinstance(gradient, Tensor) else gradient.make(None, like.dtype)
            for gradient in (like.new_empty(0) if made is None else made for made in gradients[: self.count])
        ]

    def _fake_gradients(self, arguments, needs_grad) -> list[Tensor]:
        dtype = arguments[0].dtype if self.gradients_as_inputs else self.dtype(*arguments)
        return [
            arguments[0].new_empty(arguments[i].shape, dtype=dtype)
            if needs_grad[i]
            else arguments[0].new_empty(0, dtype=self.dtype(*arguments))
            for i in range(self.count)
        ]


for _loss in (
    _Loss(
        "simct_loss",
        "Tensor student_logits, Tensor teacher_logits",
        1,
        _logits_run,
        dtype=lambda student, teacher, *_: compute_dtype(student, teacher),
        gradients_as_inputs=True,
    ),
    _Loss(
        "linear_simct_loss",
        f"Tensor student_hidden, {_STUDENT_HEAD}, "
        f"Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, {_HEAD_OPTIONS.format('teacher')}",
        3,
        _linear_run,
        dtype=lambda hidden, weight, _bias, _cap, _scale, teacher, teacher_weight, *_: compute_dtype(
            hidden, weight, teacher, teacher_weight
        ),
        gradients_as_inputs=False,
    ),
    _Loss(
        "topk_simct_loss",
        f"Tensor student_hidden, {_STUDENT_HEAD}, "
        "Tensor teacher_topk_ids, Tensor teacher_topk_logprobs, Tensor teacher_token_logprobs",
        3,
        _topk_run,
        dtype=lambda hidden, weight, *_: compute_dtype(hidden, weight),
        gradients_as_inputs=False,
    ),
):
    _loss.register()
