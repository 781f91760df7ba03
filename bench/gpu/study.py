"""The study with real tokenizers, as one item: `bench.quality.real` has processes and a plan of its own."""

from __future__ import annotations

from .steps import Item, Run
from .supervise import LOG


def items(run: Run) -> list[Item]:
    return [Item("real tokenizers", lambda: study(run), max(1.0, run.left() - 1.0))]


def study(run: Run) -> None:
    from ..quality.real import __main__ as command
    from ..quality.real import show
    from ..quality.real.plan import Study, small

    sizes = (
        small() | {"arms": ("sft", "simct")}
        if run.rehearse
        else {"device": run.device, "seconds": max(1.0, run.left() - 15.0)}
    )
    path = run.folder / command.ROWS
    command.run(Study(**sizes), path, run.folder / LOG)
    run.record(what="study", table=show.write(path))
