"""What a loss reads, and what it refuses to read."""

import dataclasses
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss, simct_loss

from .cases import make_problem, relative_error


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def units(**changes) -> AlignedUnits:
    """A single unit, then one of two student tokens and one of two teacher tokens; a free row at each end."""
    fields = {
        "student_start": ids(0, 1, 3),
        "student_length": ids(1, 2, 1),
        "teacher_start": ids(1, 2, 3),
        "teacher_length": ids(1, 1, 2),
        "student_tokens": ids(4, 5, 6, 7, 8),
        "teacher_tokens": ids(0, 1, 2, 3, 4),
        "left_out": torch.tensor([[0, 1], [2, 0], [2, 1]]),
    }
    return AlignedUnits(**{**fields, **changes})


def refuses(pattern: str):
    return pytest.raises(ValueError, match=re.escape(pattern))


@pytest.mark.parametrize(
    "student_ids,teacher_ids,message",
    [
        (ids(1, 1), ids(0, 2), "student_ids must be ascending without duplicates, got 1"),
        (ids(2, 1), ids(0, 2), "student_ids must be ascending without duplicates, got 1"),
        (ids(1, 2), ids(3, 3), "teacher_ids must not repeat an id, got 3"),
        (ids(-1, 2), ids(3, 4), "student_ids must be at least 0, got -1"),
        (ids(1, 2), ids(3, -4), "teacher_ids must be at least 0, got -4"),
        (ids(1, 2), ids(3), "teacher_ids must be as long as student_ids (2), got 1"),
        (ids(1, 2).int(), ids(3, 4), "student_ids must be int64, got torch.int32"),
        (ids(1, 2)[None], ids(3, 4), "student_ids must have one dimension, got shape [1, 2]"),
        (ids(), ids(), "student_ids is empty"),
        ([1], ids(1), "student_ids must be a tensor, got list"),
        (ids(1), ids(1).to("meta"), "teacher_ids is on meta, but student_ids is on cpu"),
    ],
)
def test_shared_vocabulary_refuses(student_ids, teacher_ids, message):
    with refuses(message):
        SharedVocabulary(student_ids, teacher_ids)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"student_length": ids(1, 0, 1)}, "student_length must be at least 1, got 0"),
        ({"teacher_start": ids(-1, 2, 3)}, "teacher_start must be at least 0, got -1"),
        ({"student_length": ids(1, 2, 3)}, "student_start + student_length must not pass the 5 rows"),
        ({"student_length": ids(1, 3, 1)}, "student_start starts inside another unit: units must not overlap, got 3"),
        ({"teacher_start": ids(3, 2, 3)}, "teacher_start starts inside another unit"),
        ({"teacher_length": ids(1, 1)}, "teacher_length must be as long as student_start (3), got 2"),
        ({"student_tokens": ids(4, 5, -100, 7, 8)}, "student_tokens must be at least 0, got -100"),
        ({"teacher_tokens": ids(0, 1, 2, 3, 4).float()}, "teacher_tokens must be int64, got torch.float32"),
        ({"left_out": ids(1, 2)}, "left_out must be int64 [E, 2], got torch.int64 [2]"),
        ({"left_out": torch.tensor([[3, 0]])}, "left_out must name one of the 3 units in its first column, got 3"),
        ({"left_out": torch.tensor([[1, 0], [0, 0]])}, "left_out must be sorted by unit, got 0"),
        ({"left_out": torch.tensor([[1, -1]])}, "left_out must be at least 0, got -1"),
    ],
)
def test_aligned_units_refuse(changes, message):
    with refuses(message):
        units(**changes)


def test_coverage():
    assert (units().student_covered, units().teacher_covered) == (4 / 5, 4 / 5)
    empty = AlignedUnits(*[ids()] * 6)
    assert (empty.student_covered, empty.teacher_covered, len(empty)) == (1.0, 1.0, 0)


