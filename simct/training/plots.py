"""What a run did: held-out metrics before and after as a table, its curves and its phases as PNG (matplotlib)."""

from pathlib import Path

from rich.table import Table


def evaluation_table(before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title=f"Held-out prompts ({before['eval_samples']} before, {after['eval_samples']} after)")
    table.add_column("")
    for column in "before", "after", "change":
        table.add_column(column, justify="right")
    for key, name, form in (
        ("accuracy", "right answers", ".1%"),
        ("forward_kl_per_byte", "forward KL on given answers, nats per byte", ".4f"),
        ("reverse_kl_per_byte", "sequence reverse KL, nats per byte", ".4f"),
    ):
        if f"eval_{key}" not in before or f"eval_{key}" not in after:
            continue
        a, b = before[f"eval_{key}"], after[f"eval_{key}"]
        da, db = (row.get(f"eval_{key}_stderr", 0.0) for row in (before, after))
        error = (da**2 + db**2) ** 0.5
        change = format(b - a, "+" + form) + (f" ({(b - a) / error:+.1f} standard errors)" if error > 0 else "")
        table.add_row(name, f"{a:{form}} ± {da:{form}}", f"{b:{form}} ± {db:{form}}", change)
    for key, name, form in (
        ("response_length", "response length, tokens", ".1f"),
        ("response_ended", "responses that ended", ".1%"),
        ("samples_unscored", "responses without a common text", "d"),
    ):
        a, b = before[f"eval_{key}"], after[f"eval_{key}"]
        table.add_row(name, format(a, form), format(b, form), format(b - a, "+" + form))
    return table


def plot_curves(log_history: list[dict[str, float]], path: str | Path) -> None:
    """A PNG of the run's logged metrics; panels without values are left out."""
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
    logged = {name for row in log_history for name in row}
    panels = {title: names for title, names in panels.items() if logged.intersection(names)}
    columns, lines = min(3, max(1, len(panels))), max(1, -(-len(panels) // 3))
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.5 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in log_history if name in row]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            style = "o" if name.startswith("eval_") else "-"
            axis.plot(steps, values, "o-" if len(points) == 1 else style, label=name)
            if name == "eval_reverse_kl_per_byte":
                errors = [row[f"{name}_stderr"] for row in log_history if name in row]
                axis.errorbar(steps, values, yerr=errors, fmt="none", ecolor="gray", capsize=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
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
