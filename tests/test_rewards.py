"""StepReward compared with its scorer, its guards, and in TRL's trainers."""

import copy
import json
import math
import os
import random

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_hrm import StepFormat, StepScorer
from trl_hrm.grading import visible_text, without_thinking_tags
from trl_hrm.rewards import GUARDS, ScoredCompletion, StepReward, num_blank, separator_rule
from trl_hrm.search.thinking import ThinkingRule
from trl_hrm.step_format import STEP_FORMAT_NAME

from .fakes import byte_level
from .helpers import HEADS, WORDS, tiny_model, tiny_tokenizer, weights_of


PROMPTS = ["1+2+3?", "1+2+3?", "add x y", "1+2+3?"]
COMPLETIONS = ["add 1\n\nso = 3", "add 1\n\nso = 7\n\nthus y", "x\n\ny\n\n", "sub\n\nsum x"]
STEPS = [["add 1", "so = 3"], ["add 1", "so = 7", "thus y"], ["x", "y"], ["sub", "sum x"]]
LOOSE = {"min_steps": 1, "max_steps": None, "max_repeated": None, "max_blank": None}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def scorer_of(step_format=HEADS["classification"], **config) -> StepScorer:
    return StepScorer(tiny_model(step_format, **config), tiny_tokenizer(), step_format)


def control_scorer(**step_format) -> StepScorer:
    """Return a scorer whose tokenizer has control tokens of every kind."""
    tokenizer = byte_level()
    return StepScorer(tiny_model(vocab_size=len(tokenizer)), tokenizer, StepFormat(**step_format))


def as_messages(prompts, completions):
    asked = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}] for prompt in prompts]
    return asked, [[{"role": "assistant", "content": completion}] for completion in completions]


def step_scores(scorer, prompts=PROMPTS, steps=STEPS, **settings) -> list[list[float]]:
    """Score each solution in a separate call."""
    return [scorer.score([p], [[s]], **settings)[0][0] for p, s in zip(prompts, steps, strict=True)]


