"""A search tree: a problem, the steps that a policy sampled, and how the solutions they led to were graded."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..grading import visible_text


ROOT = -1


@dataclass(frozen=True)
class Problem:
    """
    A problem to solve.

    Args:
        problem_id (`str`):
            The key of the problem everywhere. Its text never is.
        prompt (`str`):
            The problem, as the user wrote it.
        answer (`str`):
            The reference answer.
        prefix (`str`, *optional*, defaults to `""`):
            The given beginning of the solution. Only step searches can continue from one.
    """

    problem_id: str
    prompt: str
    answer: str
    prefix: str = ""


@dataclass(slots=True)
class Node:
    """
    One piece of text that the policy wrote after the text of its ancestors.

    Args:
        node_id (`str`):
            16 hex digits: a hash of run, problem and place in the tree, so that restarts and shards agree.
        parent (`int`):
            Index of the node before it in [`SearchTree.nodes`], `-1` (`ROOT`) for the prompt. A parent comes before its
            children.
        child_index (`int`):
            Place among the samples of one request.
        round (`int`):
            Which request of the parent it came from: a node may be sampled from more than once.
        token_ids (`list[int]`):
            What the policy wrote, with the stop string that ended it. Never tokenised again.
        text (`str`):
            The same as text. The texts from the first node to this one, joined, are what the policy wrote.
        tail (`int`, *optional*, defaults to `0`):
            How many of the last characters of `text` belong to the next step, such as a header `# Step 3` that ended this one.
            If the model never stops thinking, all of `text`.
        role (`str`, *optional*, defaults to `"step"`):
            `"step"`: sampled as a next step. `"rollout"`: sampled to the end of the solution, to judge its parent.
            `"segment"`: one step of a rollout that was cut into steps; no sample of its own. `"given"`: one step of the
            problem's prefix, which was not sampled.
        num_cached (`int`, *optional*, defaults to `0`):
            Prefix tokens that the engine took from its cache.
        seed (`int`, *optional*, defaults to `0`):
            Seed of this sample.
        finish (`str`, *optional*, defaults to `"stop"`):
            Why sampling ended: `"stop"` (a stop string), `"eos"`, `"length"`.
        stop_reason (`str`, *optional*):
            The stop string, if one ended it.
        is_final (`bool`, *optional*, defaults to `False`):
            Whether the solution ends here, by the end of the sequence or by a final stop string.
        answer (`str`, *optional*):
            The answer read from the solution that ends here.
        correct (`bool`, *optional*):
            Whether `answer` is right. `None` if there is no answer, and if the grader could not decide.
        weight (`float`, *optional*, defaults to `1.0`):
            How many samples it stands for among its siblings, where a budget left some of them out.
        cuts (`tuple[int, ...]`, *optional*, defaults to `()`):
            Where the later of several merged steps begin in `text`, header included.
        merged_from (`tuple[str, str]`, *optional*):
            Ids of the two nodes that node compression made it of. Its descendants have none, but new ids too.
        value (`float`, *optional*):
            The value that the source recorded, for trees searched by others. It then stands for the node's leaves.
    """

    node_id: str
    parent: int
    child_index: int
    round: int
    token_ids: list[int]
    text: str
    tail: int = 0
    role: str = "step"
    num_cached: int = 0
    seed: int = 0
    finish: str = "stop"
    stop_reason: str | None = None
    is_final: bool = False
    answer: str | None = None
    correct: bool | None = None
    weight: float = 1.0
    cuts: tuple[int, ...] = ()
    merged_from: tuple[str, str] | None = None
    value: float | None = None

    @property
    def sort_key(self) -> tuple:
        """Order among siblings: steps and rollouts by round and place, segments after the rollout they were cut from."""
        return self.round, self.child_index, self.role == "segment", self.node_id

    @property
    def num_merged(self) -> int:
        """Number of original steps in the text."""
        return len(self.cuts) + 1

    @property
    def is_sample(self) -> bool:
        """Whether it is one draw of what follows its parent. Only draws say what the parent is worth."""
        return self.role not in ("segment", "given") and self.merged_from is None


@dataclass
class SearchTree:
    """
    A problem and its nodes.

    Args:
        problem ([`Problem`]):
            The problem.
        nodes (`list[Node]`, *optional*):
            Nodes; a parent comes before its children.
        prompt_ids (`list[int]`, *optional*):
            Token ids of the rendered prompt.
        status (`str`, *optional*, defaults to `"open"`):
            `"open"`, or why the search of this problem ended: `"done"`, `"always_solved"` or `"never_solved"` (root
            filter), `"ungradable"` (the reference answer cannot be read), `"prompt_too_long"`, `"error"`.
    """

    problem: Problem
    nodes: list[Node] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    status: str = "open"

    def children(self) -> list[list[int]]:
        """Indices of the children of each node, in order of index. The last entry is for the prompt."""
        children: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for i, node in enumerate(self.nodes):
            children[node.parent].append(i)
        return children

    def path(self, index: int) -> list[int]:
        """Indices of the nodes from the first to `index`, both included; empty for the prompt."""
        path = []
        while index != ROOT:
            path.append(index)
            index = self.nodes[index].parent
        return path[::-1]

    def depth(self, index: int) -> int:
        """Number of nodes on the path to `index`: 0 for the prompt."""
        return len(self.path(index))

    def text(self, index: int) -> str:
        """Everything that the policy wrote up to the end of node `index`."""
        return "".join(self.nodes[i].text for i in self.path(index))

    def prefix_ids(self, index: int) -> list[int]:
        """Token ids of the prompt and of everything up to the end of node `index`: what the policy continues."""
        return self.prompt_ids + [token for i in self.path(index) for token in self.nodes[i].token_ids]

    def step_text(self, index: int, merge_separator: str = "\n") -> str:
        """
        Text of the step at `index` alone: with the header that ended the node before it, without the one that ended it, and
        without a reasoning model's thinking. Merged steps are joined by `merge_separator`.
        """
        return merge_separator.join(self.step_pieces(index))

    def step_pieces(self, index: int) -> list[str]:
        """The texts of the original steps that [`SearchTree.step_text`] joins."""
        node = self.nodes[index]
        header = ""
        if node.parent != ROOT and self.nodes[node.parent].tail:
            header = self.nodes[node.parent].text[-self.nodes[node.parent].tail :]
        end = len(node.text) - node.tail
        if not node.cuts:
            return [visible_text(header + node.text[:end]).strip()]
        ends = [*node.cuts, end]
        pieces = [node.text[start:end] for start, end in zip([0, *node.cuts], ends, strict=True)]
        return [visible_text(piece).strip() for piece in [header + pieces[0], *pieces[1:]]]

    def canonical(self) -> "SearchTree":
        """The same tree with its nodes in depth-first order, siblings by round and place: the order of arrival is gone."""
        children = self.children()
        order: list[int] = []
        pending = [ROOT]
        while pending:
            index = pending.pop()
            if index != ROOT:
                order.append(index)
            below = sorted(children[index], key=lambda i: self.nodes[i].sort_key, reverse=True)
            pending.extend(below)
        new_index = {old: new for new, old in enumerate(order)} | {ROOT: ROOT}
        nodes = [replace(self.nodes[old], parent=new_index[self.nodes[old].parent]) for old in order]
        return SearchTree(self.problem, nodes, self.prompt_ids, self.status)


def make_id(*parts: Any) -> str:
    """16 hex digits that stand for the parts."""
    return hashlib.blake2b("\n".join(str(part) for part in parts).encode(), digest_size=8).hexdigest()


def walk(tree: SearchTree) -> Iterator[tuple[int, Node, int]]:
    """Index, node and depth of every node, in order of index."""
    depths: list[int] = []
    for index, node in enumerate(tree.nodes):
        depths.append(1 if node.parent == ROOT else depths[node.parent] + 1)
        yield index, node, depths[-1]
