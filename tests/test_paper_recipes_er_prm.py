"""The scripts of the ER-PRM paper's tables: every command parses, every input exists, and the settings and numbers are the paper's."""

import os
import re
import shlex
import stat
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from trl_hrm.evaluation.tables import read_layout
from trl_hrm.grading import extract_answer, judge
from trl_hrm.search.policy_config import PromptConfig
from trl_hrm.search.steps import RULES, cut_text

from .helpers import load_recipe
from .paper_scripts import RECIPES, check_paths, listed, run_script


ER_PRM = RECIPES / "er_prm"
RUNS, DRY_RUNS = "runs/papers/er_prm", "runs/papers-dry-run/er_prm"
SCRIPTS = (*(f"table{number}" for number in range(1, 11)), "sweep")
POLICIES = {
    "mistral": "meta-math/MetaMath-Mistral-7B",
    "deepseek": "deepseek-ai/deepseek-math-7b-instruct",
    "deepseek-rl": "deepseek-ai/deepseek-math-7b-rl",
    "openmath2": "nvidia/OpenMath2-Llama3.1-8B",
}
ETAS = ["0.1", "1", "2", "5", "8", "10", "15", "20"]
PRMS, ALL = ("ours", "soft", "hard"), ("ours", "soft", "hard", "orm")
# policy of the candidates, policy of the training data, base model, methods and test sets of each table
COMPARISONS = {
    2: ("mistral", "mistral", "1b", PRMS, ("gsm8k", "math500")),
    3: ("mistral", "mistral", "3b", PRMS, ("gsm8k", "math500")),
    4: ("openmath2", "deepseek", "8b", PRMS, ("math500",)),
    5: ("mistral", "mistral", "8b", ALL, ("gsm8k", "math500")),
    6: ("deepseek", "deepseek", "8b", ALL, ("gsm8k", "math500")),
    9: ("mistral", "mistral", "8b_regression", PRMS, ("gsm8k", "math500")),
    10: ("deepseek-rl", "mistral", "8b", ALL, ("gsm8k", "math500")),
}
SMALL_SWEEP = ["--etas", "1 2", "--learning_rates", "1e-6 5e-7"]
BASES = {
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
    "3b": "meta-llama/Llama-3.2-3B-Instruct",
    "8b": "meta-llama/Llama-3.1-8B",
    "8b_regression": "meta-llama/Llama-3.1-8B",
}


@pytest.fixture(scope="module")
def raw_files(tmp_path_factory) -> set[str]:
    """Names of the raw files."""
    folder = tmp_path_factory.mktemp("raw")
    load_recipe("papers/make_dry_run_data.py").main(folder, seed=42)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stages():
    """Stages of each script. The table of the sweep has a layout that is written when the sweep runs."""
    return {script: listed(f"er_prm/{script}.sh") for script in SCRIPTS}


@pytest.fixture(scope="module")
def dry_stages():
    """Stages of each script in a dry run. The sweep has fewer pairs of values."""
    found = {script: listed(f"er_prm/{script}.sh", "--dry_run") for script in SCRIPTS[:-1]}
    return found | {"sweep": listed("er_prm/sweep.sh", "--dry_run", *SMALL_SWEEP)}


def settings_of(stages, command):
    """Return the settings of the stages with a command, by name. A stage that several iterations share is listed several times."""
    return {stage.name: stage.settings for stage in stages if stage.command == command}


def policy_of(settings):
    """Return the policy of a stage. `evaluate` takes a list."""
    policy = settings.get("policy") or settings.get("model_name_or_path")
    return policy[0] if isinstance(policy, list) else policy


def layout_of(number):
    return yaml.safe_load((ER_PRM / f"table{number}.yaml").read_text(encoding="utf-8"))


def test_every_script_is_tested():
    assert {path.stem for path in ER_PRM.glob("*.sh")} == {*SCRIPTS, "stages"}


