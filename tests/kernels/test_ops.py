"""The custom ops: what torch checks of them, the losses under torch.compile, and sharded heads."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simct_kernels import AlignedUnits, LMHead, linear_simct_loss, ops, simct_loss, topk_simct_loss
from simct_kernels.options import LossOptions

from .cases import MIXED, make_problem, relative_error, slow
from .test_topk import serve

LOSSES = ("simct", "linear", "topk")


class Graphs:
    """A compiler that runs what it is given, and counts the ops in it."""

    def __init__(self) -> None:
        self.ops: list[Counter] = []

    def __call__(self, graph, example_inputs):
        self.ops.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward


def case(loss: str, dtype: torch.dtype = torch.float32, lengths=MIXED, **head):
    """A public loss, its arguments, and the student's tensors that get a gradient."""
    problem = make_problem(lengths, dtype=torch.float32, **head).to(dtype)
    student = (problem.student_hidden, problem.student_head.weight, problem.student_head.bias)
    if loss == "simct":
        arguments = problem.logits()
        return simct_loss, arguments, [arguments[0]]
    if loss == "linear":
        return linear_simct_loss, problem.arguments(), [t for t in student if t is not None]
    served = serve(problem, 4)
    hidden, head, _, _, units, shared = problem.arguments()
    arguments = (hidden, head, served.ids, served.logprobs, served.token_logprobs, units, shared)
    return topk_simct_loss, arguments, [t for t in student if t is not None]


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), [tensor for tensor in tensors if tensor.requires_grad]))


def captured(monkeypatch, loss, arguments, **options):
    """The op that the public function calls when it is compiled, and the op's arguments."""
    calls = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for name in ("simct_loss", "linear_simct_loss", "topk_simct_loss"):
        op = getattr(torch.ops.simct, name)

        def record(*flat, op=op):
            calls.append((op, flat))
            return op(*flat)

        monkeypatch.setattr(torch.ops.simct, name, record)
    result = loss(*arguments, **options)
    monkeypatch.undo()
    (call,) = calls
    return result, *call


@pytest.mark.parametrize(
    "loss,reduction",
    [
        ("simct", "none"),
        ("linear", "sum"),
        ("topk", "none"),
        *slow(("simct", "sum"), ("linear", "none"), ("topk", "sum")),
    ],
)
def test_opcheck(loss, reduction, monkeypatch):
    loss, arguments, students = case(loss)
    _, op, flat = captured(monkeypatch, loss, arguments, reduction=reduction)
    torch.library.opcheck(op.default, flat)
    *inputs, _, needs_grad = flat
    backward = getattr(torch.ops.simct, op.default._opname + "_backward").default
    needs_grad = [True] * len(needs_grad)
    weights = torch.linspace(0, 1, len(arguments[-2]))
    detached = [a.detach() if isinstance(a, Tensor) else a for a in inputs]
    torch.library.opcheck(backward, (*detached, weights, needs_grad))


def test_opcheck_of_the_scaling():
    arguments = torch.randn(5, 3), torch.tensor(2.0), torch.empty(5, 3, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.simct.scale_gradient.default, arguments)


