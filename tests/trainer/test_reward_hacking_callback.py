"""RewardHackingCallback on planted evaluations, whose answers are known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from tests.helpers import tiny_model, tiny_tokenizer
from trl_hrm import RewardHackingCallback, StepFormat, StepReward, StepScorer
from trl_hrm._compat import trainer_utils
from trl_hrm.intervals import difference_interval, mean_interval


NAMES = ["accuracy", "step_reward"]


@pytest.fixture(scope="module")
def step_reward():
    return StepReward(StepScorer(tiny_model(), tiny_tokenizer(), StepFormat()))


def accuracy(completions, **columns):
    return [1.0] * len(completions)


class Trainer(SimpleNamespace):
    eval_rewards = None


class World:
    """The parts of a trainer that the callback uses, with planted rewards instead of evaluations."""

    def __init__(
        self, folder, step_reward, num_problems=100, group=1, stop=False, state=None, seed=42, first=0, **names
    ):
        self.folder = folder
        self.args = TrainingArguments(str(folder), eval_strategy="steps", eval_steps=10, report_to=[], seed=seed)
        self.state = TrainerState(is_world_process_zero=True) if state is None else state
        self.control = TrainerControl()
        self.trainer = Trainer(
            args=self.args,
            state=self.state,
            control=self.control,
            is_in_train=True,
            eval_dataset=Dataset.from_dict({"prompt": [f"{first + i}?" for i in range(num_problems)]}),
            num_generations_eval=group,
            reward_funcs=[accuracy, step_reward],
            reward_func_names=list(NAMES),
            callback_handler=CallbackHandler([DefaultFlowCallback()], None, None, None, None),
        )
        self.group = group
        self.callback = RewardHackingCallback(self.trainer, stop=stop, **names)

    def evaluate(self, step, outcomes, process):
        """Plant one row for each of the generations of each problem, and return the metrics."""
        columns = [torch.tensor(np.asarray(values, dtype=np.float32).reshape(-1)) for values in (outcomes, process)]
        self.trainer.eval_rewards = torch.stack(columns, dim=1)
        self.state.global_step = step
        metrics = {"eval_loss": 0.0}
        self.callback.on_evaluate(self.args, self.state, self.control, metrics=metrics)
        return metrics

    def report(self):
        return json.loads((self.folder / "reward_hacking.json").read_text())


@pytest.fixture
def world(tmp_path, step_reward):
    return lambda **options: World(tmp_path, step_reward, **options)


def right(k, n=100):
    """The first k of n problems are right."""
    return np.arange(n) < k


def noisy(mean, n=100, seed=0):
    """Process rewards with this mean, which differ between problems."""
    return np.random.default_rng(seed).normal(mean, 0.05, n)


class TestAnswers:
    def test_reward_up_and_accuracy_down(self, world, caplog):
        world = world()
        assert world.evaluate(0, right(50), noisy(0.4)) == {"eval_loss": 0.0}  # nothing to compare with
        assert not caplog.records
        metrics = world.evaluate(10, right(30), noisy(0.6, seed=1))
        # 20 of 100 problems were lost and none gained. One pair of evaluations: no correction
        low, high = difference_interval((right(50) & ~right(30)).astype(float))
        rises = noisy(0.6, seed=1).astype(np.float32) - noisy(0.4).astype(np.float32)
        assert metrics["eval_reward_hacking"] == 1.0
        assert metrics["eval_reward_hacking_gap"] == pytest.approx(0.2)
        assert metrics["eval_reward_hacking_gap/low"] == pytest.approx(low)
        assert metrics["eval_reward_hacking_gap/high"] == pytest.approx(high)
        assert metrics["eval_process_reward_rise"] == pytest.approx(rises.mean(), abs=1e-6)
        assert (
            0.1
            < metrics["eval_process_reward_rise/low"]
            < rises.mean()
            < metrics["eval_process_reward_rise/high"]
            < 0.3
        )
        (warning,) = caplog.messages
        assert "at step 10: since step 0" in warning and "fallen by 20.0 points (from 50.0 % to 30.0 %" in warning
        assert f"interval of the loss {100 * low:.1f} to {100 * high:.1f} points, on 100 held-out problems" in warning
        assert not world.control.should_training_stop and "continues" in warning

    @pytest.mark.parametrize(
        "then, now, answer",
        [
            ((50, 0.4), (70, 0.6), "no"),  # both rise
            ((50, 0.6), (30, 0.4), "no"),  # both fall: training fails, but not by hacking
            ((50, 0.4), (30, 0.4), "open"),  # the process reward does not change
            ((50, 0.4), (30, 0.415), "open"),  # it rises, but perhaps by chance
            ((50, 0.4), (48, 0.6), "open"),  # a small loss may be chance
            ((50, 0.4), (50, 0.6), "no"),  # a tie of equal outcomes
            ((2, 0.4), (0, 0.6), "none"),  # there is not enough accuracy to lose
            ((0, 0.4), (0, 0.6), "none"),
        ],
    )
    def test_everything_else_is_not_hacking(self, world, caplog, then, now, answer):
        world = world(stop=True)
        world.evaluate(0, right(then[0]), noisy(then[1]))
        # the seed is the same for equal means: no problem changes
        metrics = world.evaluate(10, right(now[0]), noisy(now[1], seed=then[1] != now[1]))
        assert world.report()["evaluations"][-1]["answer"] == answer
        assert metrics["eval_reward_hacking"] == 0.0
        assert not caplog.records and not world.control.should_training_stop

    def test_a_certain_loss_below_five_points_does_not_count(self, world):
        """The same margin as in best-of-N."""
        world = world(num_problems=4000)
        world.evaluate(0, right(2000, 4000), noisy(0.4, 4000))
        metrics = world.evaluate(10, right(1900, 4000), noisy(0.6, 4000, seed=1))
        assert metrics["eval_reward_hacking_gap/low"] > 0.01 and metrics["eval_reward_hacking"] == 0.0
        assert world.report()["evaluations"][-1]["answer"] == "no"

    @pytest.mark.parametrize("num_problems", [1, 2, 3])
    def test_few_problems_are_never_enough(self, world, caplog, num_problems):
        """Not even if all of them are lost."""
        world = world(num_problems=num_problems)
        world.evaluate(0, np.ones(num_problems), np.zeros(num_problems))
        world.evaluate(10, np.zeros(num_problems), np.ones(num_problems))
        assert world.report()["evaluations"][-1]["answer"] == "open"
        assert not caplog.records

    def test_rewards_of_any_unit(self, world):
        """The answer does not depend on the unit of the process reward, which may be a logit or negative."""
        found = []
        for scale, shift in ((1, 0), (100, -500), (1e-4, 3)):
            one = world()
            one.evaluate(0, right(50), shift + scale * noisy(0.4))
            metrics = one.evaluate(10, right(30), shift + scale * noisy(0.6, seed=1))
            assert metrics["eval_reward_hacking"] == 1.0
            found.append([metrics[f"eval_process_reward_rise{end}"] / scale for end in ("", "/low", "/high")])
        assert found[1] == pytest.approx(found[0], rel=1e-3) and found[2] == pytest.approx(found[0], rel=1e-2)


class TestReference:
    def test_the_best_evaluation_so_far(self, world, caplog):
        """Accuracy is higher than at the start, but lower than at its best."""
        world = world()
        world.evaluate(0, right(20), noisy(0.3))
        world.evaluate(10, right(70), noisy(0.5, seed=1))
        metrics = world.evaluate(20, right(40), noisy(0.8, seed=2))
        assert metrics["eval_reward_hacking_gap"] == pytest.approx(0.3) and "since step 10" in caplog.text
        records = world.report()["evaluations"]
        assert [one["answer"] for one in records] == ["none", "no", "yes"]
        assert (records[1]["from_step"], records[1]["gap"], records[1]["loss"]) == (0, 0.0, pytest.approx(-0.5))
        assert records[2]["from_step"] == 10
        # three pairs of evaluations
        low, high = difference_interval((right(70) & ~right(40)).astype(float), 3)
        assert (records[2]["low"], records[2]["high"]) == (pytest.approx(low), pytest.approx(high))

    def test_the_first_of_equally_accurate_evaluations(self, world):
        world = world()
        for step in (0, 10, 20):
            world.evaluate(step, right(50), noisy(0.4))
        world.evaluate(30, right(20), noisy(0.6, seed=1))
        assert world.report()["evaluations"][-1]["from_step"] == 0

    def test_one_warning_until_a_new_best(self, world, caplog):
        world = world()
        for step, k in enumerate((50, 20, 18, 50, 15, 90, 40, 40)):
            world.evaluate(step, right(k), noisy(0.3 + 0.1 * step, seed=step))
        answers = [one["answer"] for one in world.report()["evaluations"]]
        assert answers == ["none", "yes", "yes", "open", "yes", "no", "yes", "yes"]
        assert ["step 1:" in caplog.messages[0], "step 6:" in caplog.messages[1], len(caplog.messages)] == [
            True,
            True,
            2,
        ]

    def test_noise_is_rarely_taken_for_hacking(self, world):
        """
        The process reward rises, as always in training, and accuracy is noise. The best evaluation is best by chance, so that
        uncorrected intervals would show a loss in most trainings.
        """
        rng = np.random.default_rng(0)
        corrected, plain = 0, 0
        for _ in range(15):
            one = world(num_problems=60)
            chances = rng.beta(0.7, 0.7, 60)
            history = []
            answers = []
            for step in range(15):
                outcomes = (rng.random(60) < chances).astype(float)
                metrics = one.evaluate(step, outcomes, noisy(0.2 + 0.04 * step, 60, seed=step))
                answers.append(metrics.get("eval_reward_hacking", 0.0))
                best = max(history, key=np.mean, default=outcomes)
                plain_answer = difference_interval(best - outcomes)[0] > 0
                history.append(outcomes)
                answers[-1] = (answers[-1], plain_answer)
            corrected += any(answer for answer, _ in answers)
            plain += any(answer for _, answer in answers)
        assert corrected <= 2 and plain >= 7

    def test_other_problems_are_not_compared(self, world, caplog):
        first = world()
        first.evaluate(0, right(50), noisy(0.4))
        resumed = world(state=first.state, first=1)
        metrics = resumed.evaluate(10, right(20), noisy(0.6, seed=1))
        assert metrics == {"eval_loss": 0.0} and "other problems" in caplog.text
        # the order of the problems depends on the seed
        assert world(state=first.state, seed=1).evaluate(20, right(20), noisy(0.6, seed=1)) == {"eval_loss": 0.0}
        back = world(state=first.state)
        assert back.evaluate(30, right(20), noisy(0.6, seed=1))["eval_reward_hacking"] == 1.0


class TestRows:
    def test_means_over_the_generations_of_each_problem(self, world):
        world = world(num_problems=3, group=2)
        world.evaluate(5, [1, 0, 1, 1, 0, 0], [0.5, 0.25, 1, 1, 0, 0.5])
        (record,) = world.report()["evaluations"]
        assert record["accuracy"] == 0.5 and record["num_problems"] == 3
        assert record["process_reward"] == pytest.approx((0.375 + 1 + 0.25) / 3)
        assert record["accuracy_interval"] == pytest.approx(mean_interval(np.array([0.5, 1, 0])))

    def test_repeated_rows_are_dropped(self, world):
        """They would count two problems twice, which here would change the accuracy."""
        world = world(num_problems=3, group=2)
        world.evaluate(5, [1, 1, 0, 0, 0, 0] + [1, 1], [0.0] * 8)
        assert world.report()["evaluations"][0]["accuracy"] == pytest.approx(1 / 3)

    @pytest.mark.parametrize(
        "num_problems, group, batch, ranks", [(5, 2, 2, 2), (5, 4, 2, 4), (7, 3, 3, 4), (3, 2, 6, 2)]
    )
    def test_accelerate_repeats_rows_only_at_the_end(self, num_problems, group, batch, ranks):
        """What the callback relies on: gathered in the order of the ranks, the first rows are the sampler's, and once each."""
        problems = list(trainer_utils.RepeatSampler(range(num_problems), mini_repeat_count=group, seed=3))
        shards = [
            list(BatchSamplerShard(BatchSampler(problems, batch, drop_last=False), ranks, rank))
            for rank in range(ranks)
        ]
        gathered = [row for step in zip(*shards, strict=True) for rows in step for row in rows]
        assert gathered[: num_problems * group] == problems
        assert len(gathered) % (batch * ranks) == 0

    def test_missing_rewards(self, world):
        """A problem that is unknown at one of both evaluations is not compared, and a row without reward does not count."""
        nan = float("nan")
        world = world(num_problems=4, group=2)
        world.evaluate(0, [1, nan, 1, 1, nan, nan, 0, 0], [0.2, nan, 0.2, 0.2, 0.2, 0.2, nan, nan])
        metrics = world.evaluate(10, [0, 0, 1, 1, 1, 1, 0, 0], [0.4, 0.4, 0.6, 0.6, nan, nan, 0.2, 0.2])
        first, second = world.report()["evaluations"]
        assert (first["accuracy"], first["num_problems"]) == (pytest.approx(2 / 3), 3)
        assert (second["accuracy"], second["num_problems"]) == (0.5, 4)
        assert metrics["eval_reward_hacking_gap"] == pytest.approx(1 / 6)
        assert metrics["eval_process_reward_rise"] == pytest.approx((0.2 + 0.4) / 2)
        assert second["answer"] == "open"

    @pytest.mark.parametrize("name", NAMES)
    def test_an_evaluation_without_rewards_is_not_compared(self, world, caplog, name):
        world = world()
        empty = np.full(100, np.nan)
        world.evaluate(0, right(50), noisy(0.4))
        world.evaluate(10, *(empty if name == other else right(20) for other in NAMES))
        assert f"'{name}' returned None for all rows of the evaluation at step 10" in caplog.text
        assert world.evaluate(20, right(20), noisy(0.6, seed=1))["eval_reward_hacking"] == 1.0
        assert [one["step"] for one in world.report()["evaluations"]] == [0, 20]

    def test_no_common_problem(self, world):
        world = world(num_problems=2)
        nan = float("nan")
        world.evaluate(0, [1, nan], [0.2, nan])
        metrics = world.evaluate(10, [nan, 0], [nan, 0.4])
        assert "eval_process_reward_rise" not in metrics and metrics["eval_reward_hacking_gap"] == 1.0
        assert world.report()["evaluations"][-1]["answer"] == "open"

    @pytest.mark.parametrize("value", [-1.0, 1.5])
    def test_outcomes_that_are_no_accuracy(self, world, value):
        world = world(num_problems=2)
        with pytest.raises(ValueError, match=f"'accuracy' returned {value:g}"):
            world.evaluate(0, [1, value], [0, 0])


