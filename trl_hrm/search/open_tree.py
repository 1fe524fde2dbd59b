"""Search tree that grows by events. A running search and a log that is read back apply the same events."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ..io import shown
from ..schema import Count, Index, Share
from .steps import Cut
from .tree import ROOT, Finish, Node, Problem, SearchTree, Status, Thinking, make_id


if TYPE_CHECKING:
    from .step_search import Beam

Round = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
CutValues = tuple[Index, Index, Index]  # of a `Cut`


class ProblemEvent(TypedDict):
    """The first event of a problem."""

    event: Literal["problem"]
    problem_id: str
    position: Count
    root_id: str
    prompt: str
    answer: str
    prompt_ids: list[Index]
    thinking: NotRequired[Thinking]
    prefix: NotRequired[str]
    prefix_ids: NotRequired[list[Index]]
    prefix_cuts: NotRequired[list[CutValues]]


class LoggedSample(TypedDict):
    """One sample of a [`SamplesEvent`]. See [`Node`]."""

    token_ids: list[Index]
    text: str
    num_cached: Index
    finish: Finish
    stop_reason: str | None
    is_final: bool
    answer: NotRequired[str | None]
    tail: NotRequired[Index]
    cuts: NotRequired[list[CutValues]]


class SamplesEvent(TypedDict):
    """New nodes below the node `above`."""

    event: Literal["samples"]
    problem_id: str
    above: str
    round: Round
    role: Literal["step", "rollout"]
    cut: bool
    weight: Annotated[float, Field(ge=1, le=2**53)]
    seed: Annotated[int, Field(ge=0, le=2**53)]
    samples: list[LoggedSample]


class ScoresEvent(TypedDict):
    """Scores of the reward model for the samples of a request."""

    event: Literal["scores"]
    problem_id: str
    above: str
    round: Round
    scores: list[Share | None]


class GradesEvent(TypedDict):
    """Grades of the samples of a request. `status` is the reason of each grade, if one of them is `None`."""

    event: Literal["grades"]
    problem_id: str
    above: str
    round: Round
    correct: list[bool | None]
    status: NotRequired[list[str | None]]


class ErrorEvent(TypedDict):
    """A failed request."""

    event: Literal["error"]
    problem_id: str
    above: str
    round: Round
    message: str


class CloseEvent(TypedDict):
    """The end of a search. After the status `"error"`, it is resumed by the next run."""

    event: Literal["close"]
    problem_id: str
    status: Status


EVENTS: dict[str, type] = {
    "problem": ProblemEvent,
    "samples": SamplesEvent,
    "scores": ScoresEvent,
    "grades": GradesEvent,
    "error": ErrorEvent,
    "close": CloseEvent,
}


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
        """
        Create a tree from a `problem` event.

        Raises:
            `ValueError`: If the steps of the prefix do not match its text.
        """
        problem = Problem(event["problem_id"], event["prompt"], event["answer"], event.get("prefix", ""))
        tree = SearchTree(problem, prompt_ids=event["prompt_ids"], thinking=event.get("thinking", "left_out"))
        opened = cls(tree, event["root_id"], event["position"], index={event["root_id"]: ROOT})
        if problem.prefix:  # its steps become a chain below the prompt, without scores
            if missing := {"prefix_ids", "prefix_cuts"} - event.keys():
                raise ValueError(f"the event has a prefix without {' and '.join(sorted(missing))}.")
            cuts = [Cut(*cut) for cut in event["prefix_cuts"]]
            _check_cuts(cuts, event["prefix_ids"], problem.prefix)
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
        """
        Update the tree with an event other than the first.

        Raises:
            `ValueError`: If the event contradicts earlier events.
        """
        if event["event"] == "close":
            missing = self.brought.keys() - self.graded
            if missing and event["status"] not in ("open", "error"):
                raise ValueError(f"the search ended, but the samples of {shown(min(missing)[0])} have no grades.")
            self.tree.status = event["status"]
        elif event["event"] == "samples":
            self._add_samples(event)
        elif event["event"] == "scores":
            brought = self._brought(event, "scores")
            if any(index in self.scores for index in brought):
                raise ValueError(f"the samples of {shown(event['above'])} in round {event['round']} are scored twice.")
            self.scores.update(zip(brought, event["scores"], strict=True))
        elif event["event"] == "grades":
            brought, key = self._brought(event, "correct"), (event["above"], event["round"])
            if key in self.graded:
                raise ValueError(f"the samples of {shown(event['above'])} in round {event['round']} are graded twice.")
            statuses = event.get("status", [None] * len(brought))
            if "status" in event:
                self._brought(event, "status")
            for index, correct, status in zip(brought, event["correct"], statuses, strict=True):
                self._grade(index, correct, status)
            self.graded.add(key)

    def _brought(self, event: dict[str, Any], name: str) -> list[int]:
        """Return the nodes of the request that an event evaluates, which has a value in the list `name` for each of them."""
        brought = self.brought.get((event["above"], event["round"]))
        if brought is None:
            raise ValueError(
                f"the event refers to the samples of {shown(event['above'])}, but no earlier event created them."
            )
        if len(brought) != len(event[name]):
            raise ValueError(
                f"the event has {len(event[name])} values of `{name}`, but the request has {len(brought)} samples."
            )
        return brought

    def _add_samples(self, event: dict[str, Any]) -> None:
        key = event["above"], event["round"]
        if event["above"] not in self.index:
            raise ValueError(f"the event refers to the node {shown(event['above'])}, but no earlier event created it.")
        parent = self.index[event["above"]]
        if key in self.brought:
            raise ValueError(f"the node {shown(key[0])} is sampled twice in round {key[1]}.")
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
            if node.tail > len(node.text):
                raise ValueError(f"`samples[{i}].tail` is {node.tail}, but its text has {len(node.text)} characters.")
            self.brought[key].append(self._add(node))
            if "cuts" in sample:
                cuts = [Cut(*cut) for cut in sample["cuts"]]
                _check_cuts(cuts, node.token_ids, node.text)
                self.cuts[self.brought[key][-1]] = cuts
            elif event["cut"]:
                raise ValueError(f"`samples[{i}]` has no `cuts`.")
        if event["cut"]:
            for index in self.brought[key]:
                self._cut(index)

    def _grade(self, index: int, correct: bool | None, status: str | None) -> None:
        node = self.tree.nodes[index]
        if correct is not None and node.answer is None:
            raise ValueError(f"the event grades the sample {node.node_id}, which has no answer.")
        if status and correct is None:
            self.ungraded[index] = status
        node.correct = correct
        last = make_id("segment", node.node_id, len(self.cuts.get(index, ())))
        if last in self.index:
            self.tree.nodes[self.index[last]].correct = correct

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
        if node.node_id in self.index:
            raise ValueError(f"the node {node.node_id} is created twice.")
        self.tree.nodes.append(node)
        self.index[node.node_id] = len(self.tree.nodes) - 1
        return len(self.tree.nodes) - 1


def _pieces(token_ids: list[int], text: str, cuts: Sequence[Cut]) -> Iterator[tuple[list[int], str, int]]:
    """Yield token ids, text and tail of each step."""
    first, begin = 0, 0
    for cut in cuts:
        yield token_ids[first : cut.tokens], text[begin : cut.characters], cut.tail
        first, begin = cut.tokens, cut.characters


def _check_cuts(cuts: Sequence[Cut], token_ids: list[int], text: str) -> None:
    """Raise `ValueError` unless the cuts split the whole text, in order."""
    first, begin = 0, 0
    for cut in cuts:
        if not (first <= cut.tokens and begin <= cut.characters and cut.tail <= cut.characters - begin):
            raise ValueError(f"the cut {tuple(cut)} after {first} tokens and {begin} characters is out of order.")
        first, begin = cut.tokens, cut.characters
    if not cuts or (first, begin) != (len(token_ids), len(text)):
        raise ValueError(
            f"the cuts end after {first} tokens and {begin} characters, but there are {len(token_ids)} and {len(text)}."
        )
