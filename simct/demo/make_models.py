"""Makes the demo's two models and its prompts from text that every Python installation carries.

    python -m simct.demo.make_models            # about 20 minutes on two cores; rewrites simct/demo/assets/

The corpus is the prose of the standard library: `pydoc_data.topics` and the docstrings of its modules. The *teacher* is a small
Llama with a byte-level BPE tokenizer and trains for many steps; the *student* is a smaller Gemma-2 (soft-capped logits, tied head)
with a SentencePiece-style tokenizer with byte fallback and trains for few. Distillation then has something to teach, across two
tokenizers that disagree as those of real families do. Results differ a little between Python versions, since the corpus does.
"""

import argparse
import ast
import inspect
import json
import random
import re
import sysconfig
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM as AutoModel
from transformers import Gemma2Config, LlamaConfig, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

ASSETS = Path(__file__).parent / "assets"
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__"}
HELD_OUT, TRAIN_PROMPTS, PROMPT_WORDS = 200, 800, 6


def paragraphs() -> list[str]:
    """Paragraphs of English prose, 40 to 500 characters each, without duplicates, in a fixed order."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if SKIPPED.isdisjoint(file.relative_to(library).parts):
            texts.extend(docstrings(file.read_text(encoding="utf-8", errors="ignore")))
    found = {}
    for text in texts:
        for block in re.split(r"\n\s*\n", text):
            block = inspect.cleandoc(block).strip()
            letters = sum(c.isalpha() or c == " " for c in block)
            if 40 <= len(block) <= 500 and ">>>" not in block and "  " not in block and letters > 0.82 * len(block):
                found[block] = None
    return list(found)


def docstrings(source: str):
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # the standard library keeps some files that are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text


def teacher_tokenizer(corpus: list[str], size: int = 3072) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the usual pre-tokenisation: a word carries the space before it, newlines stand alone."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def student_tokenizer(corpus: list[str], size: int = 2048) -> PreTrainedTokenizerFast:
    """Gemma's structure: spaces become `▁`, no other pre-tokenisation than before a space, bytes as a fallback."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials + byte_tokens, limit_alphabet=200, show_progress=False
    )
    # Other text than the teacher's, so that the merges differ: every second paragraph, its lines cut at odd places.
    learner.train_from_iterator((text[3:].replace("\n", " \n") for text in corpus[::2]), trainer)
    learned = json.loads(learner.to_str())["model"]
    model = models.BPE(
        vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def student_config(tokenizer: PreTrainedTokenizerFast) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=512, sliding_window=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def train(config, tokenizer, corpus: list[str], *, steps: int, seed: int, batch: int = 32, rate: float = 2e-3):
    """A plain language model: next-token cross entropy on paragraphs, each closed by the end-of-text token."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20 + 1, steps)
    for step, (ids, labels) in enumerate(batches(tokenizer, corpus, steps, seed, batch)):
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"{config.model_type} step {step:5d} loss {loss.item():.3f}", flush=True)
    return model


def batches(tokenizer, corpus: list[str], steps: int, seed: int, batch: int = 32):
    """For each step its token ids [batch, width] and labels, -100 where there is filling; each text is closed by the end-of-text
    token."""
    documents = [ids + [tokenizer.eos_token_id] for ids in tokenizer(corpus)["input_ids"]]
    draw = random.Random(seed)
    for step in range(steps):
        # Documents of like length share a batch: less padding.
        start = draw.randrange(len(documents))
        pool = sorted((documents[(start + i) % len(documents)] for i in range(batch * 4)), key=len)
        offset = draw.randrange(4) * batch
        chosen = pool[offset : offset + batch]
        width = max(map(len, chosen))
        ids = torch.full((batch, width), tokenizer.pad_token_id)
        labels = torch.full((batch, width), -100)
        for row, document in enumerate(chosen):
            ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
        yield ids, labels
        if (step + 1) % len(documents) == 0:
            draw.shuffle(documents)


def save(model, tokenizer, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)  # half the size; the demo computes in float32
    tokenizer.save_pretrained(folder)
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    print(f"{folder}: {model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, {size:.1f} MB")


def prompts(held_out: list[str], corpus: list[str]) -> None:
    """The first words of paragraphs: the held-out ones for evaluation, others for training."""
    for name, texts in ("eval", held_out), ("train", corpus[:TRAIN_PROMPTS]):
        lines = []
        for text in texts:
            words = re.findall(r"\s*\S+", text)
            if len(words) > 3:
                lines.append(json.dumps({"prompt": "".join(words[: min(PROMPT_WORDS, len(words) // 2)])}))
        (ASSETS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--student-steps", type=int, default=2000)
    args = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    corpus = paragraphs()
    random.Random(0).shuffle(corpus)
    held_out, corpus = corpus[:HELD_OUT], corpus[HELD_OUT:]
    print(f"{len(corpus)} paragraphs, {sum(map(len, corpus)) / 1e6:.2f} M characters; {HELD_OUT} held out")
    prompts(held_out, corpus)
    tokenizer = student_tokenizer(corpus)
    save(
        train(student_config(tokenizer), tokenizer, corpus, steps=args.student_steps, seed=1),
        tokenizer,
        ASSETS / "student",
    )
    tokenizer = teacher_tokenizer(corpus)
    save(
        train(teacher_config(tokenizer), tokenizer, corpus, steps=args.teacher_steps, seed=2),
        tokenizer,
        ASSETS / "teacher",
    )


if __name__ == "__main__":
    main()
