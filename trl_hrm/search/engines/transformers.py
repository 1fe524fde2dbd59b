"""Engine for a transformers model in this process."""

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...io import shown
from ...loading import load_policy, load_tokenizer
from .base import EngineFatal, Sample, Sampling, continued_text, find_stop, room, sample_from_ids


@dataclass(eq=False)
class _Sequence:
    """A sample to generate. It is skipped if `sample` is cancelled."""

    prefix_ids: list[int]
    stop: list[str]
    max_tokens: int
    seed: int
    sample: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class TransformersEngine:
    """
    Samples with `generate` of a transformers model, on CPU or GPU.

    Waiting requests are batched together, even if they differ in prefix, stop strings or length. A sample depends on its seed but
    not on its batch, up to float rounding. Each sample adds its own Gumbel noise to the logits, so that the argmax is a draw from
    the softmax.

    Samples in a batch share the computation of a common prefix. It is not kept for the next batch, unlike in
    [`~search.engines.vllm.VLLMEngine`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. It is set to evaluation mode. Its generation config is replaced until
            [`~TransformersEngine.close`], because settings such as a repetition penalty would change the samples.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        temperature, top_p, top_k (`float`, `float` and `int`, *optional*, default to `1.0`, `1.0` and `0`):
            Sampling parameters. See [`Sampling`].
        batch_size (`int`, *optional*, defaults to `32`):
            Maximum number of sequences in a batch.
        revision (`str`, *optional*):
            Revision of the model, for the manifest.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int = 32,
        revision: str | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` is {shown(batch_size)}. It must be an integer of at least 1.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = Sampling(temperature, top_p, top_k)
        self.batch_size = batch_size
        self.revision = revision
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._generation_config = model.generation_config
        eos_ids = model.generation_config.eos_token_id  # may contain more tokens than the tokenizer defines
        eos_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or [])
        self._eos_ids = frozenset(eos_ids) | ({tokenizer.eos_token_id} - {None})
        # `generate` fills unset values of its config from the config of the model
        model.generation_config = GenerationConfig(pad_token_id=self._pad_id())
        self._waiting: list[_Sequence] = []
        self._worker: asyncio.Task | None = None
        self._forward = threading.Lock()  # one forward pass of `next_logprobs` at a time, to bound the memory

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> "TransformersEngine":
        """
        Load a model and its tokenizer.

        Args:
            name_or_path (`str`):
                Path or Hub id of the model.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Dtype of the weights. `"auto"` uses the dtype of the checkpoint.
            device (`str` or `torch.device`, *optional*):
                Device of the model. Defaults to the accelerator, if available.
            attn_implementation (`str`, *optional*):
                Attention implementation, as in `AutoModelForCausalLM.from_pretrained`.
            **options:
                Sampling parameters and `batch_size` of [`TransformersEngine`].

        Raises:
            `ValueError`: If `dtype` is not a dtype of torch, or the checkpoint is damaged. See [`~loading.load_policy`].
        """
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"The dtype of the policy is {shown(dtype)}. It must be 'auto' or a torch dtype, such as 'bfloat16'."
            )
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        tokenizer = load_tokenizer(name_or_path, revision)
        model = load_policy(
            name_or_path, revision=revision, dtype=dtype, attn_implementation=attn_implementation, device_map=None
        )
        device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return cls(model.to(device), tokenizer, revision=revision, **options)

    async def sample(
        self, prefix_ids: Sequence[int], n: int, stop: Sequence[str], max_tokens: int, seed: int, key: str = ""
    ) -> list[Sample]:
        max_tokens = room(prefix_ids, max_tokens, self.max_length, self.model.config.name_or_path)
        draws = range(self.sampling.num_draws(n))
        sequences = [_Sequence(list(prefix_ids), list(stop), max_tokens, seed + i) for i in draws]
        self._waiting.extend(sequences)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        return self.sampling.repeat(await asyncio.gather(*(sequence.sample for sequence in sequences)), n)

    async def _work(self) -> None:
        """Run batches until no request is waiting."""
        await asyncio.sleep(0)  # requests that start together share the first batch
        while batch := self._next_batch():
            try:
                samples = await asyncio.to_thread(self._generate, batch)
            except Exception as error:  # raised in the waiting requests
                for sequence in batch:
                    if not sequence.sample.done():
                        sequence.sample.set_exception(error)
                continue
            for sequence, sample in zip(batch, samples, strict=True):
                if not sequence.sample.done():
                    sequence.sample.set_result(sample)

    def _next_batch(self) -> list[_Sequence]:
        """Return the sequences that have waited longest, as many as fit into a padded batch."""
        self._waiting = [sequence for sequence in self._waiting if not sequence.sample.done()]
        batch: list[_Sequence] = []
        width = length = 0
        for sequence in self._waiting[: self.batch_size]:
            width = max(width, len(sequence.prefix_ids))
            length = max(length, sequence.max_tokens)
            if self.max_length is not None and width + length > self.max_length:
                break
            batch.append(sequence)
        self._waiting = self._waiting[len(batch) :]
        return batch

    @torch.inference_mode()
    def _generate(self, batch: list[_Sequence]) -> list[Sample]:
        device = self.model.device
        width = max(len(sequence.prefix_ids) for sequence in batch)
        padding = [width - len(sequence.prefix_ids) for sequence in batch]
        rows = [[self._pad_id()] * pad + s.prefix_ids for pad, s in zip(padding, batch, strict=True)]
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
        ends = _Ends(self.tokenizer, self._eos_ids, batch, width)
        processors = LogitsProcessorList()
        if not self.sampling.is_greedy:
            processors.append(TemperatureLogitsWarper(float(self.sampling.temperature)))
            if self.sampling.top_k:
                processors.append(TopKLogitsWarper(self.sampling.top_k))
            if self.sampling.top_p < 1:
                processors.append(TopPLogitsWarper(self.sampling.top_p))
            processors.append(_GumbelNoise([sequence.seed for sequence in batch], device))
        try:
            output = self.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=self._shared_prefixes(batch, ids, mask),
                generation_config=GenerationConfig(
                    do_sample=False,  # the logits contain the noise
                    max_new_tokens=max(sequence.max_tokens for sequence in batch),
                    pad_token_id=self._pad_id(),
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([ends]),
            )
        except torch.OutOfMemoryError as error:
            raise EngineFatal(
                f"Out of memory with a batch of {len(batch)} sequences and prefixes of up to {width} tokens. Lower `batch_size`. "
                f"({str(error).splitlines()[0]})"
            ) from error
        return [ends.sample(row, output[row, width:].tolist()) for row in range(len(batch))]

    def _shared_prefixes(self, batch: list[_Sequence], ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """
        Return the cache of all rows except their last tokens, for `generate` to continue. Each distinct prefix is computed once.
        Return `None` if no prefix is shared, or if the model does not cache keys and values.
        """
        places: dict[tuple[int, ...], int] = {}
        shared = [places.setdefault(tuple(sequence.prefix_ids), len(places)) for sequence in batch]
        if len(places) == len(batch) or ids.shape[1] == 1:
            return None
        first = [shared.index(place) for place in range(len(places))]
        mask = mask[first, :-1]
        output = self.model(
            ids[first, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            cache.reorder_cache(torch.tensor(shared, device=ids.device))
        return cache

    has_logprobs = True

    async def next_logprobs(self, prefix_ids: Sequence[int], token_ids: Sequence[int], key: str = "") -> list[float]:
        room(prefix_ids, 1, self.max_length, self.model.config.name_or_path)
        return await asyncio.to_thread(self._next_logprobs, list(prefix_ids), list(token_ids))

    @torch.inference_mode()
    def _next_logprobs(self, prefix_ids: list[int], token_ids: list[int]) -> list[float]:
        with self._forward:
            ids = torch.tensor([prefix_ids], device=self.model.device)
            logits = self.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits.float().log_softmax(-1)[token_ids].tolist()

    def _pad_id(self) -> int:
        """Return the padding token. Any token works, because padding is masked and rows are cut at their end."""
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "transformers",
            "model": self.model.config.name_or_path,
            "revision": getattr(self.model.config, "_commit_hash", None) or self.revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self.sampling.describe(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    async def close(self) -> None:
        """Wait for the running batch, and restore the generation config of the model."""
        for sequence in self._waiting:
            sequence.sample.cancel()
        if self._worker is not None and not self._worker.done():
            await self._worker
        self.model.generation_config = self._generation_config


class _GumbelNoise(LogitsProcessor):
    """
    Adds Gumbel noise to the logits, so that the argmax is a draw from the softmax. Each row has its own random generator.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        # hash the seed, because torch's CPU generator only uses the low 32 bits
        mixed = [hashlib.blake2b(str(seed).encode(), digest_size=8).digest() for seed in seeds]
        self.generators = [torch.Generator(device).manual_seed(int.from_bytes(bits, "big")) for bits in mixed]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        exponential = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        # zero would give infinite noise, and NaN for a logit of minus infinity
        return scores - exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()


