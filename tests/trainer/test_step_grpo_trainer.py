"""StepGRPOTrainer with planted completions and step scores: advantages of tokens by hand, equality with GRPO, and bad input."""

import json
import math

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward

from trl_hrm import StepGRPOConfig, StepGRPOTrainer, StepReward, StepScorer
from trl_hrm.search.steps import regex_rule
from trl_hrm.step_credit import CREDITS, clip_delta, min_form, progress, step_sum
from trl_hrm.training.checkpoints import RECORD_NAME

from ..helpers import HEADS, tiny_model, tiny_tokenizer, weights_of


# Two problems with three completions each, and the score of each step
SCORES = {
    "add 1": 0.9,
    "so = 3": 0.8,
    "then = 7": 0.1,
    "sub": 0.6,
    "sum x": 0.2,
    "thus y": 0.7,
}
COMPLETIONS = {
    "1+2?": ["add 1\n\nso = 3", "add 1\n\nthen = 7\n\nthus y", "sub\n\nso = 3\n\nthus y\n\nadd 1"],
    "add x y": ["sum x\n\nthus y", "sub\n\nthen = 7", "add 1\n\nso = 3\n\nsum x"],
}
REWARDS = {
    prompt: [[SCORES[step] for step in text.split("\n\n")] for text in texts] for prompt, texts in COMPLETIONS.items()
}
CREDIT_FUNCTIONS = {"step_sum": step_sum, "min_form": min_form, "progress": progress, "clip_delta": clip_delta}

ARGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 6,
    "num_generations": 3,
    "max_completion_length": 32,
    "learning_rate": 0.01,
    "shuffle_dataset": False,
    "max_steps": 2,
}


def planted_reward(scores=SCORES, seed=0, **kwargs) -> StepReward:
    """Return a StepReward whose model gives each step its score in `scores`, in every solution."""
    step_format = HEADS["classification"]
    scorer = StepScorer(tiny_model(step_format, seed=seed), tiny_tokenizer(), step_format)
    scorer.score = lambda problems, solutions, **_: [
        [[scores[step] for step in steps] for steps in tree] for tree in solutions
    ]
    return StepReward(scorer, **({"min_steps": 1} | kwargs))


def planted_rollout(prompts, trainer, completions=COMPLETIONS):
    """Return the planted completions, each followed by EOS, in the order of the generations of a prompt."""
    seen, ids = {}, []
    tokenizer = trainer.processing_class
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        text = completions[prompt][seen[prompt] % len(completions[prompt])]
        ids.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": None,
    }


def length_reward(completions, **_):
    """A reward of whole completions: their length in characters."""
    return [len(completion) / 10 for completion in completions]


def make_trainer(
    folder,
    reward=None,
    funcs=(length_reward,),
    model=None,
    rollout=planted_rollout,
    prompts=COMPLETIONS,
    extra=None,
    **args,
):
    return StepGRPOTrainer(
        tiny_model(HEADS["lm"]) if model is None else model,
        reward_funcs=list(funcs),
        step_reward=planted_reward() if reward is None else reward,
        args=StepGRPOConfig(str(folder), **(ARGS | args)),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
        **(extra or {}),
    )


def generate(trainer, prompts=None):
    """Return one generation batch with its advantages."""
    trainer.model.train()
    prompts = [prompt for prompt in COMPLETIONS for _ in range(3)] if prompts is None else prompts
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


def expected_of_tokens(values, text):
    """
    Repeat the value of each step for its tokens and those of the separator after it. The last value is also that of EOS. The
    tokenizer merges nothing across these separators.
    """
    tokenizer = tiny_tokenizer()
    pieces = text.replace("\n\n", "\n\n|").split("|")
    lengths = [len(tokenizer(piece)["input_ids"]) for piece in pieces]
    assert sum(lengths) == len(tokenizer(text)["input_ids"])
    lengths[-1] += 1
    return [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]