class TestRewards:
    @pytest.mark.parametrize(
        "name, reduce",
        [
            ("min", min),
            ("max", max),
            ("prod", math.prod),
            ("last", lambda scores: scores[-1]),
            ("mean", lambda scores: sum(scores) / len(scores)),
            (lambda scores: sum(scores) - len(scores), lambda scores: sum(scores) - len(scores)),
        ],
        ids=["min", "max", "prod", "last", "mean", "own"],
    )
    def test_aggregates_of_the_scores_of_the_steps(self, name, reduce):
        """All completions of a problem form one tree. Swapped scores would look just as plausible."""
        scorer = scorer_of()
        expected = [reduce(scores) for scores in step_scores(scorer)]
        rewards = StepReward(scorer, aggregate=name)(PROMPTS, COMPLETIONS)
        assert rewards == pytest.approx(expected, abs=1e-5)
        assert len(set(rewards)) >= 3  # two solutions have the same best step

    @pytest.mark.parametrize("head", HEADS)
    def test_every_head(self, head):
        scorer = scorer_of(HEADS[head])
        rewards = StepReward(scorer)(PROMPTS, COMPLETIONS)
        assert rewards == pytest.approx([min(scores) for scores in step_scores(scorer)], abs=1e-5)

    def test_merged_steps(self):
        """An HRM approves a correction only if it also sees the step merged with the previous step."""
        scorer = scorer_of()
        expected = step_scores(scorer, spans=(1, 2), combine="mean")
        rewards = StepReward(scorer, spans=(1, 2), combine="mean")(PROMPTS, COMPLETIONS)
        assert rewards == pytest.approx([min(scores) for scores in expected], abs=1e-5)
        assert rewards != pytest.approx([min(scores) for scores in step_scores(scorer)], abs=1e-5)

    def test_conversations_are_judged_as_their_texts(self):
        reward = StepReward(scorer_of())
        asked, answered = as_messages(PROMPTS, COMPLETIONS)
        assert reward(asked, answered) == reward(PROMPTS, COMPLETIONS)
        blocks = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in PROMPTS]
        assert reward(blocks, answered) == reward(PROMPTS, COMPLETIONS)

    def test_the_question_is_the_problem(self):
        """System messages are instructions for the policy, not for the reward model."""
        reward = StepReward(scorer_of())
        asked, answered = as_messages(PROMPTS, COMPLETIONS)
        for role in ("system", "developer"):
            told = [{"role": role, "content": "sub"}]
            assert reward([told + messages[-1:] for messages in asked], answered) == reward(PROMPTS, COMPLETIONS)

    @pytest.mark.parametrize("kind", ["turns before", "an answer begun", "two questions", "a tool"])
    def test_a_dialogue_of_several_turns_is_refused(self, kind):
        """The last turn alone, such as "And twice that?", does not contain the problem. A column with the problem does."""
        asked, answered = as_messages(PROMPTS, COMPLETIONS)
        turns = {
            "turns before": ([{"role": "user", "content": "sub"}, {"role": "assistant", "content": "sum"}], []),
            "an answer begun": ([], [{"role": "assistant", "content": "so"}]),
            "two questions": ([{"role": "user", "content": "sub"}], []),
            "a tool": ([], [{"role": "tool", "content": "3"}]),
        }
        before, after = turns[kind]
        dialogues = [[*before, *messages, *after] for messages in asked]
        with pytest.raises(ValueError, match="`problem_column`"):
            StepReward(scorer_of())(dialogues, answered)
        shown = StepReward(scorer_of(), problem_column="problem")
        assert shown(dialogues, answered, problem=PROMPTS) == StepReward(scorer_of())(PROMPTS, COMPLETIONS)

    def test_thinking_is_not_judged(self):
        """Neither the thinking nor its steps change the reward. The share of completions with thinking is logged."""
        reward = StepReward(scorer_of())
        expected = reward(PROMPTS, COMPLETIONS)
        assert reward.metrics["thinking_left_out"] == 0
        thought = "sub\n\nsum\n\n...\n\n...\n\n...\n\n...\n\n...\n\n"
        for begin, end in (("<think>", "</think>\n\n"), ("", "</think>"), ("<think>\n\n", "\n\n</think>\n\n")):
            assert reward(PROMPTS, [begin + thought + end + text for text in COMPLETIONS]) == expected
            assert reward.metrics["thinking_left_out"] == 1
        opened = [f"{prompt}<think>\n" for prompt in PROMPTS]
        cut_off = StepReward(scorer_of(), guard_reward=-1, problem_column="problem")
        assert cut_off(opened, [thought] * len(opened), problem=PROMPTS) == [-1] * len(opened)
        assert cut_off(opened, [f"{thought}</think>{text}" for text in COMPLETIONS], problem=PROMPTS) == expected
        assert cut_off(PROMPTS, ["<think>" + thought] * len(opened), problem=PROMPTS) == [-1] * len(opened)

    def test_thinking_is_judged_on_request(self):
        """The tags are never judged."""
        kept = StepReward(scorer_of(), keep_thinking=True)
        assert kept.steps("<think>\n\nsub\n\n</think>\n\nsum") == ["sub", "sum"]
        assert kept.steps("sub\n\n</think>sum") == ["sub", "sum"]
        found = kept(PROMPTS, [f"<think>\n\n{text}\n\n</think>" for text in COMPLETIONS])
        assert found == StepReward(scorer_of())(PROMPTS, COMPLETIONS) and kept.metrics["thinking_left_out"] == 0

    def test_order_does_not_matter(self):
        """TRL shuffles, so a reward assigned to the neighbour would train on noise."""
        rng = random.Random(0)
        prompts = rng.choices(PROMPTS, k=24)
        completions = ["\n\n".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in prompts]
        reward = StepReward(scorer_of())
        expected = reward(prompts, completions)
        order = rng.sample(range(24), 24)
        found = reward([prompts[i] for i in order], [completions[i] for i in order])
        assert found == pytest.approx([expected[i] for i in order], abs=1e-5)
        assert 0.0 in expected and len(set(expected)) > 9

    def test_problem_from_a_column(self):
        """The policy's prompt contains instructions that the reward model never saw."""
        scorer = scorer_of()
        asked = [f"Think step by step.\n{prompt}\nSolution:" for prompt in PROMPTS]
        rewards = StepReward(scorer, problem_column="problem")(
            asked, COMPLETIONS, problem=PROMPTS, completion_ids=None
        )
        assert rewards == StepReward(scorer)(PROMPTS, COMPLETIONS)
        assert rewards != pytest.approx(StepReward(scorer)(asked, COMPLETIONS), abs=1e-5)

    def test_rows_without_a_problem_get_no_reward(self):
        """In a mixed dataset, another function rewards them. A reward of 0 would count against the policy."""
        reward = StepReward(scorer_of(), problem_column="problem")
        problems = [PROMPTS[0], None, PROMPTS[2], None]
        rewards = reward(PROMPTS, [*COMPLETIONS[:3], ""], problem=problems)
        assert [found is None for found in rewards] == [False, True, False, True]
        assert reward.metrics["guarded"] == 0 and reward.metrics["num_steps"] == 2
        assert reward(PROMPTS, COMPLETIONS, problem=[None] * 4) == [None] * 4 and reward.metrics == {}

    def test_gradients_and_mode(self):
        model = tiny_model().train()
        scorer = StepScorer(model, tiny_tokenizer(), HEADS["classification"])
        StepReward(scorer)(PROMPTS, COMPLETIONS)
        assert not model.training and all(weight.grad is None for weight in model.parameters())

    def test_equal_rewards_from_a_folder(self, tmp_path):
        scorer = scorer_of()
        scorer.model.save_pretrained(tmp_path)
        scorer.tokenizer.save_pretrained(tmp_path)
        scorer.step_format.save(tmp_path)
        reward = StepReward(str(tmp_path), max_length=64)
        assert reward.scorer.max_length == 64 and reward.scorer.model.device.type == "cpu"
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(StepReward(scorer)(PROMPTS, COMPLETIONS), abs=1e-5)