@pytest.mark.parametrize("frozen", ["nothing", "head", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_ops_are_the_eager_losses(loss, dtype, reduction, frozen, monkeypatch):
    """Bit by bit, also after a second backward through the same graph, and scaled."""
    loss, arguments, students = case(loss, dtype)
    for tensor in {"nothing": [], "head": students[1:], "all": students}[frozen]:
        tensor.requires_grad_(False)
    expected = 3 * loss(*arguments, reduction=reduction)
    result, _, _ = captured(monkeypatch, loss, arguments, reduction=reduction)
    result = 3 * result
    assert result.equal(expected) and result.requires_grad == expected.requires_grad == (frozen != "all")
    if frozen != "all":
        wanted = gradients(expected, students)
        for repeat in (True, False):
            made = torch.autograd.grad(
                result.sum(), [tensor for tensor in students if tensor.requires_grad], retain_graph=repeat
            )
            assert all(a.equal(b) and a.dtype == dtype for a, b in zip(made, wanted, strict=True))


BY_UNIT = {"reduction": "none", "candidates": "disjoint"}
COMPILED = [
    ("simct", BY_UNIT),
    ("simct", {"top_k": 2}),
    ("linear", {}),
    ("linear", BY_UNIT),
    ("topk", {}),
    ("topk", {"top_k": 2}),
]
REST = [("simct", {}), ("linear", {"top_k": 2}), ("topk", BY_UNIT)]


@pytest.mark.parametrize(
    "loss,options,backend",
    [
        *((*given, "aot_eager") for given in COMPILED),
        *slow(*((*given, "aot_eager") for given in REST)),
        *slow(("linear", {}, "inductor")),  # one of the slow compiler: it sees the same one op in each
    ],
    ids=str,
)
def test_compiled_is_eager(loss, options, backend):
    loss, arguments, students = case(loss, softcap=3.0, scale=0.5)

    def step(first, *rest):
        return (loss(2 * first, *rest, **options) / 7).sum()

    expected = step(*arguments)
    result = torch.compile(step, fullgraph=True, backend=backend)(*arguments)
    assert relative_error(result, expected) < 1e-6
    for a, b in zip(gradients(result, students), gradients(expected, students), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_a_compiled_loss_is_one_op(loss):
    graphs = Graphs()
    loss, arguments, _ = case(loss)
    total, by_unit = torch.compile(loss, fullgraph=True, backend=graphs)(*arguments, return_unit_losses=True)
    assert not by_unit.requires_grad and relative_error(total, by_unit.sum()) < 1e-6
    (counts,) = graphs.ops
    assert sum(count for op, count in counts.items() if op.startswith("simct")) == 1
    assert set(counts) <= {op for op in counts if op.startswith("simct")} | {"<built-in function getitem>"}


def test_new_sizes_compile_once_more():
    """Batches of other sizes: the second compilation is the last, but for no unit, and one, which torch sees apart."""
    graphs = Graphs()
    compiled = torch.compile(linear_simct_loss, fullgraph=True, backend=graphs)
    for repeats in (1, 2, 3, 5):
        problem = make_problem(MIXED * repeats, dtype=torch.float32)
        assert compiled(*problem.arguments()).equal(linear_simct_loss(*problem.arguments()))
    assert len(graphs.ops) == 2


def test_compiled_with_a_head_made_inside():
    problem = make_problem(dtype=torch.float32)
    hidden, head, *rest = problem.arguments()

    def step(hidden, weight):
        return linear_simct_loss(hidden, LMHead(weight, None, softcap=3.0), *rest)

    assert torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, head.weight).equal(
        step(hidden, head.weight)
    )


def test_compiled_without_units():
    loss, arguments, students = case("linear", lengths=[])
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    assert result == 0 and not any(gradient.any() for gradient in gradients(result, students))


def test_compiled_under_autocast():
    loss, arguments, _ = case("linear")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments).equal(loss(*arguments))


def test_compiled_refuses_bad_arguments():
    loss, arguments, _ = case("linear")
    compiled = torch.compile(loss, backend="aot_eager")
    with pytest.raises(ValueError, match="student_hidden has 30 rows"):
        compiled(arguments[0][1:], *arguments[1:])
    units = dataclasses.replace(arguments[4], left_out=None)
    with pytest.raises(ValueError, match="units.left_out is None"):
        compiled(*arguments[:4], units, arguments[5], candidates="disjoint")


def test_units_cannot_be_made_inside():
    """Their checks read the data. A graph break, not an error, unless fullgraph is asked for."""
    loss, arguments, _ = case("linear")
    fields = {field.name: getattr(arguments[4], field.name) for field in dataclasses.fields(AlignedUnits)}

    def step(fields):
        return loss(*arguments[:4], AlignedUnits(**fields), arguments[5])

    assert torch.compile(step, backend="aot_eager")(fields).equal(loss(*arguments))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, fullgraph=True, backend="aot_eager")(fields)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_double_backward_is_refused(reduction, monkeypatch):
    loss, arguments, students = case("linear")
    result, _, _ = captured(monkeypatch, loss, arguments, reduction=reduction)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(result.sum(), students, create_graph=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments, reduction=reduction)
    first = torch.autograd.grad(compiled.sum(), students, create_graph=True)
    for gradient in first:
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            gradient.sum().backward()


