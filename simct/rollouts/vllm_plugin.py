"""What a vLLM server takes from this package, where it is installed beside it: a way for weights that go through files, by vLLM's
own routes for changing them.

    vllm serve STUDENT ... --weight-transfer-config '{"backend": "simct-files"}'

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`).
"""

BACKEND = "simct-files"


def register() -> None:
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        known = WeightTransferEngineFactory._registry
    except (ImportError, AttributeError):
        return  # another vLLM, which must start all the same: it will not know the name, and say so
    if BACKEND not in known:  # called more than once in a process
        WeightTransferEngineFactory.register_engine(BACKEND, "simct.rollouts.vllm_files", "FileTransferEngine")
