"""Where steps end, when sampled with stop strings and in whole solutions."""

import random
import re

import pytest

from trl_hrm.grading import extract_answer
from trl_hrm.search.engines.base import CharTokenizer
from trl_hrm.search.policy_config import PromptConfig
from trl_hrm.search.prompts import PROMPTS, Prompt
from trl_hrm.search.steps import RULES, Cut, cut_steps, cut_text, regex_rule
from trl_hrm.tiny_model import make_tokenizer

from .scripted import write_solution


TEXTS = {
    "step_header": ["# Step 1\nAdd.\n\n", "# Step 2\nMore.\n\n", "# Step 3\nDone.\n\n# Answer\n\n6\n# END!"],
    "blank_line": ["1 + 2 = 3.\n\n", "3 + 3 = 6.\n \n", "So 6.\n\n# Answer\n\n6"],
    "sentence": ["Add 1.5 and 2. ", "Is it 3? ", "Yes."],
    "formula": ["First \\(1 + 2\\) is\n\n\\[3\\]\n\n", "Then \\(6\\)\n\n", "Good."],
}


@pytest.mark.parametrize("name", ["step_header", "sentence", "formula"])
def test_ends(name):
    """A cut one character off would move text between steps and still read well."""
    ends = RULES[name].ends("".join(TEXTS[name]))
    starts = [0, *ends[:-1]]
    assert ["".join(TEXTS[name])[a:b] for a, b in zip(starts, ends, strict=True)] == TEXTS[name]


def test_blank_lines_keep_the_answer_with_its_marker():
    """`# Answer` and the answer are one step. Otherwise the last step would be a bare number."""
    text = "".join(TEXTS["blank_line"])
    ends = RULES["blank_line"].ends(text)
    assert [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] == [
        "1 + 2 = 3.\n\n",
        "3 + 3 = 6.\n \n",
        "So 6.\n\n",
        "# Answer\n\n6",
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "\n\n\n\nA.\n\n\n\n", "A.", "A.\n\n", "\n\nA."])
def test_no_step_is_blank(text):
    """Blank pieces join their neighbours, because StepTree rejects blank steps."""
    ends = RULES["blank_line"].ends(text)
    assert ends[-1] == len(text) and ends == sorted(set(ends))
    pieces = [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert len(pieces) == 1 or all(piece.strip() for piece in pieces)


def test_stop_strings():
    """A step must end at its own number, the next, and the one after. The first starts with its own header."""
    rule = RULES["step_header"]
    assert rule.stop_strings() == ("# Step 2", "# Step 3", "# Step 4")
    assert rule.stop_strings("# Step 2") == ("# Step 2", "# Step 3", "# Step 4")
    assert rule.stop_strings("# Step 9") == ("# Step 9", "# Step 10", "# Step 11")
    assert RULES["blank_line"].stop_strings("\n\n") == ("\n\n",)
    with pytest.raises(ValueError, match="one at a time.*whole solutions"):
        regex_rule("x").stop_strings()


@pytest.mark.parametrize("name", list(RULES))
def test_servers_take_all_stop_strings(name):
    """OpenAI's protocol, and so `vllm serve`, allows four stop strings. One of them ends the solution."""
    for stop in (None, *RULES[name].stop_strings()):
        assert 1 <= len(RULES[name].stop_strings(stop)) <= 3


@pytest.mark.parametrize("name", list(RULES))
def test_stop_strings_and_patterns_agree(name):
    """A step sampled up to its stop string and a step cut from a solution must end at the same place."""
    rule = RULES[name]
    for stop in rule.stop_strings():
        text = f"First{chr(10) * rule.header}{stop} then more"
        [end, _] = rule.ends(text)
        assert end == text.index(stop) + (0 if rule.header else len(stop))


def test_stop_strings_follow_the_headers_of_the_policy():
    rule = RULES["step_header"]
    assert rule.stop_strings("### Step 2") == rule.stop_strings("# Step 2")
    assert rule.stop_strings("**Step 2:**") == ("**Step 2", "**Step 3", "**Step 4")
    assert rule.stop_strings("  STEP 9.\n") == ("STEP 9", "STEP 10", "STEP 11")


def pieces_of(text: str, rule: str) -> list[str]:
    ends = RULES[rule].ends(text)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    "header",
    [
        "# Step 2",
        "## Step 2",
        "### Step 2",
        "###### Step 2",
        "#Step 2",
        "## Step 2: Conclude",
        "  ## Step 2",
        "\t# Step 2",
        "# STEP 2",
        "## step 12.",
        "**## Step 2**",
        "## **Step 2:** Conclude",
        "**Step 2:**",
        "**Step 2**: Conclude",
        "**Step 2: Conclude**",
        "__Step 2__\n",
        "**Step 2**\n",
        "Step 2:",
        "Step 2\n",
        "Step 2. Conclude",
        "Step 2) Conclude",
        "Step 2 - Conclude",
        "Step 2 – Conclude",
        "Step 2：",
    ],
)
def test_a_header_begins_its_line(header):
    """The whole header belongs to the step that it opens. No `#` may become a step or end one."""
    text = f"Add 3 and 4.\n\n{header} It is 7.\n"
    assert pieces_of(text, "step_header") == ["Add 3 and 4.\n\n", f"{header} It is 7.\n"]


