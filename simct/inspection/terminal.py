"""An inspection on the terminal: what the page shows, without what needs a pointer."""

from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from simct.console import printable, show_bytes
from simct.inspection.advice import Advice
from simct.inspection.page import LOSS_STEPS, bucket, bucket_names, left_out
from simct.inspection.report import REASONS, SHOWN, Inspection, Stretch, Token
from simct.inspection.tables import STYLES, coverage_table
from simct.pairing.coverage import in_words

DRAWN_TOKENS = 300
# Dark to light as the loss rises (cividis, safe for the colour-blind), with letters that stand out.
HEAT = (
    "white on #00224e",
    "white on #2a3f6d",
    "white on #575d6d",
    "white on #707173",
    "black on #a59c74",
    "black on #d5c14f",
    "black on #fee838",
)


def print_inspection(
    console: Console, inspection: Inspection, advice: Sequence[Advice], *, verbose: bool = False
) -> None:
    """All of it but the pair's own table: what follows from the figures first; `verbose` with the vocabulary by script."""
    for part in _parts(console, inspection, advice, verbose):
        console.print(part, soft_wrap=isinstance(part, Text))
        console.print()


def _parts(
    console: Console, inspection: Inspection, advice: Sequence[Advice], verbose: bool
) -> Iterator[RenderableType]:
    yield _advice(advice)
    yield coverage_table(inspection.coverage)
    yield _cut(inspection, console.width)
    if largest := inspection.largest(8):
        yield _ranking("Largest units", largest, inspection.scored)
    if inspection.scored:
        yield _ranking("Costliest units", inspection.costliest(8), True)
    if dropped := inspection.dropped():
        yield _dropped(dropped, inspection.tokens())
    if verbose:
        yield _scripts(inspection)


def _show(token: Token) -> str:
    return printable(token.name) if token.piece is None else show_bytes(token.piece)


def _cut(inspection: Inspection, width: int) -> Text:
    """The beginning of the texts, unit above unit; with scores, coloured by loss."""
    parts, drawn, total = [], 0, inspection.tokens()
    for answer, stretches in inspection.beginning(DRAWN_TOKENS):
        parts += [Text(answer.title, style="bold"), *_lines(stretches, width)]
        drawn += sum(len(stretch.student) for stretch in stretches)
    if drawn < total:
        parts.append(Text(f"The first {drawn:,} of {total:,} student tokens; --html draws more.", style="dim"))
    if inspection.scored:
        legend = Text("loss in nats: ")
        for name, style in zip(bucket_names(LOSS_STEPS), HEAT, strict=True):
            legend.append(f" {name} ", style=style)
        legend.append(" ").append(" without supervision ", style=STYLES["lost"])
    else:
        legend = Text()
        for name, style in (("one-to-one", "single"), ("longer", "longer"), ("without supervision", "lost")):
            legend.append(f"{name}  ", style=STYLES[style])
    return Text("\n").join([*parts, legend])


def _lines(stretches: Sequence[Stretch], width: int) -> list[Text]:
    lines, first = [], len("student  ")
    student, teacher = Text("student  "), Text("teacher  ")
    for stretch in stretches:
        ours, theirs = (Text("│".join(map(_show, side))) for side in (stretch.student, stretch.teacher))
        cell = max(ours.cell_len, theirs.cell_len)
        if student.cell_len + cell >= width and student.cell_len > first:
            lines += [student, teacher, Text()]
            student, teacher = Text("student  "), Text("teacher  ")
        for line, shown in (student, ours), (teacher, theirs):
            line.append(shown.plain + " " * (cell - shown.cell_len), style=_style(stretch)).append(" ")
    return [*lines, student, teacher, Text()]


def _style(stretch: Stretch) -> str:
    if stretch.score is not None:
        return HEAT[bucket(stretch.score.loss, LOSS_STEPS)]
    return STYLES["lost" if stretch.kind == "unsupervised" else stretch.kind]


def _ranking(title: str, found: list[tuple[Stretch, int]], scored: bool) -> Table:
    table = Table(title=title)
    for column in "student", "teacher":
        table.add_column(column)
    columns = ("bytes", "times", *(("student's score", "teacher's score", "loss") if scored else ()))
    for column in columns:
        table.add_column(column, justify="right")
    for stretch, times in found:
        sides = []
        for side in stretch.student, stretch.teacher:
            tokens, ids = "│".join(map(_show, side[:SHOWN])), " ".join(str(token.id) for token in side[:SHOWN])
            more = f"\n{left_out(side, SHOWN)}" if left_out(side, SHOWN) else ""
            sides.append(Text(f"{tokens}\n{ids}{more}", overflow="fold"))
        figures = [f"{len(stretch.text):,}", f"{times:,}"]
        if scored:
            score = stretch.score
            figures += [f"{v:.3f}" for v in (score.student, score.teacher, score.loss)] if score else [""] * 3
        table.add_row(*sides, *figures)
    return table


def _dropped(dropped: dict[str, int], total: int) -> Table:
    table = Table(title="What was dropped, and why")
    table.add_column("reason")
    table.add_column("student tokens", justify="right")
    table.add_column("")
    for reason, count in dropped.items():
        table.add_row(in_words(reason), f"{count:,} ({count / total:.1%})", REASONS[reason])
    return table


def _scripts(inspection: Inspection) -> Table:
    table = Table(title="Shared vocabulary by script")
    table.add_column("tokens of")
    for column in "student", "teacher", "shared", "of the student's":
        table.add_column(column, justify="right")
    for row in inspection.scripts:
        share = f"{row.shared / row.student:.0%}" if row.student else ""
        table.add_row(row.script, f"{row.student:,}", f"{row.teacher:,}", f"{row.shared:,}", share)
    return table


def _advice(advice: Sequence[Advice]) -> Table:
    """Wrapped at words, each behind its dash."""
    table = Table.grid(padding=(0, 1))
    table.title, table.title_justify, table.title_style = "What follows from the figures", "left", "bold"
    for item in advice:
        table.add_row("-", Text.assemble((item.title, "bold"), ": ", item.text))
    return table
