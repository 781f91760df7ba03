import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from simct.demo import ASSETS
from simct.rollouts.copied import CopiedStudent
from simct.rollouts.weights import checkpoint_weights, write_model, write_weights

INPUT = torch.arange(3, 60)[None]


def lora(model, **options):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "down_proj"], **options}))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted


@torch.no_grad()
def logits(model):
    return model.eval()(INPUT).logits


def loaded(weights, like):
    fresh = AutoModelForCausalLM.from_config(like.config)
    missing, unexpected = fresh.load_state_dict(dict(weights), strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}  # tied
    return fresh


def test_a_plain_model_gives_the_names_and_values_of_its_checkpoint(demo_student):
    stored = load_file(ASSETS / "student" / "model.safetensors")
    weights = dict(checkpoint_weights(demo_student))
    assert weights.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in weights.items())
    assert not any(tensor.requires_grad for tensor in weights.values())


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrappers_do_not_show(demo_student, wrap):
    names = [name for name, _ in checkpoint_weights(demo_student)]
    assert [name for name, _ in checkpoint_weights(wrap(demo_student))] == names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        {"trainable_token_indices": [5, 6]},
    ],
)
def test_adapters_are_merged_and_the_model_stays_as_it_was(demo_student, options):
    names = [name for name, _ in checkpoint_weights(demo_student)]
    plain = logits(demo_student)
    adapted = lora(demo_student, **options)
    before, expected = {n: p.detach().clone() for n, p in adapted.named_parameters()}, logits(adapted)
    assert not torch.allclose(expected, plain, atol=1e-2)
    weights = dict(checkpoint_weights(adapted))
    assert sorted(weights) == sorted(names)
    torch.testing.assert_close(logits(loaded(weights, demo_student)), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[n], p) for n, p in adapted.named_parameters())  # to the bit
    assert torch.equal(logits(adapted), expected)


def test_a_merged_layer_is_put_back_also_where_rounding_would_show(demo_student):
    adapted = lora(demo_student.to(torch.bfloat16))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    list(checkpoint_weights(adapted))
    assert all(torch.equal(before[n], p) for n, p in adapted.named_parameters())


def test_a_head_trained_apart_from_its_embedding_is_refused(demo_student):
    demo_student.lm_head.weight = torch.nn.Parameter(demo_student.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="lm_head.weight of Gemma2ForCausalLM is not the embedding"):
        list(checkpoint_weights(demo_student))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_an_adapter_on_a_tied_head_is_refused(demo_student):
    with pytest.raises(ValueError, match="lm_head has an adapter of its own"):
        list(checkpoint_weights(lora(demo_student, target_modules=["lm_head"])))


def test_what_has_no_plain_weights_is_refused(demo_student):
    peft = pytest.importorskip("peft")
    prompt = peft.get_peft_model(demo_student, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        checkpoint_weights(prompt)
    demo_student.is_quantized = True
    with pytest.raises(ValueError, match="has quantised weights"):
        checkpoint_weights(demo_student)


def test_experts_come_apart_again_as_in_their_checkpoint(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=2, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = dict(checkpoint_weights(MixtralForCausalLM.from_pretrained(tmp_path)))
    assert weights.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in weights.items())


def test_files_hold_all_weights_in_shards_of_the_size_asked_for(demo_student, tmp_path):
    weights = dict(checkpoint_weights(demo_student))
    write_weights(weights.items(), tmp_path / "sync", dtype=torch.bfloat16, shard_bytes=100_000)
    files = sorted((tmp_path / "sync").iterdir())
    assert len(files) > 3
    found = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  (no dictionary)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_a_written_model_loads_as_a_plain_one(demo_student, demo_tokenizers, tmp_path):
    adapted = lora(demo_student)
    write_model(adapted, demo_tokenizers[0], tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-4, rtol=1e-4)


def test_layers_that_are_computed_again_keep_their_names(demo_student):
    """FSDP wraps them, and the wrapper is in the names of their parameters."""
    expected = {name: value.clone() for name, value in checkpoint_weights(demo_student)}
    copied = CopiedStudent(demo_student, torch.bfloat16, lambda model: None)
    wrapped = copy.deepcopy(demo_student)
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    found = dict(checkpoint_weights(wrapped))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with torch.no_grad():
        wrapped.model.layers[0].mlp.up_proj.weight.add_(1)
    copied.update_weights(wrapped)
    ours, theirs = copied.model.model.layers[0].mlp.up_proj.weight, expected["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(ours, (theirs + 1).bfloat16())


def test_a_model_is_written_in_the_precision_that_reads_it(tmp_path, demo_student, demo_tokenizers):
    write_model(demo_student, demo_tokenizers[0], tmp_path / "half", dtype=torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    own = demo_student.state_dict()
    assert all(
        torch.equal(value, own[name].bfloat16()) for name, value in written.items() if "bfloat16" in str(value.dtype)
    )
    size = sum(file.stat().st_size for file in (tmp_path / "half").glob("*.safetensors"))
    assert size < 0.6 * 4 * sum(p.numel() for p in demo_student.parameters())
