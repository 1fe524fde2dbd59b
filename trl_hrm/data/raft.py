"""
Build a dataset for RAFT ([Dong et al., 2023](https://huggingface.co/papers/2304.06767);
[ER-PRM](https://huggingface.co/papers/2412.11006), section 5.2): the candidates of each problem with the highest reward model scores.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa

from ..pages.pictures import draw_scores
from ..scoring.reward_model_config import REPORTED
from ..step_tree import StepTree
from .build import finish_dataset, make_report
from .build_config import BuildConfig
from .build_report import BuildReport, count_row
from .candidate_sources import is_run, rule_of
from .candidates import ProblemCandidates
from .candidates_config import RaftConfig
from .card import build_command
from .output import COLUMNS, PICTURE, Output, make_table, write_part
from .problems import exclusion_key, problem_split, read_problem_keys
from .self_training import MESSAGES, answered, choose, distinct


ABOUT = {
    "title": "Solutions selected by a reward model",
    "description": "Problems with the solutions of a policy that a step reward model scored highest, for supervised fine-tuning of "
    "the policy (RAFT).",
    "source": "Made with trl_hrm. The terms of use of the problems, the policy and the reward model apply.",
    "citation": """The selection follows

```bibtex
@article{dong2023raft,
  title   = {{RAFT}: Reward rAnked FineTuning for Generative Foundation Model Alignment},
  author  = {Dong, Hanze and Xiong, Wei and Goyal, Deepanshu and Zhang, Yihan and Chow, Winnie and Pan, Rui and Diao, Shizhe and Zhang, Jipeng and Shum, Kashun and Zhang, Tong},
  journal = {arXiv preprint arXiv:2304.06767},
  year    = {2023}
}
```""",
}


def shortlist(problems: Sequence[ProblemCandidates], config: RaftConfig, counts: Counter) -> list[ProblemCandidates]:
    """
    Return the candidates to score: the first `config.num_candidates` of each problem, without blank candidates and duplicates.
    Problems in `config.exclude` are dropped.

    Args:
        problems (`Sequence[ProblemCandidates]`):
            Problems with their candidates.
        config ([`RaftConfig`]):
            Options of the selection.
        counts (`Counter`):
            Counter of the dropped candidates, by reason. It is updated in place.

    Returns:
        `list[ProblemCandidates]`: The problems. Some of them may have no candidates.
    """
    excluded = read_problem_keys(config.exclude)
    listed = []
    for problem in problems:
        counts["records_in",] += len(problem.candidates)
        counts["notes", "problems"] += 1
        if exclusion_key(problem.problem) in excluded:
            counts["notes", "problems_excluded"] += 1
            counts["dropped", "excluded"] += len(problem.candidates)
            continue
        considered = problem.candidates[: config.num_candidates]
        written = [candidate for candidate in considered if candidate.steps]
        kept = [written[i] for i in distinct([candidate.text for candidate in written])]
        counts["dropped", "beyond_num_candidates"] += len(problem.candidates) - len(considered)
        counts["dropped", "blank"] += len(considered) - len(written)
        counts["dropped", "duplicate"] += len(written) - len(kept)
        listed.append(replace(problem, candidates=kept, num_considered=len(considered)))
    return listed


def build_raft(
    problems: Sequence[ProblemCandidates],
    scores: Sequence[Sequence[float | None]],
    config: RaftConfig,
    counts: Counter,
    reward_model: dict[str, Any],
    output: Output,
    warnings: Sequence[str] = (),
) -> BuildReport:
    """
    Select the best candidates of each problem, and write them as a dataset in TRL's prompt-completion format.

    Args:
        problems (`Sequence[ProblemCandidates]`):
            Result of [`shortlist`].
        scores (`Sequence[Sequence[float | None]]`):
            Score of each candidate of each problem. `None` for candidates that could not be scored.
        config ([`RaftConfig`]):
            Options of the selection and of the output.
        counts (`Counter`):
            Counts of [`shortlist`]. It is updated in place.
        reward_model (`dict[str, Any]`):
            Reward model and its scoring options, as options of `trl-hrm select-raft`, for the card and the rebuild command.
        output ([`~data.output.Output`]):
            Claimed output. See [`~data.output.claimed_output`].
        warnings (`Sequence[str]`, *optional*):
            Warnings about the source of the candidates.

    Returns:
        `dict[str, Any]`: The report, as written to `build_report.json`.

    Raises:
        `ValueError`: If no row is left for training.
    """
    rows = _choose_rows(problems, scores, config, counts)
    scored = [score for values in scores for score in values if score is not None]
    chosen = [row["score"] for split in rows for row in rows[split]]
    shared = {field.name for field in fields(BuildConfig)}
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in shared}
    if config.join_steps is not None:
        options["join_steps"] = config.join_steps.replace("\n", "\\n").replace("\t", "\\t")
    options |= {REPORTED.get(name, name): value for name, value in reward_model.items()}
    command = build_command("select-raft", [], options, config)
    has_cut = any(problem.num_cut for problem in problems)
    rules = [rule_of(source) for source in config.sources() if has_cut or is_run(source)]
    warnings = list(warnings)
    if not any(len(candidate.steps) > 1 for problem in problems for candidate in problem.candidates):
        advice = " Check whether --segmentation matches the format of the candidates." if has_cut else ""
        warnings.append(f"every candidate has a single step, so all aggregates are the same.{advice}")
    report = make_report("raft", config.candidates, command, config, counts, warnings)
    report["facts"] = {
        "reward model": reward_model,
        "selection": {
            name: getattr(config, name) for name in ("aggregate", "num_candidates", "max_kept", "min_score")
        },
        "steps": ", ".join(dict.fromkeys("given" if rule is None else rule.name for rule in rules)) or "given",
        "candidates of a problem, mean": sum(problem.num_considered for problem in problems) / len(problems),
        "mean score": {"all judged candidates": sum(scored) / len(scored), "chosen": sum(chosen) / len(chosen)},
    }
    report["picture"] = {"file": PICTURE, "shows": "Scores of all scored candidates and of the selected ones"}
    form = pa.string() if isinstance(problems[0].prompt, str) else MESSAGES
    types = COLUMNS | {"prompt": form, "completion": form, "num_candidates": pa.int32(), "rank": pa.int32()}
    parts, dataset = output.work / "parts", output.work / "dataset"
    parts.mkdir()
    dataset.mkdir()
    for split in report["rows"]:
        write_part(make_table(rows[split], types, ", ".join(config.candidates)), parts, split, 0)
    draw_scores(scored, chosen, f"{config.aggregate} of step scores", dataset / PICTURE)
    finish_dataset(ABOUT, report, output)
    return report


def format_scores(report: dict[str, Any]) -> str:
    """Return a line with the mean scores of a report."""
    return ", ".join(f"{name}: {mean:.3f}" for name, mean in report["facts"]["mean score"].items())


def _choose_rows(
    problems: Sequence[ProblemCandidates],
    scores: Sequence[Sequence[float | None]],
    config: RaftConfig,
    counts: Counter,
) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for problem, values in zip(problems, scores, strict=True):
        known = [i for i, score in enumerate(values) if score is not None]
        choice = choose([values[i] for i in known], config.min_score, config.max_kept)
        counts["dropped", "too_long_to_judge"] += len(values) - len(known)
        counts["dropped", "below_min_score"] += choice.num_below
        counts["dropped", "beyond_top_k"] += choice.num_beyond
        counts["records_kept",] += len(choice.kept)
        counts["notes", "problems_without_a_row"] += not choice.kept
        split = problem_split(problem.problem, config.test_size, config.seed)
        for rank, place in enumerate(choice.kept, start=1):
            text, score = problem.candidates[known[place]].text, values[known[place]]
            count_row(counts, split, StepTree(problem.problem, [text], [score], [-1]))
            row = {
                "prompt": problem.prompt,
                "completion": answered(problem.prompt, text),
                "score": score,
                "aggregate": config.aggregate,
                "num_candidates": problem.num_considered,
                "rank": rank,
                "problem_id": problem.problem_id,
                "problem": problem.problem,
            }
            if problem.chat_template_kwargs:
                row["chat_template_kwargs"] = problem.chat_template_kwargs
            rows[split].append(row)
    return rows
