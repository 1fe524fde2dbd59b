r"""
One forward pass per tree: a problem and its labelled steps are encoded as one row of tokens.

The token paths from the root to every step of a problem are inserted into a [`TokenTrie`], which stores each shared
token once. The trie is laid out in depth-first order. Two integers per token describe the tree:

- `position_ids[i]`: number of tokens on the path above token `i`;
- `subtree_end[i]`: first index after the subtree of token `i`.

A query `q` attends to a key `k` if and only if `k <= q < subtree_end[k]`, that is, if `k` is on the path of `q`. Every
token attends to its own path with the same positions as in a separate sequence. Logits and gradients are therefore the
same as with one sequence per path, up to float rounding. Several trees can be packed into one row without changes,
because no subtree extends beyond its tree.

Worked example: prompt `P Q`, a first step `a ;`, followed by the alternatives `b ;` and `c ;`:

| index | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
|---|---|---|---|---|---|---|---|---|
| token | P | Q | a | ; | b | ; | c | ; |
| `position_ids` | 0 | 1 | 2 | 3 | 4 | 5 | 4 | 5 |
| `subtree_end` | 8 | 8 | 8 | 8 | 6 | 6 | 8 | 8 |

Token 6 (`c`) attends to 0, 1, 2, 3 and itself. It does not attend to 4 and 5, whose subtrees end at 6. One sequence
per path would need 6 + 6 tokens instead of 8.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class TokenTree:
    """
    Tokens of one or several trees in depth-first order. L is the number of tokens, S the number of labelled steps.

    Args:
        input_ids (`np.ndarray`): Token ids, int32, shape `(L,)`.
        position_ids (`np.ndarray`): Number of tokens on the path above each token, int32, shape `(L,)`.
        subtree_end (`np.ndarray`): First index after the subtree of each token, int32, shape `(L,)`.
        step_positions (`np.ndarray`): Index of the step token of each labelled step, int32, ascending, shape `(S,)`.
        steps (`np.ndarray`): Number of each labelled step from [`TokenTrie.mark`], int32, shape `(S,)`.
        starts (`np.ndarray`): Number of tokens on the path before each labelled step, as given to [`TokenTrie.mark`], int32,
            shape `(S,)`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    step_positions: np.ndarray
    steps: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, kept: np.ndarray, owned: np.ndarray) -> "TokenTree":
        """
        Return the tree of some tokens, with the labelled steps of a part of them.

        Args:
            kept (`np.ndarray`):
                Whether to keep each token, bool, shape `(L,)`. The tokens above a kept token must be kept.
            owned (`np.ndarray`):
                Whether to keep the labelled steps that end at each token, bool, shape `(L,)`. Only kept tokens can be owned.
        """
        index = np.flatnonzero(kept)
        before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)  # number of kept tokens before each index
        inside = owned[self.step_positions]
        return TokenTree(
            input_ids=self.input_ids[index],
            position_ids=self.position_ids[index],
            subtree_end=before[self.subtree_end[index]],
            step_positions=before[self.step_positions[inside]],
            steps=self.steps[inside],
            starts=self.starts[inside],
        )

    def part(self, start: int, stop: int) -> "TokenTree":
        """
        Return the tokens in `[start, stop)`, preceded by a copy of the path above `start`.

        Labelled steps on the copied path are not included. They belong to the part with their original tokens.
        """
        owned = np.zeros(len(self), dtype=bool)
        owned[start:stop] = True
        kept = owned.copy()
        kept[:start] = self.subtree_end[:start] > start
        return self.select(kept, owned)

    def branch_starts(self) -> np.ndarray:
        """Return the indices of tokens that start a new branch instead of continuing the token before them."""
        return np.flatnonzero(self.position_ids[1:] != self.position_ids[:-1] + 1) + 1

    def chains(self) -> list["TokenTree"]:
        """Return one sequence per root-to-leaf path. Each labelled step is kept only in its first sequence."""
        cuts = [0, *self.branch_starts().tolist(), len(self)]
        return [self.part(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]

    def split(self, max_length: int) -> list["TokenTree"]:
        """
        Split the tree into parts of at most `max_length` tokens. Each labelled step is in exactly one part.

        Each part is a set of subtrees with a copy of the paths above them, so its logits do not change. From the leaves to the
        root, the parts below each branching are packed into as few parts as the path above them leaves room for (see
        [`pack`]), because each part repeats this path. Subtrees that share a long path are therefore packed first.

        Raises:
            `ValueError`: If a path is longer than `max_length`.
        """
        if self.position_ids.max(initial=-1) >= max_length:
            raise ValueError(
                f"A path of the tree has {self.position_ids.max() + 1} tokens, more than max_length {max_length}. Increase "
                "max_length, or drop the path."
            )
        if len(self) <= max_length:
            return [self]
        # Runs of tokens without a branching: a run starts with a new branch or with the first child of a branching
        is_start = self.position_ids[1:] != self.position_ids[:-1] + 1
        is_start |= self.subtree_end[1:] != self.subtree_end[:-1]
        cuts = [0, *(np.flatnonzero(is_start) + 1).tolist(), len(self)]
        depths, ends = self.position_ids.tolist(), self.subtree_end.tolist()

        def packed(below: list[tuple[int, list[int]]], room: int) -> list[tuple[int, list[int]]]:
            groups = pack([size for size, _ in below], room)
            return [(sum(below[i][0] for i in group), [run for i in group for run in below[i][1]]) for group in groups]

        # Subtrees whose parent has not been reached: first token, and the size and runs of each of their parts
        subtrees: list[tuple[int, list[tuple[int, list[int]]]]] = []
        for run in reversed(range(len(cuts) - 1)):
            start, length = cuts[run], cuts[run + 1] - cuts[run]
            below = []
            while subtrees and subtrees[-1][0] < ends[start]:
                below += subtrees.pop()[1]
            parts = packed(below, max_length - depths[start] - length) or [(0, [])]
            subtrees.append((start, [(size + length, [run, *runs]) for size, runs in parts]))
        roots = packed([part for _, parts in reversed(subtrees) for part in parts], max_length)
        free = np.ones(len(self), dtype=bool)  # tokens that no earlier part owns
        trees = []
        for runs in sorted(sorted(runs) for _, runs in roots):
            kept = np.zeros(len(self), dtype=bool)
            for run in runs:
                kept[cuts[run] : cuts[run + 1]] = True
            trees.append(self.select(kept, kept & free))
            free &= ~kept
        return trees

    @classmethod
    def join(cls, trees: Sequence["TokenTree"]) -> "TokenTree":
        """Concatenate trees into one row. Trees do not attend to each other."""
        offsets = np.cumsum([0, *(len(tree) for tree in trees)])[:-1]
        return cls(
            input_ids=np.concatenate([tree.input_ids for tree in trees]),
            position_ids=np.concatenate([tree.position_ids for tree in trees]),
            subtree_end=np.concatenate(
                [tree.subtree_end + offset for tree, offset in zip(trees, offsets, strict=True)]
            ),
            step_positions=np.concatenate(
                [tree.step_positions + offset for tree, offset in zip(trees, offsets, strict=True)]
            ),
            steps=np.concatenate([tree.steps for tree in trees]),
            starts=np.concatenate([tree.starts for tree in trees]),
        )


class TokenTrie:
    """
    Prefix tree over token ids. Paths with a common prefix share its tokens, even if the tokens belong to different
    steps.

    Example:

    ```python
    >>> trie = TokenTrie()
    >>> prompt = trie.insert([7, 8])
    >>> for ids in ([1, 9], [1, 2, 9]):  # two steps that begin with the same token
    ...     step = trie.mark(trie.insert(ids, after=prompt))
    >>> trie.layout().input_ids.tolist()
    [7, 8, 1, 9, 2, 9]
    ```
    """

    def __init__(self):
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}
        self._marks: dict[tuple[int, int], int] = {}  # number of each step, by its last node and its start

    def insert(self, ids: Sequence[int], after: int = -1) -> int:
        """Insert `ids` below node `after` (-1 for the root), and return the node of the last token."""
        node = after
        for token in ids:
            child = self._children.get((node, token))
            if child is None:
                child = len(self._tokens)
                self._children[node, token] = child
                self._tokens.append(token)
                self._parents.append(node)
                self._depths.append(0 if node == -1 else self._depths[node] + 1)
            node = child
        return node

    def path_length(self, node: int) -> int:
        """Return the number of tokens from the root to `node`, inclusive."""
        return 0 if node == -1 else self._depths[node] + 1

    def shared_length(self, node: int, other: int) -> int:
        """Return the number of tokens that the paths to two nodes share."""
        while node != other:
            if self.path_length(node) >= self.path_length(other):
                node = self._parents[node]
            else:
                other = self._parents[other]
        return self.path_length(node)

    def mark(self, node: int, start: int = 0) -> int:
        """
        Mark `node` as the step token of a labelled step that begins after `start` tokens of the path. Return the number of the
        step, which is the same for equal nodes and starts.
        """
        return self._marks.setdefault((node, start), len(self._marks))

    def layout(self) -> TokenTree:
        """Return all tokens on paths to marked nodes in depth-first order, with children in order of insertion."""
        count = len(self._tokens)
        size = [0] * count  # number of subtree tokens on paths to labelled steps. Parents come before children
        ends = {node for node, _ in self._marks}
        for node in reversed(range(count)):
            if size[node] or node in ends:
                size[node] += 1
                if self._parents[node] != -1:
                    size[self._parents[node]] += size[node]
        kept = [node for node in range(count) if size[node]]
        index = [0] * count
        free: dict[int, int] = {-1: 0}  # index of the next child of each node
        for node in kept:
            index[node] = free[self._parents[node]]
            free[self._parents[node]] += size[node]
            free[node] = index[node] + 1
        order = np.empty(len(kept), dtype=np.int32)
        order[[index[node] for node in kept]] = kept
        marked = sorted(self._marks, key=lambda mark: index[mark[0]])
        return TokenTree(
            input_ids=np.array([self._tokens[node] for node in order], dtype=np.int32),
            position_ids=np.array([self._depths[node] for node in order], dtype=np.int32),
            subtree_end=np.array([index[node] + size[node] for node in order], dtype=np.int32),
            step_positions=np.array([index[node] for node, _ in marked], dtype=np.int32),
            steps=np.array([self._marks[mark] for mark in marked], dtype=np.int32),
            starts=np.array([start for _, start in marked], dtype=np.int32),
        )


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """
    Pack pieces into rows of at most `max_length` tokens by best-fit decreasing.

    Args:
        lengths (`Sequence[int]`):
            Number of tokens of each piece, at most `max_length`.
        max_length (`int`):
            Maximum number of tokens per row.

    Returns:
        `list[list[int]]`: Indices of the pieces in each row. Every piece is in exactly one row. Ties keep the given
        order.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fit = bisect.bisect_left(room, (lengths[i], -1))
        if fit == len(room):
            rows.append([])
            free, row = max_length, len(rows) - 1
        else:
            free, row = room.pop(fit)
        rows[row].append(i)
        bisect.insort(room, (free - lengths[i], row))
    return rows


def pad_rows(rows: Sequence[TokenTree], pad_token_id: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """
    Pad rows and stack them into tensors. Padding tokens only attend to themselves.

    Args:
        rows (`Sequence[TokenTree]`):
            B rows.
        pad_token_id (`int`):
            Id of the padding token.
        multiple_of (`int`, *optional*, defaults to `1`):
            If set, the length is padded to a multiple of this value.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids`, `subtree_end`, int64, shape `(B, L)` each.
    """
    width = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    tensors = {
        "input_ids": torch.full((len(rows), width), pad_token_id),
        "position_ids": torch.zeros((len(rows), width), dtype=torch.long),
        "subtree_end": torch.arange(1, width + 1).repeat(len(rows), 1),
    }
    for i, row in enumerate(rows):
        for name, tensor in tensors.items():
            tensor[i, : len(row)] = torch.from_numpy(getattr(row, name))
    return tensors


def parents_of(position_ids: torch.Tensor) -> torch.Tensor:
    """
    Return the index of the token above each token of forest rows, which predicts it, and -1 for the first token of a path.

    Args:
        position_ids (`torch.Tensor`):
            Number of tokens above each token, of rows one after the other, shape `(T,)`.

    Returns:
        `torch.Tensor`: int64, shape `(T,)`.
    """
    tokens = torch.arange(len(position_ids), device=position_ids.device)
    return ancestors_of(position_ids, tokens, position_ids - 1)


def ancestors_of(position_ids: torch.Tensor, tokens: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """
    Return the index of the token at a depth of the path to each of several tokens. In depth-first order, it is the last token
    at this depth up to the token itself.

    Args:
        position_ids (`torch.Tensor`):
            Number of tokens above each token, of rows one after the other, shape `(T,)`.
        tokens (`torch.Tensor`):
            Indices of tokens, any shape.
        depths (`torch.Tensor`):
            A depth for each of them, at most the depth of the token. Below 0, the result is -1.

    Returns:
        `torch.Tensor`: int64, shape of `tokens`.
    """
    size = len(position_ids)
    keys, order = (position_ids * size + torch.arange(size, device=position_ids.device)).sort()
    found = torch.searchsorted(keys, depths * size + tokens, right=True) - 1
    return torch.where(depths >= 0, order[found.clamp(min=0)], -1)


def path_sums(values: torch.Tensor, subtree_end: torch.Tensor) -> torch.Tensor:
    """
    Return the sum of the values of each token and of all tokens above it.

    A running sum over the tokens in depth-first order, from which each value is taken out again where the subtree of its token
    ends.

    Args:
        values (`torch.Tensor`):
            One value per token of forest rows, one after the other, shape `(T,)`.
        subtree_end (`torch.Tensor`):
            First index after the subtree of each token, shape `(T,)`.

    Returns:
        `torch.Tensor`: Shape `(T,)`.
    """
    ended = values.new_zeros(len(values) + 1).index_add(0, subtree_end, values)
    return (values - ended[:-1]).cumsum(0)
