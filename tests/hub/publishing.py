"""Shared by the publishing tests: small builds of every view, and what a user loads from the Hub."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from datasets import DatasetDict, Features, load_dataset
from huggingface_hub import HfApi

from trl_hrm import PushDatasetConfig, push_dataset
from trl_hrm.data import sources
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.candidates import Candidate, ProblemCandidates
from trl_hrm.data.candidates_config import RaftConfig
from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.data.output import claimed_output
from trl_hrm.data.problems import problem_key
from trl_hrm.data.publish import DatasetPush
from trl_hrm.data.raft import build_raft
from trl_hrm.data.stepwise import build_stepwise


VIEWS = ("tree", "hrm", "prm", "orm", "sft", "raft")
NUM_ROWS = 24


def build(folder: Path, view: str = "tree", word: str = "so", rows: int = NUM_ROWS, test_size: float = 0.25) -> Path:
    """Build a small dataset of two splits. `word` makes its rows unique."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if view == "sft":
        _build_sft(folder, word)
    elif view == "raft":
        _build_raft(folder, word)
    else:
        file = folder.with_suffix(".jsonl")
        found = [
            {"prompt": f"What is {i}?", "completions": [f"{word} {i}.", "Done."], "labels": [i % 3 == 0, True]}
            for i in range(rows)
        ]
        _write(file, found)
        build_stepwise(
            BuildStepwiseConfig(
                inputs=[str(file)], output_dir=str(folder), view=view, test_size=test_size, num_proc=1, overwrite=True
            )
        )
    return folder


def build_row_groups(folder: Path, monkeypatch, word: str = "so", num_groups: int = 60) -> Path:
    """Build a prm dataset whose training split has `num_groups` row groups, enough for that many shards."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    build(folder, "prm", word, rows=16 * num_groups, test_size=0.02)
    monkeypatch.undo()
    found = pq.read_metadata(folder / "data" / "train-00000-of-00001.parquet").num_row_groups
    assert found >= num_groups, found
    return folder


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _build_sft(folder: Path, word: str) -> None:
    file = folder.with_suffix(".jsonl")
    _write(
        file,
        [
            {
                "question": f"What is {i}?",
                "final_answer": str(i),
                "question_id": i,
                "reasoning_steps": {
                    "text": f"What is {i}?",
                    "mc_value": 1.0,
                    "children": [{"text": f"{word} \\boxed{{{i}}}.", "mc_value": 1.0, "children": []}],
                },
            }
            for i in range(NUM_ROWS)
        ],
    )
    options = {"view": "sft", "test_size": 0.25, "num_proc": 1, "overwrite": True}
    export(ExportConfig(inputs=str(file), format="openr", output_dir=str(folder), **options))


def _build_raft(folder: Path, word: str) -> None:
    problems = [
        ProblemCandidates(
            problem_key(f"What is {i}?").hex(),
            f"What is {i}?",
            candidates=[Candidate(text, [text]) for text in (f"{word} {i}.", f"{word} {i + 1}.")],
            prompt=[{"role": "user", "content": f"What is {i}?"}],
            num_considered=2,
        )
        for i in range(NUM_ROWS)
    ]
    counts = Counter({("records_in",): 2 * NUM_ROWS})
    config = RaftConfig(candidates="samples.jsonl", output_dir=str(folder), test_size=0.25, overwrite=True)
    scores = [[0.5 + i / 100, 0.25] for i in range(NUM_ROWS)]
    with claimed_output(config) as output:
        build_raft(problems, scores, config, counts, {"reward_model": "me/hrm"}, output)


def push_folders(folders: Path | list[Path], repo: str, token: str | None = None, **options) -> DatasetPush:
    return push_dataset(PushDatasetConfig(inputs=folders, repo_id=repo, **options), token=token)


def rows_of(dataset: DatasetDict) -> dict[str, list[dict]]:
    return {split: list(dataset[split]) for split in dataset}


def features_of(dataset: DatasetDict) -> dict[str, Features]:
    return {split: dataset[split].features for split in dataset}


def local(folder: Path) -> DatasetDict:
    """Load the dataset from its folder."""
    return load_dataset(str(folder), cache_dir=str(folder.with_suffix(".cache")))


_num_readers = 0


def published(repo: str, name: str, tmp_path: Path, **options) -> DatasetDict:
    """Load the published dataset with an empty cache."""
    global _num_readers
    _num_readers += 1
    return load_dataset(repo, name, cache_dir=str(tmp_path / f"reader-{_num_readers}"), **options)


def files_of(repo: str, revision: str | None = None) -> list[str]:
    return sorted(HfApi().list_repo_files(repo, repo_type="dataset", revision=revision))


def commits_of(repo: str) -> list[str]:
    """Return the titles of the commits, newest first."""
    return [commit.title for commit in HfApi().list_repo_commits(repo, repo_type="dataset")]


def card_of(repo: str, revision: str | None = None) -> str:
    path = HfApi().hf_hub_download(repo, "README.md", repo_type="dataset", revision=revision)
    return Path(path).read_text(encoding="utf-8")


def writes(hub, start: int) -> list[tuple[str, str]]:
    """Return the requests that write, from entry `start` of the log on."""
    return [(r["method"], r["path"]) for r in hub.log[start:] if r["method"] not in ("GET", "HEAD")]
