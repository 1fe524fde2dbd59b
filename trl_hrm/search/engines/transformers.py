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
    DynamicCache,
    DynamicLayer,
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
from ...precision import warn_of_slow_bf16
from .base import EngineFatal, Sample, Sampling, continued_text, find_stop, room, sample_from_ids


@dataclass(eq=False)
class _Sequence:
    """
    A sample to generate. It is skipped if `sample` is cancelled. `end` is why it ended, and the stop string that ended it, or
    `None` while it runs. `padding` is the number of padding tokens before the prefix in its last batch.
    """

    prefix_ids: list[int]
    stop: list[str]
    max_tokens: int
    noise: torch.Generator
    sample: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    token_ids: list[int] = field(default_factory=list)
    end: tuple[str, str | None] | None = None
    padding: int = 0

    @property
    def length(self) -> int:
        return len(self.prefix_ids) + len(self.token_ids)

    @property
    def is_running(self) -> bool:
        return self.end is None and not self.sample.cancelled()


@dataclass
class _Batch:
    """
    The sequences of a call of `generate` that can be continued by another call. Row `i` of `cache` has the keys and values of all
    tokens of sequence `i` except the last one.
    """

    sequences: list[_Sequence] = field(default_factory=list)
    cache: DynamicCache | None = None


class TransformersEngine:
    """
    Samples with `generate` of a transformers model, on CPU or GPU.

    Waiting requests are batched together, even if they differ in prefix, stop strings or length. When an eighth of a batch has
    ended, `generate` returns, and waiting sequences take the places of those that ended. A sample depends on its seed but not on
    its batch, up to float rounding. Each sample adds its own Gumbel noise to the logits, so that the argmax is a draw from the
    softmax.

    The samples of a request share the computation of its prefix while one of them is in the batch. It is not kept for other
    requests, unlike in [`~search.engines.vllm.VLLMEngine`].

    Models with other caches than keys and values of all tokens, such as sliding windows or Mamba, keep a batch until all its
    sequences have ended, because `DynamicCache` cannot move their rows to another batch.

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
        if model.dtype == torch.bfloat16:
            warn_of_slow_bf16(model.device, 'Load the model with `dtype="float32"`.')
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
                f"The dtype of the weights is {shown(dtype)}. It must be 'auto' or a torch dtype, such as 'bfloat16'."
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
        device = self.model.device
        sequences = [_Sequence(list(prefix_ids), list(stop), max_tokens, _noise(seed + i, device)) for i in draws]
        self._waiting.extend(sequences)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        return self.sampling.repeat(await asyncio.gather(*(sequence.sample for sequence in sequences)), n)

    async def _work(self) -> None:
        """Run batches until no request is waiting."""
        await asyncio.sleep(0)  # requests that start together share the first batch
        batch = _Batch()
        while sequences := self._next_sequences(batch):
            try:
                batch = await asyncio.to_thread(self._generate, sequences, batch)
                samples = [self._sample(sequence) for sequence in sequences]
            except Exception as error:  # raised in the waiting requests
                batch = _Batch()
                for sequence in sequences:
                    if not sequence.sample.done():
                        sequence.sample.set_exception(error)
                continue
            for sequence, sample in zip(sequences, samples, strict=True):
                if sample is not None and not sequence.sample.done():
                    sequence.sample.set_result(sample)

    def _next_sequences(self, batch: _Batch) -> list[_Sequence]:
        """
        Return the sequences of `batch` that still run and the sequences that have waited longest, as many as fit into a padded
        batch.
        """
        self._waiting = [sequence for sequence in self._waiting if not sequence.sample.done()]
        running = [sequence for sequence in batch.sequences if sequence.is_running]
        sequences: list[_Sequence] = []
        width = length = 0
        for sequence in (running + self._waiting)[: self.batch_size]:
            width = max(width, sequence.length)
            length = max(length, sequence.max_tokens - len(sequence.token_ids))
            if self.max_length is not None and width + length > self.max_length and len(sequences) >= len(running):
                break
            sequences.append(sequence)
        self._waiting = self._waiting[len(sequences) - len(running) :]
        return sequences

    @torch.inference_mode()
    def _generate(self, sequences: list[_Sequence], last: _Batch) -> _Batch:
        """Continue the sequences until an eighth of them has ended, or all if they cannot leave the batch."""
        device = self.model.device
        width = max(sequence.length for sequence in sequences)
        processors = LogitsProcessorList()
        if not self.sampling.is_greedy:
            processors.append(TemperatureLogitsWarper(float(self.sampling.temperature)))
            if self.sampling.top_k:
                processors.append(TopKLogitsWarper(self.sampling.top_k))
            if self.sampling.top_p < 1:
                processors.append(TopPLogitsWarper(self.sampling.top_p))
            processors.append(_GumbelNoise([sequence.noise for sequence in sequences]))
        try:
            cache, can_leave = self._cache(sequences, last)
            for sequence in sequences:
                sequence.padding = width - sequence.length
            rows = [[self._pad_id()] * s.padding + s.prefix_ids + s.token_ids for s in sequences]
            mask = [[0] * s.padding + [1] * s.length for s in sequences]
            num_ended = max(1, len(sequences) // 8) if can_leave else len(sequences)
            self.model.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                past_key_values=cache,
                generation_config=GenerationConfig(
                    do_sample=False,  # the logits contain the noise
                    max_new_tokens=max(sequence.max_tokens - len(sequence.token_ids) for sequence in sequences),
                    pad_token_id=self._pad_id(),
                ),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([_Ends(self.tokenizer, self._eos_ids, sequences, num_ended)]),
            )
        except torch.OutOfMemoryError as error:
            raise EngineFatal(
                f"Out of memory with a batch of {len(sequences)} sequences and prefixes of up to {width} tokens. Lower `batch_size`. "
                f"({str(error).splitlines()[0]})"
            ) from error
        return _Batch(sequences, cache) if can_leave else _Batch()  # all have ended

    def _cache(self, sequences: list[_Sequence], last: _Batch) -> tuple[Any, bool]:
        """
        Return the keys and values of all tokens except the last one of each sequence, for `generate` to continue, and whether
        sequences can leave the batch. Each distinct prefix is computed once, unless the last batch has it.

        The cache is `None` if the model does not cache keys and values, or if all prefixes have one token.
        """
        rows = {sequence: row for row, sequence in enumerate(last.sequences)}
        rows_of_prefixes = {tuple(sequence.prefix_ids): row for sequence, row in rows.items()}
        prefixes = {tuple(sequence.prefix_ids): None for sequence in sequences if sequence not in rows}
        new = [prefix for prefix in prefixes if prefix not in rows_of_prefixes]
        new_width = max(map(len, new), default=0)
        computed = self._compute(new, new_width) if new_width > 1 else None
        cache = computed if last.cache is None else last.cache
        if not isinstance(cache, DynamicCache) or any(
            type(layer) is not DynamicLayer or not layer.is_initialized for layer in cache.layers
        ):
            if cache is not None:
                places = [new.index(tuple(sequence.prefix_ids)) for sequence in sequences]
                cache.reorder_cache(torch.tensor(places, device=self.model.device))
            return cache, False
        # where the keys and values of each sequence are: the cache, the row and the first column
        sources = []
        for sequence in sequences:
            prefix = tuple(sequence.prefix_ids)
            if (row := rows.get(sequence, rows_of_prefixes.get(prefix))) is not None:
                sources.append((last.cache, row, last.sequences[row].padding))
            elif computed is not None:
                sources.append((computed, new.index(prefix), new_width - len(prefix)))
            else:
                sources.append((cache, 0, 0))  # a prefix of one token has no cached keys
        lengths = [sequence.length - 1 for sequence in sequences]
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                _, num_heads, _, head_size = getattr(layer, name).shape
                moved = getattr(layer, name).new_zeros(len(sequences), num_heads, max(lengths), head_size)
                for row, ((source, source_row, start), length) in enumerate(zip(sources, lengths, strict=True)):
                    old = getattr(source.layers[number], name)
                    moved[row, :, max(lengths) - length :] = old[source_row, :, start : start + length]
                setattr(layer, name, moved)
        return cache, True

    def _compute(self, prefixes: list[tuple[int, ...]], width: int) -> Any:
        """Return the cache of the prefixes except their last tokens, padded to `width - 1` columns."""
        padding = [width - len(prefix) for prefix in prefixes]
        rows = [[self._pad_id()] * pad + list(prefix[:-1]) for pad, prefix in zip(padding, prefixes, strict=True)]
        mask = torch.tensor([[0] * pad + [1] * (width - 1 - pad) for pad in padding], device=self.model.device)
        output = self.model(
            torch.tensor(rows, device=self.model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        return getattr(output, "past_key_values", None)

    def _sample(self, sequence: _Sequence) -> Sample | None:
        """Return the sample of a sequence, or `None` if it still runs or was cancelled."""
        if sequence.end is None:
            return None
        return sample_from_ids(self.tokenizer, sequence.prefix_ids, sequence.token_ids, *sequence.end)

    has_logprobs = True

    async def next_logprobs(self, prefix_ids: Sequence[int], token_ids: Sequence[int], key: str = "") -> list[float]:
        room(prefix_ids, 1, self.max_length, self.model.config.name_or_path)
        return await asyncio.to_thread(self._next_logprobs, list(prefix_ids), list(token_ids))

    @torch.inference_mode()
    def _next_logprobs(self, prefix_ids: list[int], token_ids: list[int]) -> list[float]:
        try:
            with self._forward:
                ids = torch.tensor([prefix_ids], device=self.model.device)
                logits = self.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        except torch.OutOfMemoryError as error:
            raise EngineFatal(
                f"Out of memory with a prefix of {len(prefix_ids)} tokens. Lower `batch_size`. ({str(error).splitlines()[0]})"
            ) from error
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


def _noise(seed: int, device: torch.device) -> torch.Generator:
    """Return the random generator of a sample."""
    # hash the seed, because torch's CPU generator only uses the low 32 bits
    bits = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(bits, "big"))


class _GumbelNoise(LogitsProcessor):
    """
    Adds Gumbel noise to the logits, so that the argmax is a draw from the softmax. Each row has its own random generator.
    """

    def __init__(self, generators: list[torch.Generator]):
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        exponential = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        # zero would give infinite noise, and NaN for a logit of minus infinity
        return scores - exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_()


class _Ends(StoppingCriteria):
    """
    Adds each token to its sequence. A sequence ends at a stop string, an end-of-sequence token or its own maximum number of
    tokens. The batch ends when `num_ended` sequences have ended.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        sequences: list[_Sequence],
        num_ended: int,
    ):
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.sequences = sequences
        self.num_ended = num_ended

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for sequence, token in zip(self.sequences, input_ids[:, -1].tolist(), strict=True):
            if sequence.end is None:
                sequence.token_ids.append(token)
                sequence.end = self._end(sequence)
        ended = sum(not sequence.is_running for sequence in self.sequences)
        return torch.full((len(self.sequences),), ended >= self.num_ended, device=input_ids.device)

    def _end(self, sequence: _Sequence) -> tuple[str, str | None] | None:
        ids = sequence.token_ids
        if ids[-1] in self.eos_ids:
            return "eos", None
        if sequence.stop:
            # a character has at most 4 byte tokens, so a stop string that ends now starts within this window
            start = max(0, len(ids) - 4 * max(map(len, sequence.stop)) - 4)
            text = continued_text(self.tokenizer, sequence.prefix_ids + ids[:start], ids[start:])
            if found := find_stop(text, sequence.stop):
                return "stop", found[1]
        if len(ids) >= sequence.max_tokens:
            return "length", None
        return None
