"""
RAFT's data ([Dong et al., 2023](https://huggingface.co/papers/2304.06767); [ER-PRM](https://huggingface.co/papers/2412.11006),
section 5.2): of the candidates of each problem, those that a reward model scores best.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..step_tree import StepTree
from .build import finish_dataset, make_report
from .build_config import BuildConfig
from .candidates import Candidates, is_run, rule_of
from .card import build_command
from .output import COLUMNS, check_output, make_table, temporary_directory, write_part
from .problems import exclusion_key, problem_split, read_problem_keys
from .raft_config import RaftConfig
from .report import count_row
from .score_picture import draw_scores
from .self_training import MESSAGES, answered, choose, distinct


PICTURE = "scores.png"
ABOUT = {
    "title": "Solutions chosen by a reward model",
    "description": "Problems with the solutions of a policy that a step reward model scored best, for supervised fine-tuning of "
    "the policy (RAFT).",
    "source": "Made with trl_hrm. The terms of use are those of the problems, of the policy and of the reward model.",
    "citation": """The choice follows

```bibtex
@article{dong2023raft,
  title   = {{RAFT}: Reward rAnked FineTuning for Generative Foundation Model Alignment},
  author  = {Dong, Hanze and Xiong, Wei and Goyal, Deepanshu and Zhang, Yihan and Chow, Winnie and Pan, Rui and Diao, Shizhe and Zhang, Jipeng and Shum, Kashun and Zhang, Tong},
  journal = {arXiv preprint arXiv:2304.06767},
  year    = {2023}
}
```""",
}


def shortlist(groups: Sequence[Candidates], config: RaftConfig, counts: Counter) -> list[Candidates]:
    """
    The candidates that the reward model is to judge: the first `config.num_candidates` of each problem, without blank ones
    and repeated ones. Problems in `config.exclude` are left out.

    Args:
        groups (`Sequence[Candidates]`):
            Problems with their candidates.
        config ([`RaftConfig`]):
            What to leave out.
        counts (`Counter`):
            Counts candidates left out, by reason.

    Returns:
        `list[Candidates]`: The problems, some perhaps without candidates.
    """
    excluded = read_problem_keys(config.exclude)
    listed = []
    for group in groups:
        counts["records_in",] += len(group.texts)
        counts["notes", "problems"] += 1
        if exclusion_key(group.problem) in excluded:
            counts["notes", "problems_excluded"] += 1
            counts["dropped", "excluded"] += len(group.texts)
            continue
        considered = group.texts[: config.num_candidates]
        written = [i for i, steps in enumerate(group.steps[: config.num_candidates]) if steps]
        kept = [written[i] for i in distinct([group.texts[i] for i in written])]
        counts["dropped", "beyond_num_candidates"] += len(group.texts) - len(considered)
        counts["dropped", "blank"] += len(considered) - len(written)
        counts["dropped", "duplicate"] += len(written) - len(kept)
        texts, steps = [group.texts[i] for i in kept], [group.steps[i] for i in kept]
        listed.append(replace(group, texts=texts, steps=steps, num_candidates=len(considered)))
    return listed


def build_raft(
    groups: Sequence[Candidates],
    scores: Sequence[Sequence[float | None]],
    config: RaftConfig,
    counts: Counter,
    judge: dict[str, Any],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """
    Choose the best candidates of each problem, and write them as a dataset in TRL's prompt-completion format.

    Args:
        groups (`Sequence[Candidates]`):
            What [`shortlist`] gives.
        scores (`Sequence[Sequence[float | None]]`):
            Problems × candidates, `None` for candidates that could not be judged.
        config ([`RaftConfig`]):
            How to choose, and where to write.
        counts (`Counter`):
            What [`shortlist`] counted. The rest is added.
        judge (`dict[str, Any]`):
            The reward model and how it scored, as options of `trl-hrm select-raft`, for the card and the command that repeats it.
        warnings (`Sequence[str]`, *optional*):
            What the user should know of the candidates' source.

    Returns:
        `dict[str, Any]`: The report, as written to `build_report.json`.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `ValueError`: If no row is left for training.
    """
    output = Path(config.output_dir).absolute()
    check_output(output, config)
    rows = _choose_rows(groups, scores, config, counts)
    judged = [score for group in scores for score in group if score is not None]
    chosen = [row["score"] for split in rows for row in rows[split]]
    warnings = [*warnings, *_warnings(groups)]
    report = make_report("raft", [config.candidates], _command(config, judge), config, counts, warnings)
    report["facts"] = {
        "reward model": judge,
        "selection": {name: getattr(config, name) for name in ("aggregate", "num_candidates", "top_k", "min_score")},
        "steps": _steps(groups, config),
        "candidates of a problem, mean": sum(group.num_candidates for group in groups) / len(groups),
        "mean score": {"all judged candidates": sum(judged) / len(judged), "chosen": sum(chosen) / len(chosen)},
    }
    report["picture"] = {"file": PICTURE, "shows": "Scores of all judged candidates, and of the chosen ones"}
    form = pa.string() if isinstance(groups[0].prompt, str) else MESSAGES
    types = COLUMNS | {"prompt": form, "completion": form, "num_candidates": pa.int32(), "rank": pa.int32()}
    with temporary_directory(config) as name:
        work = Path(name)
        (work / "parts").mkdir()
        (work / "dataset").mkdir()
        for split in report["rows"]:
            write_part(make_table(rows[split], types, config.candidates), work / "parts", split, 0)
        draw_scores(judged, chosen, f"{config.aggregate} of step scores", work / "dataset" / PICTURE)
        finish_dataset(work, ABOUT, report, output)
    return report


def format_scores(report: dict[str, Any]) -> str:
    """The mean scores of a report, in a line."""
    return ", ".join(f"{name}: {mean:.3f}" for name, mean in report["facts"]["mean score"].items())


def _choose_rows(
    groups: Sequence[Candidates], scores: Sequence[Sequence[float | None]], config: RaftConfig, counts: Counter
) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for group, values in zip(groups, scores, strict=True):
        known = [i for i, score in enumerate(values) if score is not None]
        choice = choose([values[i] for i in known], config.min_score, config.top_k)
        counts["dropped", "too_long_to_judge"] += len(values) - len(known)
        counts["dropped", "below_min_score"] += choice.num_below
        counts["dropped", "beyond_top_k"] += choice.num_beyond
        counts["records_kept",] += len(choice.kept)
        counts["notes", "problems_without_a_row"] += not choice.kept
        split = problem_split(group.problem, config.test_size, config.seed)
        for rank, place in enumerate(choice.kept, start=1):
            text, score = group.texts[known[place]], values[known[place]]
            count_row(counts, split, StepTree(group.problem, [text], [score], [-1]))
            rows[split].append(
                {
                    "prompt": group.prompt,
                    "completion": answered(group.prompt, text),
                    "score": score,
                    "aggregate": config.aggregate,
                    "num_candidates": group.num_candidates,
                    "rank": rank,
                    "problem_id": group.problem_id,
                    "problem": group.problem,
                    **({"chat_template_kwargs": group.chat_template_kwargs} if group.chat_template_kwargs else {}),
                }
            )
    return rows


def _steps(groups: Sequence[Candidates], config: RaftConfig) -> str:
    """The name of the rule that cut the candidates into steps."""
    rule = rule_of(config)
    return rule.name if rule is not None and (is_run(config) or any(group.num_cut for group in groups)) else "given"


def _command(config: RaftConfig, judge: dict[str, Any]) -> str:
    shared = {field.name for field in fields(BuildConfig)}
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in shared}
    if config.join_steps is not None:
        options["join_steps"] = config.join_steps.replace("\n", "\\n").replace("\t", "\\t")
    return build_command("select-raft", [], options | judge, config)


def _warnings(groups: Sequence[Candidates]) -> list[str]:
    if any(len(steps) > 1 for group in groups for steps in group.steps):
        return []
    advice = " Does --segmentation say where steps end?" if any(group.num_cut for group in groups) else ""
    return [f"every candidate is a single step: all aggregates are the same.{advice}"]
