"""The scripts of the HRM paper's tables: every command parses, every input exists, and the settings and numbers are the paper's."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from .helpers import ROOT, load_recipe
from .paper_scripts import RECIPES, check_paths, listed, run_script


HRM = RECIPES / "hrm"
SCRIPTS = ("table3", "table4", "table5", "table6", "figure4")
N = [2, 4, 8, 16, 24, 32, 64, 128, 256, 512]


@pytest.fixture(scope="session")
def raw_files(tmp_path_factory) -> set[str]:
    """Names of the raw files."""
    folder = tmp_path_factory.mktemp("raw")
    load_recipe("papers/make_dry_run_data.py").main(folder, seed=42)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stages():
    """Stages of each script."""
    return {script: listed(f"hrm/{script}.sh") for script in SCRIPTS}


@pytest.fixture(scope="module")
def dry_stages():
    """Stages of each script in a dry run."""
    return {script: listed(f"hrm/{script}.sh", "--dry_run") for script in SCRIPTS}


def models_of(stage) -> list[str]:
    """Return the policy that a stage samples from, or the model that it trains."""
    found = stage.settings.get("policy") or stage.settings.get("model_name_or_path") or []
    return [found] if isinstance(found, str) else found


def test_every_script_is_tested():
    assert {path.stem for path in HRM.glob("*.sh")} == {*SCRIPTS, "stages"}


class TestStages:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_every_input_is_a_raw_file_or_the_output_of_an_earlier_stage(self, script, stages, dry_stages, raw_files):
        """A path that no stage writes would stop the script after days."""
        check_paths(stages[script], "runs/papers/hrm", "data/papers", raw_files)
        check_paths(dry_stages[script], "runs/papers-dry-run/hrm", "runs/papers-dry-run/hrm/data", raw_files)

    def test_stages_are_shared_between_scripts(self, stages, dry_stages):
        """A stage with the same name and another command would be an error in the second script."""
        for by_script in (stages, dry_stages):
            commands, outputs = {}, {}
            for stage in (stage for one in by_script.values() for stage in one):
                assert commands.setdefault(stage.name, stage).words == stage.words
                if stage.command != "table":
                    assert outputs.setdefault(stage.settings["output_dir"], stage.name) == stage.name
        trained = {name for name, stage in commands.items() if stage.command in ("reward", "kl-self")}
        assert trained == {"orm", "prm", "hrm", "mc-prm", "mc-hrm", "policy-prm", "policy-hrm"} | {
            "policy-hrm-0.001",
            "policy-hrm-10.0",
        }

    def test_a_dry_run_has_the_same_stages(self, stages, dry_stages):
        for script in SCRIPTS:
            assert [(s.name, s.command) for s in stages[script]] == [(s.name, s.command) for s in dry_stages[script]]
            for stage in dry_stages[script]:
                for used in models_of(stage):
                    assert used == "HuggingFaceTB/SmolLM2-135M-Instruct" or used.startswith(
                        "runs/papers-dry-run/hrm/policy-"
                    )
                if stage.command == "step-search":
                    assert stage.settings["n"] == [2, 4] and stage.settings["limit"] == 2

    def test_a_large_policy_has_one_process(self, stages):
        """Each process of a search uses one GPU, on which 72B parameters have no room."""
        found = {}
        for stage in (stage for one in stages.values() for stage in one):
            if stage.command in ("annotate", "evaluate", "best-of-n", "step-search"):
                size = (stage.settings["engine_args"] or {}).get("tensor_parallel_size", 1)
                [policy] = models_of(stage)
                found.setdefault(policy.split("/")[-1], set()).add((size, stage.num_processes))
        assert found.pop("Qwen2.5-Math-72B-Instruct") == {(8, 1)}
        assert len(found) == 4 and all(one == {(1, 8)} for one in found.values())


class TestCommon:
    """common.sh with a program that records its options instead of `trl-hrm`."""

    @pytest.fixture
    def run(self, tmp_path):
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "trl-hrm"
        program.write_text(f'#!/bin/sh\necho "$*" >> "{tmp_path}/calls"\ntest ! -e "{tmp_path}/fail"\n', "utf-8")
        program.chmod(0o755)
        script = tmp_path / "script.sh"

        def run(stages: str, *options: str) -> tuple[subprocess.CompletedProcess, list[str]]:
            """Return the finished process and the calls of the program."""
            script.write_text(f'source recipes/papers/common.sh "$@"\n{stages}\n', encoding="utf-8")
            (tmp_path / "calls").write_text("")
            done = subprocess.run(
                ["bash", str(script), "--runs", str(tmp_path / "my runs"), *options],
                cwd=ROOT,
                env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
                text=True,
                capture_output=True,
            )
            return done, (tmp_path / "calls").read_text().splitlines()

        return run

    def test_a_finished_stage_is_not_run_again(self, run, tmp_path):
        """A stage that failed is run again. A finished stage with other options is an error: its output would be out of date."""
        stages = 'stage a score x --output "$RUNS/a b"\nstage b score y'
        (tmp_path / "fail").touch()
        done, calls = run(stages, "--num_gpus", "1")
        assert done.returncode == 1 and calls == [f"score x --output {tmp_path}/my runs/a b"]
        (tmp_path / "fail").unlink()
        done, calls = run(stages, "--num_gpus", "1")
        assert done.returncode == 0 and calls == [f"score x --output {tmp_path}/my runs/a b", "score y"]
        done, calls = run(stages, "--num_gpus", "1")
        assert done.returncode == 0 and calls == [] and done.stdout.count("done before") == 2
        done, calls = run(stages.replace("score y", "score z"), "--num_gpus", "1")
        assert done.returncode == 1 and calls == [] and "with other options: 'trl-hrm' 'score' 'y'" in done.stderr

    def test_training_resumes_from_its_checkpoint(self, run, tmp_path):
        stages = 'stage a reward --output_dir "$RUNS/a"\nstage b reward --output_dir "$RUNS/b"'
        (tmp_path / "my runs" / "b" / "checkpoint-5").mkdir(parents=True)
        done, calls = run(stages, "--num_gpus", "1")
        assert calls[0].endswith("/a") and calls[1].endswith("/b --resume_from_checkpoint true")
        done, calls = run(stages, "--num_gpus", "1")
        assert done.returncode == 0 and calls == []

    def test_a_dry_run_keeps_models_of_earlier_stages(self, run, tmp_path):
        """The policy of a later stage must be the trained one, not the small model."""
        stages = 'stage a evaluate --policy big/model\nstage b evaluate --policy "$RUNS/a"\nDRY[c]="--n 3"\nstage c evaluate'
        done, calls = run(stages, "--dry_run", "--data", str(tmp_path))
        assert done.returncode == 0
        small = "--policy HuggingFaceTB/SmolLM2-135M-Instruct"
        assert [call.endswith(small) for call in calls] == [True, False, True]
        assert calls[1].startswith(f"evaluate --policy {tmp_path}/my runs/a --engine transformers")
        assert calls[2].endswith(f"--n 3 {small}")

    @pytest.mark.parametrize(
        ("options", "message"),
        [(("--dryrun",), "--dryrun is not an option"), (("--runs",), "--runs needs a value"), ((), "No GPU found")],
    )
    def test_options_that_are_refused(self, run, options, message):
        if not options and shutil.which("nvidia-smi"):
            pytest.skip("this machine has a GPU")
        done, calls = run("stage a score x", *options)
        assert done.returncode == 2 and message in done.stderr and calls == []


class TestSettings:
    def test_table_3(self, stages):
        """Section 4.1, appendix A.1, and the authors' code for what the paper does not state."""
        found = {stage.name: stage.settings for stage in stages["table3"] if stage.name.startswith("table3-")}
        assert found.keys() == {"table3-orm", "table3-prm", "table3-hrm"}
        for name, settings in found.items():
            assert settings["policy"] == "Qwen/Qwen2.5-Math-72B-Instruct" and settings["n"] == [2, 4, 8, 16, 24]
            assert settings["temperature"] == 0.1 and settings["segmentation"] == "formula"
            assert settings["reward_model"] == f"runs/papers/hrm/{name.removeprefix('table3-')}"
            if name == "table3-orm":
                assert settings["aggregate"] == ["last"] and settings["max_solution_tokens"] == 2048
            else:
                assert (settings["max_depth"], settings["max_step_tokens"]) == (100, 1024)
                assert (settings["strategy"], settings["aggregate"]) == ("step_search", "last")

    def test_tables_4_to_6(self, stages):
        """Each policy is searched with both reward models of MC labels, for every N of the paper."""
        policies = {
            "table4": {
                "deepseek-math-7b": "deepseek-ai/deepseek-math-7b-instruct",
                "qwen2.5-math-72b": "Qwen/Qwen2.5-Math-72B-Instruct",
                "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B-Instruct",
            },
            "table5": {
                "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B-Instruct",
                "qwen-7b-prm": "runs/papers/hrm/policy-prm",
                "qwen-7b-hrm": "runs/papers/hrm/policy-hrm",
            },
            "table6": {"gsm8k": "Qwen/Qwen2.5-Math-7B-Instruct", "math500": "Qwen/Qwen2.5-Math-7B-Instruct"},
        }
        for script, expected in policies.items():
            found = {s.name: s.settings for s in stages[script] if s.command == "step-search"}
            assert found.keys() == {f"{name}-{method}" for name in expected for method in ("prm", "hrm")}
            for name, settings in found.items():
                policy, method = name.rsplit("-", 1)
                assert settings["policy"] == expected[policy] and settings["n"] == N
                assert settings["reward_model"] == f"runs/papers/hrm/mc-{method}"
                assert (settings["temperature"], settings["max_depth"], settings["aggregate"]) == (0.1, 8, "last")
                assert settings["segmentation"] == "step_header" and settings["max_in_flight"] >= max(N)
                if script == "table6":
                    assert settings["problems"] == f"data/papers/{policy}/test.jsonl" and settings["where"] is None

    def test_problems_of_prm800k(self, stages):
        """Every number in tables 3 to 5 is a multiple of 1/90: the test records that end with a solution."""
        tested = 0
        for stage in (stage for script in ("table3", "table4", "table5") for stage in stages[script]):
            if stage.command in ("best-of-n", "step-search", "evaluate"):
                assert stage.settings["problems"] == "data/papers/prm800k/phase1_test.jsonl"
                assert stage.settings["where"] == {"label.finish_reason": "solution"}
                tested += 1
        assert tested == 3 + 6 + 9

    def test_reward_models(self, stages):
        """Table 3: labels of people, as three views. Tables 4 to 6: MC labels of the same trees, with node compression for the HRM."""
        found = {stage.name: stage.settings for one in stages.values() for stage in one}
        for view in ("orm", "prm", "hrm"):
            data = found[f"prm800k-{view}"]
            assert found[view]["dataset_name"] == data["output_dir"] and found[view]["num_train_epochs"] == 40
            assert (data["view"], data["neutral"]) == (view, "negative")
            assert data["inputs"] == ["data/papers/prm800k/phase1_train.jsonl"]
        for method in ("prm", "hrm"):
            data, model = found[f"mcts-{method}"], found[f"mc-{method}"]
            assert model["dataset_name"] == data["output_dir"]
            assert (model["head"], model["regression_loss"], model["num_train_epochs"]) == ("regression", "mse", 20)
            assert data["inputs"] == ["runs/papers/hrm/mcts"]
            assert (data["labels"], data["estimator"], data["truncated"]) == ("soft", "leaf_share", "wrong")
            assert data["balance"] is not None and data["balance_by"] == "value_and_depth"
            assert data["hnc"] == (method == "hrm")
        assert (found["mcts-hrm"]["hnc_rule"], found["mcts-hrm"]["hnc_probability"]) == ("per_child", 0.5)
        for name in ("orm", "prm", "hrm", "mc-prm", "mc-hrm"):
            assert (
                found[name]["model_name_or_path"] == "Qwen/Qwen2.5-Math-1.5B" and found[name]["max_grad_norm"] == 0.01
            )

    def test_search_trees(self, stages):
        """Section 4.2: only the questions and answers of PRM800K, 5 children, depth 7."""
        [search] = {id(s): s.settings for s in stages["table4"] if s.name == "mcts"}.values()
        assert search["problems"] == "data/papers/prm800k/phase1_train.jsonl"
        assert search["policy"] == "Qwen/Qwen2.5-Math-7B-Instruct" and search["search"] == "full_tree"
        assert (search["num_children"], search["max_depth"], search["temperature"]) == (5, 7, 0.1)

    def test_self_training(self, stages):
        """Section 4.3: λ, and for each method the steps of its training set with an MC score of at least 0.95 (code)."""
        found = {stage.name: stage.settings for one in stages.values() for stage in one}
        for method in ("prm", "hrm"):
            data, policy = found[f"sft-{method}"], found[f"policy-{method}"]
            assert (data["view"], data["prefixes"], data["min_mc_score"]) == ("sft", True, 0.95)
            assert data["hnc"] == (method == "hrm") and data["inputs"] == ["runs/papers/hrm/mcts"]
            assert policy["dataset_name"] == data["output_dir"]
            assert policy["model_name_or_path"] == "Qwen/Qwen2.5-Math-7B-Instruct"
        assert found["sft-hrm"]["hnc_rule"] == "per_child"
        coefficients = {
            stage.name: stage.settings["kl_coef"] for stage in stages["figure4"] if stage.command == "kl-self"
        }
        assert coefficients == {"policy-hrm-0.001": 0.001, "policy-hrm": 0.5, "policy-hrm-10.0": 10}


