"""What every search does with a request: it asks the engine, keeps the answer in the log, and has it graded."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ..grading import extract_answer, opens_thinking, visible_text
from .engine import Engine, EngineError, EngineFatal, PrefixTooLong, Sample, check_samples, continued_text
from .log import EventLog
from .open_tree import OpenTree, Request, request_seed
from .prefixes import cut_prefix
from .progress import Progress
from .prompts import Prompt
from .steps import Boundary, StepRule, cut_at, cut_steps, only_thinks
from .tree import ROOT, Problem, make_id


def ending_extractors(extractors: Sequence[str]) -> tuple[str, ...]:
    """
    Return the extractors whose answer ends a solution. The others also find text in the middle of one: `####` begins
    headings, and a step may say what "the answer is" before it is checked.
    """
    return tuple(name for name in extractors if name in ("marker", "tag", "boxed"))


def _from_the_prompt(prefix: str) -> str:
    return (
        f"the solution is to go on after {prefix[:80]!r}, and this search begins at the prompt. Leave the prefix out, or search "
        "with LevelSearch (trl-hrm best-of-n --strategy step_search)."
    )


class Asking:
    """
    Asks an engine and a grader, and makes events of what they say. The order in which things are asked is the caller's.

    What is sampled depends on problem, place in the tree and seed alone. What stands in the log is never asked again.

    Args:
        engine, grader, prompt, rule, log, seed, extractors:
            See [`Scheduler`].
        max_failures (`int`):
            Failed requests in a row after which the run stops: the engine is down.
        answer_ends (`bool`, *optional*, defaults to `False`):
            Whether a step that states an answer ends the solution, beside the end of the sequence and the final stop
            strings: one after `# Answer`, in `<answer>` tags or in a box, if these are among the extractors.
    """

    def __init__(
        self,
        engine: Engine,
        grader: Any,
        prompt: Prompt,
        rule: StepRule,
        log: EventLog,
        seed: int,
        extractors: tuple[str, ...],
        max_failures: int,
        answer_ends: bool = False,
    ):
        self.engine = engine
        self.grader = grader
        self.prompt = prompt
        self.rule = rule
        self.log = log
        self.seed = seed
        self.extractors = extractors
        self.max_failures = max_failures
        self.ending = ending_extractors(extractors) if answer_ends else ()
        self._failures = 0

    def waiting(
        self,
        problems: Iterable[tuple[int, Problem]],
        max_samples: int,
        max_in_flight: int,
        prefix_fault: Callable[[str], str | None] = _from_the_prompt,
    ) -> list[tuple[int, Problem]]:
        """
        The problems, each with its place, that the log does not show as ended.

        Args:
            problems (`Iterable[tuple[int, Problem]]`):
                All problems.
            max_samples, max_in_flight (`int`):
                Most samples of a request, and of all requests together.
            prefix_fault (`Callable[[str], str | None]`, *optional*):
                What keeps the search from going on after a prefix. By default it cannot go on after any.

        Raises:
            `ValueError`: If a request is more than may be in flight, if a problem is another one in the log, or if its prefix has
                a fault.
        """
        if max_samples > max_in_flight:
            raise ValueError(
                f"max_in_flight is {max_in_flight}, expected {max_samples} or more: a request of this search may have "
                f"{max_samples} samples."
            )
        waiting = [(place, problem) for place, problem in problems if not self._is_closed(problem)]
        for _, problem in waiting:
            fault = prefix_fault(problem.prefix) if problem.prefix else None
            if fault is not None:
                raise ValueError(f"problem {problem.problem_id!r}: {fault}")
        return waiting

    def _is_closed(self, problem: Problem) -> bool:
        """
        Whether the log shows that the problem has ended.

        Raises:
            `ValueError`: If the problem is another one in the log.
        """
        known = self.log.problems.get(problem.problem_id)
        if known is None:
            return False
        before = self.log.problem(problem.problem_id)
        if before != problem:
            raise ValueError(
                f"{self.log.path}: problem {problem.problem_id!r} is {before} in the log and {problem} now. Start with the same "
                "problems to go on, or in another folder."
            )
        return known.status not in ("open", "error")

    def open_tree(self, position: int, problem: Problem) -> OpenTree:
        """The tree of a problem, from the log if it is there."""
        if problem.problem_id in self.log.problems:
            return self.log.read(problem.problem_id)
        prompt_ids = self.prompt.encode(self.engine.tokenizer, problem.prompt)
        event = {
            "event": "problem",
            "problem_id": problem.problem_id,
            "position": position,
            "root_id": make_id("root", self.seed, problem.problem_id),
            "prompt": problem.prompt,
            "answer": problem.answer,
            "prompt_ids": prompt_ids,
        }
        if problem.prefix:
            ids, cuts = cut_prefix(self.rule, self.engine.tokenizer, prompt_ids, problem.prefix)
            event |= {"prefix": problem.prefix, "prefix_ids": ids, "prefix_cuts": cuts}
        self.log.append(event)
        return OpenTree.from_event(event)

    async def check_reference(self, answer: str) -> str | None:
        """Why a problem with this reference answer cannot be searched now, `None` if it can."""
        grade = await self.grader.agrade(answer, answer)
        if grade.correct:
            return None
        return "error" if grade.status in ("timeout", "died") else "ungradable"

    async def ask(self, opened: OpenTree, request: Request, progress: Progress) -> bool:
        """
        Sample what a request wants, and let the tree grow by it. The caller has counted its sequences as in flight.

        Returns:
            `bool`: Whether there is an answer; else the failure is in the log.

        Raises:
            `EngineFatal`: If no request can succeed, or `max_failures` of them failed in a row.
        """
        node_id = opened.node_id(request)
        prefix_ids = opened.tree.prefix_ids(request.node)
        seed = request_seed(self.seed, node_id, request.round)
        before = self._written(opened, request.node)
        try:
            samples = await self.engine.sample(
                prefix_ids, request.n, request.stop, request.max_tokens, seed, opened.tree.problem.problem_id
            )
            check_samples(samples, request.n)
            if request.role == "step":
                ended = await self._end_steps(opened, request, before, samples, progress)
            else:
                ended = [(sample, _thinking_tail(before, sample.text)) for sample in samples]
        except PrefixTooLong:
            samples, ended = [], []  # the solution is cut off here, as by any limit of length
        except EngineError as error:
            self._fail(opened, node_id, request, error, progress)
            return False
        finally:
            progress.count_in_flight(-request.n)
        self._failures = 0
        self.tell(
            opened,
            {
                "event": "samples",
                "problem_id": opened.tree.problem.problem_id,
                "above": node_id,
                "round": request.round,
                "role": request.role,
                "cut": request.cut,
                "weight": request.weight,
                "seed": seed,
                "samples": [self._record(request, before, prefix_ids, sample, tail) for sample, tail in ended],
            },
        )
        progress.num_sequences += len(samples)
        _count(progress, prefix_ids, samples)
        return True

    async def grade(self, opened: OpenTree, key: tuple[str, int]) -> None:
        """Grade what a request brought, by the id of the node it continued and its round, unless the log has that too."""
        if key in opened.graded:
            return
        answers = [opened.tree.nodes[i].answer for i in opened.brought[key]]
        reference = opened.tree.problem.answer
        asked = (self.grader.agrade(answer, reference) for answer in answers if answer is not None)
        found = iter(await asyncio.gather(*asked))
        grades = [None if answer is None else next(found) for answer in answers]
        event = {
            "event": "grades",
            "problem_id": opened.tree.problem.problem_id,
            "above": key[0],
            "round": key[1],
            "correct": [None if grade is None else grade.correct for grade in grades],
        }
        if any(grade is not None and grade.correct is None for grade in grades):
            event["status"] = [None if grade is None else grade.status for grade in grades]
        self.tell(opened, event)

    def tell(self, opened: OpenTree, event: dict[str, Any]) -> None:
        """Put an event in the log, then let the tree grow by it."""
        self.log.append(event)
        opened.apply(event)

    def close(self, opened: OpenTree, status: str, progress: Progress) -> None:
        """The search of a problem has ended."""
        self.log.append({"event": "close", "problem_id": opened.tree.problem.problem_id, "status": status})
        progress.closed[status] += 1

    def _written(self, opened: OpenTree, node: int) -> str:
        """What the policy has written up to a node, after the tag with which the prompt may begin its thinking."""
        end_of_prompt = self.engine.tokenizer.decode(opened.tree.prompt_ids[-16:], skip_special_tokens=True)
        return ("<think>" if opens_thinking(end_of_prompt) else "") + opened.tree.text(node)

    async def _end_steps(
        self, opened: OpenTree, request: Request, before: str, samples: Sequence[Sample], progress: Progress
    ) -> list[tuple[Sample, int]]:
        """The samples as [`Asking._end_step`] ends them, all at the same time."""
        steps = (self._end_step(opened, request, before, i, sample, progress) for i, sample in enumerate(samples))
        ended = await asyncio.gather(
            *steps, return_exceptions=True
        )  # if one fails, none of the others is left running
        for found in ended:
            if isinstance(found, BaseException):
                raise found
        return ended

    async def _end_step(
        self, opened: OpenTree, request: Request, before: str, place: int, sample: Sample, progress: Progress
    ) -> tuple[Sample, int]:
        """
        A sample up to the end of its first step, and how many of its last characters belong to the next step.

        The stop strings of a request cannot say all that the rule says. A sample that goes beyond the end of a step is cut
        there, and one that a stop string ended inside a step is continued. Both leave the distribution of steps as it is.
        """
        tokenizer, prefix_ids = self.engine.tokenizer, opened.tree.prefix_ids(request.node)
        start = len(before) - (0 if request.node == ROOT else opened.tree.nodes[request.node].tail)
        child_id = make_id("continued", opened.node_id(request), request.round, place)
        for attempt in range(request.max_tokens):
            written, room = before + sample.text, request.max_tokens - len(sample.token_ids)
            is_over = sample.finish == "eos" or sample.stop_reason in self.prompt.final_stops
            ends = (found for found in self.rule.boundaries(written, start) if found.stop > len(before))
            found = next(ends, None)
            if found is not None and is_over and not written[found.end :].strip():
                found = None  # nothing follows the end of the step but that of the solution
            # a token after the end of the step holds the first part of a character, which the next tokens complete
            is_part = found is not None and not is_over and room > 0 and sample.text.endswith("\ufffd")
            if found is not None and not is_part:
                return self._cut(sample, prefix_ids, found, len(before), is_over)
            if is_over or (sample.finish == "length" and not is_part):
                break
            if room < 1:
                sample = replace(sample, finish="length", stop_reason=None)
                break
            ids, seed = prefix_ids + sample.token_ids, request_seed(self.seed, child_id, attempt)
            try:
                more = await self.engine.sample(
                    ids, 1, request.stop, 1 if is_part else room, seed, opened.tree.problem.problem_id
                )
            except PrefixTooLong:
                sample = replace(sample, finish="length", stop_reason=None)
                break
            check_samples(more, 1)
            _count(progress, ids, more)
            token_ids = [*sample.token_ids, *more[0].token_ids]
            text = continued_text(tokenizer, prefix_ids, token_ids) if is_part else sample.text + more[0].text
            num_cached = sample.num_cached + more[0].num_cached
            sample = replace(more[0], token_ids=token_ids, text=text, num_cached=num_cached)
        return sample, _thinking_tail(before, sample.text)

    def _cut(
        self, sample: Sample, prefix_ids: list[int], found: Boundary, before: int, is_over: bool
    ) -> tuple[Sample, int]:
        """The sample up to a boundary, or to the end of the token that holds it, and its characters beyond the boundary."""
        cut = cut_at(self.engine.tokenizer, prefix_ids, sample.token_ids, sample.text, found.stop - before)
        if cut is not None and cut.tokens < len(sample.token_ids):
            ids, text = sample.token_ids[: cut.tokens], sample.text[: cut.characters]
            sample = replace(sample, token_ids=ids, text=text, finish="stop", stop_reason=found.marker)
        elif is_over:  # one token holds the end of the step and that of the solution
            return sample, 0
        elif sample.finish == "length":
            sample = replace(sample, finish="stop", stop_reason=found.marker)
        return sample, before + len(sample.text) - found.end

    def _record(
        self, request: Request, before: str, prefix_ids: list[int], sample: Sample, tail: int
    ) -> dict[str, Any]:
        written = visible_text(before + sample.text[: len(sample.text) - tail])
        is_final = sample.finish == "eos" or sample.stop_reason in self.prompt.final_stops
        if not is_final and sample.finish == "stop":
            is_final = extract_answer(written, self.ending) is not None
        record = {
            "token_ids": list(sample.token_ids),
            "text": sample.text,
            "num_cached": sample.num_cached,
            "finish": sample.finish,
            "stop_reason": sample.stop_reason,
            "is_final": is_final,
        }
        if is_final:
            record["answer"] = extract_answer(written, self.extractors)
        if request.cut:
            record["cuts"] = cut_steps(
                self.rule, self.engine.tokenizer, prefix_ids, sample.token_ids, sample.text, before
            )
        elif request.role == "step":
            record["tail"] = tail
        return record

    def _fail(self, opened: OpenTree, node_id: str, request: Request, error: EngineError, progress: Progress) -> None:
        self.log.append(
            {
                "event": "error",
                "problem_id": opened.tree.problem.problem_id,
                "above": node_id,
                "round": request.round,
                "message": str(error),
            }
        )
        progress.num_failures += 1
        self._failures += 1
        if self._failures >= self.max_failures:
            raise EngineFatal(
                f"{self._failures} requests failed in a row, the last one with: {error} Everything up to here is in the log; "
                "start again with the same command when the engine is back."
            )


def _thinking_tail(before: str, text: str) -> int:
    """How many characters of a text that ends a solution belong to no step: all of them if the model never stops thinking."""
    return len(text) if only_thinks(before, text) else 0


def _count(progress: Progress, prefix_ids: list[int], samples: list[Sample]) -> None:
    progress.num_requests += 1
    progress.generated_tokens += sum(len(sample.token_ids) for sample in samples)
    progress.cached_tokens += sum(sample.num_cached for sample in samples)
    progress.prefix_tokens += len(prefix_ids)
