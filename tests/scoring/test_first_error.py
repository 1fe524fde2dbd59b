"""Judges that name the first wrong step: how each answer is read, and the votes and scores that follow from known answers."""

import json
import math

import pytest

from trl_hrm import GenerativeScorer, JudgeTemplate, StepTree
from trl_hrm.intervals import wilson_interval
from trl_hrm.scoring.generative_scorer import StepJudgement
from trl_hrm.scoring.judge_templates import FAULTS, TEMPLATES, FirstError

from .judges import Judge, genprm, instruct, thinkprm


STEPS = ["a", "b", "c"]
# Responses to a solution of three steps, as many kinds as judges are known to write, with the vote or the fault
READINGS = [
    # readable
    (r"All fine until step 2, where 3 + 3 is not 7. \boxed{2}", 1),
    (r"\boxed{1}", 0),
    (r"\boxed{3}", 2),
    (r"\boxed{-1}", -1),
    (r"$\boxed{2}$", 1),
    (r"\[\boxed{ 2 }\]", 1),
    ("\\boxed{\n2\n}", 1),
    (r"\boxed {2}", 1),
    (r"**Answer:** \boxed{2}.", 1),
    (r"So it is \boxed{2}. As said: \boxed{2}", 1),  # equal boxes
    (r"Schritt 2 ist falsch, denn 3 + 3 = 6. \boxed{2}", 1),  # another language
    ("第二步错误。\\boxed{2}", 1),
    (r"<think>Is it \boxed{1}? Or \boxed{3}?</think>\boxed{2}", 1),  # other boxes in thinking
    (r"Is it \boxed{1}?</think>\boxed{2}", 1),  # the prompt has opened the thinking
    (r"<think>a</think>\boxed{2}<think>\boxed{3}</think>", 1),
    (r'{"first_error": "\boxed{2}"}', 1),
    (r"\boxed{2} is my answer, and not 3", 1),
    # prose
    ("The second step is wrong.", "no_box"),
    ("Step 2", "no_box"),
    ("2", "no_box"),
    ("I cannot judge this.", "no_box"),
    # nothing
    ("", "empty"),
    (" \n ", "empty"),
    (r"<think>It must be \boxed{2}", "empty"),  # thinking that does not end
    (r"<think>\boxed{2}</think>", "empty"),
    # steps that do not exist
    (r"\boxed{0}", "no_such_step"),
    (r"\boxed{4}", "no_such_step"),
    (r"\boxed{99999999}", "no_such_step"),
    # several
    (r"\boxed{2} or \boxed{3}", "several_boxes"),
    (r"\boxed{-1} ... wait, \boxed{2}", "several_boxes"),
    (r"I must end with \boxed{k} or \boxed{-1}. \boxed{2}", "several_boxes"),
    (r"\boxed{2} \boxed{}", "several_boxes"),
    # another content
    (r"\boxed{\text{2}}", "not_a_number"),
    (r"\boxed{2.0}", "not_a_number"),
    (r"\boxed{2, 3}", "not_a_number"),
    (r"\boxed{Step 2}", "not_a_number"),
    (r"\boxed{step 2 is wrong}", "not_a_number"),
    (r"\boxed{k}", "not_a_number"),
    (r"\boxed{}", "not_a_number"),
    (r"\boxed{{2}}", "not_a_number"),
    (r"\boxed{02}", "not_a_number"),
    (r"\boxed{+2}", "not_a_number"),
    (r"\boxed{2nd}", "not_a_number"),
    (r"\boxed{1e0}", "not_a_number"),
    ("\\boxed{２}", "not_a_number"),  # full-width digit
    ("\\boxed{٢}", "not_a_number"),  # Arabic digit
    (r"\boxed{二}", "not_a_number"),
    (r"\boxed{None}", "not_a_number"),
    (r"\boxed{all correct}", "not_a_number"),
    (r"\boxed{- 1}", "not_a_number"),
    (r"\boxed{-1.}", "not_a_number"),
    ("\\boxed{\u22121}", "not_a_number"),  # minus sign
    (r"\boxed{-2}", "not_a_number"),
    (r"\boxed{" + "9" * 5000 + "}", "not_a_number"),
    # boxes that are not closed, or have no braces
    (r"It is \boxed{2", "damaged_box"),
    (r"\boxed{2} \boxed{", "damaged_box"),
    (r"\boxed 2", "damaged_box"),
    (r"\boxed{\text{2}", "damaged_box"),
    # other formats
    ('{"first_error": 2}', "no_box"),
    ("<answer>2</answer>", "no_box"),
    (r"\fbox{2}", "no_box"),
    (r"\boxedtext{2}", "no_box"),
    (r"boxed{2}", "no_box"),
]


