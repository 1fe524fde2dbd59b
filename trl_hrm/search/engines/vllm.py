"""Engine for vLLM in this process, with continuous batching and prefix caching."""

import asyncio
from collections.abc import Sequence
from itertools import count
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from ...io import shown
from ...loading import check_policy, load_tokenizer
from .base import EngineError, EngineFatal, Sample, Sampling, check_logprobs, room, sample_from_vllm


try:
    import vllm
    from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
except ImportError as error:
    raise ImportError(
        f'The vLLM engine requires vLLM, which cannot be imported ({error}). Run `pip install "trl-hrm[vllm]"`, or use another '
        "engine."
    ) from error


class VLLMEngine:
    """
    Samples with vLLM's `AsyncLLM`. All requests must come from the same event loop.

    Args:
        llm ([`~vllm.v1.engine.async_llm.AsyncLLM`]):
            vLLM engine. [`VLLMEngine.close`] shuts it down.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        temperature, top_p, top_k (`float`, `float` and `int`, *optional*, default to `1.0`, `1.0` and `0`):
            Sampling parameters. See [`~search.engines.base.Sampling`].
        engine_args (`dict[str, Any]`, *optional*):
            Arguments of `llm` other than model, revision and dtype, for the manifest.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        engine_args: dict[str, Any] | None = None,
    ):
        self.llm = llm
        self.tokenizer = tokenizer
        self.sampling = Sampling(temperature, top_p, top_k)
        self.engine_args = engine_args or {}
        self._requests = count()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: str = "auto",
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        **engine_args: Any,
    ) -> "VLLMEngine":
        """
        Start vLLM with a model.

        Args:
            name_or_path (`str`):
                Path or Hub id of the model.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Dtype of the weights. With `"auto"`, vLLM converts float32 to bfloat16.
            temperature, top_p, top_k (*optional*):
                See [`VLLMEngine`].
            **engine_args:
                Other arguments of `vllm.AsyncEngineArgs`. On CPU, set `kv_cache_memory_bytes`. Otherwise vLLM uses most of the
                memory.

        Raises:
            `ValueError`: If the checkpoint is damaged. See [`~loading.check_policy`].
        """
        tokenizer = load_tokenizer(name_or_path, revision)
        check_policy(name_or_path, revision)  # before the engine is started, which takes long
        args = AsyncEngineArgs(model=name_or_path, revision=revision, dtype=dtype, **engine_args)
        return cls(AsyncLLM.from_engine_args(args), tokenizer, temperature, top_p, top_k, engine_args)

    async def sample(
        self, prefix_ids: Sequence[int], n: int, stop: Sequence[str], max_tokens: int, seed: int, key: str = ""
    ) -> list[Sample]:
        config = self.llm.model_config
        params = SamplingParams(
            n=self.sampling.num_draws(n),
            seed=seed,  # sample i gets seed + i
            stop=list(stop),
            include_stop_str_in_output=True,
            max_tokens=room(prefix_ids, max_tokens, config.max_model_len, config.model),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **self.sampling.describe(),
        )
        final = await self._generate(prefix_ids, params, key)
        if final is None or sorted(choice.index for choice in final.outputs) != list(range(params.n)):
            raise EngineError(
                f"vLLM did not return samples 0 to {params.n - 1} of a prefix of {len(prefix_ids)} tokens."
            )
        samples = [
            sample_from_vllm(
                self.tokenizer,
                prefix_ids,
                choice.token_ids,
                choice.text,
                choice.finish_reason,
                choice.stop_reason,
                (final.num_cached_tokens or 0) if place == 0 else 0,
            )
            for place, choice in enumerate(sorted(final.outputs, key=lambda choice: choice.index))
        ]
        return self.sampling.repeat(samples, n)

    async def _generate(self, prefix_ids: Sequence[int], params: SamplingParams, key: str) -> RequestOutput | None:
        """Return the last output of a request, or `None` if it has no output. Raise `EngineError` or `EngineFatal` if vLLM fails."""
        prompt = {"prompt_token_ids": list(prefix_ids)}
        final = None
        try:
            async for output in self.llm.generate(prompt, params, f"{key}-{next(self._requests)}"):
                final = output
        except EngineGenerateError as error:
            raise EngineError(
                f"vLLM failed on a prefix of {len(prefix_ids)} tokens: {shown(error.__cause__, 400)}"
            ) from error
        except EngineDeadError as error:
            raise EngineFatal(f"The engine process of vLLM has died. See its log for the reason. ({error})") from error
        return final

    has_logprobs = True

    @property
    def max_length(self) -> int:
        return self.llm.model_config.max_model_len

    async def next_logprobs(self, prefix_ids: Sequence[int], token_ids: Sequence[int], key: str = "") -> list[float]:
        async def ask(token: int) -> float:
            """Let the model generate this token, and read its log-probability."""
            room(prefix_ids, 1, self.max_length, self.llm.model_config.model)
            params = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprobs=0,
                allowed_token_ids=[token],
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            final = await self._generate(prefix_ids, params, key)
            if final is None or list(final.outputs[0].token_ids) != [token]:
                raise EngineError(f"vLLM did not return the token {token} after a prefix of {len(prefix_ids)} tokens.")
            return float(final.outputs[0].logprobs[0][token].logprob)

        logprobs = list(await asyncio.gather(*map(ask, token_ids)))
        check_logprobs(logprobs, "vLLM", 'logprobs_mode="raw_logprobs"')
        return logprobs

    def describe(self) -> dict[str, Any]:
        config = self.llm.model_config
        return {
            "engine": "vllm",
            "model": config.model,
            "revision": getattr(config.hf_config, "_commit_hash", None) or config.revision,
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "max_model_len": config.max_model_len,
            # manifests are published with the dataset
            "engine_args": {name: value for name, value in self.engine_args.items() if name != "hf_token"},
            **self.sampling.describe(),
            "vllm": vllm.__version__,
            "transformers": transformers.__version__,
        }

    async def close(self) -> None:
        """Shut vLLM down and free its memory."""
        self.llm.shutdown()
        del self.llm
