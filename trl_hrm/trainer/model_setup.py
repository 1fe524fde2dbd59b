"""The model of a trainer: load it with the outputs of its head, and wrap it in an adapter."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from accelerate.logging import get_logger
from accelerate.utils import DistributedType, is_peft_model
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..heads import LABEL_NAMES
from ..loading import load_base_model, load_reward_model
from ..step_format import StepFormat
from .hrm_reward_config import HRMRewardConfig


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import Trainer

logger = get_logger(__name__)


def load_model(
    model: "str | PreTrainedModel | PeftModel", args: HRMRewardConfig, step_format: StepFormat
) -> tuple["PreTrainedModel | PeftModel", str | None, bool]:
    """
    Load the model of a trainer, if it was given by name.

    A checkpoint of a reward model, which has a `step_format.json`, or an adapter must fit as it does in scoring. A base
    model gets a new head.

    Returns:
        `tuple[PreTrainedModel or PeftModel, str or None, bool]`: The model, the revision it was loaded from, and whether its
        head is newly initialized. The last is not known of a model that is already instantiated: `False`.

    Raises:
        `ValueError`: If `args.model_init_kwargs` is given with a model that is already instantiated, or if the weights of
        the checkpoint do not fit.
    """
    if not isinstance(model, str):
        if args.model_init_kwargs is not None:
            raise ValueError(
                "`model_init_kwargs` was given with a model that is already instantiated. Pass the model's name as a "
                "string, or remove `model_init_kwargs`."
            )
        return model, None, False
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    # Distributed training requires device_map=None ("auto" fails)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None
    if step_format.head == "classification":  # what pipelines call the two classes
        kwargs |= {"id2label": LABEL_NAMES, "label2id": {name: i for i, name in LABEL_NAMES.items()}}
    revision = kwargs.pop("revision", None)
    trained_format = StepFormat.find(model, revision=revision)
    if trained_format is not None:
        warn_of_another_format(model, trained_format, step_format)
    if trained_format is not None or find_adapter_config_file(model, revision=revision) is not None:
        return load_reward_model(model, step_format, revision, is_trainable=True, **kwargs), revision, False
    loaded, has_new_head = load_base_model(model, step_format, revision=revision, **kwargs)
    return loaded, revision, has_new_head


def warn_of_another_format(name: str, found: StepFormat, step_format: StepFormat) -> None:
    """Warn if a checkpoint was trained with another step format than the one that will encode."""
    theirs, ours = asdict(found), asdict(step_format)
    changed = [f"`{key}` {theirs[key]!r} (now {ours[key]!r})" for key in ours if theirs[key] != ours[key]]
    if changed:
        logger.warning(
            f"{name} was trained with another step format: {', '.join(changed)}. Its scores depend on the step format. To "
            "continue or evaluate it as it was trained, set these arguments to the old values."
        )


def forget_evaluation(trainer: "Trainer") -> None:
    """
    Have Accelerate prepare the model of a trainer for training.

    It takes a model that was evaluated before for one that is ready, and would train each process by itself.
    """
    if trainer.model_wrapped is trainer.model:
        trainer.model._is_accelerate_prepared = False


def add_adapter(
    model: PreTrainedModel, peft_config: "PeftConfig", args: HRMRewardConfig, step_format: StepFormat
) -> "PeftModel":
    """
    Wrap the model in a PEFT adapter whose task type is that of the head.

    Raises:
        `ValueError`: If the model has an adapter already.
    """
    from peft import TaskType, get_peft_model

    if is_peft_model(model):
        raise ValueError(
            "You passed a `PeftModel` instance together with a `peft_config`. Merge the adapter into the base model "
            "first, or continue training it without `peft_config`."
        )
    # PEFT trains and saves the classifier of a model when told that it is one
    peft_config.task_type = TaskType.CAUSAL_LM if step_format.head == "lm" else TaskType.TOKEN_CLS
    # ... but lets "all-linear" put an adapter on it too, which fails
    if step_format.head != "lm" and getattr(peft_config, "target_modules", None) == "all-linear":
        peft_config.exclude_modules = peft_config.exclude_modules or ["classifier", "score"]
    # ZeRO-3 gathers parameters of one dtype only; see https://github.com/huggingface/trl/issues/6089
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # the adapter names its base model, and must name the revision that it fits too
    revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
    kwargs = {"autocast_adapter_dtype": False} if zero3 else {}
    return get_peft_model(model, peft_config, revision=revision, **kwargs)
