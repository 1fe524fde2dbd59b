"""Test the engine against a local server with real faults: each request returns what was sent, or raises."""

import asyncio
import json
import socket
import threading
import traceback
from dataclasses import replace

import pytest

from trl_hrm.search.engines.base import (
    CharTokenizer,
    EngineError,
    EngineFatal,
    PrefixTooLong,
    Sample,
    check_samples,
    sample_from_vllm,
)
from trl_hrm.search.engines.openai import OpenAIEngine
from trl_hrm.search.policies import FullTree
from trl_hrm.search.run_folder import finish_shard

from ..fakes import byte_level
from .http_server import FakeServer, body, cut, hang, hang_up, policy, status
from .scripted import FINAL, PROMPT, RULE, make_problems, run_scripted


TOKENIZER = CharTokenizer()
PREFIX = TOKENIZER.encode("What is 3 + 4?\n\n# Step 1\n")
STOP = ["# Step 2", "seven"]
# two greedy answers and eight at high temperature, in two requests to vLLM. First, the log-probabilities that identify vLLM's model
SELF_TEST = {"vllm": 5, "text": 10}


def engine_for(*servers, **options):
    urls = [server if isinstance(server, str) else server.url for server in servers]
    options = {"backoff": 0.001, "timeout": 5.0, "api_key": "sk-secret"} | options
    return OpenAIEngine(urls, "lm", TOKENIZER, **options)


def run(engine, *work):
    """Run the coroutines made by the functions of `work` in order, and return the last result."""

    async def main():
        try:
            for function in work:
                result = await asyncio.wait_for(function(), 60)
            return result
        finally:
            await engine.close()

    return asyncio.run(main())


def ask(engine, n=2, stop=STOP, max_tokens=300, seed=100, key="", prefix=PREFIX):
    return lambda: engine.sample(prefix, n, stop, max_tokens, seed, key)


def after_test(server, *faults):
    """Let the server fail from the next request on."""

    async def order():
        server.faults.extend(faults)
        server.requests.clear()

    return order


def expected(seed, max_tokens=300, stop=STOP, temperature=1.0):
    """Return what the server's policy writes, cut by hand."""
    text = policy(TOKENIZER.decode(PREFIX), seed, temperature)
    ends = {text.find(string) + len(string): string for string in stop if string in text}
    if ends and min(ends) <= max_tokens:
        text = text[: min(ends)]
        return Sample(TOKENIZER.encode(text), text, "stop", ends[min(ends)])
    if len(text) >= max_tokens:
        return Sample(TOKENIZER.encode(text[:max_tokens]), text[:max_tokens], "length")
    return Sample([*TOKENIZER.encode(text), 0], text, "eos")


def without_cached(samples):
    return [Sample(s.token_ids, s.text, s.finish, s.stop_reason) for s in samples]


@pytest.mark.parametrize("api", ["vllm", "text"])
@pytest.mark.parametrize(("stop", "max_tokens"), [(STOP, 300), ([], 300), (["not in it"], 300), (STOP, 7), ([], 7)])
def test_samples(api, stop, max_tokens):
    """Confusing a stop string with the end of the sequence would end a solution in its middle."""
    with FakeServer(api) as server:
        engine = engine_for(server, api=api)
        samples = run(engine, ask(engine, 5, stop, max_tokens))
    check_samples(samples, TOKENIZER, PREFIX, 5, stop, max_tokens)
    assert without_cached(samples) == [expected(100 + i, max_tokens, stop) for i in range(5)]
    num_cached = len(PREFIX) // 2 if api == "vllm" else 0
    assert [sample.num_cached for sample in samples] == [num_cached, 0, 0, 0, 0]


@pytest.mark.parametrize("api", ["vllm", "text"])
def test_greedy_samples_are_asked_once(api):
    """vLLM rejects several greedy samples, and several requests would bill the same tokens again."""
    with FakeServer(api) as server:
        engine = engine_for(server, api=api, temperature=0.0)
        samples = run(engine, ask(engine, 3))
        assert len(server.requests) == {"vllm": 3, "text": 2}[api] + 1
    assert without_cached(samples) == [expected(100, temperature=0.0)] * 3
    assert [sample.num_cached > 0 for sample in samples] == [api == "vllm", False, False]


