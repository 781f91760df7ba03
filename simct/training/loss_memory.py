"""What the losses hold besides the models: counted after the kernels' own allocations, and held to a count of them by a test."""

import torch
from torch import nn

from simct.training.config import PREFIX_OBJECTIVES
from simct.training.objectives import WHOLE_ROWS
from simct_kernels.torch_backend.plan import _AUTO_ELEMENTS, _AUTO_ELEMENTS_ELSEWHERE
from simct_kernels.torch_backend.rows import row_size

# As simct_kernels.triton_backend.kept, which cannot be imported where there is no Triton.
KEPT_BYTES, RANGE_BYTES = 5 << 28, 4 << 25
LONGER = 2.5  # tokens of a longer unit
SINGLE = 0.75  # share of a response's tokens in one-to-one units: 0.53 to 0.96 of the paper's pairs

_TABLE_BYTES = (
    50,
    160,
)  # PrefixTables, by token of the student and of the teacher: of Gemma 3 and SmolLM2, either way round


def loss_bytes(
    student: nn.Module,
    teacher: nn.Module | None,
    rows: int,
    compute: torch.dtype,
    shared_tokens: int | None,
    chunk_rows: int | None,
    device_type: str,
    objective: str,
    score: str = "mean_logprob",
) -> int:
    """What a loss holds at once, without the teacher's `shared_rows_bytes`."""
    ours = student.get_output_embeddings().weight
    theirs = None if teacher is None else teacher.get_output_embeddings().weight
    limit = _AUTO_ELEMENTS.get(device_type, _AUTO_ELEMENTS_ELSEWHERE)
    if theirs is None:  # `topk_simct_loss`: no head of the teacher, no shared rows kept
        chunk = min((chunk_rows or max(1, limit // len(ours))), rows) * len(ours)
        made = ours.numel() if ours.requires_grad else 0  # the head's gradient, added up in float32 and then rounded
        return rows * ours.shape[1] * (4 + compute.itemsize) + 4 * made + max(8 * chunk, made * compute.itemsize)
    columns = max(len(ours), len(theirs))
    if objective != "simct":
        counted, held = WHOLE_ROWS[objective]
        chunk = min((chunk_rows or max(1, limit // (counted * columns))), rows) * columns
        sizes = zip(_TABLE_BYTES, (len(ours), len(theirs)), strict=True)
        tables = sum(size * count for size, count in sizes) if objective in PREFIX_OBJECTIVES else 0
        return 4 * (held * chunk + (ours.numel() if ours.requires_grad else 0) + rows * ours.shape[1]) + tables
    shared = shared_tokens or min(len(ours), len(theirs))
    if device_type == "cpu":
        chunk = min((chunk_rows or max(1, limit // columns)), rows) * columns
        trained = ours.numel() + shared * ours.shape[1] if ours.requires_grad else 0
        kept = shared * ours.shape[1] * compute.itemsize
        return 3 * 4 * chunk + 4 * trained + 4 * rows * ours.shape[1] + kept
    chunk = chunk_rows or max(1, limit // columns)
    return _of_kept_tiles(ours, len(theirs), rows, compute, shared, chunk, limit, normalised=score != "mean_logit")


def _of_kept_tiles(
    ours, teacher_columns: int, rows: int, compute, shared: int, chunk: int, limit: int, normalised: bool
) -> int:
    """Both sides' float32 logits of a chunk; then, in the operands' precision, the gradients by the logits of all rows of a kind,
    from which the last products make the gradient of the head in its own precision, a range at a time."""
    columns, hidden = ours.shape
    one_vocabulary = shared == columns == teacher_columns
    single = rows if one_vocabulary else int(SINGLE * rows)
    kinds = [(single, row_size(shared)), (rows - single, row_size(columns))]
    if not normalised:  # a mean of logits reads no row whole: of a longer unit the first one is read as a single unit's
        kinds = [(single + int((rows - single) / LONGER), row_size(shared)), (0, row_size(columns))]
    during, after = [], []
    for count, width in kinds:
        tiles, total = count * width * compute.itemsize, 4 * width * hidden if ours.requires_grad else 0
        many = tiles > max(KEPT_BYTES, total)  # then products are added up in float32, and the tiles used again
        during.append(KEPT_BYTES // 2 + total if many else tiles)
        after.append(0 if not ours.requires_grad else total if many else tiles)
    logits = 2 * 4 * max(min(chunk * max(columns, teacher_columns), limit, count * width) for count, width in kinds)
    # The student's shared rows go when all units that read them have their gradient; those of whole rows come last.
    copied = 0 if one_vocabulary else shared * hidden * compute.itemsize
    forward = logits + max(during[0] + copied, after[0] + during[1])
    ranges = 2 * min(RANGE_BYTES, 4 * columns * hidden)
    backward = sum(after) + columns * hidden * compute.itemsize + ranges if ours.requires_grad else 0
    entries = (4 + 8 + 8) * (rows - single) if ours.requires_grad else 0  # continuations' own: numbers, ids, rows
    return rows * hidden * (4 + compute.itemsize) + entries + max(forward, backward)


def shared_rows_bytes(teacher: nn.Module | None, shared_tokens: int | None, student_tokens: int, objective: str) -> int:
    """The copy of a frozen head's rows of the shared vocabulary, which is kept from the first step on. One vocabulary is read where
    it lies."""
    if teacher is None or objective != "simct":
        return 0
    theirs = teacher.get_output_embeddings().weight
    shared = shared_tokens or min(len(theirs), student_tokens)
    return 0 if shared == len(theirs) == student_tokens else row_size(shared) * theirs.shape[1] * theirs.element_size()
