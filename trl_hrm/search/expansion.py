"""Expansion: what the policy writes after a node becomes its children, which end where steps end."""

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..grading import extract_answer, opens_thinking, visible_text
from .engines.base import Engine, PrefixTooLong, Sample, check_samples, continued_text
from .open_tree import OpenTree, Request, request_seed
from .prompts import Prompt
from .steps import Boundary, StepRule, cut_at, cut_steps, only_thinks
from .tree import ROOT, make_id


if TYPE_CHECKING:
    from .scheduler import Progress


@dataclass(frozen=True)
class Expander:
    """
    Samples what a request asks for, and makes an event of it. What is sampled depends on problem, place in the tree and seed alone.

    Args:
        engine ([`Engine`]):
            The policy.
        prompt ([`Prompt`]):
            What the policy was asked.
        rule ([`StepRule`]):
            Tells where steps end.
        seed (`int`):
            Seed of the run.
        extractors (`tuple[str, ...]`):
            Names of the answer extractors, in order.
        ending (`tuple[str, ...]`):
            Extractors whose answers end a solution, next to the end of the sequence and the final stop strings. See
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
        Sample what a request asks for.

        Returns:
            `dict[str, Any]`: A `samples` event. It has no samples if the policy has no room for another token: the solution is
            cut off, as by any limit of length.

        Raises:
            `EngineError`: If the request failed.
            `EngineFatal`: If no request can succeed.
        """
        above = opened.node_id(request)
        prefix_ids = opened.tree.prefix_ids(request.node)
        seed = request_seed(self.seed, above, request.round)
        end_of_prompt = self.engine.tokenizer.decode(opened.tree.prompt_ids[-16:], skip_special_tokens=True)
        # what the policy has written, after the tag with which the prompt may begin its thinking
        before = ("<think>" if opens_thinking(end_of_prompt) else "") + opened.tree.text(request.node)
        try:
            samples = await self.engine.sample(
                prefix_ids, request.n, request.stop, request.max_tokens, seed, opened.tree.problem.problem_id
            )
            check_samples(samples, request.n)
            ended = [(sample, _thinking_tail(before, sample.text)) for sample in samples]
            if request.role == "step":
                steps = (
                    self._end_step(opened, request, before, i, sample, progress) for i, sample in enumerate(samples)
                )
                # if one fails, none of the others is left running
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

    async def _end_step(
        self, opened: OpenTree, request: Request, before: str, place: int, sample: Sample, progress: "Progress"
    ) -> tuple[Sample, int]:
        """
        Return a sample up to the end of its first step, and how many of its last characters belong to the next step.

        The stop strings of a request cannot express all of a rule. A sample that goes beyond the end of a step is cut there, and
        one that a stop string ended inside a step is continued. Neither changes the distribution of steps.
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
                found = None  # nothing follows the end of the step but the end of the solution
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
        Return a sample up to a boundary, or to the end of the token that holds the boundary, and its number of characters beyond
        the end of the step.
        """
        cut = cut_at(self.engine.tokenizer, prefix_ids, sample.token_ids, sample.text, found.stop - before)
        if cut is not None and cut.tokens < len(sample.token_ids):
            ids, text = sample.token_ids[: cut.tokens], sample.text[: cut.characters]
            sample = replace(sample, token_ids=ids, text=text, finish="stop", stop_reason=found.marker)
        elif is_over:  # one token holds the end of the step and the end of the solution
            return sample, 0
        elif sample.finish == "length":
            sample = replace(sample, finish="stop", stop_reason=found.marker)
        return sample, before + len(sample.text) - found.end

    def _record(
        self, request: Request, before: str, prefix_ids: list[int], sample: Sample, tail: int
    ) -> dict[str, Any]:
        """What the log keeps of a sample: with the answer if the solution ends, and with the steps of a whole solution."""
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
    """How many characters of a text that ends a solution belong to no step: all of them if the model never stops thinking."""
    return len(text) if only_thinks(before, text) else 0
