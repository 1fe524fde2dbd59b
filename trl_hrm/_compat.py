"""The only module that imports TRL's private names, so that an upgrade of TRL is checked in one place."""

from trl.kernels import chunked_divergence
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import _use_triton as use_triton
from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer import utils as trainer_utils
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import (
    FusedCausalLMOutput,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
)


__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "ChunkedDivergenceFunction",
    "DataCollatorForLanguageModeling",
    "ForwardRedirection",
    "FusedCausalLMOutput",
    "chunked_divergence",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "global_then_local_main_first",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "prepare_fsdp",
    "trainer_utils",
    "use_triton",
]