class TestSteps:
    @pytest.mark.parametrize(
        "separator, text, steps",
        [
            ("\n\n", "One.\n\nTwo.\n\n\n\nThree.\n\n", ["One.", "Two.", "Three."]),
            ("\n\n", "One.\n\n# Answer\n\n3", ["One.", "# Answer\n\n3"]),
            ("\n", "One.\nTwo.\n\n", ["One.", "Two."]),
            (" so", "One. so Two. so so", ["One.", "Two."]),
            (".", "One.Two.", ["One", "Two"]),
            ("\n\n", " \n\n ", []),
            ("\n\n", "", []),
        ],
    )
    def test_separator_of_the_checkpoint(self, separator, text, steps):
        """Steps must equal those in training: without the separator, which the scorer adds, and without surrounding space."""
        step_format = StepFormat(step_separator=separator, merge_separator="=")
        assert StepReward(scorer_of(step_format)).steps(text) == steps

    def test_named_rule(self):
        reward = StepReward(scorer_of(), segmentation="step_header")
        assert reward.steps("# Step 1\nOne.\n\nTwo.\n\n# Step 2\nThree.") == [
            "# Step 1\nOne.\n\nTwo.",
            "# Step 2\nThree.",
        ]

    def test_separator_is_not_a_regular_expression(self):
        assert separator_rule("..").ends("a..b.c") == [3, 6]


class TestGuards:
    @pytest.mark.parametrize(
        "completion, settings, reasons",
        [
            ("", {}, ["too_few_steps"]),
            ("\n\n", LOOSE, ["too_few_steps"]),
            ("add 1", {}, ["too_few_steps"]),
            ("add 1", {"min_steps": 1}, []),
            ("add 1\n\nso = 3", {"min_steps": 3}, ["too_few_steps"]),
            ("add 1\n\nso = 3\n\nx", {"max_steps": 3}, []),
            ("add 1\n\nso = 3\n\nx", {"max_steps": 2}, ["too_many_steps"]),
            ("add 1\n\nadd  1\n\nAdd 1\n\nx", {"max_repeated": 0.5}, []),
            ("add 1\n\nadd  1\n\nAdd 1\n\nx", {"max_repeated": 0.49}, ["repeated_steps"]),
            ("# Step 1\nadd 1\n\nStep 2: add 1", {}, ["repeated_steps"]),
            ("# Step 1\nadd 1\n\nStep 2: add 2", {}, []),
            ("1. add 1\n\n(2) add 1\n\n3: add 1", {}, ["repeated_steps"]),
            ("1.5 add 1\n\n2.5 add 1", {}, []),
            ("add 1\n\nadd 1", {"max_repeated": None}, []),
            ("add 1\n\n\n\n...\n\nx", {"max_blank": 2}, []),
            ("add 1\n\n\n\n...\n\nx", {"max_blank": 1}, ["blank_steps"]),
            ("add 1\n\nx" + "\n\n" * 9, {}, ["blank_steps"]),
            ("add 1\n\nx" + "\n\n" * 9, {"max_blank": None}, []),
            ("add 1\n\nso = 3", {"max_tokens": 4}, ["too_long"]),
            ("add 1\n\nso = 3", {"max_tokens": 99}, []),
            ("x y " * 300 + "\n\nx", {}, ["too_long"]),
            ("so\n\n" * 300, {"max_tokens": 4}, ["too_many_steps", "repeated_steps", "too_long"]),
        ],
    )
    def test_each_guard_and_its_limit(self, completion, settings, reasons):
        """A limit that is off by one, or a guard that hides another guard, would not show in any training curve."""
        reward = StepReward(scorer_of(), guard_reward=-0.5, **settings)
        columns = {}
        rewards = reward([PROMPTS[0]], [completion], log_extra=columns.__setitem__)
        assert columns == {"step_reward/guards": [", ".join(reasons)]}
        assert (rewards == [-0.5]) == bool(reasons)
        expected = {f"guarded/{guard}": float(guard in reasons) for guard in GUARDS}
        assert {key: reward.metrics[key] for key in expected} == expected
        assert reward.metrics["guarded"] == bool(reasons)

    @pytest.mark.parametrize(
        "completion, reasons",
        [
            ("add 1\n\nso<|im_end|> = 3", ["control_text"]),
            ("add<｜User｜> 1\n\nso = 3", ["control_text"]),
            ("add 1\n\nso <extra_0> = 3", ["control_text"]),
            ("add 1\n\nso = 3<|im_end|>", []),
            ("add 1\n\nso = 3<|im_end|>\n", []),
            ("add 1\n\nso = 3<|im_end|><|im_end|>", ["control_text"]),
            ("add<|im_end|>\n\nso = 3<|im_end|>", ["control_text"]),
            ("<think>add 1\n\nso</think> = 3", []),
            ("add <table>\n\n\nim_end", []),
        ],
    )
    def test_control_text(self, completion, reasons):
        """A forged end of a turn or step is a hack. The end token kept by a trainer, and a policy's tags, are not."""
        reward = StepReward(control_scorer(), guard_reward=-0.5, min_steps=1)
        rewards = reward([PROMPTS[0]], [completion])
        assert (rewards == [-0.5]) == bool(reasons)
        assert reward.metrics["guarded/control_text"] == bool(reasons) == reward.metrics["guarded"]
        assert reward.guards(PROMPTS[0], completion, reward.steps(completion)) == reasons

    def test_the_end_of_the_sequence_is_not_scored(self):
        reward = StepReward(control_scorer())
        assert reward.steps("add 1\n\nso = 3<|im_end|>\n") == ["add 1", "so = 3"]
        ended, open_end = reward([PROMPTS[0]] * 2, ["add 1\n\nso = 3<|im_end|>", "add 1\n\nso = 3"])
        assert ended == open_end

    def test_a_separator_that_is_a_control_token(self):
        """A policy never writes this token: by default its steps end at blank lines, and a token within a step is forged."""
        reward = StepReward(control_scorer(step_separator="<extra_0>"))
        assert reward.steps("add 1\n\nso = 3") == ["add 1", "so = 3"]
        reward([PROMPTS[0]] * 2, ["add 1\n\nso = 3", "add 1 <extra_0> so\n\nx"])
        assert reward.metrics["guarded/control_text"] == 0.5

    def test_a_separator_of_letters_within_a_step(self):
        reward = StepReward(control_scorer(step_separator=" ки"), segmentation="blank_line")
        assert reward.guards(PROMPTS[0], "", ["add ки 1", "so"]) == ["control_text"]
        assert reward.guards(PROMPTS[0], "", ["add 1", "so"]) == []
        assert reward.guards(PROMPTS[0], "", ["ки 1", "so"]) == ["control_text"]

    def test_tokens_are_counted_with_separators(self):
        scorer = scorer_of()
        number = sum(len(ids) for ids in scorer.step_format.encode(scorer.tokenizer, "", STEPS[0])[1])
        for max_tokens, stopped in ((number, []), (number - 1, ["too_long"])):
            reward = StepReward(scorer, max_tokens=max_tokens)
            assert reward.guards(PROMPTS[0], COMPLETIONS[0], STEPS[0]) == stopped

    def test_a_merged_step_may_be_longer(self):
        """The scorer raises for steps beyond its positions, which would stop the training."""
        step_format = StepFormat(merge_separator=" then " * 40)
        scorer = scorer_of(step_format, max_position_embeddings=64)
        assert StepReward(scorer)(PROMPTS, COMPLETIONS) != [0.0] * 4
        assert StepReward(scorer, spans=(1, 2))(PROMPTS, COMPLETIONS) == [0.0] * 4

    def test_a_long_completion_does_not_change_the_others(self):
        reward = StepReward(scorer_of())
        expected = reward(PROMPTS, COMPLETIONS)
        assert reward(PROMPTS, ["", *COMPLETIONS[1:]]) == pytest.approx([0.0, *expected[1:]], abs=1e-5)

    def test_blank_pieces(self):
        assert [num_blank(text, "\n\n") for text in ("", "a", "a\n\n", "\n\na", "a\n\n \n\nb", "a\n\n\nb")] == [
            *(0, 0, 0, 1, 1, 0)
        ]


