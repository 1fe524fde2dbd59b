"""Score the steps of solutions with vLLM in this process."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..io import shown
from ..step_format import StepFormat
from ..terminal import one_line
from .scoring_config import checkpoint_name
from .tree_scorer import ChainScorer, check_architecture, read_text_contract


try:
    from vllm import LLM, EngineArgs, PoolingParams, SamplingParams
    from vllm.config import PoolerConfig
except ImportError as error:
    raise ImportError(
        f'vLLM cannot be imported ({error}). Run `pip install "trl-hrm[vllm]"`, or use StepScorer '
        "(`--reward_model_engine transformers`)."
    ) from error


class VLLMScorer(ChainScorer):
    """
    Scores every step of candidate solutions with vLLM.

    The scores are equal to the scores of [`StepScorer`] up to float rounding. vLLM has no tree attention:

    - A token classifier reads each candidate as one sequence for all its steps. vLLM has no prefix cache for token
      classifiers, so shared prefixes are computed again for each candidate.
    - A causal language model (`head="lm"`) gets one request per step, for the log-probabilities of the two label tokens
      after it. vLLM's prefix cache shares the tokens of earlier steps and of other candidates.

    Args:
        llm ([`~vllm.LLM`]):
            Engine with `runner="pooling"`, which returns the outputs for all tokens. For `head="lm"`, engine with
            `runner="generate"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Step format that the model was trained with.

    Raises:
        `ValueError`: If the tokenizer, the step format and the engine do not fit each other, or vLLM does not support the
        head.
    """

    def __init__(self, llm: LLM, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat):
        config = llm.llm_engine.model_config
        check_architecture(config.hf_config, config.model, step_format)
        runner = _runner(step_format)
        if config.runner_type != runner:
            raise ValueError(
                f"The engine has the runner {shown(config.runner_type)}, but head {step_format.head!r} needs {shown(runner)}. "
                f"Start it with `LLM(..., runner={shown(runner)})`."
            )
        # a request for log-probabilities also generates a token
        super().__init__(tokenizer, step_format, config.max_model_len - (runner == "generate"))
        self.llm = llm

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        step_format: StepFormat | str | Path | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        **engine_args: Any,
    ) -> "VLLMScorer":
        """
        Start vLLM with a checkpoint of [`HRMRewardTrainer`] or a published model.

        Args:
            path_or_repo (`str` or `Path`):
                Path or Hub id of the checkpoint, with its tokenizer and `step_format.json`.
            step_format ([`StepFormat`], `str` or `Path`, *optional*):
                Step format for a checkpoint without `step_format.json`, or its name, file or folder (see [`StepFormat.named`]).
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Arguments for loading the checkpoint.
            dtype (`str`, *optional*, defaults to `"float32"`):
                Dtype of the weights. Note that `"auto"` casts float32 weights to float16 in vLLM.
            **engine_args:
                Other arguments of `vllm.LLM`. On CPU, set `kv_cache_memory_bytes`, as vLLM otherwise uses most of the memory.

        Raises:
            `ValueError`: If vLLM does not support the checkpoint (a LoRA adapter, an architecture, or a head for which it has
            no class), its weights do not fit the head, or an engine argument is unknown.
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is not given.
        """
        unknown = engine_args.keys() - {field.name for field in fields(EngineArgs)}
        if unknown:
            raise ValueError(f"vLLM's engine has no argument {', '.join(map(repr, sorted(unknown)))}.")
        path_or_repo = checkpoint_name(path_or_repo, f"{cls.__name__}(llm, tokenizer, step_format)")
        # also checks the checkpoint before the engine is started, which takes long
        tokenizer, step_format = read_text_contract(path_or_repo, step_format, revision, trust_remote_code)
        runner = _runner(step_format)
        if runner == "pooling":  # some models default to rows at one special token
            engine_args.setdefault("pooler_config", PoolerConfig(pooling_type="ALL"))
        try:
            llm = LLM(
                path_or_repo,
                runner=runner,
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                **engine_args,
            )
        except ValueError as error:  # its message may list all architectures that vLLM supports
            raise ValueError(
                f"{path_or_repo}: vLLM cannot run this model ({one_line(str(error), 300)}). Check the engine arguments, or use "
                "StepScorer (`--reward_model_engine transformers`)."
            ) from error
        return cls(llm, tokenizer, step_format)

    def _outputs(self, sequences: list[tuple[list[int], list[int]]], progress: bool) -> list[torch.Tensor]:
        if self.label_token_ids is not None:
            return self._label_logprobs(sequences, progress)
        found = self.llm.encode(
            [{"prompt_token_ids": ids} for ids, _ in sequences],
            PoolingParams(use_activation=False),
            pooling_task="token_classify",
            use_tqdm=partial(tqdm, unit="path") if progress else False,
        )
        outputs = []
        for output, (ids, positions) in zip(found, sequences, strict=True):
            rows = output.outputs.data.cpu()
            self.check_outputs(rows, len(ids))
            outputs.append(_finite(rows, len(ids))[positions])
        return outputs

    def _label_logprobs(self, sequences: list[tuple[list[int], list[int]]], progress: bool) -> list[torch.Tensor]:
        """Return the log-probabilities of the label tokens after each step, from one request per step."""
        found = self.llm.generate(
            [{"prompt_token_ids": ids[: place + 1]} for ids, positions in sequences for place in positions],
            SamplingParams(max_tokens=1, logprobs=2, logprob_token_ids=self.label_token_ids, detokenize=False),
            use_tqdm=partial(tqdm, unit="step") if progress else False,
        )
        rows = iter([[output.outputs[0].logprobs[0][i].logprob for i in self.label_token_ids] for output in found])
        return [_finite(torch.tensor([next(rows) for _ in positions]), len(ids)) for ids, positions in sequences]


def _runner(step_format: StepFormat) -> str:
    """Return the runner of vLLM for a head."""
    return "generate" if step_format.head == "lm" else "pooling"


def _finite(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the outputs of a sequence. Raise `ValueError` if one is NaN or infinity."""
    if not rows.isfinite().all():
        raise ValueError(
            f"vLLM returned NaN or infinity for a sequence of {num_tokens} tokens. Check the weights, or use another dtype."
        )
    return rows