class TestAdvantages:
    @pytest.mark.parametrize("credit", CREDIT_FUNCTIONS)
    def test_tokens_have_the_advantages_of_their_steps(self, credit, tmp_path):
        """Two groups of three completions with two to four steps, next to an outcome reward."""
        output = generate(make_trainer(tmp_path, step_credit=credit, step_reward_weight=0.5))
        advantages, mask = output["advantages"], output["completion_mask"]
        assert advantages.shape == output["completion_ids"].shape == mask.shape
        row = 0
        for prompt, texts in COMPLETIONS.items():
            rewards = torch.tensor(length_reward(texts))
            outcome = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            steps = CREDIT_FUNCTIONS[credit](REWARDS[prompt])
            for i, text in enumerate(texts):
                expected = [outcome[i].item() + 0.5 * value for value in expected_of_tokens(steps[i], text)]
                assert mask[row].sum() == len(expected)
                assert advantages[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
                row += 1

    def test_min_form_by_hand(self, tmp_path):
        """
        The first group, with rewards 2r - 1. With a low temperature, the return of a step is the lowest reward of the completion,
        and 0 after it: [.6, .6], [-.8, -.8, 0], [.2, 0, 0, 0]. The baseline is the mean return of the others at the position.
        """
        trainer = make_trainer(tmp_path, funcs=(), step_credit="min_form", min_form_temperature=1e-4)
        advantages = generate(trainer)["advantages"]
        by_hand = [
            [0.6 - (-0.8 + 0.2) / 2, 0.6 - (-0.8 + 0) / 2],
            [-0.8 - (0.6 + 0.2) / 2, -0.8 - (0.6 + 0) / 2, 0 - (0 + 0) / 2],
            [0.2 - (0.6 - 0.8) / 2, 0 - (0.6 - 0.8) / 2, 0, 0],
        ]
        for row, values, text in zip(advantages[:3], by_hand, COMPLETIONS["1+2?"], strict=True):
            expected = expected_of_tokens(values, text)
            assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-5)

    def test_threshold(self, tmp_path):
        trainer = make_trainer(tmp_path, funcs=(), step_credit="clip_delta", clip_threshold=0.75)
        values, text = clip_delta(REWARDS["1+2?"], 0.75)[1], COMPLETIONS["1+2?"][1]
        expected = expected_of_tokens(values, text)
        assert generate(trainer)["advantages"][1, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert values != pytest.approx(clip_delta(REWARDS["1+2?"])[1], abs=1e-2)

    def test_a_rejected_completion_has_one_reward_for_all_tokens(self, tmp_path):
        """The second completion has one step, which `min_steps=2` rejects. It still counts in the baseline of the others."""
        completions = COMPLETIONS | {"1+2?": ["add 1\n\nso = 3", "add 1", "sub\n\nso = 3"]}
        trainer = make_trainer(
            tmp_path,
            planted_reward(min_steps=2, guard_reward=0.05),
            funcs=(),
            rollout=lambda prompts, trainer: planted_rollout(prompts, trainer, completions),
            step_credit="progress",
        )
        output = generate(trainer)
        expected = progress([[0.9, 0.8], [0.05], [0.6, 0.8]])
        length = int(output["completion_mask"][1].sum())
        assert output["advantages"][1, :length].tolist() == pytest.approx([expected[1][0]] * length)
        assert output["advantages"][0, 0].item() == pytest.approx(expected[0][0])

    def test_a_completion_without_a_problem_is_left_out(self, tmp_path):
        """Its process advantage is 0, and the other two of its group are compared with each other."""
        trainer = make_trainer(tmp_path, planted_reward(problem_column="problem"), funcs=(), step_credit="progress")
        trainer.model.train()
        rows = [{"prompt": "1+2?", "problem": problem} for problem in ("1+2?", None, "1+2?")]
        output = trainer._generate_and_score_completions(rows)
        expected = progress([REWARDS["1+2?"][0], REWARDS["1+2?"][2]])
        assert output["advantages"][1].tolist() == [0.0] * output["advantages"].shape[1]
        assert output["advantages"][0, 0].item() == pytest.approx(expected[0][0])
        assert output["advantages"][2, 0].item() == pytest.approx(expected[1][0])

    def test_a_completion_without_an_outcome_reward_is_not_an_outcome_of_0(self, tmp_path):
        """The same baseline as in GRPO, where a completion whose rewards are all `None` is left out."""

        def some(completions, **_):
            return [None if i % 3 == 1 else float(i % 3) for i in range(len(completions))]

        output = generate(make_trainer(tmp_path, funcs=(some,), step_reward_weight=0.0))
        scale = math.sqrt(2) + 1e-4
        firsts = output["advantages"][:, 0].tolist()
        assert firsts == pytest.approx([-1 / scale, 0.0, 1 / scale] * 2)

    def test_truncated_completions_can_be_masked(self, tmp_path):
        """A completion that ends without EOS, in the middle of a step, is scored as it is. Its tokens are not trained."""

        def rollout(prompts, trainer):
            output = planted_rollout(prompts, trainer)
            output["completion_ids"][0] = output["completion_ids"][0][:-1]
            return output

        output = generate(make_trainer(tmp_path, rollout=rollout, mask_truncated_completions=True, funcs=()))
        assert output["completion_mask"][0].sum() == 0
        plain = generate(make_trainer(tmp_path, funcs=()))
        assert output["advantages"][1:].equal(plain["advantages"][1:])

    def test_evaluation_with_one_completion_per_problem(self, tmp_path):
        """There is nothing to compare a completion with, so all advantages are 0."""
        trainer = make_trainer(
            tmp_path,
            num_generations_eval=1,
            per_device_eval_batch_size=2,
            eval_strategy="steps",
            eval_steps=1,
            extra={"eval_dataset": Dataset.from_list([{"prompt": prompt} for prompt in COMPLETIONS])},
        )
        with pytest.raises(RuntimeError, match=r"Call `evaluate\(\)` first"):
            _ = trainer.eval_rewards
        trainer.evaluate()
        assert trainer.eval_rewards.tolist() == [
            [pytest.approx(1.3), pytest.approx(0.8)],
            [pytest.approx(1.3), pytest.approx(0.2)],
        ]
        trainer.model.eval()
        output = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in COMPLETIONS])
        assert not output["advantages"].any()

    def test_evaluation_without_an_outcome(self, tmp_path):
        """The process rewards are known, although they are hidden from TRL's sum."""
        data = Dataset.from_list([{"prompt": prompt} for prompt in COMPLETIONS])
        trainer = make_trainer(
            tmp_path,
            funcs=(lambda completions, **_: [None] * len(completions),),
            per_device_eval_batch_size=3,
            extra={"eval_dataset": data},
        )
        trainer.evaluate()
        assert sorted(trainer.eval_rewards[:, 1].tolist()) == pytest.approx(
            sorted(min(row) for rows in REWARDS.values() for row in rows)
        )

    def test_one_completion_per_group_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="generation"):
            make_trainer(tmp_path, num_generations=1)