def test_no_gradient_of_what_is_not_asked_for(monkeypatch):
    """The head's gradient is as large as the head: it is not made, nor are zeros of its size, where it is frozen."""
    loss, arguments, students = case("linear")
    students[1].requires_grad_(False)
    _, op, flat = captured(monkeypatch, loss, arguments)
    _, _, *made = op(*flat)
    assert [tuple(gradient.shape) for gradient in made] == [tuple(students[0].shape), (0,), tuple(students[2].shape)]
    with torch.no_grad():
        _, _, flat = captured(monkeypatch, loss, arguments)
        assert all(gradient.numel() == 0 for gradient in op(*flat)[2:])


def test_fake_tensors_need_no_data():
    """Memory planners run the ops on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = make_problem(dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        problem = dataclasses.replace(problem, student_hidden=mode.from_tensor(problem.student_hidden))
        arguments = (*problem.arguments(), LossOptions())
        loss, unit_losses = ops.linear_simct_loss(*arguments, summed=True, chunk_rows="auto", backend="torch")
    assert loss.dtype == unit_losses.dtype == torch.float32 and unit_losses.shape == (len(problem.units),)


SHARDED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from simct_kernels import LMHead, candidate_mass, linear_simct_loss, token_statistics
from tests.kernels.cases import make_problem

assert "simct_kernels.triton_backend" not in sys.modules, "importing the package imports its Triton backend"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
hidden, head, teacher_hidden, teacher_head, units, shared = make_problem(dtype=torch.float32).arguments()

def sharded(head):
    return LMHead(*(distribute_tensor(tensor.detach(), mesh, [Shard(0)]) for tensor in (head.weight, head.bias)))

def call(head=head, hidden=hidden, teacher_head=teacher_head):
    return linear_simct_loss(hidden, head, teacher_hidden, teacher_head, units, shared)

expected = call()
expected.backward()
assert call(teacher_head=sharded(teacher_head)).equal(expected)  # frozen: gathered
assert call(sharded(head)).equal(expected)
trained = sharded(head)
trained.weight.requires_grad_()
with torch.no_grad():
    assert call(trained).equal(expected)
try:
    call(trained)
    raise SystemExit("a trained DTensor head was not refused")
except ValueError as error:
    message = str(error)
    assert message.startswith("student_head.weight is a DTensor that needs a gradient"), message
    assert "weight.full_tensor(grad_placements=...)" in message
# What the message says works.
gathered = trained.weight.full_tensor(grad_placements=[Partial()])
call(LMHead(gathered, head.bias)).backward()
assert trained.weight.grad.full_tensor().equal(head.weight.grad)
statistics = token_statistics(hidden, head, units.student_tokens)
assert all(a.equal(b) for a, b in zip(token_statistics(hidden, trained, units.student_tokens), statistics, strict=True))
masses = [candidate_mass(hidden, each, units, shared, side="student") for each in (trained, head)]
assert masses[0].equal(masses[1])
try:
    call(hidden=distribute_tensor(hidden.detach(), mesh, [Replicate()]))
    raise SystemExit("DTensor hidden states were not refused")
except ValueError as error:
    assert str(error).startswith("student_hidden is a DTensor"), error
print("all done", flush=True)
os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_sharded_heads_and_an_import_that_leaves_triton_alone():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "all done\n", done.stderr[-2000:]


def test_backend_choice(monkeypatch):
    from simct_kernels import backends

    present = {"torch", "reference", "triton"}
    monkeypatch.setattr(backends, "_imports", lambda name: name in present)
    assert backends.choose("auto", "cpu") == "torch"
    assert backends.choose("auto", "cuda") == "triton"
    assert backends.choose("triton", "cpu") == "triton"
    present.remove("triton")
    assert backends.choose("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="'triton' is not in this installation, which has 'auto', 'torch', 'ref"):
        backends.choose("triton", "cuda")


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()