def test_continuation_is_all_but_single_shared_pairs():
    shared = SharedVocabulary(ids(4, 5, 7), ids(1, 2, 3))
    assert units().has_continuation(shared).tolist() == [False, True, True]
    not_a_pair = SharedVocabulary(ids(4, 5, 7), ids(2, 1, 3))
    assert units().has_continuation(not_a_pair).tolist() == [True, True, True]
    unknown = SharedVocabulary(ids(0), ids(1))  # beyond the last shared id
    assert units().has_continuation(unknown).tolist() == [True, True, True]


def test_select_keeps_rows_and_moves_left_out():
    some = units().select(torch.tensor([True, False, True]))
    assert some.student_start.tolist() == [0, 3] and some.student_tokens is not None
    assert some.left_out.tolist() == [[0, 1], [1, 0], [1, 1]]
    turned = units().select(ids(2, 0))
    assert turned.student_start.tolist() == [3, 0]
    assert turned.left_out.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert len(units().single()) == 1 and units().single().left_out.tolist() == [[0, 1]]
    assert units(left_out=None).single().left_out is None


def test_concatenate_shifts_rows():
    packed = AlignedUnits.concatenate([units(), units(), units()])
    assert packed.student_start.tolist() == [0, 1, 3, 5, 6, 8, 10, 11, 13]
    assert packed.left_out[:, 0].tolist() == [0, 2, 2, 3, 5, 5, 6, 8, 8]
    assert len(packed.teacher_tokens) == 15
    with refuses("parts is empty"):
        AlignedUnits.concatenate([])
    with refuses("parts[1].left_out is None"):
        AlignedUnits.concatenate([units(), units(left_out=None)])


def test_packing_samples_adds_their_losses():
    first, second = make_problem(seed=1), make_problem(seed=2)
    shared = first.shared
    student = [problem.logits()[0].detach() for problem in (first, second)]
    teacher = [problem.logits()[1] for problem in (first, second)]
    packed = AlignedUnits.concatenate([first.units, second.units])
    together = simct_loss(torch.cat(student), torch.cat(teacher), packed, shared, candidates="disjoint")
    apart = [
        simct_loss(student[i], teacher[i], p.units, shared, candidates="disjoint")
        for i, p in enumerate((first, second))
    ]
    assert relative_error(together, sum(apart)) < 1e-12


def test_subclasses_survive():
    @dataclasses.dataclass(frozen=True)
    class Labelled(AlignedUnits):
        label: str = ""

    original = units()
    labelled = Labelled(**{f.name: getattr(original, f.name) for f in dataclasses.fields(AlignedUnits)}, label="a")
    for derived in (labelled.to("cpu"), labelled.single(), labelled.select(ids(1))):
        assert isinstance(derived, Labelled) and derived.label == "a"
    assert isinstance(Labelled.concatenate([labelled, labelled]), Labelled)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"weight": torch.zeros(3)}, "weight must be floating point [V, H], got torch.float32 [3]"),
        ({"weight": torch.zeros(3, 2, dtype=torch.int8)}, "a quantised head must be dequantised first"),
        ({"bias": torch.zeros(2)}, "bias must be floating point [3]"),
        ({"softcap": 0.0}, "softcap must be a positive number or None, got 0.0"),
        ({"scale": 0.0}, "scale must be a finite number other than 0, got 0.0"),
        ({"scale": float("nan")}, "scale must be a finite number other than 0, got nan"),
    ],
)
def test_head_refuses(arguments, message):
    with refuses(message):
        LMHead(**{"weight": torch.zeros(3, 2), **arguments})


