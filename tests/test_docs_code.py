"""
Run every Python block of the README and of `docs/` unchanged.

The blocks of a page run in order in one namespace, in a folder that holds what the pages name: checkpoints, datasets and
tiny models under the names of real ones. A block that cannot run says so, and why, in the line before it:

    <!-- not run: needs a server -->
"""

import doctest
import functools
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config

import trl_hrm
from trl_hrm import BuildStepwiseConfig, build_stepwise
from trl_hrm.demo.world import step_trees
from trl_hrm.tiny_model import make_tokenizer, texts_of

from .data.judged_runs import write_run, write_verdicts
from .helpers import SIZES, save_checkpoint
from .search.trees import tree_of


ROOT = Path(__file__).resolve().parents[1]
# Tests that run the code of a whole page and check its results
RUN_BY = {
    "docs/migrating_from_trl_prm.md": "tests/trainer/test_prm_models.py",
    "docs/scoring_without_trl_hrm.md": "tests/test_scoring_docs.py",
}
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
BLOCK = re.compile(r"^([^\n]+)\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
# The pages use GPUs and real models. These settings make them small
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "per_device_train_batch_size": 2}
SMALL = {
    trl_hrm.HRMRewardConfig: ON_CPU,
    trl_hrm.ImplicitPRMConfig: ON_CPU,
    trl_hrm.KLSelfConfig: ON_CPU,
    trl.GRPOConfig: ON_CPU | {"num_generations": 2, "max_completion_length": 4},
    trl_hrm.StepGRPOConfig: ON_CPU
    | {"num_generations": 2, "max_completion_length": 4, "per_device_eval_batch_size": 2},
    trl_hrm.AnnotateConfig: {
        "engine": "transformers",
        "max_sequences": 6,
        "num_children": 2,
        "max_depth": 2,
        "max_step_tokens": 8,
        "grader_workers": 1,
    },
    trl_hrm.EvaluateConfig: {"engine": "transformers", "n": [1, 2], "max_solution_tokens": 8},
    trl_hrm.BuildGridConfig: {"num_train": 20, "num_validation": 4, "num_test": 4, "num_few_blanks": 4, "num_proc": 1},
    trl_hrm.HRMReasoningConfig: ON_CPU,
    trl_hrm.ExportConfig: {"truncated": "wrong"},  # the tiny policy never reaches an answer
}


def blocks(page: str) -> list[tuple[str, str, int]]:
    """Return the line before each Python block of a page, its code, and the number of its first line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(match[1], match[2], text[: match.start(2)].count("\n") + 1) for match in BLOCK.finditer(text)]
    assert len(found) == text.count("```python\n"), f"{page}: a block that this test does not see"
    return found


def run(code: str, names: dict, page: str, line: int) -> None:
    """Run a block. One that is written as a session of Python must print what it shows."""
    if ">>>" not in code:
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)
        return
    example = doctest.DocTestParser().get_doctest(code, names, page, page, line - 1)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)
    names.update(example.globs)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with everything that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    trees = step_trees(20, 4, seed=0)
    rows = [tree.to_row() for tree in trees]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first_errors = [{"problem": "1+2?", "steps": ["a", "b", "c"], "label": 1}]
    (folder / "first_errors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first_errors))
    for name in ("data/prm800k-hrm", "data/quickstart-hrm"):
        build_stepwise(
            BuildStepwiseConfig(inputs=str(folder / "rows.jsonl"), output_dir=str(folder / name), view="hrm")
        )
    outcomes = str(folder / "data" / "outcomes")
    build_stepwise(BuildStepwiseConfig(inputs=str(folder / "rows.jsonl"), output_dir=outcomes, view="orm"))
    solutions = [
        {"prompt": row["prompt"], "completion": "\n\n".join(row["completions"][:2]), "answer": "6"} for row in rows
    ]
    for name in ("data/gsm8k-sft/train.jsonl", "me/problems/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(solutions).to_json(folder / name)
    problems = [{"problem": f"1+2+{n} = ?", "answer": str(3 + n)} for n in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    searched = [
        tree_of(
            (-1, "1+2=3.", {}),
            (0, "3+3=6.", {"answer": "6", "correct": True}),
            (0, "3+3=7.", {"answer": "7", "correct": False}),
            name=f"p{i}",
            prompt=f"1+2+3? ({i})",
        )
        for i in range(5)
    ]
    run = write_run(folder / "runs" / "searched", searched)
    a, b, c = (node.node_id for node in searched[0].nodes)
    write_verdicts(run, {(f"p{i}", ids): [vote] * 3 for i in range(5) for ids, vote in (((a, b), -1), ((a, c), 1))})

    tokenizer = make_tokenizer((text for row in rows for text in texts_of(row)), vocab_size=300)
    tokenizer.chat_template = TEMPLATE
    names = ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-1.5B-Instruct", "Qwen2.5-Math-7B-Instruct")
    for name in ("HuggingFaceTB/SmolLM2-135M", *(f"Qwen/{name}" for name in names)):
        config = Qwen2Config(**SIZES, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("outputs/quickstart", "me/my-hrm"):
        save_checkpoint(folder / name)
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch) -> None:
    """A copy of the prepared folder as the current one, and small settings wherever a page makes a config."""
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache")
    )  # names the same data differently
    for config, small in SMALL.items():
        make = config.__init__
        monkeypatch.setattr(
            config,
            "__init__",
            functools.wraps(make)(
                # whole solutions, as `evaluate` samples them, have no steps to limit
                lambda self, *args, make=make, small=small, **given: make(
                    self, *args, **given | ({} if "num_solutions" in given else small)
                )
            ),
        )


@pytest.mark.parametrize("page", [page for page in PAGES if page not in RUN_BY and blocks(page)])
def test_code_of_the_page(page, workplace):
    names: dict = {"__name__": "__main__"}  # so that the main block of a script runs
    found = blocks(page)
    if not any("AnnotateConfig(" in code for _, code, _ in found):  # the page reads a run that it does not make
        Path("runs/searched").rename("runs/mcts")
    for before, code, line in found:
        if not before.startswith("<!-- not run: "):
            run(code, names, page, line)


@pytest.mark.parametrize("page", PAGES)
def test_reasons(page):
    """A mistyped marker, or one without a block below it, would be ignored."""
    text = (ROOT / page).read_text(encoding="utf-8")
    markers = [before for before, _, _ in blocks(page) if before.startswith("<!--")]
    assert all(re.fullmatch(r"<!-- not run: \w.+ -->", marker) for marker in markers)
    assert len(markers) == len(re.findall(r"<!-- *not run", text))


@pytest.mark.parametrize("page", RUN_BY)
def test_pages_of_other_tests(page):
    assert blocks(page) and Path(page).name in (ROOT / RUN_BY[page]).read_text(encoding="utf-8")


def test_a_session_that_shows_something_else_fails():
    run(">>> 1 + 1\n2\n", {}, "page", 1)
    with pytest.raises(AssertionError, match=r"Got:\n +2"):
        run(">>> 1 + 1\n3\n", {}, "page", 1)
