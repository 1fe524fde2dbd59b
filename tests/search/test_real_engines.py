"""transformers, vLLM, `vllm serve` and `transformers serve` must sample the same from one tiny model."""

import asyncio
import importlib
import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_hrm.search.engines.base import EngineFatal, PrefixTooLong, check_samples
from trl_hrm.search.engines.openai import IDENTITY_PROMPT, OpenAIEngine
from trl_hrm.search.engines.transformers import TransformersEngine

from .policies import make_policy
from .serving import ENVIRONMENT, serve


pytestmark = pytest.mark.slow

PROMPTS = ["What is 3 + 4?\n\n", "What is 11 + 7?\n\n# Step 1\n", "# Step 2\nThe sum", "so " * 30]
MAX_LENGTH = 256
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_policy(folder, MAX_LENGTH)
    return str(folder)


@pytest.fixture(scope="module")
def loop():
    """vLLM belongs to one event loop, so all tests share it."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(scope="module")
def ask(loop):
    def ask(engine, *requests):
        async def together():
            return await asyncio.wait_for(asyncio.gather(*(engine.sample(*request) for request in requests)), 120)

        return loop.run_until_complete(together())

    return ask


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def requests(folder, tokenizer, ask):
    """Return greedy requests, with no stop strings and with stop strings from the middle of the model's text."""
    engine = TransformersEngine.from_pretrained(folder, device="cpu", temperature=0.0)
    requests = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        [[whole]] = ask(engine, (ids, 1, [], NUM_TOKENS, 0))
        requests += [(ids, 1, [], NUM_TOKENS, 0), (ids, 1, [], 5, 0), (ids, 1, ["not in it"], NUM_TOKENS, 0)]
        third, half = len(whole.text) // 3, len(whole.text) // 2
        for stop in (
            "# Step 2",
            whole.text[third : third + 1],
            whole.text[third : third + 4],
            whole.text[half : half + 7],
        ):
            requests.append((ids, 1, [stop, "not in it"], NUM_TOKENS, 0))
    return requests


@pytest.fixture(scope="module")
def reference(folder, requests, ask):
    """Return what TransformersEngine samples, and why each sample ends."""
    engine = TransformersEngine.from_pretrained(folder, device="cpu", temperature=0.0)
    return [samples[0] for samples in ask(engine, *requests)]


def test_the_reference_covers_what_matters(requests, reference):
    """Requests that never stop, or stop only at token borders, would test nothing of interest."""
    stopped = [sample for sample in reference if sample.finish == "stop"]
    assert len(stopped) >= 12 and {sample.finish for sample in reference} == {"stop", "eos", "length"}
    assert "# Step 2" in {sample.stop_reason for sample in stopped}
    assert not any("\ufffd" in sample.text for sample in reference)
    assert any(
        not sample.text.endswith(sample.stop_reason) for sample in stopped
    )  # a token that continues after the stop
    assert any(sample.text.endswith(sample.stop_reason) for sample in stopped)


@pytest.fixture(scope="module")
def vllm_engine(folder, loop):
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from trl_hrm.search.engines.vllm import VLLMEngine

        engine = VLLMEngine.from_pretrained(  # outside the loop, as in the command
            folder,
            dtype="float32",
            temperature=0.0,
            max_model_len=MAX_LENGTH,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            block_size=32,
            max_num_seqs=64,
        )
        yield engine
        loop.run_until_complete(engine.close())


@pytest.fixture(scope="module")
def vllm_url(folder, tmp_path_factory):
    pytest.importorskip("vllm", reason="needs vLLM; `make test-slow` installs it")
    options = ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--enforce-eager", "--block-size", "32"]
    options += ["--kv-cache-memory-bytes", str(64 << 20), "--enable-prompt-tokens-details"]
    home = tmp_path_factory.mktemp("vllm")
    with serve(home, "vllm.entrypoints.cli.main", "serve", folder, "--served-model-name", "lm", *options) as url:
        yield url


@pytest.fixture(scope="module")
def transformers_url(folder, tmp_path_factory):
    pytest.importorskip("fastapi", reason='needs `pip install "transformers[serving]"`')
    options = ["--device", "cpu", "--dtype", "float32"]
    with serve(
        tmp_path_factory.mktemp("transformers"), "transformers.cli.transformers", "serve", folder, *options
    ) as url:
        yield url


def with_sampling(engine, **options):
    """Return the same engine with other sampling parameters."""
    other = object.__new__(type(engine))
    other.__dict__ = engine.__dict__ | {"sampling": replace(engine.sampling, **options)}
    return other


def check_next_logprobs(engine, folder, loop):
    """The log-probabilities are those of the model, also of tokens that it would never sample."""
    ids = engine.tokenizer.encode(PROMPTS[3])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    chosen = [int(expected.argmax()), int(expected.argmin()), 7]
    found = loop.run_until_complete(engine.next_logprobs(ids, chosen))
    assert found == pytest.approx(expected[chosen].tolist(), abs=1e-3)
    assert engine.has_logprobs and engine.max_length == MAX_LENGTH