@pytest.mark.parametrize(
    "options,message",
    [
        ({"beta": 1.5}, "beta must be between 0 and 1, got 1.5"),
        ({"beta": float("nan")}, "beta must be between 0 and 1, got nan"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"score": "mean"}, "score must be one of 'mean_logprob', 'sum_logprob', 'mean_logit', got 'mean'"),
        ({"candidates": "all"}, "candidates must be one of 'paper', 'disjoint', got 'all'"),
        ({"top_k": 0}, "top_k must be a positive int or None, got 0"),
        ({"teacher_mass_floor": 2.0}, "teacher_mass_floor must be between 0 and 1 or None, got 2.0"),
        ({"reduction": "batchmean"}, "reduction must be one of 'none', 'sum', 'mean', got 'batchmean'"),
        ({"backend": "cuda"}, "backend 'cuda' is not in this installation, which has 'auto'"),
        ({"chunk_rows": 0}, 'chunk_rows must be "auto" or a positive int, got 0'),
    ],
)
def test_losses_refuse_options(options, message):
    problem = make_problem()
    with refuses(message):
        linear_simct_loss(*problem.arguments(), **options)
    if "chunk_rows" not in options:
        with refuses(message):
            simct_loss(*problem.logits(), **options)


def test_losses_refuse_inputs():
    problem = make_problem()

    def refused(message: str, **changes) -> None:
        with refuses(message):
            options = {"candidates": changes.pop("candidates")} if "candidates" in changes else {}
            linear_simct_loss(*dataclasses.replace(problem, **changes).arguments(), **options)

    hidden, rows = problem.student_hidden.detach(), len(problem.units.student_tokens)
    refused(f"student_hidden has {rows - 1} rows, but units.student_tokens has {rows}", student_hidden=hidden[1:])
    refused("student_hidden has 12 columns, but student_head.weight is [83, 13]", student_hidden=hidden[:, 1:])
    refused("student_hidden must be a floating point tensor of two dimensions", student_hidden=hidden[None])
    refused("student_hidden must be a floating point tensor of two dimensions", student_hidden=hidden.long())
    refused("teacher_hidden is on meta, but units are on cpu", teacher_hidden=problem.teacher_hidden.to("meta"))
    refused("teacher_head must be an LMHead, got Tensor", teacher_head=problem.teacher_head.weight)
    largest = int(problem.shared.teacher_ids.max())
    small = LMHead(problem.teacher_head.weight[:largest])
    refused(f"shared.teacher_ids holds id {largest}, outside the {largest} ids of teacher_head", teacher_head=small)
    tokens = problem.units.student_tokens.clone()
    tokens[0] = 83
    unknown = dataclasses.replace(problem.units, student_tokens=tokens)
    refused("units.student_tokens holds id 83, outside the 83 ids of student_head", units=unknown)
    unlisted = dataclasses.replace(problem.units, left_out=None)
    refused('units.left_out is None, but candidates="disjoint" needs it', units=unlisted, candidates="disjoint")
    beyond = dataclasses.replace(problem.units, left_out=torch.tensor([[0, 37]]))
    refused("units.left_out names shared index 37, but shared has 37 pairs", units=beyond)
    refused("units must be AlignedUnits, got NoneType", units=None)
    student, teacher, aligned, shared = problem.logits()
    with refuses(f"student_logits has {rows - 1} rows"):
        simct_loss(student[1:], teacher, aligned, shared)
    with refuses("teacher_tokens holds id"):
        few = dataclasses.replace(aligned, left_out=None)
        simct_loss(student, teacher[:, : aligned.max_teacher_token], few, SharedVocabulary(ids(0), ids(0)))


def test_disjoint_without_a_continuation_needs_no_list():
    problem = make_problem([(1, 1)] * 2)
    plain = dataclasses.replace(problem.units, left_out=None)
    loss = simct_loss(*problem.logits()[:2], plain, problem.shared, candidates="disjoint")
    assert loss.equal(simct_loss(*problem.logits()))


