"""token_steps against a slow reference that decodes every prefix of the ids."""

from trl_hrm.rewards import ScoredCompletion
from trl_hrm.search.steps import RULES, step_spans
from trl_hrm.token_steps import token_steps

from .fakes import byte_level


def completion_of(*texts: str, keep_thinking: bool = False, **fields) -> ScoredCompletion:
    """Return a completion whose steps end at blank lines. The score of step j is j."""
    spans = [step_spans(text, RULES["blank_line"], keep_thinking) for text in texts]
    scores = [float(j) for j in range(sum(map(len, spans)))]
    return ScoredCompletion(list(texts), spans, scores, 0.0, keep_thinking=keep_thinking, **fields)


class TestByHand:
    def test_tokens_of_steps_and_separators(self):
        """`x\\n\\n` are three tokens here: the separator belongs to the step before it."""
        tokenizer = byte_level()
        text = "a =\n\n因b"
        ids = tokenizer.encode(text)
        assert [tokenizer.decode(i) for i in ids] == ["a", " =", "\n", "\n", "�", "�", "�", "b"]
        assert token_steps(tokenizer, ids, completion_of(text)) == [0, 0, 0, 0, 1, 1, 1, 1]