def test_request_to_vllm():
    """The server fills missing fields from the model's generation configuration."""
    with FakeServer() as server:
        engine = engine_for(server, temperature=0.7, top_p=0.9, top_k=20)
        run(engine, ask(engine, 3, ["\n"], 50, 7))
        assert server.requests[-1] == {
            "model": "lm",
            "prompt": PREFIX,
            "n": 3,
            "seed": 7,
            "max_tokens": 50,
            "stop": ["\n"],
            "include_stop_str_in_output": True,
            "return_token_ids": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        assert server.headers[-1]["Authorization"] == "Bearer sk-secret"


def test_request_to_other_servers():
    """They answer 422 to unknown fields, and several ignore `n`."""
    with FakeServer("text") as server:
        engine = engine_for(server, api="text")
        run(engine, ask(engine, 2, ["\n"], 50, 7))
        sent = sorted(server.requests[-2:], key=lambda request: request["seed"])
    common = {"model": "lm", "max_tokens": 50, "stop": ["\n"], "temperature": 1.0, "top_p": 1.0}
    assert sent == [common | {"prompt": TOKENIZER.decode(PREFIX), "seed": seed} for seed in (7, 8)]
    with FakeServer("text") as server:
        engine = engine_for(server, api="transformers", top_k=5)
        run(engine, ask(engine, 1, [], 50, 7))
        config = json.loads(server.requests[-1].pop("generation_config"))
        assert config == {"do_sample": True, "top_k": 5, "repetition_penalty": 1.0}
        assert "stop" not in server.requests[-1]


PASSING = {
    "429": status(429),
    "500": status(500),
    "503": status(503, "loading"),
    "not JSON": body(b"<html>gateway</html>"),
    "not text": body(b"\xff\xfe\x00"),
    "no object": body([1, 2]),
    "no choices": body({"object": "error"}),
    "half a choice": body({"choices": [{"index": 0, "text": "so"}]}),
    "cut": cut,
    "hang up": hang_up,
    "hang": hang(0.5),
}


@pytest.mark.parametrize("api", ["vllm", "text"])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_transient_faults_are_retried(api, fault):
    """A fault returned as a sample would be judged and become a label."""
    with FakeServer(api) as server:
        engine = engine_for(server, api=api, timeout=0.3)
        samples = run(engine, ask(engine), after_test(server, fault, fault), ask(engine, 1, seed=500))
        assert len(server.requests) == 3
    assert without_cached(samples) == [expected(500)]


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_lasting_faults_raise(fault):
    with FakeServer() as server:
        engine = engine_for(server, timeout=0.2, max_retries=2)
        with pytest.raises(EngineError, match=r"127\.0\.0\.1:\d+/v1.* 3 tries"):
            run(engine, ask(engine), after_test(server, *[fault] * 9), ask(engine))
        assert len(server.requests) == 3


def test_messages_name_the_fault():
    for fault, message in (
        (status(503, "loading"), "HTTP 503: loading"),
        (hang(0.5), "no response within 0.2 seconds"),
        (body(b"<html>"), "not valid JSON .* starts with <html>"),
        (hang_up, "ServerDisconnectedError"),
    ):
        with FakeServer() as server:
            engine = engine_for(server, timeout=0.2, max_retries=0)
            with pytest.raises(EngineError, match=f"1 tries.*{message}"):
                run(engine, ask(engine), after_test(server, fault), ask(engine))


WHOLE = {"index": 0, "text": "so", "finish_reason": "stop", "token_ids": [115, 111, 0]}
MISSHAPEN = {
    "ids are text": ({"token_ids": "abc"}, {}),
    "ids are a number": ({"token_ids": 5}, {}),
    "ids are words": ({"token_ids": ["a"]}, {}),
    "ids below 0": ({"token_ids": [-1]}, {}),
    "half a surrogate pair": ({"text": "so \ud800"}, {}),
    "usage is text": ({}, {"usage": "abc"}),
    "details are a list": ({}, {"usage": {"prompt_tokens_details": [1]}}),
    "cached tokens are text": ({}, {"usage": {"prompt_tokens_details": {"cached_tokens": "many"}}}),
}


@pytest.mark.parametrize(("choice", "answer"), MISSHAPEN.values(), ids=MISSHAPEN)
def test_answers_of_another_shape_are_faults(choice, answer):
    """Like any other gateway fault, they must be retried. A traceback would end a search of several days."""
    fault = body({"choices": [WHOLE | choice]} | answer)
    with FakeServer() as server:
        engine = engine_for(server, max_retries=2)
        samples = run(engine, ask(engine), after_test(server, fault, fault), ask(engine, 1, seed=500))
        assert len(server.requests) == 3
        engine = engine_for(server, max_retries=2)
        with pytest.raises(EngineError, match="3 tries.*(choices|ids|usage|details|cached|surrogate)"):
            run(engine, ask(engine), after_test(server, fault, fault, fault), ask(engine))
    assert without_cached(samples) == [expected(500)]


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
def test_servers_without_cached_token_counts(usage):
    with FakeServer() as server:
        engine = engine_for(server)
        answer = body({"choices": [WHOLE], "usage": usage})
        samples = run(engine, ask(engine), after_test(server, answer), ask(engine, 1))
    assert samples == [Sample([115, 111, 0], "so", "eos")]


@pytest.mark.parametrize("api", ["vllm", "text"])
def test_more_stop_strings_than_servers_take(api):
    """The error of `vllm serve` does not say which option to change."""
    stops = [*STOP, "never", "this", "nor that"]
    with FakeServer(api) as server:
        engine = engine_for(server, api=api)
        assert without_cached(run(engine, ask(engine, 1, stops[:4]))) == [expected(100, stop=stops[:4])]
        server.requests.clear()
        with pytest.raises(EngineFatal, match="5 stop strings.* at most 4 .*--final_stops"):
            run(engine, ask(engine, 1, stops))
        assert server.requests == []


def test_transformers_takes_any_number_of_stop_strings():
    stops = [*STOP, "never", "this", "nor that"]
    with FakeServer("text") as server:
        server.max_stops = len(stops)
        engine = engine_for(server, api="transformers")
        assert run(engine, ask(engine, 1, stops)) == [expected(100, stop=stops)]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 422])
