"""Where steps end, in stop strings and in whole solutions."""

import pytest

from trl_hrm.demo.tiny_model import make_tokenizer
from trl_hrm.search.engine import CharTokenizer
from trl_hrm.search.prompts import PROMPTS, Prompt
from trl_hrm.search.steps import RULES, Cut, cut_steps, regex_rule

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
    """`# Answer` and the answer are one piece: cut apart, the last step would hold a number without a word."""
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
    """Blank pieces go with their neighbours: StepTree refuses blank steps."""
    ends = RULES["blank_line"].ends(text)
    assert ends[-1] == len(text) and ends == sorted(set(ends))
    pieces = [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert len(pieces) == 1 or all(piece.strip() for piece in pieces)


def test_stop_strings():
    """A step must end at its own number again, at the next, and at one too many; the first begins with its own."""
    rule = RULES["step_header"]
    assert rule.stop_strings() == ("# Step 2", "# Step 3", "# Step 4")
    assert rule.stop_strings("# Step 2") == ("# Step 2", "# Step 3", "# Step 4")
    assert rule.stop_strings("# Step 9") == ("# Step 9", "# Step 10", "# Step 11")
    assert RULES["blank_line"].stop_strings("\n\n") == ("\n\n",)
    with pytest.raises(ValueError, match="cannot be sampled one at a time. Use a search that cuts whole solutions"):
        regex_rule("x").stop_strings()


@pytest.mark.parametrize("name", list(RULES))
def test_servers_take_all_stop_strings(name):
    """OpenAI's protocol, and with it `vllm serve`, takes four; one of them ends the solution."""
    for stop in (None, *RULES[name].stop_strings()):
        assert 1 <= len(RULES[name].stop_strings(stop)) <= 3


@pytest.mark.parametrize("name", list(RULES))
def test_stop_strings_and_patterns_agree(name):
    """A step sampled up to its stop string and one cut from a solution must end at the same place."""
    rule = RULES[name]
    for stop in rule.stop_strings():
        text = f"First{stop} then more"
        [end, _] = rule.ends(text)
        assert end == text.index(stop) + (0 if rule.header else len(stop))


def test_tail():
    """A header at the end of a step belongs to the next one, with what came after it in the same token."""
    rule = RULES["step_header"]
    assert rule.tail("So 3.\n\n# Step 2", "# Step 2") == 8
    assert rule.tail("So 3.\n\n# Step 2\n", "# Step 2") == 9
    assert rule.tail("So 3.\n# END!", "# END!") == 0
    assert rule.tail("So 3.", None) == 0
    assert RULES["blank_line"].tail("So 3.\n\n", "\n\n") == 0


@pytest.mark.parametrize("name", list(TEXTS))
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_cuts_fall_between_tokens(name, kind):
    """Ids are never made anew: the pieces of the ids, in order, are the ids, and their texts the text."""
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
    """The token that holds the border stays whole; its characters beyond the border count as the next step's."""

    class Pairs(CharTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            return "".join(["A.", "\n\n#", " Step 2"][i] for i in ids)

    assert cut_steps(RULES["step_header"], Pairs(), [], [0, 1, 2], "A.\n\n# Step 2") == [Cut(2, 5, 1), Cut(3, 12, 0)]


def test_prompts():
    """The markers that stop strings and extractors look for must be asked for."""
    for name in ("steps", "formulas"):
        text = PROMPTS[name].text("What is {x}?")
        assert text.endswith("Question: What is {x}?\n\n") and "# Answer" in text and "# END!" in text
        assert PROMPTS[name].final_stops == ("# END!",) and PROMPTS[name].rule in RULES
    assert "# Step 1" in PROMPTS["steps"].text("") and PROMPTS["question"].text("Why?") == "Why?"


def test_a_chat_template_is_rendered_once():
    """The template is text, and its special tokens must not be added a second time."""

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
        ({"template": "Solve it."}, "the policy would never see the problem"),
        ({"template": "{question}", "style": "raw"}, "expected chat or plain"),
        ({"template": "{question}", "style": "plain", "system_prompt": "x"}, "goes with the prompt style chat only"),
    ],
)
def test_a_prompt_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prompt("mine", rule="blank_line", **options)


def test_no_chat_template():
    with pytest.raises(
        ValueError, match="has no chat template, and the prompt style is chat. Use --prompt_style plain"
    ):
        PROMPTS["steps"].encode(CharTokenizer(), "Why?")


def test_a_pattern_that_is_none():
    with pytest.raises(ValueError, match="is no regular expression"):
        regex_rule("(")


def test_the_scripted_policy_writes_what_rules_know():
    """The other tests rest on it: its steps must be found by the rule."""
    import random

    text = write_solution("Question: q\n\n", random.Random(3))
    assert len(RULES["step_header"].ends(text)) == text.count("# Step ")