class TestVLLM:
    """Test AsyncLLM in this process."""

    def test_greedy(self, vllm_engine, requests, reference, ask):
        samples = [replace(sample, num_cached=0) for [sample] in ask(vllm_engine, *requests)]
        assert samples == reference

    def test_sampling(self, vllm_engine, folder, tokenizer, ask):
        """A parameter that is lost still gives fluent samples, but of another policy."""
        engine = with_sampling(vllm_engine, temperature=2.0, top_k=3)
        ids = tokenizer.encode(PROMPTS[3])
        [samples] = ask(engine, (ids, 600, [], 1, 5 << 16))
        check_samples(samples, tokenizer, ids, 600, [], 1)
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1]
        top = logits.topk(3)
        expected = (top.values.double() / 2).softmax(0) * 600
        counts = Counter(sample.token_ids[0] for sample in samples)
        assert set(counts) <= set(top.indices.tolist())
        assert sum((counts[t] - e) ** 2 / e for t, e in zip(top.indices.tolist(), expected.tolist(), strict=True)) < 14

    def test_next_logprobs(self, vllm_engine, folder, loop):
        check_next_logprobs(vllm_engine, folder, loop)

    def test_seeds(self, vllm_engine, tokenizer, ask):
        """If seeds differ by less than `n`, samples repeat and look like agreement."""
        engine = with_sampling(vllm_engine, temperature=2.0)
        ids = tokenizer.encode(PROMPTS[0])
        near, next_to, far, alone = ask(
            engine, (ids, 4, [], 12, 1), (ids, 4, [], 12, 2), (ids, 4, [], 12, 5), (ids, 1, [], 12, 3)
        )
        texts = [[tuple(sample.token_ids) for sample in samples] for samples in (near, next_to, far, alone)]
        assert texts[0][1:] == texts[1][:3]
        assert texts[3][0] == texts[0][2]
        assert not set(texts[0]) & set(texts[2])
        assert len(set(texts[0] + texts[2])) == 8

    def test_cached_prefixes_are_reported_once(self, vllm_engine, tokenizer, ask):
        ids = tokenizer.encode("and " * 100)[:80]
        ask(vllm_engine, (ids, 1, [], 2, 0))
        [samples] = ask(with_sampling(vllm_engine, temperature=1.0), (ids, 3, [], 2, 0))
        assert [sample.num_cached for sample in samples] == [64, 0, 0]

    def test_length_of_the_model(self, vllm_engine, tokenizer, ask):
        ids = (tokenizer.encode(PROMPTS[0]) * 100)[:MAX_LENGTH]
        [[sample]] = ask(vllm_engine, (ids[:-6], 1, [], 50, 0))
        assert (sample.finish, len(sample.token_ids)) == ("length", 6)
        with pytest.raises(PrefixTooLong):
            ask(vllm_engine, (ids, 1, [], 50, 0))

    def test_cancelled_requests_leave_the_others_alone(self, vllm_engine, requests, reference, loop, ask):
        async def run():
            lost = asyncio.create_task(vllm_engine.sample(requests[0][0], 1, [], 200, 0))
            await asyncio.sleep(0.05)
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost

        loop.run_until_complete(run())
        assert [replace(s, num_cached=0) for [s] in ask(vllm_engine, requests[0])] == reference[:1]

    def test_describe(self, vllm_engine, folder):
        described = vllm_engine.describe()
        assert (described["engine"], described["model"], described["dtype"]) == ("vllm", folder, "float32")
        assert described["vllm"] and described["temperature"] == 0.0
        assert described["max_model_len"] == described["engine_args"]["max_model_len"] == MAX_LENGTH
        assert described["engine_args"]["block_size"] == 32
        assert described == json.loads(json.dumps(described))


