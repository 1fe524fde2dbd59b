"""Language models as judges: known verdict rates give the expected scores, intervals and cost, and a log is read again."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import Timeout

from trl_hrm import GenerativeScorer, JudgeTemplate, StepReward, StepTree
from trl_hrm.intervals import wilson_interval
from trl_hrm.scoring import generative_scorer
from trl_hrm.scoring.candidate_scores import score_steps, scorer_cost
from trl_hrm.scoring.generative_scorer import StepJudgement
from trl_hrm.scoring.judge_templates import TEMPLATES
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.search.engines.base import EngineFatal, PrefixTooLong, Sampling, check_logprobs

from .judges import Judge, ProbabilityJudge, always_no, genprm, instruct, thinkprm


PROBLEMS = ["1+1?", "2+2?"]
CANDIDATES = [[["a p0.8", "bb p0.3"], ["a p0.8", "c p0.5", "d p1"]], [["e p0"], []]]
NUM_PROMPTS = 5  # the first step of both candidates is one prompt


def scorer_of(engine=None, **options):
    return GenerativeScorer(engine or Judge(instruct), **{"num_samples": 8, **options})


def lines_of(log):
    return [json.loads(line) for line in log.read_text().splitlines()[1:]]


# Scores, intervals and cost


def test_score_is_the_share_of_yes_among_the_responses(tmp_path):
    """Recounted from the texts in the log: a verdict of another step or sample would be noticed."""
    scorer = scorer_of(log=tmp_path / "log.jsonl")
    scores = scorer.score(PROBLEMS, CANDIDATES)
    shares = {
        (line["problem"], line["step"], line["prompt_tokens"]): sum("Yes" in one["text"] for one in line["samples"])
        / 8
        for line in lines_of(tmp_path / "log.jsonl")
    }
    assert len(shares) == NUM_PROMPTS
    for problem, group, found in zip(PROBLEMS, CANDIDATES, scores, strict=True):
        for steps, values in zip(group, found, strict=True):
            sizes = [len(scorer.template.encode(scorer.tokenizer, problem, steps[: i + 1])) for i in range(len(steps))]
            assert values == [shares[problem, i, size] for i, size in enumerate(sizes, 1)]
    assert scores[0][1][2] == 1 and scores[1] == [[0.0], []]


def test_known_rate_gives_the_expected_score_and_interval():
    """With 800 responses, a wrong rate of 0.7 or 0.9 would be outside the interval by far."""
    [[[one]]] = scorer_of(num_samples=800).judge(["1+1?"], [[["a p0.8"]]])
    assert one.low < 0.8 < one.high and one.high - one.low < 0.06
    assert (one.low, one.high) == wilson_interval(round(800 * one.score), 800)
    assert one.num_readable == 800


def test_probabilities_of_the_words_replace_the_shares():
    """The responses all say no, so a share would be 0. The probability is normalised over the two words."""
    scores = scorer_of(ProbabilityJudge(always_no)).score(PROBLEMS[:1], [[["a p0.8", "b p0.25"]]])
    assert scores == [[[pytest.approx(0.8, abs=1e-12), pytest.approx(0.25, abs=1e-12)]]]


def test_cost_is_exact(tmp_path):
    engine = Judge(instruct)
    scorer = scorer_of(engine, log=tmp_path / "log.jsonl")
    scorer.score(PROBLEMS, CANDIDATES)
    once = scorer.cost
    scorer.score(PROBLEMS, CANDIDATES)  # nothing is paid twice in one process
    assert scorer.cost == once
    assert engine.requests == list(dict.fromkeys(engine.requests)) and len(engine.requests) == NUM_PROMPTS
    lines = lines_of(tmp_path / "log.jsonl")
    assert once == {
        "prompts": NUM_PROMPTS,
        "samples": 8 * NUM_PROMPTS,
        "prompt_tokens": sum(len(prompt) for prompt, _ in engine.requests),
        # one token per character, and the end of the sequence
        "generated_tokens": sum(len(one["text"]) + 1 for line in lines for one in line["samples"]),
        "unreadable": 0,
        "too_long": 0,
        "reused_samples": 0,
        "seconds": pytest.approx(sum(line["seconds"] for line in lines)),
    }


def test_seed_and_samples(tmp_path):
    first, same, other = (scorer_of(seed=seed).score(PROBLEMS, CANDIDATES) for seed in (1, 1, 2))
    assert first == same != other


# Verdicts that cannot be read


def test_unreadable_verdicts_are_counted_and_never_a_label():
    """A third of the responses is cut off or has no verdict. Counted as a yes or a no, they would move the scores 0 and 1."""

    def script(prompt, rng):
        return rng.choice(
            [instruct(prompt, rng), instruct(prompt, rng), "Verdict: Maybe", "x" * 60 + instruct(prompt, rng)]
        )

    scorer = scorer_of(Judge(script), num_samples=60, max_tokens=60)
    [[[yes, no]]] = scorer.judge(["1+1?"], [[["a p1", "b p0"]]])
    assert (yes.score, no.score) == (1.0, 0.0)
    assert 0 < yes.num_readable < 60 and (yes.low, yes.high) == wilson_interval(yes.num_readable, yes.num_readable)
    assert scorer.cost["unreadable"] == 120 - yes.num_readable - no.num_readable


def test_step_without_a_readable_verdict_has_no_score():
    def script(prompt, rng):
        return "Who knows?" if "Check Step 2" in prompt else instruct(prompt, rng)

    scorer = scorer_of(Judge(script), num_samples=2)
    assert scorer.score(["1+1?"], [[["a p1", "b p1", "c p0"], ["a p1"]]]) == [[[1.0, None, 0.0], [1.0]]]
    assert scorer.judge(["1+1?"], [[["a p1", "b p1"]]])[0][0][1] == StepJudgement(None, None, None, 0)
    counts = Counter()
    given = [["a p1", "b p1", "c p0"], ["a p1"]]
    assert score_steps(scorer_of(Judge(script), num_samples=2), ["1+1?"], [given], ScoringConfig(), counts=counts) == [
        [None, [1.0]]
    ]
    assert counts["candidates_without_verdict"] == 1 and counts["candidates_too_long"] == 0
    cost = scorer_cost(counts)
    assert (cost["judge_prompts"], cost["judge_samples"], cost["judge_unreadable"]) == (3, 6, 2)
    assert "judge_seconds" not in cost  # `seconds` of the scorer are the same


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Fine.\nVerdict: Yes", True),
        ("Fine.\n\n**Verdict:** No.\n", False),
        ("Verdict: **No**", False),
        ("I must end with 'Verdict: Yes' or 'Verdict: No'.\nVerdict: No", False),
        ("The last line is 'Verdict: Yes'", None),
        ("Verdict: Yes\nBut wait.", None),
        ("Verdict: Yes or No", None),
        ("Verdict: yes", None),
        ("Verdict: Yesterday", None),
        ("Not Verdict: Yes", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_verdict_is_the_last_line(text, verdict):
    """Reasoning models repeat the instruction before they decide. The repetition must not count."""
    reading = TEMPLATES["instruct"].read(text, "eos", None, 1)
    assert (None if reading is None else reading.verdict) is verdict
    if reading is not None:
        assert text.startswith(reading.before) and text[len(reading.before) :].startswith(("Yes", "No"))
    assert TEMPLATES["instruct"].read(text, "length", None, 1) is None  # cut off


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["correct", "correct", "correct"], (True, True, True)),
        (["correct", "incorrect"], (True, False)),  # judges stop at the first error
        (["correct", "incorrect", "correct"], (True, False, True)),
        (["correct", "correct"], None),
        (["incorrect", "correct"], None),
        (["correct"] * 4, None),
        ([], None),
    ],
)
def test_verdicts_of_the_steps_of_a_solution(words, steps):
    text = " ".join(f"Step: \\boxed{{{word}}}" for word in words) + " Is the solution correct?"
    reading = TEMPLATES["thinkprm"].read(text, "stop", "Is the solution correct?", 3)
    assert (None if reading is None else reading.steps) == steps
    if reading is not None:
        assert reading.before.endswith("} \nIs the solution correct? ")


# Templates


def test_genprm_asks_in_turns():
    """The second prompt has the whole first turn, in the form that the model was trained with."""
    engine = Judge(genprm)
    scorer = scorer_of(engine, template="genprm", num_samples=3)
    [[[first, second]]] = scorer.judge(["1+1?"], [[["a p1", "b p0"]]])
    assert (first.score, second.score) == (1.0, 0.0)
    start = (
        "<system>You are a math teacher. Your task is to review and critique the paragraphs in solution step by step.</>"
        "<user>Question: 1+1?\n\na p1</><assistant>"
    )
    prompts = [prompt for prompt, n in engine.requests if n == 3]
    assert prompts[0] == start + "<analyze>\nLet's analyze the Paragraph 1 step by step: "
    critique = engine.requests[1][0].removeprefix(prompts[0])  # the request for the word after the first response
    assert critique.endswith("\n</analyze>\n<output>\n**Judgement**: $\\boxed{") and "verify" not in critique
    turn = start + prompts[0].removeprefix(start) + critique + "Yes}$\n</output>\n</>"
    assert prompts[1] == turn + "<user>b p0</><assistant><analyze>\nLet's analyze the Paragraph 2 step by step: "
    assert len(engine.requests) == 2 + 6 and scorer.cost["samples"] == 6


def test_genprm_stops_at_a_step_without_a_verdict():
    """The next turn would need its response."""

    def script(prompt, rng):
        return "?" if prompt.endswith("\\boxed{") and "b p1" in prompt else genprm(prompt, rng)

    scorer = scorer_of(Judge(script), template="genprm", num_samples=2)
    assert scorer.score(["1+1?"], [[["a p1", "b p1", "c p1"]]]) == [[[1.0, None, None]]]
    assert scorer.cost["prompts"] == 2 and scorer.cost["unreadable"] == 2


def test_thinkprm_judges_a_solution_at_once():
    """A step gets the share of responses that found no error up to it, the last step the probability of the final yes."""
    engine = Judge(thinkprm)
    scorer = scorer_of(engine, template="thinkprm", num_samples=200)
    [[steps]] = scorer.judge(["1+1?"], [[["a p1", "Step 2: b p0.5", "c p1"]]])
    assert steps[0].score == 1 and steps[1].score == steps[2].score
    assert steps[1].low < 0.5 < steps[1].high and steps[1].high - steps[1].low < 0.15
    assert scorer.cost["prompts"] == 1
    assert "[Solution]\n\nStep 1: a p1\nStep 2: b p0.5\nStep 3: c p1\n\nReview" in engine.requests[0][0]
    tree = StepTree("1+1?", ["a p1", "b p1", "c p1"], [None] * 3, [-1, 0, 0])
    with pytest.raises(ValueError, match="2 solutions with common steps"):
        scorer.score_trees([tree])


@pytest.mark.parametrize("template", ["thinkprm", "instruct"])
def test_order_of_solutions_with_the_same_prompt(template, tmp_path):
    """The marks of two steps can also be in the text of one. Verdicts on one step say nothing about two."""
    script, log = {"thinkprm": thinkprm, "instruct": instruct}[template], tmp_path / "log.jsonl"
    solutions = [["a p1\nStep 2: b p1"], ["a p1", "b p1"]]
    expected = [scorer_of(Judge(script), template=template).score(["1+1?"], [[one]])[0][0] for one in solutions]
    for order in (1, -1):
        scorer = scorer_of(Judge(script), template=template, log=log)
        assert scorer.score(["1+1?"], [solutions[::order]]) == [expected[::order]]
        scorer.close()
    assert scorer.cost["reused_samples"] == scorer.cost["samples"] > 0


def test_last_step_of_a_solution_gets_the_probability_of_the_answer():
    class Unsure(ProbabilityJudge):
        async def next_logprobs(self, prefix_ids, token_ids, key=""):
            assert self.tokenizer.decode(prefix_ids).endswith("\nIs the solution correct? ")
            return [math.log(0.3), math.log(0.1)]

    scorer = scorer_of(Unsure(thinkprm), template="thinkprm")
    assert scorer.score(["1+1?"], [[["a p1", "b p1"]]]) == [[[1.0, pytest.approx(0.75)]]]


@pytest.mark.parametrize("template", ["instruct", "genprm"])
def test_tree_has_the_scores_of_its_paths(template):
    script = {"instruct": instruct, "genprm": genprm}[template]
    tree = StepTree("1+1?", ["a p0.8", "b p0.3", "c p0.5", "d p0.6"], [None] * 4, [-1, 0, 0, 2])
    paths = [["a p0.8", "b p0.3"], ["a p0.8", "c p0.5", "d p0.6"]]
    [scores] = scorer_of(Judge(script), template=template).score_trees([tree])
    [[first, second]] = scorer_of(Judge(script), template=template).score(["1+1?"], [paths])
    assert scores == [first[0], first[1], *second[1:]] and first[0] == second[0]


def test_text_that_looks_like_a_placeholder_stays(tmp_path):
    scorer = scorer_of()
    prompt = scorer.tokenizer.decode(scorer.template.encode(scorer.tokenizer, "{steps} {number}", ["{problem}"]))
    assert "# Problem\n\n{steps} {number}\n\n# Solution\n\nStep 1: {problem}\n\n" in prompt


def test_own_templates(tmp_path):
    """A text file is the user message, a JSON file has all fields."""
    text = tmp_path / "mine.txt"
    text.write_text("Q: {problem}\nStep: {step}\nIs it right? The last line is 'Verdict: Yes' or 'Verdict: No'.\n")
    scores = scorer_of(Judge(instruct), template=str(text)).score(["1+1?"], [[["a p1", "b p0"]]])
    assert scores == [[[1.0, 0.0]]]
    text.with_suffix(".json").write_text(
        json.dumps({"user": "{problem} {steps}", "closing": "\nSo ", "yes": "ja", "no": "nein", "max_tokens": 9})
    )

    def script(prompt, rng):
        return ("ja" if "p1" in prompt else "nein") if prompt.endswith("\nSo ") else "hm"

    scorer = scorer_of(Judge(script), template=str(text.with_suffix(".json")))
    assert scorer.score(["1+1?"], [[["a p1"], ["b"]]]) == [[[1.0], [0.0]]]
    assert scorer.max_tokens == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"user": "{problem}"}, "does not contain"),
        ({"user": "{problem} {step}"}, "no verdict could be read"),
        ({"user": "{problem} {step}", "closing": "\n", "yes": "A", "no": "A "}, "two different words"),
        ({"user": "{problem} {steps}", "closing": "\n", "scope": "solution"}, "two different strings"),
        ({"user": "{problem} {step}", "closing": "\n", "step_yes": "+"}, "only apply"),
        ({"user": "{problem} {step} Verdict: Yes No", "stop": ["x"]}, "only apply with `closing`"),
        ({"user": "{problem} {step} Verdict: Yes No", "word": "x"}, "`word`"),
        ({"user": 3}, "`user` is 3"),
    ],
)
def test_invalid_templates(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        JudgeTemplate.load(str(path))
    assert str(path) in str(caught.value)


def test_control_tokens_in_the_data_are_plain_text():
    """A step could otherwise end the user's turn and answer in the judge's place."""
    from ..fakes import byte_level

    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for template in TEMPLATES.values():
        replies = ["x<|im_end|>"] if template.scope == "turns" else []
        ids = template.encode(tokenizer, "p<|im_end|>", ["a", "b<|im_end|>"], replies, "7<|im_end|>")
        plain = template.encode(tokenizer, "p", ["a", "b"], [one[:1] for one in replies], "7")
        assert ids.count(end) == plain.count(end) > 0
        shown = 2 + len(replies) + template.needs_answer
        assert tokenizer.decode(ids).count("<|im_end|>") == plain.count(end) + shown


def test_control_tokens_in_a_response_are_plain_text():
    """The judge has quoted them from a step. A tag is a token, because the judge has generated it."""
    from ..fakes import byte_level

    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    quote = "It says '<|im_end|>'.\nVerdict: "
    before, yes, no = TEMPLATES["instruct"].verdict_tokens(tokenizer, quote)
    assert end not in before and yes != no
    assert tokenizer.decode([*before, yes]).startswith(quote)
    plain = TEMPLATES["instruct"].encode_response(tokenizer, "Fine.\nVerdict: ", "Yes")
    assert plain == tokenizer.encode("Fine.\nVerdict: Yes", add_special_tokens=False)
    template = JudgeTemplate(user="{problem} {step}", closing="<|im_end|>So ")  # a control token of the template
    assert template.encode_response(tokenizer, f"{quote}<|im_end|>So ").count(end) == 1


# The log


def test_stopped_run_resumes_and_pays_nothing_twice(tmp_path):
    """A run that fails after some requests, and leaves half a line, ends with the scores and the cost of a whole one."""
    whole = scorer_of()
    expected = whole.score(PROBLEMS, CANDIDATES)
    log = tmp_path / "log.jsonl"
    stopped = scorer_of(Judge(instruct, fails_after=3), log=log)
    with pytest.raises(OSError, match=r"the server is gone.*log\.jsonl. Run again to resume"):
        stopped.score(PROBLEMS, CANDIDATES)
    stopped.close()
    done = len(lines_of(log))
    assert 0 < done <= 3
    with open(log, "ab") as file:
        file.write(b'{"key": "')  # killed while writing
    resumed = scorer_of(Judge(instruct), log=log)
    assert resumed.score(PROBLEMS, CANDIDATES) == expected
    assert len(resumed.engine.requests) == NUM_PROMPTS - done
    assert resumed.cost["reused_samples"] == 8 * done
    same = {"reused_samples": 0, "seconds": 0}
    assert resumed.cost | same == whole.cost | same
    resumed.close()
    again = scorer_of(Judge(instruct, fails_after=0), log=log)
    assert again.score(PROBLEMS, CANDIDATES) == expected
    assert again.cost["reused_samples"] == 8 * NUM_PROMPTS and again.cost["seconds"] == resumed.cost["seconds"] > 0


@pytest.mark.parametrize("template", ["instruct", "genprm"])
def test_other_number_of_samples_uses_the_log(tmp_path, template):
    """Sample i has the same seed for every number of samples."""
    script = {"instruct": instruct, "genprm": genprm}[template]
    log = tmp_path / "log.jsonl"

    def score(num_samples, **options):
        scorer = scorer_of(Judge(script), template=template, num_samples=num_samples, **options)
        found = scorer.score(PROBLEMS, CANDIDATES), scorer.cost["samples"]
        scorer.close()
        return found, sum(n for _, n in scorer.engine.requests)

    new = {number: score(number)[0] for number in (2, 6)}
    assert score(2, log=log)[0] == new[2]
    found, paid = score(6, log=log)
    assert found == new[6] and paid < score(6)[1]
    assert score(2, log=log) == (new[2], 0)


def test_log_of_other_settings_is_refused(tmp_path):
    log = tmp_path / "log.jsonl"
    scorer_of(log=log, identity={"weights": "aa"}).close()
    for options, name in (
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"max_tokens": 7}, "max_tokens was 1024 and is 7"),
        ({"template": "genprm"}, "template.closing was null"),
        ({"identity": {"weights": "bb"}}, 'policy.weights was "aa"'),
        ({"engine": ProbabilityJudge(always_no)}, "verdicts was"),
    ):
        with pytest.raises(ValueError, match=name):
            scorer_of(**{"log": log, "identity": {"weights": "aa"}, **options})
    assert lines_of(log) == []
    scorer_of(log=log, seed=1, overwrite=True).close()
    scorer_of(log=log, seed=1).close()


def test_log_is_locked_until_it_is_closed(tmp_path):
    first = scorer_of(log=tmp_path / "log.jsonl")
    with pytest.raises((BlockingIOError, Timeout)):
        scorer_of(log=tmp_path / "log.jsonl")
    first.close()
    assert first.engine.is_closed
    with pytest.raises(ValueError, match="closed"):
        first.score(["x"], [[["a p1"]]])
    scorer_of(log=tmp_path / "log.jsonl").close()


def test_damaged_log(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"prompt": "a dataset"}\n{"without": "a line break"}')
    with pytest.raises(FileExistsError, match="not a log of a judge"):
        scorer_of(log=log, overwrite=True)
    assert log.read_text() == '{"prompt": "a dataset"}\n{"without": "a line break"}'
    log.unlink()
    scorer = scorer_of(log=log)
    scorer.score(PROBLEMS, CANDIDATES)
    scorer.close()
    whole = log.read_text()
    lines = whole.splitlines()
    for length in (1, 10, 25, len(lines[0])):  # a kill has cut the first line
        log.write_text(whole[:length])
        scorer_of(log=log).close()
        assert log.read_text().splitlines() == lines[:1]
    log.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not valid JSON .*Remove this line"):
        scorer_of(log=log)
    for change in ({"first": 1}, {"samples": [{}]}, {"step": -1}):
        log.write_text("\n".join([*lines[:2], json.dumps(json.loads(lines[2]) | change), *lines[3:]]) + "\n")
        with pytest.raises(ValueError, match=r"log\.jsonl:3: .*Remove this line"):
            scorer_of(log=log)
    log.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    again = scorer_of(log=log)
    again.score(PROBLEMS, CANDIDATES)
    assert len(again.engine.requests) == 1


# Errors


def test_prompt_and_response_must_fit():
    """A response that the context cuts off would have no verdict."""
    shortest = len(TEMPLATES["instruct"].encode(Judge(instruct).tokenizer, "1+1?", ["a p1"]))
    room = shortest + 100 + len("Verdict: ") + 4
    scorer = scorer_of(Judge(instruct, max_length=room), max_tokens=100)
    assert scorer.score(["1+1?"], [[["a p1"], ["ab p1"]]]) == [[[1.0], [None]]]
    assert (scorer.cost["too_long"], scorer.cost["prompts"]) == (1, 1)
    with pytest.raises(ValueError, match="context of 150 tokens"):
        scorer_of(Judge(instruct, max_length=150), max_tokens=100)


def test_engine_that_does_not_tell_its_context():
    class Short(Judge):
        async def sample(self, prefix_ids, *args):
            if "long" in self.tokenizer.decode(prefix_ids):
                raise PrefixTooLong("too long")
            return await super().sample(prefix_ids, *args)

    scorer = scorer_of(Short(instruct))
    assert scorer.score(["1+1?"], [[["a p1"], ["a long p1"]]]) == [[[1.0], [None]]]
    assert scorer.cost["too_long"] == 1


def test_response_that_leaves_no_room_for_the_verdict():
    """It is unreadable, and the others go on."""

    class Full(ProbabilityJudge):
        async def next_logprobs(self, prefix_ids, token_ids, key=""):
            if self.tokenizer.decode(prefix_ids).count("long") > 0:
                raise PrefixTooLong("too long")
            return await super().next_logprobs(prefix_ids, token_ids, key)

    scorer = scorer_of(Full(instruct))
    assert scorer.score(["1+1?"], [[["a p0.5"], ["a long p0.5"]]]) == [[[0.5], [None]]]
    assert (scorer.cost["unreadable"], scorer.cost["too_long"]) == (8, 0)

    class FullForWords(Judge):
        async def sample(self, prefix_ids, *args):
            if self.tokenizer.decode(prefix_ids).endswith("boxed{"):
                raise PrefixTooLong("too long")
            return await super().sample(prefix_ids, *args)

    assert scorer_of(FullForWords(genprm), template="genprm").score(["1+1?"], [[["a p1"]]]) == [[[None]]]


def test_two_threads_share_a_scorer():
    """The end of the short call must not cancel the requests of the long one."""
    scorer = scorer_of(Judge(genprm, latency=lambda rng: 0.02), template="genprm")
    expected = scorer_of(Judge(genprm), template="genprm").score(PROBLEMS, CANDIDATES)
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(scorer.score, PROBLEMS[i : i + 1], CANDIDATES[i : i + 1]) for i in (0, 1)]
        assert [call.result(60) for call in calls] == [expected[:1], expected[1:]]


def test_wrong_options():
    with pytest.raises(ValueError, match=r"template is 'poem'. It must be first_error, .* thinkprm"):
        scorer_of(template="poem")
    with pytest.raises(ValueError, match="steps are not merged"):
        scorer_of().score(["x"], [[["a p1"]]], spans=(1, 2))
    assert scorer_of().score(["x"], [[["a p1"]]], spans=1) == [[[1.0]]]
    with pytest.raises(ValueError, match="0 answers for 1 prompts"):
        scorer_of().judge_solutions(["x"], [[["a p1"]]], answers=[])
    with pytest.raises(ValueError, match="Split the solution into steps first"):
        scorer_of().score(["x"], [["a p1"]])
    with pytest.raises(TypeError, match=r"is a `Judge`.*use `GenerativeScorer\(engine"):
        GenerativeScorer.from_pretrained(Judge(instruct))
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        GenerativeScorer.from_pretrained(Path("/missing/judge"))
    with pytest.raises(ValueError, match="candidates for 0 prompts"):
        scorer_of().score(["x"], [])
    with pytest.raises(ValueError, match="Each step must be a string"):
        scorer_of().score(["x"], [[["a", 3]]])
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        scorer_of(num_samples=0)
    engine = Judge(instruct)
    engine.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        scorer_of(engine)
    greedy = Judge(instruct)
    greedy.sampling = Sampling(temperature=0.0)
    with pytest.raises(ValueError, match="temperature is 0"):
        scorer_of(greedy)
    assert scorer_of(greedy, num_samples=1).score(["x"], [[["a p1"]]]) == [[[1.0]]]
    with pytest.raises(ValueError, match="must be transformers, vllm, or the URL"):
        GenerativeScorer.from_pretrained("judge", engine="jax")
    with pytest.raises(ValueError, match="GenerativeScorer"):
        StepReward(scorer_of())


def test_two_probabilities_cannot_exceed_one():
    """A server that normalises over the allowed tokens would return log-probabilities of 0 for both words."""
    check_logprobs([math.log(0.6), math.log(0.4)], "x", "y")
    with pytest.raises(EngineFatal, match="Use y"):
        check_logprobs([0.0, 0.0], "x", "y")


@pytest.mark.parametrize("template", ["instruct", "genprm", "thinkprm"])
def test_progress_bar_counts_steps(monkeypatch, template):
    moves = []

    class Bar:
        def __init__(self, total, **options):
            moves.append(-total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, number=1):
            moves.append(number)

    monkeypatch.setattr(generative_scorer, "tqdm", Bar)
    script = {"instruct": instruct, "genprm": lambda prompt, rng: "?", "thinkprm": thinkprm}[template]
    scorer_of(Judge(script), template=template).score(PROBLEMS, CANDIDATES)
    assert moves[0] == -6 and sum(moves) == 0 and len(moves) > 2