@pytest.mark.parametrize(
    "line",
    [
        "as # Step 2 shows",
        "see ## Step 2 above",
        "Step 2 gives 5.",
        "Step 2, which gives 5,",
        "**Step 2** gives 5.",
        "Step 2.5 is between.",
        "Steps 2: and 3:",
        "By Step 2: 5.",
        "# Steps",
        "## Step-by-step",
        "#2",
        "- # Step 2",
        "```python\n# Step 2: add\nx = 3 + 4\n```",
        "~~~\n## Step 2\n~~~\n",
        "````\n```\n# Step 2\n```\n````",
        "   ```\n# Step 2",
        "<think>\n## Step 2\n</think>",
        "the end # Step 2",
    ],
)
def test_lines_that_are_not_headers(line):
    """Mentions inside sentences, code comments and thinking are not headers."""
    text = f"Add 3 and 4.\n{line}\nIt is 7."
    assert pieces_of(text, "step_header") == [text]


def test_a_header_after_code_counts():
    text = "Run it:\n```\n# Step 1\n```\n# Step 2\nDone. Inline ```x``` code.\n# Step 3\nSo 7."
    assert pieces_of(text, "step_header") == [
        "Run it:\n```\n# Step 1\n```\n",
        "# Step 2\nDone. Inline ```x``` code.\n",
        "# Step 3\nSo 7.",
    ]


def test_the_headers_of_search_and_learn():
    first = "## Step 1: Add the pens\n3 + 4 = 7.\n\n"
    second = "## Step 2: Conclude\nHe has 7 pens.\n\nTherefore, the final answer is: $\\boxed{7}$."
    assert pieces_of(first + second, "step_header") == [first, second]
    assert pieces_of(second, "step_header") == [second]


@pytest.mark.parametrize(
    "pieces",
    [
        ["1. Add 3 and 4.\n", "2. Multiply by 2.\n", "10. Done."],
        ["  1. Add 3 and 4. ", "It is 7.\n", "- 2. Multiply.\n", "* **3.** Done."],
        ["a. Add. ", "Then:\n(i). Multiply.\n", "ii. Done."],
        ["We do two things. ", "1. Add 3. ", "2. Multiply."],
        ["Case 2. It is odd. ", "Step 3. Done."],
        ["So the answer is 7. ", "It is prime."],
        ["It is 3.5 or 1,000.25 of them. ", "Then?"],
        ["See e.g. 3, i.e. three, vs. 4. ", "Then (cf. Fig. 2 and Eq. (3)) go. ", "Yes."],
        ["Dr. Who meets Mrs. St. John for approx. 5 minutes. ", "Then she goes."],
        ["Great! ", "5! = 120 and n! is more, (n - 1)! less, \\int\\! f also. ", "Really? ", "Yes."],
        ['He says "Stop." ', "It is (so to say.) ", "**Bold.** ", "It costs $3.$ ", "So."],
        ["The line passes through A. ", "Then B."],
        ["三加四等于七。", "所以答案是七！", "对吗？", "对"],
        ["３．５を足す。", " 答えは７．", "終わり｡", "はい"],
        ["「七です。」", "と言う。"],
        ["Mixed: 七。", "Then 8. ", "End"],
    ],
)
def test_sentences(pieces):
    """List numbers, decimals, abbreviations and factorials end no sentence. Chinese and Japanese full stops do."""
    assert pieces_of("".join(pieces), "sentence") == pieces


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize(
    ("begin", "thinking", "rest"),
    [
        ("", "<think>\n\n# Step 1\nIs it 7. No.\n\n\\(x\\)\n\n</think>", "\n\nAdd"),
        ("", "Is it 7.\n\n# Step 2\nNo.\n\n</think>", "\n\nAdd"),
        ("So", "<think>\n\n\n# Step 1\nIs it 7. No.", ""),
        ("", "[THINK]\n\nA. B\n\n[/THINK]", "Add"),
    ],
)
def test_no_step_ends_inside_thinking(name, begin, thinking, rest):
    text = begin + thinking + rest
    assert RULES[name].ends(text) == [len(text)]


