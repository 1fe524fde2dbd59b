"""Batched sampling from a real model: samples depend only on their request and end exactly where they must."""

import asyncio
import hashlib
import json
import threading
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from trl_hrm.search.engines.base import EngineFatal, PrefixTooLong, check_samples, find_stop
from trl_hrm.search.engines.transformers import TransformersEngine
from trl_hrm.tiny_model import make_tiny_model


TEXTS = [f"# Step {k}\nAdd {k} and {k + 1}: it is {2 * k + 1}.\n\n# Answer\n\n{k}" for k in range(30)]
PROMPTS = ["# Step 1\n", "Add 3 and 4: it is", "What is 1 + 2 + 3 + 4 + 5?\n\n# Step 2\nAdd", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_tiny_model(TEXTS, folder, kind="causal", vocab_size=400, num_layers=2, max_position_embeddings=128)
    return str(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def greedy(folder):
    return TransformersEngine.from_pretrained(folder, device="cpu", temperature=0.0)


@pytest.fixture(scope="module")
def trained(policy):
    """Return an engine whose model has learned to write steps."""
    return TransformersEngine.from_pretrained(policy, device="cpu", temperature=0.0)


def prefixes(engine):
    return [engine.tokenizer.encode(prompt) for prompt in PROMPTS]


def ask(engine, *requests):
    """Return the samples of requests that start together, as in a search."""

    async def together():
        samples = asyncio.gather(*(engine.sample(*request) for request in requests))
        return await asyncio.wait_for(samples, 60)  # a lost request would hang

    return asyncio.run(together())


def record_batches(engine, monkeypatch):
    """Return a list that gets the number of sequences of each call of `generate`."""
    batches = []
    generate = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda batch, last: batches.append(len(batch)) or generate(batch, last))
    return batches


def record_shapes(engine, monkeypatch):
    """Return a list that gets the rows and columns of each forward pass."""
    shapes = []
    embed = engine.model.get_input_embeddings().forward
    monkeypatch.setattr(
        engine.model.get_input_embeddings(), "forward", lambda ids: shapes.append(tuple(ids.shape)) or embed(ids)
    )
    return shapes


def plain_sample(engine, prefix_ids, max_tokens, seed):
    """
    Sample one sequence with one forward pass per token, no cache and no padding. The noise is what a seed has always meant: a generator
    seeded with its hash, and one exponential variable for each token of the vocabulary and each position.
    """
    seed = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prefix_ids)
    with torch.no_grad():
        while len(ids) < len(prefix_ids) + max_tokens and ids[-1:] != [engine.tokenizer.eos_token_id]:
            logits = engine.model(torch.tensor([ids])).logits[0, -1]
            ids.append((logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax().item())
    return ids[len(prefix_ids) :]


def plain_greedy(engine, prefix_ids, length):
    """Decode one sequence with one forward pass per token, no cache and no padding: the slow reference."""
    ids = list(prefix_ids)
    with torch.no_grad():
        while len(ids) < len(prefix_ids) + length:
            ids.append(engine.model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prefix_ids) :]


def test_greedy_batch_is_one_sequence_at_a_time(greedy):
    """A wrong mask or position with padding gives a fluent but different policy."""
    requests = [(ids, 2, [], 12 + place, 0) for place, ids in enumerate(prefixes(greedy))]
    for request, samples in zip(requests, ask(greedy, *requests), strict=True):
        check_samples(samples, greedy.tokenizer, request[0], 2, request[2], request[3])
        expected = plain_greedy(greedy, request[0], request[3])
        assert [sample.token_ids for sample in samples] == [expected, expected]
        assert {sample.finish for sample in samples} == {"length"}
        assert (
            samples[0].text == greedy.tokenizer.decode(request[0] + expected)[len(PROMPTS[requests.index(request)]) :]
        )


def test_a_sample_does_not_depend_on_its_batch(engine):
    """With one random state for the whole batch, a resumed run would silently differ."""
    requests = [(ids, 3, ["."], 20, 1000 * place) for place, ids in enumerate(prefixes(engine))]
    alone = [ask(engine, request)[0] for request in requests]
    together = ask(engine, *requests)
    backwards = ask(engine, *requests[::-1])[::-1]
    one_by_one = [
        [ask(engine, (ids, 1, stop, m, seed + i))[0][0] for i in range(n)] for ids, n, stop, m, seed in requests
    ]
    assert alone == together == backwards == one_by_one
    assert len({tuple(sample.token_ids) for samples in together for sample in samples}) == 12


