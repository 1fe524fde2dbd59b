"""ServerScorer: the same scores as StepScorer, retried faults, and errors. Slow: `vllm serve`."""

import asyncio
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from trl_hrm import StepFormat, StepScorer
from trl_hrm.identity import changed_settings
from trl_hrm.scoring.http_scorer import PROBE, ServerScorer

from ..helpers import HEADS, WORDS, tiny_model, tiny_tokenizer
from ..search.http_server import body, cut, hang_up, status
from ..search.serving import serve
from .pooling_server import PoolingServer
from .solutions import (
    CANDIDATES,
    CLASSIFIERS,
    NATIVE,
    PROBLEM,
    PROMPTS,
    SERVED,
    SOLUTIONS,
    PlainScorer,
    flat,
    long_candidates,
    num_tokens,
    save,
    save_published,
)


@pytest.fixture(scope="module")
def expected():
    return StepScorer(tiny_model(), tiny_tokenizer(), StepFormat()).score(PROMPTS, CANDIDATES, spans=(1, 2))


class TestServer:
    """Test ServerScorer against a local server with real faults."""

    @pytest.fixture
    def server(self):
        with PoolingServer(tiny_model(), tiny_tokenizer()) as server:
            yield server

    def scorer_of(self, server, step_format=HEADS["classification"], **options) -> ServerScorer:
        url = server if isinstance(server, str) else server.url
        options = {"model": "prm"} | SERVED | options
        return ServerScorer(url, tokenizer=tiny_tokenizer(), step_format=step_format, **options)

    @pytest.mark.parametrize("head", HEADS)
    def test_scores_of_step_scorer(self, head):
        step_format = HEADS[head]
        model = tiny_model(step_format)
        expected = StepScorer(tiny_model(step_format), tiny_tokenizer(), step_format).score(PROMPTS, CANDIDATES)
        with PoolingServer(model, tiny_tokenizer()) as server:
            found = self.scorer_of(server, step_format).score(PROMPTS, CANDIDATES)
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-5)

    def test_requests(self, server, expected):
        """Each path needs one request. An extra one would cost time and change no score."""
        scorer = self.scorer_of(server)
        server.sequences.clear()
        found = scorer.score(PROMPTS, CANDIDATES, spans=(1, 2))
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-5)
        local = PlainScorer(tiny_model(), StepFormat())
        local.score(PROMPTS, CANDIDATES, spans=(1, 2))
        assert sorted(server.sequences[1:]) == sorted(local.batches[0])

    def test_progress(self, server, capsys):
        """The progress bar counts all paths, and appears only when requested."""
        scorer = self.scorer_of(server)
        scorer.score(PROMPTS, CANDIDATES)
        assert "Scoring" not in capsys.readouterr().err
        scorer.score(PROMPTS, CANDIDATES, progress=True)
        assert re.search(r"Scoring: 100%.* 6/6 .*path/s", capsys.readouterr().err)

    @pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
    def test_addresses(self, server, suffix):
        """Other clients of the same server need `/v1` in the URL."""
        assert self.scorer_of(server.url + suffix).score(["p"], [[["a"]]])

    def test_names(self, server):
        assert self.scorer_of(server, model="/models/prm").score(["p"], [[["a"]]])
        assert {request["model"] for request in server.requests} == {"prm"}

    def test_length(self, server):
        server.max_length = 40
        scorer = self.scorer_of(server)
        with pytest.raises(ValueError, match="A solution has .* tokens, but the model has 40 positions"):
            scorer.score(["p"], [[[" ".join(WORDS * 10)]]])

    def test_requests_in_flight(self, server, expected):
        """Exactly two requests run in parallel: with fewer, the barrier for two would never open."""
        scorer = self.scorer_of(server, max_requests=2)
        lock, barrier, open_requests, most = threading.Lock(), threading.Barrier(2), 0, 0

        def before():
            nonlocal open_requests, most
            with lock:
                open_requests += 1
                most = max(most, open_requests)
            if len(server.sequences) > tested:
                barrier.wait(timeout=30)
            with lock:
                open_requests -= 1

        tested = len(server.sequences) + 1
        server.before = before
        candidates = [[[word, str(i)] for i, word in enumerate(WORDS)]]
        assert len(scorer.score(["p"], candidates)[0]) == 10
        assert most == 2 and len(server.sequences) == tested + 10

    @pytest.mark.parametrize(
        "fault",
        [
            status(503),
            status(429, headers={"Retry-After": "0"}),
            status(500, "Out of range float values are not JSON compliant"),
            cut,
            hang_up,
            body(b"<html>"),
            body({"data": []}),
            body({"data": [{"data": "AAAA"}]}),
            body({"data": [{"data": [[1.0, 2.0], [3.0]]}]}),
            body({"data": [{"data": [[1.0, 2.0]]}]}),
            body({"data": [{"data": [[1.0, True]] * 9}]}),
            body({"data": [{"data": [[None, None]] * 9}]}),
            body({"data": [{"data": [[1e39, 2.0]] * 9}]}),
            body({"data": [{"index": 1, "data": [[1.0, 2.0]] * 9}]}),
            body(b'{"data": [{"data": [[NaN, 2.0]]}]}'),
            body(b'{"data": [{"data": [[1e999, 2.0]]}]}'),
        ],
    )
    def test_transient_faults(self, server, expected, fault):
        scorer = self.scorer_of(server, max_requests=1)
        third = len(server.sequences) + 3  # after the first check of the server
        server.before = lambda: server.faults.extend([fault, fault]) if len(server.sequences) == third else None
        found = scorer.score(PROMPTS, CANDIDATES, spans=(1, 2))
        assert not server.faults
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-5)

    def test_lasting_fault(self, server):
        scorer = self.scorer_of(server, max_retries=2)
        server.before = lambda: server.faults.extend([status(503, "asleep")] * 1000)
        with pytest.raises(OSError, match="3 tries.*asleep"):
            scorer.score(PROMPTS, CANDIDATES)

    def test_no_server(self, server):
        url = server.url
        server.__exit__()
        with pytest.raises(OSError, match="2 tries"):
            self.scorer_of(url, max_retries=1)
        server.__enter__()

    def test_no_answer(self, server):
        """The requested timeout must apply, instead of the default of ten minutes."""
        release = threading.Event()
        server.before = lambda: release.wait(timeout=60)
        with pytest.raises(OSError, match="within 0.1 seconds"):
            self.scorer_of(server, timeout=0.1, max_retries=0)
        release.set()

    @pytest.mark.parametrize(
        ("models", "message"),
        [
            ([{"id": "prm"}], "max_model_len.*None"),
            (["prm"], "list of models"),
            (None, "list of models"),
        ],
    )
    def test_servers_of_another_kind(self, server, models, message):
        """Without the maximum length, a solution that is too long would fail only in the middle of scoring."""
        server.models = lambda: models
        with pytest.raises(OSError, match=message):
            self.scorer_of(server, max_retries=0)

    def test_null_scores(self):
        """JSON has no NaN, so some servers write null."""
        with PoolingServer(tiny_model(), tiny_tokenizer()) as server:
            scorer = self.scorer_of(server, max_retries=1)
            server.rows = lambda rows: _Nulls(rows) if len(server.sequences) > 2 else rows
            with pytest.raises(OSError, match="2 tries.*no rows of finite numbers"):
                scorer.score(["p"], [[["a"]]])

    @pytest.mark.parametrize("head", CLASSIFIERS)
    def test_server_that_ignores_use_activation(self, head):
        """A score of 0.8 would become 0.646, because the activation is applied twice."""
        step_format = HEADS[head]
        with PoolingServer(tiny_model(step_format), tiny_tokenizer()) as server:
            pool = server.pool
            server.pool = lambda body: pool(body | {"use_activation": True})
            with pytest.raises(OSError, match="ignores `use_activation`"):
                self.scorer_of(server, step_format)
            server.pool = lambda body: pool(body | {"use_activation": not body["use_activation"]})
            with pytest.raises(OSError, match="ignores `use_activation`"):
                self.scorer_of(server, step_format)

    def test_server_without_activation(self):
        """A model whose config has the identity as activation returns the same outputs both ways."""
        with PoolingServer(tiny_model(), tiny_tokenizer()) as server:
            pool = server.pool
            server.pool = lambda body: pool(body | {"use_activation": False})
            assert self.scorer_of(server).score(["p"], [[["a"]]])

    def test_another_checkpoint_later(self, server):
        """A server that was restarted with another checkpoint under the same name gives scores of two models."""
        scorer = self.scorer_of(server)
        before = scorer.describe()["identity"]
        assert scorer.describe()["model"] == "prm" and before["max_model_len"] == server.max_length
        assert len(before["probe_scores"]) == len(tiny_tokenizer()(PROBE)["input_ids"])
        server.classifier = tiny_model(seed=1)
        with pytest.raises(OSError, match="another model: probe_scores was"):
            scorer.score(["p"], [[["a"]]])
        assert changed_settings(before, self.scorer_of(server).describe()["identity"])[0].startswith(
            "probe_scores was ["
        )
        server.classifier = tiny_model()
        server.rows = lambda rows: rows + 0.01 * torch.sin(rows)  # rounding
        assert not changed_settings(before, self.scorer_of(server).describe()["identity"])

    def test_another_model(self, server):
        with pytest.raises(OSError, match="'policy'.*'prm'.*served_model_name"):
            self.scorer_of(server, model="policy")

    def test_another_model_later(self, server):
        """A server that was restarted with another model would return that model's scores."""
        scorer = self.scorer_of(server)
        server.model = "policy"
        with pytest.raises(OSError, match="'prm'.*'policy'"):
            scorer.score(["p"], [[["a"]]])

    @pytest.mark.parametrize("head", ["classification", "lm"])
    def test_a_server_that_runs_another_head(self, head):
        """Token classifiers and language models have different endpoints."""
        other, remedy = {"classification": ("lm", "--runner pooling"), "lm": ("classification", "without")}[head]
        with PoolingServer(tiny_model(HEADS[other]), tiny_tokenizer()) as server:
            with pytest.raises(OSError, match=f"404.*{remedy}"):
                self.scorer_of(server, HEADS[head])

    @pytest.mark.parametrize("rows", [lambda rows: rows[:0], lambda rows: rows[3:4]])
    def test_pooling_of_one_token(self, rows):
        """vLLM's default for Qwen2.5-Math-PRM: only rows at `<extra_0>`, which a text may not contain."""
        with PoolingServer(tiny_model(StepFormat(head="mlp")), tiny_tokenizer(), rows=rows) as server:
            with pytest.raises((OSError, ValueError), match='--pooler-config \'{"pooling_type": "ALL"}\''):
                self.scorer_of(server, StepFormat(head="mlp"), max_retries=0)

    def test_another_vocabulary(self):
        """The token ids would be valid for the other model, but mean other texts."""
        from trl_hrm.tiny_model import make_tokenizer

        other = make_tokenizer(["Add 12 and 345: the sum is 357.\n\nSo x"] * 3, 300)
        with PoolingServer(tiny_model(), other) as server:
            with pytest.raises(OSError, match="tokenizer of the server"):
                self.scorer_of(server)

    def test_no_pooling(self):
        with PoolingServer(tiny_model(), tiny_tokenizer(), pooling=False) as server:
            with pytest.raises(OSError, match="404.*--runner pooling"):
                self.scorer_of(server)

    @pytest.mark.parametrize("rows", [lambda rows: rows[3:4], lambda rows: rows[:, :1], lambda rows: rows[-1]])
    def test_another_pooling(self, rows):
        with PoolingServer(tiny_model(), tiny_tokenizer(), rows=rows) as server:
            with pytest.raises(ValueError, match=r"shape .*\(\d+, 2\)"):
                self.scorer_of(server)

    def test_within_an_event_loop(self, server, expected):
        """A notebook already runs an event loop, so `asyncio.run` would fail there."""
        scorer = self.scorer_of(server)

        async def cell():
            return scorer.score(PROMPTS, CANDIDATES, spans=(1, 2))

        np.testing.assert_allclose(flat(asyncio.run(cell())), flat(expected), rtol=0, atol=1e-5)

    def test_key(self, server, monkeypatch):
        self.scorer_of(server, api_key="sk-secret")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
        self.scorer_of(server)
        sent = [headers["Authorization"] for headers in server.headers]
        assert sent[:3] == ["Bearer sk-secret"] * 3 and sent[3:] == ["Bearer sk-other"] * 3

    def test_options(self, server):
        with pytest.raises(ValueError, match="`max_requests` is 0"):
            self.scorer_of(server, max_requests=0)
        with pytest.raises(ValueError, match="'localhost'"):
            self.scorer_of("localhost")

    def test_from_pretrained(self, server, expected, tmp_path):
        folder = save(tmp_path)
        scorer = ServerScorer.from_pretrained(folder, server.url, served_model_name="prm", **SERVED)
        np.testing.assert_allclose(
            flat(scorer.score(PROMPTS, CANDIDATES, spans=(1, 2))), flat(expected), rtol=0, atol=1e-5
        )
        with pytest.raises(OSError, match="'prm'"):
            ServerScorer.from_pretrained(folder, server.url, **SERVED)


