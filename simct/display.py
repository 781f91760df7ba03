"""What users look at: tables for the terminal (rich) and curves as PNG (matplotlib). Sampled text is data: it is escaped here."""

from pathlib import Path

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from simct.coverage import Coverage
from simct.pair import Cut, TokenizerPair

RULES = {
    "simpleopd_public": "SimpleOPD, public code (strings)",
    "simct_public": "SimCT, public code (anchored)",
    "simpleopd": "SimpleOPD by bytes (units=single)",
    "simct": "SimCT by bytes",
}
STYLES = {"single": "green", "longer": "yellow", "lost": "bold red"}


def show_bytes(piece: bytes | None) -> str:
    """A token's bytes on one terminal cell run: visible blanks, escapes for what is not printable, `<special>` for None."""
    if piece is None:
        return "<special>"
    text = piece.decode("utf-8", errors="backslashreplace").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return printable(text)


def printable(text: str) -> str:
    """Text on one line, escapes for what is not printable: a token's name, say, may hold line breaks and terminal codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
            Text(f"{role} {Path(tokenizer.name_or_path).name}"),
            f"{size:,}",
            f"{shared:,} ({shared / size:.0%})",
            Text(names),
        )
    return table


def coverage_table(coverage: Coverage) -> Table:
    table = Table(
        title=f"Share of the student's {coverage.student_tokens:,} response tokens that the teacher supervises",
        caption=f"{coverage.texts:,} texts, {coverage.text_bytes:,} bytes, {coverage.teacher_tokens:,} teacher tokens; "
        f"shared vocabulary {coverage.shared:,} by bytes, {coverage.shared_by_string:,} by string",
    )
    table.add_column("alignment")
    for column, style in ("1:1 units", "green"), ("longer units", "yellow"), ("without supervision", "red"):
        table.add_column(column, justify="right", style=style)
    table.add_column("why lost")
    for rule, row in coverage.rules.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in row.dropped.items())
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
    summary = f"Of {total} student tokens SimpleOPD supervises {single}, SimCT {single + longer}."
    return Text("\n").join([*lines, student, teacher, Text(summary)])


def kind_of(cut: Cut) -> str:
    """A key of STYLES."""
    return "lost" if not cut.aligned else "single" if len(cut.student) == len(cut.teacher) == 1 else "longer"


def evaluation_table(before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title=f"Held-out prompts ({before['eval_samples']} before, {after['eval_samples']} after)")
    table.add_column("")
    for column in "before", "after", "change":
        table.add_column(column, justify="right")
    a, b = before["eval_reverse_kl_per_byte"], after["eval_reverse_kl_per_byte"]
    da, db = before["eval_reverse_kl_per_byte_stderr"], after["eval_reverse_kl_per_byte_stderr"]
    error = (da**2 + db**2) ** 0.5
    change = f"{b - a:+.4f}" + (f" ({(b - a) / error:+.1f} standard errors)" if error > 0 else "")
    table.add_row("sequence reverse KL, nats per byte", f"{a:.4f} ± {da:.4f}", f"{b:.4f} ± {db:.4f}", change)
    if "eval_accuracy" in before and "eval_accuracy" in after:
        a, b = before["eval_accuracy"], after["eval_accuracy"]
        da, db = before.get("eval_accuracy_stderr", 0.0), after.get("eval_accuracy_stderr", 0.0)
        table.add_row("right answers", f"{a:.1%} ± {da:.1%}", f"{b:.1%} ± {db:.1%}", f"{b - a:+.1%}")
    for key, name, form in (
        ("response_length", "response length, tokens", ".1f"),
        ("response_ended", "responses that ended", ".1%"),
        ("samples_unscored", "responses without a common text", "d"),
    ):
        a, b = before[f"eval_{key}"], after[f"eval_{key}"]
        table.add_row(name, format(a, form), format(b, form), format(b - a, "+" + form))
    return table


def plot_curves(log_history: list[dict[str, float]], path: str | Path) -> None:
    """A PNG of the run's logged metrics; panels without values stay empty."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "loss per response token": ["loss"],
        "loss per unit": ["loss/single", "loss/longer"],
        "sequence reverse KL, nats per byte": ["reverse_kl_per_byte", "eval_reverse_kl_per_byte"],
        "share of response tokens": ["tokens/single", "tokens/longer", "tokens/unsupervised"],
        "responses": ["response/ended", "response/whitespace"],
        "student entropy, nats per token": ["response/entropy"],
    }
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in log_history if name in row]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            style = "o" if name.startswith("eval_") else "-"
            axis.plot(steps, values, style, label=name)
            if name == "eval_reverse_kl_per_byte":
                errors = [row[f"{name}_stderr"] for row in log_history if name in row]
                axis.errorbar(steps, values, yerr=errors, fmt="none", ecolor="gray", capsize=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PHASES = ("rollout", "teacher", "align", "student", "loss", "metrics", "optimiser", "other")


def plot_phases(log_history: list[dict[str, float]], path: str | Path) -> None:
    """A PNG of the seconds of each phase, step by step, one on top of the other: what is tallest is what to tune."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in log_history if "seconds/student" in row]
    figure, axis = plt.subplots(figsize=(10, 4.5), layout="constrained")
    if rows:
        steps = [row["step"] for row in rows]
        seconds = {name: [row.get(f"seconds/{name}", 0.0) for row in rows] for name in PHASES}
        width = min([b - a for a, b in zip(steps, steps[1:], strict=False)], default=1)
        below = [0.0] * len(rows)
        for name, values in seconds.items():
            axis.bar(steps, values, width, bottom=below, label=f"{name} {sum(values) / len(values):.3g} s")
            below = [a + b for a, b in zip(below, values, strict=True)]
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="mean of a step")
    axis.set(title="seconds of an optimiser step, by phase", xlabel="step", ylabel="seconds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
