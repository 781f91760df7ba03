"""The documentation builds, its links lead somewhere, its list of options is the code's, and the public types check."""

import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
import warnings
from dataclasses import fields
from importlib.util import find_spec

import pytest

from bench.record import REPOSITORY
from simct import SimCTConfig
from simct.commands.cli import COMMANDS
from simct.commands.train import RunArguments
from simct.training.groups import GROUPS, HIDDEN
from simct.training.options import INHERITED, SimCTOptions

BUILD = REPOSITORY / "docs" / "build.py"


def test_options_are_those_of_the_code():
    page = runpy.run_path(str(BUILD))["options_page"]()
    assert (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8") == page, "run docs/build.py"
    assert "| `beta` | `1.0` |" in page and page.count("\n## ") == 9
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 80 and all(len(row) == 4 for row in rows)
    assert not [row[0] for row in rows if len(row[3].rstrip(" |")) < 5], "when to change it is not said"


def test_links_lead_somewhere(tmp_path):
    functions = runpy.run_path(str(BUILD))
    assert list(functions["broken_links"]()) == []
    functions["broken_links"].__globals__["ROOT"] = tmp_path
    (tmp_path / "a.md").write_text("# One thing: two\n[x](#one-thing-two) [y](b.md) [z](a.md#three) [w](https://a.b)")
    assert [line.split(": ")[1] for line in functions["broken_links"]()] == [
        "b.md is not there",
        "a.md#three has no such heading",
    ]


def test_the_walks_of_contributing_are_the_codes():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walks = text[text.index("**Three walks**") : text.index("- New tokenizer family")]
    names = re.findall(r"`(simct[\w.]*)`", walks)
    assert len(names) >= 10
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def test_every_option_is_in_one_group():
    own = [name for group in GROUPS.values() for name in group.own]
    inherited = [name for group in GROUPS.values() for name in group.inherited]
    assert len({*own, *inherited}) == len([*own, *inherited])
    assert set(own) == {field.name for field in fields(RunArguments)} | {field.name for field in fields(SimCTOptions)}
    assert {*inherited, *HIDDEN} <= {field.name for field in fields(SimCTConfig)} - set(own)
    assert not {*inherited} & {*HIDDEN} and set(inherited) == set(INHERITED)
    defaults = {field.name: getattr(field.default, "value", field.default) for field in fields(SimCTConfig)}
    assert {name: option.default for name, option in INHERITED.items()} == {name: defaults[name] for name in INHERITED}


@pytest.mark.slow
def test_api_reference_builds(tmp_path):
    functions = runpy.run_path(str(BUILD))
    functions["main"].__globals__["OPTIONS"] = tmp_path / "options.md"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found '")  # a public name that leads nowhere
        functions["main"]([str(tmp_path / "site")])
    reference = tmp_path / "site" / "api"
    page = (reference / "simct_kernels.html").read_text(encoding="utf-8")
    assert (
        "linear_simct_loss" in page
        and "AlignedUnits" in page
        and (reference / "simct" / "training" / "trainer.html").is_file()
    )


def test_what_a_page_of_the_site_links_to_is_in_it(tmp_path):
    """The strict build stops where it is not, and needs mkdocs."""
    functions = runpy.run_path(str(BUILD))
    functions["stage"](tmp_path)
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "index.html").touch()
    missing = [
        f"{page.relative_to(tmp_path)}: {link}"
        for page in tmp_path.rglob("*.md")
        for link in functions["links"](page)
        if not (page.parent / link.partition("#")[0]).exists()
    ]
    assert not missing and (tmp_path / "bench" / "quality" / "CONTRASTS.md").is_file()


@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed (extra docs)")
def test_the_site_builds(tmp_path):
    """Strictly: a link or a heading that is not there is an error. It loads nothing from elsewhere."""
    staged = tmp_path / "staged"
    (staged / "api").mkdir(parents=True)
    (staged / "api" / "index.html").write_text("<p>API</p>")
    assert list(runpy.run_path(str(BUILD))["pages"](staged, tmp_path / "site"))
    landing = (tmp_path / "site" / "docs" / "index.html").read_text(encoding="utf-8")
    for guide in REPOSITORY.glob("docs/**/*.md"):
        page = guide.relative_to(REPOSITORY / "docs").with_suffix("")
        assert page.name == "index" or f'href="{page}/"' in landing, page
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!www\.)[^"]*"', landing)


def test_the_landing_page_ties_the_guides():
    text = (REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    guides = {str(page.relative_to(REPOSITORY / "docs")) for page in REPOSITORY.glob("docs/**/*.md")} - {"index.md"}
    assert guides <= set(re.findall(r"\]\(([^)#]+)", text))
    assert set(re.findall(r"^\| `simct (\w+)", text, re.MULTILINE)) <= set(COMMANDS)
    navigation = (REPOSITORY / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"docs/{guide}\n" in navigation for guide in guides)


@pytest.mark.slow
def test_types_of_the_public_surface(tmp_path):
    """As pyproject.toml says; and a program that uses them wrongly is told so."""
    program = tmp_path / "program.py"
    program.write_text("import simct\nfrom simct_kernels import LMHead\nsimct.TokenizerPair(1)\nLMHead(weight='x')\n")
    files = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["files"]
    command = [sys.executable, "-m", "mypy", f"--cache-dir={tmp_path / 'cache'}", *files, str(program)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert done.returncode == 1 and len(errors) == 2, done.stdout
    assert all("program.py" in line for line in errors), done.stdout
