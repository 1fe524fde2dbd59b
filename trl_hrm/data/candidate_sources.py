"""Readers of candidate solutions from files, datasets and runs of `trl-hrm annotate`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..grading import (
    DEFAULT_EXTRACTORS,
    extract_answer,
    opens_thinking,
    thinking_spans,
    visible_text,
    without_thinking_tags,
)
from ..io import shown
from ..search.nodes import read_trees
from ..search.run_folder import MANIFEST, node_files, read_manifest, read_summary
from ..search.segmentation_config import THINKING_OPTIONS
from ..search.steps import StepRule, cut_text
from ..search.thinking import ThinkingRule, rule_type
from ..search.tree import ROOT, SearchTree
from .candidates import THINKING, Candidate, CandidateRows, ProblemCandidates, check_same_problem
from .candidates_config import KEEPS_THINKING, CandidatesConfig, RaftConfig
from .problem_sets import ProblemSet
from .problems import problem_key
from .self_training import asked, prompt_of
from .sources import DatasetRows, JsonLines, loaded_dataset
from .tree_files import NodeFiles, run_warnings


def read_candidates(
    config: CandidatesConfig, notes: Counter, answers: bool = False, grades: bool = False
) -> list[ProblemCandidates]:
    """
    Read candidates, grouped by problem: rows with the same `problem_id` or, without one, the same problem text.

    The candidates of a run are all of its finished solutions.

    Args:
        config ([`CandidatesConfig`]):
            Options of the candidates and of their segmentation into steps.
        notes (`Counter`):
            Counter, see [`CandidateRows`]. For a run, it counts problems without candidates and unfinished solutions. It is updated
            in place.
        answers (`bool`, *optional*, defaults to `False`):
            Whether the column `answer` has reference answers.
        grades (`bool`, *optional*, defaults to `False`):
            Whether the column `correct` (or `is_correct`, or `labels` next to `candidates`) has grades of the candidates.

    Returns:
        `list[ProblemCandidates]`: The problems with their candidates, in the order in which they first appear.

    Raises:
        `FileNotFoundError`: If the file or folder does not exist.
        `ValueError`: If a row is invalid, or an option has no effect on these candidates.
    """
    if is_run(config):
        problems = _finished_candidates(config, notes)
    else:
        with opened_rows(config) as (rows, before):
            problems = CandidateRows(config, notes, answers, grades).read(rows, before)
    if not problems:
        raise ValueError(f"{config.candidates}: no candidates found. Check the path, or remove the empty input.")
    _check_prompts(problems)
    return problems


@contextmanager
def opened_rows(config: CandidatesConfig) -> Iterator[tuple[JsonLines | DatasetRows, str]]:
    """
    Context manager that opens a file or a dataset folder. It returns the reader of the rows, and a prefix for their locations in error
    messages.

    Raises:
        `FileNotFoundError`: If the file or folder does not exist.
        `ValueError`: If the file has another format, or an option has no effect on it.
    """
    path = Path(config.candidates)
    if path.is_dir() and any(path.glob("log-*.jsonl")):
        raise FileNotFoundError(
            f"{path}: found the log of a search (log-*.jsonl), but not its {MANIFEST}, which has the prompt of the policy. Copy the "
            "whole folder of `trl-hrm annotate`."
        )
    if path.suffix == ".parquet":
        raise ValueError(
            f"{path}: found a Parquet file, expected a JSON Lines file or a folder. Pass the folder of the dataset or run that contains "
            "the file."
        )
    if path.is_dir():
        with loaded_dataset(config.candidates, config.split or "train") as dataset:
            yield DatasetRows(dataset, config.columns), f"{config.candidates}, "
    else:
        refuse_options(config, ("split",), "a file")
        yield JsonLines([config.candidates], config.columns), ""


def read_all_candidates(config: RaftConfig, notes: Counter) -> list[ProblemCandidates]:
    """
    Read the candidates of all inputs, grouped by problem as in [`read_candidates`].

    Args:
        config ([`RaftConfig`]):
            Options of the candidates.
        notes (`Counter`):
            Counter, see [`read_candidates`]. It also counts `problems_in_several_inputs`. It is updated in place.

    Raises:
        `FileNotFoundError`, `ValueError`: See [`read_candidates`]. Also if two inputs have different problems with the same id, or
        different prompts for the same problem.
    """
    found: dict[str, ProblemCandidates] = {}
    for source in config.sources():
        for problem in read_candidates(source, notes):
            first = found.setdefault(problem.problem_id, problem)
            if first is problem:
                continue
            check_same_problem(first, problem, "id")
            notes["problems_in_several_inputs"] += 1
            first.candidates += problem.candidates
            first.num_cut += problem.num_cut
    problems = list(found.values())
    _check_prompts(problems)
    return problems


def _check_prompts(problems: Sequence[ProblemCandidates]) -> None:
    forms = {isinstance(problem.prompt, str): problem.where for problem in reversed(problems)}
    if len(forms) > 1:
        raise ValueError(
            f"`prompt` is a text at {forms[True]}, but messages at {forms[False]}. A dataset cannot mix both. Use separate inputs for "
            "text prompts and messages."
        )


def read_pool(
    config: CandidatesConfig, extractors: Sequence[str] | None, problems: ProblemSet | None, notes: Counter
) -> list[ProblemCandidates]:
    """
    Read candidates with their final answers, and the reference answers of their problems.

    The candidates of a run are all of its sampled solutions, including unfinished ones.

    Args:
        config ([`CandidatesConfig`]):
            Options of the candidates. Reference answers are read from a run of `trl-hrm annotate --search rollouts`, or from the
            column `answer` of rows. Rows may have grades of the candidates instead.
        extractors (`Sequence[str]`, *optional*):
            Names of the answer extractors. Defaults to the extractors in [`reading_settings`].
        problems ([`ProblemSet`], *optional*):
            Problems with reference answers, for rows without them. They are matched by the text of the problem.
        notes (`Counter`):
            Counter, see [`CandidateRows`]. It also counts `problems_without_answer` (dropped), `problems_without_candidates`
            and `problems_with_given_grades`. It is updated in place.

    Returns:
        `list[ProblemCandidates]`: The problems, each with a reference answer or with grades, in the order in which they first appear.

    Raises:
        `FileNotFoundError`: If the file or folder does not exist.
        `ValueError`: If a row is invalid, the run did not sample whole solutions, no problem has an answer, or all given grades are
            null.
    """
    extractors = reading_settings(config, extractors)["extractors"]
    if is_run(config):
        if problems is not None:
            raise ValueError(
                f"{config.candidates} is a run, which already has the reference answers. Remove the problems."
            )
        search = read_manifest(config.candidates, ["search"])["search"]
        if search["search"] != "rollouts" or "root_filter" in search:
            # Solutions of a search tree share their first steps, and a root filter drops problems by difficulty
            found = f"--search {search['search']}" + (" with --root_filter" if "root_filter" in search else "")
            raise ValueError(
                f"{config.candidates}: the run used {found}. Expected --search rollouts without --root_filter, since the solutions must be "
                "independent samples for every problem. Sample them with: trl-hrm annotate ... --search rollouts "
                "--num_solutions N --num_completions 0"
            )
        keep = keeps_thinking(config)
        found = list(read_run(node_files(config.candidates), extractors, cut_again(config), keep))
        if not keep:
            texts = (candidate.text for problem in found for candidate in problem.candidates)
            notes[THINKING] += sum(bool(thinking_spans(text)) for text in texts)
        return found
    found = read_candidates(config, notes, answers=problems is None, grades=True)
    from_thinking = bool(config.keep_thinking) and not config.step_rule().keeps_thinking
    for problem in found:
        opened = "<think>" if isinstance(problem.prompt, str) and opens_thinking(problem.prompt) else ""
        for candidate in problem.candidates:
            candidate.answer = _stated_answer(candidate.text, extractors, from_thinking, opened)
    filled = [problem for problem in found if problem.candidates]
    if not filled:
        raise ValueError(f"{found[0].where}: no candidates found for any of the {len(found):,} problems.")
    if len(filled) < len(found):
        notes["problems_without_candidates"] += len(found) - len(filled)
    if problems is not None:
        known = {problem_key(problem.prompt): problem.answer for problem in problems.problems}
        keys = [problem_key(problem.problem) for problem in filled]
        notes["problems_without_candidates"] += len(known.keys() - set(keys))
        filled = [replace(problem, answer=known.get(key)) for problem, key in zip(filled, keys, strict=True)]
    answered = [problem for problem in filled if problem.answer is not None or problem.graded]
    if any(problem.graded for problem in answered):
        notes["problems_with_given_grades"] += sum(problem.graded for problem in answered)
    notes["problems_without_answer"] += len(filled) - len(answered)
    if not answered:
        raise ValueError(
            f"{filled[0].where}: no reference answer found for any of the {len(filled):,} problems. "
            + (
                "Add a column `answer`, add grades in a column `correct`, or pass a file of problems with answers (--problems)."
                if problems is None
                else "Apart from whitespace, the problems must have the same text as in the candidates. If the prompts contain "
                "more than the problem, add a column `problem` with only the problem."
            )
        )
    if all(problem.graded and all(one.correct is None for one in problem.candidates) for problem in answered):
        raise ValueError(
            f"{answered[0].where}: all given grades are null, so no accuracy is known. Complete the grades, or remove their column and add a "
            "column `answer`."
        )
    return answered


def check_sizes(problems: Sequence[ProblemCandidates], number: int) -> None:
    """
    Check that all problems have at least `number` candidates.

    Raises:
        `ValueError`: If a problem has fewer candidates, or if there are no problems.
    """
    if not problems:
        raise ValueError("`problems` is empty. It must contain at least one problem with candidates.")
    short = min(problems, key=lambda problem: len(problem.candidates))
    if len(short.candidates) < number:
        raise ValueError(
            f"{short.where}: problem {shown(short.problem_id)} has {len(short.candidates)} candidates, but the largest N is {number}. "
            f"Sample more candidates, remove the problem, or use a smaller --n (at most {len(short.candidates)})."
        )


def read_run(
    files: Sequence[Path], extractors: Sequence[str], rule: StepRule | None = None, keep_thinking: bool = False
) -> Iterator[ProblemCandidates]:
    """
    Yield the problems of a run of `--search rollouts` whose search finished, with all their solutions, including unfinished ones.

    Args:
        files (`Sequence[Path]`):
            Node files of the run.
        extractors (`Sequence[str]`):
            Names of the answer extractors.
        rule ([`StepRule`], *optional*):
            Rule that splits the solutions into steps. Defaults to the steps of the search.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            See [`CandidatesConfig`].
    """
    for file in files:
        for tree in read_trees(file):
            if tree.status == "done":
                problem = tree.problem
                yield ProblemCandidates(
                    problem.problem_id,
                    problem.prompt,
                    problem.answer,
                    list(_sampled_candidates(tree, extractors, rule, keep_thinking)),
                    where=f"{file}, problem {shown(problem.problem_id)}",
                )


def _sampled_candidates(
    tree: SearchTree, extractors: Sequence[str], rule: StepRule | None, keep_thinking: bool
) -> Iterator[Candidate]:
    """Yield the solutions in a tree of rollouts. Each is a node with its whole text, next to a path of nodes with its steps."""
    firsts, below = {}, {}
    for i, node in enumerate(tree.nodes):
        if node.role == "segment":
            if node.parent == ROOT:
                firsts[node.round, node.child_index] = i
            else:
                below[node.parent] = i
    opened = "<think>" if tree.thinking == "opened" else ""
    # The answer of a solution never comes from its thinking if thinking has steps of its own
    from_thinking = keep_thinking and tree.thinking == "left_out" and not (rule is not None and rule.keeps_thinking)
    for node in tree.nodes:
        if node.parent == ROOT and node.role == "rollout":
            steps, i = [], firsts.get((node.round, node.child_index))
            while i is not None:
                steps.append(tree.step_text(i))
                i = below.get(i)
            steps = [text for text in steps if text]
            has_answer = node.is_final and (steps or keep_thinking)  # a solution with only thinking has no answer
            answer = _stated_answer(node.text, extractors, from_thinking, opened) if has_answer else None
            if rule is not None:
                steps = cut_text(opened + node.text, rule, keep_thinking)
            yield Candidate(node.text, steps, answer, node.finish, len(node.token_ids))


def _stated_answer(text: str, extractors: Sequence[str], from_thinking: bool, opened: str = "") -> str | None:
    """
    Return the answer of a solution, with `from_thinking` also one in its thinking. `opened` is the thinking tag at the end of its
    prompt, if any.
    """
    shown = without_thinking_tags(text) if from_thinking else visible_text(opened + text)
    return extract_answer(shown, extractors)


def source_warnings(config: CandidatesConfig) -> list[str]:
    """Return warnings about the run, if the candidates come from one. See [`run_warnings`]."""
    if not is_run(config):
        return []
    return run_warnings({config.candidates: read_manifest(config.candidates) | read_summary(config.candidates)})


def reading_settings(config: CandidatesConfig, extractors: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Return the settings for reading candidates. If the candidates come from a run, options that are not given default to the
    settings of the run.

    Args:
        config ([`CandidatesConfig`]):
            Options of the candidates.
        extractors (`Sequence[str]`, *optional*):
            Names of the answer extractors. Defaults to the extractors of the run, or to the default of [`extract_answer`].

    Returns:
        `dict[str, Any]`: `extractors`, `segmentation`, `keep_thinking`, `step_pattern` if the segmentation is `"regex"`, options of
        the segmentation `"thinking"` that differ from their defaults and, for a run, `prompt_style`.
    """
    manifest = read_manifest(config.candidates) if is_run(config) else {}
    found: dict[str, Any] = {"extractors": list(extractors or manifest.get("extractors") or DEFAULT_EXTRACTORS)}
    rule = rule_of(config)
    if rule is not None:
        found["segmentation"] = rule.name
        if rule.name == "regex":
            found["step_pattern"] = rule.pattern
        if isinstance(rule, ThinkingRule):
            options = {option: getattr(rule, name) for option, name in THINKING_OPTIONS.items()}
            found |= {
                key: value for key, value in options.items() if value != getattr(ThinkingRule, THINKING_OPTIONS[key])
            }
    if "prompt" in manifest:
        found["prompt_style"] = prompt_of(manifest).style
    return found | {"keep_thinking": keeps_thinking(config)}