class TestVLLMServer:
    """Test `vllm serve` over HTTP."""

    @pytest.fixture
    def engine(self, vllm_url, tokenizer, loop):
        engine = OpenAIEngine([vllm_url], "lm", tokenizer, temperature=0.0, timeout=60.0)
        yield engine
        loop.run_until_complete(engine.close())

    def test_greedy(self, engine, requests, reference, ask):
        samples = [replace(sample, num_cached=0) for [sample] in ask(engine, *requests)]
        assert samples == reference

    def test_next_logprobs(self, engine, folder, loop):
        check_next_logprobs(engine, folder, loop)

    def test_sampling_equals_vllm(self, vllm_url, vllm_engine, tokenizer, loop, ask):
        """With the same engine and seeds, anything that HTTP loses or adds shows here."""
        options = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
        engine = OpenAIEngine([vllm_url], "lm", tokenizer, **options)
        requests = [(tokenizer.encode(prompt), 4, ["a"], 16, 7 << 16) for prompt in PROMPTS]
        over_http = ask(engine, *requests)
        local = ask(with_sampling(vllm_engine, **options), *requests)
        loop.run_until_complete(engine.close())
        for (ids, *_), ours, theirs in zip(requests, over_http, local, strict=True):
            check_samples(ours, tokenizer, ids, 4, ["a"], 16)
            assert [replace(sample, num_cached=0) for sample in ours] == [replace(s, num_cached=0) for s in theirs]

    def test_cached_prefixes_are_reported(self, engine, tokenizer, ask):
        ids = tokenizer.encode("thus " * 100)[:80]
        ask(engine, (ids, 1, [], 2, 0))
        [samples] = ask(engine, (ids, 2, [], 2, 0))
        assert [sample.num_cached for sample in samples] == [64, 0]

    def test_length_of_the_model(self, engine, tokenizer, ask):
        ids = (tokenizer.encode(PROMPTS[0]) * 100)[:MAX_LENGTH]
        [[sample]] = ask(engine, (ids[:-6], 1, [], 50, 0))
        assert (sample.finish, len(sample.token_ids)) == ("length", 6)
        engine.client.servers[0].max_length = None  # the server's own refusal
        with pytest.raises(PrefixTooLong, match="HTTP 400: .*(maximum context length|max_tokens must be at least 1)"):
            ask(engine, (ids, 1, [], 50, 0))

    def test_identity(self, engine, vllm_url, folder, tokenizer, requests, loop, ask):
        """The log-probabilities must be those of the model, so that another model under the same name is refused."""
        ask(engine, requests[0])
        identity = engine.describe()["identity"]
        ids = tokenizer.encode(IDENTITY_PROMPT)[: MAX_LENGTH - 1]
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
        expected = logits[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
        assert identity["max_model_len"] == MAX_LENGTH and identity["root"]
        assert identity["prompt_logprobs"] == pytest.approx(expected, abs=0.01)

    def test_at_most_four_stop_strings(self, engine, requests, tokenizer, loop, ask):
        """Our limit must equal the server's."""
        ids = requests[0][0]
        check_samples(ask(engine, (ids, 1, list("WXYZ"), 5, 0))[0], tokenizer, ids, 1, list("WXYZ"), 5)
        body = {"model": "lm", "prompt": ids, "max_tokens": 5, "stop": list("VWXYZ")}
        with pytest.raises(EngineFatal, match="HTTP 400.*at most 4"):
            loop.run_until_complete(engine.client.fetch(engine.client.servers[0], "completions", body))

    def test_another_model(self, vllm_url, tokenizer, loop, ask):
        engine = OpenAIEngine([vllm_url], "another", tokenizer)
        with pytest.raises(EngineFatal, match="'another'.*'lm'"):
            ask(engine, ([1], 1, [], 5, 0))
        loop.run_until_complete(engine.close())

    def test_text_api_is_rejected(self, vllm_url, tokenizer, loop, ask):
        """vLLM removes stop strings from the text, so every stopped step would look like the end of a solution."""
        engine = OpenAIEngine([vllm_url], "lm", tokenizer, api="text")
        with pytest.raises(EngineFatal, match='removes stop strings.*use api="vllm"'):
            ask(engine, ([1], 1, [], 5, 0))
        loop.run_until_complete(engine.close())


class TestTransformersServer:
    """Test `transformers serve` over HTTP."""

    @pytest.mark.parametrize("api", ["transformers", "text"])
    def test_greedy(self, api, transformers_url, folder, tokenizer, requests, reference, loop, ask):
        engine = OpenAIEngine([transformers_url], folder, tokenizer, api=api, temperature=0.0)
        samples = [samples[0] for samples in ask(engine, *requests)]
        loop.run_until_complete(engine.close())
        for sample, expected in zip(samples, reference, strict=True):
            assert (sample.text, sample.finish, sample.stop_reason) == (
                expected.text,
                expected.finish,
                expected.stop_reason,
            )

    def test_sampling(self, transformers_url, folder, tokenizer, loop, ask):
        engine = OpenAIEngine([transformers_url], folder, tokenizer, api="transformers", temperature=2.0, top_k=50)
        ids = tokenizer.encode(PROMPTS[0])
        [samples] = ask(engine, (ids, 4, [], 12, 0))
        check_samples(samples, tokenizer, ids, 4, [], 12)
        assert len({sample.text for sample in samples}) > 1
        loop.run_until_complete(engine.close())

    def test_text_api_does_not_sample(self, transformers_url, folder, tokenizer, loop, ask):
        """By default this server is greedy at any temperature, so all samples of a step would be equal."""
        engine = OpenAIEngine([transformers_url], folder, tokenizer, api="text")
        with pytest.raises(EngineFatal, match='does not sample.*use api="transformers"'):
            ask(engine, ([1], 1, [], 5, 0))
        loop.run_until_complete(engine.close())


def test_missing_vllm_names_the_install_command(monkeypatch):
    """The name of the missing module alone does not say what to install."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "trl_hrm.search.engines.vllm", raising=False)
    with pytest.raises(ImportError, match=r"trl-hrm\[vllm\]"):
        importlib.import_module("trl_hrm.search.engines.vllm")