class TestStages:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_every_input_is_a_raw_file_or_the_output_of_an_earlier_stage(self, script, stages, dry_stages, raw_files):
        """A path that no stage writes would stop the script after days."""
        tables = [] if script == "sweep" else ["table"]
        for found, runs, data in ((stages, RUNS, "data/papers"), (dry_stages, DRY_RUNS, f"{DRY_RUNS}/data")):
            kept = [stage for stage in found[script] if stage.command != "table" or tables]
            check_paths(kept, runs, data, raw_files)

    def test_stages_are_shared_between_scripts(self, stages, dry_stages):
        """A stage with the same name and another command would be an error in the second script."""
        for by_script in (stages, dry_stages):
            commands, outputs = {}, {}
            for stage in (stage for one in by_script.values() for stage in one):
                command = (stage.command, stage.words, stage.num_processes)
                assert commands.setdefault(stage.name, command) == command
                if stage.command != "table":
                    assert outputs.setdefault(stage.settings["output_dir"], stage.name) == stage.name

    def test_a_dry_run_has_the_same_stages(self, stages, dry_stages):
        stages = stages | {"sweep": listed("er_prm/sweep.sh", *SMALL_SWEEP)}
        for script in SCRIPTS:
            assert [(s.name, s.command) for s in stages[script]] == [(s.name, s.command) for s in dry_stages[script]]
            for stage in dry_stages[script]:
                used = policy_of(stage.settings)
                assert used in (None, "HuggingFaceTB/SmolLM2-135M-Instruct") or used.startswith(f"{DRY_RUNS}/")

    @pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
    def test_the_batch_does_not_depend_on_the_gpus(self, gpus):
        """Section 4: 64 sequences. The authors' code of RAFT has 128."""
        done = run_script("er_prm/table1.sh", "--list", "--num_gpus", str(gpus), "--learning_rates", "1e-6")
        batches = Counter()
        for words in (shlex.split(line.partition("\t")[2]) for line in done.stdout.splitlines()):
            if words[1] in ("reward", "kl-self"):
                names = ("--per_device_train_batch_size", "--gradient_accumulation_steps", "--num_processes")
                rows, accumulated, processes = (int(words[words.index(name) + 1]) for name in names)
                assert processes == gpus
                batches[words[1], rows * accumulated * processes] += 1
        assert batches == {("reward", 64): 6, ("kl-self", 128): 6}

    def test_a_batch_that_cannot_be_split(self):
        done = run_script("er_prm/table5.sh", "--list", "--num_gpus", "3")
        assert done.returncode == 2 and "Set --num_gpus to 1, 2, 4, 8 or 16" in done.stderr

    @pytest.mark.parametrize("words", [["etas", "1"], ["--eta", "1"], ["--etas"], ["--"]])
    def test_invalid_options(self, words):
        done = run_script("er_prm/sweep.sh", "--list", *words)
        assert done.returncode == 2 and words[0] in done.stderr and not done.stdout


