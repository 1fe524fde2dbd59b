"""Block-wise attention compared with attention under the full mask."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trl_hrm import tree_attention
from trl_hrm.forest import TokenTree, TokenTrie, pad_rows
from trl_hrm.tree_attention import (
    TREE_SDPA,
    tree_attention_forward,
    tree_row_mask,
    use_tree_attention,
    visibility_mask,
)

from .helpers import ARCHITECTURES, tiny_model, tiny_tokenizer


CPU = torch.device("cpu")


def random_tree(rng: random.Random) -> TokenTree:
    trie = TokenTrie()
    for _ in range(rng.randint(1, 12)):
        trie.mark(trie.insert([rng.randrange(3) for _ in range(rng.randint(1, 8))], after=trie.insert([5, 6])))
    return trie.layout()


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("block_size", [1, 3, 8, 128])
@pytest.mark.parametrize("kept_mask_size", [0, 2**24])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_equal_the_whole_mask(monkeypatch, seed, kept_mask_size, block_size, window):
    """A block that skips a key on the path, or includes a sibling's key, would only shift the outputs."""
    monkeypatch.setattr(tree_attention, "BLOCK_SIZE", block_size)
    monkeypatch.setattr(tree_attention, "KEPT_MASK_SIZE", kept_mask_size)
    rng = random.Random(seed)
    rows = [TokenTree.join([random_tree(rng), random_tree(rng)]), random_tree(rng)]
    batch = pad_rows(rows, pad_token_id=0)
    length = batch["input_ids"].shape[1]
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, heads, length, 32, requires_grad=True) for heads in (4, 2, 2))
    coefficients = torch.randn(2, length, 4, 32)

    mask = tree_row_mask(batch["subtree_end"], batch["position_ids"], window)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    for _ in range(2):  # as two layers, the second with the masks of the first
        found, _ = tree_attention_forward(module, query, key, value, mask, scaling=0.3)
    mask = visibility_mask(batch["subtree_end"], batch["position_ids"], window)
    expected = scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((found * coefficients).sum(), (query, key, value)),
        torch.autograd.grad((expected * coefficients).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_sequences_equal_sdpa(architecture):
    """A trained model works like any other: alone, padded, packed by positions, and in generation."""
    plain, tree = (tiny_model(architecture=architecture, attention=attention) for attention in ("sdpa", TREE_SDPA))
    batch = tiny_tokenizer()(["add x y = 3", "sub"], padding=True, return_tensors="pt")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    for inputs in (
        {"input_ids": batch["input_ids"][:1]},
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        {"input_ids": batch["input_ids"][:1, :6], "position_ids": positions, "use_cache": False},
    ):
        expected = plain(**inputs).logits
        torch.testing.assert_close(tree(**inputs).logits, expected, rtol=0, atol=1e-6)


class TestUse:
    def test_only_sdpa_on_a_cpu(self):
        for attention, device, expected in (
            ("sdpa", CPU, TREE_SDPA),
            ("eager", CPU, "eager"),
            ("flex_attention", CPU, "flex_attention"),
            ("sdpa", torch.device("cuda"), "sdpa"),
        ):
            model = tiny_model(attention=attention)
            use_tree_attention(model, device)
            assert model.config._attn_implementation == expected

    def test_it_is_not_saved(self, tmp_path):
        """Other programs do not know this attention and would reject the checkpoint."""
        tiny_model(attention=TREE_SDPA).save_pretrained(tmp_path)
        assert TREE_SDPA not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(4))
def test_long_rows_equal_the_whole_mask(monkeypatch, seed, window):
    """A trunk is one causal call, and the blocks of a long row are computed again in the backward pass."""
    monkeypatch.setattr(tree_attention, "BLOCK_SIZE", 4)
    monkeypatch.setattr(tree_attention, "LONG_ROW", 8)
    monkeypatch.setattr(tree_attention, "KEPT_KEYS", 0)
    rng = random.Random(seed)
    trees = []
    for length in (15, 1, 9):
        trie = TokenTrie()
        path = [rng.randrange(9) for _ in range(length)]
        trie.mark(trie.insert(path))
        for _ in range(3):
            place = rng.randrange(length)
            trie.mark(trie.insert([9, *rng.choices(range(9), k=rng.randrange(9))], after=trie.insert(path[:place])))
        trees.append(trie.layout())
    batch = pad_rows([TokenTree.join(trees), random_tree(rng)], pad_token_id=0)
    length = batch["input_ids"].shape[1]
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, heads, length, 32, requires_grad=True) for heads in (4, 2, 2))
    coefficients = torch.randn(2, length, 4, 32)
    mask = tree_row_mask(batch["subtree_end"], batch["position_ids"], window)
    calls = []

    def counted(module, query, key, value, attention_mask, **kwargs):
        calls.append((query.shape[2], attention_mask is None, torch.is_grad_enabled()))
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    sdpa = tree_attention.sdpa_attention_forward
    monkeypatch.setattr(tree_attention, "sdpa_attention_forward", counted)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    found, _ = tree_attention_forward(module, query, key, value, mask, scaling=0.3)
    num_calls = len(calls)
    assert any(is_trunk for _, is_trunk, _ in calls) == (window is None)
    mask = visibility_mask(batch["subtree_end"], batch["position_ids"], window)
    expected = scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((found * coefficients).sum(), (query, key, value)),
        torch.autograd.grad((expected * coefficients).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert len(calls) - num_calls == sum(not is_trunk for _, is_trunk, _ in calls[:num_calls])  # each block once more
