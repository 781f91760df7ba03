"""A call of the linear loss at a real pair's sizes, on a device without data: meta tensors refuse to be looked at.

So it never waits for a GPU, and what it holds at once is known. Kernels are not run, and a plan reads what the CPU kept.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cases import GEMMA, QWEN, Case, Model, make_shared, make_units
from simct_kernels import LMHead, torch_backend
from simct_kernels.options import LossOptions
from simct_kernels.torch_backend import rows as backend_rows
from simct_kernels.triton_backend import linear_job

HEADLINE = Case("headline", GEMMA, QWEN, shared=97_675, rows=8192)
LLAMA = Model("Llama-3.1-8B", 128_256, 4096)
GB = 1e9


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is pretended where there is none")
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *_, **__: None, raising=False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(backend_rows, "sums_in_float32", lambda device: True)


class LiveMemory(TorchDispatchMode):
    """The largest sum of bytes of what operations made and is still held, without the given tensors."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.peak, self._live = 0, {}
        self._given = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._given:
                storage = tensor.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired() or key in given}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def call(
    case: Case,
    *,
    trains_head: bool = True,
    chunk_rows: int | str = "auto",
    backend=linear_job,
    classes: bool = False,
    **options,
) -> float:
    """Makes losses and gradients, the head's with a scale as in a backward pass; GB held at most besides the inputs."""
    shared = make_shared(case)
    if classes:  # of three ids, one after the other on either side
        free = {}
        for side, model in (("student", case.student), ("teacher", case.teacher)):
            unshared = torch.ones(model.vocabulary, dtype=torch.bool)
            unshared[getattr(shared, f"{side}_ids")] = False
            ids = unshared.nonzero()[:3]
            free[f"{side}_classes"] = torch.cat([torch.zeros_like(ids), ids], dim=1)
        shared = dataclasses.replace(shared, **free)
    units = make_units(case, shared)
    if options.get("candidates") == "disjoint":
        units = dataclasses.replace(units, left_out=torch.tensor([[0, 1], [len(units) - 1, 5]]))
    shared, units = shared.to("meta"), units.to("meta")

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    head, teacher_head = (
        LMHead(empty(model.vocabulary, model.width), softcap=model.softcap) for model in (case.student, case.teacher)
    )
    head.weight.requires_grad_(trains_head)
    hidden = empty(len(units.student_tokens), case.student.width)
    teacher_hidden = empty(len(units.teacher_tokens), case.teacher.width)
    options = LossOptions(**options)
    job = backend(units, shared, options, head, teacher_head, chunk_rows, torch.float32)
    with torch.no_grad(), LiveMemory(hidden, head.weight, teacher_hidden, teacher_head.weight) as memory:
        losses, (by_hidden, by_weight, _) = job.run(hidden, teacher_hidden, (True, trains_head, False))
        if trains_head:
            if isinstance(by_weight, Tensor):  # with top_k
                return memory.peak / GB
            made = by_weight.make(torch.empty((), device="meta"), torch.bfloat16)
            assert made.shape == head.weight.shape and made.dtype == torch.bfloat16
    assert losses.shape == (len(units),) and by_hidden.shape == hidden.shape
    return memory.peak / GB


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.5}, {"candidates": "disjoint"}, {"teacher_mass_floor": 0.1}, {"score": "mean_logit"}],
    ids=str,
)
def test_the_headline_never_waits_and_fits(options):
    assert call(HEADLINE, **options) < 4.5


@pytest.mark.parametrize(
    "backend,options",
    [(linear_job, {"teacher_mass_floor": 0.1, "beta": 0.5}), (torch_backend.LossJob, {"top_k": 16})],
    ids=["triton", "torch"],
)
def test_classes_never_wait_and_take_no_memory(backend, options):
    held = call(HEADLINE, backend=backend, **options)
    assert call(HEADLINE, backend=backend, classes=True, **options) < 1.03 * held


@pytest.mark.parametrize("options", [{}, {"candidates": "disjoint", "teacher_mass_floor": 0.1}], ids=str)
def test_few_candidates_never_wait(options):
    call(HEADLINE, top_k=16, **options)


@pytest.mark.parametrize("options", [{}, {"candidates": "disjoint"}, {"top_k": 16, "beta": 0.5}], ids=str)
def test_the_pytorch_backend_never_waits(options):
    call(HEADLINE, backend=torch_backend.LossJob, **options)


def test_one_vocabulary():
    """Nothing is copied of either head: they are read where they lie."""
    case = Case("one vocabulary", LLAMA, LLAMA, shared=LLAMA.vocabulary, rows=8192, single=1.0)
    assert call(case) < 4


def test_few_rows_at_a_time_for_a_frozen_head():
    """What is left are the copies of both heads' shared rows."""
    copies = HEADLINE.shared * (GEMMA.width + QWEN.width) * 2 / GB
    assert call(HEADLINE, trains_head=False, chunk_rows=128) < copies + 0.5
