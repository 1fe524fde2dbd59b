"""The command `evaluate`: a scripted policy whose accuracies are counted by hand, comparisons, resumed runs, and errors."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trl_hrm import BestOfNConfig, EvaluateConfig, ReportConfig, StepFormat, best_of_n, evaluate, report
from trl_hrm.cli import main
from trl_hrm.evaluation import policy_evaluation
from trl_hrm.evaluation.policy_evaluation import measures
from trl_hrm.evaluation.results import load_candidates, load_results
from trl_hrm.intervals import difference_interval, mean_interval
from trl_hrm.scripts import evaluate as script
from trl_hrm.search.engines.base import EngineError, Sample, ScriptedEngine
from trl_hrm.search.policy_config import PolicyConfig

from ..fakes import write_rows
from ..helpers import tiny_tokenizer
from ..search.scripted import ExactGrade


# Answers of the samples and of greedy decoding to four problems, whose answer is 7. "long" does not end in time.
ANSWERS = {
    "base": {"a": [7, 7, 8, None], "b": [8, 8, 7, 9], "c": [None, None, None, "long"], "d": [7, 7, 7, 7]},
    "tuned": {"a": [7, 7, 7, 8], "b": [7, 7, 8, 9], "c": [8, None, None, None], "d": [7, 7, 7, None]},
}
GREEDY = {"base": {"a": 7, "b": 8, "c": None, "d": 7}, "tuned": {"a": 7, "b": 7, "c": None, "d": 8}}
EXPECTED = {
    "base": {
        "greedy": 2 / 4,
        "pass@1": (2 + 1 + 0 + 4) / 16,
        "majority@4": 2 / 4,
        "pass@2": (5 / 6 + 1 / 2 + 0 + 1) / 4,  # 1 - C(wrong, 2) / C(4, 2)
        "pass@4": 3 / 4,
    },
    "tuned": {
        "greedy": 2 / 4,
        "pass@1": (3 + 2 + 0 + 3) / 16,
        "majority@4": 3 / 4,
        "pass@2": (1 + 5 / 6 + 0 + 1) / 4,
        "pass@4": 3 / 4,
    },
}


class Engine(ScriptedEngine):
    """Writes the answers of `ANSWERS` and `GREEDY`, and counts the samples."""

    num_samples = Counter()

    def __init__(self, config: PolicyConfig):
        super().__init__(None)
        self.config = config
        self.policy = Path(config.policy).name

    async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
        problem = self.tokenizer.decode(prefix_ids).partition("?")[0][-1]
        is_greedy = self.config.temperature == 0
        self.num_samples[self.policy, "greedy" if is_greedy else "samples"] += n
        answers = [GREEDY[self.policy][problem]] if is_greedy else ANSWERS[self.policy][problem]
        assert n == len(answers)
        samples = []
        for number, answer in enumerate(answers):
            if answer == "long":
                text = "and so on " * 10
                samples.append(Sample(self.tokenizer.encode(text)[:max_tokens], text[:max_tokens], "length"))
                continue
            text = f"Way {number}." + ("" if answer is None else f"\n\n# Answer\n\n{answer}")
            samples.append(Sample([*self.tokenizer.encode(text), self.tokenizer.eos_token_id], text, "eos"))
        return samples

    def describe(self):
        names = ("engine", "temperature", "top_p", "top_k")
        return {name: getattr(self.config, name) for name in names} | {"model": self.config.policy, "torch": "2"}


class Grader:
    """Equal strings are right, and 13 is never graded in time."""

    def __init__(self, num_workers: int = 1, timeout: float = 10.0):
        pass

    def grade(self, answer, reference, is_reference=True):
        return ExactGrade(None, "timeout") if answer == "13" else ExactGrade(answer == reference)

    async def agrade(self, answer, reference):
        return self.grade(answer, reference)

    def describe(self):
        return {"rules": 1, "sympy": "1.13"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """Two scripted policies `base` and `tuned`, and four problems `a` to `d`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PolicyConfig, "load_engine", lambda config, shard=None: Engine(config))
    monkeypatch.setattr("trl_hrm.grading.AnswerGrader", Grader)
    monkeypatch.setattr(script, "_check_policy", lambda *args: None)  # the policies have no weights
    monkeypatch.setattr(Engine, "num_samples", Counter())
    for name in ANSWERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    write_rows(
        tmp_path / "problems.jsonl", [{"problem": f"What is {one}?", "answer": "7", "id": one} for one in "abcd"]
    )
    return tmp_path


