"""What the end of the turn's unit teaches on two real models, with it as a pair of ids and as a class.

    python -m bench.real_models FOLDER
    python -m bench.end_of_turn FOLDER [--output FILE.csv]

Ten finished solutions, of functions whose headers are among FOLDER's prompts. Gemma-3-270M is the student, SmolLM2-135M-Instruct
the teacher, which reads the prompt as plain text or in its chat template. For each: both sides' probability of the end where the
solution ends, and the loss's derivative by the student's logit of its end there and at all rows before: below 0, the student
learns to end.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import TokenizerPair
from simct.pairing.endings import STOPS
from simct_kernels import AlignedUnits, LMHead, linear_simct_loss

# By the function whose header the prompt ends with.
SOLUTIONS = {
    "filter_integers": "    return [x for x in values if isinstance(x, int)]\n",
    "common": "    return sorted(set(l1) & set(l2))\n",
    "multiply": "    return abs(a % 10) * abs(b % 10)\n",
    "any_int": """    if all(type(n) is int for n in (x, y, z)):
        return x + y == z or x + z == y or y + z == x
    return False
""",
    "digits": """    product = 0
    for digit in map(int, str(n)):
        if digit % 2:
            product = (product or 1) * digit
    return product
""",
    "simplify": """    a, b = map(int, x.split('/'))
    c, d = map(int, n.split('/'))
    return a * c % (b * d) == 0
""",
    "strange_sort_list": """    numbers, result = sorted(lst), []
    while numbers:
        result.append(numbers.pop(0))
        if numbers:
            result.append(numbers.pop())
    return result
""",
    "pluck": """    even = [(value, index) for index, value in enumerate(arr) if value % 2 == 0]
    return list(min(even)) if even else []
""",
    "encode": """    vowels = {v: chr(ord(v) + 2) for v in 'aeiouAEIOU'}
    return ''.join(vowels.get(c, c) for c in message.swapcase())
""",
    "f": """    result, factorial = [], 1
    for i in range(1, n + 1):
        factorial *= i
        result.append(sum(range(1, i + 1)) if i % 2 else factorial)
    return result
""",
}
NAMES = "gemma-3-270m", "smollm2-135m-instruct"


@torch.no_grad()
def hidden_rows(model, prompt: list[int], response: list[int]) -> Tensor:
    hidden = model.get_decoder()(torch.tensor([prompt + response])).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def by_end(
    rows: Tensor, head: LMHead, teacher: Tensor, teacher_head: LMHead, units: AlignedUnits, pair
) -> tuple[float, float]:
    """The units' loss, and its derivative by a number that is added to every logit of the student's end."""
    bias = torch.zeros(len(head.weight), requires_grad=True)
    biased = LMHead(head.weight.detach(), bias, head.softcap, head.scale)
    loss = linear_simct_loss(rows, biased, teacher, teacher_head, units, pair.shared)
    return loss.item(), torch.autograd.grad(loss, bias)[0][pair.end_pair[0]].item()


def measure(folder: Path):
    """The rows, one by one."""
    tokenizer, teacher_tokenizer = (AutoTokenizer.from_pretrained(folder / name) for name in NAMES)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval() for name in NAMES
    )
    head, teacher_head = LMHead.from_model(student), LMHead.from_model(teacher)
    options = dict(
        student_generation_config=student.generation_config,
        teacher_generation_config=teacher.generation_config,
        student_vocabulary_size=len(head.weight),
    )
    pairs = {stop: TokenizerPair(tokenizer, teacher_tokenizer, stop=stop, **options) for stop in STOPS}
    pair = pairs["pair"]
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text("utf-8").splitlines()]
    for name, solution in SOLUTIONS.items():
        prompt = next(prompt for prompt in prompts if f"def {name}(" in prompt)
        (ours,) = pair.encode_student([solution])
        (theirs,) = pair.encode_teacher([ours])
        rows = hidden_rows(student, tokenizer(prompt).input_ids, ours)
        forms = {"text": prompt}
        if teacher_tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            forms["chat"] = teacher_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for form, text in forms.items():
            teacher_rows = hidden_rows(teacher, teacher_tokenizer(text, add_special_tokens=False).input_ids, theirs)
            last = head.logits(rows[-1:])[0].softmax(0), teacher_head.logits(teacher_rows[-1:])[0].softmax(0)
            for stop in STOPS:
                units = pairs[stop].align(ours, theirs)
                ends = units.student_start == len(ours) - 1
                read = rows, head, teacher_rows, teacher_head
                loss, derivative = by_end(*read, units.select(ends), pairs[stop])
                ids = pair.stop_ids if stop == "class" else [(end,) for end in pair.end_pair]
                masses = [side[list(wanted)].sum().item() for side, wanted in zip(last, ids, strict=True)]
                yield {
                    "function": name, "teacher_reads": form, "stop": stop,
                    "student_mass": f"{masses[0]:.3g}", "teacher_mass": f"{masses[1]:.3g}", "loss": f"{loss:.4f}",
                    "derivative": f"{derivative:.4g}",
                    "derivative_before": f"{by_end(*read, units.select(~ends), pairs[stop])[1]:.4g}",
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that of bench.real_models")
    parser.add_argument("--output", type=Path, help="a CSV of the rows")
    arguments = parser.parse_args()
    rows = list(measure(arguments.folder))
    with arguments.output.open("w", newline="") if arguments.output else sys.stdout as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
