"""Every settings file is read by the program that uses it, and the recipes' commands run."""

import json
import random
import re
import runpy
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from trl_hrm import (
    BuildPRM800KConfig,
    HRMRewardConfig,
    ImplicitPRMConfig,
    KLSelfConfig,
    StepGRPOConfig,
    StepTree,
    build_prm800k,
    plan_training,
)
from trl_hrm.demo.world import make_problem, solve
from trl_hrm.search.policies import FullTree
from trl_hrm.tiny_model import make_tiny_model, make_tokenizer

from .helpers import ROOT, load_recipe


ACCELERATE = {
    "cpu_2proc.yaml": {"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True, "mixed_precision": "no"},
    "single_gpu.yaml": {"distributed_type": "NO", "num_processes": 1, "use_cpu": False, "mixed_precision": "bf16"},
    "multi_gpu.yaml": {"distributed_type": "MULTI_GPU", "use_cpu": False, "mixed_precision": "bf16"},
    "zero2.yaml": {"distributed_type": "DEEPSPEED", "use_cpu": False, "mixed_precision": "bf16"},
    "zero3.yaml": {"distributed_type": "DEEPSPEED", "use_cpu": False, "mixed_precision": "bf16"},
    "fsdp2.yaml": {"distributed_type": "FSDP", "use_cpu": False, "mixed_precision": "bf16"},
}


# What the recipes are planned for: records of PRM800K's phase1_train.jsonl, training rows per record as in phase1_test.jsonl (77 rows
# of 106 records), and the solutions that the ER-PRM paper states in section 4
PHASE1_TRAIN_RECORDS = 949
ROWS_PER_RECORD = 77 / 106
ER_PRM_SOLUTIONS = 260_000


def settings_of(path):
    return yaml.safe_load((ROOT / "recipes" / path).read_text(encoding="utf-8"))


def name_of(path):
    return str(path.relative_to(ROOT / "recipes"))


# Settings files of the papers' experiments, without the layouts of their tables, and those that train a reward model
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name not in ("tiny", "reasoning") and "series" not in settings_of(path)
)
REWARD_MODELS = [path for path in RECIPES if "head" in settings_of(path)]
# `tests/reasoning/test_train_grid.py` tests the files of the reasoning models
TRAININGS = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if path.parent.name != "reasoning" and "num_train_epochs" in settings_of(path)
]


def test_judged_solutions_of_the_tiny_policy():
    """With a header or an ending that the policy never writes, the judge would be trained on other texts."""
    headed, solution = load_recipe("tiny/make_data.py").headed, load_recipe("tiny/make_policy.py").solution
    problem = make_problem(random.Random(0))
    prompt, written = solution(problem, random.Random(3), 1.0)
    steps, labels = solve(problem, random.Random(3), 1.0)
    tree = headed(StepTree(prompt, steps, labels, list(range(-1, len(steps) - 1))))
    assert "\n\n".join(tree.completions) == written and "Wait," in written
    assert written.startswith("# Step 1\na:") and written.endswith(f"\n\n# Answer\n\n{steps[-1][-1]}\n# END!")
    assert tree.labels == [*labels[:-2], labels[-1]] and tree.parents == list(range(-1, len(steps) - 2))


class TestAccelerateConfigs:
    def test_every_file_is_tested(self):
        assert {path.name for path in (ROOT / "accelerate_configs").iterdir()} == ACCELERATE.keys()

    @pytest.mark.parametrize("name", ACCELERATE)
    def test_contents_match_the_name(self, name):
        """`accelerate` rejects unknown keys here. MULTI_CPU would silently start one process."""
        config = load_config_from_file(str(ROOT / "accelerate_configs" / name))
        found = {key: getattr(config, key) for key in ACCELERATE[name]}
        found["distributed_type"] = found["distributed_type"].value
        assert found == ACCELERATE[name]

    def test_sharding(self):
        configs = {n: load_config_from_file(str(ROOT / "accelerate_configs" / n)) for n in ACCELERATE}
        assert configs["zero2.yaml"].deepspeed_config["zero_stage"] == 2
        assert configs["zero3.yaml"].deepspeed_config["zero_stage"] == 3
        assert configs["zero3.yaml"].deepspeed_config["zero3_save_16bit_model"] is True
        assert configs["fsdp2.yaml"].fsdp_config["fsdp_version"] == 2
        # a sharded state dict would leave no model to load
        assert configs["fsdp2.yaml"].fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"

    @pytest.mark.parametrize("name", ["zero2.yaml", "zero3.yaml"])
    def test_values_from_training_arguments_are_not_set(self, name):
        """A value here would silently override the recipe's `max_grad_norm` and accumulation."""
        config = load_config_from_file(str(ROOT / "accelerate_configs" / name)).deepspeed_config
        assert not {"gradient_clipping", "gradient_accumulation_steps"} & config.keys()