class TestPaper:
    @pytest.fixture
    def paper(self, shared_data) -> str:
        path = shared_data.parent / "papers" / "hrm_paper.txt"
        if not path.is_file():
            pytest.skip(f"the text of the paper is not at {path}")
        return path.read_text(encoding="utf-8")

    def test_numbers(self, paper):
        """Every number of tables 3 to 6, as the text of the paper has it."""
        rows = re.findall(r"^(?:(.+?) \| )?([OPH]RM) \| (0\.[\d. |]+?)[ |]*$", paper, flags=re.MULTILINE)
        assert len(rows) == 3 + 6 + 6 + 4
        title = ""
        for number, size in ((3, 3), (4, 6), (5, 6), (6, 4)):
            layout = yaml.safe_load((HRM / f"table{number}.yaml").read_text(encoding="utf-8"))
            assert layout["points"] == ([2, 4, 8, 16, 24] if number == 3 else N)
            assert layout["points_in"] == "columns" and layout["unit"] == "share"
            expected = []
            for outer, method, cells in rows[:size]:
                title = outer or title
                label = method if number == 3 else [title, method]
                expected.append((label, [float(cell) for cell in cells.split("|")]))
            assert [(series["label"], series["paper"]) for series in layout["series"]] == expected
            del rows[:size]

    @pytest.mark.parametrize("name", ["formulas", "steps"])
    def test_prompts(self, paper, name):
        """The words of appendix A.1 and A.2. The text of the paper has no line breaks and typographic apostrophes."""
        [prompt] = [
            " ".join(one.replace("’", "'").split())
            for one in re.findall(r"You are an expert of Math.*?-{5,} Question:.*?-{5,}", paper)
            if ("# Step 1" in one) == (name == "steps")
        ]
        text = (HRM / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
        assert " ".join(text.split()) == prompt and text.count("{question}") == 1


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(script, real_folder, tmp_path_factory):
    """The whole script with a real model. The scripts share their stages, like the real runs."""
    runs = tmp_path_factory.getbasetemp() / "hrm-dry-run"
    words, model = (f"hrm/{script}.sh", "--dry_run", "--runs", str(runs)), {"MODEL": str(real_folder("smollm2"))}
    done = run_script(*words, env=model)
    assert done.returncode == 0, done.stderr[-3000:]
    again = run_script(*words, env=model)
    assert again.returncode == 0 and again.stdout.count("done before") == len(re.findall("(?m)^== ", again.stdout)) > 0
    for name in [script] if script != "table5" else ["table5", "table5_policies"]:
        layout = yaml.safe_load((HRM / f"{name}.yaml").read_text(encoding="utf-8"))
        text = (runs / f"{name}.md").read_text(encoding="utf-8")
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        points = [f"N={point}" if isinstance(point, int) else point for point in layout["points"]]
        labels = [series["label"] for series in layout["series"]]
        assert rows[0][1:] == points and len(rows) == 2 + len(labels)
        assert [row[0] for row in rows[2:]] == [one if isinstance(one, str) else " / ".join(one) for one in labels]
        measured = {"figure4": points, "table5_policies": ["N=1", "N=2"]}.get(name, ["N=2", "N=4"])
        for row in rows[2:]:
            values = {point: cell for point, cell in zip(points, row[1:], strict=True) if re.match(r"[\d.]+ ?", cell)}
            assert values.keys() == ({"N=1"} if row[0].endswith("greedy") else set(measured)), row
        assert list((runs / f"{name}_files").glob("*.png"))
        assert f"# {layout['title']}" in done.stdout
