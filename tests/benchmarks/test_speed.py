"""The benchmarks of speed and memory: shapes, trees, bounds and tables by hand, and the scripts at tiny size."""

import importlib
import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from trl_hrm.forest import TokenTrie

from ..token_trees import fewest_tokens, random_trie


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PRM800K = Path(__file__).parents[1] / "fixtures" / "prm800k.jsonl"


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def _threads():
    """The scripts set the number of threads of the process."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def load(name: str):
    return importlib.import_module(name)


class TestCommon:
    @pytest.mark.parametrize(("shape", "expected"), [("smollm2", 134_515_008), ("qwen2.5-math-1.5b", 1_543_714_304)])
    def test_shapes_have_the_size_of_the_published_models(self, shape, expected):
        common = load("common")
        with torch.device("meta"):
            model = common.make_model(shape, 400, "causal")
        assert model.num_parameters() == expected
        embeddings = model.config.vocab_size * model.config.hidden_size
        assert common.num_compute_parameters(model) == expected - embeddings

    def test_a_policy_has_the_tokens_of_its_tokenizer(self):
        with torch.device("meta"):
            assert load("common").make_model("smollm2", 400, "causal", own_vocabulary=False).config.vocab_size == 400

    def test_a_tokenizer_larger_than_the_shape_is_refused(self):
        with pytest.raises(ValueError, match="49152 tokens, but the tokenizer has 50000"):
            load("common").make_model("smollm2", 50_000)

    def test_flops(self):
        flops = load("common").model_flops
        assert (flops(10, 7, training=True), flops(10, 7, training=False)) == (420, 140)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("NVIDIA A100-SXM4-80GB", 312e12),
            ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA L4", 121e12),
            ("NVIDIA L40S", 362e12),
            ("NVIDIA L40", None),
            ("Another card", None),
            (None, None),
        ],
    )
    def test_peak_by_name(self, name, expected):
        """An unknown card must not get the peak of a similar name."""
        assert load("common").peak_flops(name) == expected

    def test_the_peak_of_memory_is_reset(self):
        common = load("common")
        before = common.reset_peak(gpu=False)
        block = torch.ones(16 * 2**20)
        assert common.peak(gpu=False) - before > 50 * 2**20
        del block
        before = common.reset_peak(gpu=False)
        assert common.peak(gpu=False) - before < 16 * 2**20


class TestRowLength:
    def test_lower_bound(self):
        """Never above the best of all groupings, and equal to it for most small trees."""
        bounds, fewest = [], []
        for seed in range(25):
            tree = random_trie(random.Random(seed), max_paths=5)[0]
            for max_length in range(int(tree.position_ids.max()) + 1, len(tree)):
                bounds.append(load("row_length").lower_bound(tree, max_length))
                fewest.append(fewest_tokens(tree, max_length))
        assert all(bound <= best for bound, best in zip(bounds, fewest, strict=True))
        assert sum(bounds) > 0.97 * sum(fewest) and len(bounds) > 60

    def test_table(self):
        """A problem of two tokens with three steps of two tokens: 8 tokens, or two rows of 6 and 4 tokens."""
        trie = TokenTrie()
        prompt = trie.insert([1, 2])
        nodes = [trie.insert([token, 9], after=prompt) for token in (3, 4, 5)]
        lines = load("row_length").make_table([(trie, nodes)], [6, 8]).splitlines()
        assert lines[2] == "| 6 | 3 | 8 | 2 | 1.25× | 1.25× | 1.50× | 1.00× | 0.0% | 16.7% |"
        assert lines[3] == "| 8 | 3 | 8 | 1 | 1.00× | 1.00× | 1.50× | 1.00× | 0.0% | 0.0% |"

    def test_real_format(self):
        row_length = load("row_length")
        args = Namespace(data=str(PRM800K), tokenizer=None)
        with pytest.MonkeyPatch.context() as patch:
            from transformers import AutoTokenizer

            from ..helpers import tiny_tokenizer

            patch.setattr(AutoTokenizer, "from_pretrained", lambda path: tiny_tokenizer())
            tries = row_length.read_trees(args)
        assert tries and all(nodes for _, nodes in tries)
        table = row_length.make_table(tries, [256, 4096]).splitlines()
        assert table[3].split("|")[5].strip() == "1.00×"  # small trees fit into long rows


class TestTreeScaling:
    @pytest.mark.parametrize(
        ("case", "labels", "distinct", "paths"),
        [
            ("best of 4", 36, 200 + 4 * 270, 4 * 470),
            ("search, depth 4", 16, 200 + 16 * 30, 13 * 200 + 3 * 30 * (1 + 2 + 3 + 4) + 4 * 30),
            ("full, branching 2", 14, 200 + 14 * 30, 8 * 290),
        ],
    )
    def test_trees(self, case, labels, distinct, paths):
        scaling = load("tree_scaling")
        tree = scaling.make_tree(case)
        assert (len(tree.steps), len(tree)) == (labels, distinct)
        assert sum(map(len, tree.chains())) == paths

    def test_long_trees_have_the_size_of_their_name(self):
        tree = load("tree_scaling").make_tree("long 8,000")
        assert 7_900 < len(tree) < 8_300 and tree.position_ids.max() > 4_000
        assert len(tree.chains()) == 5

    def test_batches_of_paths(self):
        scaling = load("tree_scaling")
        batches = scaling.rows_of_paths(scaling.make_tree("search, depth 4"), 1000)
        assert all(len(batch) <= 8 and len(batch) * max(map(len, batch)) <= 1000 for batch in batches)
        assert sum(map(len, batches)) == 13

    def test_report(self):
        tree = {"training": {"seconds": 2.0, "memory": 100.0}, "scoring": {"seconds": 0.5, "memory": 50.0}}
        paths = {"training": {"seconds": 5.0, "memory": 80.0}, "scoring": {"seconds": 1.0, "memory": 60.0}}
        one = {"case": "best of 4", "labels": 36, "tree tokens": 1000, "path tokens": 1500, "tree": tree}
        lines = load("tree_scaling").report([one | {"paths": paths}, one], "versions").splitlines()
        assert lines[2] == (
            "| best of 4 | 36 | 1,000 | 1,500 | 1.50× | 2.50× | 2.0 | 5.0 | 100 | 80 | 2.00× | 0.5 | 1.0 | 50 | 60 |"
        )
        assert lines[3] == "| best of 4 | 36 | 1,000 | 1,500 | 1.50× |  | 2.0 |  | 100 |  |  | 0.5 |  | 50 |  |"
        assert lines[-1] == "versions"

    def test_tiny(self, monkeypatch, capsys, tmp_path):
        """The script compares the logits of trees and paths before it measures them."""
        scaling = load("tree_scaling")
        words = ["--hidden_size=64", "--num_layers=1", f"--json={tmp_path / 'results.json'}", "--cases"]
        monkeypatch.setattr(
            sys, "argv", ["tree_scaling.py", *words, "best of 4", "search, depth 4", "full, branching 2"]
        )
        scaling.main()
        results = json.loads((tmp_path / "results.json").read_text())["results"]
        assert [one["tree tokens"] for one in results] == [1280, 680, 620]
        assert all(0 < one["difference"] < 1e-4 for one in results)
        assert "| search, depth 4 | 16 | 680 | 3,920 | 5.76× |" in capsys.readouterr().out


class TestScoring:
    def test_table(self):
        results = {
            "forest": {"tokens": 1000, "batch": 1, "seconds": [2.0, 1.0, 4.0], "memory": 50.0},
            "per candidate": {"tokens": 1530, "batch": 8, "seconds": [3.0], "memory": 60.0},
        }
        lines = load("scoring").format_table("title", 64, results).splitlines()
        assert lines[4] == "| forest | 1,000 |  |  | 2.00 (2.00, 1.00, 4.00) | 32.0 | 1 | 50 |"
        assert lines[5] == "| per candidate | 1,530 | 1.53× | 1.50× | 3.00 (3.00) | 21.3 | 8 | 60 |"

    def test_share_of_the_peak(self):
        results = {"forest": {"tokens": 1000, "batch": 1, "seconds": [2.0], "memory": 50.0}}
        lines = load("scoring").format_table("title", 64, results, peak_share_per_token=1e-3).splitlines()
        assert lines[2].endswith("| of the card's peak FLOPs |") and lines[4].endswith("| 50.0% |")


class TestTreeTraining:
    def test_report(self, monkeypatch):
        training = load("tree_training")
        monkeypatch.setattr(load("common"), "card_name", lambda: "NVIDIA A100-SXM4-80GB")
        monkeypatch.setattr(training, "where_and_when", lambda packages, gpu: "versions")
        facts = {"labels of the whole file": 4068} | {view: {"labels": 10, "tokens": 500} for view in ("prm", "hrm")}
        run = {"rate": 5.0, "tokens": 500, "seconds": 2.0, "memory": 90.0, "flops": 312e12, "model": "model"}
        results = {"prm tree": [run], "prm TRL 1.13": [run | {"rate": 1.0, "tokens": 2000, "seconds": 10.0}]}
        args = Namespace(records=1, data="a/file.jsonl", rounds=1, max_length=4096, gpu=True, peak_tflops=None)
        lines = training.report(args, facts, results).splitlines()
        assert lines[6] == "| prm tree | 5.0 (5.0) |  | 500 |  | 250 | 90 | 50.0% |"
        assert lines[7] == "| prm TRL 1.13 | 1.0 (1.0) | 5.00× | 2,000 | 4.00× | 200 | 90 | 10.0% |"
        assert lines[-1] == "model, bf16. Peer: trl 1.13.0. versions"
        args.gpu = False
        assert (
            training.report(args, facts, results).splitlines()[6] == "| prm tree | 5.0 (5.0) |  | 500 |  | 250 | 90 |"
        )


class TestGPU:
    def test_differences(self):
        logits = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])
        gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([2.0])}
        other = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([2.0])}
        found = load("gpu").differences(*logits, gradients, other)
        assert (found["logits, max"], found["logits, mean"]) == (1.0, 0.5)
        assert found["standard deviation of logits"] == pytest.approx(0.5**0.5)
        assert found["gradients, relative norm"] == pytest.approx((25 / 20) ** 0.5)
        assert found["gradients, relative max"] == 1.0

    def test_trees_are_as_exact_as_bf16(self):
        gpu = load("gpu")
        result = gpu.measure_exactness(Namespace(cpu=True, shape="tiny"))
        float32, bf16, _, both = result["comparisons"]
        assert float32["logits, max"] < 1e-4 and float32["gradients, relative norm"] < 1e-4
        assert bf16["logits, max"] > 1e-3  # otherwise the next line shows nothing
        assert both["logits, mean"] < 2 * bf16["logits, mean"]
        assert both["gradients, relative norm"] < 2 * bf16["gradients, relative norm"]
        table = gpu.exactness_table(result)
        assert "| tree, bf16 − one sequence per path, bf16 |" in table and "680 tokens with 16 labelled steps" in table

    def test_engine_table(self):
        args = Namespace(
            num_prompts=2,
            num_samples=3,
            max_tokens=4,
            policy=None,
            reward_model="me/prm",
            num_candidates=64,
            cpu=False,
        )
        results = {
            "generation": {"tokens": 2000, "seconds": 4.0},
            "forest scorer": {"seconds": 0.5, "scores": [[0.5], [0.25, 1.0]]},
            "vllm scorer": {"seconds": 2.0, "scores": [[0.5], [0.26, 1.0]]},
        }
        table = load("gpu").engine_table(args, results)
        assert "2,000 tokens in 4.0 s, 500 tokens/s (vLLM)" in table
        assert "| StepScorer | 0.50 | 128 |  |" in table and "| VLLMScorer | 2.00 | 32 | 1.0e-02 |" in table

    def test_without_a_gpu(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "out")])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert load("gpu").main() == 1
        assert "no GPU found" in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_a_part_that_takes_too_long_is_stopped(self, monkeypatch, capsys, tmp_path):
        gpu = load("gpu")
        words = ["--cpu", "--output", str(tmp_path), "--parts", "exactness", "--limit", "0.1"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
        assert gpu.main() == 1
        report = (tmp_path / "report.md").read_text()
        assert report.startswith("# CPU, to test the script") and "Not measured: stopped after 0 s." in report
        assert "exactness not measured" in capsys.readouterr().err

    @pytest.mark.slow
    def test_all_parts_on_a_cpu(self, monkeypatch, tmp_path):
        words = [
            "--cpu",
            "--output",
            str(tmp_path),
            "--data",
            str(PRM800K),
            "--num_candidates",
            "4",
            "--max_tokens",
            "8",
        ]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--num_prompts", "2", "--num_samples", "2"])
        assert load("gpu").main() == 0, (tmp_path / "report.md").read_text()
        report = (tmp_path / "report.md").read_text()
        for part, row in (
            ("training", "| prm tree |"),
            ("scoring", "| per candidate |"),
            ("scaling", "| search, depth 4 |"),
            ("kl", "| LM + KL, trl_hrm |"),
            ("exactness", "| tree, bf16 |"),
            ("vllm", "| StepScorer |"),
        ):
            section = report.split(f"## {part}\n")[1].split("\n## ")[0]
            assert row in section and "Not measured" not in section
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["vllm"]["generation"]["tokens"] > 0 and "torch" in results["line"]
