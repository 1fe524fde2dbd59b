"""`trl-hrm grpo`: problems and datasets, the rewards and their options, a served reward model, plan, launch and resuming."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import transformers.integrations.deepspeed as transformers_deepspeed
import yaml
from accelerate.commands import launch as accelerate_launch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled, set_hf_deepspeed_config
from trl.rewards import think_format_reward

from trl_hrm import StepFormat, StepScorer
from trl_hrm.accuracy_reward import AccuracyReward
from trl_hrm.scripts import grpo
from trl_hrm.scripts.training import launch, run_script

from ..distributed.launching import needs_deepspeed
from ..fakes import write_rows
from ..helpers import ROOT, save_checkpoint, tiny_model, tiny_tokenizer
from ..scoring.pooling_server import PoolingServer
from ..search.policies import KNOWN


TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
SETTINGS = {
    "reward_model": "model",
    "reward_model_max_length": 512,
    "model_name_or_path": "policy",
    "problems": "problems.jsonl",
    "prompt": "question",
    "prompt_style": "plain",
    "output_dir": "out",
    "guard_min_steps": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "max_completion_length": 30,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture
def folder(tmp_path, policy, monkeypatch) -> Path:
    """Folder with a policy, a reward model, problems and held-out problems. One problem is in both files."""
    (tmp_path / "policy").symlink_to(policy)
    (tmp_path / "model").mkdir()
    save_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "problems.jsonl", KNOWN)
    write_rows(tmp_path / "test.jsonl", [{"problem": "2 + 2?", "answer": "4"}, *KNOWN[:1]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(**settings):
    return grpo.make_parser().parse_dict(
        {name: value for name, value in (SETTINGS | settings).items() if value is not None}
    )


def run(**settings) -> list[dict]:
    """Train, and return the logs."""
    grpo.main(*parsed(**settings))
    return json.loads(Path("out/trainer_state.json").read_text())["log_history"]


class TestOptions:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"problems": None}, "Set `problems`.* or `dataset_name`.*: neither is set"),
            ({"dataset_name": "data"}, "both are set"),
            ({"dataset_train_split": "other"}, "`dataset_train_split` only applies to `dataset_name`, but `problems` is set"),
            ({"problem_column": "question"}, "`problem_column` only applies to `dataset_name`"),
            ({"problems": None, "dataset_name": "data"}, "`prompt` only applies to `problems`, but `dataset_name` is set"),
            ({"problems": None, "dataset_name": "data", "prompt": "boxed", "prompt_style": "chat", "limit": 2}, "`limit` only"),
            ({"reward_model_engine": "vllm", "reward_model_max_length": None}, "vllm, which cannot run in a training process. Run `vllm serve`"),
            ({"reward_model": "GenPRM/GenPRM-1.5B", "reward_model_max_length": None}, "a judge, which is too slow"),
            ({"served_model_name": "prm"}, "`served_model_name` only applies to engine URL"),
            ({"reward_model_engine": "http://a"}, "`reward_model_max_length` only applies to engine transformers"),
            ({"combine": "mean"}, "`combine` is mean, but `spans` is 1"),
            ({"reward_funcs": ["acuracy"]}, "'acuracy'. It must be accuracy, or the name of a function"),
            ({"reward_funcs": ["a.b"], "extractors": ["boxed"]}, "`extractors` only applies to the reward accuracy"),
            ({"guard_max_repeated": 2.0}, "`guard_max_repeated` is 2.0. It must be at least 0 and at most 1"),
            ({"guard_min_steps": 0}, "`guard_min_steps` is 0"),
            ({"guard_min_steps": 5, "guard_max_steps": 3}, "`guard_min_steps` is 5 and `guard_max_steps` is 3"),
        ],
    )  # fmt: skip
    def test_options_without_effect_are_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            parsed(**settings)

    def test_options_that_do_not_apply_are_unknown(self):
        known = {action.dest for action in grpo.make_parser()._actions}
        assert {
            "judge_samples",
            "final_stops",
            "step_pattern",
            "reward_model_args",
            "chat_template_date",
        } & known == set()
        assert {"reward_model", "problems", "prompt", "chat_template_kwargs", "step_credit", "lora_r"} <= known

    def test_every_option_is_explained_once(self):
        """In the help of the field, and in the docstring of the class that declares it."""
        for field in fields(grpo.ScriptArguments):
            if field.init:
                owner = next(
                    kind
                    for kind in grpo.ScriptArguments.__mro__
                    if field.name in vars(kind).get("__annotations__", {})
                )
                assert field.metadata["help"].rstrip().endswith("."), field.name
                assert field.name in owner.__doc__, (owner, field.name)

    def test_lists_and_null_in_a_file(self, tmp_path):
        file = tmp_path / "grpo.yaml"
        values = SETTINGS | {
            "spans": [1, 2],
            "guard_max_steps": None,
            "reward_weights": [0.5],
            "columns": {"problem": "Q"},
        }
        file.write_text(yaml.safe_dump(values))
        found = []
        run_script(lambda *args: found.extend(args), grpo.make_parser(), ["--config", str(file)])
        assert (found[0].spans, found[0].guard_max_steps, found[0].columns) == ([1, 2], None, {"problem": "Q"})
        assert found[1].reward_weights == [0.5]

    def test_a_number_of_a_list_is_checked(self, tmp_path, capsys):
        """argparse checks only strings, so a `true` would be a weight of 1."""
        file = tmp_path / "grpo.yaml"
        file.write_text(yaml.safe_dump(SETTINGS | {"reward_weights": [0.5, [1]]}))
        with pytest.raises(SystemExit):
            run_script(lambda *args: None, grpo.make_parser(), ["--config", str(file)])
        assert (
            "`reward_weights` is [0.5, [1]]. It must be a list in which each value is a number."
            in capsys.readouterr().err
        )


class TestPrompts:
    def load(self, tokenizer=None, **settings):
        script_args, training_args, _ = parsed(**settings)
        return script_args.load_prompts(training_args, tokenizer or tiny_tokenizer())

    def test_problems_as_text_and_as_messages(self, folder):
        rows, held_out = self.load()
        assert held_out is None
        assert rows.to_list() == [
            {"prompt": row["problem"].strip(), "problem": row["problem"].strip(), "answer": row["answer"]}
            for row in KNOWN
        ]
        (folder / "prompt.txt").write_text("Solve: {question}")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        rows, _ = self.load(tokenizer, prompt="prompt.txt", prompt_style="chat", system_prompt="Be brief.")
        system = {"role": "system", "content": "Be brief."}
        asked = {"role": "user", "content": f"Solve: {KNOWN[0]['problem'].strip()}"}
        assert rows[0] == {
            "prompt": [system, asked],
            "problem": KNOWN[0]["problem"].strip(),
            "answer": KNOWN[0]["answer"],
        }

    def test_a_policy_without_a_chat_template(self, folder):
        with pytest.raises(ValueError, match="no chat template.* --prompt_style plain"):
            self.load(prompt_style="chat")

    def test_a_chat_template_without_system_messages(self, folder, capsys):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE.replace(
            "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('x') }}{% endif %}{% for"
        )
        rows, _ = self.load(tokenizer, prompt_style="chat", system_prompt="Be brief.")
        assert rows[0]["prompt"][0]["content"] == f"Be brief.\n\n{KNOWN[0]['problem'].strip()}"
        assert "has no system messages" in capsys.readouterr().out

    def test_no_training_on_a_test_split(self, folder, monkeypatch):
        """For other commands, `gsm8k` is the test split."""
        read = []

        def loaded_dataset(name, split, config):
            read.append((name, split, config))
            rows = {
                "train": [{"question": "1 + 1?", "answer": "#### 2"}],
                "test": [{"question": "2 + 2?", "answer": "#### 4"}],
            }
            return nullcontext(Dataset.from_list(rows[split]))

        monkeypatch.setattr("trl_hrm.data.problem_sets.loaded_dataset", loaded_dataset)
        rows, held_out = self.load(problems="gsm8k", test_problems="gsm8k", eval_strategy="steps")
        assert (rows["problem"], held_out["problem"]) == (["1 + 1?"], ["2 + 2?"])
        assert read == [("openai/gsm8k", "test", "main"), ("openai/gsm8k", "train", "main")]

    def test_held_out_problems(self, folder, capsys):
        """They are read like the problems, and the problem that is in both files is not trained on."""
        settings = {"test_problems": "test.jsonl", "eval_strategy": "steps"}
        rows, held_out = self.load(**settings)
        assert held_out["problem"] == ["2 + 2?", KNOWN[0]["problem"].strip()]
        assert rows["problem"] == [row["problem"].strip() for row in KNOWN[1:]]
        shown = capsys.readouterr().out
        assert (
            "problems: 4 records: 3 problems, 0 repeated, 1 excluded" in shown
            and "no record was excluded" not in shown
        )
        write_rows(folder / "other.jsonl", [{"problem": "none"}])
        write_rows(folder / "test.jsonl", [{"question": "2 + 2?", "level": 1, "answer": "4"}])
        write_rows(
            folder / "problems.jsonl",
            [{"question": f"{i} + {i}?", "level": i, "answer": str(2 * i)} for i in range(5)],
        )
        rows, held_out = self.load(
            **settings, exclude=["other.jsonl"], where={"level": "1"}, columns={"problem": "question"}
        )
        assert (rows["answer"], held_out["answer"]) == (["2"], ["4"])
        assert "no record was excluded" in capsys.readouterr().out

    def test_evaluation_needs_problems(self, folder):
        with pytest.raises(ValueError, match="`eval_strategy` is set, but `test_problems` is missing"):
            self.load(eval_strategy="steps")
        with pytest.raises(ValueError, match="`test_problems` has no effect without an `eval_strategy`"):
            self.load(test_problems="test.jsonl")

    def test_a_dataset(self, folder):
        settings = {"problems": None, "dataset_name": "data", "prompt": None, "prompt_style": None}
        (folder / "data").mkdir()
        rows = [{"prompt": "1 + 2?", "answer": "3", "level": 1}]
        Dataset.from_list(rows).to_parquet("data/train.parquet")
        assert self.load(**settings)[0].to_list() == rows
        Dataset.from_list([{"question": "1 + 2?"}]).to_parquet("data/train.parquet")
        with pytest.raises(ValueError, match=r"the columns \['question'\], but `prompt` is needed"):
            self.load(**settings)
        Dataset.from_list([{"prompt": "1 + 2?", "completions": ["3"]}]).to_parquet("data/train.parquet")
        with pytest.raises(ValueError, match=r"names \['completions'\] itself. Is it a dataset for a reward model"):
            self.load(**settings)


class TestRewards:
    def funcs(self, rows=None, **settings) -> list:
        with ExitStack() as stack:
            rows = rows or Dataset.from_list([{"prompt": "a", "answer": "3"}])
            return parsed(**settings)[0].make_reward_funcs(rows, stack)

    def test_names(self, folder, monkeypatch):
        [accuracy] = self.funcs(extractors=["boxed"])
        assert isinstance(accuracy, AccuracyReward)
        assert (accuracy.answer_column, accuracy.extractors) == ("answer", ("boxed",))
        (folder / "mine.py").write_text("def reward(completions, **columns): return [1.0] * len(completions)")
        monkeypatch.syspath_prepend(folder)
        own, format, accuracy = self.funcs(reward_funcs=["mine.reward", "trl.rewards.think_format_reward", "accuracy"])
        assert own(["a"]) == [1.0] and format is think_format_reward and accuracy.__name__ == "accuracy"
        for name in ("mine.other", "no_such_module.reward"):
            with pytest.raises(ValueError, match=f"'{name}', which cannot be imported"):
                self.funcs(reward_funcs=[name])

    def test_answers_of_a_dataset(self):
        settings = {"problems": None, "dataset_name": "data", "prompt": None, "prompt_style": None}
        rows = Dataset.from_list([{"prompt": "a", "solution": "3"}])
        assert self.funcs(rows, **settings) == []
        assert self.funcs(rows, **settings, answer_column="solution")[0].answer_column == "solution"
        for given in ({"answer_column": "answr"}, {"reward_funcs": ["accuracy"]}):
            with pytest.raises(
                ValueError, match=r"the columns \['prompt', 'solution'\], but the reward accuracy needs"
            ):
                self.funcs(rows, **settings, **given)

    def test_options_of_the_step_reward(self, folder):
        """Each of them reaches the StepReward."""
        script_args, training_args, _ = parsed(
            spans=[1, 2],
            combine="mean",
            aggregate="prod",
            segmentation="sentence",
            keep_thinking=True,
            guard_reward=-1.0,
            guard_min_steps=3,
            guard_max_steps=9,
            guard_max_repeated=0.5,
            guard_max_blank=7,
            guard_max_tokens=99,
            reward_model_batch_size=3,
            reward_model_dtype="bfloat16",
        )
        reward = script_args.make_step_reward()
        assert (reward.scoring.spans, reward.scoring.combine, reward.aggregate) == ([1, 2], "mean", "prod")
        assert (reward.rule.name, reward.keep_thinking, reward.problem_column) == ("sentence", True, "problem")
        limits = (
            reward.guard_reward,
            reward.min_steps,
            reward.max_steps,
            reward.max_repeated,
            reward.max_blank,
            reward.max_tokens,
        )
        assert limits == (-1.0, 3, 9, 0.5, 7, 99)
        assert (reward.scorer.batch_size, reward.scorer.max_length) == (3, 512)
        assert str(reward.scorer.model.dtype) == "torch.bfloat16"

    def test_segmentation_and_problem_by_default(self, folder):
        """The rule of the prompt, as in the other commands. For a dataset, the separator of the reward model and the prompt."""
        script_args, training_args, _ = parsed(prompt="boxed")
        assert script_args.make_step_reward().rule.name == "step_header"
        script_args, training_args, _ = parsed(problems=None, dataset_name="data", prompt=None, prompt_style=None)
        reward = script_args.make_step_reward()
        assert (reward.rule.name, reward.problem_column) == ("blank_line", None)

    def test_a_step_format_for_a_model_without_one(self, folder):
        (folder / "model" / "step_format.json").rename(folder / "other.json")
        step_format = StepFormat(step_separator=" ### ")
        step_format.save(folder)
        script_args, training_args, _ = parsed(
            step_format="step_format.json", problems=None, dataset_name="d", prompt=None, prompt_style=None
        )
        assert script_args.make_step_reward().separator == " ### "

    def test_the_reward_model_is_whole_under_zero_3(self, folder, monkeypatch):
        """The training arguments exist before it, and have enabled ZeRO-3."""
        monkeypatch.setattr(transformers_deepspeed, "_hf_deepspeed_config_weak_ref", None)
        script_args, _, _ = parsed()
        config = type("Config", (), {"is_zero3": lambda self: True, "config": {}})()
        set_hf_deepspeed_config(config)
        seen = []
        load = StepScorer.from_pretrained
        monkeypatch.setattr(
            StepScorer,
            "from_pretrained",
            lambda *args, **kwargs: seen.append(is_deepspeed_zero3_enabled()) or load(*args, **kwargs),
        )
        script_args.make_step_reward()
        assert seen == [False] and is_deepspeed_zero3_enabled()
        script_args.reward_model = "no such model"
        with pytest.raises(OSError):
            script_args.make_step_reward()
        assert is_deepspeed_zero3_enabled()  # otherwise the policy would not be sharded


class TestTraining:
    def test_trains_and_evaluates(self, folder, capsys):
        before = load_file("policy/model.safetensors")
        logs = run(test_problems="test.jsonl", eval_strategy="epoch", step_credit="progress")
        steps = [log for log in logs if "loss" in log]
        assert len(steps) == 2 and all(
            "rewards/accuracy/mean" in log and "step_reward/score/step_1" in log for log in steps
        )
        evaluation, *more = [log for log in logs if "eval_loss" in log]
        assert [log["step"] for log in more] == [2, 2]  # after each epoch of one step, and at the end
        assert "eval_rewards/accuracy/mean" in evaluation and "eval_rewards/step_reward/mean" in evaluation
        history = json.loads(Path("out/reward_hacking.json").read_text())
        assert history["outcome"] == "accuracy" and [one["step"] for one in history["evaluations"]] == [1, 2]
        assert any((before[name] != tensor).any() for name, tensor in load_file("out/model.safetensors").items())
        card = Path("out/README.md").read_text()
        assert "on held-out rows of test.jsonl" in card and "problems.jsonl" not in card
        shown = capsys.readouterr().out
        assert "  generation batch               4 completions (2 prompts x 2 generations)" in shown

    def test_plan_without_weights(self, folder, capsys):
        shown = []
        for plan in (False, True):
            grpo.main(*parsed(plan=plan, output_dir=f"out-{plan}"))
            lines = capsys.readouterr().out.splitlines()
            start = lines.index("training plan")
            shown.append([line for line in lines[start:] if line.startswith(("training plan", "  ", "warning:"))])
            if not plan:  # only the tokenizer is left
                (folder / "policy").unlink()
                AutoTokenizer.from_pretrained("out-False").save_pretrained("policy")
        assert shown[0] == shown[1] and "  optimizer steps                2 (1 epoch)" in shown[1]
        assert not Path("out-True").exists()

    def test_a_served_reward_model(self, folder):
        """The server gives the scores of the reward model in this process, so the training is the same."""
        expected = [log["rewards/step_reward/mean"] for log in run() if "loss" in log]
        with PoolingServer(tiny_model(), tiny_tokenizer()) as server:
            settings = {"reward_model_engine": server.url, "reward_model_max_length": None, "served_model_name": "prm"}
            logs = run(**settings, output_dir="out")
            assert len(server.sequences) > 4
        assert [log["rewards/step_reward/mean"] for log in logs if "loss" in log] == pytest.approx(expected, abs=1e-4)

    def test_an_adapter(self, folder):
        run(use_peft=True, lora_target_modules=["all-linear"], lora_r=2)
        assert not Path("out/model.safetensors").exists()
        adapter = load_file("out/adapter_model.safetensors")
        assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)

    def test_a_dataset_with_the_process_reward_only(self, folder, capsys):
        (folder / "data").mkdir()
        Dataset.from_list([{"prompt": row["problem"]} for row in KNOWN]).to_parquet("data/train.parquet")
        logs = run(problems=None, prompt=None, prompt_style=None, dataset_name="data")
        assert "Only the process reward trains the policy" in capsys.readouterr().out
        assert not any("rewards/accuracy/mean" in log for log in logs) and "rewards/step_reward/mean" in logs[0]

    def test_the_monitor_needs_the_accuracy_first(self, folder):
        with pytest.raises(ValueError, match="which is trl.rewards.think_format_reward. Put accuracy first"):
            run(
                test_problems="test.jsonl",
                eval_strategy="epoch",
                stop_on_reward_hacking=True,
                reward_funcs=["trl.rewards.think_format_reward", "accuracy"],
            )

    @pytest.mark.parametrize("is_async", [False, True])
    def test_an_error_in_a_reward_is_not_a_bug_of_the_package(self, folder, monkeypatch, is_async):
        name = f"broken_{is_async}"
        start = "async def" if is_async else "def"
        (folder / f"{name}.py").write_text(f"{start} reward(completions, **columns): return completions.rewards")
        monkeypatch.syspath_prepend(folder)
        with pytest.raises(ValueError, match="The reward reward failed with AttributeError: 'list' object has no"):
            run(reward_funcs=[f"{name}.reward", "accuracy"])

    def test_the_output_is_no_input(self, folder):
        for name in ("model", "policy"):
            with pytest.raises(FileExistsError, match="would be replaced"):
                grpo.main(*parsed(output_dir=name))


class TestLaunch:
    def test_batches_of_several_processes(self, folder, monkeypatch):
        """With 2 processes, a batch of 2 x 2 completions has a prompt with 4. In the launcher there is one process."""
        calls = []
        monkeypatch.setattr(accelerate_launch, "launch_command", calls.append)
        values = SETTINGS | {"per_device_train_batch_size": 2, "num_generations": 4, "num_processes": 2}
        Path("grpo.yaml").write_text(yaml.safe_dump(values))
        launch("grpo", ["--config", "grpo.yaml", "--beta", "0.1"])
        [args] = calls
        assert (args.num_processes, args.training_script) == (2, "trl_hrm.scripts.grpo")
        assert args.training_script_args == ["--config", "grpo.yaml", "--beta", "0.1"]
        with pytest.raises(ValueError, match="--no_such_option"):
            launch("grpo", ["--config", "grpo.yaml", "--no_such_option", "1"])
        with pytest.raises(ValueError, match="`spans` is"):
            launch("grpo", ["--config", "grpo.yaml", "--spans", "2"])
        assert len(calls) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_one_error_and_no_traceback(self, folder, num_processes):
        values = SETTINGS | {"per_device_train_batch_size": 1, "num_generations": 4, "num_processes": num_processes}
        Path("grpo.yaml").write_text(yaml.safe_dump(values))
        done = command("--config", "grpo.yaml", "--cpu")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "must be divisible by num_generations" in lines[0]

    @pytest.mark.slow
    def test_killed_and_resumed(self, folder):
        """Resuming gives the same weights as an uninterrupted training. Another reward model is refused."""
        code = """
            import os, signal
            calls = []
            def reward(completions, trainer_state, **columns):
                if trainer_state.global_step == int(os.environ.get("KILL_AT", -1)):
                    os.kill(os.getpid(), signal.SIGKILL)
                return [float(len(text)) for text in completions]
        """
        lines = [line.removeprefix(" " * 12) for line in code.splitlines()]
        (folder / "mine.py").write_text("\n".join(lines))
        values = SETTINGS | {
            "save_strategy": "steps",
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "reward_funcs": ["mine.reward", "accuracy"],
        }
        Path("grpo.yaml").write_text(yaml.safe_dump(values))
        done = command("--config", "grpo.yaml", KILL_AT="2")
        assert done.returncode == 1 and "SIGKILL" in done.stderr and not Path("out/model.safetensors").exists()
        assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
        save_checkpoint(folder / "model", seed=1)
        done = command("--config", "grpo.yaml", "--resume_from_checkpoint", "true")
        assert done.returncode == 1 and "reward_model" in done.stderr
        save_checkpoint(folder / "model")
        done = command("--config", "grpo.yaml", "--resume_from_checkpoint", "true")
        assert done.returncode == 0, done.stderr[-3000:]
        assert command("--config", "grpo.yaml", "--output_dir", "unbroken").returncode == 0
        resumed, unbroken = load_file("out/model.safetensors"), load_file("unbroken/model.safetensors")
        assert all((resumed[name] == unbroken[name]).all() for name in unbroken)
        first = load_file("out/checkpoint-1/model.safetensors")
        assert any((first[name] != resumed[name]).any() for name in resumed)

    @pytest.mark.slow
    @needs_deepspeed
    def test_zero3(self, folder):
        """The policy is sharded, and the reward model is whole on both processes."""
        code = """
            import gc, json, os
            from transformers import PreTrainedModel
            from transformers.integrations import is_deepspeed_zero3_enabled

            def reward(completions, **columns):
                models = [one for one in gc.get_objects() if isinstance(one, PreTrainedModel) and "For" in type(one).__name__]
                sizes = {type(one).__name__: sum(weight.numel() for weight in one.parameters()) for one in models}
                with open(f"rank-{os.environ['RANK']}.json", "w") as file:
                    json.dump([is_deepspeed_zero3_enabled(), sizes], file)
                return [0.0] * len(completions)
        """
        (folder / "mine.py").write_text(textwrap.dedent(code))
        values = SETTINGS | {
            "use_cpu": False,
            "ddp_backend": "gloo",
            "num_processes": 2,
            "reward_funcs": ["mine.reward", "accuracy"],
            "accelerate_config": str(ROOT / "accelerate_configs" / "zero3.yaml"),
            "mixed_precision": "no",
        }
        Path("grpo.yaml").write_text(yaml.safe_dump(values))
        done = command("--config", "grpo.yaml", TORCH_EXTENSIONS_DIR=str(Path(sys.prefix) / "torch_extensions"))
        assert done.returncode == 0, done.stderr[-3000:]
        whole = sum(weight.numel() for weight in tiny_model().parameters())
        for rank in (0, 1):
            assert json.loads(Path(f"rank-{rank}.json").read_text()) == [
                True,
                {"Qwen2ForCausalLM": 0, "Qwen2ForTokenClassification": whole},
            ]
        before, after = load_file("policy/model.safetensors"), load_file("out/model.safetensors")
        assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in after)


def command(*words: str, **env) -> subprocess.CompletedProcess:
    """Run `trl-hrm grpo` in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "trl_hrm.cli", "grpo", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )
