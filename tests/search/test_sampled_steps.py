"""Steps sampled one at a time follow the rule, even where stop strings alone cannot tell where a step ends."""

import asyncio
import random
from dataclasses import replace

import pytest

from trl_hrm.search.engines.base import CharTokenizer, PrefixTooLong, Sample, ScriptedEngine, find_stop
from trl_hrm.search.policies import FullTree
from trl_hrm.search.step_search import GreedyStepSearch
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import Problem

from .leveled import open_trees, run_levels
from .scripted import PROMPT, read_trees, run_scripted


class Pieces(CharTokenizer):
    """
    A tokenizer whose tokens are the pieces of one text, numbered from 1000. Other tokens are characters. As with byte-level
    tokenizers, a piece may be part of a character.
    """

    def __init__(self, pieces: list[str | bytes]):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def decode(self, ids, skip_special_tokens=True):
        parts = (self.pieces[i - 1000] if i >= 1000 else chr(i).encode() for i in ids if i)
        return b"".join(parts).decode(errors="replace")


class Reciting(ScriptedEngine):
    """Write one text with the given pieces as tokens. Stop after the token with a stop string, like servers."""

    def __init__(self, pieces: list[str | bytes]):
        super().__init__(None)
        self.tokenizer = Pieces(pieces)
        self.requests: list[tuple[int, int]] = []
        self.seeds: list[int] = []

    async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
        await asyncio.sleep(0)
        assert len(stop) <= 4
        self.requests.append((n, max_tokens))
        self.seeds += range(seed, seed + n)
        written = sum(i >= 1000 for i in prefix_ids)
        ids: list[int] = []
        for token in range(1000 + written, 1000 + len(self.tokenizer.pieces)):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            found = find_stop(text, stop)
            if found:
                return [Sample(list(ids), text, "stop", found[1]) for _ in range(n)]
            if len(ids) == max_tokens:
                return [Sample(list(ids), text, "length") for _ in range(n)]
        return [Sample([*ids, 0], self.tokenizer.decode(ids), "eos") for _ in range(n)]


def split(text: str, rng: random.Random, longest: int) -> list[str]:
    """Return the text in pieces of 1 to `longest` characters, with its end string as a separate piece."""
    body, end, _ = text.partition("# END!")
    pieces = []
    while body:
        size = rng.randint(1, longest)
        pieces.append(body[:size])
        body = body[size:]
    return [*pieces, *list(end)]


def recite(folder, rule: str, pieces: list[str], prompt: str = "{question}\n\n", max_tokens: int = 400):
    """Search with a policy that recites a solution, and return the step texts, the tree and the engine."""
    engine = Reciting(pieces)
    search = GreedyStepSearch(
        num_candidates=1, rule=RULES[rule], final_stops=PROMPT.final_stops, max_depth=60, max_step_tokens=max_tokens
    )
    asked = replace(PROMPT, template=prompt, rule=rule)
    run_levels(folder, search, [(0, Problem("p", "Q", "7"))], engine=engine, prompt=asked)
    opened = open_trees(folder)["p"]
    (ending,) = search.endings(opened)
    steps = [opened.tree.step_text(i) for i in opened.tree.path(ending.node)]
    return [step for step in steps if step], opened.tree, engine


