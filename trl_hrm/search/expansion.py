"""Expansion of a node: samples continuations from the policy and cuts them where steps end."""

import asyncio
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..grading import extract_answer, opens_thinking, visible_text
from .engines.base import Engine, PrefixTooLong, Sample, check_samples, continued_text, num_token_ids
from .open_tree import OpenTree, Request, request_seed
from .prompts import Prompt
from .steps import Boundary, StepRule, cut_at, cut_steps, only_thinks
from .tree import ROOT, make_id


if TYPE_CHECKING:
    from .scheduler import Progress


@dataclass(frozen=True)
class Expander:
    """
    Runs a request and returns the samples as an event. The samples depend only on the problem, the position in the tree and the
    seed.

    Args:
        engine ([`Engine`]):
            Engine of the policy.
        prompt ([`Prompt`]):
            Prompt of the policy.
        rule ([`StepRule`]):
            Rule that decides where steps end.
        seed (`int`):
            Random seed of the run.
        extractors (`tuple[str, ...]`):
            Names of the answer extractors, in order.
        ending (`tuple[str, ...]`):
            Extractors whose answers end a solution, in addition to the end of the sequence and the final stop strings. See
            [`~search.step_search.ending_extractors`].
    """

    engine: Engine
    prompt: Prompt
    rule: StepRule
    seed: int
    extractors: tuple[str, ...]
    ending: tuple[str, ...]

    async def expand(self, opened: OpenTree, request: Request, progress: "Progress") -> dict[str, Any]:
        """
        Sample the continuations of a request.

        Returns:
            `dict[str, Any]`: A `samples` event. It has no samples if the prefix fills the policy's context. The solution is then
            cut off, as with any other length limit.

        Raises:
            `EngineError`: If the request failed.
            `EngineFatal`: If no request can succeed.
        """
        above = opened.node_id(request)
        prefix_ids = opened.tree.prefix_ids(request.node)
        seed = request_seed(self.seed, above, request.round)
        end_of_prompt = self.engine.tokenizer.decode(opened.tree.prompt_ids[-16:], skip_special_tokens=True)
        # text of the policy so far, after the opening thinking tag if it is part of the prompt
        before = ("<think>" if opens_thinking(end_of_prompt) else "") + opened.tree.text(request.node)
        try:
            samples = await self.engine.sample(
                prefix_ids, request.n, request.stop, request.max_tokens, seed, opened.tree.problem.problem_id
            )
            self._check(samples, prefix_ids, request.n, request.stop, request.max_tokens)
            ended = [(sample, _thinking_tail(before, sample.text)) for sample in samples]
            if request.role == "step":
                steps = (
                    self._end_step(opened, request, before, i, sample, progress) for i, sample in enumerate(samples)
                )
                # wait for all tasks even if one fails
                ended = await asyncio.gather(*steps, return_exceptions=True)
                for found in ended:
                    if isinstance(found, BaseException):
                        raise found
        except PrefixTooLong:
            samples, ended = [], []
        progress.count_samples(prefix_ids, samples)
        progress.num_sequences += len(samples)
        return {
            "event": "samples",
            "problem_id": opened.tree.problem.problem_id,
            "above": above,
            "round": request.round,
            "role": request.role,
            "cut": request.cut,
            "weight": request.weight,
            "seed": seed,
            "samples": [self._record(request, before, prefix_ids, sample, tail) for sample, tail in ended],
        }

    @cached_property
    def _num_ids(self) -> int:
        return num_token_ids(self.engine.tokenizer)

    def _check(
        self, samples: list[Sample], prefix_ids: list[int], n: int, stop: tuple[str, ...], max_tokens: int
    ) -> None:
        check_samples(samples, self.engine.tokenizer, prefix_ids, n, stop, max_tokens, self._num_ids)

    async def _end_step(
        self, opened: OpenTree, request: Request, before: str, place: int, sample: Sample, progress: "Progress"
    ) -> tuple[Sample, int]:
        """
        Return a sample up to the end of its first step, and the number of characters at its end that belong to the next step.

        Stop strings cannot express every rule. A sample that continues past the end of a step is cut there. A sample that a stop
        string ended inside a step is continued. Neither changes the distribution of steps.
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
                found = None  # the solution ends together with the step
            # the last token contains the first bytes of a character, and the next tokens complete it
            is_part = found is not None and not is_over and room > 0 and sample.text.endswith("\ufffd")
            if found is not None and not is_part:
                return self._cut(sample, prefix_ids, found, len(before), is_over)
            if is_over or (sample.finish == "length" and not is_part):
                break
            if room < 1:
                sample = replace(sample, finish="length", stop_reason=None)
                break
            ids, seed = prefix_ids + sample.token_ids, request_seed(self.seed, child_id, attempt)
            num_tokens = 1 if is_part else room
            try:
                more = await self.engine.sample(ids, 1, request.stop, num_tokens, seed, opened.tree.problem.problem_id)
            except PrefixTooLong:
                sample = replace(sample, finish="length", stop_reason=None)
                break
            self._check(more, ids, 1, request.stop, num_tokens)
            progress.count_samples(ids, more)
            token_ids = [*sample.token_ids, *more[0].token_ids]
            text = continued_text(tokenizer, prefix_ids, token_ids) if is_part else sample.text + more[0].text
            num_cached = sample.num_cached + more[0].num_cached
            sample = replace(more[0], token_ids=token_ids, text=text, num_cached=num_cached)
        return sample, _thinking_tail(before, sample.text)

    def _cut(
        self, sample: Sample, prefix_ids: list[int], found: Boundary, before: int, is_over: bool
    ) -> tuple[Sample, int]:
        """
        Return a sample up to the end of the token that contains a boundary, and the number of characters after the end of the
        step.
        """
        cut = cut_at(self.engine.tokenizer, prefix_ids, sample.token_ids, sample.text, found.stop - before)
        if cut is not None and cut.tokens < len(sample.token_ids):
            ids, text = sample.token_ids[: cut.tokens], sample.text[: cut.characters]
            sample = replace(sample, token_ids=ids, text=text, finish="stop", stop_reason=found.marker)
        elif is_over:  # one token contains both the end of the step and the end of the solution
            return sample, 0
        elif sample.finish == "length":
            sample = replace(sample, finish="stop", stop_reason=found.marker)
        return sample, before + len(sample.text) - found.end

    def _record(
        self, request: Request, before: str, prefix_ids: list[int], sample: Sample, tail: int
    ) -> dict[str, Any]:
        """Return the log record of a sample, with the answer of a finished solution and the steps of a whole solution."""
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


def _thinking_tail(before: str, text: str) -> int:
    """Return how many characters at the end of a solution belong to no step: all of them if the model never stops thinking."""
    return len(text) if only_thinks(before, text) else 0