class _Ends(StoppingCriteria):
    """Stops each row at a stop string, an end-of-sequence token or its own maximum number of tokens, and records which."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], batch: list[_Sequence], width: int
    ):
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.batch = batch
        self.width = width
        # a character has at most 4 byte tokens, so a stop string that ends now starts within this window
        self.windows = [4 * max(map(len, sequence.stop), default=0) + 4 for sequence in batch]
        self.ends: list[tuple[int, str, str | None] | None] = [None] * len(batch)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            if self.ends[row] is None:
                self.ends[row] = self._end(row, ids)
        ended = [
            end is not None or sequence.sample.cancelled() for end, sequence in zip(self.ends, self.batch, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)

    def _end(self, row: int, ids: list[int]) -> tuple[int, str, str | None] | None:
        sequence = self.batch[row]
        if ids[-1] in self.eos_ids:
            return len(ids), "eos", None
        if sequence.stop:
            start = max(0, len(ids) - self.windows[row])
            text = continued_text(self.tokenizer, sequence.prefix_ids + ids[:start], ids[start:])
            if found := find_stop(text, sequence.stop):
                return len(ids), "stop", found[1]
        if len(ids) >= sequence.max_tokens:
            return len(ids), "length", None
        return None

    def sample(self, row: int, ids: list[int]) -> Sample | None:
        """Return the sample of a row, or `None` if it was cancelled."""
        if self.ends[row] is None:
            return None
        length, finish, stop_reason = self.ends[row]
        return sample_from_ids(self.tokenizer, self.batch[row].prefix_ids, ids[:length], finish, stop_reason)
