"""The λ study: same measurement and same batches for every λ, and a table that matches the results. Slow: the paper's order."""

import copy
import json
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_hrm.tiny_model import make_tiny_model


ROOT = Path(__file__).resolve().parents[2]
NUM_PROBLEMS = 14


def load_study():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for `python benchmarks/lambda_study.py`
    try:
        spec = util.spec_from_file_location("lambda_study", ROOT / "benchmarks" / "lambda_study.py")
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def study():
    return load_study()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that answers 1 or 2 about equally often, and problems whose answer is 1 in one half and 2 in the other."""
    folder = tmp_path_factory.mktemp("policy")
    prompts = [f"Say {'abcdefghijklmn'[i]}." for i in range(NUM_PROBLEMS)]
    answers = [f"# Answer\n\n{k}\n# END!" for k in (1, 2)]
    make_tiny_model([*prompts, *answers], folder, "causal", hidden_size=32, num_layers=1, vocab_size=300)
    tokenizer, model = (auto.from_pretrained(folder) for auto in (AutoTokenizer, AutoModelForCausalLM))
    rows = [
        tokenizer.encode(prompt) + tokenizer.encode(answer) + [tokenizer.eos_token_id]
        for prompt in prompts
        for answer in answers
    ]
    ids = torch.tensor(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    with open(folder / "problems.jsonl", "w", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            file.write(json.dumps({"problem": prompt, "answer": str(1 + i % 2)}) + "\n")
    return folder


def arguments(study, folder, output, *options: str):
    given = ["--policy", str(folder), "--problems", str(folder / "problems.jsonl"), "--output_dir", str(output)]
    small = [
        "--max_steps",
        "4",
        "--measure_every",
        "2",
        "--num_samples",
        "8",
        "--batch_size",
        "4",
        "--max_tokens",
        "24",
    ]
    return study.make_parser().parse_args([*given, *small, *options])


@pytest.fixture(scope="module")
def result(study, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    options = ["--lambdas", "0", "1e-12", "0.5", "--seeds", "0", "1", "--learning_rate", "0.01"]
    return study.run(arguments(study, folder, output, *options)) | {"folder": output}


def runs_of(result, kl_coef: float, kl_scaling: str | None = None, seed: int = 0) -> dict:
    found = [
        run
        for run in result["runs"]
        if (run["kl_coef"], run["kl_scaling"], run["seed"]) == (kl_coef, kl_scaling, seed)
    ]
    assert len(found) == 1
    return found[0]


class TestRun:
    def test_settings_of_every_seed(self, result):
        """A setting that is skipped or run twice would silently change the means in the table."""
        expected = [(0, None), (1e-12, "log1p"), (1e-12, "none"), (0.5, "log1p"), (0.5, "none")]
        assert [(run["kl_coef"], run["kl_scaling"]) for run in result["runs"]] == 2 * expected
        assert [run["seed"] for run in result["runs"]] == [0] * 5 + [1] * 5
        for run in result["runs"]:
            assert [point["step"] for point in run["curve"]] == [0, 2, 4]

    def test_starts_at_the_reference(self, result):
        """Otherwise training would not start at the reference, or the loss of each seed would be measured on different data."""
        for run in result["runs"]:
            first, *later = run["curve"]
            assert first["kl"] == first["log_kl"] == first["kl_max"] == 0
            assert first["lm_loss"] == result["runs"][0]["curve"][0]["lm_loss"]
            assert all(point["kl_max"] > point["kl"] > point["log_kl"] > 0 for point in later)

    def test_same_batches_for_every_lambda(self, result):
        """With λ near 0, only different batches or a different start could separate the curve from λ = 0."""
        plain, other = runs_of(result, 0), runs_of(result, 0, seed=1)
        for scaling in ("log1p", "none"):
            run = runs_of(result, 1e-12, scaling)
            for found, expected in zip(run["curve"], plain["curve"], strict=True):
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert other["curve"][-1]["kl"] != pytest.approx(plain["curve"][-1]["kl"], rel=1e-3)

    def test_a_larger_lambda_holds_the_policy(self, result):
        """If `kl_coef` and `kl_scaling` never reached the trainer, all curves would be alike."""
        ends = [runs_of(result, *setting)["curve"][-1]["kl"] for setting in ((0,), (0.5, "log1p"), (0.5, "none"))]
        assert ends[0] > ends[1] > ends[2]

    def test_log_of_the_trainer(self, result):
        """The log is kept unchanged: its KL is on the training batches, and λ = 0 has none."""
        for run in result["runs"]:
            steps = [entry for entry in run["log"] if "loss" in entry]
            assert [entry["step"] for entry in steps] == [2, 4]
            for entry in steps:
                assert {"lm_loss", "kl", "log_kl"} & entry.keys() == (
                    {"lm_loss", "kl", "log_kl"} if run["kl_coef"] else set()
                )

    def test_trains_on_right_solutions(self, study, folder, result):
        """About half of the samples are right. A filter that keeps all or none would still train."""
        args = arguments(study, folder, result["folder"])
        tokenizer, policy = (auto.from_pretrained(folder) for auto in (AutoTokenizer, AutoModelForCausalLM))
        problems = [json.loads(line) for line in (folder / "problems.jsonl").read_text("utf-8").splitlines()]
        made = study.Study(args, policy, tokenizer, problems)
        rows, held_out_rows = made.right(made.problems, 0), made.right(made.held_out, study.HELD_OUT_SEED)
        assert made.describe(0, rows) == result["seeds"][0]
        assert (result["num_problems"], result["num_held_out_problems"]) == (12, 2)
        assert 0.2 < len(rows) / (12 * 8) < 0.8
        assert result["num_held_out_trajectories"] == len(held_out_rows)
        allowed = [
            {f"{problem['problem']}# Answer\n\n{problem['answer']}\n# END!<|endoftext|>" for problem in part}
            for part in (problems[:12], problems[12:])
        ]
        for part, texts in zip((rows, held_out_rows), allowed, strict=True):
            assert {tokenizer.decode(row["input_ids"]) for row in part} <= texts
        for row in rows:
            trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
            assert tokenizer.decode(trained).startswith("# Answer")


class TestMeasure:
    def test_against_full_logits(self, study, folder):
        """An error in the padding, the shift by one or the sum per sequence would give curves that look just as good."""
        tokenizer, policy = (auto.from_pretrained(folder) for auto in (AutoTokenizer, AutoModelForCausalLM))
        torch.manual_seed(0)
        moved = copy.deepcopy(policy)
        for weight in moved.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        rows = []
        for text in ("# Answer\n\n1\n# END!", "2", "# Answer\n\n12\n\n", "Say b. Say a."):
            prompt, ids = tokenizer.encode("Say a."), tokenizer.encode(text)
            rows.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})
        found = study.HeldOut(policy, rows, tokenizer, every=1).measure(moved.train())

        losses, divergences = [], []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            logs, ref_logs = (model(ids).logits[0].double().log_softmax(-1).tolist() for model in (moved, policy))
            divergence = 0.0
            for position, label in enumerate(row["labels"]):
                if label != -100:
                    p, r = torch.tensor(logs[position - 1]), torch.tensor(ref_logs[position - 1])
                    losses.append(-p[label])
                    divergence += (r.exp() * (r - p)).sum()
            divergences.append(divergence)
        kl = torch.tensor(divergences)
        expected = {
            "lm_loss": torch.tensor(losses).mean(),
            "kl": kl.mean(),
            "log_kl": kl.log1p().mean(),
            "kl_max": kl.max(),
        }
        assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
        assert kl.min() > 0.001 and moved.training


class TestReport:
    def test_json_and_table(self, study, result):
        """Everything in the table can be recomputed from the JSON."""
        saved = json.loads((result["folder"] / "lambda_study.json").read_text("utf-8"))
        assert saved == {name: value for name, value in result.items() if name != "folder"}
        _, _, before, *rows = study.table(saved).splitlines()
        assert before.startswith("| before |") and len(rows) == 5
        runs = [run for run in saved["runs"] if (run["kl_coef"], run["kl_scaling"]) == (0.5, "none")]
        cells = [cell.strip() for cell in rows[-1].strip("|").split("|")]
        assert cells[:2] == ["0.5", "λ·KL"]
        for cell, name in ((cells[2], "lm_loss"), (cells[3], "kl")):
            values = [run["curve"][-1][name] for run in runs]
            assert cell == f"{sum(values) / 2:.4f} ({min(values):.4f} to {max(values):.4f})"
        share = sum(run["accuracy"]["num_right"] for run in runs) / (2 * 2 * 8)
        assert cells[4].startswith(f"{share:.1%} (") and cells[4].endswith(", n = 32)")

    def test_interval(self, study):
        """Wilson's interval for 8 of 10, computed by hand."""
        assert study.shown_accuracy({"num_right": 8, "num_samples": 10}) == "80.0% (49.0% to 94.3%, n = 10)"

    def test_picture(self, study, result, tmp_path):
        """One panel for each λ above 0 in two rows. Each shows λ = 0 and both scalings as a mean and a line per seed."""
        assert (result["folder"] / "lambda_study.png").read_bytes().startswith(b"\x89PNG")
        figure = study.draw(result, tmp_path / "again.png")
        assert [axes.get_title() for axes in figure.axes] == ["λ = 1e-12", "λ = 0.5", "", ""]
        for axes in figure.axes:
            assert len(axes.lines) == 3 * (2 + 1)
        held = [line.get_ydata()[-1] for line in figure.axes[3].lines if line.get_label() == "λ·KL"]
        ends = [runs_of(result, 0.5, "none", seed)["curve"][-1]["lm_loss"] for seed in (0, 1)]
        assert held == [pytest.approx(sum(ends) / 2)]


