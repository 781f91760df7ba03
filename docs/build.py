"""`python docs/build.py FOLDER`: the API reference of the installed packages, from their docstrings, as HTML pages in FOLDER.

Also writes docs/options.md from `SimCTConfig`, and stops at a link between the Markdown files that leads nowhere.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONS = ROOT / "docs" / "options.md"
MODULES = (
    "simct",
    "simct.training.config",
    "simct.pairing.padded",
    "simct.pairing.pair",
    "simct.rollouts.protocol",
    "simct.teachers.served",
    "simct.teachers.local",
    "simct.training.trainer",
    "simct_kernels",
)
SECTIONS = {  # the first option of each: the order is that of SimCTConfig
    "learning_rate": "Optimisation",
    "max_new_tokens": "Rollouts",
    "prompt_format": "Prompts",
    "max_tokens_per_batch": "Memory and speed",
    "beta": "Objective",
    "teacher_url": "A teacher behind a server",
    "eval_num_generations": "Evaluation",
    "model_init_kwargs": "Models given as paths",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    OPTIONS.write_text(options_page(), encoding="utf-8")
    if broken := list(broken_links()):
        sys.exit("\n".join(broken))
    import pdoc

    pdoc.render.configure(docformat="google", show_source=True)
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"wrote {OPTIONS} and {folder}/index.html")


def options_page() -> str:
    """Every option of `SimCTConfig` that it adds to `transformers.TrainingArguments`, or whose default it changes."""
    from simct import SimCTConfig

    lines = [
        "# Options of a run",
        "",
        "Fields of `SimCTConfig`, options of `simct train` (`--name value`), keys of its `--config` file. Everything else of",
        "[`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) is there too.",
        "Written by `docs/build.py` from [simct/training/config.py](../simct/training/config.py).",
    ]
    for field in fields(SimCTConfig):
        if field.name not in SimCTConfig.__annotations__:
            continue
        if title := SECTIONS.get(field.name):
            lines += ["", f"## {title}", "", "| option | default | |", "|---|---|---|"]
        text = field.metadata["help"].replace("|", r"\|")
        lines.append(f"| `{field.name}` | `{field.default}` | {text} |")
    return "\n".join(lines) + "\n"


def broken_links() -> Iterator[str]:
    """Relative links of the Markdown files to a file or a heading that is not there."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists():
                yield f"{page.relative_to(ROOT)}: {link} is not there"
            elif heading and heading not in headings(target):
                yield f"{page.relative_to(ROOT)}: {link} has no such heading"


def headings(page: Path) -> set[str]:
    """As GitHub names them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


if __name__ == "__main__":
    main()
