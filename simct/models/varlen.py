"""Packed rows without flash-attn and without a mask: PyTorch's own variable-length attention, for forward passes without gradients.

(With gradients a layer may be computed again in the backward pass, where a model has its own attention back.)
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

NAME = "simct_varlen"


def attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D], of all sequences one after the other
    key: Tensor,  # [1, key-value heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,  # int32 [S + 1], where each sequence begins
    max_length_q: int | None = None,
    **_,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, T, heads, D]. ValueError for what PyTorch's kernel does not compute."""
    if cu_seq_lens_q is None or attention_mask is not None or softcap is not None or s_aux is not None or dropout:
        raise ValueError(
            "variable-length attention: expected boundaries, and no mask, soft cap, attention sink or dropout"
        )
    known = inspect.signature(varlen_attn).parameters
    options = {"scale": scaling} if "scale" in known else {}
    if not options and scaling not in (None, query.shape[-1] ** -0.5):
        raise ValueError(f"scaling is {scaling}: this PyTorch's variable-length attention has none of its own")
    narrow = sliding_window is not None and sliding_window < max_length_q
    if "window_size" in known:
        options["window_size"] = (sliding_window - 1 if narrow else -1, 0)
    elif narrow:
        raise ValueError("this PyTorch's variable-length attention has no window")
    else:
        options["is_causal"] = True
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    ends, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    return varlen_attn(query, key, value, *ends, *longest, **options)[None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, flash_attention_mask)  # none


def has_kernel(model: nn.Module, device: torch.device | None = None) -> bool:
    """Whether it can be tried: a model of 16 bits on a GPU, whose attention is SDPA. `device`: where the model runs, if its weights
    wait elsewhere."""
    parameter, text = next(model.parameters()), model.config.get_text_config()
    sdpa = all(getattr(config, "_attn_implementation", None) == "sdpa" for config in (model.config, text))
    kinds = set(getattr(text, "layer_types", None) or ())
    narrow = getattr(text, "sliding_window", None) is not None or "sliding_attention" in kinds
    if "chunked_attention" in kinds or narrow and "window_size" not in inspect.signature(varlen_attn).parameters:
        return False
    return sdpa and (device or parameter.device).type == "cuda" and parameter.dtype in (torch.float16, torch.bfloat16)


@contextmanager
def varlen_inside(model: nn.Module) -> Iterator[None]:
    parts = [getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", None) or ()]
    own = [(config, config._attn_implementation) for config in (model.config, *parts) if config is not None]
    model.config._attn_implementation = NAME  # and of the parts
    try:
        yield
    finally:
        for config, name in own:
            config._attn_implementation = name
