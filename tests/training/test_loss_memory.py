"""What the dry run says of a loss against what a call of it holds, at the sizes of real pairs."""

from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import CUDA
from pretended_run import launches_left_out, run_loss_backward

from bench.cases import GEMMA, QWEN, make_shared, make_units
from bench.cost import ONE_VOCABULARY, count_linear, worked_example
from bench.suites import pair
from simct.training.loss_memory import loss_bytes, shared_rows_bytes
from simct_kernels import LMHead, topk_simct_loss


def model(size, trained: bool):
    weight = torch.empty(*size, dtype=torch.bfloat16, device="meta", requires_grad=trained)
    return SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight))


@pytest.mark.parametrize(
    ("rows", "score"),
    [
        (1024, "mean_logprob"),
        (8192, "mean_logprob"),
        (16_384, "mean_logprob"),
        ("one vocabulary", "mean_logprob"),
        (1024, "mean_logit"),
        (7178, "mean_logit"),
        (16_384, "mean_logit"),
    ],
)
def test_a_local_teachers_loss(rows, score):
    if torch.cuda.is_available():
        pytest.skip("a GPU is pretended where there is none")
    case = ONE_VOCABULARY if rows == "one vocabulary" else pair(GEMMA, QWEN, 97_675, rows)
    shared = make_shared(case)
    units = worked_example() if rows == 8192 else make_units(case, shared)
    with launches_left_out():
        counted = count_linear(case, units, shared, score=score)[0].peak
    sides = [(side.vocabulary, side.width) for side in (case.student, case.teacher)]
    student, teacher = (model(size, trained) for size, trained in zip(sides, (True, False), strict=True))
    told = loss_bytes(
        student, teacher, len(units.student_tokens), torch.bfloat16, len(shared), None, "cuda", "simct", score
    )
    kept = shared_rows_bytes(teacher, len(shared), case.student.vocabulary, "simct")
    assert told + kept == pytest.approx(counted, rel=0.1)


def test_a_served_teachers_loss(gpu):
    units, shared = worked_example(), make_shared(pair(GEMMA, QWEN, 97_675, 8192))
    size = GEMMA.vocabulary, GEMMA.width

    def on_gpu(*shape, dtype=torch.bfloat16, **options):
        return torch.empty(shape, dtype=dtype, device=CUDA, **options)

    rows, theirs = len(units.student_tokens), len(units.teacher_tokens)
    hidden, weight = on_gpu(rows, size[1], requires_grad=True), on_gpu(*size, requires_grad=True)
    served = (
        on_gpu(theirs, 64, dtype=torch.int64),
        *(on_gpu(*n, dtype=torch.float32) for n in ((theirs, 64), (theirs,))),
    )
    units, shared = units.to(CUDA), shared.to(CUDA)
    before = gpu.peak = gpu.held()
    with launches_left_out():
        run_loss_backward(topk_simct_loss(hidden, LMHead(weight, softcap=30.0), *served, units, shared))
    told = loss_bytes(model(size, True), None, rows, torch.bfloat16, None, None, "cuda", "simct")
    assert told == pytest.approx(gpu.peak - before, rel=0.1)
