"""Token trees, their masks, splitting and packing, each compared with a slow reference."""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, Qwen3_5Config

from trl_hrm.forest import TokenTree, TokenTrie, pack, pad_rows
from trl_hrm.tree_attention import attention_mask, check_attention, check_layer_types, model_inputs, visibility_mask

from .helpers import tiny_model
from .token_trees import fewest_tokens, path_of, random_trie


def steps_of(tree: TokenTree) -> dict[int, list[int]]:
    """Return the ids on the path of each judged step, by number."""
    return {
        int(step): tree.input_ids[path_of(tree, position)].tolist()
        for step, position in zip(tree.steps, tree.step_positions, strict=True)
    }


def slow_mask(tree: TokenTree, window: int | None = None) -> np.ndarray:
    """Return the mask from a double loop over queries and their ancestors."""
    mask = np.zeros((len(tree), len(tree)), dtype=bool)
    for query in range(len(tree)):
        for key in path_of(tree, query)[-window if window else 0 :]:
            mask[query, key] = True
    return mask


def worked_example() -> TokenTree:
    trie = TokenTrie()
    first = trie.insert([3, 9], after=trie.insert([1, 2]))
    for token in (4, 5):
        trie.mark(trie.insert([token, 9], after=first))
    return trie.layout()


class TestLayout:
    def test_worked_example(self):
        """The table in the module's docstring is correct."""
        tree = worked_example()
        assert tree.input_ids.tolist() == [1, 2, 3, 9, 4, 9, 5, 9]
        assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
        assert tree.subtree_end.tolist() == [8, 8, 8, 8, 6, 6, 8, 8]
        assert tree.step_positions.tolist() == [5, 7]
        assert tree.steps.tolist() == [0, 1]
        assert np.flatnonzero(visibility_mask(torch.from_numpy(tree.subtree_end)[None])[0, 0, 6]).tolist() == [
            0,
            1,
            2,
            3,
            6,
        ]
        assert [len(chain) for chain in tree.chains()] == [6, 6]

    @pytest.mark.parametrize("seed", range(20))
    def test_each_judged_step_keeps_its_path(self, seed):
        """A wrong order of children would put a step after a wrong prefix of the same length."""
        tree, paths = random_trie(random.Random(seed))
        assert steps_of(tree) == dict(enumerate(paths))
        assert len(tree) == len({tuple(path[: i + 1]) for path in paths for i in range(len(path))})
        assert tree.step_positions.tolist() == sorted(tree.step_positions)
        for i in range(len(tree)):
            below = [j for j in range(len(tree)) if i in path_of(tree, j)]
            assert below == list(range(i, tree.subtree_end[i]))

    def test_branches_without_a_judged_step_are_dropped(self):
        trie = TokenTrie()
        trie.mark(trie.insert([1, 2]))
        trie.insert([1, 3, 4])
        assert trie.layout().input_ids.tolist() == [1, 2]

    def test_steps_with_equal_ids_are_joined(self):
        trie = TokenTrie()
        assert [trie.mark(trie.insert(ids)) for ids in ([1, 2], [1, 3], [1, 2])] == [0, 1, 0]