class TestScored:
    def test_one_score_per_step(self):
        scorer = scorer_of()
        reward = StepReward(scorer)
        rewards = reward(PROMPTS, COMPLETIONS)
        assert [found.steps for found in reward.scored] == STEPS
        assert [found.texts for found in reward.scored] == [[text] for text in COMPLETIONS]
        assert [found.spans for found in reward.scored] == [
            [[(0, 5), (7, 13)]],
            [[(0, 5), (7, 13), (15, 21)]],
            [[(0, 1), (3, 4)]],
            [[(0, 3), (5, 10)]],
        ]
        for found, expected, value in zip(reward.scored, step_scores(scorer), rewards, strict=True):
            assert found.scores == pytest.approx(expected, abs=1e-5) and found.step_rewards == found.scores
            assert found.reward == value == min(found.scores) and found.guards == []

    def test_completions_without_scores(self):
        """A rejected completion has one reward for all of its text. A row without a problem has none."""
        reward = StepReward(scorer_of(), guard_reward=-1, problem_column="problem")
        reward(PROMPTS[:3], ["add 1", COMPLETIONS[1], ""], problem=[PROMPTS[0], None, PROMPTS[0]])
        rejected, without_problem, empty = reward.scored
        assert rejected == ScoredCompletion(["add 1"], [[(0, 5)]], None, -1, ["too_few_steps"], [""])
        assert rejected.steps == ["add 1"] and rejected.step_rewards == [-1]
        assert without_problem.steps == STEPS[1] and without_problem.step_rewards is None
        assert without_problem.reward is None and without_problem.guards == []
        assert empty == ScoredCompletion([""], [[]], None, -1, ["too_few_steps"], [""])

    def test_each_call_replaces_them(self):
        reward = StepReward(scorer_of())
        assert reward.scored == []
        reward(PROMPTS, COMPLETIONS)
        reward(PROMPTS[:1], COMPLETIONS[:1])
        assert len(reward.scored) == 1

    @pytest.mark.parametrize("keep_thinking", [False, True])
    def test_a_tag_in_the_prompt_is_not_in_the_text(self, keep_thinking):
        """Spans count from the start of the completion, which TRL decodes without the end of the prompt."""
        reward = StepReward(scorer_of(), keep_thinking=keep_thinking, problem_column="problem")
        text = "so\n\nx</think>add 1\n\n so = 3\n"
        reward(["1+2?<think>\n"], [text], problem=["1+2?"])
        found = reward.scored[0]
        kept = [(0, 2), (4, 18)] if keep_thinking else [(13, 18)]
        assert found.texts == [text] and found.spans == [[*kept, (21, 27)]]
        assert found.steps == (["so", "xadd 1", "so = 3"] if keep_thinking else ["add 1", "so = 3"])
        assert reward.metrics["thinking_left_out"] == (not keep_thinking)

    def test_spans_without_separators_and_ends(self):
        reward = StepReward(control_scorer(step_separator=" ки", merge_separator="="))
        for text in ("a ки b<think>x</think> ки <|im_end|> \n", "a ки b<think>x</think>к<think>y</think>и"):
            reward([PROMPTS[0]], [text])
            assert reward.scored[0].steps == ["a", "b"] and reward.scored[0].spans == [[(0, 1), (5, 6)]]

    @pytest.mark.parametrize("keep_thinking", [False, True])
    @pytest.mark.parametrize("separator", ["\n\n", " ки", "."])
    def test_spans_give_the_steps(self, separator, keep_thinking):
        """A plain reference cuts the text without thinking or tags, and never counts characters."""
        rng = random.Random(f"{separator}{keep_thinking}")
        tags, letters = ["<think>", "</think>", "<thi", "nk>", "<|im_end|>"], ["a", "b ", "к", "и", "#", "\u00a0"]
        pieces = [*tags, *letters, "\n", "\n\n", " ки", "."]
        reward = StepReward(control_scorer(step_separator=separator, merge_separator="="), keep_thinking=keep_thinking)
        several = 0
        for _ in range(300):
            text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
            spans = reward.spans(text)
            assert reward.steps(text) == plain_steps(text, reward, separator)
            assert len(spans) == len(reward.steps(text)) and sum(spans, ()) == tuple(sorted(sum(spans, ())))
            for (start, end), step in zip(spans, reward.steps(text), strict=True):
                assert text[start] == step[0] and text[end - 1] == step[-1]
            several += len(spans) > 1
        assert several > 10


