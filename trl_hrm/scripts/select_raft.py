"""
Build a dataset of the best solutions of each problem, selected with a step reward model, to fine-tune a policy on (RAFT).

```bash
trl-hrm select-raft --candidates samples.jsonl --reward_model outputs/tiny-hrm --aggregate min --output_dir data/raft
trl-hrm select-raft --candidates runs/gsm8k runs/math --reward_model outputs/tiny-hrm --num_candidates 16 --output_dir data/raft
```
"""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.candidates_config import RaftConfig
from ..scoring.reward_model_config import RewardModelConfig
from ..terminal import plain, say


if TYPE_CHECKING:
    from ..data.build_report import BuildReport


@dataclass(kw_only=True)
class SelectRaftConfig(RaftConfig, RewardModelConfig):
    """Configuration of [`select_raft`]. It has the fields of [`RaftConfig`] and [`RewardModelConfig`]."""


def select_raft(config: SelectRaftConfig) -> "BuildReport":
    """
    Build a dataset of the best solutions of each problem, selected with a step reward model.

    Args:
        config ([`SelectRaftConfig`]):
            Candidates, reward model and selection options.

    Returns:
        [`BuildReport`]: Report of what was read, written and dropped. The dataset is saved in `config.output_dir`.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `ValueError`: If the candidates are invalid, or no row is left for training.
    """
    from ..data.candidate_sources import read_all_candidates, source_warnings
    from ..data.output import Output, claimed_output
    from ..data.problems import unused_warnings
    from ..data.raft import build_raft, format_scores, shortlist
    from ..data.solutions import solution_warnings
    from ..scoring.candidate_scores import score_candidates
    from ..scoring.generative_scorer import GenerativeScorer, format_judge_cost

    with claimed_output(config, [*config.candidates, *config.exclude]) as output:
        notes = Counter()
        problems = read_all_candidates(config, notes)
        counts = Counter({("notes", name): count for name, count in notes.items()})
        problems = shortlist(problems, config, counts)
        warnings = [
            *(warning for source in config.sources() for warning in source_warnings(source)),
            *solution_warnings(notes, config.step_rule().name),
            *unused_warnings(notes),
        ]
        scorer = config.load_scorer()
        scores = score_candidates(
            scorer,
            [problem.problem for problem in problems],
            [[candidate.steps for candidate in problem.candidates] for problem in problems],
            config.aggregate,
            config,
            progress=True,
        )
        if isinstance(scorer, GenerativeScorer):
            say(format_judge_cost(scorer.cost))
        reward_model = {"reward_model": config.reward_model, **config.describe_scoring()}
        try:
            report = build_raft(problems, scores, config, Counter(counts), reward_model, output, warnings)
        except OSError as error:  # such as a full disk. Scoring again would take long
            kept = Path(tempfile.mkdtemp(prefix="trl_hrm-"))
            other = Output(kept / "dataset", kept / "work", config)
            other.work.mkdir()
            build_raft(problems, scores, config, Counter(counts), reward_model, other, warnings)
            raise OSError(
                f"{config.output_dir} could not be written ({error}). The dataset is in {other.folder}. Move it to {config.output_dir}."
            ) from error
    picture = plain(str(Path(config.output_dir, report["picture"]["file"])))
    say(f"Mean score: {format_scores(report)}. Picture: {picture}")
    return report
