"""Every argument of every public function, given what it is not: an error that names it, before anything is computed."""

import re
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simct_kernels import (
    AlignedUnits,
    LMHead,
    PrefixTables,
    SharedVocabulary,
    alm_loss,
    backends,
    bpm_loss,
    candidate_mass,
    escd_loss,
    functional,
    linear_simct_loss,
    simct_loss,
    token_statistics,
    topk_candidate_counts,
    topk_simct_loss,
    uld_loss,
)
from simct_kernels.torch_backend.rows import LinearRows

from .prefix_cases import prefix_problem

PROBLEM = prefix_problem()
UNITS, SHARED, TABLES = PROBLEM.units, PROBLEM.shared, PROBLEM.tables
HIDDEN, HEAD = PROBLEM.student_hidden.detach(), PROBLEM.student_head
ROWS = len(UNITS.teacher_tokens)
VECTOR = torch.arange(4)
SIDES = dict(
    student_hidden=HIDDEN,
    student_head=HEAD,
    teacher_hidden=PROBLEM.teacher_hidden,
    teacher_head=PROBLEM.teacher_head,
    units=UNITS,
)
SERVED = dict(
    teacher_topk_ids=torch.zeros(ROWS, 2, dtype=torch.int64), teacher_topk_logprobs=-torch.ones(ROWS, 2, dtype=float)
)
UNIT_LOSS = dict(temperature=1.0, reduction="sum", chunk_rows="auto", return_unit_losses=False)
SIMCT = dict(
    beta=1.0, score="mean_logprob", candidates="paper", top_k=None, teacher_mass_floor=None, backend="auto", **UNIT_LOSS
)
CLASSES = torch.tensor([[0, 4], [0, 6]])
LEFT_OUT = torch.tensor([[0, 1], [1, 0]])
TABLE = dict(vars(TABLES))

# What each takes, all of it.
CALLS = {
    simct_loss: dict(
        student_logits=HEAD.logits(HIDDEN).detach(),
        teacher_logits=PROBLEM.teacher_head.logits(PROBLEM.teacher_hidden),
        units=UNITS,
        shared=SHARED,
        **{name: value for name, value in SIMCT.items() if name != "chunk_rows"},
    ),
    linear_simct_loss: dict(**SIDES, shared=SHARED, **SIMCT),
    topk_simct_loss: dict(
        student_hidden=HIDDEN,
        student_head=HEAD,
        **SERVED,
        teacher_token_logprobs=-torch.ones(ROWS),
        units=UNITS,
        shared=SHARED,
        **SIMCT,
    ),
    topk_candidate_counts: dict(**SERVED, units=UNITS, shared=SHARED, candidates="paper"),
    uld_loss: dict(**SIDES, **UNIT_LOSS),
    alm_loss: dict(**SIDES, divergence="kl", **UNIT_LOSS),
    bpm_loss: dict(**SIDES, tables=TABLES, **UNIT_LOSS),
    escd_loss: dict(**SIDES, tables=TABLES, response_lengths=PROBLEM.lengths, **UNIT_LOSS),
    token_statistics: dict(hidden=HIDDEN, head=HEAD, tokens=UNITS.student_tokens, chunk_rows="auto"),
    candidate_mass: dict(
        hidden=HIDDEN,
        head=HEAD,
        units=UNITS,
        shared=SHARED,
        side="student",
        score="mean_logprob",
        candidates="paper",
        chunk_rows="auto",
    ),
    SharedVocabulary: dict(student_ids=VECTOR, teacher_ids=VECTOR, student_classes=CLASSES, teacher_classes=CLASSES),
    AlignedUnits: dict(
        student_start=VECTOR,
        student_length=VECTOR * 0 + 1,
        teacher_start=VECTOR,
        teacher_length=VECTOR * 0 + 1,
        student_tokens=VECTOR,
        teacher_tokens=VECTOR,
        left_out=LEFT_OUT,
    ),
    AlignedUnits.concatenate: dict(parts=[UNITS, UNITS]),
    UNITS.select: dict(index=torch.tensor([1, 0])),
    UNITS.has_continuation: dict(shared=SHARED),
    UNITS.to: dict(device="cpu"),
    SHARED.to: dict(device="cpu"),
    TABLES.to: dict(device="cpu"),
    LMHead: dict(weight=HEAD.weight, bias=HEAD.bias, softcap=2.0, scale=1.0),
    LMHead.from_model: dict(model=None),
    HEAD.logits: dict(hidden=HIDDEN),
    PrefixTables: TABLE,
    PrefixTables.build: dict(
        student_bytes=[b"a", None], teacher_bytes=[b"a", None], special_routes={1: 1}, canonical={b"a": 0}
    ),
}


