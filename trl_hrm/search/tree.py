"""Search tree: a problem, the steps sampled from a policy, and the grades of the solutions."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..grading import visible_text
from ..grading.extraction import untagged_parts
from .steps import BLANK


ROOT = -1

Role = Literal["step", "rollout", "segment", "given"]
Finish = Literal["stop", "eos", "length"]
Thinking = Literal["left_out", "kept", "opened"]
Status = Literal["open", "done", "always_solved", "never_solved", "ungradable", "prompt_too_long", "error"]


@dataclass(frozen=True)
class Problem:
    """
    A problem to solve.

    Args:
        problem_id (`str`):
            Unique id of the problem. The text of a problem is never used as key.
        prompt (`str`):
            Text of the problem, without a prompt template.
        answer (`str`):
            Reference answer.
        prefix (`str`, *optional*, defaults to `""`):
            Given beginning of the solution. Only step searches can continue from a prefix.
    """

    problem_id: str
    prompt: str
    answer: str
    prefix: str = ""


@dataclass(slots=True)
class Node:
    """
    A piece of text that the policy generated after the text of its ancestors.

    Args:
        node_id (`str`):
            Hash of run, problem and position in the tree, as 16 hex digits. It is the same after a restart and in all shards.
        parent (`int`):
            Index of the parent in [`SearchTree.nodes`], `-1` (`ROOT`) for the prompt. A parent comes before its children.
        child_index (`int`):
            Index among the samples of one request.
        round (`int`):
            Which request of the parent the node belongs to. A node may be sampled from more than once.
        token_ids (`list[int]`):
            Generated token ids, including the stop string that ended them. They are never re-tokenized.
        text (`str`):
            Generated text. Joined from the first node to this one, the texts are the output of the policy.
        tail (`int`, *optional*, defaults to `0`):
            Number of characters at the end of `text` that belong to the next step, such as the header `# Step 3` that ended this
            step. If the model never stops thinking, all of `text`.
        role (`str`, *optional*, defaults to `"step"`):
            `"step"`: sampled as a next step. `"rollout"`: sampled to the end of the solution, to estimate its parent.
            `"segment"`: one step of a rollout that was split into steps, not sampled on its own. `"given"`: one step of the
            problem's prefix, not sampled.
        num_cached (`int`, *optional*, defaults to `0`):
            Number of prefix tokens that the engine took from its cache.
        seed (`int`, *optional*, defaults to `0`):
            Random seed of this sample.
        finish (`str`, *optional*, defaults to `"stop"`):
            Why generation ended: `"stop"` (a stop string), `"eos"` or `"length"`.
        stop_reason (`str`, *optional*):
            The stop string that ended the sample, if any.
        is_final (`bool`, *optional*, defaults to `False`):
            Whether the solution ends here, with the end of the sequence or a final stop string.
        answer (`str`, *optional*):
            Answer extracted from the solution that ends here.
        correct (`bool`, *optional*):
            Whether `answer` is right. `None` if the answer is missing or the grader could not decide.
        weight (`float`, *optional*, defaults to `1.0`):
            Number of samples that the node represents, including itself, if the budget dropped some of its siblings.
        cuts (`tuple[int, ...]`, *optional*, defaults to `()`):
            For merged steps, the start of each step after the first in `text`, including its header.
        merged_from (`tuple[str, str]`, *optional*):
            Ids of the two nodes that node compression merged into this node. `None` for its descendants, although their ids change.
        value (`float`, *optional*):
            MC score recorded by the source, for trees that were searched by other software. It replaces the leaf counts.
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
        """Sort key among siblings: steps and rollouts by round and index, segments after their rollout."""
        return self.round, self.child_index, self.role == "segment", self.node_id

    @property
    def num_merged(self) -> int:
        """Number of original steps in the text."""
        return len(self.cuts) + 1

    @property
    def is_sample(self) -> bool:
        """Whether the node is a sample of its parent's continuation. Only samples are used to estimate the parent."""
        return self.role not in ("segment", "given") and self.merged_from is None