class TestEqualsGRPO:
    """Weights after two steps, compared bit for bit."""

    def grpo(self, folder, funcs, **args):
        trainer = GRPOTrainer(
            tiny_model(HEADS["lm"]),
            reward_funcs=funcs,
            args=GRPOConfig(str(folder), **(ARGS | args)),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in COMPLETIONS]),
            processing_class=tiny_tokenizer(),
            rollout_func=planted_rollout,
        )
        trainer.train()
        return trainer

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_outcome(self, tmp_path, scale_rewards, aggregation):
        """One reward per completion, shared by all of its steps, is GRPO with one more reward function."""
        args = {"scale_rewards": scale_rewards, "multi_objective_aggregation": aggregation}
        trainer = make_trainer(tmp_path, step_credit="outcome", step_reward_weight=0.5, reward_weights=[2.0], **args)
        trainer.train()
        expected = self.grpo(tmp_path, [length_reward, planted_reward()], reward_weights=[2.0, 0.5], **args)
        assert_same_weights(trainer, expected)
        assert (
            weights_of(trainer.model)["lm_head.weight"].ne(weights_of(tiny_model(HEADS["lm"]))["lm_head.weight"]).any()
        )
        for log, other in zip(trainer.state.log_history, expected.state.log_history, strict=True):
            assert all(
                log[key] == other[key]
                for key in other
                if "time" not in key and "runtime" not in key and "per_second" not in key
            )

    @pytest.mark.parametrize(
        "credit, loss_type", list(zip(CREDIT_FUNCTIONS, ["dapo", "grpo", "dr_grpo", "cispo"], strict=True))
    )
    def test_without_weight_only_the_outcome_counts(self, tmp_path, credit, loss_type):
        """The advantages have the shape (B, T), and are the same for all tokens of a completion."""
        trainer = make_trainer(tmp_path, step_credit=credit, step_reward_weight=0.0, loss_type=loss_type)
        trainer.train()
        assert_same_weights(trainer, self.grpo(tmp_path, [length_reward], loss_type=loss_type))

    def test_completions_of_one_step(self, tmp_path):
        """Step sums of one step are GRPO with the reward of the step, up to rounding in float32."""
        completions = {"1+2?": ["add 1", "so = 3", "then = 7"], "add x y": ["sub", "sum x", "thus y"]}
        rollout = lambda prompts, trainer: planted_rollout(prompts, trainer, completions)  # noqa: E731
        output = generate(make_trainer(tmp_path, funcs=(), step_credit="step_sum", rollout=rollout))
        outcome = generate(make_trainer(tmp_path, funcs=(), step_credit="outcome", rollout=rollout))
        assert outcome["advantages"].shape == (6,)
        found = output["advantages"][output["completion_mask"].bool()]
        expected = outcome["advantages"].unsqueeze(1).expand_as(output["advantages"])
        torch.testing.assert_close(found, expected[output["completion_mask"].bool()], atol=1e-6, rtol=1e-6)