class TestSettings:
    @pytest.mark.parametrize("path", TRAININGS, ids=name_of)
    def test_parses_strictly(self, path):
        """A key that is not an argument is an error, because it would have no effect."""
        values = settings_of(path)
        name, config = next(
            (name, config)
            for option, name, config in (
                ("kl_coef", "kl_self.py", KLSelfConfig),
                ("step_credit", "grpo.py", StepGRPOConfig),
                ("beta", "implicit_prm.py", ImplicitPRMConfig),
                ("model_name_or_path", "hrm_reward.py", HRMRewardConfig),
            )
            if option in values
        )
        recipe, data = load_recipe(name), "problems" if name == "grpo.py" else "dataset_name"
        args = ["--config", str(path), "--use_cpu", "true", "--bf16", "false", f"--{data}", "folder"]
        args += [] if "output_dir" in values else ["--output_dir", "out"]
        script_args, training_args, model_args = recipe.make_parser().parse_args_and_config(args)
        assert isinstance(training_args, config)
        assert getattr(script_args, data) == "folder"
        for key in values.keys() - {"use_cpu", "bf16", data, "report_to"}:
            holders = [holder for holder in (script_args, training_args, model_args) if hasattr(holder, key)]
            found = getattr(holders[0], key)
            assert getattr(found, "value", found) == values[key], key
        with pytest.raises(ValueError, match="no_such_setting"):
            recipe.make_parser().parse_args_and_config([*args, "--no_such_setting", "1"])

    def test_every_setting_has_its_source(self):
        """The reader of a recipe must know which values are the paper's, which are the code's, and which are ours."""
        for path in RECIPES:
            lines = path.read_text(encoding="utf-8").splitlines()
            settings = [line for line in lines if line and not line.startswith("#")]
            assert settings and [line for line in settings if not re.search(r"  # (paper|code|ours)\b", line)] == [], (
                path
            )

    def test_the_papers_settings(self):
        """HRM paper, sections 4.1 and 4.2 and appendix A.1. The epochs are from the code, because the paper does not state them."""
        for name in ("hrm", "prm", "orm", "hrm_mc", "prm_mc"):
            values = settings_of(f"qwen2.5-math-1.5b/{name}_reward.yaml")
            assert values["model_name_or_path"] == "Qwen/Qwen2.5-Math-1.5B"
            assert values["max_grad_norm"] == 0.01
            assert values["head"] == ("regression" if "mc" in name else "classification")
            assert values["num_train_epochs"] == (20 if "mc" in name else 40)
            best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
            assert {key: values[key] for key in best} == best

    def test_the_papers_settings_of_er_prm(self):
        """ER-PRM paper, sections 4 and 6.1: 64 sequences of at most 512 tokens on 4 GPUs."""
        models = set()
        for path in REWARD_MODELS:
            values = settings_of(path)
            if not values["model_name_or_path"].startswith("meta-llama"):
                continue
            models.add((values["model_name_or_path"], values["head"]))
            assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * 4 == 64
            assert (values["learning_rate"], values["num_train_epochs"], values["max_length"]) == (1e-6, 1, 512)
        assert models == {
            ("meta-llama/Llama-3.1-8B", "lm"),
            ("meta-llama/Llama-3.1-8B", "regression"),
            ("meta-llama/Llama-3.2-3B-Instruct", "lm"),
            ("meta-llama/Llama-3.2-1B-Instruct", "lm"),
        }

    @pytest.mark.parametrize("path", REWARD_MODELS, ids=name_of)
    def test_reward_models_train(self, path):
        """
        Each recipe makes at least a few hundred optimizer steps on the real data, and its evaluations and checkpoints are reached.
        A row is at least one problem (PRM800K), one search tree, or one solution (ER-PRM). Longer trees are split into several rows.
        """
        args = ["--config", str(path), "--use_cpu", "true"]
        _, training_args, model_args = load_recipe("hrm_reward.py").make_parser().parse_args_and_config(args)
        assert not training_args.packing  # a packed row would hold several problems
        is_er_prm = model_args.model_name_or_path.startswith("meta-llama")
        if is_er_prm:
            plan = plan_training(training_args, int(ER_PRM_SOLUTIONS * 0.99), num_processes=4)
        elif training_args.head == "regression":
            plan = plan_training(training_args, int(PHASE1_TRAIN_RECORDS * 0.9), num_processes=8)
        else:
            plan = plan_training(training_args, int(PHASE1_TRAIN_RECORDS * ROWS_PER_RECORD), num_processes=8)
        assert plan.max_steps > (4000 if is_er_prm else 300)
        assert plan.warnings == () and len(plan.evaluation_steps) >= 5
        assert plan.evaluation_steps == plan.checkpoint_steps
        # The number in the comment of the recipe
        [steps] = re.findall(r"([\d,]+) (?:optimizer steps\.|(?:steps )?in total)", path.read_text(encoding="utf-8"))
        assert int(steps.replace(",", "")) <= plan.max_steps < 1.05 * int(steps.replace(",", ""))

    def test_rows_per_record_of_prm800k(self, shared_data, tmp_path):
        """`ROWS_PER_RECORD`, counted in the real file. Every row of the ORM view is also a row of the other views."""
        raw = shared_data / "prm800k" / "phase1_test.jsonl"
        build_prm800k(BuildPRM800KConfig(inputs=[str(raw)], output_dir=str(tmp_path / "orm"), view="orm"))
        rows = load_dataset(str(tmp_path / "orm"))["train"]
        assert len(set(rows["prompt"])) == ROWS_PER_RECORD * 106

    def test_models_of_recipes(self):
        """Every model that a recipe uses, in its settings or in its comments, is the output of a recipe."""
        text = "\n".join(path.read_text(encoding="utf-8") for path in RECIPES)
        made = set(re.findall(r"output_dir:? (outputs/[\w.-]+)", text))
        used = set(re.findall(r"(?:reward_model|policy|model_name_or_path):? (outputs/[\w.-]+)", text))
        assert {"outputs/qwen2.5-math-1.5b-hrm-mc", "outputs/qwen2.5-math-7b-kl-self-hrm"} <= made and used <= made

    def test_the_papers_settings_of_self_training(self):
        """λ and the logarithm are in the HRM paper, sections 3.3 and 4.3, the rest in its code. RAFT has no KL term."""
        expected = {
            "learning_rate": 2e-6,
            "num_train_epochs": 1,
            "kl_coef": 0.5,
            "kl_scaling": "log1p",
            "kl_reduction": "sum",
        }
        values = settings_of("qwen2.5-math-7b/kl_self.yaml")
        assert {key: values[key] for key in expected} == expected
        raft = settings_of("raft.yaml")
        assert (raft["kl_coef"], raft["learning_rate"], raft["num_train_epochs"]) == (0, 5e-7, 2)

    def test_the_papers_settings_of_grpo(self):
        """DeepSeekMath, section 4.2, on 8 GPUs. The number of steps in the comment is that of GSM8K's 7,473 training problems."""
        path = ROOT / "recipes" / "qwen2.5-math-1.5b" / "grpo.yaml"
        args = ["--config", str(path), "--use_cpu", "true"]
        script_args, training_args, _ = load_recipe("grpo.py").make_parser().parse_args_and_config(args)
        expected = {"learning_rate": 1e-6, "beta": 0.04, "max_completion_length": 1024, "num_iterations": 1}
        assert {name: getattr(training_args, name) for name in expected} == expected
        plan = plan_training(training_args, 7473, num_processes=8)
        assert (plan.rows_per_step, plan.num_prompts, plan.steps_per_epoch, plan.max_steps) == (1024, 128, 58, 116)
        assert plan.warnings == () and plan.evaluation_steps[:2] == (0, 20)
        assert "58 steps per epoch, 116 in total" in path.read_text(encoding="utf-8")
        assert set(script_args.spans) == {1, 2} and training_args.step_credit == "min_form"

    def test_rows_are_not_truncated(self):
        """TRL truncates silently, so samples of the recipes' commands must fit together with the prompt."""
        values = yaml.safe_load((ROOT / "recipes" / "qwen2.5-math-7b" / "kl_self.yaml").read_text(encoding="utf-8"))
        assert values["max_length"] >= FullTree.max_depth * FullTree.max_step_tokens + 512
        text = (ROOT / "recipes" / "raft.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["max_length"] >= int(text.split("--max_solution_tokens ")[1].split()[0]) + 256

    def test_command_line_overrides_the_file(self):
        recipe = load_recipe("hrm_reward.py")
        path = ROOT / "recipes" / "tiny" / "hrm_reward.yaml"
        args = ["--config", str(path), "--dataset_name", "x", "--learning_rate", "0.5", "--label_tokens", "a", "b"]
        _, training_args, _ = recipe.make_parser().parse_args_and_config([*args, "--head", "lm"])
        assert training_args.learning_rate == 0.5 and training_args.make_step_format().label_tokens == ("a", "b")


class TestCommands:
    @pytest.mark.parametrize(
        ("recipe", "names"),
        [
            ("hrm_reward.py", ("--shared_prefix", "--step_separator")),
            ("kl_self.py", ("--kl_coef", "--kl_scaling", "--ref_model", "--precompute_ref_hidden")),
            ("implicit_prm.py", ("--beta", "--score_span", "--ref_model", "--precompute_ref_log_probs")),
            ("grpo.py", ("--problems", "--reward_model", "--step_credit", "--guard_max_steps", "--num_generations")),
        ],
    )
    def test_help(self, recipe, names, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", [recipe, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
        assert end.value.code == 0
        shown = capsys.readouterr().out
        for name in ("--dataset_name", "--model_name_or_path", "--use_peft", *names):
            assert name in shown

    def test_kl_self_trains_on_a_folder_and_says_which_split_is_missing(self, tmp_path):
        """A mistyped split would otherwise end in a KeyError from another library."""
        rows = [{"prompt": "1 + 2", "completion": " = 3"}, {"prompt": "2 + 2", "completion": " = 4"}]
        (tmp_path / "data").mkdir()
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
        make_tiny_model(
            ["1 + 2 = 3"], tmp_path / "policy", kind="causal", hidden_size=32, num_layers=1, vocab_size=270
        )
        recipe = load_recipe("kl_self.py")
        args = ["--config", str(ROOT / "recipes" / "tiny" / "kl_self.yaml"), "--dataset_name", str(tmp_path / "data")]
        args += [
            "--model_name_or_path",
            str(tmp_path / "policy"),
            "--output_dir",
            str(tmp_path / "out"),
            "--max_steps",
            "3",
        ]
        recipe.main(*recipe.make_parser().parse_args_and_config([*args, "--kl_coef", "0.1"]))
        log = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        assert log[0]["kl"] == 0 < log[2]["kl"]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32
        with pytest.raises(ValueError, match=r"\['train'\].* \['test'\]"):
            recipe.main(*recipe.make_parser().parse_args_and_config([*args, "--eval_strategy", "epoch"]))

    @pytest.mark.parametrize("kind", ["token", "causal"])
    def test_make_model(self, tmp_path, kind):
        """
        With a Qwen2 configuration, `AutoTokenizer` loads any file as a `Qwen2Tokenizer`. A tokenizer with other rules would give
        different ids after loading than in training.
        """
        texts = ["1 + 2 = 3.\n\n# Answer\n\n345", "Süß 汉字 ки\t😀"] * 3
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"question": text, "answer": text}) + "\n" for text in texts), "utf-8")
        module = load_recipe("tiny/make_model.py")
        args = ["--kind", kind, "--data", str(data), "--output_dir", str(tmp_path / "model"), "--vocab_size", "300"]
        module.main(module.make_parser().parse_args([*args, "--hidden_size", "32", "--num_layers", "1"]))

        saved = make_tokenizer([text for text in texts for _ in range(2)], vocab_size=300)
        loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert len(loaded) <= 300 and loaded.get_vocab() == saved.get_vocab()
        assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == ("<|pad|>", "<|endoftext|>", None)
        for text in (
            *texts,
            "\n",
            "\n\n",
            "\n\n\n",
            "12345 + 67",
            "x  y",
            " é",
            "日本",
            "it's 3'",
            "<|pad|>",
            "+",
            "-",
        ):
            assert loaded(text)["input_ids"] == saved(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
        for text in ("\n\n", "\n", "+", "-"):  # separators and label tokens
            assert loaded(text)["input_ids"]

        auto_class = AutoModelForTokenClassification if kind == "token" else AutoModelForCausalLM
        model = auto_class.from_pretrained(tmp_path / "model")
        assert model.config.vocab_size == len(loaded) and model.config.pad_token_id == loaded.pad_token_id
        assert model.config.num_hidden_layers == 1 and model.config.hidden_size == 32

    def test_make_model_is_reproducible(self, tmp_path):
        module = load_recipe("tiny/make_model.py")
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps({"prompt": "1+2?", "completions": ["3", "the sum is 3"]}) + "\n", "utf-8")
        weights = []
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            args = ["--data", str(data), "--output_dir", str(tmp_path / name), "--hidden_size", "32", "--seed", seed]
            module.main(module.make_parser().parse_args(args))
            weights.append((tmp_path / name / "model.safetensors").read_bytes())
        assert weights[0] == weights[1] != weights[2]
        assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
