"""The policy's training data, and how its solutions are counted."""

import math
import random

import pytest
from transformers import AutoModelForCausalLM

from trl_hrm.demo.policy import CURRICULUM, decision_characters, policy_rates, solution_text, train_policy
from trl_hrm.demo.world import Problem, different_problems


PROBLEM = Problem.parse("Start with 4. a+3 b*2 c-3 d*3. Work modulo 5.")


def test_rates_of_written_solutions():
    """If a correction were counted after the wrong step, a blind policy would seem to see its errors."""
    seeing = "a:4+3=2\n\nb:1*2=2\n\nWait,b:2*2=4\n\nc:4-3=1\n\nd:0*3=0\n\n# Answer\n0"
    blind = "a:4+3=2\n\nWait,a:4+3=2\n\nb:2*2=4\n\nc:4-3=1\n\nd:1*3=3\n\n# Answer\n3"
    rates = policy_rates([(PROBLEM, seeing), (PROBLEM, blind)])
    assert (rates.num_solutions, rates.num_steps, rates.num_slips) == (2, 8, 2)
    assert (rates.num_corrected, rates.num_spurious) == (1, 1)
    assert rates.slip_rate == 1 / 4 and rates.correction_rate == 1 / 2 and rates.spurious_rate == 1 / 6
    assert math.isclose(rates.sight, 3)
    assert policy_rates([(PROBLEM, seeing)]).sight == math.inf
    assert (
        policy_rates([(PROBLEM, seeing.replace("Wait,b:2*2=4\n\n", ""))]).sight == 0
    )  # a policy that corrects nothing sees nothing


def test_mistakes_are_not_training_targets():
    """Mistakes are unpredictable. If they were trained on, a policy of this size would say "Wait" at random."""
    text = solution_text(["a:4+3=2", "b:1*2=2", "Wait,b:2*2=4"])
    trained = decision_characters(text)
    assert [text[i] for i in sorted(trained)] == ["a", "b", *"Wait,b:2*2=4"]


def test_the_curriculum_is_one_training():
    assert math.isclose(sum(stage.share for stage in CURRICULUM), 1)
    assert [stage.slip_rate for stage in CURRICULUM][0] == 0 and CURRICULUM[-1].skew == 1


@pytest.mark.slow
def test_same_seed_same_policy(tmp_path):
    problems = different_problems(random.Random(0), 50)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_policy(tmp_path / name, problems, 12, seed)
    weights = [dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in "abc"]
    same, other = (all(weights[0][key].equal(found[key]) for key in weights[0]) for found in weights[1:])
    assert same and not other