class TestRefusals:
    def test_policy_without_problems(self, study):
        with pytest.raises(SystemExit, match="--policy and --problems"):
            study.main(study.make_parser().parse_args(["--policy", "somewhere"]))

    def test_nothing_right(self, study, folder, tmp_path):
        problems = tmp_path / "problems.jsonl"
        problems.write_text(
            "".join(json.dumps({"problem": f"Say {k}.", "answer": "7"}) + "\n" for k in "abcdefghijklmn")
        )
        args = arguments(study, folder, tmp_path, "--problems", str(problems))
        with pytest.raises(ValueError, match="none of 16 solutions"):
            study.run(args)


@pytest.mark.slow
def test_the_papers_order(study, tmp_path):
    """
    HRM, section 4.3 and figure 4: the smaller λ, the further the policy moves from its reference. KL at λ 0 > 0.001 > 0.5 in
    each of three seeds, and at 0.5 the language-model loss stays above the loss at λ = 0.
    """
    options = ["--seeds", "0", "1", "2", "--lambdas", "0", "0.001", "0.5", "--scalings", "log1p"]
    small = ["--measure_every", "50", "--batch_size", "16"]
    study.main(study.make_parser().parse_args([*options, *small, "--output_dir", str(tmp_path)]))
    result = json.loads((tmp_path / "lambda_study.json").read_text("utf-8"))
    for seed in (0, 1, 2):
        free, light, held = (
            runs_of(result, *setting, seed=seed)["curve"][-1] for setting in ((0,), (0.001, "log1p"), (0.5, "log1p"))
        )
        assert free["kl"] > 1.02 * light["kl"]
        assert light["kl"] > 10 * held["kl"]
        assert free["kl"] > 20 * held["kl"]
        assert held["lm_loss"] - free["lm_loss"] > 0.001