@pytest.mark.parametrize(("text", "expected"), READINGS)
def test_reading(text, expected):
    found = TEMPLATES["first_error"].read_first_error(text, "eos", len(STEPS))
    assert found == (FirstError(expected) if isinstance(expected, int) else FirstError(None, expected))
    assert found.fault is None or found.fault in FAULTS
    assert TEMPLATES["first_error"].read_first_error(text, "length", len(STEPS)) == FirstError(None, "cut_off")


def test_other_numbers():
    """Numbers are read as the prompt shows them."""
    template = JudgeTemplate(
        scope="first_error",
        user="{problem} {steps} End with \\boxed{k}, or with \\boxed{none}.",
        step="<paragraph_{number}>{step}</paragraph_{number}>",
        step_separator="\n",
        first_number=0,
        none="none",
    )
    prompt = Judge(instruct).tokenizer.decode(template.encode(Judge(instruct).tokenizer, "1+1?", ["a", "Step 9: b"]))
    assert "1+1? <paragraph_0>a</paragraph_0>\n<paragraph_1>b</paragraph_1> End" in prompt
    for content, vote in (("0", 0), ("1", 1), ("none", -1), ("2", None), ("-1", None)):
        assert template.read_first_error(f"\\boxed{{{content}}}", "eos", 2).vote == vote


def test_prompt():
    tokenizer = Judge(instruct).tokenizer
    prompt = tokenizer.decode(TEMPLATES["first_error"].encode(tokenizer, "1+1?", ["# Step 1\na {answer}", "b"]))
    assert "# Problem\n\n1+1?\n\n# Solution\n\nStep 1: a {answer}\n\nStep 2: b\n\n# Task\n\n" in prompt
    assert "the last step has the number 2" in prompt and "answer" not in prompt.replace("{answer}", "")
    prompt = tokenizer.decode(TEMPLATES["first_error_reference"].encode(tokenizer, "1+1?", ["a"], answer="{steps} 2"))
    assert "\n\n# Correct answer\n\n{steps} 2\n\n# Task\n\nThe solution may have another final answer." in prompt
    with pytest.raises(ValueError, match="first_error_reference shows the reference answer"):
        TEMPLATES["first_error_reference"].encode(tokenizer, "1+1?", ["a"])


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("# Step 2\na", "a"),
        ("## Step 12: a", "a"),
        ("# Step 2 a", "a"),
        ("Step 2. a", "a"),
        ("Step 2:3 is odd", "3 is odd"),
        ("Step 2\na", "a"),
        ("Step 2", ""),
        ("**Step 2:** a", "a"),
        ("**Step 2: Add.** a", "Add.** a"),
        ("step 2 - a", "a"),
        ("Step 2.5 m are left", "Step 2.5 m are left"),
        ("Step 2 gives 5", "Step 2 gives 5"),
        ("By Step 2: a", "By Step 2: a"),
    ],
)
def test_only_a_heading_is_the_number_of_a_step(step, text):
    tokenizer = Judge(instruct).tokenizer
    prompt = tokenizer.decode(TEMPLATES["first_error"].encode(tokenizer, "1+1?", [step]))
    assert f"# Solution\n\nStep 1: {text}\n\n# Task" in prompt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"user": "{problem} {steps}"}, "does not say that the response must contain"),
        ({"user": "{problem} {steps} \\boxed{k}"}, "does not say"),
        ({"user": "{problem} \\boxed{-1}"}, "does not contain"),
        ({"none": "1"}, "`none` is '1'"),
        ({"none": "0", "first_number": 0}, "`none` is '0'"),
        ({"none": " -1"}, "without braces"),
        ({"none": ""}, "`none` is ''"),
        ({"none": "{-1}"}, "without braces"),
        ({"first_number": -1}, "`first_number` is -1"),
        ({"step": "{step}"}, "must contain {number}"),
        ({"closing": "So "}, "`closing` has no effect"),
        ({"yes": "Right"}, "`yes` has no effect"),
        ({"stop": ["x"]}, "`stop` has no effect"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"scope": "step", "user": "{problem} {step} Verdict: Yes No", "first_number": 0}, "only apply with"),
    ],
)
def test_invalid_templates(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"scope": "first_error", "user": "{problem} {steps} \\boxed{-1}"} | content))
    with pytest.raises(ValueError, match=message) as caught:
        JudgeTemplate.load(str(path))
    assert str(path) in str(caught.value)