def test_samples_of_one_prefix_share_its_computation(engine):
    """Mixed-up cache rows, or visible padding of a shorter prefix, would give other samples."""
    long, short = prefixes(engine)[2], prefixes(engine)[1]
    computed = []
    hook = engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: computed.append(args[0].shape)
    )
    try:
        together = ask(engine, (long, 5, [], 4, 1), (short, 3, [], 4, 50), (long, 2, [], 4, 100))
    finally:
        hook.remove()
    assert computed[:2] == [(2, len(long) - 1), (10, 1)]  # each prefix once, then the last token of every row
    alone = [ask(engine, (ids, 1, [], 4, seed))[0][0] for ids, seed in ((long, 3), (short, 52), (long, 101))]
    assert [together[0][2].token_ids, together[1][2].token_ids, together[2][1].token_ids] == [
        one.token_ids for one in alone
    ]


def test_models_without_keys_and_values(engine):
    """Without a cache of keys and values nothing is shared. The samples must equal those of single requests."""
    torch.manual_seed(0)
    size = len(engine.tokenizer)
    config = MambaConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, state_size=4, pad_token_id=0, eos_token_id=1
    )
    mamba = TransformersEngine(MambaForCausalLM(config), engine.tokenizer)
    ids = prefixes(engine)[1]
    together = ask(mamba, (ids, 3, [], 4, 7))[0]
    assert [one.token_ids for one in together] == [
        ask(mamba, (ids, 1, [], 4, 7 + i))[0][0].token_ids for i in range(3)
    ]


def test_sliding_windows(engine):
    """The cache of a window drops old keys, so rows cannot move to another batch. The batch must then run to its end."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(engine.tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        eos_token_id=engine.tokenizer.eos_token_id,
    )
    sliding = TransformersEngine(MistralForCausalLM(config), engine.tokenizer, batch_size=4)
    requests = [(ids, 3, [], 4 + 5 * place, 1000 * place) for place, ids in enumerate(prefixes(engine))]
    for (ids, _, _, max_tokens, seed), samples in zip(requests, ask(sliding, *requests), strict=True):
        assert [one.token_ids for one in samples] == [
            plain_sample(sliding, ids, max_tokens, seed + i) for i in range(3)
        ]


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_a_seed_gives_the_sample_of_a_plain_loop(folder, batch_size):
    """Sequences leave and join batches all the time. A key of another row, or noise of another step, would not be noticed."""
    engine = TransformersEngine.from_pretrained(folder, device="cpu", batch_size=batch_size)
    requests = [(ids, 4, [], 3 + 9 * place, 1000 * place) for place, ids in enumerate(prefixes(engine))]
    for (ids, n, _, max_tokens, seed), samples in zip(requests, ask(engine, *requests), strict=True):
        assert [one.token_ids for one in samples] == [
            plain_sample(engine, ids, max_tokens, seed + i) for i in range(n)
        ]


def test_waiting_sequences_take_the_places_of_ended_ones(folder, monkeypatch):
    """One long sample must not keep the ended ones in the batch, or the waiting ones out of it."""
    engine = TransformersEngine.from_pretrained(folder, device="cpu", temperature=0.0, batch_size=8)
    long, *short = [engine.tokenizer.encode(f"Add {k} and {k + 1}: it is")[: 4 + k % 3] for k in range(16)]
    shapes = record_shapes(engine, monkeypatch)
    samples = ask(engine, (long, 1, [], 45, 0), *((ids, 1, [], 3, 0) for ids in short))
    steps = [rows for rows, columns in shapes if columns == 1]
    assert [len(one.token_ids) for [one] in samples] == [45] + [3] * 15
    assert len(steps) == 45  # the short ones run in parallel with the long one
    assert max(steps) == 8 and sum(steps) == 45 + 15 * 3


def test_a_prefix_is_computed_once_for_more_samples_than_fit_into_a_batch(folder, monkeypatch):
    engine = TransformersEngine.from_pretrained(folder, device="cpu", batch_size=4)
    ids = prefixes(engine)[2]
    request = (ids, 13, ["a", "e"], 12, 5)
    shapes = record_shapes(engine, monkeypatch)
    [samples] = ask(engine, request)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, len(ids) - 1)]
    assert {rows for rows, columns in shapes if columns == 1} <= {1, 2, 3, 4}
    assert len({len(one.token_ids) for one in samples}) > 2  # they left and joined at different times
    monkeypatch.undo()
    assert samples == [ask(engine, (ids, 1, ["a", "e"], 12, 5 + i))[0][0] for i in range(13)]


def test_prefixes_of_one_token(engine):
    """Nothing is computed before their first step, alone or next to longer prefixes."""
    long, short = prefixes(engine)[2], prefixes(engine)[2][:1]
    requests = [(short, 2, [], 5, 0), (long, 2, [], 9, 10), (short, 3, [], 7, 20)]
    expected = [[plain_sample(engine, ids, m, seed + i) for i in range(n)] for ids, n, _, m, seed in requests]
    for chosen in ([0], [0, 2], [0, 1, 2]):
        together = ask(engine, *(requests[place] for place in chosen))
        assert [[one.token_ids for one in samples] for samples in together] == [expected[place] for place in chosen]


def test_samples_do_not_depend_on_batch_size(folder, engine):
    request = (prefixes(engine)[1], 7, ["\n"], 16, 5)
    small = TransformersEngine.from_pretrained(folder, device="cpu", batch_size=3)
    assert ask(small, request) == ask(engine, request)


@pytest.mark.parametrize("low_bits", [0, 16, 40])
def test_seeds_that_differ_anywhere_give_other_samples(engine, low_bits):
    """torch's CPU generator drops all but the low 32 bits of a seed, so whole requests could repeat."""
    ids = prefixes(engine)[0]
    seeds = [number << low_bits for number in range(1, 9)]
    samples = ask(engine, *((ids, 1, [], 24, seed) for seed in seeds))
    assert len({tuple(sample.token_ids) for [sample] in samples}) == 8


