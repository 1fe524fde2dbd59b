"""From the logs of step searches to judged candidates, counts and costs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.candidates import THINKING
from ..grading import thinking_spans
from ..search.log import EventLog
from ..search.open_tree import OpenTree
from ..search.outcomes import outcome_of
from ..search.run_folder import read_json
from ..search.step_search import Ending, StepSearch, is_step
from ..search.tree import Problem
from .answer_classes import judge_problems
from .pool import Candidate, PoolProblem


ENDINGS = {"max_depth": "paths_at_the_depth_limit", "dead_end": "dead_ends"}


class SearchedProblems:
    """
    What the logs of one N have: problems with their paths, what was counted, and what it cost.

    What the policy wrote and the steps that were scored are those in the logs, however often the search was started. Seconds, and
    calls and tokens of the scorer, are what all starts spent, but for the last depth of one that was killed. Given steps stand in
    the texts and steps of the candidates; they are not counted, and have no scores.

    Args:
        search ([`StepSearch`]):
            The search that the logs are of.
        folder (`Path`):
            Their folder.
        problems (`Sequence[Problem]`):
            The problems that count. The logs may have others, of an earlier start.
    """

    def __init__(self, search: StepSearch, folder: Path, problems: Sequence[Problem]):
        self.search = search
        self.folder = folder
        self.places = {problem.problem_id: place for place, problem in enumerate(problems)}
        self.counts: Counter = Counter()
        self.outcomes: Counter = Counter()  # of the paths, by the keys of `OUTCOMES`
        self.unreadable: list[dict[str, str]] = []  # problems with unreadable references
        self.policy: Counter = Counter(num_tokens=0, num_requests=0, num_sequences=0)
        self.num_steps = 0

    def judge(self, grader: Any, num_graders: int = 1) -> list[PoolProblem]:
        """
        The problems in their order. Their first candidate is the one that the search has chosen; those that came to no end, which
        have no answer, are the last.

        Args:
            grader ([`~grading.AnswerGrader`]):
                Compares answers.
            num_graders (`int`, *optional*, defaults to `1`):
                Number of its processes.
        """
        problems = sorted(self._problems(), key=lambda problem: self.places[problem.problem_id])
        answers = [[candidate.answer for candidate in problem.candidates] for problem in problems]
        judged = judge_problems(answers, [problem.answer for problem in problems], grader, num_graders)
        kept = []
        for problem, found in zip(problems, judged, strict=True):
            if found is None:  # the grader could read the reference when the search began, and now had no time
                self.counts["problems_ungradable"] += 1
                self._add_unreadable(problem.problem_id, problem.answer)
                continue
            self.counts["num_candidates"] += len(problem.candidates)
            self.counts["candidates_unreadable"] += found.num_unreadable
            for candidate, correct in zip(problem.candidates, found.correct, strict=True):
                candidate.correct = correct
                if candidate.answer is not None:
                    self.outcomes[outcome_of(candidate.answer, correct, candidate.finish)] += 1
                self.counts["candidates_without_answer"] += candidate.answer is None
                self.counts["not_graded"] += candidate.answer is not None and correct is None
            kept.append(problem)
            self.outcomes["wrong"] -= found.num_unreadable  # they are wrong where they are chosen
            self.outcomes["unreadable"] += found.num_unreadable
        return kept

    def cost(self) -> dict[str, Any]:
        """What this N cost, as `cost` of the results has it. Known once the problems are judged."""
        spent: Counter = Counter()
        for path in sorted(self.folder.glob("cost-*.json")):
            spent.update(read_json(path))
        return {
            "policy": {"seconds": spent["policy_seconds"], **self.policy},
            "scorer": {
                "seconds": spent["scorer_seconds"],
                "num_calls": spent["num_calls"],
                "num_steps": self.num_steps,
                "num_tokens": spent["num_tokens"],
            },
            "rest_seconds": spent["seconds"] - spent["policy_seconds"] - spent["scorer_seconds"],
        }

    def _problems(self) -> Iterator[PoolProblem]:
        missing = set(self.places)
        for path in sorted(self.folder.glob("log-*.jsonl")):
            with EventLog(path) as log:
                for problem_id in log.problems.keys() & self.places.keys():
                    missing.discard(problem_id)
                    opened, status = log.read(problem_id), log.problems[problem_id].status
                    self._count(opened)
                    if status == "done":
                        yield self._problem(opened, f"{path}, problem {problem_id!r}")
                    else:
                        self.counts[f"problems_{status}"] += 1
                        if status == "ungradable":
                            self._add_unreadable(problem_id, opened.tree.problem.answer)
        self.counts["problems_not_searched"] += len(missing)  # by another process, which has not come to them

    def _problem(self, opened: OpenTree, where: str) -> PoolProblem:
        problem, endings = opened.tree.problem, self.search.endings(opened)
        self.counts["problems_without_solution"] += all(ending.reason in ENDINGS for ending in endings)
        self.counts.update(ENDINGS[ending.reason] for ending in endings if ending.reason in ENDINGS)
        self.outcomes.update(filter(None, (_unfinished(opened, ending) for ending in endings)))
        candidates = [_candidate(opened, ending) for ending in endings if ending.node != opened.start]
        self.counts[THINKING] += sum(bool(thinking_spans(candidate.text)) for candidate in candidates)
        return PoolProblem(problem.problem_id, problem.prompt, problem.answer, candidates, where)

    def _add_unreadable(self, problem_id: str, answer: str) -> None:
        self.unreadable.append({"problem_id": problem_id, "answer": answer})

    def _count(self, opened: OpenTree) -> None:
        nodes = opened.sampled
        judged = [score for i, score in opened.scores.items() if i > opened.start and is_step(opened, i)]
        self.policy["num_tokens"] += sum(len(node.token_ids) for node in nodes)
        self.policy["num_requests"] += len(opened.brought)
        self.policy["num_sequences"] += len(nodes)
        self.num_steps += sum(score is not None for score in judged)
        self.counts["steps_cut_off"] += sum(node.finish == "length" for node in nodes)
        self.counts["steps_too_long"] += sum(score is None for score in judged)


def _unfinished(opened: OpenTree, ending: Ending) -> str | None:
    """The outcome of a path without an answer, `None` for one that states an answer."""
    if ending.reason == "final":
        return "without_answer" if opened.tree.nodes[ending.node].answer is None else None
    if ending.reason == "max_depth":
        return "cut_off_by_depth"
    tried = [node for node in opened.sampled if node.parent == ending.node]
    if not tried:
        return "cut_off_by_context"
    return "cut_off_by_tokens" if any(node.finish == "length" for node in tried) else "without_answer"


def _candidate(opened: OpenTree, ending: Ending) -> Candidate:
    tree, node = opened.tree, opened.tree.nodes[ending.node]
    path, text = tree.path(ending.node), tree.text(ending.node)
    steps = [tree.step_text(i) for i in path]
    return Candidate(
        text=text[: len(text) - node.tail],  # without a header that no step follows
        steps=[step for step in steps if step],
        answer=node.answer,
        finish=node.finish,
        num_tokens=sum(len(tree.nodes[i].token_ids) for i in path if i > opened.start),
        scores=ending.scores,
    )
