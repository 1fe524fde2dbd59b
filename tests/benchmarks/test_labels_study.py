"""The study of labels: the scripted judges, budgets and wrong labels by hand, planted results, and a short run of the study."""

import importlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.demo.pipeline import DATASET
from trl_hrm.scoring.judge_templates import JudgeTemplate
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.run_folder import node_files


PROBLEM = "Start with 4. a+3 b*2 c-3 d*3. Work modulo 5."
RIGHT = ["a:4+3=2", "b:2*2=4", "c:4-3=1", "d:1*3=3", "# Answer\n3"]
CORRECTED = ["a:4+3=2", "b:1*2=2", "Wait,b:2*2=4", "c:4-3=1", "d:1*3=3", "# Answer\n3"]
UNCORRECTED = ["a:4+3=2", "b:1*2=2", "c:2-3=4", "d:4*3=2", "# Answer\n2"]


@pytest.fixture(scope="module")
def scripts():
    """The scripts `labels_study` and `evidence`, which import their neighbours."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("labels_study"), importlib.import_module("evidence")
    sys.path.pop(0)


@pytest.fixture(scope="module")
def study(scripts):
    return scripts[0]


class TestJudges:
    def test_first_error(self, study):
        assert [study.first_error(PROBLEM, steps) for steps in (RIGHT, CORRECTED, UNCORRECTED)] == [-1, 1, 1]

    def shares(self, study, name, steps, number=4000) -> dict[int, float]:
        drawn = Counter(study.BELIEFS[name](PROBLEM, steps, random.Random(i)) for i in range(number))
        return {place: count / number for place, count in drawn.items()}

    def test_independent(self, study):
        """The same rate of errors on every solution, each other place equally often. 4,000 draws have a standard error below 0.6 %."""
        for steps, truth in ((RIGHT, -1), (CORRECTED, 1), (UNCORRECTED, 1)):
            shares = self.shares(study, "independent", steps)
            assert shares.pop(truth) == pytest.approx(0.85, abs=0.02)
            assert set(shares) == set(range(-1, len(steps))) - {truth}
            assert all(share == pytest.approx(0.15 / len(steps), abs=0.02) for share in shares.values())

    def test_lenient(self, study):
        """It overlooks half of the errors that the solution corrects, and hardly any other error."""
        corrected, uncorrected = (self.shares(study, "lenient", steps) for steps in (CORRECTED, UNCORRECTED))
        assert corrected[-1] == pytest.approx(0.5 + 0.5 * 0.03 / 6, abs=0.03)
        assert corrected[1] == pytest.approx(0.5 * 0.97, abs=0.03)
        assert uncorrected[1] == pytest.approx(0.97, abs=0.02)
        assert self.shares(study, "lenient", RIGHT)[-1] == pytest.approx(0.97, abs=0.02)

    @pytest.mark.parametrize("steps", [RIGHT, CORRECTED, UNCORRECTED])
    def test_responses(self, study, steps):
        """The judge reads the prompt of the built-in template, and its response is read as its vote."""
        template, chat = JudgeTemplate.load("first_error"), study.CharacterChat()
        prompt = chat.decode(template.encode(chat, PROBLEM, steps))
        votes = []
        for i in range(300):
            text = study.respond(prompt, random.Random(i), name="independent", seed=3)
            votes.append(template.read_first_error(text, "eos", len(steps)).vote)
        ((belief, count), *_) = Counter(votes).most_common()
        rng = random.Random(f"3 independent {PROBLEM} {study.solution_text(steps)}")
        assert belief == study.believe_independent(PROBLEM, steps, rng)
        assert count / 300 == pytest.approx(0.9, abs=0.06)
        assert set(votes) <= set(range(-1, len(steps)))


class TestWrongLabels:
    def build(self, study, tmp_path, rows, name="dataset") -> str:
        file, output = tmp_path / f"{name}.jsonl", tmp_path / name
        study.write_rows(file, rows)
        build_stepwise(BuildStepwiseConfig(inputs=[str(file)], output_dir=str(output), **DATASET))
        return str(output)

    def test_by_hand(self, study, tmp_path):
        """
        Steps of the tree: a, b right, c, d, answer; b wrong, c, d, answer. Labels of at least 0.5 of wrong steps and smaller ones of
        right steps are wrong: the right b (0.4), and the wrong c (0.5).
        """
        rows = [
            {"prompt": PROBLEM, "completions": RIGHT, "labels": [1, 0.4, 1, 1, None]},
            {"prompt": PROBLEM, "completions": UNCORRECTED, "labels": [1, 0.1, 0.5, 0, None]},
        ]
        output = tmp_path / "measures" / "labels.json"
        study.measure_labels(self.build(study, tmp_path, rows), None, "", str(output))
        assert json.loads(output.read_text()) == {
            "problems": 1,
            "labels": 7,
            "wrong": pytest.approx(2 / 7),
            "kept": None,
        }

    def test_kept_solutions(self, study, tmp_path):
        """A problem beyond the budget does not count. Of the other problem, one of two solutions is kept."""
        other = "Start with 0. a+2 b*2 c+2 d*3. Work modulo 5."
        whole = [{"prompt": PROBLEM, "completions": steps, "labels": [1] * 5} for steps in (RIGHT, UNCORRECTED)]
        beyond = {"prompt": other, "completions": ["a:0+2=2"], "labels": [1]}
        kept, everything = (
            self.build(study, tmp_path, rows, name) for rows, name in ((whole[:1], "kept"), ([*whole, beyond], "all"))
        )
        study.write_rows(tmp_path / "beyond.jsonl", [{"problem": other}])
        output = tmp_path / "labels.json"
        study.measure_labels(kept, everything, str(tmp_path / "beyond.jsonl"), str(output))
        found = json.loads(output.read_text())
        assert (found["kept"], found["wrong"], found["labels"]) == (0.5, 0.0, 5)

    def test_to_the_first_error(self, study, tmp_path):
        """The right branch keeps its labels, the wrong one loses those after b. A step without a label is no error."""
        rows = [
            {"prompt": PROBLEM, "completions": RIGHT, "labels": [1, None, 1, 0.5, 0]},
            {"prompt": PROBLEM, "completions": UNCORRECTED, "labels": [1, 0, 1, 0, 1]},
        ]
        before = self.build(study, tmp_path, rows)
        study.keep_to_first_error(before, str(tmp_path / "first"))
        (old,), (new,) = map(study.read_dataset, (before, tmp_path / "first"))
        assert old.labels == [1, None, 1, 0.5, 0, 0, 1, 0, 1]
        assert new.labels == [1, None, 1, 0.5, 0, 0, None, None, None]
        assert (new.prompt, new.completions, new.parents) == (old.prompt, old.completions, old.parents)

    def test_checker(self, study, tmp_path):
        rows = [{"prompt": PROBLEM, "completions": CORRECTED, "labels": [None, 0, None, None, None, None]}]
        study.check_steps(self.build(study, tmp_path, rows), str(tmp_path / "checked.jsonl"))
        (row,) = study.read_rows(tmp_path / "checked.jsonl")
        assert row["labels"] == [1, 0, 1, 1, 1, 1]


def planted(study, part: str) -> dict:
    """Results in which the first arm of the first pair is better by about 10 points, and all other arms are equal on average."""
    best = study.PAIRS[part][0][0]
    rng = random.Random(0)
    models = {
        name: {
            measure: [0.5 + 0.1 * (name == best) + 0.01 * rng.random() for _ in range(3)] for measure in study.MEASURES
        }
        for name in study.PARTS[part]
    }
    budget = dict.fromkeys(
        ("tokens", "problems_mc", *(f"{key}_{kind}" for key in KEYS for kind in ("consensus", "judge"))), 0.25
    )
    labels = {"problems": 10, "labels": 100, "wrong": 0.125, "kept": None}
    return {
        "models": models,
        "labels": {arm.dataset: [labels] * 3 for arm in study.PARTS[part].values()},
        "budgets": {name: [budget] * 3 for name in study.BELIEFS},
        "baselines": {f"{way}_{n}": 0.75 for way in ("majority_vote", "pass_at_n") for n in study.SIZES},
        "outcome_share": 0.125,
        "settings": vars(study.make_parser().parse_args([])),
        "date": "2026-01-01",
        "minutes": 1.0,
        "versions": {"Python": "3"},
    }


KEYS = ("problems", "tokens", "judge_share", "verdicts_wrong", "verdicts_undecided")


class TestReport:
    @pytest.mark.parametrize("part", ["labels", "outcomes"])
    def test_settled(self, study, part):
        """The planted difference is settled in the right direction, in every pair that has the arm."""
        results = planted(study, part)
        best, other = study.PAIRS[part][0]
        section = study.report(results, part)
        assert section.startswith(study.HEADINGS[part] + "\n")
        for measure in study.MEASURES.values():
            titles = [study.PARTS[part][name].title for name in (best, other)]
            assert f"- {titles[0]} − {titles[1]}, {measure}: above 0" in section
        rows = [line for line in section.splitlines() if line.startswith(f"| {titles[0]} |")]
        mean = sum(results["models"][best]["auroc"]) / 3
        assert f" {100 * mean:.1f} (" in rows[0]

    @pytest.mark.parametrize("part", ["labels", "outcomes"])
    def test_two_seeds_settle_nothing(self, study, part):
        results = planted(study, part)
        results["models"] = {
            name: {measure: values[:2] for measure, values in found.items()}
            for name, found in results["models"].items()
        }
        section = study.report(results, part)
        assert "0 of the" in section and "above 0" not in section

    @pytest.mark.parametrize("part", ["labels", "outcomes"])
    def test_picture(self, study, part):
        figure = study.draw(planted(study, part), part)
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            arm.title for arm in study.PARTS[part].values()
        ]

    def test_pairs(self, study):
        for part, pairs in study.PAIRS.items():
            assert len(set(pairs)) == len(pairs)
            assert all(ours != theirs and {ours, theirs} <= set(study.PARTS[part]) for ours, theirs in pairs)
        shared = set(study.LABELS) & set(study.OUTCOMES)
        assert all(study.LABELS[name].dataset == study.OUTCOMES[name].dataset for name in shared)


def test_the_sections_are_kept(scripts):
    """`benchmarks/evidence.py` writes the page again without them otherwise."""
    study, evidence = scripts
    assert set(study.HEADINGS.values()) <= {f"## {title}" for title in evidence.KEPT}


def test_numbers_of_the_labels_page(scripts):
    """Each row of the tables of `docs/labels.md` has the means of a row of `docs/evidence.md`, in the same order."""
    docs = Path(__file__).parents[2] / "docs"
    page, evidence = ((docs / name).read_text("utf-8") for name in ("labels.md", "evidence.md"))
    measured = page.partition("## Measured here")[2].partition("## Human labels")[0]
    rows = [means_of(line) for line in measured.splitlines() if line.startswith("| ")]
    sections = "".join(evidence.partition(heading)[2].partition("## ")[0] for heading in scripts[0].HEADINGS.values())
    known = [means_of(line) for line in sections.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row]
    assert len(rows) == 16
    for row in rows:
        assert any(is_part(row, other) for other in known), row


def means_of(line: str) -> list[str]:
    """The first number of each cell of a row, except for the title."""
    cells = [cell.strip().split(" ")[0] for cell in line.split("|")[2:-1]]
    return [cell for cell in cells if cell.replace(".", "").isdigit()]


def is_part(row: list[str], other: list[str]) -> bool:
    rest = iter(other)
    return all(number in rest for number in row)


@pytest.fixture(scope="module")
def short(study, tmp_path_factory):
    """A short run: one seed and the kinds of arms. Returns its results and its folder."""
    folder = tmp_path_factory.mktemp("study")
    docs = folder / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "evidence.md").write_text("# Evidence\n\n## What would need a GPU\n\nMuch.\n", encoding="utf-8")
    arms = [
        "mc-soft",
        "mc-half-first",
        "consensus-weighted",
        "judge",
        "progress",
        "orm",
        "implicit-prefix",
        "hrm-checker",
    ]
    sizes = {"num_problems": 40, "num_whole": 130, "num_test": 20, "num_held_out": 30}
    sizes |= {"policy_steps": 300, "reward_steps": 8}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    options += ["--output_dir", str(folder / "out"), "--docs", str(docs), "--seeds", "7", "--arms", *arms]
    args = study.make_parser().parse_args(options)
    study.main(args)
    return json.loads((folder / "out" / "results.json").read_text("utf-8")), folder, args


@pytest.mark.slow
class TestShortRun:
    def test_budgets(self, study, short):
        """
        Recomputed from the samples and the verdicts: the problems that consensus and the judge alone use cost at most the budget, and one
        more problem costs more.
        """
        results, folder, args = short
        out, tokenizer = folder / "out", study_tokenizer(folder)
        (budget,) = results["budgets"]["independent"]
        sampled = tokens_of(out / "runs" / "mc-7")
        assert budget["tokens"] == sum(sampled.values()) and len(sampled) == args.num_problems
        for name, judged in (("consensus", "mc"), ("judge", "whole")):
            cost = tokens_of(out / "judged" / f"{judged}-independent-7")
            for row in study.read_rows(
                out / "judged" / f"{judged}-independent-7" / "judges" / "judge" / "verdicts.jsonl"
            ):
                assert len(row["judge_votes"]) == 3
                length = len(tokenizer("\n\n".join(row["completions"]))["input_ids"])
                cost[row["prompt"]] += 3 * (length + 1 + 8)
            order = [row["problem"] for row in study.read_rows(out / "problems" / "7.jsonl") if row["problem"] in cost]
            number = budget[f"problems_{name}"]
            total = sum(cost[problem] for problem in order[:number])
            assert total == budget[f"tokens_{name}"] <= budget["tokens"] < total + cost[order[number]]
            unused = study.read_rows(out / "budgets" / "independent-7" / f"{name}.jsonl")
            assert [row["problem"] for row in unused] == order[number:]
        assert results["labels"]["judge"][0]["problems"] == budget["problems_judge"]
        assert results["labels"]["consensus-weighted"][0]["problems"] <= budget["problems_consensus"]
        assert 0.05 < budget["verdicts_wrong_judge"] < 0.3

    def test_labels(self, short):
        labels = short[0]["labels"]
        assert labels["hrm-checker"][0]["wrong"] == 0
        assert labels["orm"][0]["wrong"] == 0  # outcomes are certain
        assert labels["consensus-weighted"][0]["wrong"] < labels["mc-soft"][0]["wrong"]

    def test_section(self, study, short):
        results, folder, _ = short
        page = (folder / "docs" / "evidence.md").read_text("utf-8")
        assert page.index(study.HEADINGS["labels"]) < page.index(study.HEADINGS["outcomes"])
        assert page.index(study.HEADINGS["outcomes"]) < page.index("## What would need a GPU")
        for part, arms in study.PARTS.items():
            assert (folder / "docs" / study.PICTURES[part]).read_bytes().startswith(b"\x89PNG")
            for name, arm in arms.items():
                assert (f"| {arm.title} |" in page) == (name in results["models"])
        assert all(0 < value[0] < 1 for found in results["models"].values() for value in found.values())

    def test_resume(self, study, short):
        """The same command repeats nothing and writes the same results."""
        results, folder, args = short
        study.main(args)
        assert json.loads((folder / "out" / "results.json").read_text("utf-8")) == results


def tokens_of(run: Path) -> Counter:
    """Sampled tokens of each problem, node by node: split solutions only once."""
    found: Counter = Counter()
    for file in node_files(run):
        for tree in read_trees(file):
            found[tree.problem.prompt] += sum(len(node.token_ids) for node in tree.nodes if node.role != "segment")
    return found


def study_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "out" / "policy")