def odd_tensors(good: torch.Tensor):
    """What is no tensor like this one in any program: other types, layouts, dtypes, numbers of dimensions, devices."""
    yield from (None, 3, 1.5, "x", b"x", [], good.tolist(), good.detach().numpy(), {}, object())
    yield good.detach().to_sparse()
    yield torch.nested.nested_tensor([good.detach(), good.detach()])
    yield torch.nested.nested_tensor([good.detach(), good.detach()], layout=torch.jagged)
    yield good.to(torch.complex64)
    yield from (good[None], good[None, None], good.flatten()[0], good.to("meta"))
    if good.is_floating_point():
        yield from (good.to(torch.float8_e4m3fn), good.long(), good > 0)
    else:
        yield from (good.to(torch.int16 if good.dtype != torch.int16 else torch.int32), good.float())
        yield good.long() if good.dtype == torch.bool else good > 0


def odd_numbers():
    yield from ("1", b"1", [0.5], (0.5,), {}, float("nan"), float("inf"), -float("inf"), -0.5, 1j, True, False)
    yield from (torch.tensor(0.5), torch.tensor([0.5]), numpy.array([0.5]), numpy.array(0.5), object())


def odd_words():
    yield from (None, 1, 0.5, True, "", "PAPER", b"paper", ["sum"], ("torch",), {}, torch.tensor(1), object())
    yield numpy.array(["paper", "sum"])


ODD_SEQUENCES = [None, 3, "ab", b"ab", {}, object(), numpy.array([1.5]), torch.tensor(1), torch.zeros(2, 2), iter("a")]
ODD_COUNTS = [0, -1, 1.5, True, False, "2", [2], float("nan"), torch.tensor(2), numpy.array([2, 3]), object()]
ODD = {
    "units": lambda _: [None, 1, "units", [UNITS], vars(UNITS), SHARED, object()],
    "shared": lambda _: [None, 1, [SHARED], UNITS, SHARED.student_ids, object()],
    "tables": lambda _: [None, 1, vars(TABLES), UNITS, SHARED, object()],
    "parts": lambda _: [*ODD_SEQUENCES, [], [None], [UNITS, None], [UNITS, SHARED], [UNITS, UNITS.to("meta")]],
    "device": lambda _: [None, torch.bfloat16, torch.zeros(2), 1.5, "gpu?", [], object()],
    "model": lambda _: [None, 1, HEAD, torch.nn.Linear(2, 3), object()],
    "student_bytes": lambda _: [*ODD_SEQUENCES, [], ["a", None], [b"a", 1], [bytearray(b"a"), None]],
    "special_routes": lambda _: [1, "a", [1], {5: 1}, {1: 5}, {1: -1}, {None: 1}, {1: "a"}, {1: True}, {1.0: 1}],
    "canonical": lambda _: [1, "a", [b"a"], {b"a": 5}, {b"a": 1}, {b"b": 0}, {"a": 0}, {b"a": None}, {b"a": True}],
    "response_lengths": lambda good: [
        *ODD_SEQUENCES,
        *([], [sum(good) + 1], [sum(good) + 1, -1], [float(n) for n in good], [str(n) for n in good], [None], [True]),
        [2**63 - 1, 2**63 - 1, 2, *good],
    ],
    "top_k": lambda _: ODD_COUNTS,
    "chunk_rows": lambda _: [*ODD_COUNTS, None, "all"],
    "return_unit_losses": lambda _: [None, 0, 1, "no", [], torch.tensor(True), numpy.array([True, False])],
    "temperature": lambda _: [None, 0, 0.0, *odd_numbers()],
    "beta": lambda _: [None, 1.5, *odd_numbers()],
    "teacher_mass_floor": lambda _: [1.5, *odd_numbers()],
    "softcap": lambda _: [0, 0.0, *odd_numbers()],
    "scale": lambda _: [None, 0, 0.0, *(value for value in odd_numbers() if value is not False and value != -0.5)],
}
ODD["teacher_bytes"] = ODD["student_bytes"]
OPTIONAL = ("left_out", "bias")


def odd_values(name: str, good):
    if name in ODD:
        return list(ODD[name](good))
    if name.endswith("head"):
        return [None, 1, HEAD.weight, vars(HEAD), torch.nn.Linear(2, 3), object()]
    if isinstance(good, str):
        return list(odd_words())
    return [value for value in odd_tensors(good) if value is not None or name not in OPTIONAL]


@pytest.fixture
def computes_nothing(monkeypatch):
    """A loss's backend, and what the other functions read hidden states with, fail the test."""

    def computed(*_, **__):
        pytest.fail("it was computed")

    monkeypatch.setattr(functional, "backends", SimpleNamespace(choose=backends.choose, load=computed))
    monkeypatch.setattr(LinearRows, "__init__", computed)


def label(value) -> str:
    return getattr(value, "__qualname__", value)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.parametrize(
    ("function", "argument"), [(call, name) for call, good in CALLS.items() for name in good], ids=label
)
def test_a_wrong_argument_is_named(function, argument, computes_nothing):
    good = CALLS[function][argument]
    values = odd_values(argument, good)
    assert len(values) > 4
    for value in values:
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**{**CALLS[function], argument: value})
        # The name is a word of the message: "units", not "units.left_out"; ids and bytes may be named by their owner.
        assert re.search(rf"\b{argument}\b", str(caught.value)), (argument, type(value), str(caught.value))