class TestLabelTokens:
    """Test `head="lm"`: log-probabilities of the label tokens instead of a classifier."""

    HEAD = HEADS["lm"]

    @pytest.fixture
    def server(self):
        with PoolingServer(tiny_model(self.HEAD), tiny_tokenizer()) as server:
            yield server

    @pytest.fixture
    def expected(self):
        return StepScorer(tiny_model(self.HEAD), tiny_tokenizer(), self.HEAD).score(PROMPTS, CANDIDATES)

    def scorer_of(self, server, **options) -> ServerScorer:
        return ServerScorer(server.url, "prm", tiny_tokenizer(), self.HEAD, **SERVED | options)

    def test_requests(self, server, expected):
        """One request per path, with one prompt for each step that no other path has."""
        scorer = self.scorer_of(server)
        server.requests.clear()
        found = scorer.score(PROMPTS, CANDIDATES)
        np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-5)
        local = PlainScorer(tiny_model(self.HEAD), self.HEAD)
        local.score(PROMPTS, CANDIDATES)
        requests = [request for request in server.requests if "logprob_token_ids" in request][1:]
        assert sorted(max(request["prompt"], key=len) for request in requests) == sorted(local.batches[0])
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert all(request | neutral == request for request in requests)  # not those of a generation_config.json
        prompts = sorted(ids for request in requests for ids in request["prompt"])
        paths = []
        for prompt, candidates in zip(PROMPTS, CANDIDATES, strict=True):
            for steps in candidates:
                prompt_ids, step_ids = self.HEAD.encode(tiny_tokenizer(), prompt, steps)
                paths += [prompt_ids + sum(step_ids[: i + 1], []) for i in range(len(steps))]
        assert prompts == sorted(map(list, set(map(tuple, paths))))

    def test_length(self, server):
        """The server also generates a token after each step."""
        server.max_length = 40
        scorer = self.scorer_of(server)
        assert scorer.describe()["identity"]["max_model_len"] == 39
        longest = next(n for n in range(300) if num_tokens(scorer, n + 1) > 39)
        assert scorer.score(["p"], [[["x" * longest]]])
        with pytest.raises(ValueError, match="A solution has 40 tokens, but the model has 39 positions"):
            scorer.score(["p"], [[["x" * (longest + 1)]]])

    @pytest.mark.parametrize(
        "fault",
        [
            status(503),
            hang_up,
            body({"choices": []}),
            body({"choices": [{"index": 0, "text": "s", "finish_reason": "length"}]}),
            body({"choices": [{"index": 0, "text": "s", "finish_reason": "length", "logprobs": {"top_logprobs": [{}]}}]}),
            body({"choices": [{"index": 1, "text": "s", "finish_reason": "length", "logprobs": {"top_logprobs": [{}]}}]}),
        ],
    )  # fmt: skip
    def test_transient_faults(self, server, expected, fault):
        scorer = self.scorer_of(server, max_requests=1)
        third = len(server.sequences) + 3  # after the first check of the server
        server.before = lambda: server.faults.extend([fault, fault]) if len(server.sequences) == third else None
        np.testing.assert_allclose(flat(scorer.score(PROMPTS, CANDIDATES)), flat(expected), rtol=0, atol=1e-5)
        assert not server.faults

    @pytest.mark.parametrize("value", [None, "-1.5", -9999.0, float("nan")])
    def test_log_probabilities_of_other_tokens(self, server, value):
        """A server that ignores `logprob_token_ids` returns the most likely tokens. vLLM returns -9999 for minus infinity."""
        answer, label = server.label_logprobs, f"token_id:{self.HEAD.label_token_ids(tiny_tokenizer())[0]}"

        def without_label(body):
            found = answer(body)
            for choice in found["choices"]:
                [logprobs] = choice["logprobs"]["top_logprobs"]
                logprobs.pop(label) if value is None else logprobs.update({label: value})
            return found

        server.label_logprobs = without_label
        with pytest.raises(OSError, match="1 tries.*(logprob_token_ids|NaN)"):
            self.scorer_of(server, max_retries=0)

    def test_another_checkpoint_later(self, server):
        scorer = self.scorer_of(server)
        server.classifier = tiny_model(self.HEAD, seed=1)
        with pytest.raises(OSError, match="another model: probe_scores was"):
            scorer.score(["p"], [[["a"]]])


