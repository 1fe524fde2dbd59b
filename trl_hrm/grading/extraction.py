"""The answer that a solution states."""

import re
from collections.abc import Sequence


NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-−]\$?)?"  # a sign, but no minus between two terms
    r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# DeepSeek-R1 and Qwen write <think>, Magistral [THINK], Kimi ◁think▷.
_THINKING_TAG = re.compile(r"<(/?)think(?:ing)?>|\[(/?)think\]|◁(/?)think▷", re.IGNORECASE)


def thinking_spans(text: str) -> list[tuple[int, int]]:
    """
    Return where a reasoning model's thinking begins and ends in a text, tags included.

    Chat templates such as DeepSeek-R1's open the tag in the prompt. A closing tag without an opening one therefore ends
    thinking that began with the text. A tag that is never closed was cut off, and its thinking reaches to the end.

    Args:
        text (`str`):
            What the model wrote.

    Returns:
        `list[tuple[int, int]]`: Start and end of each span, in ascending order and without overlap.
    """
    spans: list[tuple[int, int]] = []
    start = None
    for tag in _THINKING_TAG.finditer(text):
        if not any(tag.groups()):
            start = tag.start() if start is None else start
        elif start is None:
            spans = [(0, tag.end())]
        else:
            spans.append((start, tag.end()))
            start = None
    return spans if start is None else [*spans, (start, len(text))]


def visible_text(text: str) -> str:
    """Return a text without its thinking. See [`thinking_spans`]."""
    kept, position = [], 0
    for start, end in thinking_spans(text):
        kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def _after_marker(text: str) -> str:
    """What follows the last line `# Answer`, up to `# END!`: the format of the HRM paper's prompts."""
    before = list(re.finditer(r"^[ \t]*#+[ \t]*Answer:?[ \t]*\r?$", text, re.MULTILINE))
    return text[before[-1].end() :].split("# END!")[0] if before else ""


def last_box(text: str) -> str:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`. A box that is never closed was cut off: it holds no answer."""
    content, position = "", 0
    while box := BOX.search(text, position):
        end = _closing_brace(text, box.end())
        if end is None:
            return ""
        content, position = text[box.end() : end], end
    return open_box(content)


def open_box(text: str) -> str:
    """The content of a text that is one box, and of the boxes in it; any other text as it is."""
    text = text.strip()
    while (box := BOX.match(text)) and _closing_brace(text, box.end()) == len(text) - 1:
        text = text[box.end() : -1].strip()
    return text


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return None


def _after_hash(text: str) -> str:
    """What follows the last `####` at the start of a line: GSM8K's format."""
    lines = re.findall(r"^[ \t]*####(?!#)(.*)$", text, re.MULTILINE)
    return lines[-1] if lines else ""


def _last_number(text: str) -> str:
    numbers = NUMBER.findall(text)
    return numbers[-1].replace("−", "-").replace("$", "") if numbers else ""


EXTRACTORS = {"marker": _after_marker, "boxed": last_box, "hash": _after_hash, "last_number": _last_number}


def extract_answer(text: str, extractors: Sequence[str] = ("marker", "boxed", "hash")) -> str | None:
    r"""
    The answer that a solution states.

    Args:
        text (`str`):
            The solution.
        extractors (`Sequence[str]`, *optional*, defaults to `("marker", "boxed", "hash")`):
            Where to look, in this order. `"marker"`: after the last line `# Answer`, up to `# END!` or the end.
            `"boxed"`: in the last `\boxed{...}` or `\fbox{...}`; one that the end of the text cuts off counts, and holds
            nothing. `"hash"`: after the last `####` that starts a line. `"last_number"`: the last number, such as `-3`,
            `1,234.5`, `.5` or `3/4`; of a fraction in LaTeX it sees the denominator only.

    Returns:
        `str` or `None`: The first answer found that is not empty, without surrounding whitespace. `None` if there is none.

    Raises:
        `ValueError`: If there is no extractor of a name.
    """
    unknown = [name for name in extractors if name not in EXTRACTORS]
    if unknown:
        raise ValueError(f"there is no answer extractor {unknown[0]!r}, expected some of {', '.join(EXTRACTORS)}.")
    return next((answer for name in extractors if (answer := EXTRACTORS[name](text).strip())), None)