@dataclass
class SearchTree:
    """
    A problem and its nodes.

    Args:
        problem ([`Problem`]):
            The problem.
        nodes (`list[Node]`, *optional*):
            Nodes of the tree. A parent comes before its children.
        prompt_ids (`list[int]`, *optional*):
            Token ids of the rendered prompt.
        status (`str`, *optional*, defaults to `"open"`):
            `"open"`, or why the search of this problem ended: `"done"`, `"always_solved"` or `"never_solved"` (root filter),
            `"ungradable"` (unreadable reference answer), `"prompt_too_long"` or `"error"`.
        thinking (`str`, *optional*, defaults to `"left_out"`):
            Whether the steps include the thinking of a reasoning model: `"left_out"`, `"kept"` (see [`~search.thinking.ThinkingRule`]),
            or `"opened"`, which is `"kept"` after a prompt that ends with an opening thinking tag.
        value (`float`, *optional*):
            MC score of the prompt recorded by the source, as in [`Node`].
    """

    problem: Problem
    nodes: list[Node] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    status: str = "open"
    thinking: str = "left_out"
    value: float | None = None

    def children(self) -> list[list[int]]:
        """Return the indices of the children of each node, in ascending order. The last entry is for the prompt."""
        children: list[list[int]] = [[] for _ in range(len(self.nodes) + 1)]
        for i, node in enumerate(self.nodes):
            children[node.parent].append(i)
        return children

    def path(self, index: int) -> list[int]:
        """Return the indices of the nodes on the path to `index`, including `index`. Empty for the prompt."""
        path = []
        while index != ROOT:
            path.append(index)
            index = self.nodes[index].parent
        return path[::-1]

    def depth(self, index: int) -> int:
        """Return the number of nodes on the path to `index`. 0 for the prompt."""
        return len(self.path(index))

    def text(self, index: int) -> str:
        """Return the text that the policy generated up to the end of node `index`."""
        return "".join(self.nodes[i].text for i in self.path(index))

    def prefix_ids(self, index: int) -> list[int]:
        """Return the token ids of the prompt and of the path to `index`, for the policy to continue."""
        return self.prompt_ids + [token for i in self.path(index) for token in self.nodes[i].token_ids]

    def step_text(self, index: int, merge_separator: str = "\n") -> str:
        """
        Return the text of the step at `index`, with its own header, without the header of the next step, and without the thinking
        of a reasoning model or, if thinking is kept, without its tags. Merged steps are joined by `merge_separator`.
        """
        return merge_separator.join(self.step_pieces(index))

    def step_pieces(self, index: int) -> list[str]:
        """Return the texts of the original steps, which [`SearchTree.step_text`] joins."""
        node = self.nodes[index]
        header = ""
        if node.parent != ROOT and self.nodes[node.parent].tail:
            header = self.nodes[node.parent].text[-self.nodes[node.parent].tail :]
        ends = [*node.cuts, len(node.text) - node.tail]
        pieces = [node.text[start:end] for start, end in zip([0, *node.cuts], ends, strict=True)]
        pieces[0] = header + pieces[0]
        if self.thinking == "left_out":
            return [visible_text(piece).strip() for piece in pieces]
        # Only a whole rollout has several parts
        parts = [[piece[start:end].strip() for start, end, _ in untagged_parts(piece)] for piece in pieces]
        return ["\n\n".join(part for part in found if part.strip(BLANK)) for found in parts]

    def canonical(self) -> "SearchTree":
        """Return the tree with its nodes in depth-first order, so that it does not depend on the order of arrival."""
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
        return replace(self, nodes=nodes)


def make_id(*parts: Any) -> str:
    """Return a hash of the parts, as 16 hex digits."""
    return hashlib.blake2b("\n".join(str(part) for part in parts).encode(), digest_size=8).hexdigest()


def walk(tree: SearchTree) -> Iterator[tuple[int, Node, int]]:
    """Yield index, node and depth of every node, in order of index."""
    depths: list[int] = []
    for index, node in enumerate(tree.nodes):
        depths.append(1 if node.parent == ROOT else depths[node.parent] + 1)
        yield index, node, depths[-1]
