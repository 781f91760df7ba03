"""The study with real tokenizers, as one item: `bench.quality.real` has processes and a plan of its own."""

from __future__ import annotations

from .steps import Item, Run


def items(run: Run) -> list[Item]:
    return [Item("real tokenizers", lambda: study(run), max(1.0, run.left() - 1.0))]


def study(run: Run) -> None:
    from ..quality.real import __main__ as command
    from ..quality.real import show
    from ..quality.real.plan import Study, small

    sizes = small() if run.rehearse else {"device": run.device, "seconds": max(1.0, run.left() - 15.0)}
    command.run(Study(**sizes), run.folder)
    run.record(what="study", table=show.write(run.folder / command.ROWS, run.folder))
