"""Score the steps of solutions with vLLM in this process."""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..io import shown
from ..step_format import StepFormat
from .tree_scorer import ChainScorer, check_classifier, read_text_contract


try:
    from vllm import LLM, EngineArgs, PoolingParams
except ImportError as error:
    raise ImportError(
        f'vLLM cannot be imported ({error}). Run `pip install "trl-hrm[vllm]"`, or use StepScorer '
        "(`--reward_model_engine transformers`)."
    ) from error

TASK = "token_classify"


class VLLMScorer(ChainScorer):
    """
    Scores every step of candidate solutions with vLLM.

    The scores are equal to the scores of [`StepScorer`] up to float rounding. Each candidate is one sequence for all its
    steps. vLLM has no tree attention and no prefix cache for token classifiers, so shared prefixes are computed again for
    each candidate.

    Args:
        llm ([`~vllm.LLM`]):
            Engine with `runner="pooling"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            Step format that the model was trained with. vLLM supports the heads `"classification"` and `"regression"`.

    Raises:
        `ValueError`: If the tokenizer, the step format and the engine do not fit each other.
    """

    def __init__(self, llm: LLM, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat):
        config = llm.llm_engine.model_config
        if config.runner_type != "pooling":
            raise ValueError(
                f'The engine has the runner {shown(config.runner_type)}. Start it with `LLM(..., runner="pooling")`.'
            )
        super().__init__(tokenizer, step_format, config.max_model_len)
        check_classifier(config.hf_config, config.model, step_format)
        self.llm = llm

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str,
        step_format: StepFormat | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        **engine_args: Any,
    ) -> "VLLMScorer":
        """
        Start vLLM with a checkpoint of [`HRMRewardTrainer`].

        Args:
            path_or_repo (`str`):
                Path or Hub id of the checkpoint, with its tokenizer and `step_format.json`.
            step_format ([`StepFormat`], *optional*):
                Step format for a checkpoint without `step_format.json`.
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                Arguments for loading the checkpoint.
            dtype (`str`, *optional*, defaults to `"float32"`):
                Dtype of the weights. Note that `"auto"` casts float32 weights to float16 in vLLM.
            **engine_args:
                Other arguments of `vllm.LLM`. On CPU, set `kv_cache_memory_bytes`, as vLLM otherwise uses most of the memory.

        Raises:
            `ValueError`: If vLLM does not support the checkpoint (a LoRA adapter or a causal language model), its weights do
            not fit the head, or an engine argument is unknown.
            `FileNotFoundError`: If the checkpoint has no `step_format.json` and `step_format` is not given.
        """
        unknown = engine_args.keys() - {field.name for field in fields(EngineArgs)}
        if unknown:
            raise ValueError(f"vLLM's engine has no argument {', '.join(map(repr, sorted(unknown)))}.")
        # also checks the checkpoint before the engine is started, which takes long
        tokenizer, step_format = read_text_contract(path_or_repo, step_format, revision, trust_remote_code)
        llm = LLM(
            path_or_repo,
            runner="pooling",
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **engine_args,
        )
        return cls(llm, tokenizer, step_format)

    def _outputs(self, sequences: list[list[int]], progress: bool) -> list[torch.Tensor]:
        found = self.llm.encode(
            [{"prompt_token_ids": ids} for ids in sequences],
            PoolingParams(use_activation=False),
            pooling_task=TASK,
            use_tqdm=partial(tqdm, unit="path") if progress else False,
        )
        for output, ids in zip(found, sequences, strict=True):
            if not output.outputs.data.isfinite().all():
                raise ValueError(
                    f"vLLM returned NaN or infinity for a sequence of {len(ids)} tokens. Check the weights, or use another dtype."
                )
        return [output.outputs.data.cpu() for output in found]
