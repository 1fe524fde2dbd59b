"""The answer that a solution states."""

import re
from collections.abc import Sequence


NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-−]\$?)?"  # a sign, but no minus between two terms
    r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# MATH has some boxes without braces: `$\boxed 5$`.
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?:(?=\d)|\s+)(-?\w+(?:[./]\w+)*)(?=[.,;]?\s*(?:\$|\\[)\]]|\n|\Z))")
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


# The heading of the HRM paper's prompts, with what policies make of it: bold, with a colon, with the answer behind it.
_MARKER = re.compile(
    r"^[ \t*]*#+[ \t*]*(?:Final[ \t]+)?(?:Answer|ANSWER)[ \t*]*(?:(?:is\b[ \t]*)?[:：]|is\b|(?=[-+$\\\d])|(?=\r?$))[ \t*]*",
    re.MULTILINE,
)
_BOX_JOINT = re.compile(
    r"(?:[$\s]|\\[()\[\]]|\\q?quad)*(?:,|;|&|,?\s*(?:\\text\s*\{)?\s*(?P<word>and|or)\b\s*\}?)?(?:[$\s]|\\[()\[\]]|\\q?quad)*"
    r"(?:(?P<name>[A-Za-z](?:_\w)?)[$\s]*(?:=|\bis\b|\bare\b)|(?:the|its)\s+(?!final|answer|result|total|sum|solution)[a-z]+(?:\s[a-z]+){0,2}\s"
    r"(?:is|are|equals))?(?:[$\s]|\\[()\[])*"
)
_BOX_NAME = re.compile(r"(?<![\w\\])([A-Za-z](?:_\w)?)[$\s]*(?:=|\bis)(?:[$\s]|\\[()\[])*$")
_STATEMENT = re.compile(
    r"(?<!#)(?<!# )\banswers?(?:\s+(?:to|of|for)\s[^.:\n]{1,80}?)?[*_\s]{0,4}(?:(?:is|are)\b(?!\s+not\b)[*\s]*[:：]?|[:：=])"
    r"|^[*_ \t]*(?:final\s+)?answer[*_ \t]*$|答案\s*应?(?:[是为]\s*[:：]?|[:：])|^答\s*[:：]",
    re.IGNORECASE | re.MULTILINE,
)
# "The answer is correct." judges an answer that was stated before.
_COMMENT = re.compile(
    r"[*\s]*(?:indeed\s+|also\s+)?(?:(?:in)?correct|wrong|consistent|reasonable|verified|confirmed|plausible)\b"
)
_SENTENCE_END = re.compile(r"(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bSt)(?<=[^\s.])\.(?=[*$]*(?:\s+[A-Z]|\s*$))|。")
_REASON = re.compile(r"[,;.]?\s+\(?(?:because|since|I hope|[Ee]xplanation:|[Nn]ote:|so that)\b")
_DANGLING = re.compile(r"(?:[:：=,]|\b(?:is|are|or|and))[*\s]*$")
_PROSE_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")


def _after_marker(text: str) -> str:
    """What follows the last heading `# Answer`, up to `# END!`: the format of the HRM paper's prompts."""
    markers = list(_MARKER.finditer(text))
    return _first_statement(text[markers[-1].end() :].split("# END!")[0]) if markers else ""