class TestSettings:
    def test_every_setting_has_its_source(self):
        """The reader of a file must know which values are the paper's, which are the code's, and which are ours."""
        tested = 0
        for path in ER_PRM.glob("*.yaml"):
            if path.stem.startswith("table"):
                continue
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
            assert lines and [line for line in lines if not re.search(r"  # (paper|code|ours)\b", line)] == [], path
            tested += 1
        assert tested == 10

    @pytest.mark.parametrize("number", COMPARISONS)
    def test_comparisons(self, number, stages):
        """Which reward models select the solutions of which policy, on which labels they were trained, and the values of N."""
        policy, data_policy, size, methods, datasets = COMPARISONS[number]
        found = stages[f"table{number}"]
        selections = settings_of(found, "best-of-n")
        assert selections.keys() == {f"{policy}-{d}-{data_policy}-{m}-{size}" for d in datasets for m in methods}
        pools, models = settings_of(found, "evaluate"), settings_of(found, "reward")
        assert pools.keys() == {f"{policy}-{dataset}" for dataset in datasets}
        assert models.keys() == {f"{data_policy}-{method}-{size}" for method in methods}
        for dataset in datasets:
            pool = pools[f"{policy}-{dataset}"]
            assert (policy_of(pool), pool["problems"]) == (POLICIES[policy], f"data/papers/{dataset}/test.jsonl")
            assert pool["limit"] is None and max(pool["n"]) == 64 and pool["temperature"] == 1
            for method in methods:
                selection = selections[f"{policy}-{dataset}-{data_policy}-{method}-{size}"]
                assert selection["n"] == [4, 8, 16, 32, 64] and selection["aggregate"] == ["min"]
                assert selection["candidates"] == f"{pool['output_dir']}/samples"
                assert selection["reward_model"] == models[f"{data_policy}-{method}-{size}"]["output_dir"]
        exports = settings_of(found, "export")
        for method in methods:
            model, export = models[f"{data_policy}-{method}-{size}"], exports[f"{data_policy}-{method}-labels"]
            assert model["model_name_or_path"] == BASES[size] and model["dataset_name"] == export["output_dir"]
            assert (model["learning_rate"], model["num_train_epochs"], model["max_length"]) == (1e-6, 1, 512)
            if size == "8b_regression":
                assert (model["head"], model["regression_loss"]) == ("regression", "mse")
            else:
                assert (model["head"], model["label_tokens"]) == ("lm", [" +", " -"])
            labels, eta, view = {
                "ours": ("entropy", {"mistral": 2, "deepseek": 10}[data_policy], "prm"),
                "soft": ("soft", None, "prm"),
                "hard": ("hard", None, "prm"),
                "orm": ("hard", None, "orm"),
            }[method]
            assert (export["labels"], export["eta"], export["view"], export["truncated"]) == (
                labels,
                eta,
                view,
                "wrong",
            )
            assert export["inputs"] == [f"{RUNS}/search/{data_policy}-{dataset}" for dataset in ("gsm8k", "math")]
        searches = settings_of(found, "annotate")
        assert searches.keys() == {f"{data_policy}-search-{dataset}" for dataset in ("gsm8k", "math")}
        for name, search in searches.items():
            assert search["policy"] == POLICIES[data_policy] and search["search"] == "rollouts"
            assert (search["num_solutions"], search["num_completions"], search["limit"]) == (15, 16, None)
            assert search["problems"] == f"data/papers/{name.split('-')[-1]}/train.jsonl"

    @pytest.mark.parametrize(("number", "data", "test"), [(7, "gsm8k", "gsm8k"), (8, "math", "math500")])
    def test_eta(self, number, data, test, stages):
        """Tables 7 and 8: eight values of eta, on the training problems of one set alone."""
        found = stages[f"table{number}"]
        exports, models = settings_of(found, "export"), settings_of(found, "reward")
        assert {name: (one["labels"], one["eta"], one["inputs"]) for name, one in exports.items()} == {
            f"mistral-{data}-ours-{eta}-labels": ("entropy", float(eta), [f"{RUNS}/search/mistral-{data}"])
            for eta in ETAS
        }
        for eta, selection in zip(ETAS, settings_of(found, "best-of-n").values(), strict=True):
            model = models[f"mistral-{data}-ours-{eta}-8b"]
            assert selection["reward_model"] == model["output_dir"]
            assert selection["candidates"] == f"{RUNS}/mistral-{test}/samples" and selection["n"] == [4, 8, 16, 32, 64]
            assert model["dataset_name"] == exports[f"mistral-{data}-ours-{eta}-labels"]["output_dir"]
            assert model["model_name_or_path"] == BASES["8b"] and model["head"] == "lm"

    def test_raft(self, stages):
        """
        Table 1: three iterations with a decaying learning rate (code). Each samples from the policy of the previous one, and the
        candidates of the first iteration are the same for the three reward models.
        """
        found = stages["table1"]
        samples, policies = settings_of(found, "annotate"), settings_of(found, "kl-self")
        selections, results = settings_of(found, "select-raft"), settings_of(found, "evaluate")
        for policy in ("mistral", "deepseek"):
            for method in ("soft", "hard", "ours"):
                before, name = POLICIES[policy], f"{policy}-raft-{method}"
                for iteration, rate in ((1, 5e-7), (2, 3.33e-7), (3, 1.67e-7)):
                    selection, trained = selections[f"{name}-data-{iteration}"], policies[f"{name}-{iteration}"]
                    sources = [one for one in samples.values() if one["output_dir"] in selection["candidates"]]
                    assert [one["output_dir"] for one in sources] == selection["candidates"]
                    assert [(one["problems"], one["where"], one["limit"]) for one in sources] == [
                        ("data/papers/gsm8k/train.jsonl", None, None),
                        ("data/papers/openmathinstruct2/train.jsonl", {"problem_source": "augmented_gsm8k"}, 12500),
                        ("data/papers/math/train.jsonl", None, None),
                        ("data/papers/openmathinstruct2/train.jsonl", {"problem_source": "augmented_math"}, 12500),
                    ]
                    for one in sources:
                        assert (one["policy"], one["num_solutions"], one["num_completions"]) == (before, 16, 0)
                        assert (one["temperature"], one["max_solution_tokens"]) == (1, 512)
                    assert selection["reward_model"] == f"{RUNS}/{policy}-{method}-8b"
                    assert (selection["num_candidates"], selection["max_kept"]) == (16, 1)
                    assert (selection["aggregate"], selection["test_size"]) == ("min", 0)
                    assert trained["dataset_name"] == selection["output_dir"]
                    assert (trained["model_name_or_path"], trained["learning_rate"]) == (before, rate)
                    assert (trained["kl_coef"], trained["num_train_epochs"]) == (0, 2)
                    before = trained["output_dir"]
                for dataset in ("gsm8k", "math500"):
                    assert policy_of(results[f"{name}-{dataset}"]) == before
        assert len(samples) == 4 + 2 * (4 + 3 * 2 * 4) and len(policies) == len(selections) == 18

    def test_number_of_iterations(self):
        """A learning rate per iteration."""
        found = listed("er_prm/table1.sh", "--learning_rates", "1e-6 2e-7")
        assert {name: one["learning_rate"] for name, one in settings_of(found, "kl-self").items()} == {
            f"{policy}-raft-{method}-{iteration}": rate
            for policy in ("mistral", "deepseek")
            for method in ("soft", "hard", "ours")
            for iteration, rate in ((1, 1e-6), (2, 2e-7))
        }

    def test_sweep(self, stages):
        """Section 4: η in {0.1, 1, 2, 5, 8, 10, 15} and four learning rates. The labels of an η are exported once."""
        models = settings_of(stages["sweep"], "reward")
        rates = {"5e-6", "2e-6", "1e-6", "5e-7"}
        assert models.keys() == {f"mistral-ours-{eta}-lr-{rate}-8b" for eta in ETAS[:-1] for rate in rates}
        assert all(one["learning_rate"] == float(name.split("-lr-")[1][:-3]) for name, one in models.items())
        exports = settings_of(stages["sweep"], "export")
        assert sorted(one["eta"] for one in exports.values()) == sorted(map(float, ETAS[:-1]))
        assert len(settings_of(stages["sweep"], "best-of-n")) == 2 * len(models)

    def test_the_layout_of_a_sweep(self, tmp_path):
        """The script writes the layout of its table: one series per test set and pair of values."""
        program = tmp_path / "bin" / "trl-hrm"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        words = ["--dry_run", "--runs", str(tmp_path / "runs"), "--etas", "1 2.5", "--learning_rates", "1e-6 5e-7"]
        words += ["--policies", "mistral deepseek"]
        path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        done = run_script("er_prm/sweep.sh", *words, env={"PATH": path})
        assert done.returncode == 0, done.stderr
        layout = read_layout(tmp_path / "runs" / "sweep.yaml")
        assert [(series.label, series.results) for series in layout.series] == [
            (
                [dataset.upper(), policy, f"eta={eta}, learning rate {rate}"],
                f"{policy}-{dataset}-{policy}-ours-{eta}-lr-{rate}-8b",
            )
            for policy in ("mistral", "deepseek")
            for eta in ("1", "2.5")
            for rate in ("1e-6", "5e-7")
            for dataset in ("gsm8k", "math500")
        ]
        written = {
            stage.settings["output_dir"] for stage in listed("er_prm/sweep.sh", *words) if stage.command != "table"
        }
        assert {str(tmp_path / "runs" / series.results) for series in layout.series} <= written


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("metamath", "### Instruction:\n{question}\n\n### Response: Let's think step by step."),
            ("deepseek_math", "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."),
            ("openmath2", "inside \\boxed{}.\n\n{question}"),
        ],
    )
    def test_the_question_is_the_only_placeholder(self, name, expected):
        prompt, _ = PromptConfig(prompt=str(ER_PRM / "prompts" / f"{name}.txt")).make_prompt()
        assert prompt.template.endswith(expected) and prompt.final_stops == ()
        assert prompt.text("Is {x} in {0}?").count("Is {x} in {0}?") == 1

    def test_each_policy_has_the_prompt_of_its_model_card(self, stages):
        found = {}
        for stage in (stage for one in stages.values() for stage in one if stage.command in ("annotate", "evaluate")):
            settings = stage.settings
            if (policy := policy_of(settings)) in POLICIES.values():
                assert settings["segmentation"] == "sentence"
                prompt = (settings["prompt"].split("/")[-1], settings["prompt_style"])
                assert found.setdefault(policy, prompt) == prompt
        assert found == {
            POLICIES["mistral"]: ("metamath.txt", "plain"),
            POLICIES["deepseek"]: ("deepseek_math.txt", "chat"),
            POLICIES["deepseek-rl"]: ("deepseek_math.txt", "chat"),
            POLICIES["openmath2"]: ("openmath2.txt", "chat"),
        }

    @pytest.mark.parametrize(
        ("solution", "answer", "steps"),
        [
            ("Ann sold 48/2 = 24 clips in May. She sold 48+24 = 72 clips.\n#### 72\nThe answer is: 72", "72", 3),
            ("Each box has $3\\cdot4=12$ pens.\nThe answer is: 12", "12", 2),
            ("Let $x$ be the number. Then $2x = 3$, so $x = 1.5$.\nThe answer is: \\frac{3}{2}", "1.5", 3),
        ],
    )
    def test_solutions_of_metamath(self, solution, answer, steps):
        """The wording of this policy: without an extractor for it, its accuracy would be 0."""
        assert judge(extract_answer(solution), answer).correct is True
        assert len(cut_text(solution, RULES["sentence"])) == steps


