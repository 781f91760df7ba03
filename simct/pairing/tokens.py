"""What a token is in bytes, and text to tokens with nothing added, for the families of tokenizers that we can spell.

Knows one tokenizer at a time; pairs of tokenizers are `simct.pairing.pair`'s subject. The family is read from the backend's own
decoder and pre-tokenizer, never from class names.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer

_SUPPORTED = (
    "supported are byte-level BPE (GPT-2's alphabet: Qwen, Llama-3, o200k, DeepSeek, SmolLM), "
    "SentencePiece style with byte fallback (Gemma, Mistral, Llama-2) and WordPiece"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_GAPS = 8  # ids to a token, in a vocabulary of over a million ids: tables are as long as the largest id
_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")

# Every text is in NFC but the last, which a tokenizer with a Unicode normaliser may spell in its own form.
_VERIFICATION_TEXTS = (
    'def add(a, b):\n    """Sum."""\n\n\n\tif a  >=  10_000:\r\n        return {\'x\': a+b}  # 3.14159 \\n\n',
    " starts with a space,  two,   three,    four; ends with spaces   ",
    "\n\nThe year 2026: 0123456789 1,234.5 %\t\ttabs\t and trailing newlines\n\n\n\n",
    "naïve café, Ærøskøbing, ŁÓDŹ, Ελληνικά, Русский, العربية, עברית, हिन्दी, ไทย, ɐʇɔ",
    "中文与日本語のテキスト、한국어。混合 text 。\u3000全角１２３",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ∑∫√ “quotes” … – — ½ ﬁ ①",
    "x\u0323\u0302 q\u0303 combining; <|im_end|> </s> <eos> <unk> [SEP] <|endoftext|> spelled out",
    "nai\u0308ve cafe\u0301, A\u030angstro\u0308m, \u1112\u1161\u11ab, \u2126",
)


def token_bytes(tokenizer) -> list[bytes | None]:
    """The bytes of every token of a Hugging Face tokenizer.

    Returns a list of length `largest id + 1`. `None` stands for a special token and for an id that no token has. A
    SentencePiece token's space marker is a space; a WordPiece continuation loses its `##`.

    Raises ValueError for a tokenizer of another family, without a backend to read, or with an id far beyond its number of tokens.
    """
    backend = _backend(tokenizer)
    name = describe(tokenizer)
    try:
        parts = (backend.decoder, backend.pre_tokenizer, backend.normalizer)
        decoders, pre_tokenizers, _ = (list(_components(_state(part))) for part in parts)
    except Exception as error:  # such a component has no state to read
        raise ValueError(f"{name} has a component written in Python; {_SUPPORTED}") from error
    model = type(backend.model).__name__
    added_spell: Callable[[str], bytes] = str.encode

    if any(part["type"] == "ByteLevel" for part in decoders + pre_tokenizers):
        spell = _byte_level  # an added token is matched in the text itself, before the alphabet
    elif model == "WordPiece":
        prefix = backend.model.continuing_subword_prefix

        def spell(token: str) -> bytes:
            return token.removeprefix(prefix).encode()

    elif marker := _space_marker(decoders, bool(getattr(backend.model, "byte_fallback", False))):

        def spell(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(marker, " ").encode()

        added_spell = spell  # Gemma's added runs of spaces are written with the marker too
    else:
        kinds = " + ".join(part["type"] for part in decoders) or "none"
        raise ValueError(f"{name} is a {model} tokenizer with decoder {kinds}; {_SUPPORTED}")

    vocabulary = backend.get_vocab(with_added_tokens=True)
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    size = vocabulary.get(last, -1) + 1
    if size > max(_MOST_GAPS * len(vocabulary), 2**20):
        raise ValueError(f"{name} gives its token {last!r} the id {size - 1:,}, but has {len(vocabulary):,} tokens")
    pieces: list[bytes | None] = [None] * size
    for token, index in vocabulary.items():
        pieces[index] = spell(token)
    special = {index for index in tokenizer.all_special_ids if index < len(pieces)}
    for index, added in backend.get_added_tokens_decoder().items():
        pieces[index] = added_spell(added.content)
        if added.special:
            special.add(index)
    unknown = getattr(backend.model, "unk_token", None)
    if unknown in vocabulary:
        special.add(vocabulary[unknown])
    for index in special:
        pieces[index] = None
    return pieces


def describe(tokenizer) -> str:
    """A tokenizer's class and where it came from, for messages."""
    path = getattr(tokenizer, "name_or_path", "")
    return f"{type(tokenizer).__name__} ({path})" if path else type(tokenizer).__name__


