import pytest

pytest.register_assert_rewrite("vllm_engines.engine_contract")