@pytest.mark.parametrize("function", [call for call in CALLS if call != LMHead.from_model], ids=label)
def test_right_arguments_are_not_refused(function):
    function(**CALLS[function])


FEWER = {"student_hidden", "teacher_hidden", "student_logits", "teacher_logits", "teacher_token_logprobs", "tokens"}


@pytest.mark.parametrize(
    ("function", "argument"),
    [(call, name) for call, good in CALLS.items() for name in good if name in FEWER | set(SERVED)],
    ids=label,
)
def test_too_few_and_too_many_rows(function, argument, computes_nothing):
    good = CALLS[function][argument].detach()
    for value in (good[1:], torch.cat([good, good[:1]]), good[:0]):
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            function(**{**CALLS[function], argument: value})


HUGE = 2**63 - 1


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("start", "length"), [(1, HUGE), (HUGE, 1), (HUGE, HUGE), (2, 3), (5, 1), (2**62, 2**62)])
def test_a_unit_beyond_the_largest_integer(side, start, length):
    """start + length wraps to a negative number: the kernels would read wherever that points to."""
    changed = {f"{side}_start": torch.tensor([start]), f"{side}_length": torch.tensor([length])}
    one = {f"{other}_{part}": VECTOR[:1] + (part == "length") for other in ("student", "teacher") for part in PARTS}
    message = f"{side}_start + {side}_length must not pass the 4 rows of {side}_tokens, got {start} + {length}"
    with pytest.raises(ValueError, match=re.escape(message)):
        AlignedUnits(**{**one, **changed}, student_tokens=VECTOR, teacher_tokens=VECTOR)


PARTS = ("start", "length")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([-1], "index must name units 0 to 4, got -1"),
        ([0, 5], "index must name units 0 to 4, got 5"),
        ([2, 0, 2], "index must not repeat a unit, got 2"),
        ([True] * 4, "index must have a bool for each of the 5 units, got 4"),
        ([True] * 6, "index must have a bool for each of the 5 units, got 6"),
    ],
)
def test_select_refuses(index, message):
    start, length = torch.arange(5), torch.ones(5, dtype=torch.int64)
    units = AlignedUnits(start, length, start, length, start, start, LEFT_OUT)
    with pytest.raises(ValueError, match=re.escape(message)):
        units.select(torch.tensor(index))


@pytest.mark.parametrize(
    "function", [simct_loss, linear_simct_loss, topk_simct_loss, topk_candidate_counts, candidate_mass], ids=label
)
def test_disjoint_needs_left_out(function):
    """Without the list "disjoint" would be "paper" under another name."""
    assert UNITS.has_continuation(SHARED).any() and UNITS.left_out is None
    with pytest.raises(ValueError, match="units.left_out is None, but candidates="):
        function(**{**CALLS[function], "candidates": "disjoint"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2], ids=str)
def test_heads_of_few_bits_are_refused(dtype):
    weight = torch.zeros(3, 2, dtype=torch.uint8).view(dtype)
    with pytest.raises(
        ValueError, match="weight must be bfloat16, float16, float32 or float64, got .*dequantised first"
    ):
        LMHead(weight)


def test_a_token_outside_the_head(computes_nothing):
    for bad in (-1, HEAD.weight.shape[0]):
        tokens = UNITS.student_tokens.clone()
        tokens[1] = bad
        with pytest.raises(ValueError, match=f"tokens must be ids of head, 0 to {HEAD.weight.shape[0] - 1}, got {bad}"):
            token_statistics(HIDDEN, HEAD, tokens)


class Reads(TorchDispatchMode):
    """Refuses operations that read a tensor's data on the host, where a GPU would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique_dim", "_unique2"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [simct_loss, linear_simct_loss, topk_simct_loss], ids=label)
def test_checks_of_a_call_read_no_data(function, monkeypatch):
    """What is in the tensors was checked when units and vocabulary were built."""

    class Stub:
        def __getattr__(self, name):
            return lambda student, *_, **__: (student.sum(), student.sum(1))

    monkeypatch.setattr(functional, "backends", SimpleNamespace(choose=backends.choose, load=lambda name: Stub()))
    with Reads():
        function(**CALLS[function])


def test_counting_candidates_reads_no_data():
    with Reads():
        topk_candidate_counts(**CALLS[topk_candidate_counts])


@pytest.mark.parametrize("function", [linear_simct_loss, uld_loss, token_statistics, candidate_mass], ids=label)
def test_the_guard_sees_a_computation(function, computes_nothing):
    with pytest.raises(pytest.fail.Exception, match="it was computed"):
        function(**CALLS[function])
