"""The documentation builds, its links lead somewhere, and its list of options is that of the code."""

import runpy

from bench.record import REPOSITORY

BUILD = REPOSITORY / "docs" / "build.py"


def test_options_are_those_of_the_code():
    page = runpy.run_path(str(BUILD))["options_page"]()
    assert (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8") == page, "run docs/build.py"
    assert "| `beta` | `1.0` |" in page and page.count("\n## ") == 7


def test_links_lead_somewhere(tmp_path):
    functions = runpy.run_path(str(BUILD))
    assert list(functions["broken_links"]()) == []
    functions["broken_links"].__globals__["ROOT"] = tmp_path
    (tmp_path / "a.md").write_text("# One thing: two\n[x](#one-thing-two) [y](b.md) [z](a.md#three) [w](https://a.b)")
    assert [line.split(": ")[1] for line in functions["broken_links"]()] == [
        "b.md is not there",
        "a.md#three has no such heading",
    ]


def test_api_reference_builds(tmp_path):
    functions = runpy.run_path(str(BUILD))
    functions["main"].__globals__["OPTIONS"] = tmp_path / "options.md"
    functions["main"]([str(tmp_path / "site")])
    page = (tmp_path / "site" / "simct_kernels.html").read_text(encoding="utf-8")
    assert (
        "linear_simct_loss" in page
        and "AlignedUnits" in page
        and (tmp_path / "site" / "simct" / "trainer.html").is_file()
    )