def plain_steps(text: str, reward: StepReward, separator: str) -> list[str]:
    ends_control = text.rstrip().endswith("<|im_end|>")
    text = text.rstrip().removesuffix("<|im_end|>") if ends_control else text
    if reward.keep_thinking:
        text = without_thinking_tags(text)
    ends = reward.rule.ends(text)
    pieces = [visible_text(text[start:end]).strip() for start, end in zip([0, *ends], ends, strict=False)]
    pieces = [piece.removesuffix(separator.strip()).strip() for piece in pieces if piece.strip("# \n")]
    return [piece for piece in pieces if piece]


def test_parts_of_the_reward():
    scorer = scorer_of()
    logged = {}
    reward = StepReward(scorer, name="hrm")
    reward(PROMPTS, [*COMPLETIONS[:3], "so"], log_metric=logged.__setitem__)
    scores = [score for scores in step_scores(scorer)[:3] for score in scores]
    assert reward.metrics == {
        "step_score": pytest.approx(sum(scores) / 7, abs=1e-5),
        "num_steps": 8 / 4,
        "guarded": 0.25,
        "guarded_steps": 1 / 8,
        "guarded/too_few_steps": 0.25,
        "guarded/too_many_steps": 0,
        "guarded/repeated_steps": 0,
        "guarded/blank_steps": 0,
        "guarded/too_long": 0,
        "guarded/control_text": 0,
        "thinking_left_out": 0,
        "tool_messages_left_out": 0,
    }
    assert logged == {f"hrm/{key}": value for key, value in reward.metrics.items()}
    reward([PROMPTS[0]], [""])
    assert {"step_score", "guarded_steps"}.isdisjoint(reward.metrics) and reward.metrics["guarded"] == 1