def test_rejected_request_stops_the_search_at_once(code):
    """Retrying a wrong model name, or treating it as one failed request, would cost hours and leave an empty run."""
    with FakeServer() as server:
        engine = engine_for(server)
        message = "the key sk-secret may not\nuse the model `lm` " + "x" * 1000
        with pytest.raises(EngineFatal, match=f"HTTP {code}: the key") as error:
            run(engine, ask(engine), after_test(server, status(code, message)), ask(engine))
        assert len(server.requests) == 1
    assert "sk-secret" not in str(error.value) and len(str(error.value)) < 450


@pytest.mark.parametrize(
    ("code", "message", "error"),
    [
        (400, "This model's maximum context length is 20 tokens.", PrefixTooLong),
        (400, "max_tokens must be at least 1, got 0.", PrefixTooLong),
        (400, "max_tokens must be at least 1, got -5", PrefixTooLong),
        (422, "max_completion_tokens must be at least 1, got 0", PrefixTooLong),
        (400, "max_new_tokens must be greater than 0, but is -3", PrefixTooLong),
        (400, "The decoder prompt .length 5000. is longer than the maximum model length of 4096", PrefixTooLong),
        (400, "The prompt .total length 50. is too long to fit into the model", PrefixTooLong),
        (400, "the request exceeds the available context size, try increasing it", PrefixTooLong),
        (422, "Input validation error: `inputs` must have less than 20 tokens. Given: 25", PrefixTooLong),
        (400, "The number of input tokens .50. exceeds the limit", PrefixTooLong),
        (
            400,
            "You passed 41 input tokens and requested 0 output tokens. the context length is only 40",
            PrefixTooLong,
        ),
        (422, "The prompt is too long.", PrefixTooLong),
        (413, "Payload", PrefixTooLong),
        *(
            (400, message, PrefixTooLong)
            for message in (
                "max_new_tokens must be at least 0, got -3.",
                "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got -5 instead.",
                "max_tokens cannot be less than 1",
                "max_tokens is -3 but must be at least one",
                "max_output_tokens must not be negative",
                "max_tokens must be 1 or more",
                "max_tokens must be larger than 0",
                "Prompt has 5000 tokens, which exceeds the limit of 4096",
                "Input length 5000 exceeds the maximum allowed length 4096",
                "The input is too large",
                "Please reduce the length of the prompt.",
            )
        ),
        (404, "There is no model `long context length`.", EngineFatal),
        (400, "temperature must be a number", EngineFatal),
        (400, "n must be at least 1, got 0", EngineFatal),
        (400, "max_tokens must be an integer", EngineFatal),
        (400, "max_tokens is too large: 300. This model supports at most 200 completion tokens", EngineFatal),
        (400, "max_tokens must be at least 16", EngineFatal),
        (400, "max_tokens of this request is too large", EngineFatal),
        (400, "min_tokens must be at most max_tokens=8, and n must be at least 1", EngineFatal),
        (400, "The stop sequence is longer than allowed", EngineFatal),
        (401, "max_tokens must be at least 1, got 0.", EngineFatal),
    ],
)
def test_prefix_too_long_fails_one_request(code, message, error):
    """One deep node must not end the whole search, and must not be retried."""
    with FakeServer(max_length=None) as server:
        engine = engine_for(server)
        long = ask(engine, prefix=PREFIX * 2)
        with pytest.raises(error, match=f"HTTP {code}: {message}"):
            run(engine, ask(engine), after_test(server, status(code, message)), long)
        assert len(server.requests) == 1


@pytest.mark.parametrize("max_length", [None, 10_000])
def test_prefix_that_cannot_be_too_long(max_length):
    """A solution that is cut off counts as wrong, so a server must not say so of a prefix that it has accepted, or has room for."""
    refusal = status(400, "The prompt is too long.")
    with FakeServer(max_length=max_length) as server:
        engine = engine_for(server, max_retries=1)
        prefix = PREFIX if max_length is None else PREFIX * 9
        with pytest.raises(EngineError, match="2 tries.*rejected a prefix of .* as too long"):
            run(engine, ask(engine), after_test(server, refusal, refusal), ask(engine, prefix=prefix))
        assert len(server.requests) == 2


@pytest.mark.parametrize("api", ["vllm", "text"])
@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 65 tokens. However, you requested 350 tokens (50 in the messages, 300 in the "
        "completion).",
        "This model's maximum context length is 65 tokens. However, you requested 350 tokens (50 in the prompt, 300 in the completion).",
        "'max_tokens' or 'max_completion_tokens' is too large: 300. This model's maximum context length is 65 tokens and your request "
        "has 50 input tokens (300 > 65 - 50).",
        "Requested token count exceeds the model's maximum context length of 65 tokens. You requested a total of 350 tokens: 50 tokens "
        "from the input messages and 300 tokens for the completion.",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 65. Given: 50 `inputs` tokens and 300 `max_new_tokens`",
        "This model's maximum context length is 65 tokens.",
    ],
)
def test_request_is_shortened_to_the_servers_limit(api, message):
    """Treating it as a prefix that is too long would cut off a short prompt before its first token."""
    prefix = PREFIX * 2
    assert len(prefix) == 50
    with FakeServer(api, max_length=None) as server:
        engine = engine_for(server, api=api)
        faults = (status(400, message),)
        [sample] = run(engine, ask(engine), after_test(server, *faults), ask(engine, 1, [], 300, prefix=prefix))
        assert [request["max_tokens"] for request in server.requests] == [300, 15]
    assert sample.finish == "length" and len(sample.text) == 15


