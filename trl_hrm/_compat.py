"""The only module that imports TRL's private names, so that an upgrade of TRL is checked in one place."""

from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.utils import (
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
)


__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_config_model_id",
    "global_then_local_main_first",
]