def test_noise_is_not_shifted_between_seeds(engine):
    """If a token's seed were seed + position, samples 0 and 1 would share all noise except for one token."""
    ids = prefixes(engine)[0]
    [[first, second]] = ask(engine, (ids, 2, [], 9, 0))
    [[later]] = ask(engine, (ids + first.token_ids[:1], 1, [], 8, 1))
    assert later.token_ids != first.token_ids[1:]
    assert second.token_ids[:8] != first.token_ids[1:]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.15, "top_k": 3}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 20, "top_p": 0.8}],
)
def test_first_token_follows_the_softmax(folder, options):
    """Noise with the wrong distribution still samples plausible tokens. Only the frequencies show it."""
    engine = TransformersEngine.from_pretrained(folder, device="cpu", batch_size=500, **options)
    ids = prefixes(engine)[2]
    num_draws = 4000
    [samples] = ask(engine, (ids, num_draws, [], 1, 12345))
    counts = Counter(sample.token_ids[0] for sample in samples)
    with torch.no_grad():
        logits = engine.model(torch.tensor([ids])).logits[0, -1].double() / options.get("temperature", 1.0)
    if k := options.get("top_k"):
        logits[logits < logits.topk(k).values[-1]] = -torch.inf
    order = logits.argsort(descending=True)
    before = logits.softmax(0)[order].cumsum(0) - logits.softmax(0)[order]
    logits[order[before >= options.get("top_p", 1.0)]] = -torch.inf
    expected = logits.softmax(0) * num_draws
    assert all(expected[token] > 0 for token in counts)
    often = [token for token in range(len(expected)) if expected[token] >= 5]
    cells = [(counts[token], expected[token].item()) for token in often]
    if num_draws - sum(mean for _, mean in cells) > 1:
        cells.append((num_draws - sum(count for count, _ in cells), num_draws - sum(mean for _, mean in cells)))
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    assert freedom >= 2
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_stop_strings_end_samples_at_the_token_that_completes_them(trained):
    """Ids after the stop would be unwanted context for the next step. A lost token would shift all that follow."""
    prompt = "What is 3 + 1?\n"
    ids = trained.tokenizer.encode(prompt)
    [[whole]] = ask(trained, (ids, 1, [], 60, 0))
    assert whole.finish == "eos" and "# Step 2\n" in whole.text
    texts = [trained.tokenizer.decode(ids + whole.token_ids[:k])[len(prompt) :] for k in range(len(whole.token_ids))]
    assert texts[-1] == whole.text
    stops = ["# Step 2", "\n\n"] + [whole.text[i : i + 3] for i in range(len(whole.text) - 2)]
    over = 0
    for stop, [sample] in zip(
        stops, ask(trained, *((ids, 1, ["never this", stop], 60, 0) for stop in stops)), strict=True
    ):
        length = next(k for k, text in enumerate(texts) if stop in text)
        assert (sample.token_ids, sample.text) == (whole.token_ids[:length], texts[length])
        assert (sample.finish, sample.stop_reason) == ("stop", stop)
        over += not sample.text.endswith(stop)
    assert 0 < over < len(stops)