def assert_same_weights(trainer, expected):
    found, expected = weights_of(trainer.model), weights_of(expected.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestGradient:
    @pytest.mark.parametrize("credit", CREDITS)
    def test_against_a_plain_loop_in_float64(self, tmp_path, credit):
        """
        The policy gradient, token by token: the mean over completions of the mean over tokens of -A_t * log p(token). The policy
        has not changed since it sampled, so all importance ratios are 1.
        """
        model = tiny_model(HEADS["lm"]).double()
        trainer = make_trainer(tmp_path, model=model, step_credit=credit, loss_type="grpo", beta=0.0)
        output = generate(trainer)
        output["advantages"] = output["advantages"].double()
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(model, output).backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters()}

        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        advantages = output["advantages"] if credit != "outcome" else output["advantages"][:, None].expand(6, 32)
        for i in range(6):
            prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
            completion = output["completion_ids"][i][output["completion_mask"][i].bool()]
            logits = model(torch.cat([prompt, completion])[None]).logits[0] / trainer.temperature
            for t, token in enumerate(completion.tolist()):
                logp = torch.log_softmax(logits[len(prompt) + t - 1], dim=-1)[token]
                loss = loss - advantages[i, t] * logp / len(completion) / 6
        loss.backward()
        assert max(grad.abs().max() for grad in found.values()) > 1e-3
        for name, weight in model.named_parameters():
            torch.testing.assert_close(
                found[name], weight.grad, atol=3e-7, rtol=1e-5
            )  # float32 kernels differ between processors