def is_run(config: CandidatesConfig) -> bool:
    """
    Return whether the candidates come from a run of `trl-hrm annotate`.

    Raises:
        `ValueError`: If they do, and an option is set that has no effect on runs.
    """
    if not Path(config.candidates, MANIFEST).is_file():
        return False
    refuse_options(config, ("split", "join_steps", "columns"), "a run")
    return True


def rule_of(config: CandidatesConfig) -> StepRule | None:
    """
    Return the rule that splits texts into steps. If the options have none, the rule of the search is used for a run. Return `None`
    if the manifest of the run has no rule.
    """
    if config.segmentation is not None or not is_run(config):
        return config.step_rule()
    steps = read_manifest(config.candidates).get("steps")
    return None if steps is None else rule_type(steps)(**steps)


def keeps_thinking(config: CandidatesConfig) -> bool:
    """
    Return whether the thinking of the candidates is kept: if the options say so, or if the rule has steps in thinking.

    Raises:
        `ValueError`: If they contradict each other.
    """
    rule = rule_of(config)
    if rule is None or not rule.keeps_thinking:
        return bool(config.keep_thinking)
    if config.keep_thinking is False:
        raise ValueError(KEEPS_THINKING.format(f"{config.candidates} is a run with `segmentation='thinking'`"))
    return True