def test_import_needs_torch_only():
    """Of what else the package is installed with, nothing: the PyTorch backend's loss runs, forward and backward."""
    others = "numpy simct triton transformers accelerate datasets yaml rich matplotlib peft".split()
    code = f"""
        import sys, warnings
        sys.modules.update(dict.fromkeys({others}))  # importing one of them fails, as where it is not installed
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch itself would use it
        import torch
        from simct_kernels import AlignedUnits, LMHead, SharedVocabulary, linear_simct_loss

        one, two = torch.tensor([1, 1, 2, 1]), torch.tensor([1, 2, 1, 1])
        rows = torch.arange(5)
        left_out = torch.tensor([[1, 0], [2, 3]])
        units = AlignedUnits(one.cumsum(0) - one, one, two.cumsum(0) - two, two, rows + 2, rows, left_out)
        shared = SharedVocabulary(torch.tensor([2, 5, 6, 7]), torch.tensor([0, 4, 7, 1]))
        student, teacher, weight, teacher_weight = (torch.randn(rows, 3) for rows in (5, 5, 9, 8))
        results = []
        for backend in ("torch", "reference"):
            leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
            heads = LMHead(leaves[1]), LMHead(teacher_weight)
            options = dict(candidates="disjoint", backend=backend)
            loss = linear_simct_loss(leaves[0], heads[0], teacher, heads[1], units, shared, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        assert sys.modules["numpy"] is None and results[0][1].any() and results[0][2].any()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def tiny_model(family: str):
    """A random model of the family, with the fields that change its logits away from their neutral values."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 67,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    mamba = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8}
    fields = {
        "llama": {},
        "gemma2": {"final_logit_softcapping": 2.0},
        "gemma3_text": {"final_logit_softcapping": 3.0},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 4.0},
        "falcon_h1": {"lm_head_multiplier": 0.3, **mamba},
        "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 16},
        "hyperclovax": {"logits_scaling": 3.0},
        "minicpm3": {
            "dim_model_base": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "nanochat": {"final_logit_softcapping": 2.0},
        "xlstm": {"output_logit_soft_cap": 2.0, "num_heads": 2},
        "vaultgemma": {"final_logit_softcapping": 2.0},
        "inkling_text": {"logits_mup_width_multiplier": 4.0},
    }[family]
    config = transformers.AutoConfig.for_model(family, **{**sizes, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=2.0)
    return model


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        "gemma3_text",
        "cohere",
        "granite",
        "falcon_h1",
        "recurrent_gemma",
        "hyperclovax",
        "minicpm3",
        "nanochat",
        "xlstm",
        "vaultgemma",
        "inkling_text",
    ],
)
def test_head_from_real_models(family):
    model = tiny_model(family)
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits[0]
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        head = LMHead.from_model(model)
        assert head.weight is model.get_output_embeddings().weight
        assert (family == "llama") == (head.scale == 1 and head.softcap is None)
        torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-5)


def stand_in(module, **config):
    config = SimpleNamespace(model_type=config.pop("model_type", "any"), **config)
    config.get_text_config = lambda: config
    return SimpleNamespace(get_output_embeddings=lambda: module, config=config)


def test_head_from_model_reads_no_other_familys_field():
    head = LMHead.from_model(stand_in(torch.nn.Linear(2, 3), model_type="mpt", logit_scale=0.5))
    assert head.scale == 1 and head.bias is not None


def test_head_from_model_multiplies_before_the_softcap():
    head = LMHead.from_model(stand_in(torch.nn.Linear(2, 3), output_multiplier=0.4, final_logit_softcapping=20.0))
    assert (head.scale, head.softcap) == (0.4, 20.0)


def test_head_from_model_drops_a_padded_vocabulary():
    head = LMHead.from_model(stand_in(torch.nn.Linear(2, 8), unpadded_vocab_size=5, logits_mup_width_multiplier=4.0))
    assert head.weight.shape == (5, 2) and head.bias.shape == (5,) and head.scale == 0.25


def test_head_from_model_refuses():
    with refuses("has no language modelling head"):
        LMHead.from_model(stand_in(None))
    adapted = torch.nn.Linear(2, 3)
    adapted.lora_A = torch.nn.Linear(2, 1, bias=False)
    with refuses("a head with more than a weight and a bias: ['lora_A.weight']"):
        LMHead.from_model(stand_in(adapted))