def steps_of(text: str, rule: str) -> list[str]:
    """Return the steps of a whole solution."""
    ends = RULES[rule].ends(text)
    pieces = [text[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]
    return [piece for piece in pieces if piece]


SOLUTIONS = {
    "two hashes": "## Step 1: Add\n3 + 4 = 7.\n\n## Step 2: Conclude\nIt is 7.\n\n### Step 3\nYes.\n\n# Answer\n\n7\n# END!",
    "mentions": "# Step 1\nAdd, as # Step 2 shows, and # Step 3 too.\n\n# Step 2\nBy ## Step 2 above.\n\n## Step 3\nSo 7.\n# END!",
    "bold": "**Step 1:** Add.\n\n**Step 2:** Multiply.\nStep 3 gives 5.\n\n**Step 3: Conclude**\nSo 7.\n\n**Step 4**\nYes.\n# END!",
    "plain": "Step 1: Add.\nStep 2: Multiply.\nStep 3: So 7.\n# END!",
    "skipped numbers": "# Step 1\nAdd.\n\n# Step 5\nMultiply.\n\n# Step 5\nAgain.\n\n# Step 9\nSo 7.\n# END!",
    "code": "# Step 1\n```python\n# Step 2: add\nx = 3 + 4\n# Step 3\n```\nIt is 7.\n\n# Step 2\nSo 7.\n# END!",
    "a list": "We do:\n1. Add 3 and 4. It is 7.\n2. Stop. Then 5! = 120 is e.g. no answer! Is it? Yes.\n\nSo 7. Bye",
    "chinese": "三加四等于七。答案是七！对吗？对。所以七",
    "blank lines": "\n\nAdd.\n \nMultiply.\n\n\n\nThen.\n\n# Answer\n\n7\n# END!",
    "rule of dashes": "Add.\n\n---\n\nMultiply.\n\n# Answer\n\n7\n# END!",
}


@pytest.mark.parametrize("rule", ["step_header", "blank_line", "sentence"])
@pytest.mark.parametrize("name", SOLUTIONS)
def test_sampled_steps_equal_the_steps_of_the_whole_solution(tmp_path, name, rule):
    """For any tokens, a whole header belongs to the next step, and a mention or list number ends nothing."""
    text, rng = SOLUTIONS[name], random.Random(f"{name} {rule}")
    for number in range(4):
        pieces = list(text) if number == 0 else split(text, rng, 2 if rule == "sentence" else 6)
        steps, tree, engine = recite(tmp_path / str(number), rule, pieces)
        assert [" ".join(step.split()) for step in steps] == [" ".join(step.split()) for step in steps_of(text, rule)]
        ids = [i for node in tree.nodes for i in node.token_ids]
        assert ids == [*range(1000, 1000 + len(pieces)), *[0] * (not text.endswith("# END!"))]
        assert "".join(node.text for node in tree.nodes) == text
        assert len(set(engine.seeds)) == len(engine.seeds)
        assert not any(node.finish == "length" for node in tree.nodes)
        assert not any(step.rstrip().endswith("#") for step in steps)


def test_a_hash_before_the_stop_string_opens_the_next_step(tmp_path):
    """The engine stops at `# Step 2`. The `#` before it belongs to the next step."""
    pieces = ["## Step 1\n", "Add.", "\n\n", "##", " Step", " 2", "\nSo 7.\n# END!"]
    steps, tree, _ = recite(tmp_path, "step_header", pieces)
    assert steps == ["## Step 1\nAdd.", "## Step 2\nSo 7.\n# END!"]
    first = tree.nodes[0]
    assert (first.text, first.tail) == ("## Step 1\nAdd.\n\n## Step 2", len("## Step 2"))
    assert (first.finish, first.stop_reason) == ("stop", "# Step 2")


def test_number_of_requests_per_step(tmp_path):
    """One request per step is enough if stop strings suffice. A stop string in a sentence costs a second request."""
    _, _, engine = recite(tmp_path / "a", "step_header", list("# Step 1\nAdd.\n\n# Step 2\nSo 7.\n# END!"))
    assert [n for n, _ in engine.requests] == [1, 1]
    text = "# Step 1\nBy # Step 2.\n\n# Step 2\nSo 7.\n# END!"
    _, _, engine = recite(tmp_path / "b", "step_header", list(text))
    assert engine.requests == [(1, 400), (1, 400 - text.index(".")), (1, 400)]


def test_continued_step_respects_max_step_tokens(tmp_path):
    text = "# Step 1\nBy # Step 2 and # Step 3 it is long.\n\n# Step 2\nSo 7.\n# END!"
    for max_tokens in range(1, text.index("\n\n")):
        _, tree, _ = recite(tmp_path / str(max_tokens), "step_header", list(text), max_tokens=max_tokens)
        [node] = tree.nodes
        assert (node.text, node.finish, node.stop_reason) == (text[:max_tokens], "length", None)


def test_full_context_cuts_off_a_continued_step(tmp_path):
    class Short(Reciting):
        async def sample(self, prefix_ids, *args, **kwargs):
            if sum(i >= 1000 for i in prefix_ids) > 15:
                raise PrefixTooLong("full")
            return await super().sample(prefix_ids, *args, **kwargs)

    engine = Short(list("# Step 1\nBy # Step 2.\n\n# Step 2\nSo 7.\n# END!"))
    search = FullTree(RULES["step_header"], PROMPT.final_stops, num_children=1, max_depth=3)
    run_scripted(tmp_path, search, [(0, Problem("p", "Q", "7"))], engine=engine)
    [node] = read_trees(tmp_path)["p"].nodes
    assert (node.text, node.finish) == ("# Step 1\nBy # Step 2", "length")


@pytest.mark.parametrize("parts", [[b" \xe5", b"\xa5\xbd"], [b" \xe5\xa5", b"\xbd"], [b" \xe5", b"\xa5", b"\xbd"]])
def test_a_character_in_several_tokens_stays_whole(tmp_path, parts):
    """The stop string ends in a token with the first bytes of the next character, as in Qwen's tokenizer."""
    pieces = ["Add 3", ".", *parts, "。", "So 7", "。", b"\xe5\xa5", b"\xbd"]
    steps, tree, engine = recite(tmp_path, "sentence", pieces)
    assert steps == ["Add 3.", "好。", "So 7。", "好"]
    assert "".join(node.text for node in tree.nodes) == "Add 3. 好。So 7。好"
    assert [i for node in tree.nodes for i in node.token_ids] == [*range(1000, 1000 + len(pieces)), 0]
    assert {(node.finish, node.stop_reason) for node in tree.nodes} == {("stop", ". "), ("stop", "。"), ("eos", None)}


def test_two_ends_in_one_token_are_one(tmp_path):
    """Ids are never re-encoded, so a step cannot end inside a token, just as when a whole solution is cut."""
    steps, tree, _ = recite(tmp_path, "sentence", ["三加", "四。对", "吗？对。所", "以七。", "好"])
    assert steps == ["三加四。", "对吗？", "对。所以七。", "好"]
    assert "".join(node.text for node in tree.nodes) == "三加四。对吗？对。所以七。好"


THOUGHT = "Is it 8.\n\n# Step 2\nNo.\n\n\\boxed{8}\n"


@pytest.mark.parametrize("rule", ["step_header", "blank_line", "sentence"])
@pytest.mark.parametrize("opened", [False, True], ids=["the policy opens", "the prompt opens"])
def test_thinking_is_part_of_no_step(tmp_path, rule, opened):
    """Thinking tokens stay in the node of the first step. Their text and answers are ignored."""
    rest = "\n\n# Step 1\nAdd.\n\n# Step 2\nSo 7.\n\n# Answer\n\n7\n# END!"
    text = ("" if opened else "<think>\n") + THOUGHT + "</think>" + rest
    steps, tree, _ = recite(tmp_path, rule, list(text), "{question}\n\n" + "<think>\n" * opened)
    assert [" ".join(step.split()) for step in steps] == [" ".join(step.split()) for step in steps_of(rest, rule)]
    assert "".join(node.text for node in tree.nodes) == text
    assert [node.answer for node in tree.nodes if node.is_final] == ["7"]


@pytest.mark.parametrize("opened", [False, True], ids=["the policy opens", "the prompt opens"])
def test_thinking_without_an_end_is_not_a_step(tmp_path, opened):
    steps, tree, _ = recite(
        tmp_path, "blank_line", list("<think>\n" * (not opened) + THOUGHT), "{question}\n\n" + "<think>\n" * opened
    )
    assert steps == [] and [node.answer for node in tree.nodes] == [None]