def test_short_prefix_is_shortened_too():
    """The server counts the requested tokens, so it may reject a prefix that is shorter than accepted ones."""
    refusal = status(400, "This model's maximum context length is 65 tokens.")
    with FakeServer("text") as server:
        engine = engine_for(server, api="text")
        [sample] = run(engine, ask(engine), after_test(server, refusal), ask(engine, 1, [], 300))
        assert sample.finish == "length" and len(sample.text) == 65 - len(PREFIX)
        engine = engine_for(server, api="text", max_retries=0)
        refusal = status(400, "This model's maximum context length is 35 tokens.")  # fewer than the test had
        with pytest.raises(EngineError, match="accepted a prefix of 41 tokens"):
            run(engine, ask(engine), after_test(server, refusal), ask(engine, 1, [], 300))


def test_second_rejection_means_prefix_too_long():
    with FakeServer("text") as server:
        engine = engine_for(server, api="text")
        refusal = status(400, "This model's maximum context length is 65 tokens.")
        with pytest.raises(PrefixTooLong):
            run(engine, ask(engine, 1), after_test(server, refusal, refusal), ask(engine, 1, prefix=PREFIX * 2))
        assert len(server.requests) == 2


def test_a_long_message_is_read_to_its_end():
    """The shown message is cut, but the reason may follow a copy of the request."""
    with FakeServer(max_length=None) as server:
        engine = engine_for(server)
        refusal = status(400, "Bad request " + "x" * 500 + " max_tokens must be at least 1, got 0")
        with pytest.raises(PrefixTooLong) as error:
            run(engine, ask(engine, 1), after_test(server, refusal), ask(engine, 1, prefix=PREFIX * 2))
    assert len(str(error.value)) < 450


def test_server_too_short_for_the_test_request():
    """Otherwise such a server would cut off every solution, and the run would end without an error."""
    with FakeServer("text") as server:
        server.faults += [status(400, "max_tokens must be at least 1, got 0")] * 9
        engine = engine_for(server, api="text")
        with pytest.raises(EngineFatal, match="too short"):
            run(engine, ask(engine, 1))


def test_node_too_long_is_cut_off_and_the_search_continues(tmp_path):
    """Search with a vLLM server that does not report its length: no request fails, and solutions count as cut off."""
    prompt_length = len(PROMPT.encode(TOKENIZER, make_problems(1)[0][1].prompt))
    with FakeServer(hidden_length=prompt_length + 40) as server:
        search = FullTree(RULE, FINAL, num_children=2, max_depth=6, max_step_tokens=200)
        progress = run_scripted(tmp_path, search, make_problems(8), engine=engine_for(server), max_in_flight=8)
    assert progress.num_failures == 0 and progress.closed == {"done": 8}
    assert finish_shard(tmp_path, 0, 1)["solutions"]["cut_off_by_context"] > 0


def test_length_reported_by_vllm_is_respected():
    """vLLM rejects a request whose `max_tokens` exceeds its length. Other engines end the sample there."""
    with FakeServer(max_length=300) as server:
        engine = engine_for(server)
        prefix = (PREFIX * 20)[:290]
        [sample] = run(engine, ask(engine, 1, [], 50, prefix=prefix))
        assert (server.requests[-1]["max_tokens"], sample.finish, len(sample.token_ids)) == (10, "length", 10)
        engine = engine_for(server)
        with pytest.raises(PrefixTooLong):
            run(engine, ask(engine, 1, [], 50, prefix=(PREFIX * 20)[:300]))


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_wrong_number_of_samples(kept):
    """With fewer samples than requested, each would count for too much."""
    with FakeServer() as server:
        choices = [server.choice("p", {"max_tokens": 9, "temperature": 1.0}, i, i) for i in range(kept)]
        fault = body({"choices": choices})
        engine = engine_for(server)
        samples = run(engine, ask(engine), after_test(server, fault), ask(engine, 2))
        assert without_cached(samples) == [expected(100), expected(101)]
        engine = engine_for(server, max_retries=0)
        with pytest.raises(EngineError, match="1 tries.*indices .*expected 0 to 1, each once"):
            run(engine, ask(engine), after_test(server, fault), ask(engine, 2))


GOOD = Sample([115, 111], "so", "length")
INVALID = {
    "too few": ([], "0 samples, expected 1"),
    "ids as text": ([replace(GOOD, token_ids="so")], "token ids"),
    "true as id": ([replace(GOOD, token_ids=[True, 111])], "token ids"),
    "float as id": ([replace(GOOD, token_ids=[115.0, 111])], "token ids"),
    "negative id": ([replace(GOOD, token_ids=[-1, 111])], "token ids"),
    "id beyond 32 bits": ([replace(GOOD, token_ids=[2**31, 111])], "token ids"),
    "no ids": ([replace(GOOD, token_ids=[], text="")], "0 tokens, expected 1 to 4"),
    "too many ids": ([replace(GOOD, token_ids=[115] * 5, text="sssss")], "5 tokens, expected 1 to 4"),
    "another text": ([replace(GOOD, text="no")], "token ids are the text 'so'"),
    "half a pair": ([replace(GOOD, token_ids=[0xD800, 111], text="\ud800o")], "not valid Unicode"),
    "another end": ([replace(GOOD, finish="abort")], "'abort', expected one of stop, eos, length"),
    "no stop string": ([replace(GOOD, finish="stop")], "None, which is not one of the stop strings"),
    "another stop string": (
        [replace(GOOD, finish="stop", stop_reason="o")],
        "'o', which is not one of the stop strings",
    ),
    "stop string outside": ([replace(GOOD, finish="stop", stop_reason="x")], "its text does not contain it"),
    "stop string at the limit": ([replace(GOOD, stop_reason="x")], "stop string 'x', but ended with 'length'"),
    "beyond a stop string": ([Sample([115, 120, 111], "sxo", "length")], "contains the stop string 'x'"),
    "negative cache": ([replace(GOOD, num_cached=-1)], "-1 cached tokens"),
    "large cache": ([replace(GOOD, num_cached=26)], "26 cached tokens, but the prefix has 25"),
}


