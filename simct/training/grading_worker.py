"""Compares answers with math-verify in a process of its own: `grading` starts it, and ends it if an answer takes too long.

Reads lines of JSON, [answer, response], and writes a line for each: true or false; one line "ready" before the first.
"""

import json
import logging
import re
import sys


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} of a text whose braces close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, inside = 1, start + len("\\boxed{")
    for i in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[inside:i]
    return None


def normal(text: str) -> str:
    """A text answer without what does not change it: case, spaces, the \\text around it, a full stop at its end."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"[\s$]+", "", text).rstrip(".").casefold()


def grade(answer: str, response: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    if "####" in answer:  # GSM8K: the solution, then its result
        answer = answer.rpartition("####")[2]
    boxed = last_boxed(answer)
    answer = (answer if boxed is None else boxed).strip()
    given = last_boxed(response)
    if given is not None and normal(given) and normal(given) == normal(answer):
        return True
    # A box, where there is one, is the answer, whatever stands after it.
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    options = {"extraction_config": targets, "fallback_mode": "no_fallback", "parsing_timeout": 3}
    found = parse(response if given is None else f"\\boxed{{{given}}}", **options)
    gold = parse(answer if "$" in answer.strip("$") else f"\\boxed{{{answer.strip('$')}}}", **options)
    return bool(gold and found) and verify(gold, found, timeout_seconds=3)


def main() -> None:
    logging.disable(logging.CRITICAL)  # a failed comparison is an answer, not a message
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # 9^9^9^9 is memory before it is time
    replies, sys.stdout = sys.stdout, sys.stderr
    import math_verify  # noqa: F401

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            correct = grade(*json.loads(line))
        except Exception:  # sampled text can make any part of a parser fail, and is then no right answer
            correct = False
        print(json.dumps(bool(correct)), file=replies, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not to be taken for others of the same name
    main()
