"""Scripted judges: they say yes with a known probability, which the judged step contains, such as `p0.8`."""

import math
import re

from trl_hrm.search.engines.base import CharTokenizer, ScriptedEngine


class ChatTokenizer(CharTokenizer):
    """One token per character, with a chat template."""

    chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "".join(f"<{one['role']}>{one['content']}</>" for one in messages) + "<assistant>"


class Judge(ScriptedEngine):
    """Scripted engine that records its requests."""

    max_length = None

    def __init__(self, script):
        super().__init__(script)
        self.tokenizer = ChatTokenizer()
        self.requests = []
        self.is_closed = False

    async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
        self.requests.append((self.tokenizer.decode(prefix_ids), n))
        return await super().sample(prefix_ids, n, stop, max_tokens, seed, key)

    async def close(self):
        self.is_closed = True


class ProbabilityJudge(Judge):
    """A judge whose engine returns the probability of yes, but whose words are always no."""

    has_logprobs = True

    async def next_logprobs(self, prefix_ids, token_ids, key=""):
        assert token_ids == [ord("Y"), ord("N")]
        p = rate_of(self.tokenizer.decode(prefix_ids)) / 2  # the other half of the probability is on other tokens
        return [math.log(p), math.log(0.5 - p)]


def rate_of(prompt: str) -> float:
    """Return the probability in the last step of the prompt."""
    return float(re.findall(r"p(0\.\d+|0|1)\b", prompt.rpartition("<assistant>")[0])[-1])


def instruct(prompt: str, rng) -> str:
    """Write a critique and a verdict."""
    return f"I checked {rng.random()}.\n**Verdict: {'Yes' if rng.random() < rate_of(prompt) else 'No'}**"


def no_instruct(prompt: str, rng) -> str:
    """Write a critique and the verdict no."""
    return f"I checked {rng.random()}.\nVerdict: No"