def test_texts_of_a_path_join_to_the_text_of_its_ids(trained):
    """Steps are sampled one by one. A space lost at a border would be lost in every solution."""
    prompt = "What is 2 + 1?\n"
    ids = trained.tokenizer.encode(prompt)
    [[whole]] = ask(trained, (ids, 1, [], 60, 0))
    parts = []
    while not parts or parts[-1].finish == "stop":
        path = ids + [token for part in parts for token in part.token_ids]
        parts += ask(trained, (path, 1, ["# Step", " start", "d "], 60, 0))[0]
    assert len(parts) >= 4
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert "".join(part.text for part in parts) == whole.text


def test_a_stop_string_in_the_prefix_does_not_count(greedy):
    """Every prefix of a search ends with a stop string."""
    ids = greedy.tokenizer.encode("# Step 1\nAdd 1.\n\n# Step 2")
    [[sample]] = ask(greedy, (ids, 1, ["# Step"], 5, 0))
    assert (sample.finish, len(sample.token_ids)) == ("length", 5)


def test_requests_with_other_ends_share_a_batch(engine, monkeypatch):
    """A row that continued to the end of the batch, or stopped at another row's stop string, would look valid."""
    batches = record_batches(engine, monkeypatch)
    ids = prefixes(engine)[0]
    requests = [(ids, 4, ["a"], 30, 0), (ids, 4, [], 3, 0), (ids, 4, ["\n", "e"], 30, 0)]
    stopped_a, short, stopped_e = ask(engine, *requests)
    assert batches[0] == 12
    assert [len(sample.token_ids) for sample in short] == [3] * 4
    for samples, stops in ((stopped_a, ["a"]), (stopped_e, ["\n", "e"])):
        for sample in samples:
            if sample.finish == "stop":
                assert find_stop(sample.text, stops)[1] == sample.stop_reason
            else:
                assert not any(stop in sample.text for stop in stops)
    assert {sample.finish for sample in stopped_e} >= {"stop"}


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_end_of_sequence(folder, pad_is_eos):
    """If padding and EOS are the same token, padded rows could seem finished, or never finish."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    plain = TransformersEngine(model, tokenizer, temperature=0.0)
    ids = tokenizer.encode(PROMPTS[1])
    [[whole]] = ask(plain, (ids, 1, [], 10, 0))
    asyncio.run(plain.close())
    end = whole.token_ids[4]
    model.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    engine = TransformersEngine(model, tokenizer, temperature=0.0)
    length = whole.token_ids.index(end) + 1
    [[sample], [stopped]] = ask(engine, (ids, 1, [], 10, 0), (ids, 1, [whole.text[:1]], 10, 0))
    assert (sample.token_ids, sample.finish, sample.stop_reason) == (whole.token_ids[:length], "eos", None)
    assert sample.text == tokenizer.decode(whole.token_ids[: length - 1])
    assert (stopped.token_ids, stopped.finish) == (whole.token_ids[:1], "stop")


def test_generation_defaults_of_the_model_do_not_leak(folder, tmp_path, greedy):
    """Many checkpoints ship a repetition penalty and top_k, which `generate` applies to unset options."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=list(range(100))
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["repetition_penalty"] == 5.0
    engine = TransformersEngine.from_pretrained(str(tmp_path), device="cpu", temperature=0.0)
    request = (prefixes(engine)[0], 1, [], 20, 0)
    assert ask(engine, request) == ask(greedy, request)
    asyncio.run(engine.close())
    assert engine.model.generation_config.repetition_penalty == 5.0


def test_cancelled_requests_leave_the_others_alone(engine):
    """A search that ends early cancels its requests. If the worker died, every other search would wait forever."""
    ids = prefixes(engine)[0]
    request = (ids, 2, [], 12, 7)
    [expected] = ask(engine, request)

    async def run():
        lost = asyncio.create_task(engine.sample(ids, 40, [], 100, 0))
        kept = asyncio.create_task(engine.sample(*request))
        await asyncio.sleep(0.02)  # the first batch runs
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        return await asyncio.wait_for(kept, 60)

    assert asyncio.run(run()) == expected
    assert ask(engine, request) == [expected]


