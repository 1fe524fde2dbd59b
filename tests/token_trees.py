"""Random token trees, and slow references for their paths and for the best split."""

import random

from trl_hrm.forest import TokenTree, TokenTrie


def random_trie(rng: random.Random, max_paths: int = 8) -> tuple[TokenTree, list[list[int]]]:
    """Return a token tree, and the token ids on the path of each judged step, by number."""
    trie, paths = TokenTrie(), []
    root = [rng.randrange(4) for _ in range(rng.randint(1, 3))]
    for _ in range(rng.randint(1, max_paths)):
        ids = [rng.randrange(3) for _ in range(rng.randint(1, 5))]
        step = trie.mark(trie.insert(ids, after=trie.insert(root)))
        if step == len(paths):
            paths.append(root + ids)
    return trie.layout(), paths


def parents(tree: TokenTree) -> list[int]:
    """Return the parent of each token: the last earlier token whose position is one less. -1 for a root."""
    found = []
    for i, position in enumerate(tree.position_ids):
        above = [j for j in range(i) if tree.position_ids[j] == position - 1]
        found.append(above[-1] if position else -1)
    return found


def path_of(tree: TokenTree, index: int) -> list[int]:
    """Return the indices of the tokens from the root to `index`, found through the parents."""
    above, path = parents(tree), []
    while index != -1:
        path.append(index)
        index = above[index]
    return path[::-1]


def fewest_tokens(tree: TokenTree, max_length: int) -> int:
    """Return the fewest tokens of parts that hold all paths, over all groupings of the paths."""
    paths = [set(path_of(tree, i)) for i in range(len(tree)) if tree.subtree_end[i] == i + 1]
    groupings: list[list[set[int]]] = [[]]
    for path in paths:
        groupings = [
            [*grouping[:i], joined, *grouping[i + 1 :]]
            for grouping in groupings
            for i in range(len(grouping) + 1)
            for joined in [path.union(*grouping[i : i + 1])]
            if len(joined) <= max_length
        ]
    return min(sum(map(len, grouping)) for grouping in groupings)