def config(**changes) -> EvaluateConfig:
    settings = {"policy": "base", "engine": "transformers", "problems": "problems.jsonl", "n": [1, 2, 4]}
    settings |= {"prompt": "question", "prompt_style": "plain", "extractors": "marker", "max_solution_tokens": 60}
    return EvaluateConfig(**settings | {"output_dir": "out"} | changes)


def accuracies(results) -> dict[str, float]:
    """Return the measures without majority@2, whose subsets are tested with the curves."""
    return {name: point["accuracy"] for name, point in measures(results.curves).items() if name != "majority@2"}


class TestOnePolicy:
    def test_accuracies(self, work, capsys):
        """Counted by hand in `EXPECTED`."""
        found = evaluate(config())
        results = load_results("out")
        assert accuracies(results) == pytest.approx(EXPECTED["base"])
        assert found.policies[0].results == results and found.comparison is None
        assert list(results.curves)[0] == "greedy" and [point["n"] for point in results.curves["greedy"]] == [1]
        low, high = mean_interval(np.array([1.0, 0.0, 0.0, 1.0]))
        assert results.curves["greedy"] == [{"n": 1, "accuracy": 0.5, "low": low, "high": high}]
        low, high = mean_interval(np.array([0.5, 0.25, 0.0, 1.0]))
        assert results.curves["pass_at_n"][0] == {"n": 1, "accuracy": 7 / 16, "low": low, "high": high}
        assert (results.strategy, results.reward_model, results.num_problems) == ("evaluate", None, 4)
        assert results.hacking_gap == {} and results.calibration == {}

    def test_counts(self, work):
        """Solutions without an answer and those that were cut off are counted, for samples and for greedy decoding."""
        found = evaluate(config())
        counts = load_results("out").counts
        names = ("num_candidates", "candidates_without_answer", "candidates_cut_off")
        assert [counts[name] for name in names] == [16, 5, 1]
        assert [counts[f"greedy_{name}"] for name in names] == [4, 1, 0]
        [line] = [line for line in str(load_results("out")).splitlines() if line.startswith("counted: ")]
        assert line.endswith("5 candidates without answer, 1 candidates cut off, 1 greedy candidates without answer")
        assert load_results("out").solutions == {"right": 7, "wrong": 4, "cut_off_by_tokens": 1, "without_answer": 4}
        assert found.policies[0].greedy_solutions == {"right": 2, "wrong": 1, "without_answer": 1}
        assert "43.8 % correct" in str(found) and "greedy decoding, 4 solutions: 50.0 % correct" in str(found)

    def test_cost(self, work):
        """It includes greedy decoding."""
        evaluate(config())
        cost = load_results("out").cost
        assert cost["policy"]["num_sequences"] == 16 + 4 and "scorer" not in cost

    def test_printed_table(self, work, capsys):
        assert main(
            "evaluate --policy base --engine transformers --problems problems.jsonl --n 2 4 --prompt question --prompt_style plain "
            "--extractors marker --max_solution_tokens 60 --output_dir out".split()
        ) == 0  # fmt: skip
        printed = capsys.readouterr().out
        assert "\naccuracy, %  base\ngreedy       50.0 (" in printed and "\npass@1       43.8 (" in printed
        assert "Next: trl-hrm best-of-n --candidates out/samples --reward_model MODEL" in printed

    def test_files(self, work):
        evaluate(config())
        assert sorted(path.name for path in Path("out").iterdir()) == [
            "accuracy.png",
            "candidates.jsonl",
            "greedy",
            "results.json",
            "samples",
        ]
        assert not list(Path("out").rglob("part*"))
        with Image.open("out/accuracy.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
        [rows] = [list(load_candidates("out"))]
        assert [candidate.correct for candidate in rows[0].candidates] == [True, True, False, None]

    def test_the_pool_serves_best_of_n(self, work, monkeypatch):
        """The same solutions, so the same pass@N."""

        class Scorer:
            tokenizer, step_format, max_positions = tiny_tokenizer(), StepFormat(), None

            def score(self, prompts, candidates, spans=(1,), combine="max", progress=False):
                return [[[0.5] * len(steps) for steps in group] for group in candidates]

        evaluate(config())
        monkeypatch.setattr(BestOfNConfig, "load_scorer", lambda config, *_: Scorer())
        monkeypatch.setattr(BestOfNConfig, "describe_identity", lambda config, scorer: {})
        selected = best_of_n(BestOfNConfig(candidates="out/samples", reward_model="m", n=[1, 2, 4], output_dir="bon"))
        for curve in ("pass_at_n", "majority_vote"):
            assert selected.curves[curve] == load_results("out").curves[curve]
        again = best_of_n(BestOfNConfig(candidates="out/greedy", reward_model="m", n=[1], output_dir="one"))
        assert again.curves["pass_at_n"] == load_results("out").curves["greedy"]

    def test_report(self, work):
        evaluate(config(policy=["base", "tuned"]))
        printed = report(ReportConfig(inputs=["out/base", "out/tuned"], output="report.html"))
        page = Path("report.html").read_text(encoding="utf-8")
        assert "no curve of a reward model" in printed
        assert "greedy decoding" in page and "43.8" in page and len(list(Path("report_files").glob("*.png"))) == 1


class TestSeveralPolicies:
    def test_accuracies_and_differences(self, work):
        found = evaluate(config(policy=["base", "tuned"]))
        for name, expected in EXPECTED.items():
            assert accuracies(load_results(Path("out", name))) == pytest.approx(expected)
        [compared] = found.comparison["policies"].values()
        assert compared["num_problems"] == 4
        for name, paired in {
            "greedy": [0, 1, 0, -1],
            "pass@1": [0.25, 0.25, 0, -0.25],
            "pass@4": [0, 0, 0, 0],
            "majority@4": [0, 1, 0, 0],
        }.items():
            low, high = difference_interval(np.array(paired, float))
            expected = {"difference": sum(paired) / 4, "low": low, "high": high}
            assert compared["differences"][name] == pytest.approx(expected)
        assert json.loads(Path("out/comparison.json").read_text()) == {
            "first": "base",
            "policies": {"tuned": compared},
        }
        with Image.open("out/comparison.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10

    def test_table(self, work):
        """One row for each measure, in the terminal and on the page."""
        printed = str(evaluate(config(policy=["base", "tuned"], n=[4]))).splitlines()
        table = printed[printed.index("") + 1 :]
        table = table[: table.index("")]
        assert [line.split("  ")[0] for line in table] == ["accuracy, %", "greedy", "pass@1", "majority@4", "pass@4"]
        assert table[0].split() == ["accuracy,", "%", "base", "tuned", "difference"]
        assert " 43.8 (" in table[2] and " 50.0 (" in table[2] and " +6.2 (" in table[2] and " 0.0 (" in table[1]
        page = Path("out/comparison.md").read_text(encoding="utf-8")
        assert "| accuracy, % | base | tuned | difference |" in page and "| pass@1 | 43.8 (" in page
        assert "over the 4 of 4 problems" in page and "![Accuracy of each policy](comparison.png)" in page

    def test_problems_without_a_grade(self, work, monkeypatch):
        """They count for the accuracies as far as they are graded, but there is no difference for them."""
        monkeypatch.setitem(ANSWERS, "tuned", ANSWERS["tuned"] | {"a": [13, 7, 7, 8]})
        monkeypatch.setitem(GREEDY, "base", GREEDY["base"] | {"b": 13})
        found = evaluate(config(policy=["base", "tuned"], n=[4]))
        [compared] = found.comparison["policies"].values()
        assert compared["num_problems"] == 2 and compared["differences"]["pass@1"]["difference"] == -0.25 / 2
        assert accuracies(found.policies[1].results)["pass@1"] == pytest.approx((2 / 3 + 2 / 4 + 0 + 3 / 4) / 4)
        assert accuracies(found.policies[0].results)["greedy"] == 2 / 3
        assert "over the 2 of 4 problems in which all solutions of both are graded" in str(found)

    def test_no_answers(self, work, monkeypatch):
        """The majority vote of a policy that answers nothing is 0, for the first policy and for others."""
        monkeypatch.setitem(ANSWERS, "tuned", dict.fromkeys("abcd", [None] * 4))
        monkeypatch.setitem(GREEDY, "tuned", dict.fromkeys("abcd"))
        for policies, difference in ((["base", "tuned"], -0.5), (["tuned", "base"], 0.5)):
            found = evaluate(config(policy=policies, n=[4], overwrite=True))
            [compared] = found.comparison["policies"].values()
            assert compared["differences"]["majority@4"]["difference"] == difference
        assert load_results("out/tuned").solutions == {"without_answer": 16}
        low, high = mean_interval(np.zeros(4))
        expected = [{"n": n, "accuracy": 0.0, "low": low, "high": high} for n in (1, 4)]
        assert load_results("out/tuned").curves["majority_vote"] == expected


class TestResume:
    def test_a_stop_at_the_second_policy(self, work, monkeypatch):
        """The samples of the first policy are kept, and results are only written once all policies are complete."""

        def load(config, shard=None):
            if config.policy == "tuned":
                raise OSError("no memory")
            return Engine(config)

        with monkeypatch.context() as patch:
            patch.setattr(PolicyConfig, "load_engine", load)
            with pytest.raises(OSError, match="no memory"):
                evaluate(config(policy=["base", "tuned"]))
        assert not list(Path("out").rglob("results.json"))
        before = Engine.num_samples.copy()
        assert before == {("base", "samples"): 16, ("base", "greedy"): 4}
        found = evaluate(config(policy=["base", "tuned"]))
        assert Engine.num_samples == before + Counter({("tuned", "samples"): 16, ("tuned", "greedy"): 4})
        assert [accuracies(one.results) for one in found.policies] == list(map(pytest.approx, EXPECTED.values()))

    def test_a_stop_while_grading(self, work, monkeypatch):
        from trl_hrm.evaluation import best_of_n as module

        monkeypatch.setattr(module, "BLOCK", 1)
        graded = []

        def stop(block, *args):
            if len(graded) == 3:
                raise KeyboardInterrupt
            graded.append(block[0][1].problem_id)
            return score_block(block, *args)

        score_block = module._score_block
        monkeypatch.setattr(module, "_score_block", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config())
        monkeypatch.setattr(
            module,
            "_score_block",
            lambda block, *args: graded.append(block[0][1].problem_id) or score_block(block, *args),
        )
        evaluate(config())
        assert graded == [*"abcd", *"abcd"]  # the samples, then greedy decoding
        assert accuracies(load_results("out")) == pytest.approx(EXPECTED["base"])
        assert Engine.num_samples == {("base", "samples"): 16, ("base", "greedy"): 4}

    def test_a_stop_while_writing(self, work, monkeypatch):
        """Results are written last, because the command refuses to replace them."""

        def stop(*args):
            write_comparison(*args)
            raise KeyboardInterrupt

        write_comparison = policy_evaluation.write_comparison
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(policy_evaluation, "write_comparison", stop)
            evaluate(config(policy=["base", "tuned"]))
        found = evaluate(config(policy=["base", "tuned"]))
        assert Engine.num_samples.total() == 40
        assert [accuracies(one.results) for one in found.policies] == list(map(pytest.approx, EXPECTED.values()))

    def test_finished_results(self, work):
        evaluate(config(policy=["base", "tuned"]))
        with pytest.raises(FileExistsError, match="comparison.md exists"):
            evaluate(config(policy=["base", "tuned"]))
        with pytest.raises(FileExistsError, match="results.json exists"):
            evaluate(config(output_dir="out/base"))
        found = evaluate(config(policy=["base", "tuned"], n=[1, 4], overwrite=True))
        assert Engine.num_samples.total() == 40 and [one.results.n for one in found.policies] == [[1, 4]] * 2

    def test_other_settings(self, work):
        """A run of other samples is not mixed with these."""
        evaluate(config())
        for changes in ({"n": [2]}, {"temperature": 0.5}, {"where": {"id": "a"}}, {"seed": 1}):
            with pytest.raises(ValueError, match="started with different settings"):
                evaluate(config(overwrite=True, **changes))
        assert accuracies(load_results("out")) == pytest.approx(EXPECTED["base"])

    def test_two_processes(self, work, monkeypatch):
        """Each process samples and grades its problems, and the first one merges them."""
        evaluate(config(policy=["base", "tuned"], output_dir="alone"))
        for rank in (1, 0):  # the first one would wait for the second one
            for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
                monkeypatch.setenv(name, str(value))
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            found = evaluate(config(policy=["base", "tuned"]))
            assert (found is None) == (rank == 1)
        for name in ("base", "tuned"):
            alone, both = (load_results(Path(folder, name)) for folder in ("alone", "out"))
            assert (both.curves, both.counts, both.solutions) == (alone.curves, alone.counts, alone.solutions)
        assert Path("out/comparison.json").read_bytes() == Path("alone/comparison.json").read_bytes()
        assert len(list(Path("out/base/samples").glob("log-*"))) == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"problems": None}, "`problems` is missing"),
            ({"temperature": 0}, "`temperature` is 0, so all samples of a problem would be the same"),
            ({"policy": ["x/base", "x--base"]}, "would be saved in the folder 'x--base'"),
            ({"policy": []}, "`policy` is empty"),
            ({"n": [0]}, "`n` is 0"),
            ({"max_solution_tokens": 0}, "`max_solution_tokens` is 0"),
        ],
    )
    def test_settings(self, changes, message):
        with pytest.raises(ValueError, match=message):
            config(**changes)

    def test_n_always_has_1(self):
        assert config(n=[8, 4, 8]).n == [1, 4, 8]

    def test_policies_are_checked_first(self, work, monkeypatch, policy):
        """A policy whose weights do not fit must not be found after the others are sampled."""
        monkeypatch.undo()
        monkeypatch.chdir(work)
        shutil.copytree(policy, "damaged")
        weights = Path("damaged/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="damaged"):
            evaluate(config(policy=[policy, "damaged"]))
        assert not list(Path("out").rglob("*.json*"))
        with pytest.raises(OSError, match="missing"):
            evaluate(config(policy=[policy, "missing/policy"]))

    def test_another_folder(self, work):
        """Candidates that another program wrote are not replaced."""
        Path("out").mkdir()
        Path("out/candidates.jsonl").write_text("{}")
        with pytest.raises(FileExistsError, match="was not written by"):
            evaluate(config())


class TestFaults:
    def test_failed_requests(self, work, monkeypatch):
        """Problems without solutions are missing in the accuracies, which the command says."""

        class Failing(Engine):
            async def sample(self, prefix_ids, *args, **kwargs):
                is_greedy = self.config.temperature == 0
                if f"What is {'d' if is_greedy else 'a'}?" in self.tokenizer.decode(prefix_ids):
                    raise EngineError("the server is gone")
                return await super().sample(prefix_ids, *args, **kwargs)

        monkeypatch.setattr(PolicyConfig, "load_engine", lambda config, shard=None: Failing(config))
        printed = str(evaluate(config()))
        remedy = "Run the same command with --overwrite to retry failed requests. Finished samples are kept."
        assert f"warning: 1 problems without samples do not count: 1 with failed requests. {remedy}" in printed
        assert (
            f"warning: 1 problems without a greedy solution do not count: 1 with failed requests. {remedy}" in printed
        )
        assert accuracies(load_results("out"))["pass@1"] == pytest.approx((1 + 0 + 4) / 12)
        monkeypatch.setattr(PolicyConfig, "load_engine", lambda config, shard=None: Engine(config))
        assert "do not count" not in str(evaluate(config(overwrite=True)))
        assert accuracies(load_results("out")) == pytest.approx(EXPECTED["base"])
        assert Engine.num_samples == {("base", "samples"): 16, ("base", "greedy"): 4}
