"""What a real vLLM answered to `REQUESTS` (demo teacher in float32, `--max-logprobs 64 --max-model-len 256`), and whether another
server answers the same.

`SIMCT_RECORD=1 pytest -m vllm tests/vllm_engines/test_served_teacher.py -k recorded` writes the file anew.
"""

import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "recorded" / "vllm-0.32-answers.json"
LIMIT, CONTEXT = 64, 256
TEXT = [1022, 272, 498, 302, 290, 1018, 14, 376, 708, 16]  # token ids of an ordinary sentence
SCORE = {"model": "teacher", "prompt": TEXT, "prompt_logprobs": 3, "max_tokens": 1, "temperature": 1.0}
REQUESTS = [
    ("/v1/completions", SCORE),
    ("/v1/completions", {**SCORE, "prompt_logprobs": 0}),
    ("/v1/completions", {**SCORE, "prompt_logprobs": LIMIT}),
    ("/v1/completions", {**SCORE, "prompt_logprobs": LIMIT + 1}),
    ("/v1/completions", {**SCORE, "model": "other"}),
    ("/v1/completions", {**SCORE, "prompt": [5, 100, 3072]}),
    ("/v1/completions", {**SCORE, "prompt": [5] * CONTEXT}),
    ("/v1/completions", {**SCORE, "prompt": [5] * (CONTEXT + 44)}),
    ("/v1/completions", {**SCORE, "max_tokens": 0}),
    ("/tokenize", {"model": "teacher", "prompt": "def f(x):  return x", "add_special_tokens": False}),
    ("/v1/models", None),
    ("/generate", {}),
]
# Of a moment, of the generated token, or of parts that no client reads.
UNREAD = (
    *(
        "id",
        "created",
        "permission",
        "system_fingerprint",
        "text",
        "finish_reason",
        "stop_reason",
        "root",
        "routed_experts",
    ),
    *(
        "service_tier",
        "kv_transfer_params",
        "ec_transfer_params",
        "metrics",
        "prompt_tokens_details",
        "completion_tokens_details",
    ),
)


def read():
    return json.loads(PATH.read_text("utf-8"))


def assert_same(ours, theirs, where="answer"):
    """Keys, ids and words equal; log-probabilities to 1e-3, and ranks to what that changes."""
    if isinstance(theirs, dict):
        ours, theirs = ({k: v for k, v in side.items() if k not in UNREAD} for side in (ours, theirs))
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif where.endswith(".logprob"):
        assert ours == pytest.approx(theirs, abs=1e-3), where
    elif where.endswith(".rank"):
        assert abs(ours - theirs) <= 0.01 * theirs, where
    elif not where.endswith(".decoded_token") or "\N{REPLACEMENT CHARACTER}" not in ours + theirs:
        assert ours == theirs, where
