r"""AccuracyReward: the grades of answers as rewards of TRL, missing references, and worker processes that end."""

import copy
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_hrm import AccuracyReward

from .helpers import HEADS, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def accuracy():
    with AccuracyReward(timeout=2) as reward:
        yield reward


def graded(reward, completions, references, prompts=None) -> list[float | None]:
    return reward(prompts or ["1 + 2?"] * len(completions), completions, answer=references)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("1 + 2 = 3.\n\n# Answer\n\n0.5\n# END!", 1.0),
        (r"So it is \boxed{\frac{2}{4}}.", 1.0),
        ("The answer is 1/2.", 1.0),
        (r"First \boxed{1/2}, no: \boxed{1}", 0.0),
        ("I give up.", 0.0),
        (r"It is \boxed{\frac{1}{", 0.0),  # cut off
        (r"<think>It is \boxed{1/2}.</think>\boxed{3}", 0.0),
        (r"<think>\boxed{3}</think>It is \boxed{1/2}.", 1.0),
        (r"<think>It is \boxed{1/2}", 0.0),
        (r"It is \boxed{9^{9^{9^9}}}.", 0.0),  # never ends
    ],
)
def test_rewards_by_hand(accuracy, completion, expected):
    """As text and as messages. Only the last assistant message has the answer."""
    messages = [
        {"role": "assistant", "content": r"\boxed{1/2}"},
        {"role": "tool", "content": r"\boxed{1/2}"},
        {"role": "assistant", "content": completion},
    ]
    assert graded(accuracy, [completion, messages, messages[2:]], [r"\frac{1}{2}"] * 3) == [expected] * 3


def test_the_answer_is_of_its_own_row(accuracy):
    """TRL shuffles, so an answer that is graded with the reference of its neighbour would train on noise."""
    completions = [rf"\boxed{{{i}}}" for i in range(12)]
    assert graded(accuracy, completions, [str(i) for i in range(12)]) == [1.0] * 12
    assert graded(accuracy, completions, [str(i - i % 2) for i in range(12)]) == [1.0, 0.0] * 6


def test_thinking_that_the_prompt_opens(accuracy):
    thought = r"It is \boxed{3}."
    assert graded(accuracy, [thought] * 2, ["3"] * 2, ["1 + 2?<think>\n", "1 + 2?"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (3, 1.0),
        (3.0, 1.0),
        (np.int64(3), 1.0),
        (np.float32(3), 1.0),
        (np.float32("nan"), None),
        (" 3 ", 1.0),
        ("1 + 2 = <<1+2=3>>3.\n#### 3", 1.0),
        (r"We add $1 + 2 = \boxed{3}$.", 1.0),
        (4, 0.0),
        (None, None),
        (float("nan"), None),
        (" ", None),
        (r"\frac{", None),
    ],
    ids=repr,
)
def test_references(accuracy, reference, expected):
    """A problem without a readable reference gives no reward, also for a completion without an answer."""
    no_answer = None if expected is None else 0.0
    assert graded(accuracy, ["The answer is 3.", "I give up."], [reference] * 2) == [expected, no_answer]


def test_other_columns_and_extractors():
    with AccuracyReward("solution", extractors=["last_number"]) as reward:
        assert reward(["a"] * 2, ["It is 3", r"\boxed{x}"], solution=["3", "x"]) == [1.0, 0.0]
        with pytest.raises(ValueError, match=r"`answer_column` is 'solution'.* \['answer', 'level'\]"):
            reward(["a"], ["b"], answer=["3"], level=[1], trainer_state=None)
        for value in (["3", "4"], True, np.bool_(True)):
            with pytest.raises(ValueError, match="in the column 'solution', expected a text or a number"):
                reward(["a"], ["b"], solution=[value])


def test_one_reference_for_each_completion():
    """With fewer references, the reward was a shorter list."""
    with AccuracyReward() as reward:
        for number in (1, 3):
            with pytest.raises(ValueError, match=f"'answer' has {number} values for 2 completions"):
                graded(reward, ["The answer is 3."] * 2, ["3"] * number)
        assert reward._grader is None


def test_metrics(accuracy):
    logged = {}
    accuracy(
        ["a"] * 8,
        [r"\boxed{3}", r"\boxed{4}", "", r"\boxed{9^{9^{9^9}}}", r"\boxed{May 5}", r"\boxed{3}", r"\boxed{3}", "x"],
        answer=["3", "3", "3", "3", "June 5", None, r"\frac{", r"\frac{"],
        log_metric=logged.__setitem__,
    )
    shares = {"no_answer": 1, "timeout": 1, "unparseable": 1, "no_reference": 1, "ungradable": 2, "died": 0}
    assert logged == {f"accuracy/{name}": number / 8 for name, number in shares.items()}


def test_invalid_options():
    for options, message in (
        ({"extractors": ["box"]}, "'box' is unknown"),
        ({"num_workers": 0}, "num_workers"),
        ({"timeout": 0}, "timeout"),
    ):
        with pytest.raises(ValueError, match=message):
            AccuracyReward(**options)


def test_copies_have_their_own_workers(accuracy):
    """A used reward can be copied and pickled, as by a launcher that spawns processes."""
    graded(accuracy, ["3"], ["3"])
    for other in (copy.deepcopy(accuracy), pickle.loads(pickle.dumps(accuracy))):
        with other:
            assert graded(other, ["The answer is 3."], ["3"]) == [1.0]
            assert other._grader is not accuracy._grader
        assert other._grader is None
    assert graded(accuracy, ["The answer is 3."], ["3"]) == [1.0]


@pytest.mark.parametrize(
    "end",
    [
        "pass",
        pytest.param("sys.exit(3)", marks=pytest.mark.slow),
        pytest.param("os._exit(3)", marks=pytest.mark.slow),
        "os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_workers_end_with_the_process(tmp_path, end):
    """As in a training script: no context manager, no main block, and possibly killed."""
    code = f"""
        import os, signal, sys
        from trl_hrm import AccuracyReward

        reward = AccuracyReward(num_workers=2)
        print(reward(["a"] * 4, ["The answer is 3.", "The answer is 4."] * 2, answer=["3", "3", "5", "5"]))
        print(*[worker.process.pid for worker in reward._grader._workers if worker.process], flush=True)
        assert "reward" in vars(sys.modules["__main__"])
        {end}
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    # `communicate` waits until no process has the pipe open any more
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    rewards, pids = done.stdout.splitlines()
    assert rewards == "[1.0, 0.0, 0.0, 0.0]" and len(pids.split()) >= 1
    assert done.returncode == {"pass": 0, "sys.exit(3)": 3, "os._exit(3)": 3}.get(end, -9), done.stderr


def test_in_a_trainer(tmp_path):
    """TRL logs the mean of the rewards and the metrics, and takes `None` as no reward."""
    args = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        save_strategy="no",
        logging_steps=1,
    )
    rows = [{"prompt": "1+2?", "answer": "3"}, {"prompt": "add x", "answer": None}]
    with AccuracyReward() as reward:
        trainer = GRPOTrainer(
            tiny_model(HEADS["lm"]),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
    [log] = [log for log in trainer.state.log_history if "loss" in log]
    assert log["rewards/accuracy/mean"] == 0.0 and log["accuracy/no_reference"] == 0.5
