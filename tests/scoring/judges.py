"""Scripted judges: they say yes with a known probability, which the judged step contains, such as `p0.8`."""

import math
import re

from trl_hrm.search.engines.base import CharTokenizer, EngineError, ScriptedEngine


class ChatTokenizer(CharTokenizer):
    """One token per character, with a chat template."""

    chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{one['role']}>{one['content']}</>" for one in messages) + "<assistant>"


class Judge(ScriptedEngine):
    """Scripted engine that records its requests, and fails after some of them."""

    def __init__(self, script, max_length=None, fails_after=math.inf, latency=None):
        super().__init__(script, latency)
        self.tokenizer = ChatTokenizer()
        self.max_length = max_length
        self.fails_after = fails_after
        self.requests = []
        self.is_closed = False

    async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
        if len(self.requests) >= self.fails_after:
            raise EngineError("the server is gone")
        self.requests.append((self.tokenizer.decode(prefix_ids), n))
        return await super().sample(prefix_ids, n, stop, max_tokens, seed, key)

    def describe(self):
        return {"engine": "scripted", "model": "judge", "torch": "2.0"}

    async def close(self):
        self.is_closed = True


class ProbabilityJudge(Judge):
    """A judge whose engine returns the probability of yes and no. Half of the probability is on other words."""

    has_logprobs = True

    async def next_logprobs(self, prefix_ids, token_ids, key=""):
        assert token_ids == [ord("Y"), ord("N")]
        yes = rate_of(self.tokenizer.decode(prefix_ids)) / 2
        return [math.log(yes), math.log(0.5 - yes)]


def rate_of(prompt: str) -> float:
    """Return the last probability before the response."""
    return float(re.findall(r"p(0\.\d+|0|1)\b", prompt.rpartition("<assistant>")[0])[-1])


def instruct(prompt: str, rng) -> str:
    """Write a critique and a verdict."""
    return f"I checked {rng.random()}.\n**Verdict: {'Yes' if rng.random() < rate_of(prompt) else 'No'}**"


def always_no(prompt: str, rng) -> str:
    return "I did not like it.\nVerdict: No"


def genprm(prompt: str, rng) -> str:
    """Write a critique, or the word after it."""
    if prompt.endswith("\\boxed{"):
        return ("Yes" if rng.random() < rate_of(prompt) else "No") + "}$\n</output>"
    return f"it adds up {rng.randrange(10)}\n</analyze>\n<verify>never read"


def thinkprm(prompt: str, rng) -> str:
    """Judge steps until one is wrong, or write the word at the end."""
    steps = prompt.rpartition("[Solution]")[2].rpartition("Review")[0].strip().splitlines()
    if prompt.endswith("Is the solution correct? "):
        return "No" if "incorrect" in prompt.rpartition("<assistant>")[2] else "Yes"
    words = []
    for step in steps:
        words.append("correct" if rng.random() < float(step.rpartition("p")[2]) else "incorrect")
        if words[-1] == "incorrect":
            break
    return "".join(f"\nStep {i}: the step is \\boxed{{{word}}}" for i, word in enumerate(words, 1)) + "</think> more"
