"""An inspection as one HTML page that needs nothing else: no network, no other file. Everything from a text or a tokenizer is
escaped, and the page's own policy lets no script run but its own."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from simct.console import printable
from simct.files import replaced
from simct.inspection.advice import Advice
from simct.inspection.report import REASONS, SHOWN, InspectedAnswer, Inspection, ScriptRow, Stretch, Token, Vocabulary
from simct.pairing.coverage import RULES, in_words

MOST_TOKENS = 5000  # student tokens drawn on a page; about 0.6 kB each
LOSS_STEPS = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
)  # nats, bounds of the colours: the same on every page, so that pages compare
DIFFERENCE_STEPS = (-3.0, -1.0, -0.3, 0.3, 1.0, 3.0)
_CLASSES = {"single": "s", "longer": "l", "unsupervised": "x"}
_STANDS_FOR = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def write_page(path: str | Path, inspection: Inspection, advice: Sequence[Advice], **options) -> None:
    """`html_page` into a file, which is there whole or not at all."""
    with replaced(path) as target:
        target.write(html_page(inspection, advice, **options))


def html_page(
    inspection: Inspection, advice: Sequence[Advice], *, note: str = "", max_tokens: int = MOST_TOKENS
) -> str:
    """The page. `note`: a sentence on where the texts come from, plain text. `max_tokens`: student tokens that are drawn, in whole
    units; the page says what it leaves out, and all figures count everything."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: expected at least 1")
    style, script = (
        (files("simct.inspection") / "assets" / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    student, teacher = inspection.student, inspection.teacher
    body = [
        _header(inspection, note),
        "<main>",
        _advice(advice),
        _texts(inspection, max_tokens),
        _coverage(inspection),
        _ranking("Largest units", "longer units, by their tokens on both sides", inspection.largest()),
        *([_ranking("Costliest units", "of all units, by loss", inspection.costliest())] if inspection.scored else []),
        _dropped(inspection),
        _scripts(inspection.scripts),
        "</main>",
        "<footer>Written by <code>simct</code>. How to read it: docs/inspect.md.</footer>",
        '<div id="tip" role="tooltip" hidden></div>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(student.name)} taught by {escape(teacher.name)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{script}</script>\n</body></html>\n"
    )


def bucket(value: float, steps: Sequence[float]) -> int:
    """Which of the `len(steps) + 1` colours a value has; NaN the last, as what is no number should be seen."""
    return len(steps) if value != value else sum(value >= step for step in steps)


def bucket_names(steps: Sequence[float]) -> list[str]:
    return [f"< {steps[0]:g}", *(f"{a:g}" for a in steps[:-1]), f"≥ {steps[-1]:g}"]


# ---- Parts of the page ----


def _header(inspection: Inspection, note: str) -> str:
    student, teacher, coverage = inspection.student, inspection.teacher, inspection.coverage
    total = max(inspection.tokens(), 1)
    shares = (f"{coverage.shared / side.size:.0%}" for side in (student, teacher))
    sizes = (f"{coverage.text_bytes / max(n, 1):.2f}" for n in (coverage.student_tokens, coverage.teacher_tokens))
    tiles = [
        ("s", f"{inspection.tokens('single') / total:.1%}", "of the response tokens in single units"),
        ("l", f"{inspection.tokens('longer') / total:.1%}", "in longer units: what SimCT adds"),
        ("x", f"{inspection.tokens('unsupervised') / total:.1%}", "without supervision"),
        (
            "",
            f"{coverage.shared:,}",
            "tokens shared: {} of the student's, {} of the teacher's".format(*shares),
        ),
        (
            "",
            " / ".join(sizes),
            "bytes a token, student / teacher",
        ),
    ]
    for kind in ("single", "longer"):
        loss = inspection.mean_loss(kind)
        if loss is not None:
            tiles.append(("", f"{loss:.3g}", f"nats, mean loss of a {kind} unit"))
    items = "".join(f'<li class="{kind}"><b>{value}</b><span>{text}</span></li>' for kind, value, text in tiles)
    note = f" {escape(note)}" if note else ""
    return (
        f"<header><h1>{escape(student.name)} <small>taught by</small> {escape(teacher.name)}</h1>"
        f"<p>{_vocabulary('Student', student)} {_vocabulary('Teacher', teacher)}{note}</p>"
        f'<ul class="tiles">{items}</ul></header>'
    )


def _vocabulary(role: str, vocabulary: Vocabulary) -> str:
    ends = ", ".join(f"<code>{escape(printable(token.name))}</code> ({token.id})" for token in vocabulary.ends)
    return f"{role}: {vocabulary.size:,} tokens, a response ends with {ends}."


def _advice(advice: Sequence[Advice]) -> str:
    items = "".join(f"<li><b>{_prose(item.title)}</b><p>{_prose(item.text)}</p></li>" for item in advice)
    return f'<h2>What follows from the figures</h2><ul class="advice">{items}</ul>'


def _texts(inspection: Inspection, max_tokens: int) -> str:
    drawn, total = inspection.beginning(max_tokens), inspection.tokens()
    done = sum(len(stretch.student) for _, stretches in drawn for stretch in stretches)
    notice = ""
    if sum(len(stretches) for _, stretches in drawn) < sum(len(answer.stretches) for answer in inspection.answers):
        needed = max(total, -(-inspection.coverage.teacher_tokens // 8))
        notice = (
            f'<p class="notice">Drawn are the first {done:,} of {total:,} student tokens; all figures count all of them. '
            f"<code>--max_tokens {needed}</code> draws everything.</p>"
        )
    views = '<div class="key only">' + _kind_key() + "</div>"
    if inspection.scored:
        named = {"loss": "loss", "difference": "teacher less student", "kind": "kind of unit"}
        choices = "".join(
            f'<label><input type="radio" name="view" id="view-{name}"{" checked" * (name == "loss")}>{text}</label>'
            for name, text in named.items()
        )
        loss, difference = (
            "".join(f'<span class="chip {letter}{i}">{name}</span>' for i, name in enumerate(bucket_names(steps)))
            for letter, steps in (("q", LOSS_STEPS), ("d", DIFFERENCE_STEPS))
        )
        marks = '<span class="chip long">longer</span>' + _lost_key()
        views = (
            f"<fieldset><legend>Colour</legend>{choices}</fieldset>"
            f'<div class="key key-kind">{_kind_key()}</div><div class="key key-loss">{loss} nats{marks}</div>'
            f'<div class="key key-difference">student surer {difference} teacher surer, nats a token{marks}</div>'
        )
    return (
        "<h2>The text, cut by both tokenizers</h2>"
        "<p>Upper line: the student's tokens; lower line: the teacher's. One box is one unit. Point at a box, or reach it "
        "with the tab and arrow keys, for ids, bytes and scores. <code>·</code> is a space, <code>⏎</code> a line break, "
        "<code>\\xf0</code> "
        f'a byte that is no whole character.</p>{notice}<div class="bar-top">{views}</div>'
        + "".join(_answer(answer, stretches) for answer, stretches in drawn)
    )


def _kind_key() -> str:
    return '<span class="chip s">single: 1 to 1</span><span class="chip l">longer</span>' + _lost_key()


def _lost_key() -> str:
    return '<span class="chip x">without supervision</span>'


def _answer(answer: InspectedAnswer, shown: Sequence[Stretch]) -> str:
    """One text's block, as far as it is drawn."""
    total = max(answer.tokens(), 1)
    shares = ", ".join(
        f"{answer.tokens(kind) / total:.1%} {name}"
        for kind, name in (("single", "single"), ("longer", "longer"), ("unsupervised", "without supervision"))
    )
    losses = [s.score.loss for s in answer.stretches if s.score is not None]
    loss = f"; loss {sum(losses) / total:.3g} nats a student token" if losses else ""
    prompt = ""
    if answer.prompt is not None:
        prompt = f"<details><summary>Prompt</summary><pre>{escape(answer.prompt)}</pre></details>"
    units = "".join(_in_lines(shown))
    return (
        f'<section><h3>{escape(answer.title)}</h3><p class="shares">{answer.tokens():,} student tokens: {shares}{loss}</p>{prompt}'
        f'<div class="cut">{units}</div></section>'
    )


def _in_lines(shown: Sequence[Stretch]) -> Iterator[str]:
    """The units, with a new line on the page where the text has one: behind a unit that ends a line, else before one that holds a
    line break."""
    for i, stretch in enumerate(shown):
        ends = stretch.text.endswith(b"\n")
        if i and b"\n" in stretch.text and not ends:
            yield "<br>"
        yield _stretch(stretch)
        if ends:
            yield "<br>"


def _stretch(stretch: Stretch, most: int | None = None) -> str:
    """One box; of each side at most so many tokens."""
    classes = ["u", _CLASSES[stretch.kind]]
    if stretch.score is not None:
        classes.append(f"q{bucket(stretch.score.loss, LOSS_STEPS)}")
        classes.append(f"d{bucket(stretch.score.teacher - stretch.score.student, DIFFERENCE_STEPS)}")
    rows = ""
    for side in stretch.student, stretch.teacher:
        more = f'<i class="more">{left_out(side, most)}</i>' if left_out(side, most) else ""
        rows += f'<span class="r">{"".join(map(_token, side[:most]))}{more}</span>'
    title = escape(describe(stretch, most))
    return f'<span class="{" ".join(classes)}" tabindex="0" role="group" title="{title}">{rows}</span>'


def left_out(side: Sequence[Token], most: int | None) -> str:
    """What to say of the tokens behind the first so many; nothing if there are none."""
    return f"and {len(side) - most:,} more" if most is not None and len(side) > most else ""


def _token(token: Token) -> str:
    return f'<span class="t" data-id="{token.id}" data-bytes="{(token.piece or b"").hex()}">{_visible(token)}</span>'


def _visible(token: Token) -> str:
    """A token's bytes as HTML: stand-ins for blanks, and escapes for what is not printable, in `<i>`."""
    if token.piece is None:
        return f'<i class="special">{escape(printable(token.name))}</i>'
    shown = []
    for character in token.piece.decode("utf-8", "surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            shown.append((True, f"\\x{ord(character) - 0xDC00:02x}"))
        elif character in _STANDS_FOR:
            shown.append((True, _STANDS_FOR[character]))
        else:
            shown.append((not character.isprintable(), escape(printable(character))))
    return re.sub("</i><i>", "", "".join(f"<i>{text}</i>" if stands else text for stands, text in shown))


def describe(stretch: Stretch, most: int | None = None) -> str:
    """What is known of one unit or stretch, as lines of plain text: bytes, ids (of at most so many tokens a side), scores, why it
    is lost."""
    size = len(stretch.text)
    end = f"bytes {stretch.start:,} to {stretch.start + size - 1:,}" if size else "no bytes"
    count = f"{len(stretch.student)} student to {len(stretch.teacher)} teacher token{'s' * (len(stretch.teacher) != 1)}"
    lines = [f"{stretch.kind}{' unit' * (stretch.kind != 'unsupervised')}, {count}, {end}"]
    for role, side in (("student", stretch.student), ("teacher", stretch.teacher)):
        for token in side[:most]:
            spelled = "special" if token.piece is None else token.piece.hex(" ")
            lines.append(f"{role} {token.id}  {printable(token.name)}  {spelled}")
        if left_out(side, most):
            lines.append(f"{role} {left_out(side, most)}")
    for reason in dict.fromkeys(stretch.reasons):
        lines.append(f"without supervision: {REASONS[reason]}")
    if stretch.score is not None:
        score = stretch.score
        lines.append(f"log-probability a token: student {score.student:.3f}, teacher {score.teacher:.3f} nats")
        lines.append(f"loss {score.loss:.4g} nats")
    return "\n".join(lines)


def _coverage(inspection: Inspection) -> str:
    coverage, rows = inspection.coverage, []
    for rule, share in coverage.rules.items():
        why = ", ".join(f"{in_words(reason)} {count:,}" for reason, count in share.dropped.items())
        rows.append(
            f'<tr><th scope="row">{escape(RULES[rule])}</th><td class="n">{share.single:.1%}</td>'
            f'<td class="n">{share.longer:.1%}</td><td class="n">{share.lost:.1%}</td>'
            f'<td class="wide">{_bar(share.single, share.longer, share.lost)}</td><td class="wide">{escape(why)}</td></tr>'
        )
    return (
        '<h2>What each rule supervises</h2><div class="scroll"><table><thead><tr><th>alignment</th><th class="n">single</th>'
        '<th class="n">longer</th><th class="n">lost</th><th class="wide"></th><th class="wide">why lost</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><caption>Shares of the {coverage.student_tokens:,} student tokens of "
        f"{coverage.texts:,} texts ({coverage.text_bytes:,} bytes, {coverage.teacher_tokens:,} teacher tokens). Shared vocabulary: "
        f"{coverage.shared:,} by bytes, {coverage.shared_by_string:,} by string.</caption></table></div>"
    )


def _bar(single: float, longer: float, lost: float) -> str:
    parts = zip(("s", "l", "x"), (single, longer, lost), strict=True)
    inside = "".join(f'<span class="{kind}" style="width:{share:.2%}"></span>' for kind, share in parts if share > 0)
    return f'<div class="bar" aria-hidden="true">{inside}</div>'


def _ranking(title: str, what: str, found: list[tuple[Stretch, int]]) -> str:
    if not found:
        return f"<h2>{title}</h2><p>None.</p>"
    scored = any(stretch.score is not None for stretch, _ in found)
    head = '<th>unit</th><th class="n">student</th><th class="n">teacher</th><th class="n">bytes</th><th class="n">times</th>'
    head += '<th class="n">student\'s score</th><th class="n">teacher\'s</th><th class="n">loss</th>' if scored else ""
    rows = []
    for stretch, times in found:
        figures = [f"{len(stretch.student):,}", f"{len(stretch.teacher):,}", f"{len(stretch.text):,}", f"{times:,}"]
        if scored:
            score = stretch.score
            figures += [f"{v:.3f}" for v in (score.student, score.teacher, score.loss)] if score else ["", "", ""]
        cells = "".join(f'<td class="n">{figure}</td>' for figure in figures)
        rows.append(f'<tr><td class="mono">{_stretch(stretch, SHOWN)}</td>{cells}</tr>')
    return (
        f'<h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"<caption>The first {len(rows)} {what}, each text once.</caption></table></div>"
    )


def _dropped(inspection: Inspection) -> str:
    dropped, total = inspection.dropped(), max(inspection.tokens(), 1)
    if not dropped:
        return "<h2>What was dropped, and why</h2><p>Nothing: every student token is in a unit.</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(in_words(reason))}</th><td class="n">{count:,}</td>'
        f'<td class="n">{count / total:.1%}</td><td>{escape(REASONS[reason])}</td></tr>'
        for reason, count in dropped.items()
    )
    return (
        '<h2>What was dropped, and why</h2><div class="scroll"><table><thead><tr><th>reason</th><th class="n">student tokens</th>'
        f'<th class="n">share</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _scripts(rows: Sequence[ScriptRow]) -> str:
    cells = []
    for row in rows:
        share = row.shared / row.student if row.student else 0.0
        percent = f"{share:.0%}" if row.student else ""
        cells.append(
            f'<tr><th scope="row">{row.script}</th><td class="n">{row.student:,}</td><td class="n">{row.teacher:,}</td>'
            f'<td class="n">{row.shared:,}</td><td class="n">{percent}</td><td class="wide">{_bar(share, 0, 0)}</td></tr>'
        )
    return (
        '<h2>Shared vocabulary by script</h2><div class="scroll"><table><thead><tr><th>tokens of</th><th class="n">student</th>'
        '<th class="n">teacher</th><th class="n">shared</th><th class="n">of the student\'s</th><th class="wide"></th></tr></thead>'
        f"<tbody>{''.join(cells)}</tbody><caption>A token's letters decide; without any it is digits, punctuation or white space."
        "</caption></table></div>"
    )


def _prose(text: str) -> str:
    """Text with `code` between back-quotes, as HTML. What stands between may hold none itself."""
    parts = text.split("`")
    return "".join(f"<code>{escape(part)}</code>" if i % 2 else escape(part) for i, part in enumerate(parts))