@pytest.fixture(scope="module")
def paper(shared_data) -> str:
    path = shared_data.parent / "papers" / "er_prm_paper.txt"
    if not path.is_file():
        pytest.skip(f"the text of the paper is not at {path}")
    return path.read_text(encoding="utf-8")


class TestPaper:
    @pytest.mark.parametrize("number", range(2, 11))
    def test_numbers(self, number, paper):
        """Every number of tables 2 to 10, as the text of the paper has it. Cells are separated by tabs."""
        layout = layout_of(number)
        rows = dict(re.findall(r"^(N=\d+|Top1@acc)\t(.+)$", paper.split(f"Table {number}:")[0], flags=re.MULTILINE))
        assert layout["points"][:5] == [4, 8, 16, 32, 64] and layout["points_in"] == "rows"
        for i, point in enumerate(layout["points"][:5]):
            cells = [float(cell) for cell in rows[f"N={point}"].split("\t") if cell.strip()]
            assert [series["paper"][i] for series in layout["series"]] == cells
        if "Top1@acc" in layout["points"]:
            printed = "".join(rows["Top1@acc"].split())  # some numbers are split by a tab
            tops = {series["label"][0]: series["paper"][5] for series in layout["series"]}
            assert all(series["paper"][5] == tops[series["label"][0]] for series in layout["series"])
            assert printed.startswith(f"{tops['GSM8K']:.2f}") and printed.endswith(f"{tops['MATH500']:.1f}")

    def test_table_1(self, paper):
        table = paper.split("Models\tMethods\tGSM8K\tMATH\n")[1].split("\n\n")[0]
        expected = [(name, [float(a), float(b)]) for name, a, b in re.findall(r"([\w-]+)\t([\d.]+)\t([\d.]+)", table)]
        assert [(series["label"][1], series["paper"]) for series in layout_of(1)["series"]] == expected
        assert [name for name, _ in expected] == 2 * ["Baseline", "Soft-Label", "Hard-Label", "ER-PRM"]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run(script, real_folder, tmp_path_factory):
    """The whole script with a real model. The scripts share their stages, as those of the paper do."""
    runs = tmp_path_factory.getbasetemp() / "er-prm-dry-run"
    words = [f"er_prm/{script}.sh", "--dry_run", "--runs", str(runs)]
    if script == "sweep":
        words += SMALL_SWEEP
    elif script == "table1":
        words += ["--learning_rates", "5e-7 3e-7"]  # two iterations
    done = run_script(*words, env={"MODEL": str(real_folder("smollm2"))})
    assert done.returncode == 0, done.stderr[-3000:]
    again = run_script(*words, env={"MODEL": str(real_folder("smollm2"))})
    assert again.returncode == 0 and again.stdout.count("done before") == len(re.findall("(?m)^== ", again.stdout)) > 0
    layout = read_layout(runs / "sweep.yaml" if script == "sweep" else ER_PRM / f"{script}.yaml")
    text = (runs / f"{script}.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    points = [f"N={point}" if isinstance(point, int) else point for point in layout.points]
    labels = [" / ".join(series.labels) for series in layout.series]
    if layout.points_in == "rows":  # a dry run has N = 4 and the greedy solution
        rows = [rows[0], rows[1], *(row for row in rows[2:] if row[0] in ("N=4", "Top1@acc"))]
        points, labels = labels, [point for point in points if point in ("N=4", "Top1@acc")]
    assert rows[0][1:] == points and [row[0] for row in rows[2:]] == labels
    assert all(re.match(r"[\d.]+ \[", cell) for row in rows[2:] for cell in row[1:])
    assert f"# {layout.title}" in done.stdout and "no results" not in text
    assert script == "table1" or list((runs / f"{script}_files").glob("*.png"))
