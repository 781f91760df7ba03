"""Reads an inspection page back: the units of its texts with their tokens, and every element and script of it."""

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Unit:
    classes: list[str]
    title: str
    # Upper and lower line: each token's id, bytes and visible text.
    rows: list[list[tuple[int, bytes, str]]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        (kind,) = {"s", "l", "x"} & set(self.classes)
        return {"s": "single", "l": "longer", "x": "unsupervised"}[kind]

    @property
    def loss(self) -> float:
        return float(self.title.rpartition("\nloss ")[2].removesuffix(" nats"))


class Page(HTMLParser):
    """`texts`: the units of each text; `ranked`: those in tables; `words`: all text outside of scripts and styles."""

    VOID = {"meta", "br", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[list[Unit]] = []
        self.ranked: list[Unit] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        classes = (attributes.get("class") or "").split()
        inside_text = any(name == "cut" for _, name in self._open)
        if tag not in self.VOID:
            self._open.append((tag, classes[0] if classes else ""))
        if tag == "script":
            self.scripts.append("")
        elif classes[:1] == ["cut"]:
            self.texts.append([])
        elif classes[:1] == ["u"]:
            (self.texts[-1] if inside_text else self.ranked).append(Unit(classes, attributes["title"]))
            self._unit = (self.texts[-1] if inside_text else self.ranked)[-1]
        elif classes[:1] == ["r"]:
            self._unit.rows.append([])
        elif classes[:1] == ["t"]:
            self._unit.rows[-1].append((int(attributes["data-id"]), bytes.fromhex(attributes["data-bytes"]), ""))

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data):
        tag = self._open[-1][0] if self._open else ""
        if tag == "script":
            self.scripts[-1] += data
        elif tag != "style":
            self.words += data
        if any(name == "t" for _, name in self._open):
            *token, shown = self._unit.rows[-1][-1]
            self._unit.rows[-1][-1] = (*token, shown + data)

    def line(self, text: int, row: int) -> list[tuple[int, bytes, str]]:
        """All tokens of one line of a text, 0 the student's."""
        return [token for unit in self.texts[text] for token in unit.rows[row]]
