"""
Private names of TRL and transformers. No other module imports them, so an upgrade only needs changes here.

Names are imported on first use, because most of them import torch.
"""

import importlib


# name: "module" or "module:name in the module"
_NAMES = {
    "BaseConfig": "trl.trainer.base_config:_BaseConfig",
    "BaseTrainer": "trl.trainer.base_trainer:_BaseTrainer",
    "ChunkedDivergenceFunction": "trl.kernels.chunked_divergence:ChunkedDivergenceFunction",
    "ChunkedLogProbFunction": "trl.kernels.chunked_logprob:ChunkedLogProbFunction",
    "DataCollatorForLanguageModeling": "trl.trainer.sft_trainer:DataCollatorForLanguageModeling",
    "ForwardRedirection": "trl.models.utils:_ForwardRedirection",
    "FusedCausalLMOutput": "trl.trainer.utils:FusedCausalLMOutput",
    "chunked_divergence": "trl.kernels.chunked_divergence",
    "compile_jinja_template": "transformers.utils.chat_template_utils:_compile_jinja_template",
    "create_model_from_path": "trl.trainer.utils:create_model_from_path",
    "deepspeed_integration": "transformers.integrations.deepspeed",
    "disable_dropout_in_model": "trl.trainer.utils:disable_dropout_in_model",
    "get_comet_experiment_url": "trl.trainer.utils:get_comet_experiment_url",
    "get_config_model_id": "trl.trainer.utils:get_config_model_id",
    "get_trackio_space_url": "trl.trainer.utils:get_trackio_space_url",
    "global_then_local_main_first": "trl.trainer.utils:global_then_local_main_first",
    "maybe_gather_lm_head_ctx": "trl.trainer.utils:maybe_gather_lm_head_ctx",
    "prepare_deepspeed": "trl.models.utils:prepare_deepspeed",
    "prepare_fsdp": "trl.models.utils:prepare_fsdp",
    "resolve_accelerate_config_argument": "trl.cli.accelerate_config:resolve_accelerate_config_argument",
    "subtract_subsequence": "trl.cli.commands.training:_subtract_subsequence",
    "trainer_utils": "trl.trainer.utils",
    "use_triton": "trl.kernels.chunked_logprob:_use_triton",
}


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
