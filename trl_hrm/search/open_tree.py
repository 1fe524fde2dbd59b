"""Search tree that grows by events. A running search and a log that is read back apply the same events."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .steps import Cut
from .tree import ROOT, Node, Problem, SearchTree, make_id


if TYPE_CHECKING:
    from .step_search import Beam


@dataclass(frozen=True)
class Request:
    """
    Samples that a search requests next.

    Args:
        node (`int`):
            Index of the node to continue. `ROOT` for the prompt.
        n (`int`):
            Number of samples.
        role (`str`):
            `"step"` or `"rollout"`.
        stop (`tuple[str, ...]`):
            Strings that end a sample.
        max_tokens (`int`):
            Maximum number of tokens per sample.
        round (`int`, *optional*, defaults to `0`):
            Number that distinguishes the requests of one node.
        cut (`bool`, *optional*, defaults to `False`):
            Whether to split the samples, which are whole solutions, into chains of steps.
        weight (`float`, *optional*, defaults to `1.0`):
            Number of siblings that `node` represents, including itself.
        sequences, tokens (`int`, *optional*, defaults to `0`):
            Budget of this request and all requests below it.
    """

    node: int
    n: int
    role: str
    stop: tuple[str, ...]
    max_tokens: int
    round: int = 0
    cut: bool = False
    weight: float = 1.0
    sequences: int = 0
    tokens: int = 0


def request_seed(seed: int, node_id: str, round: int) -> int:
    """
    Return the seed of a request: 36 bits that depend on run, node and round, followed by 16 zero bits for the index of the sample.
    Seeds are below 2**53, so every JSON reader can represent them.

    The rounds of a node have consecutive leading bits, so their seeds do not overlap.
    """
    leading = int(make_id("seed", seed, node_id), 16) + round
    return leading % 2**36 << 16


@dataclass
class OpenTree:
    """
    Search tree with the state that its search needs to continue.

    Args:
        tree ([`SearchTree`]):
            The tree, with nodes in order of arrival.
        root_id (`str`):
            Id of the prompt.
        position (`int`):
            Index of the problem among all problems of the run.
        index (`dict[str, int]`):
            Index of each node by id.
        cuts (`dict[int, list[Cut]]`):
            Ends of the steps of each rollout.
        brought (`dict[tuple[str, int], list[int]]`):
            Nodes added by each request. The keys are the id of the continued node and the round.
        graded (`set[tuple[str, int]]`):
            Requests whose final samples have been graded.
        scores (`dict[int, float | None]`):
            Score of each step, in a search guided by a reward model. `None` for a node without a score.
        ungraded (`dict[int, str]`):
            Why the grader could not decide whether an answer is right, by node. Missing in logs of earlier versions.
        num_given (`int`, *optional*, defaults to `0`):
            Number of steps in the prefix of the problem. They are a chain at the start of `tree.nodes`.
        beams (`list[Beam]`, *optional*):
            Beams of a step search, derived from the scores.
    """

    tree: SearchTree
    root_id: str
    position: int
    index: dict[str, int] = field(default_factory=dict)
    cuts: dict[int, list[Cut]] = field(default_factory=dict)
    brought: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    graded: set[tuple[str, int]] = field(default_factory=set)
    scores: dict[int, float | None] = field(default_factory=dict)
    ungraded: dict[int, str] = field(default_factory=dict)
    num_given: int = 0
    beams: list["Beam"] = field(default_factory=list)

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> "OpenTree":
        """Create a tree from a `problem` event."""
        problem = Problem(event["problem_id"], event["prompt"], event["answer"], event.get("prefix", ""))
        tree = SearchTree(problem, prompt_ids=event["prompt_ids"])
        opened = cls(tree, event["root_id"], event["position"], index={event["root_id"]: ROOT})
        if problem.prefix:  # its steps become a chain below the prompt, without scores
            cuts = [Cut(*cut) for cut in event["prefix_cuts"]]
            for number, (ids, text, tail) in enumerate(_pieces(event["prefix_ids"], problem.prefix, cuts)):
                node_id = make_id("given", opened.root_id, number)
                opened._add(Node(node_id, number - 1, 0, 0, ids, text, tail, "given"))
                opened.scores[number] = None
            opened.num_given = len(cuts)
            last = tree.nodes[-1]
            if last.tail:  # its step number determines the headers that may end the next step
                last.stop_reason = last.text[-last.tail :]
        return opened

    @property
    def start(self) -> int:
        """Index of the node where the search starts: the last given step, or `ROOT` without a prefix."""
        return self.num_given - 1

    @property
    def sampled(self) -> list[Node]:
        """Nodes added by the search, without given steps."""
        return self.tree.nodes[self.num_given :]

    def node_id(self, request: Request) -> str:
        """Return the id of the node that a request continues."""
        return self.root_id if request.node == ROOT else self.tree.nodes[request.node].node_id

    def segment(self, rollout: int, number: int) -> int:
        """Return the index of step `number`, from 1, of a split rollout."""
        return self.index[make_id("segment", self.tree.nodes[rollout].node_id, number)]

    def apply(self, event: dict[str, Any]) -> None:
        """Update the tree with a `samples`, `scores`, `grades` or `close` event."""
        if event["event"] == "close":
            self.tree.status = event["status"]
            return
        key = event["above"], event["round"]
        if event["event"] == "samples":
            parent = self.index[event["above"]]
            if parent != ROOT:
                self.tree.nodes[parent].weight = event["weight"]
            self.brought[key] = []
            for i, sample in enumerate(event["samples"]):
                node = Node(
                    node_id=make_id(*key, i),
                    parent=parent,
                    child_index=i,
                    round=event["round"],
                    role=event["role"],
                    seed=event["seed"] + i,
                    **{name: value for name, value in sample.items() if name != "cuts"},
                )
                self.brought[key].append(self._add(node))
                if "cuts" in sample:
                    self.cuts[self.brought[key][-1]] = [Cut(*cut) for cut in sample["cuts"]]
            if event["cut"]:
                for index in self.brought[key]:
                    self._cut(index)
        elif event["event"] == "scores":
            self.scores.update(zip(self.brought[key], event["scores"], strict=True))
        elif event["event"] == "grades":
            if "status" in event:
                statuses = zip(self.brought[key], event["status"], event["correct"], strict=True)
                self.ungraded.update((i, status) for i, status, correct in statuses if status and correct is None)
            for index, correct in zip(self.brought[key], event["correct"], strict=True):
                node = self.tree.nodes[index]
                node.correct = correct
                last = make_id("segment", node.node_id, len(self.cuts.get(index, ())))
                if last in self.index:
                    self.tree.nodes[self.index[last]].correct = correct
            self.graded.add(key)

    def _cut(self, rollout: int) -> None:
        """Add the steps of a rollout as a chain next to it. The last step has the outcome of the rollout."""
        whole = self.tree.nodes[rollout]
        parent = whole.parent
        pieces = _pieces(whole.token_ids, whole.text, self.cuts[rollout])
        for number, (token_ids, text, tail) in enumerate(pieces, start=1):
            is_last = number == len(self.cuts[rollout])
            node = Node(
                node_id=make_id("segment", whole.node_id, number),
                parent=parent,
                child_index=whole.child_index if number == 1 else 0,
                round=whole.round,
                token_ids=token_ids,
                text=text,
                tail=tail,
                role="segment",
                seed=whole.seed,
            )
            if is_last:
                node.finish, node.stop_reason, node.is_final = whole.finish, whole.stop_reason, whole.is_final
                node.answer, node.correct = whole.answer, whole.correct
            parent = self._add(node)

    def _add(self, node: Node) -> int:
        assert node.node_id not in self.index, f"node {node.node_id} was added twice"
        self.tree.nodes.append(node)
        self.index[node.node_id] = len(self.tree.nodes) - 1
        return len(self.tree.nodes) - 1


def _pieces(token_ids: list[int], text: str, cuts: Sequence[Cut]) -> Iterator[tuple[list[int], str, int]]:
    """Yield token ids, text and tail of each step."""
    first, begin = 0, 0
    for cut in cuts:
        yield token_ids[first : cut.tokens], text[begin : cut.characters], cut.tail
        first, begin = cut.tokens, cut.characters