class TestTools:
    def messages(self, *contents: str | None, **fields) -> list[dict]:
        """Return assistant messages with a call and its result between each two."""
        found = []
        for content in contents:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            found.append({"role": "assistant", "content": content, "tool_calls": [call], **fields})
            found.append({"role": "tool", "name": "add", "content": "3"})
        del found[-2]["tool_calls"], found[-1]
        return found

    def test_steps_of_all_assistant_messages(self):
        """Neither calls nor results are shown to the reward model."""
        scorer = scorer_of()
        reward = StepReward(scorer, problem_column="problem")
        asked = [[{"role": "user", "content": "Use tools."}]] * 4
        completions = [
            self.messages("add 1\n\nso = 3", "thus y"),
            self.messages("", "add 1", None, "so = 3"),
            [{"role": "assistant", "tool_calls": []}, *self.messages("x")],
            self.messages("x\n\n", "\n\ny\n\n"),
        ]
        rewards = reward(asked, completions, problem=PROMPTS)
        steps = [["add 1", "so = 3", "thus y"], ["add 1", "so = 3"], ["x"], ["x", "y"]]
        assert [found.steps for found in reward.scored] == steps
        assert [found.guards for found in reward.scored] == [[], [], ["too_few_steps"], []]
        assert reward.scored[1].texts == ["", "add 1", "", "so = 3"]
        assert reward.scored[1].spans == [[], [(0, 5)], [], [(0, 6)]] and reward.scored[3].spans == [
            [(0, 1)],
            [(2, 3)],
        ]
        expected = step_scores(scorer, [PROMPTS[0], PROMPTS[1], PROMPTS[3]], [steps[0], steps[1], steps[3]])
        assert rewards[:2] + rewards[3:] == pytest.approx([min(scores) for scores in expected], abs=1e-5)
        assert reward.metrics["tool_messages_left_out"] == 0.75 and reward.metrics["num_steps"] == 2

    def test_guards_see_all_messages(self):
        cases = {
            "too_many_steps": self.messages("add 1\n\nx", "so = 3\n\ny"),
            "repeated_steps": self.messages("add 1", "add 1"),
            "blank_steps": self.messages("x\n\n.\n\n", "..\n\n...\n\ny"),
        }
        reward = StepReward(scorer_of(), max_steps=3, max_blank=2)
        for guard, completion in cases.items():
            reward([PROMPTS[0]], [completion])
            assert guard in reward.scored[0].guards
        assert StepReward(scorer_of(), max_blank=3)([PROMPTS[0]], [cases["blank_steps"]]) != [0]
        reward(
            [PROMPTS[0]], [self.messages("", "", "", "add 1", "", "so = 3")]
        )  # messages that only call a tool are not blank steps
        assert reward.scored[0].guards == []

    @pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
    def test_thinking_that_the_parser_removed(self, key):
        """It is left out and counted. It cannot be kept, and ignoring the option would go unseen."""
        completion = self.messages("add 1", "so = 3", **{key: "x"})
        reward = StepReward(scorer_of())
        assert reward([PROMPTS[0]], [completion]) == reward([PROMPTS[0]], [self.messages("add 1", "so = 3")])
        assert reward.metrics["thinking_left_out"] == 0
        reward([PROMPTS[0]], [completion])
        assert reward.metrics["thinking_left_out"] == 1 and reward.scored[0].thinking == ["x", "x"]
        with pytest.raises(ValueError, match="`keep_thinking` is True.*`response_template`"):
            StepReward(scorer_of(), keep_thinking=True)([PROMPTS[0]], [completion])

    def test_thinking_of_one_message_does_not_hide_another(self):
        """A closing tag ends thinking that began before its own message."""
        reward = StepReward(scorer_of())
        reward([PROMPTS[0]], [self.messages("add 1", "x</think>so = 3")])
        assert reward.scored[0].steps == ["add 1", "so = 3"] and reward.metrics["thinking_left_out"] == 1


class FixedScorer(StepScorer):
    """Returns fixed scores for one solution."""

    def __init__(self, values):
        super().__init__(tiny_model(), tiny_tokenizer(), HEADS["classification"])
        self.values = values

    def score(self, problems, solutions, **kwargs):
        return [[self.values]] if problems else []


