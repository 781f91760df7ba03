"""Models whose files do not hold all of their weights."""

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from simct.models.checks import check_head, nonfinite_weights
from simct.models.loading import load_model

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
UP = "model.layers.1.mlp.up_proj.weight"


def saved(folder, change, tied=True):
    """A model's folder, with a change made to its tensors."""
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("side", ["student", "teacher 'large'"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop(UP), rf"{UP} \(missing\)"),
        (lambda weights: weights.update({UP: weights[UP][:4].clone()}), rf"{UP} \(\(4, 16\) for \(32, 16\)\)"),
        (lambda weights: weights.pop("model.embed_tokens.weight"), r"model\.embed_tokens\.weight \(missing\)"),
    ],
    ids=["missing", "another shape", "both of a tied pair"],
)
def test_weights_that_are_missing_are_named(tmp_path, side, change, named):
    folder = saved(tmp_path, change)
    with pytest.raises(
        ValueError, match=f"{side} .* has weights that its files do not give, random ones: {named}; expected"
    ):
        load_model(folder, side)
    with pytest.warns(UserWarning, match=named):
        load_model(folder, side, allow_missing_weights=True)


def test_a_head_that_is_tied_is_not_missing(tmp_path, recwarn):
    folder = saved(tmp_path / "tied", lambda weights: None)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    load_model(folder, "student")
    assert not [w for w in recwarn if "random" in str(w.message)]
    with pytest.raises(ValueError, match=r"lm_head\.weight \(missing\)"):
        load_model(saved(tmp_path / "untied", lambda weights: weights.pop("lm_head.weight"), tied=False), "student")


def test_many_are_not_all_listed(tmp_path):
    def all_but_the_norm(weights):
        for name in [name for name in weights if name != "model.norm.weight"]:
            del weights[name]

    with pytest.raises(ValueError, match=r"(\S+ \(missing\)(, )?){5} and 14 more; expected"):
        load_model(saved(tmp_path, all_but_the_norm), "student")


def test_a_model_that_is_no_number_is_named_as_that():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert nonfinite_weights(model) == []
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 5] = float("nan")
    model.model.norm.weight.data[0] = float("-inf")
    assert nonfinite_weights(model) == [UP, "model.norm.weight"]
    with pytest.raises(
        ValueError, match=f"teacher LlamaForCausalLM has logits that are no finite numbers .such weights: {UP}"
    ):
        check_head(model, "teacher")