@pytest.mark.parametrize(("samples", "message"), INVALID.values(), ids=INVALID)
def test_samples_are_checked_before_they_reach_the_log(samples, message):
    """Also of engines that users write. A token id of 2**31 cannot be exported, and wrong text gets a wrong label."""
    check_samples([GOOD], TOKENIZER, PREFIX, 1, ["x"], 4)
    with pytest.raises(EngineError, match=message):
        check_samples(samples, TOKENIZER, PREFIX, 1, ["x"], 4)


def test_choices_out_of_order():
    """Sample `i` belongs to seed + i, whatever its position in the answer."""
    with FakeServer() as server:
        complete = server.complete
        server.complete = lambda request: {"choices": complete(request)["choices"][::-1]}
        engine = engine_for(server)
        samples = run(engine, ask(engine, 3))
    assert samples == [expected(100 + i) for i in range(3)]


def test_vllm_finish_reasons():
    with FakeServer() as server:
        choice = {
            "index": 0,
            "text": "so ",
            "finish_reason": "stop",
            "stop_reason": 17,
            "token_ids": [115, 111, 32, 17],
        }
        engine = engine_for(server)
        [sample] = run(engine, ask(engine), after_test(server, body({"choices": [choice]})), ask(engine, 1))
        assert sample == Sample([115, 111, 32, 17], "so ", "eos")  # another token that ends sequences
        for reason in ("abort", "error", "content_filter"):
            engine = engine_for(server, max_retries=0)
            answer = body({"choices": [choice | {"finish_reason": reason}]})
            with pytest.raises(EngineError, match=reason):
                run(engine, ask(engine), after_test(server, answer), ask(engine, 1))


class SpecialTokenizer(CharTokenizer):
    """Put a special token before every text, and know a second one."""

    names = {1: "<bos>", 2: "<user>"}

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + super().encode(text)

    def decode(self, ids, skip_special_tokens=True):
        names = {} if skip_special_tokens else self.names
        return "".join(names.get(i, "" if i in self.names else chr(i)) for i in ids if i)


def test_special_tokens_of_a_prefix_sent_as_text():
    """Without the chat template's tokens, or with two BOS tokens, it would be a different prompt."""
    with FakeServer("text") as server:
        engine = OpenAIEngine([server.url], "lm", SpecialTokenizer(), api="text")
        run(engine, ask(engine, 1, prefix=[1, 2, 104, 105]), ask(engine, 1, prefix=[2, 104, 105, 1]))
        assert [request["prompt"] for request in server.requests[-2:]] == ["<user>hi", "<user>hi<bos>"]


def test_one_failed_sample_cancels_the_others():
    """Otherwise they would still be generated and billed, and never used."""
    with FakeServer("text") as server:
        engine = engine_for(server, api="text", timeout=0.2)

        async def fails():
            with pytest.raises(EngineFatal):
                await engine.sample(PREFIX, 3, STOP, 300, 0)
            await asyncio.sleep(0.5)

        run(engine, ask(engine), after_test(server, *[hang(0.3)] * 2, status(404)), fails)
        assert len(server.requests) == 3


def closed_url():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_dead_server_is_skipped():
    """With several servers, a dead one must not lose the problems assigned to it."""
    with FakeServer() as server:
        engine = engine_for(closed_url(), server, backoff=30.0)  # a pause before the other server would be seen
        work = [ask(engine, 1, seed=1000 * i, key=str(i)) for i in range(8)]
        results = []

        async def both():
            results.extend([await function() for function in work])

        run(engine, both)
        assert without_cached([sample for [sample] in results]) == [expected(1000 * i) for i in range(8)]


def test_all_servers_dead():
    urls = [closed_url(), closed_url()]
    engine = engine_for(*urls, max_retries=3)
    with pytest.raises(EngineError, match="4 tries.*Connect"):
        run(engine, ask(engine))


