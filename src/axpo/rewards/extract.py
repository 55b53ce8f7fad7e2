"""Finding the final answer in what the policy wrote."""

import re

_ANSWER_IS = re.compile(r"(?<!\bto )\banswer(?:\s+is\b[* \t]*+:?+|[*_]*+[ \t]*+:)[*_ \t]*+([^\n]*)", re.IGNORECASE)
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str:
    r"""The final answer of one rollout's text, stripped; empty if there is none.

    Looks only after the last `</think>`. The last `<answer>…</answer>` comes first, and inside it the last `\boxed{}`;
    else the last `\boxed{}` of the text; else what follows the last "the answer is" or "answer:" on its line; where
    nothing follows, or there is neither, the last line that is not empty.
    """
    text = text.rpartition("</think>")[2]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        tagged = text[start + len("<answer>") : end]
        boxed = last_boxed(tagged)
        return (tagged if boxed is None else boxed).strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tails = _ANSWER_IS.findall(text)
    if tails and tails[-1].strip():
        return str(tails[-1]).strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last brace-balanced `\boxed{…}`, the innermost of nested ones, or None.

    Escaped braces do not count.
    """
    opened: list[tuple[int, bool]] = []  # where the content of each open brace begins, and whether it is boxed
    start, end = -1, -1
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            if opened:
                begin, boxed = opened.pop()
                if boxed and begin > start:
                    start, end = begin, match.start()
        elif match[0].endswith("{") and match[0] != r"\{":
            opened.append((match.end(), match[0] != "{"))
    return None if start < 0 else text[start:end]
