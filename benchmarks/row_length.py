"""
Tokens in rows over `max_length`: how often rows of trees repeat tokens, and how much padding batches need.

    python benchmarks/row_length.py --tokenizer path/to/SmolLM2-135M

Trees of PRM800K in the HRM view. For each `max_length`:

- `labels`: labelled steps whose path fits. The others are dropped.
- `rows hold`: tokens in all rows, divided by the distinct tokens. Training costs about this much more per label than in one long row.
- `lower bound`: no way to split the trees repeats fewer tokens. The part of a tree below a token has at least `ceil(W / R)` copies of the path above
  it, if all copies of its tokens are W tokens and a row has room for R tokens below this path. Applied from the leaves to the root.
- `paths`: one sequence per path instead.
- `same labels, rows of ...`: tokens if the same labels were in rows of the largest length.
- `padding`: share of padding tokens in random batches of 1 and 8 rows.
"""

import argparse
import random
import tempfile
from pathlib import Path

from common import where_and_when
from tree_training import make_parser as training_parser

from trl_hrm.forest import TokenTree, TokenTrie, pack


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=training_parser().get_default("data"), help="PRM800K file")
    parser.add_argument("--tokenizer", required=True, help="path or Hub id of the tokenizer")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="(default: %(default)s)"
    )
    return parser


def lower_bound(tree: TokenTree, max_length: int) -> int:
    """Return a number of tokens that parts of at most `max_length` tokens with all labelled steps of a tree cannot go below."""
    ends, depths = tree.subtree_end.tolist(), tree.position_ids.tolist()
    found: list[tuple[int, int, int]] = []  # (first token, least number of copies, least tokens in its subtree)
    for token in reversed(range(len(tree))):
        copies, below = 1, 0
        while found and found[-1][0] < ends[token]:
            _, child_copies, tokens = found.pop()
            copies, below = max(copies, child_copies), below + tokens
        room = max_length - depths[token] - 1
        copies = max(copies, -(-below // room) if below else 1)
        found.append((token, copies, below + copies))
    return sum(tokens for _, _, tokens in found)


def padding(lengths: list[int], batch_size: int, seed: int = 0) -> float:
    """Return the share of padding tokens in random batches of rows."""
    lengths = random.Random(seed).sample(lengths, len(lengths))
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def read_trees(args: argparse.Namespace) -> list[tuple[TokenTrie, list[int]]]:
    """Return the token trie of each problem in the HRM view, and the nodes of its labelled steps."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from trl_hrm import StepFormat, hrm_view
    from trl_hrm.data.build_config import BuildPRM800KConfig
    from trl_hrm.data.prm800k import build_prm800k
    from trl_hrm.step_tree import StepTree

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tries = []
    with tempfile.TemporaryDirectory() as work:
        build_prm800k(BuildPRM800KConfig(inputs=args.data, output_dir=f"{work}/data", test_size=0))
        for row in load_dataset(f"{work}/data", cache_dir=f"{work}/cache")["train"]:
            tree = hrm_view(StepTree.from_row(row))
            trie = TokenTrie()
            nodes = StepFormat().insert(trie, tokenizer, tree.prompt, tree.completions, tree.parents)
            tries.append((trie, [nodes[i] for i, label in enumerate(tree.labels) if label is not None]))
    return tries


def layout(trie: TokenTrie, nodes: list[int], max_length: int) -> TokenTree:
    """Return the tree of the labelled steps whose path has at most `max_length` tokens."""
    trie._marks.clear()
    for node in nodes:
        if trie.path_length(node) <= max_length:
            trie.mark(node)
    return trie.layout()


def make_table(tries: list[tuple[TokenTrie, list[int]]], lengths: list[int]) -> str:
    longest = max(lengths)
    lines = [
        f"| max_length | labels | distinct tokens | rows | rows hold | lower bound | paths | same labels, rows of {longest:,} | padding, batches of 1 | 8 |",
        "|---" * 10 + "|",
    ]
    for length in lengths:
        trees = [tree for trie, nodes in tries if len(tree := layout(trie, nodes, length))]
        parts = [len(part) for tree in trees for part in tree.split(length)]
        rows = [sum(parts[i] for i in row) for row in pack(parts, length)]
        distinct = sum(map(len, trees))
        bound = sum(lower_bound(tree, length) for tree in trees)
        paths = sum(len(chain) for tree in trees for chain in tree.chains())
        long_rows = sum(len(part) for tree in trees for part in tree.split(longest))
        cells = [f"{length:,}", f"{sum(len(tree.steps) for tree in trees):,}", f"{distinct:,}", f"{len(rows):,}"]
        cells += [f"{number / distinct:.2f}×" for number in (sum(rows), bound, paths, long_rows)]
        cells += [f"{padding(rows, batch_size):.1%}" for batch_size in (1, 8)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = make_parser().parse_args()
    print(make_table(read_trees(args), args.lengths))
    name = Path(args.data).name
    print(
        f"\n{name}, tokenizer {Path(args.tokenizer).name}. {where_and_when(('transformers', 'datasets'), gpu=False)}"
    )


if __name__ == "__main__":
    main()