class TextEncoder:
    """Text to token ids and nothing else: no special tokens (text that spells one stays text), no dummy prefix space.

    Works on a private copy of the backend; the user's tokenizer is never changed. `pieces` are the tokens' bytes; an id
    without any is one that text must never become.
    """

    def __init__(self, tokenizer, pieces: Sequence[bytes | None]):
        self.pieces = pieces
        self._special = frozenset(i for i, piece in enumerate(pieces) if piece is None)
        self._backend = backend = _copy(_backend(tokenizer))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        for kind in ("normalizer", "pre_tokenizer"):
            state = _state(getattr(backend, kind))
            plain = _without_prefix_space(state)
            if plain != state:
                setattr(backend, kind, _build(kind, plain))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        batch = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        for row, ids in enumerate(batch):
            if not self._special.isdisjoint(ids):
                batch[row] = self._without_special(texts[row], ids)
        return batch

    def unicode_form(self, text: str) -> str:
        """`text` after the tokenizer's own Unicode normalisation, and none of its other changes."""
        for part in _components(_state(self._backend.normalizer)):
            if part["type"] in _UNICODE_FORMS:
                text = unicodedata.normalize(part["type"], text)
        return text

    def _without_special(self, text: str, ids: list[int]) -> list[int]:
        # A model may hold the spelling of a special token as an ordinary piece: cut the text inside it, so that it
        # cannot match.
        encoding = self._backend.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for i, (start, stop) in spans if i in self._special and stop - start > 1]
        if not cuts:
            return ids  # the unknown token: a character that this tokenizer cannot spell
        bounds = [0, *cuts, len(text)]
        parts = self([text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)])
        return [i for part in parts for i in part]


def verify(encoder: TextEncoder, name: str) -> None:
    """Check on built-in text that the bytes of a tokenizer's tokens are the bytes of the text it encodes.

    Code, runs of spaces and newlines, tabs, digits, many scripts, emoji and combining characters. A tokenizer with a
    Unicode normaliser is held to its own normal form. Raises ValueError with the first difference.
    """
    for text, ids in zip(_VERIFICATION_TEXTS, encoder(_VERIFICATION_TEXTS), strict=True):
        expected = encoder.unicode_form(text).encode()
        got = b"".join(encoder.pieces[i] or b"" for i in ids)
        if got != expected:
            shorter = min(len(expected), len(got))
            at = next((k for k in range(shorter) if expected[k] != got[k]), shorter)
            raise ValueError(
                f"{name} does not spell its text byte by byte, so it cannot be aligned: at byte {at} of {text!r} "
                f"expected {expected[at : at + 16]!r}, got {got[at : at + 16]!r}"
            )


def _backend(tokenizer) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return backend
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return convert_slow_tokenizer(tokenizer)
    except Exception as error:  # each converter fails in its own way
        raise ValueError(
            f"{describe(tokenizer)} has no fast backend and cannot be converted to one; {_SUPPORTED}"
        ) from error


def _copy(backend: Tokenizer) -> Tokenizer:
    """Another backend around the same model, which is most of it and takes seconds to copy; a model that is to be changed is
    copied as well."""
    if not getattr(backend.model, "dropout", None):
        copy = Tokenizer(backend.model)
        for part in "normalizer", "pre_tokenizer", "post_processor":
            if (own := getattr(backend, part)) is not None:
                setattr(copy, part, own)
        added = backend.get_added_tokens_decoder()
        copy.add_tokens([added[i] for i in sorted(added)])
        if {i: token.content for i, token in copy.get_added_tokens_decoder().items()} == {
            i: token.content for i, token in added.items()
        }:
            return copy
    copy = Tokenizer.from_str(backend.to_str())  # also where added tokens have ids that they would not get anew
    if getattr(copy.model, "dropout", None):
        copy.model.dropout = None
    return copy


def _state(component) -> dict | None:
    return None if component is None else json.loads(component.__getstate__())


def _components(state: dict | None) -> Iterator[dict]:
    if state is None:
        return
    if state["type"] != "Sequence":
        yield state
        return
    for part in next(value for value in state.values() if isinstance(value, list)):
        yield from _components(part)


def _space_marker(decoders: list[dict], byte_fallback: bool) -> str | None:
    """The character that stands for a space, in a tokenizer that can spell any byte."""
    if not byte_fallback and all(part["type"] != "ByteFallback" for part in decoders):
        return None
    for part in decoders:
        if part["type"] == "Metaspace":
            return part["replacement"]
        if part["type"] == "Replace" and part["content"] == " ":
            return part["pattern"].get("String")
    return None


def _without_prefix_space(state: dict | None) -> dict | None:
    if state is None or state["type"] == "Prepend":
        return None
    if state["type"] == "Replace" and state["content"] == 2 * state["pattern"].get("Regex", "").removeprefix("\\A"):
        return None  # transformers doubles a leading marker, which would otherwise pass for the dummy prefix
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    if state["type"] == "ByteLevel":
        return {**state, "add_prefix_space": False}
    if state["type"] == "Sequence":
        key = next(key for key, value in state.items() if isinstance(value, list))
        parts = [_without_prefix_space(part) for part in state[key]]
        return {**state, key: [part for part in parts if part is not None]}
    return state


def _build(kind: str, state: dict | None):
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return getattr(Tokenizer.from_str(json.dumps({**empty, kind: state})), kind)


class _Alphabet(dict):
    """GPT-2's stand-ins: visible Latin-1 characters stand for themselves, the other bytes for U+0100 onwards."""

    def __init__(self) -> None:
        visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in visible]
        super().__init__({b: b for b in visible} | {0x100 + k: b for k, b in enumerate(hidden)})

    def __missing__(self, character: int) -> int:
        return 0x100  # no byte


_ALPHABET = _Alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # not in the alphabet: the decoder takes such a token literally
        return token.encode()