class TestFaults:
    @pytest.fixture
    def folder(self, tmp_path):
        scorer = scorer_of()
        for part in (scorer.model, scorer.tokenizer):
            part.save_pretrained(tmp_path)
        scorer.step_format.save(tmp_path)
        return tmp_path

    def test_a_checkpoint_without_a_format(self, folder):
        (folder / STEP_FORMAT_NAME).unlink()
        with pytest.raises(FileNotFoundError, match="step_format.json"):
            StepReward(str(folder))

    def test_a_reward_model_of_another_format(self, folder):
        StepFormat(step_separator="").save(folder)
        with pytest.raises(ValueError, match="`step_separator` ''"):
            StepReward(str(folder))
        values = json.loads((folder / STEP_FORMAT_NAME).read_text()) | {"step_separator": "\n\n", "margin": 1}
        (folder / STEP_FORMAT_NAME).write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"\['margin'\]"):
            StepReward(str(folder))

    def test_zero_3_would_load_shards(self, folder, monkeypatch):
        monkeypatch.setattr("trl_hrm.rewards.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="before the GRPOConfig"):
            StepReward(str(folder))

    def test_every_rank_reads_the_weights(self, folder, monkeypatch):
        """If FSDP loaded weights on the first rank only, the others would never receive them."""
        seen = []
        load = StepScorer.from_pretrained

        def from_pretrained(*args, **kwargs):
            seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
            return load(*args, **kwargs)

        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
        monkeypatch.setattr(StepScorer, "from_pretrained", from_pretrained)
        StepReward(str(folder))
        assert seen == ["false"] and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"aggregate": "median"}, "`aggregate` is 'median'.* one of min"),
            ({"segmentation": "lines"}, "`segmentation` is 'lines'.* one of step_header"),
            ({"min_steps": 0}, "1 <= min_steps"),
            ({"min_steps": 9, "max_steps": 8}, "1 <= min_steps <= max_steps"),
            ({"max_repeated": 25}, "`max_repeated` is 25.* from 0 to 1"),
            ({"guard_reward": math.nan}, "`guard_reward` is nan"),
            ({"max_blank": -1}, "`max_blank` is -1.* at least 0"),
            ({"max_tokens": 0}, "`max_tokens` is 0.* at least 1"),
            ({"spans": (2,)}, r"`spans` is \[2\]. It must contain 1"),
            ({"combine": "sum"}, "`combine` is 'sum'.*max, mean"),
            ({"dtype": "bfloat16"}, r"\['dtype'\] with a scorer that is already loaded"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            StepReward(scorer_of(), **settings)

    def test_missing_columns(self):
        reward = StepReward(scorer_of(), problem_column="question")
        with pytest.raises(ValueError, match=r"'question'.* \['answer'\]"):
            reward(PROMPTS, COMPLETIONS, answer=["3"] * 4, trainer_state=None)

    def test_problems_in_a_column(self):
        """They failed in the tokenizer, or were grouped as if they were texts."""
        reward = StepReward(scorer_of(), problem_column="problem")
        expected = StepReward(scorer_of())(PROMPTS, COMPLETIONS)
        assert reward([""] * 4, COMPLETIONS, problem=tuple(PROMPTS)) == expected
        assert reward([""] * 4, COMPLETIONS, problem=as_messages(PROMPTS, COMPLETIONS)[0]) == expected
        assert reward(PROMPTS, COMPLETIONS, problem=[math.nan, None, *PROMPTS[2:]]) == [None, None, *expected[2:]]

    @pytest.mark.parametrize(
        "values, message",
        [
            ([3, 4], "found 3 in the column 'problem', expected a text"),
            ([True, False], "found True in the column"),
            ([["add"], ["sub"]], r"found \['add'\] in the column"),
            (["add", " "], "found ' ' in the column"),
            ([[{"role": "assistant", "content": "x"}]] * 2, r"in the column 'problem', .*roles \['assistant'\]"),
            ([[{"content": "x"}]] * 2, "in the column 'problem', found the message"),
            (["add"], "the column 'problem' has 1 values for 2 completions"),
            (["add"] * 3, "the column 'problem' has 3 values for 2 completions"),
        ],
    )
    def test_columns_without_problems(self, values, message):
        with pytest.raises(ValueError, match=f"step_reward: {message}"):
            StepReward(scorer_of(), problem_column="problem")(PROMPTS[:2], COMPLETIONS[:2], problem=values)

    def test_messages_that_cannot_be_judged(self):
        reward = StepReward(scorer_of())
        asked, answered = as_messages(PROMPTS, COMPLETIONS)
        for role in ("user", "system"):
            with pytest.raises(ValueError, match=rf"\['assistant', '{role}'\]"):
                reward(asked, [[*messages, {"role": role, "content": "3"}] for messages in answered])
        with pytest.raises(ValueError, match=r"\['tool', 'assistant'\]"):
            reward(asked, [[{"role": "tool", "content": "3"}, *messages] for messages in answered])
        with pytest.raises(ValueError, match=r"\['system'\]"):
            reward([messages[:1] for messages in asked], answered)
        with pytest.raises(ValueError, match=r"\['image'\]"):
            reward([[{"role": "user", "content": [{"type": "image"}]}]], answered[:1])

    def test_a_score_that_is_not_a_number(self):
        """TRL reads NaN as "not applicable", so training would continue without this reward."""
        with pytest.raises(ValueError, match="NaN"):
            StepReward(scorer_of(), aggregate=lambda scores: math.nan)(PROMPTS, COMPLETIONS)
        with pytest.raises(ValueError, match="is inf"):
            StepReward(scorer_of(), aggregate=lambda scores: math.inf)(PROMPTS, COMPLETIONS)
        scorer = scorer_of()
        with torch.no_grad():
            scorer.model.score.weight.fill_(math.nan)
        with pytest.raises(ValueError, match="finite number"):
            StepReward(scorer)(PROMPTS, COMPLETIONS)

    @pytest.mark.parametrize("values", [[0.5, math.nan], [math.inf, 0.5], [0.5], [0.5, 0.5, 0.5], []])
    def test_scores_that_do_not_fit(self, values):
        """The minimum of 0.5 and NaN is 0.5, so the aggregate does not show it. Credit for steps would."""
        with pytest.raises(ValueError, match=r"step_reward: .*for 2 steps.* one finite number per step"):
            StepReward(FixedScorer(values))(PROMPTS[:1], COMPLETIONS[:1])
        reward = StepReward(FixedScorer([0.5, 0.25]))
        assert reward(PROMPTS[:1], COMPLETIONS[:1]) == [0.25]


class Recorded(StepReward):
    """Records its inputs and outputs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def __call__(self, prompts, completions, **kwargs):
        rewards = super().__call__(prompts, completions, **kwargs)
        self.calls.append((prompts, completions, rewards, dict(self.metrics)))
        return rewards


ARGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 24,
    "learning_rate": 0.1,
    "beta": 0.0,
}


def assert_logged(trainer, reward, max_steps, before):
    assert trainer.state.global_step == max_steps == len(reward.calls)
    logs = [log for log in trainer.state.log_history if f"rewards/{reward.__name__}/mean" in log]
    assert len(logs) == max_steps
    for log, (_, _, rewards, metrics) in zip(logs, reward.calls, strict=True):
        assert log[f"rewards/{reward.__name__}/mean"] == pytest.approx(sum(rewards) / 8, abs=1e-5)
        for key, value in metrics.items():
            assert log[f"{reward.__name__}/{key}"] == pytest.approx(value, abs=1e-5)
    assert any(len(set(rewards)) > 2 for _, _, rewards, _ in reward.calls)  # otherwise there is nothing to learn from
    after = weights_of(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)


class TestTrainers:
    def test_three_steps_of_grpo(self, tmp_path):
        """TRL decides which arguments it passes and how it reads the result, so the test uses the real trainer."""
        scorer = scorer_of()
        reward = Recorded(scorer, name="hrm", problem_column="problem", segmentation="sentence", min_steps=1)
        policy = tiny_model(HEADS["lm"])
        before = weights_of(policy)
        rows = [{"prompt": f"Think.\n{prompt}", "problem": prompt} for prompt in PROMPTS[1:3]] * 3
        trainer = GRPOTrainer(
            policy,
            reward_funcs=[reward],
            args=GRPOConfig(str(tmp_path), max_steps=3, **ARGS),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        assert_logged(trainer, reward, 3, before)
        for prompts, completions, rewards, _ in reward.calls:
            for prompt, completion, found in zip(prompts, completions, rewards, strict=True):
                assert isinstance(completion, str)
                steps = reward.steps(completion)
                guarded = reward.guards(prompt.removeprefix("Think.\n"), completion, steps)
                expected = 0.0 if guarded else min(scorer.score([prompt.removeprefix("Think.\n")], [[steps]])[0][0])
                assert found == pytest.approx(expected, abs=1e-5)

    def test_two_steps_of_rloo_with_messages(self, tmp_path):
        reward = Recorded(scorer_of(), min_steps=1)
        policy = tiny_model(HEADS["lm"])
        before = weights_of(policy)
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.chat_template = TEMPLATE
        rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[1:3]] * 2
        trainer = RLOOTrainer(
            policy,
            reward_funcs=[reward],
            args=RLOOConfig(str(tmp_path), max_steps=2, **ARGS),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        assert_logged(trainer, reward, 2, before)
        assert all(completion[0]["role"] == "assistant" for _, found, _, _ in reward.calls for completion in found)
        assert {prompt[-1]["content"] for asked, _, _, _ in reward.calls for prompt in asked} == set(PROMPTS[1:3])


class TestThinkingSteps:
    """`segmentation="thinking"`: the steps of the thinking are scored too."""

    TEXT = "<think>add 1 so = 4. Wait, = 3.\n\nsum x</think>\n\nso = 3\n\nthus y"
    FOUND = ["add 1 so = 4.", "Wait, = 3.\n\nsum x", "so = 3", "thus y"]

    def test_steps(self):
        scorer = scorer_of(HEADS["classification"])
        reward = StepReward(scorer, segmentation="thinking", aggregate="mean")
        assert reward.keep_thinking and reward.steps(self.TEXT) == self.FOUND
        [found] = reward(["1+2?"], [self.TEXT])
        expected = step_scores(scorer, ["1+2?"], [self.FOUND])[0]
        assert found == pytest.approx(sum(expected) / 4, abs=1e-5)
        assert reward.scored[0].steps == self.FOUND and reward.metrics["thinking_left_out"] == 0
        assert reward.scored[0].scores == pytest.approx(expected, abs=1e-5)

    def test_a_tag_in_the_prompt(self):
        """Without it, the unfinished thinking would be read as an answer."""
        reward = StepReward(scorer_of(), segmentation="thinking", problem_column="problem", min_steps=1)
        text = "add 1 so. Wait, = 3"
        reward(["q\n<think>\n", "q"], [text, text], problem=["q", "q"])
        assert [one.steps for one in reward.scored] == [["add 1 so.", "Wait, = 3"], [text]]
        assert reward.scored[0].spans == [[(0, 9), (10, 19)]]

    def test_own_marks_and_merged_thoughts(self):
        rule = ThinkingRule(marks=("so",), min_characters=1)
        scorer = scorer_of(StepFormat(thinking_marks=("so",)))
        reward = StepReward(scorer, segmentation=rule, spans=(1, "thought"), aggregate="last", min_steps=1)
        text = "<think>add 1\n\nx\n\nso = 3</think>"
        [found] = reward(["q"], [text])
        assert reward.steps(text) == ["add 1", "x", "so = 3"]
        alone, merged = (
            scorer.score(["q"], [[steps]])[0][0][-1] for steps in (["add 1", "x", "so = 3"], ["add 1\nx\nso = 3"])
        )
        assert alone != pytest.approx(merged) and found == pytest.approx(max(alone, merged), abs=1e-5)

    def test_removed_thinking_contradicts_it(self):
        with pytest.raises(ValueError, match="`keep_thinking` is False.*'thinking'"):
            StepReward(scorer_of(), segmentation="thinking", keep_thinking=False)
        with pytest.raises(ValueError, match="`segmentation` is 'thoughts'.*thinking"):
            StepReward(scorer_of(), segmentation="thoughts")