# Votes and scores


def answering(*boxes):
    """Return a judge whose response i is the i-th box, in order of the seeds of a request."""
    responses = iter(boxes)
    return Judge(lambda prompt, rng: next(responses))


def judged(engine, steps, template="first_error", **options):
    scorer = GenerativeScorer(engine, template, **options)
    [[found]] = scorer.judge_solutions(["1+1?"], [[steps]], ["2"])
    return found, scorer


def test_votes_and_scores_of_given_answers():
    engine = answering(r"\boxed{2}", r"\boxed{-1}", "hm", r"\boxed{3}", r"\boxed{2}", r"\boxed{7}")
    found, scorer = judged(engine, STEPS, num_samples=6)
    assert [vote.vote for vote in found.votes] == [1, -1, None, 2, 1, None]
    assert [vote.fault for vote in found.votes] == [None, None, "no_box", None, None, "no_such_step"]
    # the share of the four readable responses without an error up to the step
    assert [step.score for step in found.steps] == [1.0, 0.5, 0.25]
    assert found.steps[1] == StepJudgement(0.5, *wilson_interval(2, 4), 4)
    assert (scorer.cost["prompts"], scorer.cost["samples"], scorer.cost["unreadable"]) == (1, 6, 2)
    assert scorer.describe()["verdicts"] == "votes"


def test_reference_answer_is_in_the_prompt():
    engine = answering(r"\boxed{-1}")
    found, _ = judged(engine, ["a"], "first_error_reference", num_samples=1)
    assert found.votes == [FirstError(-1)] and "# Correct answer\n\n2\n" in engine.requests[0][0]
    scorer = GenerativeScorer(answering(), "first_error_reference", num_samples=1)
    with pytest.raises(ValueError, match="shows the reference answer"):
        scorer.score(["1+1?"], [[["a"]]])


def test_thinking_that_the_prompt_opens():
    """Until the tag is closed, the response is thinking, although it does not contain the opening tag."""
    template = JudgeTemplate(scope="first_error", user="{problem} {steps} \\boxed{-1}", start="<think>\n")
    found, _ = judged(answering(r"Hm, \boxed{1}", r"\boxed{1}</think>\boxed{2}"), STEPS, template, num_samples=2)
    assert found.votes == [FirstError(None, "empty"), FirstError(1)]


def test_cut_off_and_too_long():
    found, _ = judged(answering(r"\boxed{1}", r"\boxed{1}" + "x" * 50), ["a"], num_samples=2, max_tokens=40)
    assert found.votes == [FirstError(0), FirstError(None, "cut_off")]
    size = len(TEMPLATES["first_error"].encode(Judge(instruct).tokenizer, "1+1?", ["a"]))
    engine = answering(r"\boxed{1}")
    engine.max_length = size + 20
    found, scorer = judged(engine, ["a"], num_samples=1, max_tokens=20)
    assert found.votes == [FirstError(0)]
    found, scorer = judged(engine, ["ab"], num_samples=2, max_tokens=20)
    assert found.votes == [FirstError(None, "too_long")] * 2 and found.steps == [StepJudgement.of([])]
    assert (scorer.cost["too_long"], scorer.cost["samples"], len(engine.requests)) == (1, 0, 1)


def test_branches_are_refused():
    scorer = GenerativeScorer(answering(r"\boxed{2}"), "first_error", num_samples=1)
    with pytest.raises(ValueError, match="2 solutions with common steps"):
        scorer.score_trees([StepTree("1+1?", ["a", "b", "c"], [None] * 3, [-1, 0, 0])])
    assert scorer.score_trees([StepTree("1+1?", ["a", "b"], [None] * 2, [-1, 0])]) == [[1.0, 0.0]]


