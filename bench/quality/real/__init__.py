"""The study with real tokenizers, on one GPU, in minutes: `python -m bench.quality.real`.

Qwen's and DeepSeek's whole vocabularies, both directions at once. Problems with short verifiable answers, in words and numbers; the
teachers and the students are trained on the spot, the students until they solve some 40 %; then every arm, two seeds each, side by
side. `--rehearse` does all of it at toy size on a CPU.
"""
