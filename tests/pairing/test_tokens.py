"""Token bytes of every supported family, and the refusal of the others."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from simct.demo import ASSETS
from simct.pairing.pair import TokenizerPair
from simct.pairing.tokens import TextEncoder, token_bytes, verify

from .conftest import TEXTS, plain_byte_level


@pytest.mark.parametrize("name", ["qwen", "deepseek", "mistral", "gemma", "llama"])
def test_tokens_spell_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    before = tokenizer.backend_tokenizer.to_str()
    pieces = token_bytes(tokenizer)
    encoder = TextEncoder(tokenizer, pieces)
    for text, ids in zip(TEXTS, encoder(TEXTS), strict=True):
        assert b"".join(pieces[i] for i in ids) == text.encode()
    verify(encoder, name)
    assert len(pieces) == max(tokenizer.get_vocab().values()) + 1
    assert all(pieces[i] is None for i in tokenizer.all_special_ids)
    assert tokenizer.backend_tokenizer.to_str() == before, "the user's tokenizer was changed"


def test_byte_level(qwen):
    pieces = token_bytes(qwen)
    assert pieces[qwen.convert_tokens_to_ids("Ċ")] == b"\n"
    assert pieces[qwen.convert_tokens_to_ids("Ġthe")] == b" the"
    assert pieces[qwen.convert_tokens_to_ids("<think>")] == b"<think>"  # added, but text
    assert pieces[qwen.convert_tokens_to_ids("<|im_end|>")] is None
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)


def test_sentencepiece_with_byte_fallback(gemma):
    pieces = token_bytes(gemma)
    spelled = {token: pieces[i] for token, i in gemma.get_vocab().items()}
    assert spelled["<0x0A>"] == spelled["\n"] == b"\n"
    assert spelled["<0xF0>"] == b"\xf0"
    assert spelled["▁▁"] == b"  "  # an added token that is not special
    assert spelled["<end_of_turn>"] is spelled["<unk>"] is None


def test_the_dummy_prefix_space_is_switched_off(llama):
    state = json.loads(llama.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    metaspace = LlamaTokenizer(
        vocab=state["vocab"], merges=merges, unk_token="<unk>", eos_token="<eos>"
    )  # Metaspace, where the fixture prepends by a normaliser
    roberta = plain_byte_level()
    roberta.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for tokenizer in (llama, metaspace, roberta):
        pieces = token_bytes(tokenizer)
        encoder = TextEncoder(tokenizer, pieces)
        for text in ("Hello", " Hello", "  Hello"):
            assert b"".join(pieces[i] for i in encoder([text])[0]) == text.encode()
        users = tokenizer.encode("Hello", add_special_tokens=False)
        assert b"".join(pieces[i] for i in users) == b" Hello", "the user's own tokenizer still prefixes"


def wordpiece(lowercase: bool):
    tokens = ["[UNK]", "[SEP]", "hello", "##ing", "go", ",", "world"]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


def test_wordpiece():
    assert token_bytes(wordpiece(True)) == [None, None, b"hello", b"ing", b"go", b",", b"world"]


def test_holes_are_none():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain_byte_level().backend_tokenizer.to_str().replace('"Ā":0', '"Ā":999'))
    )
    pieces = token_bytes(tokenizer)
    assert len(pieces) == 1000 and pieces[999] == b"\0" and pieces[0] is None and pieces[500] is None


def test_other_families_are_refused_by_name():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="WordLevel.*supported are byte-level BPE"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="Unigram tokenizer with decoder Metaspace"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_slow_tokenizer_is_refused_by_name():
    class Letters(PreTrainedTokenizer):
        vocab_size = 2

        def get_vocab(self):
            return {"a": 0, "b": 1}

        def _tokenize(self, text, **_):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.get_vocab().get(token)

        def _convert_id_to_token(self, index):
            return "ab"[index]

    with pytest.raises(ValueError, match="Letters has no fast backend"):
        token_bytes(Letters())


def test_a_tokenizer_that_does_not_spell_its_text_is_refused_with_the_first_difference(qwen):
    with pytest.raises(ValueError, match=r"the teacher's tokenizer .* at byte 0 of .* expected b'def add.*', got b','"):
        TokenizerPair(qwen, wordpiece(True))
    lowering = plain_byte_level(normalizer=normalizers.Lowercase())
    with pytest.raises(ValueError, match=r"the student's tokenizer .* at byte 22 of .* expected b'Sum.*got b'sum"):
        TokenizerPair(lowering, qwen)
    stripping = plain_byte_level(normalizer=normalizers.Strip())
    with pytest.raises(ValueError, match="does not spell its text"):
        TokenizerPair(stripping, qwen)


@pytest.mark.parametrize("form", [normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD])
def test_unicode_normalisers_are_accepted(form):
    TokenizerPair(plain_byte_level(), plain_byte_level(normalizer=normalizers.Sequence([form()])))


def test_text_never_becomes_a_special_token(qwen, deepseek, gemma):
    # In a Unigram vocabulary the spelling of a special token is a piece like any other.
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("▁", -2.0)]
    backend = Tokenizer(models.Unigram([*pieces, ("s", -2.0), ("<", -2.0)], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    unigram = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    for tokenizer in (unigram, qwen, deepseek, gemma):
        spelled = token_bytes(tokenizer)
        encoder = TextEncoder(tokenizer, spelled)
        end = tokenizer.eos_token
        texts = [end, f"a{end}{end} b {end}", f"say {end}"]
        for text, ids in zip(texts, encoder(texts), strict=True):
            assert b"".join(spelled[i] for i in ids) == text.encode()


def test_an_id_far_beyond_the_vocabulary_is_refused(tmp_path):
    """Tables are as long as the largest id, and so is the list of gaps that a backend makes when it is copied."""
    folder = shutil.copytree(ASSETS / "student", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    state = json.loads((folder / "tokenizer.json").read_text())

    def with_id(number: int):
        state["model"]["vocab"]["zz"] = number
        (folder / "tokenizer.json").write_text(json.dumps(state))
        return AutoTokenizer.from_pretrained(folder)

    with pytest.raises(ValueError, match="gives its token 'zz' the id 100,000,000, but has 2,049 tokens"):
        token_bytes(with_id(10**8))
    pieces = token_bytes(with_id(5000))  # gaps are usual
    assert pieces[5000] == b"zz" and pieces[4999] is None