class TestLogs:
    def test_scores_and_advantages_by_position(self, tmp_path):
        trainer = make_trainer(tmp_path, step_credit="progress", max_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        rows = [row for rewards in REWARDS.values() for row in rewards]
        values = [[abs(value) for value in row] for rewards in REWARDS.values() for row in progress(rewards)]
        for j in range(4):
            for kind, found in (("score", rows), ("advantage_size", values)):
                here = [row[j] for row in found if len(row) > j]
                assert log[f"step_reward/{kind}/step_{j + 1}"] == pytest.approx(sum(here) / len(here), abs=1e-6)
        assert "step_reward/score/step_5" not in log
        assert log["step_reward/num_steps"] == pytest.approx(sum(map(len, rows)) / 6)
        assert log["rewards/step_reward/mean"] == pytest.approx(sum(map(min, rows)) / 6)

    def test_process_rewards_of_completions_without_an_outcome(self, tmp_path):
        """They train the policy, so they are part of the mean and of the table. TRL alone would leave them out."""

        def some(completions, **_):
            return [1.0 if i % 3 == 0 else None for i in range(len(completions))]

        trainer = make_trainer(tmp_path, funcs=(some,), max_steps=1)
        trainer.train()
        rewards = torch.tensor([min(row) for rows in REWARDS.values() for row in rows])
        log = trainer.state.log_history[0]
        assert log["rewards/step_reward/mean"] == pytest.approx(rewards.mean().item())
        assert log["rewards/step_reward/std"] == pytest.approx(rewards.std().item())
        assert list(trainer._logs["rewards"]["step_reward"]) == pytest.approx(rewards.tolist())
        assert trainer._logs["rewards"]["some"].count(1.0) == 2

    def test_the_table_has_the_steps(self, tmp_path):
        trainer = make_trainer(tmp_path, log_completions=True, max_steps=1)
        trainer.train()
        import pandas as pd

        [file] = sorted((tmp_path / "completions").glob("*.parquet"))
        table = pd.read_parquet(file)
        assert len(table) == 6
        for completion, steps in zip(table["completion"], table["step_reward/steps"], strict=True):
            assert all(step in steps for step in completion.split("\n\n"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    make_trainer(folder, save_strategy="steps", save_steps=1, max_steps=1).train()
    return folder


def train_and_watch(folder, max_steps, resume=None, **args):
    """Train on shuffled prompts, and return the trainer, and the step and the prompt of each generation batch."""
    prompts = ["1+2?", "add x y", "sub?", "so?"]
    completions = {prompt: texts for prompt in prompts for texts in COMPLETIONS.values()}
    seen = []

    def rollout(prompts, trainer):
        seen.append((trainer.state.global_step, prompts[0]))
        return planted_rollout(prompts, trainer, completions)

    trainer = make_trainer(
        folder,
        rollout=rollout,
        prompts=prompts,
        shuffle_dataset=True,
        per_device_train_batch_size=3,
        lr_scheduler_type="constant",
        save_strategy="steps",
        max_steps=max_steps,
        **args,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def test_the_model_card_has_the_rewards_of_the_evaluation(tmp_path):
    """And not the 60 other metrics of GRPO."""
    trainer = make_trainer(
        tmp_path,
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        extra={"eval_dataset": Dataset.from_list([{"prompt": prompt} for prompt in COMPLETIONS])},
    )
    trainer.evaluate()
    trainer.create_model_card()
    [result] = ModelCard.load(tmp_path / "README.md").data.to_dict()["model-index"][0]["results"]
    assert {metric["type"] for metric in result["metrics"]} == {
        *(f"rewards/{name}/{kind}" for name in ("length_reward", "step_reward") for kind in ("mean", "std")),
        "completions/mean_length",
        "completions/clipped_ratio",
    }


def test_resuming_in_a_later_epoch(tmp_path):
    """The order of the problems is that of the unbroken training, and so are the weights."""
    unbroken, seen = train_and_watch(tmp_path / "unbroken", 12, save_steps=12)
    order = [prompt for _, prompt in seen]
    assert len({tuple(order[start : start + 4]) for start in (0, 4, 8)}) > 1
    assert all(len(set(order[start : start + 4])) == 4 for start in (0, 4, 8))
    for step in (6, 9):  # in the second and third epoch
        folder = tmp_path / f"resumed-{step}"
        _, before = train_and_watch(folder, step, save_steps=step)
        resumed, after = train_and_watch(folder, 12, True, save_steps=12)
        assert before + after == seen
        assert_same_weights(resumed, unbroken)


def test_resuming_within_a_generation_batch(tmp_path, caplog):
    """Each batch is trained on twice. The interrupted batch is sampled again, and the next ones at their own steps."""
    unbroken, seen = train_and_watch(tmp_path / "unbroken", 8, num_iterations=2, save_steps=8)
    assert [step for step, _ in seen] == [0, 2, 4, 6]
    for step in (3, 4):
        folder = tmp_path / f"resumed-{step}"
        _, before = train_and_watch(folder, step, num_iterations=2, save_steps=step)
        resumed, after = train_and_watch(folder, 8, True, num_iterations=2, save_steps=8)
        again = [(3, seen[1][1])] if step == 3 else []
        assert before == seen[:2] and after == again + seen[2:]
        assert ("Step 3 is within a generation batch" in caplog.text) == bool(again)
        caplog.clear()
    assert_same_weights(resumed, unbroken)


class TestBadInput:
    def test_types(self, tmp_path):
        with pytest.raises(TypeError, match="`step_reward` is a `NoneType`"):
            StepGRPOTrainer(tiny_model(HEADS["lm"]), [length_reward], args=StepGRPOConfig(str(tmp_path), **ARGS))
        with pytest.raises(TypeError, match="`args` is a `GRPOConfig`"):
            StepGRPOTrainer(
                tiny_model(HEADS["lm"]), step_reward=planted_reward(), args=GRPOConfig(str(tmp_path), **ARGS)
            )

    def test_weights(self, tmp_path):
        with pytest.raises(ValueError, match="2 weights for 1 `reward_funcs`.*`step_reward_weight`"):
            make_trainer(tmp_path, reward_weights=[1.0, 0.5])
        args = StepGRPOConfig(str(tmp_path), **ARGS)
        for _ in range(2):  # the trainer does not change the user's `args`
            data = Dataset.from_list([{"prompt": "1+2?"}] * 2)
            model = tiny_model(HEADS["lm"])
            StepGRPOTrainer(
                model, length_reward, planted_reward(), args, train_dataset=data, processing_class=tiny_tokenizer()
            )
        reward = planted_reward()
        with pytest.raises(ValueError, match="also one of the `reward_funcs`"):
            make_trainer(tmp_path, reward, funcs=(reward,))

    def test_a_monitor_without_an_outcome(self, tmp_path):
        """It would compare the process reward with itself, and never stop."""
        args = {"stop_on_reward_hacking": True, "eval_strategy": "steps", "per_device_eval_batch_size": 3}
        extra = {"eval_dataset": Dataset.from_list([{"prompt": prompt} for prompt in COMPLETIONS])}
        with pytest.raises(ValueError, match="`outcome` is not set.*such as AccuracyReward"):
            make_trainer(tmp_path, funcs=(), extra=extra, **args)

    def test_a_tokenizer_of_the_only_reward_model(self, tmp_path):
        """Not in a list, as in TRL."""
        tokenizer = tiny_tokenizer()
        trainer = make_trainer(tmp_path, extra={"reward_processing_classes": tokenizer})
        assert trainer.reward_processing_classes == [tokenizer, None]

    @pytest.mark.parametrize(
        "args, message",
        [
            (
                {"step_credit": "sum"},
                "`step_credit` is 'sum'. It must be one of outcome, step_sum, min_form, progress",
            ),
            ({"step_reward_weight": -1.0}, "`step_reward_weight` is -1.0"),
            ({"step_reward_weight": math.nan}, "`step_reward_weight` is nan"),
            ({"min_form_temperature": 0.0}, "`min_form_temperature` is 0.0"),
            ({"clip_threshold": 0.5}, "`step_credit` is 'min_form', which does not use it"),
            ({"step_credit": "progress", "min_form_temperature": 0.1}, "which does not use it"),
            ({"step_credit": "clip_delta", "clip_threshold": math.inf}, "`clip_threshold` is inf"),
            ({"stop_on_reward_hacking": True}, "`eval_strategy` is `no`"),
        ],
    )
    def test_settings(self, tmp_path, args, message):
        with pytest.raises(ValueError, match=message):
            StepGRPOConfig(str(tmp_path), **(ARGS | args))

    def test_nan_scores(self, tmp_path):
        trainer = make_trainer(tmp_path, planted_reward(SCORES | {"so = 3": math.nan}, aggregate="last"))
        with pytest.raises(ValueError, match="nan"):
            generate(trainer)

    @pytest.mark.parametrize(
        "change, name",
        [
            ({"step_credit": "progress"}, "step_credit was"),
            ({"step_reward_weight": 2.0}, "step_reward_weight was"),
            ({"min_form_temperature": 0.1}, "min_form_temperature was"),
            ({"funcs": (think_format_reward,)}, r"reward_funcs was .*length_reward.* and is .*think_format_reward"),
            ({"reward": lambda: planted_reward(aggregate="mean")}, "step_reward.aggregate was"),
            ({"reward": lambda: planted_reward(max_steps=8)}, "step_reward.max_steps was"),
            ({"reward": lambda: planted_reward(segmentation="sentence")}, r"step_reward.segmentation.name was"),
            (
                {"reward": lambda: planted_reward(segmentation=regex_rule("\n"))},
                r"step_reward.segmentation.pattern was",
            ),
            ({"reward": lambda: planted_reward(seed=1)}, "reward_model.weights was"),
            ({"log_completions": True, "num_generations_eval": 1}, None),
        ],
    )
    def test_resuming_another_training_is_refused(self, begun, change, name):
        change = {key: value() if callable(value) else value for key, value in change.items()}
        trainer = make_trainer(begun, save_strategy="steps", save_steps=1, **change)
        if name is None:
            assert trainer._resolve(True)[0] is not None
        else:
            with pytest.raises(ValueError, match=name):
                trainer.train(resume_from_checkpoint=True)

    def test_resuming_with_a_rule_of_the_same_name(self, tmp_path):
        """Every regular expression has the rule name "regex". Earlier versions recorded only this name."""

        def make(pattern, **args):
            reward = planted_reward(segmentation=regex_rule(pattern))
            return make_trainer(tmp_path, reward, save_strategy="steps", save_steps=1, max_steps=1, **args)

        make("\n\n").train()
        make("\n\n")._resolve(True)
        with pytest.raises(ValueError, match=r"segmentation.pattern was .* and is "):
            make("\n")._resolve(True)
        file = tmp_path / "checkpoint-1" / RECORD_NAME
        record = json.loads(file.read_text())
        record["settings"]["step_reward"]["segmentation"] = "regex"
        file.write_text(json.dumps(record))
        make("\n")._resolve(True)
        with pytest.raises(ValueError, match='segmentation was "regex" and is "sentence"'):
            make_trainer(tmp_path, planted_reward(segmentation="sentence"), max_steps=1)._resolve(True)

    def test_another_adapter_of_the_reward_model(self, tmp_path):
        """The weights of the base model are the same."""

        def adapted(seed):
            reward = planted_reward()
            torch.manual_seed(seed)
            config = LoraConfig(target_modules="all-linear", inference_mode=True)
            reward.scorer.model = get_peft_model(reward.scorer.model, config)
            return make_trainer(tmp_path, reward, save_strategy="steps", save_steps=1, max_steps=1)

        adapted(0).train()
        assert adapted(0)._resolve(True)[0] is not None
        with pytest.raises(ValueError, match="reward_model.weights was"):
            adapted(1).train(resume_from_checkpoint=True)


def test_the_name_of_an_adapter(tmp_path):
    """transformers would load it with all weights frozen, and the training would change nothing."""
    get_peft_model(tiny_model(HEADS["lm"]), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="lora is an adapter.*is_trainable=True"):
        make_trainer(tmp_path / "out", model=str(tmp_path / "lora"))