@pytest.mark.parametrize("name", NATIVE)
def test_published_models(tmp_path, name):
    """The server answers like vLLM. The slow tests use vLLM."""
    published, folder, step_format = save_published(tmp_path, name)
    model = StepScorer.from_pretrained(folder, step_format).model
    with PoolingServer(model, AutoTokenizer.from_pretrained(folder)) as server:
        options = {"step_format": step_format, "served_model_name": "prm"} | SERVED
        found = ServerScorer.from_pretrained(folder, server.url, **options).score([PROBLEM], [SOLUTIONS])
    expected = published.scores(folder, PROBLEM, SOLUTIONS)
    np.testing.assert_allclose(flat(found), np.concatenate(expected), rtol=0, atol=1e-6)


class _Nulls(list):
    """Rows whose last numbers are null."""

    def __init__(self, rows):
        super().__init__([*rows.tolist()[:-1], [None, None]])

    def tolist(self):
        return list(self)


class TestCheckpoints:
    """A checkpoint that vLLM cannot serve must raise before any request is sent."""

    def load(self, folder, **options):
        return ServerScorer.from_pretrained(str(folder), "http://127.0.0.1:1", max_retries=0, **options)

    def test_without_a_format(self, tmp_path):
        save(tmp_path)
        (tmp_path / "step_format.json").unlink()
        with pytest.raises(FileNotFoundError, match="step_format.json"):
            self.load(tmp_path)
        with pytest.raises(OSError, match="1 tries"):
            self.load(tmp_path, step_format=StepFormat())

    def test_an_adapter(self, tmp_path):
        model = get_peft_model(tiny_model(), LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        StepFormat().save(tmp_path)
        with pytest.raises(ValueError, match="LoRA adapter.*Merge"):
            self.load(tmp_path)


@pytest.mark.slow
class TestVLLMServer:
    """Test against `vllm serve` over HTTP."""

    FLAGS = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--block-size", "32"]
    FLAGS += ["--kv-cache-memory-bytes", str(64 << 20)]

    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("Qwen/Qwen2.5-Math-PRM-7B", ["--runner", "pooling", "--pooler-config", '{"pooling_type": "ALL"}']),
            ("peiyi9979/math-shepherd-mistral-7b-prm", []),
            ("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", []),
        ],
    )
    def test_published_models(self, vllm_environment, tmp_path, name, flags):
        published, folder, _ = save_published(tmp_path, name)
        with self.serve(Path(folder), *flags) as url:
            scorer = ServerScorer.from_pretrained(folder, url, max_retries=1)
            found = scorer.score([PROBLEM], [SOLUTIONS])
            pairs = scorer.score([PROBLEM], [SOLUTIONS], spans=(1, 2))
        expected = published.scores(folder, PROBLEM, SOLUTIONS)
        np.testing.assert_allclose(flat(found), np.concatenate(expected), rtol=0, atol=1e-5)
        reference = StepScorer.from_pretrained(folder)
        np.testing.assert_allclose(
            flat(pairs), flat(reference.score([PROBLEM], [SOLUTIONS], spans=(1, 2))), rtol=0, atol=1e-5
        )

    def test_default_pooling_of_published_models(self, vllm_environment, tmp_path):
        """Without `--pooler-config`, vLLM returns only rows at a token that other tokenizers do not have."""
        _, folder, _ = save_published(tmp_path, "Qwen/Qwen2.5-Math-PRM-7B")
        with self.serve(Path(folder), "--runner", "pooling") as url:
            with pytest.raises((OSError, ValueError), match="--pooler-config"):
                ServerScorer.from_pretrained(folder, url, max_retries=0)

    def serve(self, folder: Path, *more: str):
        return serve(folder, "vllm.entrypoints.cli.main", "serve", str(folder), *self.FLAGS, *more)

    def test_scores_of_step_scorer(self, vllm_environment, tmp_path):
        folder = save(tmp_path / "prm")
        other = save(tmp_path / "other", HEADS["regression"])
        prompts, candidates = long_candidates()
        reference = StepScorer.from_pretrained(folder)
        with self.serve(tmp_path / "prm", "--runner", "pooling") as url:
            scorer = ServerScorer.from_pretrained(folder, url, max_retries=1)
            assert scorer.max_positions == 256
            for spans in ((1,), (1, 2)):
                found = scorer.score(prompts, candidates, spans=spans)
                np.testing.assert_allclose(
                    flat(found), flat(reference.score(prompts, candidates, spans=spans)), rtol=0, atol=1e-4
                )
            steps = ["x" * next(n for n in range(300) if num_tokens(scorer, n + 1) > 256)]
            assert scorer.score(["p"], [[steps]])[0][0] == pytest.approx(
                reference.score(["p"], [[steps]])[0][0], abs=1e-4
            )
            with pytest.raises(OSError, match=f"'{other}'.*'{folder}'"):
                ServerScorer.from_pretrained(other, url)
            with pytest.raises(ValueError, match=r"shape .*\(\d+, 1\)"):
                ServerScorer.from_pretrained(other, url, served_model_name=folder)

    @pytest.mark.parametrize(
        ("head", "flags", "message"),
        [
            ("lm", [], "404.*token classifier"),
            ("lm", ["--runner", "pooling"], "400.*token classifier"),
            (
                "classification",
                ["--runner", "pooling", "--pooler-config", '{"pooling_type":"STEP","step_tag_id":3}'],
                "outputs of shape|no rows",
            ),
            ("classification", ["--runner", "pooling"], "404.*without `--runner pooling`"),
        ],
    )
    def test_servers_of_something_else(self, vllm_environment, tmp_path, head, flags, message):
        served = save(tmp_path / "served", HEADS[head])
        # a valid checkpoint, but the server runs another model
        folder = save(tmp_path / "prm", HEADS["lm" if "without" in message else "classification"])
        with self.serve(tmp_path / "served", *flags) as url:
            with pytest.raises((OSError, ValueError), match=message):
                ServerScorer.from_pretrained(folder, url, served_model_name=served, max_retries=0)
