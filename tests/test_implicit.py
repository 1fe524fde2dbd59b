"""Sums of log-ratios over the tokens of steps in forest rows, against paths taken one at a time."""

import random

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from trl_hrm.forest import TokenTree, TokenTrie, ancestors_of, pad_rows, parents_of, path_sums
from trl_hrm.implicit import StepTokens
from trl_hrm.kl import LMHead, token_log_probs

from .helpers import SIZES


def random_token_tree(rng: random.Random) -> tuple[TokenTree, list[list[tuple[int, int]]]]:
    """Return a token tree in which every step is marked, and for each step the tokens as (depth of the first, last) of its path."""
    trie = TokenTrie()
    prompt = trie.insert([rng.randrange(5) for _ in range(rng.randint(1, 4))])
    nodes = [(prompt, trie.path_length(prompt))]
    for _ in range(rng.randint(1, 8)):
        node, length = rng.choice(nodes)
        end = trie.insert([rng.randrange(5) for _ in range(rng.randint(1, 4))], after=node)
        trie.mark(end, length)
        nodes.append((end, trie.path_length(end)))
    return trie.layout(), nodes


def paths(tree: TokenTree) -> list[list[int]]:
    """Return the indices on the path of each token, from the definition of `subtree_end`."""
    return [[key for key in range(query + 1) if query < tree.subtree_end[key]] for query in range(len(tree))]


@pytest.mark.parametrize("seed", range(20))
def test_parents_ancestors_and_sums_of_paths(seed):
    rng = random.Random(seed)
    tree = TokenTree.join([random_token_tree(rng)[0] for _ in range(3)])
    positions, ends = (torch.from_numpy(getattr(tree, name)).long() for name in ("position_ids", "subtree_end"))
    above = paths(tree)
    assert parents_of(positions).tolist() == [path[-2] if len(path) > 1 else -1 for path in above]
    tokens = torch.tensor([rng.randrange(len(tree)) for _ in range(50)])
    depths = torch.tensor([rng.randint(-1, len(above[token]) - 1) for token in tokens])
    expected = [
        above[token][depth] if depth >= 0 else -1 for token, depth in zip(tokens, depths.tolist(), strict=True)
    ]
    assert ancestors_of(positions, tokens, depths).tolist() == expected
    values = torch.randn(len(tree), dtype=torch.float64)
    sums = torch.stack([values[path].sum() for path in above])
    torch.testing.assert_close(path_sums(values, ends), sums)


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("seed", range(10))
def test_sums_over_steps_in_packed_split_and_padded_rows(seed, max_length):
    """Each step is in one part. Its sum also covers its tokens in the repeated prefix."""
    rng = random.Random(seed)
    values = [torch.randn(100, generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    rows, expected = [], {}
    for number in range(4):
        tree, _ = random_token_tree(rng)
        # the value of a token depends on its path, so that a copy in another part has the same value
        for end, start, step in zip(tree.step_positions, tree.starts, tree.steps, strict=True):
            path = paths(tree)[end]
            expected[number, int(step)] = sum(
                values[number][(7 * depth + int(tree.input_ids[i])) % 100]
                for depth, i in enumerate(path)
                if depth >= max(start, 1)
            )
        parts = [tree] if max_length is None else tree.split(max(max_length, int(tree.position_ids.max()) + 1))
        rows += [(number, part) for part in parts]
    found = {}
    joined = [TokenTree.join([part for _, part in rows[i : i + 2]]) for i in range(0, len(rows), 2)]
    tokens = pad_rows(joined, 0)
    width = tokens["input_ids"].shape[1]
    keys = [
        [(number, int(step)) for number, part in rows[i : i + 2] for step in part.steps]
        for i in range(0, len(rows), 2)
    ]
    most = max(map(len, keys))
    ends, starts = torch.zeros(2, len(joined), most, dtype=torch.long)
    for i, row in enumerate(joined):
        ends[i] = i * width  # padded steps point to the first token of their row
        ends[i, : len(keys[i])] = torch.from_numpy(row.step_positions) + i * width
        starts[i, : len(keys[i])] = torch.from_numpy(row.starts)
    steps = StepTokens.of(tokens["position_ids"], tokens["subtree_end"], ends, starts)
    numbers = [number for i in range(0, len(rows), 2) for number, part in rows[i : i + 2] for _ in range(len(part))]
    offsets = [i * width + j for i, row in enumerate(joined) for j in range(len(row))]
    owner = dict(zip(offsets, numbers, strict=True))
    ids, depths = tokens["input_ids"].flatten().tolist(), tokens["position_ids"].flatten().tolist()
    given = [values[owner[i]][(7 * depths[i] + ids[i]) % 100] for i in steps.tokens.tolist()]
    sums = steps.sums(torch.tensor(given, dtype=torch.float64))
    for i, row in enumerate(keys):
        found |= {key: sums[i, j].item() for j, key in enumerate(row)}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["plain", "bias", "softcap", "scale"])
def test_log_probs_and_gradients_equal_full_logits(head, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(1100, 16, generator=generator).to(dtype).requires_grad_()  # three tiles, the last one narrow
    bias = torch.randn(1100, generator=generator).to(dtype).requires_grad_() if head == "bias" else None
    lm_head = LMHead(weight, bias, 0.25 if head == "scale" else 1.0, 3.0 if head == "softcap" else None)
    targets = torch.tensor([0, 511, 512, 1024, 1099, 3, 3])
    found = token_log_probs(hidden, lm_head, targets)
    coefficients = torch.randn(7, generator=generator)
    parts = [part for part in (hidden, weight, bias) if part is not None]
    gradients = torch.autograd.grad((coefficients * found).sum(), parts)

    exact = [part.detach().double().requires_grad_() for part in parts]
    logits = exact[0] @ exact[1].T + (exact[2] if head == "bias" else 0)
    logits = logits * lm_head.logit_scale
    logits = 3 * torch.tanh(logits / 3) if head == "softcap" else logits
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    for one, other in zip(gradients, torch.autograd.grad((coefficients * expected).sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_models_that_transform_their_logits(family):
    """Without the softcap or the scale, the log-ratios would belong to distributions that neither model has."""
    sizes = {**SIZES, "vocab_size": 300, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0, head_dim=32))
    else:
        model = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.1))
    ids = torch.randint(1, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9)[None]
    steps = StepTokens.of(positions, torch.full_like(positions, 9), torch.tensor([[8]]), torch.tensor([[3]]))
    assert steps.tokens.tolist() == [3, 4, 5, 6, 7, 8]
    found = steps.log_probs(model.eval(), {"input_ids": ids, "position_ids": positions, "use_cache": False})
    logits = model.double()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(found.double(), logits.gather(1, ids[0, 1:, None])[2:, 0], rtol=0, atol=1e-4)


def test_no_tensor_of_all_logits():
    """For a vocabulary of 150,000 and 16,000 tokens, full logits in fp32 take 9 GB."""
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                one.numel()
                for one in (result if isinstance(result, tuple) else (result,))
                if isinstance(one, torch.Tensor)
            )
            return result

    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(20_000, 8, requires_grad=True)
    with Record():
        token_log_probs(hidden, LMHead(weight), torch.arange(512)).sum().backward()
    assert max(sizes) < 512 * 20_000 / 10