def cut_again(config: CandidatesConfig) -> StepRule | None:
    """Return the rule to split the solutions of a run into steps, or `None` to keep the steps of the search."""
    rule = rule_of(config)
    if config.segmentation is None and rule is not None and rule.keeps_thinking:
        return None  # the steps of the search have the thinking
    return rule if config.segmentation is not None or config.keep_thinking else None


def refuse_options(config: CandidatesConfig, names: tuple[str, ...], kind: str) -> None:
    """Raise `ValueError` if an option is set that has no effect on this kind of input."""
    for name in names:
        if getattr(config, name) not in (None, {}, False):
            raise ValueError(
                f"`{name}` is {shown(getattr(config, name))}, but has no effect because {config.candidates} is {kind}. Remove `{name}`."
            )


def finished_solutions(tree: SearchTree) -> Iterator[tuple[str, list[str]]]:
    """
    Yield the text and the steps of every finished solution, right or wrong. Rollouts that only estimate a prefix are skipped, since
    they are not split into steps.
    """
    for i, node in enumerate(tree.nodes):
        if node.is_final and node.role != "rollout":
            steps = [tree.step_text(j) for j in tree.path(i)]
            yield tree.text(i), [text for text in steps if text]


def _finished_candidates(config: CandidatesConfig, notes: Counter) -> list[ProblemCandidates]:
    prompt, rule = prompt_of(read_manifest(config.candidates, ["prompt"])), cut_again(config)
    keep = keeps_thinking(config)
    source = NodeFiles([str(file) for file in node_files(config.candidates)])
    problems = []
    for chunk in source.chunks():
        for where, _, tree in source.read(chunk):
            if tree.status != "done":
                notes[f"problems_{tree.status}"] += 1
                continue
            goes_on = {node.parent for node in tree.nodes if node.role != "rollout"}
            unfinished = [i for i, node in enumerate(tree.nodes) if not node.is_final and node.role != "rollout"]
            notes["solutions_without_an_end"] += sum(i not in goes_on for i in unfinished)
            opened = "<think>" if tree.thinking == "opened" else ""
            candidates = [Candidate(text, steps) for text, steps in finished_solutions(tree)]
            if not candidates:
                notes["problems_without_a_finished_solution"] += 1
                continue
            for candidate in candidates:
                if rule is not None:
                    candidate.steps = cut_text(opened + candidate.text, rule, keep)
                if not keep and thinking_spans(opened + candidate.text):
                    notes[THINKING] += 1
            problems.append(
                ProblemCandidates(
                    tree.problem.problem_id,
                    tree.problem.prompt,
                    candidates=candidates,
                    where=where,
                    prompt=asked(prompt, tree.problem.prompt),
                    chat_template_kwargs=prompt.chat_template_kwargs,
                )
            )
    return problems