def test_known_error_rate():
    """The votes are a binomial sample of a judge that finds the error of step 2 in 70 %, and no error otherwise."""
    engine = Judge(lambda prompt, rng: r"\boxed{2}" if rng.random() < 0.7 else r"\boxed{-1}")
    found, _ = judged(engine, STEPS, num_samples=600)
    hits = sum(vote.vote == 1 for vote in found.votes)
    assert {vote.vote for vote in found.votes} == {1, -1}
    assert abs(hits - 420) < 4 * math.sqrt(600 * 0.7 * 0.3)
    assert [step.score for step in found.steps] == pytest.approx([1.0, 1 - hits / 600, 1 - hits / 600])


# Votes of the other scopes


def test_vote_of_steps_is_the_first_no():
    """Response i of each step gives vote i. A response without a verdict before the first no makes it unreadable."""
    answers = {"a": ["Yes", "No", "?", "Yes"], "b": ["No", "?", "No", "Yes"], "c": ["No", "No", "No", "Yes"]}

    def script(prompt, rng):
        step = prompt.partition("Check Step ")[2][0]
        word = answers["abc"[int(step) - 1]].pop(0)
        return f"Verdict: {word}"

    found, _ = judged(Judge(script), STEPS, "instruct", num_samples=4)
    assert found.votes == [FirstError(1), FirstError(0), FirstError(None, "no_verdict"), FirstError(-1)]
    assert [step.score for step in found.steps] == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.25]


def test_vote_of_turns():
    found, _ = judged(Judge(genprm), ["a p1", "b p0", "c p1"], "genprm", num_samples=3)
    assert found.votes == [FirstError(1)] * 3

    def script(prompt, rng):
        return "?" if prompt.endswith("\\boxed{") and "b p1" in prompt else genprm(prompt, rng)

    found, _ = judged(Judge(script), ["a p1", "b p1", "c p1"], "genprm", num_samples=2)
    assert found.votes == [FirstError(None, "no_verdict")] * 2


def test_vote_of_solutions():
    found, _ = judged(Judge(thinkprm), ["a p1", "b p0", "c p1"], "thinkprm", num_samples=2)
    assert found.votes == [FirstError(1)] * 2

    def contradicts(prompt, rng):
        if prompt.endswith("Is the solution correct? "):
            return "No"
        return r"\boxed{correct} \boxed{correct}</think>"

    found, scorer = judged(Judge(contradicts), ["a", "b"], "thinkprm", num_samples=1)
    assert found.votes == [FirstError(None, "contradiction")]
    assert [step.score for step in found.steps] == [1.0, 0.0]


# The log


def test_log_has_the_faults_and_is_read_again(tmp_path):
    options = {"num_samples": 3, "log": tmp_path / "log.jsonl"}
    found, scorer = judged(answering("hm", r"\boxed{2}", r"\boxed{9}"), STEPS, **options)
    scorer.close()
    again, scorer = judged(answering(), STEPS, **options)
    assert again == found and scorer.cost["reused_samples"] == 3
    scorer.close()
    header, line = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert header["template"]["none"] == "-1"
    assert [sample.get("fault") for sample in line["samples"]] == ["no_box", None, "no_such_step"]
    assert [sample["steps"] for sample in line["samples"]] == [[], [True, False], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": [True] * 4}, "verdicts on 4 steps of a prompt with 3"), ({"fault": "x"}, "fault")],
)
def test_damaged_log(tmp_path, change, message):
    options = {"num_samples": 1, "log": tmp_path / "log.jsonl"}
    _, scorer = judged(answering(r"\boxed{-1}"), STEPS, **options)
    scorer.close()
    header, line = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    line["samples"][0] |= change
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (header, line)))
    with pytest.raises(ValueError, match=rf"log\.jsonl:2: .*{message}"):
        judged(answering(), STEPS, **options)


def test_log_of_an_earlier_version(tmp_path):
    """It has no faults, and no fields of the new scope."""
    options = {"num_samples": 2, "log": tmp_path / "log.jsonl"}
    found, scorer = judged(Judge(lambda prompt, rng: "hm"), ["a"], "instruct", **options)
    scorer.close()
    header, line = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert "none" not in header["template"] and "first_number" not in header["template"]
    for sample in line["samples"]:
        assert sample.pop("fault") == "no_verdict"
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (header, line)))
    again, scorer = judged(answering(), ["a"], "instruct", **options)
    assert again == found
    scorer.close()