class TestMask:
    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("window", [None, 1, 3])
    def test_each_implementation_against_ancestors(self, seed, window):
        """One batch with packed trees, a part of a split tree, and padding."""
        rng = random.Random(seed)
        tree = random_trie(rng)[0]
        other = random_trie(rng)[0]
        parts = tree.split(max(int(tree.position_ids.max()) + 1, len(tree) - 1))
        rows = [TokenTree.join([parts[-1], other]), parts[0]]
        width = -(-max(map(len, rows)) // 8) * 8
        expected = np.zeros((2, width, width), dtype=bool)
        expected[:, np.arange(width), np.arange(width)] = True  # padding attends only to itself
        expected[0, : len(parts[-1]), : len(parts[-1])] = slow_mask(parts[-1], window)
        expected[0, len(parts[-1]) : len(rows[0]), len(parts[-1]) : len(rows[0])] = slow_mask(other, window)
        expected[1, : len(parts[0]), : len(parts[0])] = slow_mask(parts[0], window)

        batch = pad_rows(rows, pad_token_id=7, multiple_of=8)
        tensors = {name: batch[name] for name in ("subtree_end", "position_ids")} | {"window": window}
        sdpa = attention_mask(implementation="sdpa", dtype=torch.float32, **tensors)
        assert sdpa.dtype == torch.bool
        np.testing.assert_array_equal(sdpa[:, 0], expected)
        for dtype in (torch.float32, torch.bfloat16):
            eager = attention_mask(implementation="eager", dtype=dtype, **tensors)
            assert eager.dtype == dtype
            np.testing.assert_array_equal((eager == 0)[:, 0], expected)
            assert (eager[:, 0][torch.from_numpy(~expected)] == torch.finfo(dtype).min).all()
        flex = attention_mask(implementation="flex_attention", dtype=torch.float32, **tensors)
        index = torch.arange(width)
        found = flex.mask_mod(torch.arange(2)[:, None, None], 0, index[None, :, None], index[None, None, :])
        np.testing.assert_array_equal(found, expected)

    def test_implementations_without_masks_are_refused(self):
        for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"):
            with pytest.raises(ValueError, match="'sdpa'.*shared_prefix=False"):
                check_attention(name)

    def test_layers_that_carry_state_are_refused(self):
        """A linear attention layer would treat the depth-first row as one sequence."""
        config = LlamaConfig(num_hidden_layers=2, attn_implementation="sdpa")
        config.layer_types = ["full_attention", "linear_attention"]
        row = {name: torch.zeros(1, 4, dtype=torch.long) for name in ("input_ids", "position_ids", "subtree_end")}
        with pytest.raises(ValueError, match=r"layers of type \['linear_attention'\]"):
            model_inputs(**row, config=config, dtype=torch.float32)

    def test_layer_types_of_a_nested_config(self):
        """A multimodal model has them, and its sliding window, in its text config."""
        with pytest.raises(ValueError, match=r"Qwen3_5Config has layers of type \['linear_attention'\]"):
            check_layer_types(Qwen3_5Config(text_config={"num_hidden_layers": 4}))
        types = ["sliding_attention", "full_attention"]
        config = Gemma3Config(text_config={"num_hidden_layers": 2, "layer_types": types, "sliding_window": 2})
        config._attn_implementation = "sdpa"
        row = pad_rows([worked_example()], pad_token_id=0)
        masks = model_inputs(**row, config=config, dtype=torch.float32)["attention_mask"]
        for name, window in zip(types, (2, None), strict=True):
            np.testing.assert_array_equal(masks[name][0, 0], slow_mask(worked_example(), window))

    def test_one_mask_per_layer_type(self):
        row = {name: torch.zeros(1, 4, dtype=torch.long) for name in ("input_ids", "position_ids", "subtree_end")}
        for architecture, expected in (("qwen2-sliding", dict), ("qwen2", torch.Tensor), ("mistral", torch.Tensor)):
            config = tiny_model(architecture=architecture).config
            assert isinstance(model_inputs(**row, config=config, dtype=torch.float32)["attention_mask"], expected)


class TestSplit:
    @pytest.mark.parametrize("seed", range(20))
    def test_every_judged_step_once_with_its_path(self, seed):
        """Dropping a token of the repeated path would shift all later positions."""
        tree, paths = random_trie(random.Random(seed), max_paths=12)
        longest = int(tree.position_ids.max()) + 1
        for max_length in range(longest, len(tree) + 1):
            parts = tree.split(max_length)
            assert max(map(len, parts)) <= max_length
            steps = [steps_of(part) for part in parts]
            assert sum(map(len, steps)) == len(paths)
            assert {number: path for part in steps for number, path in part.items()} == dict(enumerate(paths))
            for part in parts:
                np.testing.assert_array_equal(
                    visibility_mask(torch.from_numpy(part.subtree_end)[None])[0, 0], slow_mask(part)
                )

    def test_repeats_almost_as_few_tokens_as_any_grouping(self):
        """Compared with all ways to put the paths of small trees into parts. Packing from the leaves up is not always optimal."""
        found, fewest = [], []
        for seed in range(40):
            tree = random_trie(random.Random(seed), max_paths=5)[0]
            for max_length in range(int(tree.position_ids.max()) + 1, len(tree)):
                found.append(sum(map(len, tree.split(max_length))))
                fewest.append(fewest_tokens(tree, max_length))
        assert len(found) > 100 and all(ours >= best for ours, best in zip(found, fewest, strict=True))
        assert sum(found) <= 1.002 * sum(fewest)

    def test_parts_need_not_be_contiguous(self):
        """Cutting the depth-first order would need three parts and 11 tokens, because `2 9` and `5 9` are not neighbours."""
        trie = TokenTrie()
        for ids in ([2, 9], [3, 4, 9], [3, 9], [5, 9]):
            trie.mark(trie.insert([1, *ids]))
        parts = trie.layout().split(5)
        assert [part.input_ids.tolist() for part in parts] == [[1, 2, 9, 5, 9], [1, 3, 4, 9, 9]]
        assert [part.subtree_end.tolist() for part in parts] == [[5, 3, 3, 5, 5], [5, 5, 4, 4, 5]]
        assert [part.steps.tolist() for part in parts] == [[0, 3], [1, 2]]
        assert [part.step_positions.tolist() for part in parts] == [[2, 4], [3, 4]]

    def test_a_step_on_a_repeated_path_is_trained_once(self):
        trie = TokenTrie()
        prompt = trie.insert([1, 9])
        trie.mark(prompt)
        for token in (4, 5):
            trie.mark(trie.insert([token, 9], after=prompt))
        assert [part.steps.tolist() for part in trie.layout().split(4)] == [[0, 1], [2]]

    def test_a_path_longer_than_a_row_is_refused(self):
        tree = worked_example()
        assert len(tree.split(6)) == 2
        with pytest.raises(ValueError, match="6 tokens, .*max_length 5"):
            tree.split(5)

    @pytest.mark.parametrize("seed", range(10))
    def test_chains_become_plain_sequences(self, seed):
        tree, paths = random_trie(random.Random(seed))
        chains = tree.chains()
        for chain in chains:
            assert chain.position_ids.tolist() == list(range(len(chain)))
            assert set(chain.subtree_end) == {len(chain)}
        assert {number: path for chain in chains for number, path in steps_of(chain).items()} == dict(enumerate(paths))


class TestPack:
    @pytest.mark.parametrize("seed", range(20))
    def test_never_exceeds_loses_or_duplicates(self, seed):
        rng = random.Random(seed)
        lengths = [rng.randint(1, 20) for _ in range(rng.randint(0, 60))]
        rows = pack(lengths, 20)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
        # any-fit: no two rows fit into one
        assert all(sum(lengths[i] for i in a + b) > 20 for a, b in itertools.combinations(rows, 2))
        assert rows == pack(lengths, 20)

    def test_best_fit(self):
        assert pack([4, 6, 3, 7, 10], 10) == [[4], [3, 2], [1, 0]]


class TestRows:
    def test_padding_sees_only_itself(self):
        batch = pad_rows([worked_example(), worked_example().part(0, 3)], pad_token_id=7, multiple_of=5)
        assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 4, 9, 5, 9, 7, 7], [1, 2, 3, *[7] * 7]]
        assert batch["position_ids"][1].tolist() == [0, 1, 2, *[0] * 7]
        assert batch["subtree_end"][1].tolist() == [3, 3, 3, 4, 5, 6, 7, 8, 9, 10]
        assert visibility_mask(batch["subtree_end"])[1, 0, 3:].sum(-1).tolist() == [1] * 7

    def test_joined_trees_do_not_see_each_other(self):
        tree = worked_example()
        joined = TokenTree.join([tree, tree])
        mask = visibility_mask(torch.from_numpy(joined.subtree_end)[None])[0, 0]
        assert not mask[8:, :8].any() and not mask[:8, 8:].any()
        np.testing.assert_array_equal(mask[8:, 8:], slow_mask(tree))
        assert joined.step_positions.tolist() == [5, 7, 13, 15]
