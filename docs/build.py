"""`python docs/build.py FOLDER`: the documentation as pages in FOLDER, with the API reference from the docstrings in FOLDER/api.

Also writes docs/options.md from the options' own texts, and stops at a link between the Markdown files that leads nowhere. Guides
become pages where mkdocs-material is installed (extra `docs`).
"""

import argparse
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
OPTIONS = ROOT / "docs" / "options.md"
MODULES = (
    "simct",
    "simct.training.config",
    "simct.training.options",
    "simct.pairing.padded",
    "simct.pairing.pair",
    "simct.rollouts.protocol",
    "simct.teachers.served",
    "simct.teachers.local",
    "simct.training.trainer",
    "simct_kernels",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    logging.basicConfig(level=logging.WARNING)  # mkdocs says by it what is wrong
    OPTIONS.write_text(options_page(), encoding="utf-8")
    if broken := list(broken_links()):
        sys.exit("\n".join(broken))
    with TemporaryDirectory() as staged:
        made = [*api(Path(staged) / "api"), *pages(Path(staged), folder)]
    print(
        f"wrote {OPTIONS} and {', '.join(made)}" if made else f"wrote {OPTIONS}; for pages: pip install 'simct[docs]'"
    )


def api(folder: Path) -> Iterator[str]:
    """The API reference of the installed packages."""
    import pdoc

    import simct

    for name in simct.__all__:  # pdoc sees what is there already, not what is imported when it is asked for
        setattr(simct, name, getattr(simct, name))
    pdoc.render.configure(docformat="google", show_source=True)
    pdoc.pdoc(*MODULES, output_directory=folder)
    yield "the API reference"


def pages(staged: Path, folder: Path) -> Iterator[str]:
    """The guides, by mkdocs, from a copy that lies as the repository does; without mkdocs-material what is staged alone."""
    if find_spec("material") is None:
        shutil.copytree(staged, folder, dirs_exist_ok=True)
        return
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    stage(staged)
    config = load_config(str(ROOT / "docs" / "mkdocs.yml"), docs_dir=str(staged), site_dir=str(folder), strict=True)
    build(config)
    yield f"{folder}/docs/index.html"


def stage(staged: Path) -> None:
    """The guides, the results and the examples, and after them whatever file of the repository a staged page links to."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, staged)
    for name in ("docs", "bench/results", "examples"):
        shutil.copytree(
            ROOT / name, staged / name, ignore=shutil.ignore_patterns("*.yml", "__pycache__", "build.py", "figures.py")
        )
    to_read = list(staged.rglob("*.md"))
    while to_read:
        page = to_read.pop()
        for name in {link.partition("#")[0] for link in links(page)} - {""}:
            place = Path(os.path.normpath(page.parent / name))
            source = ROOT / place.relative_to(staged)
            if place.exists() or not source.is_file():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)
            to_read += [place] if place.suffix == ".md" else []


def options_page() -> str:
    """The options that this package adds to `TrainingArguments`, and those of it that belong to their subjects, as in help."""
    from simct.commands.train_help import own_options
    from simct.training.groups import GROUPS

    lines = [
        "# Options of a run",
        "",
        "Options of `simct train` (`--name value`) and keys of its `--config` file; all but those of the run's files and models",
        "are fields of `SimCTConfig`. Everything else of",
        "[`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) is there too.",
        "`simct train --help GROUP` prints the same; the page is written from it by `docs/build.py`.",
    ]
    known = own_options()
    for group in GROUPS.values():
        lines += [
            "",
            f"## {group.title}",
            "",
            "| option | default | what it is | when to change it |",
            "|---|---|---|---|",
        ]
        for name in (*group.own, *group.inherited):
            default, what, when = known[name]
            shown = "" if default is None else f"`{default}`"
            lines.append(f"| `{name}` | {shown} | {what} | {when} |")
    return "\n".join(lines) + "\n"


def broken_links() -> Iterator[str]:
    """Relative links of the Markdown files to a file or a heading that is not there."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")):
        for link in links(page):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists():
                yield f"{page.relative_to(ROOT)}: {link} is not there"
            elif heading and heading not in headings(target):
                yield f"{page.relative_to(ROOT)}: {link} has no such heading"


def links(page: Path) -> list[str]:
    """To places beside the page, not to the network's."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


def headings(page: Path) -> set[str]:
    """As GitHub names them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


if __name__ == "__main__":
    main()