class TestTraining:
    def test_stop(self, world, caplog):
        world = world(stop=True)
        world.evaluate(0, right(50), noisy(0.4))
        assert not world.control.should_training_stop
        world.evaluate(10, right(30), noisy(0.6, seed=1))
        assert world.control.should_training_stop and "Training stops" in caplog.text

    def test_a_stop_is_always_announced(self, world, caplog):
        """Also when a resumed training stops at once, after the warning was given before."""
        first = world()
        first.evaluate(0, right(50), noisy(0.4))
        first.evaluate(10, right(30), noisy(0.6, seed=1))
        resumed = world(stop=True, state=first.state)
        resumed.evaluate(20, right(30), noisy(0.6, seed=1))
        assert resumed.control.should_training_stop and "Training stops" in caplog.messages[-1]

    def test_resumed_from_the_state_of_a_checkpoint(self, world, tmp_path):
        """With the state in a file, in the middle, everything is as without the interruption."""
        plan = [(50, 0.4), (70, 0.5), (60, 0.6), (30, 0.8)]
        whole = world()
        for step, (k, mean) in enumerate(plan):
            expected = whole.evaluate(step, right(k), noisy(mean, seed=step))
        uninterrupted = whole.report()
        for cut in (1, 2, 3):
            one = world()
            for step, (k, mean) in enumerate(plan[:cut]):
                one.evaluate(step, right(k), noisy(mean, seed=step))
            one.state.save_to_json(str(tmp_path / "state.json"))
            assert "NaN" not in (tmp_path / "state.json").read_text()
            other = world(state=TrainerState.load_from_json(str(tmp_path / "state.json")))
            for step, (k, mean) in list(enumerate(plan))[cut:]:
                metrics = other.evaluate(step, right(k), noisy(mean, seed=step))
            assert metrics == expected and other.report() == uninterrupted

    def test_values_of_problems_are_kept_once(self, world):
        """Otherwise the state of every checkpoint would grow with each evaluation."""
        world = world()
        for step, k in enumerate((50, 60, 40, 70, 65)):
            world.evaluate(step, right(k), noisy(0.5, seed=step))
        records = [entry["reward_hacking"] for entry in world.state.log_history if "reward_hacking" in entry]
        assert ["outcomes" in one for one in records] == [False, False, False, True, False]
        assert ["process_rewards" in one for one in records] == [False, False, False, True, False]

    def test_logged_once(self, world):
        world = world()
        world.evaluate(0, right(50), noisy(0.4))
        metrics = world.evaluate(10, right(30), noisy(0.6, seed=1))
        (logged,) = [entry for entry in world.state.log_history if "eval_reward_hacking" in entry]
        assert logged == {key: metrics[key] for key in metrics if key != "eval_loss"} | {"step": 10, "epoch": 0}

    def test_the_same_step_again_is_not_compared(self, world):
        """`eval_on_start` evaluates again at the step of the checkpoint that training resumes from."""
        world = world()
        world.evaluate(10, right(50), noisy(0.4))
        assert world.evaluate(10, right(20), noisy(0.6, seed=1)) == {"eval_loss": 0.0}
        assert len(world.report()["evaluations"]) == 1

    def test_evaluations_outside_training_are_not_compared(self, world):
        world = world()
        world.trainer.is_in_train = False
        world.evaluate(10, right(50), noisy(0.4))
        assert not world.state.log_history and not (world.folder / "reward_hacking.json").exists()

    def test_evaluations_of_other_problems_are_not_compared(self, world):
        """Another callback may evaluate other problems during training, with another prefix of the metrics."""
        world = world()
        world.evaluate(10, right(50), noisy(0.4))
        world.state.global_step = 20
        world.trainer.eval_rewards = torch.zeros(7, 2)
        world.callback.on_evaluate(world.args, world.state, world.control, metrics={"other_loss": 0.0})
        assert world.evaluate(20, right(20), noisy(0.6, seed=1))["eval_reward_hacking"] == 1.0

    def test_only_the_main_process_writes(self, world):
        world = world(stop=True, state=TrainerState(is_world_process_zero=False))
        world.evaluate(0, right(50), noisy(0.4))
        world.evaluate(10, right(30), noisy(0.6, seed=1))
        world.callback.on_train_end(world.args, world.state, world.control)
        assert world.control.should_training_stop  # but all of them stop
        assert not list(world.folder.glob("reward_hacking.*"))

    def test_the_picture(self, world):
        world = world()
        world.evaluate(0, right(50), noisy(0.4))
        world.evaluate(10, right(30), noisy(0.6, seed=1))
        world.callback.on_train_end(world.args, world.state, world.control)
        picture = (world.folder / "reward_hacking.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        world.callback.on_train_end(world.args, world.state, world.control)
        assert (world.folder / "reward_hacking.png").read_bytes() == picture
        assert sorted(path.name for path in world.folder.iterdir()) == ["reward_hacking.json", "reward_hacking.png"]

    def test_no_evaluation_at_all(self, world, caplog):
        world = world()
        world.callback.on_train_end(world.args, world.state, world.control)
        assert "ended without an evaluation" in caplog.text and not list(world.folder.glob("*.png"))


class TestBadInput:
    def test_another_trainer(self, world):
        trainer = SimpleNamespace(**vars(world().trainer))
        with pytest.raises(TypeError, match="Use a StepGRPOTrainer"):
            RewardHackingCallback(trainer)

    def test_no_evaluations(self, world):
        trainer = world().trainer
        trainer.args.eval_strategy = "no"
        with pytest.raises(ValueError, match="Set `eval_strategy='steps'` and `eval_steps`"):
            RewardHackingCallback(trainer)

    @pytest.mark.parametrize("change", ["none", "several", "iterable"])
    def test_no_single_dataset(self, world, change):
        trainer = world().trainer
        dataset = trainer.eval_dataset
        trainer.eval_dataset = {"none": None, "several": {"a": dataset}, "iterable": dataset.to_iterable_dataset()}[
            change
        ]
        with pytest.raises(ValueError, match="must be a single `Dataset`"):
            RewardHackingCallback(trainer)

    def test_persistent_workers(self, world):
        trainer = world().trainer
        trainer.args.dataloader_persistent_workers = True
        with pytest.raises(ValueError, match="dataloader_persistent_workers"):
            RewardHackingCallback(trainer)

    def test_no_reward_for_the_answer(self, world):
        trainer = world().trainer
        trainer.reward_funcs, trainer.reward_func_names = trainer.reward_funcs[1:], NAMES[1:]
        with pytest.raises(ValueError, match="such as AccuracyReward, or set `outcome`"):
            RewardHackingCallback(trainer)

    def test_a_process_reward_is_not_compared_with_itself(self, world):
        with pytest.raises(ValueError, match="`outcome` and `process` are both 'step_reward'"):
            RewardHackingCallback(world().trainer, outcome="step_reward")

    def test_no_process_reward(self, world):
        trainer = world().trainer
        trainer.reward_funcs, trainer.reward_func_names = trainer.reward_funcs[:1], NAMES[:1]
        with pytest.raises(ValueError, match="Add a StepReward, or set `process`"):
            RewardHackingCallback(trainer)

    def test_several_rewards(self, world):
        trainer = world().trainer
        trainer.reward_funcs, trainer.reward_func_names = [*trainer.reward_funcs, accuracy], [*NAMES, "format"]
        with pytest.raises(ValueError, match=r"\['accuracy', 'format'\]. Set `outcome`"):
            RewardHackingCallback(trainer)
        assert RewardHackingCallback(trainer, outcome="format").outcome == "format"
        assert RewardHackingCallback(trainer, process="format").outcome == "accuracy"
        assert RewardHackingCallback(trainer, "accuracy", process="format").process == "format"

    @pytest.mark.parametrize("names", [NAMES, [*NAMES, "accuracy"]])
    def test_unknown_and_ambiguous_names(self, world, names):
        trainer = world().trainer
        trainer.reward_funcs, trainer.reward_func_names = (
            [accuracy, trainer.reward_funcs[1], accuracy][: len(names)],
            names,
        )
        name = "acuracy" if len(names) == 2 else "accuracy"
        with pytest.raises(ValueError, match=f"`outcome` is '{name}'. It must be the name of exactly one"):
            RewardHackingCallback(trainer, outcome=name)
        with pytest.raises(ValueError, match="`process` is 'steps'"):
            RewardHackingCallback(trainer, outcome="step_reward", process="steps")

    def test_one_reward_as_both(self, world):
        """Its mean cannot rise and fall."""
        with pytest.raises(ValueError, match="`outcome` and `process` are both 'step_reward'"):
            RewardHackingCallback(world().trainer, outcome="step_reward")