@pytest.mark.parametrize("tags", ["<think>{}</think>", "[THINK]{}[/THINK]"])
def test_no_step_ends_inside_a_tag_of_thinking(tags):
    """A tag after a full stop, cut in two, would not be recognised, and the thinking would be scored."""
    text = "So it is 4." + tags.format("No. It is 9.") + "It is 5."
    assert RULES["sentence"].ends(text) == [len("So it is 4."), len(text)]
    assert cut_text(text, RULES["sentence"]) == ["So it is 4.", "It is 5."]


@pytest.mark.parametrize("text", ["#", "##\n\n---\n", "<think>a</think>\n#", "**"])
def test_punctuation_alone_is_not_a_step(text):
    assert all(cut_text(text, rule) == [] for rule in RULES.values())


def test_thinking_belongs_to_the_step_after_it():
    text = "<think>\nA?\n\nB!\n</think>\n\nOne.\n\nTwo. <think>C\n\nD</think>\n\nThree.\n\n<think>E</think>"
    assert pieces_of(text, "blank_line") == [
        "<think>\nA?\n\nB!\n</think>\n\nOne.\n\n",
        "Two. <think>C\n\nD</think>\n\n",
        "Three.\n\n<think>E</think>",
    ]


FRAGMENTS = [
    *(
        "# Step 2",
        "## Step 3: x",
        "**Step 4:** y",
        "Step 5",
        "as # Step 6 shows",
        "```",
        "<think>",
        "</think>",
        "\n",
        "\n\n",
    ),
    *(". ", "1. ", "! ", "? ", "。", "」", "e.g. ", "\\)\n\n", "# Answer\n\n", "Add 3", "é", " ", "#", "so"),
]


@pytest.mark.parametrize("name", [*RULES, "regex"])
def test_segmentation_joins_to_the_text(name):
    """No character is lost or moved, no step is blank, and a longer text keeps the earlier step ends."""
    rule = regex_rule(r"(?=Add)|\n") if name == "regex" else RULES[name]
    rng = random.Random(f"segmentation {name}")
    num_steps = 0
    for _ in range(300):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 25)))
        ends = rule.ends(text)
        assert ends == sorted(set(ends)) and ends[-1] == len(text)
        pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        assert "".join(pieces) == text
        num_steps += len(pieces)
        if len(pieces) > 1:
            assert all(set(piece) - set(" \n#`") for piece in pieces)
        if "</think>" in re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL):
            continue  # before a closing tag without an opening one, the text does not look like thinking
        found = [boundary.end for boundary in rule.boundaries(text)]
        for length in range(len(text)):
            for early in rule.boundaries(text[:length]):  # the same, up to spaces and marks that may follow
                assert any(not text[early.end : end].strip(" \n」)*") for end in found if end >= early.end), early
    assert num_steps > 310