def _in_tags(text: str) -> str:
    """The content of the last `<answer>...</answer>`. One that is never closed was cut off: it holds no answer."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return _first_statement(text[start + len("<answer>") : end]) if 0 <= start < end else ""


def _after_statement(text: str) -> str:
    """What follows the last `the answer is`, `Answer:` or `答案是`, up to the end of the sentence."""
    statements = list(_STATEMENT.finditer(text))
    if not statements:
        return ""
    start = next(
        (one.end() for one in reversed(statements) if not _COMMENT.match(text, one.end())), statements[-1].end()
    )
    return _SENTENCE_END.split(_first_statement(text[start:]), maxsplit=1)[0].strip("* \t")


def _first_statement(text: str) -> str:
    """The answer at the beginning of a text: its boxes, or its first lines up to an explanation."""
    if BOX.search(text):
        return last_box(text)
    kept: list[str] = []
    for line in text.strip().splitlines():
        before = "\n".join(kept)
        is_open_formula = (
            before.count("$$") % 2 == 1
            or before.count("\\[") > before.count("\\]")
            or before.count("\\begin{") > before.count("\\end{")
        )
        if kept and not (is_open_formula or _DANGLING.search(kept[-1])):
            begins_anew = not line.strip() or len(_PROSE_WORD.findall(line)) >= 3
            if begins_anew and not re.match(r"\s*(?:or|and)\b", line):
                break
        if line.strip():
            kept.append(line)
    return _REASON.split("\n".join(kept), maxsplit=1)[0]


def last_box(text: str) -> str:
    r"""
    Content of the last `\boxed{...}` or `\fbox{...}`, or of several that together are the answer: `\boxed{3} and \boxed{5}`
    is `3 and 5`, and `x = \boxed{3}, y = \boxed{5}` is `x = 3, y = 5`. A box that is never closed was cut off: it holds no
    answer.
    """
    text = _BARE_BOX.sub(r"\\boxed{\1}", text)
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while box := BOX.search(text, position):
        end = _closing_brace(text, box.end())
        if end is None:
            return ""
        boxes.append((box.start(), end + 1, open_box(text[box.end() : end])))
        position = end
    if not boxes:
        return ""
    first = len(boxes) - 1
    joints: list[re.Match] = []
    while first and (joint := _BOX_JOINT.fullmatch(text[boxes[first - 1][1] : boxes[first][0]])):
        if "\n" in joint.group() and not re.search(r"[,;&]|and|or", joint.group()):
            break
        joints.insert(0, joint)
        first -= 1
    contents = [content for _, _, content in boxes[first:]]
    if len(set(contents)) == 1:
        return contents[0]
    name = _BOX_NAME.search(text[max(0, boxes[first][0] - 40) : boxes[first][0]])
    names = [found and found[1] if i == 0 else found["name"] for i, found in enumerate([name, *joints])]
    if all(names):
        contents = [f"{name} = {content}" for name, content in zip(names, contents, strict=True)]
    joined = contents[0]
    for joint, content in zip(joints, contents[1:], strict=True):
        joined += (f" {joint['word']} " if joint["word"] else ", ") + content
    return joined


def open_box(text: str) -> str:
    """The content of a text that is one box, and of the boxes in it; any other text as it is."""
    text = text.strip()
    while (box := BOX.match(text)) and _closing_brace(text, box.end()) == len(text) - 1:
        text = text[box.end() : -1].strip()
    return text


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ and \} do not count
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


EXTRACTORS = {
    "marker": _after_marker,
    "tag": _in_tags,
    "boxed": last_box,
    "hash": _after_hash,
    "answer_is": _after_statement,
    "last_number": _last_number,
}
DEFAULT_EXTRACTORS = ("marker", "tag", "boxed", "hash", "answer_is")


def extract_answer(text: str, extractors: Sequence[str] = DEFAULT_EXTRACTORS) -> str | None:
    r"""
    Return the answer that a solution states. The thinking of a reasoning model is left out (see [`visible_text`]), and a
    solution that was cut off while thinking has no answer.

    Args:
        text (`str`):
            The solution.
        extractors (`Sequence[str]`, *optional*, defaults to `("marker", "tag", "boxed", "hash", "answer_is")`):
            Where to look, in this order:

            - `"marker"`: after the last heading `# Answer`, up to `# END!` or an explanation.
            - `"tag"`: in the last `<answer>...</answer>`.
            - `"boxed"`: in the last `\boxed{...}` or `\fbox{...}`, or in several that are joined by commas, `and` or `or`.
            - `"hash"`: after the last `####` at the start of a line.
            - `"answer_is"`: after the last `the answer is`, `Answer:` or `答案是`, up to the end of the sentence.
            - `"last_number"`: the last number, such as `-3`, `1,234.5`, `.5` or `3/4`. Of a fraction in LaTeX it sees the
              denominator only.

            A box or tag that the end of the text cuts off counts, and holds nothing.

    Returns:
        `str` or `None`: The first answer found that is not empty, without surrounding whitespace.

    Raises:
        `ValueError`: If an extractor is unknown.
    """
    unknown = [name for name in extractors if name not in EXTRACTORS]
    if unknown:
        raise ValueError(f"there is no answer extractor {unknown[0]!r}, expected some of {', '.join(EXTRACTORS)}.")
    tags = _THINKING_TAG.findall(text)
    if tags and not any(tags[-1]):  # cut off while thinking
        return None
    text = visible_text(text)
    return next((answer for name in extractors if (answer := EXTRACTORS[name](text).strip())), None)


def opens_thinking(prompt: str) -> bool:
    """Return whether a prompt ends with the tag that opens a reasoning model's thinking, as chat templates may write it."""
    tags = list(_THINKING_TAG.finditer(prompt.rstrip()))
    return bool(tags) and not any(tags[-1].groups()) and tags[-1].end() == len(prompt.rstrip())


def without_thinking_tags(text: str) -> str:
    """Return a text with its thinking, but without the tags around it."""
    return _THINKING_TAG.sub("", text)
