"""The dimensions of the paper's models, from their own config.json files: for models on the meta device."""

from transformers import Gemma2Config, Phi3Config, Qwen2Config

GEMMA_2_2B = Gemma2Config(
    architectures=["Gemma2ForCausalLM"],
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    max_position_embeddings=8192,
    sliding_window=4096,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    dtype="bfloat16",
)
QWEN_2_5_7B = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32_768,
    use_sliding_window=False,
    tie_word_embeddings=False,
    bos_token_id=151_643,
    eos_token_id=151_645,
    dtype="bfloat16",
)
PHI_4_MINI = Phi3Config(
    architectures=["Phi3ForCausalLM"],
    vocab_size=200_064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=24,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    original_max_position_embeddings=4096,
    sliding_window=262_144,
    # The factors' values are not the model's own: they change no size.
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * 48,
        "long_factor": [1.0] * 48,
        "original_max_position_embeddings": 4096,
    },
    tie_word_embeddings=True,
    bos_token_id=199_999,
    eos_token_id=199_999,
    pad_token_id=199_999,
    dtype="bfloat16",
)


def _like(config, **sizes):
    """The same architecture in another size."""
    return type(config)(**{**config.to_dict(), "layer_types": None, **sizes})


GEMMA_2_9B = _like(
    GEMMA_2_2B,
    hidden_size=3584,
    intermediate_size=14_336,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
)
QWEN_2_5_32B = _like(
    QWEN_2_5_7B,
    hidden_size=5120,
    intermediate_size=27_648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
)
QWEN_2_5_72B = _like(
    QWEN_2_5_7B,
    hidden_size=8192,
    intermediate_size=29_568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
# What the models' own cards and files count.
PARAMETERS = {"gemma-2-2b": 2_614_341_888, "qwen2.5-7b": 7_615_616_512, "phi-4-mini": 3_836_021_760}
CONFIGS = {"gemma-2-2b": GEMMA_2_2B, "qwen2.5-7b": QWEN_2_5_7B, "phi-4-mini": PHI_4_MINI}