def test_cancelled_batch_stops(engine, monkeypatch):
    """Otherwise Ctrl-C would take as long as the longest sample."""
    lengths = []
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *args, **kwargs: lengths.append(1) or forward(*args, **kwargs))

    async def run():
        task = asyncio.create_task(engine.sample(prefixes(engine)[0], 4, [], 120, 0))
        while len(lengths) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine._worker

    asyncio.run(run())
    assert 3 <= len(lengths) < 100


def test_the_length_of_the_model(greedy):
    """Positions after the last one give noise that looks like text."""
    prefix = (prefixes(greedy)[0] * 40)[:128]
    [[sample]] = ask(greedy, (prefix[:120], 1, [], 50, 0))
    assert (len(sample.token_ids), sample.finish) == (8, "length")
    with pytest.raises(PrefixTooLong):
        ask(greedy, (prefix, 1, [], 50, 0))


def test_batch_stays_within_the_last_position(greedy, monkeypatch):
    """Rows of a batch advance together, so a long prefix and a long sample could exceed the position table."""
    batches = record_batches(greedy, monkeypatch)
    positions = []
    hook = greedy.model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"].max().item()), with_kwargs=True
    )
    long, short = (prefixes(greedy)[0] * 40)[:110], prefixes(greedy)[1]
    requests = [(long, 1, [], 10, 0), (short, 1, [], 60, 0), (short, 1, [], 5, 0)]
    samples = ask(greedy, *requests)
    hook.remove()
    assert batches == [1, 2, 1]  # the short ones wait for the long one, and the shortest one leaves first
    assert max(positions) < 128
    assert [len(sample.token_ids) for [sample] in samples] == [10, 60, 5]


def test_faults_of_the_model_reach_every_request(engine, monkeypatch):
    """An error that stays in the worker would leave the searches waiting forever."""

    began, go_on = threading.Event(), threading.Event()

    def out_of_memory(*args, **kwargs):
        began.set()
        go_on.wait(60)
        raise torch.OutOfMemoryError("tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(engine.model, "generate", out_of_memory)
    ids = prefixes(engine)[0]

    async def run():
        tasks = [asyncio.create_task(engine.sample(ids, 2, [], 4, i)) for i in range(4)]
        await asyncio.to_thread(began.wait, 60)
        tasks[0].cancel()
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    errors = asyncio.run(run())
    assert [type(error) for error in errors] == [asyncio.CancelledError] + [EngineFatal] * 3
    assert "8 sequences" in str(errors[1]) and "Lower `batch_size`. (tried to allocate 1 GiB)" in str(errors[1])
    monkeypatch.undo()
    [samples] = ask(engine, (ids, 2, [], 4, 0))
    check_samples(samples, engine.tokenizer, ids, 2, [], 4)


def test_describe_is_stable(folder, engine):
    """The manifest rejects another policy. A value that differs between starts would reject every resume."""
    again = TransformersEngine.from_pretrained(folder, device="cpu", batch_size=2)
    assert engine.describe() == again.describe() == json.loads(json.dumps(engine.describe()))
    assert engine.describe()["dtype"] == "float32" and engine.describe()["model"] == folder
    other = TransformersEngine.from_pretrained(folder, device="cpu", temperature=0.7)
    assert other.describe() != engine.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "`temperature` is -1"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"top_p": 0}, "`top_p` is 0"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": "many"}, "`batch_size` is 'many'"),
    ],
)
def test_options_out_of_range(engine, options, message):
    with pytest.raises(ValueError, match=message):
        TransformersEngine(engine.model, engine.tokenizer, **options)


def test_unknown_dtype(folder):
    with pytest.raises(ValueError, match="'float99'"):
        TransformersEngine.from_pretrained(folder, dtype="float99")


def test_next_logprobs(folder, engine, monkeypatch):
    """The distribution of the model itself, whatever the sampling parameters are."""
    cold = TransformersEngine.from_pretrained(folder, device="cpu", temperature=0.3, top_k=2)
    for ids in prefixes(engine):
        with torch.no_grad():
            expected = engine.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for one in (engine, cold):
            found = asyncio.run(one.next_logprobs(ids, [5, 17, 200]))
            assert found == pytest.approx(expected[[5, 17, 200]].tolist(), abs=1e-6)
    with pytest.raises(PrefixTooLong):
        asyncio.run(engine.next_logprobs([5] * 128, [5]))

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(engine.model, "forward", out_of_memory)
    with pytest.raises(EngineFatal, match="prefix of 2 tokens. Lower `batch_size`"):
        asyncio.run(engine.next_logprobs([5, 6], [5]))