@pytest.mark.parametrize("name", list(RULES))
def test_rest_of_a_solution_keeps_its_step_ends(name):
    """After a cut at the first step, the rest of a solution must have the step ends of the whole."""
    rule, rng, compared = RULES[name], random.Random(f"before {name}"), 0
    for _ in range(600):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 25)))
        first, *rest = rule.ends(text)
        if rest and "</think>" not in text[first:]:
            assert rule.ends(text, first) == rest
            cuts = cut_steps(rule, CharTokenizer(), [], [ord(c) for c in text[first:]], text[first:], text[:first])
            assert [first + cut.characters for cut in cuts] == rest
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("name", list(TEXTS))
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_cuts_fall_between_tokens(name, kind):
    """Ids are never re-encoded: the pieces of ids must join to the ids, and their texts to the text."""
    text = "".join(TEXTS[name]).replace("6", "é6")
    tokenizer = CharTokenizer() if kind == "characters" else make_tokenizer(["".join(TEXTS[name])] * 3, 300)
    ids = tokenizer.encode(text, add_special_tokens=False)
    prefix = tokenizer.encode("Why? ", add_special_tokens=False)
    cuts = cut_steps(RULES[name], tokenizer, prefix, ids, text)
    assert cuts[-1] == Cut(len(ids), len(text), 0)
    assert len(cuts) == len(RULES[name].ends(text))
    first = begin = 0
    for cut, end in zip(cuts, RULES[name].ends(text), strict=True):
        assert tokenizer.decode(ids[first : cut.tokens]) == text[begin : cut.characters]
        assert cut.characters - cut.tail == end
        first, begin = cut.tokens, cut.characters


def test_a_cut_inside_a_token_moves_to_its_end():
    """The token at the border stays whole. Its characters after the border count for the next step."""

    class Pairs(CharTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            return "".join(["A.", "\n\n#", " Step 2"][i] for i in ids)

    assert cut_steps(RULES["step_header"], Pairs(), [], [0, 1, 2], "A.\n\n# Step 2") == [Cut(2, 5, 1), Cut(3, 12, 0)]


def test_prompts():
    """The prompt must ask for the markers that stop strings and extractors expect."""
    for name in ("steps", "formulas"):
        text = PROMPTS[name].text("What is {x}?")
        assert text.endswith("Question: What is {x}?\n\n") and "# Answer" in text and "# END!" in text
        assert PROMPTS[name].final_stops == ("# END!",) and PROMPTS[name].rule in RULES
    assert "# Step 1" in PROMPTS["steps"].text("") and PROMPTS["question"].text("Why?") == "Why?"
    # the headers and the answer for which the default prompt asks, as a policy would write them
    text = PROMPTS["boxed"].text("What is {x}?")
    assert text.startswith("What is {x}?\n\n") and PromptConfig().make_prompt()[0] == PROMPTS["boxed"]
    headers = re.findall("# Step [12]", text)
    solution = f"{headers[0]}\n1 + 2 = 3\n\n{headers[1]}\n" + text[text.index("The answer is") :].replace("{}", "{3}")
    rule = RULES[PROMPTS["boxed"].rule]
    assert [piece.partition("\n")[0] for piece in cut_text(solution, rule)] == headers
    assert rule.stop_strings()[0] == headers[1] and extract_answer(solution, ["boxed"]) == "3"


def test_a_chat_template_is_rendered_once():
    """The rendered template contains special tokens, which must not be added a second time."""

    class Chat(CharTokenizer):
        chat_template = "yes"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            assert not tokenize and add_generation_prompt
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    prompt = Prompt("mine", "Q: {question}", "blank_line", system_prompt="Be brief.")
    assert Chat().decode(prompt.encode(Chat(), "Why?")) == "<system>Be brief.<user>Q: Why?<assistant>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Solve it."}, "{question}"),
        ({"template": "{question}", "style": "raw"}, "'raw'.*chat or plain"),
        (
            {"template": "{question}", "style": "plain", "system_prompt": "x"},
            "`system_prompt`.*chat",
        ),
    ],
)
def test_invalid_prompt_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Prompt("mine", rule="blank_line", **options)


def test_no_chat_template():
    with pytest.raises(ValueError, match="no chat template.*--prompt_style plain"):
        PROMPTS["steps"].encode(CharTokenizer(), "Why?")


def test_invalid_pattern_raises():
    with pytest.raises(ValueError, match="regular expression"):
        regex_rule("(")


def test_the_scripted_policy_writes_what_rules_know():
    """Other tests rely on the scripted policy, so the rule must find its steps."""
    text = write_solution("Question: q\n\n", random.Random(3))
    assert len(RULES["step_header"].ends(text)) == text.count("# Step ")
