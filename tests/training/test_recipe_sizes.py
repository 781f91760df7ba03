"""The dry run of every recipe against what its step holds, on a pretended GPU: models of real widths and few layers, the recipe's
own lengths, budget and options, two micro-batches to a step."""

import pytest
from pretended_run import models, two_steps
from real_configs import CONFIGS
from transformers import AutoConfig

from simct.commands.recipe import find_recipe, list_recipes, read_options
from simct.demo import ASSETS
from simct.training.defaults import numbers_of
from simct.training.memory import PHASES, estimate

RECIPES = [name for name in list_recipes() if name.split("/")[1].startswith("distil")]
# Autograd's own backward, of the layers, is not to be had on a pretended GPU: `student` is held to a count in test_memory.
COUNTED = ("rollout", "teacher", "loss")
LEFT_OUT = (
    "student",
    "teacher",
    "data",
    "output_dir",
    "use_cpu",
    "num_train_epochs",
    "max_steps",
    "save_steps",
    "save_strategy",
)


def sides(name):
    """The configurations of a recipe's student and teacher."""
    if name.startswith("demo"):
        return tuple(AutoConfig.from_pretrained(ASSETS / side) for side in ("student", "teacher"))
    teacher, student = name.split("/")[0].split("_")
    return CONFIGS[student], CONFIGS[teacher]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_what_its_dry_run_says(name, gpu, tmp_path):
    options = {key: value for key, value in read_options(find_recipe(name)).items() if key not in LEFT_OUT}
    if options.get("optim", "").endswith("8bit"):  # its kernels want a GPU; its states are in test_memory
        options["optim"] = "adamw_torch_fused"
    tokens = options.pop("max_new_tokens")
    rows = min(options.pop("per_device_train_batch_size"), 2 if tokens > 1000 else 32)
    student, teacher = models(gpu, sides(name), 2, attention=(None, None))
    trainer, seen = two_steps(
        gpu, tmp_path, student, teacher, tokens=tokens, rows=rows, copied=True, **{"bf16": False, **options}
    )
    prompt = max(len(sample.student_prompt) for sample in trainer._drawn)
    numbers = numbers_of(trainer.args, student, prompt, len(trainer.shared))
    # A budget is filled by sequences of many lengths; these have one.
    filled = max(part.packed.input_ids.numel() for inputs in trainer._inputs for part in inputs["parts"])
    assert filled <= numbers["batch_tokens"]
    memory = estimate(student, teacher, **{**numbers, "batch_tokens": filled})
    # Sampling itself is left out here.
    told = {phase: memory.phase(phase) - (memory.kv_cache if phase == "rollout" else 0) for phase in PHASES}
    peak = max(COUNTED, key=seen.held.get)
    for phase in (
        [peak] if name.startswith("demo") else COUNTED
    ):  # of the demo's small models temporaries are much, but at the peak
        assert seen.held[phase] == pytest.approx(told[phase], rel=0.1), phase
    assert max(seen.held.values()) <= 1.1 * max(told.values())
