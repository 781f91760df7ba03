"""A pair on the terminal: what it shares, what its alignment covers, how both sides cut a text. Sampled text is data:
it is escaped."""

from pathlib import Path

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from simct.console import printable, show_bytes
from simct.pairing.coverage import RULES, Coverage, in_words
from simct.pairing.pair import Cut, TokenizerPair

STYLES = {"single": "green", "longer": "yellow", "lost": "bold red"}


def pair_table(pair: TokenizerPair, student, teacher) -> Table:
    """Sizes, shared vocabulary and end-of-turn tokens of a pair; `student` and `teacher` are its tokenizers."""
    table = Table(title="Tokenizer pair", show_header=True)
    table.add_column("")
    table.add_column("tokens", justify="right")
    table.add_column("shared by bytes", justify="right")
    table.add_column("ends a response")
    shared = len(pair.shared.student_ids)
    sides = (
        ("student", student, pair.student_end_ids),
        ("teacher", teacher, pair.teacher_end_ids),
    )
    for role, tokenizer, ends in sides:
        size = len(tokenizer)
        names = ", ".join(f"{printable(tokenizer.convert_ids_to_tokens(i))} ({i})" for i in ends)
        table.add_row(
            Text(f"{role} {printable(Path(tokenizer.name_or_path).name)}"),
            f"{size:,}",
            f"{shared:,} ({shared / size:.0%})",
            Text(names),
        )
    return table


def coverage_table(coverage: Coverage, of: str = "") -> Table:
    """`of`: whose tokens they are, if they are no responses."""
    tokens = f"tokens of {of}" if of else "response tokens"
    table = Table(
        title=f"Share of the student's {coverage.student_tokens:,} {tokens} that the teacher supervises",
        caption=f"{coverage.texts:,} texts, {coverage.text_bytes:,} bytes, {coverage.teacher_tokens:,} teacher tokens; "
        f"shared vocabulary {coverage.shared:,} by bytes, {coverage.shared_by_string:,} by string",
    )
    table.add_column("alignment")
    for column, style in ("one-to-one", "green"), ("longer", "yellow"), ("lost", "red"):
        table.add_column(column, justify="right", style=style)
    table.add_column("why lost")
    for rule, row in coverage.rules.items():
        reasons = ", ".join(f"{in_words(reason)} {count:,}" for reason, count in row.dropped.items())
        table.add_row(RULES[rule], f"{row.single:.1%}", f"{row.longer:.1%}", f"{row.lost:.1%}", reasons)
    return table


def cut_text(cuts: list[Cut], width: int = 80) -> Text:
    """One text, cut by both tokenizers (`TokenizerPair.cut`), unit above unit in lines of at most `width` cells, and how
    many of its tokens each method supervises. Green: 1:1, yellow: longer, red: without supervision."""
    lines: list[Text] = []
    student, teacher = Text("student  "), Text("teacher  ")
    for cut in cuts:
        kind = kind_of(cut)
        ours, theirs = ("│".join(map(show_bytes, side)) for side in (cut.student, cut.teacher))
        cell = max(cell_len(ours), cell_len(theirs))
        if student.cell_len + cell >= width and student.cell_len > len("student  "):
            lines += [student, teacher, Text()]
            student, teacher = Text("student  "), Text("teacher  ")
        for line, shown in (student, ours), (teacher, theirs):
            line.append(shown + " " * (cell - cell_len(shown)), style=STYLES[kind])
            line.append(" ")
    single, longer, lost = (sum(len(c.student) for c in cuts if kind_of(c) == kind) for kind in STYLES)
    total = single + longer + lost
    summary = f"Of {total} student tokens {single} are one-to-one: SimpleOPD supervises those, SimCT {single + longer}."
    return Text("\n").join([*lines, student, teacher, Text(summary)])


def kind_of(cut: Cut) -> str:
    """A key of STYLES."""
    return "lost" if not cut.aligned else "single" if len(cut.student) == len(cut.teacher) == 1 else "longer"