def test_a_key_stays_with_one_server():
    """Each server caches the prefixes that it computed, so a key must stay with its server."""
    with FakeServer() as one, FakeServer() as other:
        engine = engine_for(one, other)
        keys = [f"problem-{i}" for i in range(20)]
        prefixes = [TOKENIZER.encode(f"{key}: ") for key in keys for _ in range(3)]

        async def everything():
            await asyncio.gather(
                *(engine.sample(prefix, 1, [], 5, i, keys[i // 3]) for i, prefix in enumerate(prefixes))
            )

        run(engine, everything)
        seen = [
            {key for key in keys for request in s.requests if TOKENIZER.decode(request["prompt"]) == f"{key}: "}
            for s in (one, other)
        ]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(keys)
    assert min(len(seen[0]), len(seen[1])) >= 5


def test_pauses(monkeypatch):
    """Retry-After must be respected. Without it, pauses double and differ by seed."""
    pauses = []
    sleep = asyncio.sleep

    async def no_sleep(seconds):
        pauses.append(seconds)
        await sleep(0)

    def pauses_of(seed, *faults, **options):
        with FakeServer() as server:
            engine = engine_for(server, **{"backoff": 1.0, "max_retries": 9} | options)
            run(engine, ask(engine), after_test(server, *faults), clear, ask(engine, 1, seed=seed))
        return list(pauses)

    async def clear():
        pauses.clear()

    monkeypatch.setattr("trl_hrm.search.engines.http.asyncio.sleep", no_sleep)
    plain = pauses_of(1, *[status(500)] * 9)
    assert len(plain) == 9
    for place, pause in enumerate(plain):
        assert 0.5 * 2**place <= pause <= 1.5 * 2**place or pause == 60.0
    assert plain[-1] == 60.0
    assert pauses_of(1, *[status(500)] * 9) == plain != pauses_of(2, *[status(500)] * 9)
    after = lambda value: status(429, "slow down", {"Retry-After": value})  # noqa: E731
    assert pauses_of(1, after("7"), after("3600"), backoff=0.0) == [7.0, 60.0]
    assert pauses_of(1, after("Wed, 21 Oct 2015 07:28:00 GMT"), backoff=0.0) == [0.0]


def test_requests_run_in_parallel():
    """A connection limit would leave the server idle while requests wait in the client."""
    with FakeServer() as server:
        engine = engine_for(server, timeout=30.0)
        complete = server.complete
        together = threading.Barrier(150)

        def wait_for_all(request):
            together.wait(20)
            return complete(request)

        async def everything():
            await engine.sample(PREFIX, 1, [], 5, 0)
            server.complete = wait_for_all
            return await asyncio.gather(*(engine.sample(PREFIX, 1, [], 5, i) for i in range(150)))

        samples = run(engine, everything)
    assert len(samples) == 150 and not together.broken


class TestServerCheck:
    """The checks of a server's first request."""

    def test_it_is_run_once(self):
        with FakeServer() as server:
            engine = engine_for(server)

            async def everything():
                await asyncio.gather(*(engine.sample(PREFIX, 1, [], 5, i) for i in range(10)))
                await engine.sample(PREFIX, 1, [], 5, 99)

            run(engine, everything)
            assert len(server.requests) == SELF_TEST["vllm"] + 11

    @pytest.mark.parametrize(
        ("style", "message"),
        [
            ("ignores", "ignores stop strings.*--continuous-batching"),
            ("strips", 'removes stop strings.*use api="vllm"'),
            ("greedy", 'does not sample.*use api="transformers"'),
        ],
    )
    def test_servers_that_would_corrupt_every_label(self, style, message):
        with FakeServer(style) as server:
            engine = engine_for(server, api="text")
            with pytest.raises(EngineFatal, match=message):
                run(engine, ask(engine))
            assert len(server.requests) <= SELF_TEST["text"]

    def repeating(self, request, number):
        """Return what a server answers whose samples of a request have only `number` different texts."""
        whole = FakeServer.complete(self.server, request)
        for choice in whole["choices"]:
            first = whole["choices"][choice["index"] % number]
            choice |= {key: value for key, value in first.items() if key != "index"}
        return whole

    @pytest.mark.parametrize("number", [1, 2])
    def test_server_that_repeats_samples_of_a_request(self, number):
        """Most labels would be 0 or 1, because all children of a node have the same fate."""
        with FakeServer() as self.server:
            self.server.complete = lambda request: self.repeating(request, number)
            with pytest.raises(EngineFatal, match=f"repeats samples: 8 .*, 4 per request, contain only {2 * number}"):
                engine = engine_for(self.server)
                run(engine, ask(engine))

    @pytest.mark.parametrize("api", ["vllm", "text"])
    def test_server_that_ignores_the_seed(self, api):
        with FakeServer(api) as server:
            server.complete = lambda request: FakeServer.complete(server, request | {"seed": 3})
            engine = engine_for(server, api=api, temperature=0.7)
            with pytest.raises(EngineFatal, match=f"contain only {4 if api == 'vllm' else 1}"):
                run(engine, ask(engine))

    def test_one_coincidence_is_allowed(self):
        """A small model may write a short text twice."""
        with FakeServer() as self.server:
            self.server.complete = lambda request: self.repeating(request, 4 - (request.get("seed") == 0))
            engine = engine_for(self.server)
            assert len(run(engine, ask(engine))) == 2

    def test_a_server_without_token_ids(self):
        with FakeServer("text") as server:
            engine = engine_for(server)
            answer = {"choices": [{"index": 0, "text": "so ", "finish_reason": "length"}]}
            server.faults.append(body(answer))
            with pytest.raises(EngineFatal, match='no token ids.*use api="text"'):
                run(engine, ask(engine))

    def test_another_model(self):
        with FakeServer() as server:
            server.model = "meta/other"
            engine = engine_for(server)
            with pytest.raises(EngineFatal, match="'lm'.*'meta/other'"):
                run(engine, ask(engine))
            assert server.requests == []

    def test_another_tokenizer(self):
        """Token ids of another tokenizer mean other text, so the policy would continue the wrong prefix."""
        with FakeServer() as server:
            complete = server.complete

            def shifted(request):
                answer = complete(request)
                for choice in answer["choices"]:
                    choice["token_ids"] = [token + 1 for token in choice["token_ids"]]
                return answer

            server.complete = shifted
            engine = engine_for(server)
            with pytest.raises(EngineFatal, match="tokenizer of the model"):
                run(engine, ask(engine))

    def test_length_that_is_not_a_number(self):
        with FakeServer() as server:
            server.max_length = "long"
            engine = engine_for(server, max_retries=1)
            with pytest.raises(EngineError, match="2 tries.*max_model_len of 'long'"):
                run(engine, ask(engine))

    def test_model_that_writes_nothing(self):
        with FakeServer() as server:
            empty = body({"choices": [{"index": 0, "text": "", "finish_reason": "stop", "token_ids": [0]}]})
            server.faults += [empty, empty]
            engine = engine_for(server)
            with pytest.raises(EngineFatal, match="too short"):
                run(engine, ask(engine))

    def test_cancelled_request_does_not_cancel_the_check(self):
        with FakeServer() as server:
            engine = engine_for(server)
            server.faults = [hang(0.2)]

            async def first_is_cancelled():
                tasks = [asyncio.create_task(engine.sample(PREFIX, 1, STOP, 300, 100)) for _ in range(2)]
                await asyncio.sleep(0.05)
                tasks[0].cancel()
                return await tasks[1]

            assert without_cached(run(engine, first_is_cancelled)) == [expected(100)]

    def test_it_is_retried_after_a_fault(self):
        with FakeServer() as server:
            server.faults = [status(200 + 303), cut]
            engine = engine_for(server)
            samples = run(engine, ask(engine))
            assert len(server.requests) == 2 + SELF_TEST["vllm"] + 1
        assert without_cached(samples) == [expected(100), expected(101)]

    def test_greedy_answers_that_differ_may_pass(self):
        """Under load, rounding differs between batches. That is no reason to reject a server."""
        with FakeServer() as server:
            once = {"choices": [{"index": 0, "text": "zzzzzzzzz", "finish_reason": "length", "token_ids": [122] * 9}]}
            server.faults = [body(once)]
            engine = engine_for(server)
            assert len(run(engine, ask(engine))) == 2


def test_describe_names_the_policy_and_not_the_servers():
    """A run may resume with other servers, but not with another policy."""
    described = engine_for("http://a:1/v1", temperature=0.5).describe()
    assert described == engine_for("http://b:2", "http://c:3/v1", temperature=0.5).describe()
    assert described == {
        "engine": "openai",
        "api": "vllm",
        "model": "lm",
        "tokenizer": None,
        "revision": None,
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 0,
    }


def test_describe_names_the_tokenizer():
    """The tokenizer decides the ids, so resuming with another one would mix two policies."""
    tokenizer = CharTokenizer()
    tokenizer.name_or_path = "org/tokenizer"
    described = OpenAIEngine(["http://a:1"], "lm", tokenizer, revision="v2").describe()
    assert (described["tokenizer"], described["revision"]) == ("org/tokenizer", "v2")


def test_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    with FakeServer() as server:
        engine = OpenAIEngine([server.url], "lm", TOKENIZER)
        assert "sk-of" not in repr(engine) + str(engine.describe())
        run(engine, ask(engine))
        assert server.headers[-1]["Authorization"] == "Bearer sk-of-the-environment"


@pytest.mark.parametrize(
    ("urls", "options", "message"),
    [
        ([], {}, "No base URL given"),
        (
            ["localhost:8000"],
            {},
            "'localhost:8000'.*http://localhost:8000/v1",
        ),
        (["ftp://host/v1"], {}, "'ftp://host/v1'"),
        (["http://me:pw@host/v1"], {}, "host contains a user, a password"),
        (["http://host/v1?key=sk-secret"], {}, "host contains a user, a password, a query"),
        (["http://host"], {"api_key": "sk two"}, "The API key .* not allowed"),
        (["http://host"], {"api": "chat"}, "`api` is 'chat'.*vllm, transformers, text"),
        (["http://host"], {"api": "text", "top_k": 5}, "`top_k` is 5"),
        (["http://host"], {"max_retries": -1}, "`max_retries` is -1"),
        (["http://host"], {"timeout": "soon"}, "`timeout` is 'soon'"),
        (["http://host"], {"top_p": 2}, "`top_p` is 2"),
    ],
)
def test_options_out_of_range(urls, options, message):
    with pytest.raises(ValueError, match=message) as error:
        OpenAIEngine(urls, "lm", TOKENIZER, **options)
    assert "sk" not in str(error.value)


def test_urls_without_a_path_get_v1():
    engine = engine_for("http://host:1", "http://host:2/", "http://host:3/v1/", "https://host/openai/v1")
    urls = ["http://host:1/v1", "http://host:2/v1", "http://host:3/v1", "https://host/openai/v1"]
    assert [server.url for server in engine.client.servers] == urls


class TestSamplesOfVLLM:
    """Outputs of vLLM whose parts contradict each other, or only seem to."""

    def sample(self, text, ids=None, finish="stop", reason="# END!", prefix=PREFIX, tokenizer=TOKENIZER):
        ids = tokenizer.encode(text) if ids is None else ids
        return sample_from_vllm(tokenizer, prefix, ids, text, finish, reason)

    def test_tokens_after_the_stop_string(self):
        """With speculative decoding, the ids continue after the token where the text is cut."""
        ids = TOKENIZER.encode("It is 7.\n# END! and 8")
        sample = self.sample("It is 7.\n# END!", ids)
        assert sample == Sample(ids[: -len(" and 8")], "It is 7.\n# END!", "stop", "# END!")

    def test_token_that_contains_more_than_the_end_of_the_stop_string(self):
        """The text of the sample is the text of its tokens, as for every other engine."""
        tokenizer = byte_level()
        tokenizer.add_tokens(["!\n\n"])
        ids = tokenizer.encode("# END!\n\n")
        assert tokenizer.decode(ids[-1:]) == "!\n\n"
        assert self.sample("# END!", ids, tokenizer=tokenizer) == Sample(ids, "# END!\n\n", "stop", "# END!")

    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_character_that_begins_in_the_prefix(self, cut):
        """Only vLLM's text contains a character that begins in the prefix."""
        tokenizer = byte_level()
        ids = tokenizer.encode("x𝄞 y")
        assert len(ids) >= 6
        sample = self.sample("𝄞 y", ids[1 + cut :], "length", None, ids[: 1 + cut], tokenizer)
        assert sample.text.endswith(" y") and sample.token_ids == ids[1 + cut :]
        check_samples([sample], tokenizer, ids[: 1 + cut], 1, [], 9)

    def test_incomplete_character_at_the_end(self):
        """vLLM's text ends before it."""
        tokenizer = byte_level()
        ids = tokenizer.encode("so 𝄞")[:-1]
        sample = self.sample("so ", ids, "length", None, tokenizer=tokenizer)
        assert sample.text == "so \ufffd"

    def test_white_space_before_punctuation(self):
        """Some tokenizers remove it when they decode, and vLLM does not."""
        assert self.sample("so , it is ", TOKENIZER.encode("so, it is"), "length", None).text == "so, it is"

    @pytest.mark.parametrize(
        ("text", "ids", "finish", "reason", "message"),
        [
            ("so", "no", "length", None, "decodes its tokens to 'so', but this tokenizer decodes them to 'no'"),
            ("so", "so", "stop", None, "after the tokens .115, 111., which end no sequence"),
            ("so ", "so ", "stop", None, "after the tokens .115, 111, 32., which end no sequence"),
            ("so", "so", "abort", None, "'abort'"),
            ("so", "so", None, None, "None"),
            ("so # END! and", "so # END! and", "stop", "# END!", "does not end there"),
            ("so", "so", "stop", "# END!", "does not end there"),
            ("so", "so ", "stop", 33, "at the token 33, but the sample ends with the tokens .115, 111, 32."),
        ],
    )
    def test_contradictions(self, text, ids, finish, reason, message):
        with pytest.raises(EngineError, match=message):
            self.sample(text, TOKENIZER.encode(ids), finish, reason)


def test_key_in_messages():
    """Also a traceback with all its causes must not show it."""
    with FakeServer() as server:
        engine = engine_for(server, api_key="sk-planted-4711", max_retries=0)
        for fault in (
            status(500, "Bearer sk-planted-4711"),
            body(b"<html> sk-planted-4711"),
            status(403, "sk-planted-4711"),
        ):
            with pytest.raises((EngineError, EngineFatal)) as error:
                run(engine, ask(engine), after_test(server, fault), ask(engine))
            assert "4711" not in "".join(traceback.format_exception(error.value))
        assert "***" in str(error.value)
        answer = {"choices": [{"index": 0, "text": "sk-planted-4711", "finish_reason": "length"}]}
        with pytest.raises(EngineError, match="contains the API key") as error:
            run(engine, ask(engine), after_test(server, body(answer)), ask(engine, 1))
        # a placeholder is not secret, and can be part of an honest solution
        engine = engine_for(server, api_key="three", max_retries=0)
        assert len(run(engine, ask(engine))) == 2


def test_next_logprobs():
    """One request per token, which the server must generate."""
    with FakeServer() as server:
        server.words = {"Y": -0.5, "N": -1.25}
        engine = engine_for(server)
        found = run(engine, lambda: engine.next_logprobs(PREFIX, [ord("Y"), ord("N"), ord("x")]))
        assert found == [-0.5, -1.25, -50.0]
        assert all(one["prompt"] == PREFIX for one in server.requests[-3:])
        server.words = {"Y": 0.0, "N": 0.0}  # renormalised over the allowed tokens
        with pytest.raises(EngineFatal, match="--logprobs-mode raw_logprobs"):
            run(engine, lambda: engine.next_logprobs(PREFIX, [ord("Y"), ord("N")]))
    assert engine.has_logprobs and engine.max_length == 10_000
    assert not engine_for("http://localhost:1", api="text").has_logprobs


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [78]},
        {"logprobs": None},
        {"logprobs": {"token_logprobs": []}},
        {"logprobs": {"token_logprobs": [1.0]}},
        {"logprobs": {"token_logprobs": ["-1"]}},
    ],
)
def test_invalid_next_logprobs(change):
    class Wrong(FakeServer):
        def complete(self, body):
            answer = super().complete(body)
            if "allowed_token_ids" in body:
                answer["choices"][0] |= change
            return answer

    with Wrong() as server:
        engine = engine_for(server, max_retries=1)
        with pytest.raises(EngineError, match="expected"):
            run(engine, lambda: engine.next_logprobs(PREFIX, [ord("Y")]))
