"""Load reward models, policies and tokenizers, and refuse checkpoints whose weights do not fit: missing weights would be random."""

import json
import logging
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

from ._compat import create_model_from_path, deepspeed_integration
from .heads import model_class
from .hub import HTTPError
from .identity import digest_of_checkpoint_weights
from .io import shown
from .step_format import StepFormat, check_repo_id
from .terminal import one_line, plain


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)

_LM_HEADS = ("lm_head.", "embed_out.")  # output embeddings of causal language models, as transformers names them
_PEFT_PREFIX = "base_model.model."  # of weight names in adapter files
_HEADS = ("classifier", "score", "v_head", "v_head.summary")  # layers of token classifiers outside the body
_FORMATS_OF_HEADS = {"mlp": "qwen2.5-math-prm", "value": "skywork-o1-prm"}
_REMEDY = "Download or save it again."
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def list_misfits(
    missing: Iterable[str], unexpected: Iterable[str] = (), mismatched: Mapping[str, tuple] = MappingProxyType({})
) -> str:
    """
    Return the first few weights of each kind and the number of the others, for error messages. `mismatched` maps names
    to (found, expected) shapes.
    """
    kinds = {
        "missing": [f"`{name}`" for name in sorted(missing)],
        "unexpected": [f"`{name}`" for name in sorted(unexpected)],
        "with a different shape": [
            f"`{name}` {has}, expected {needs}" for name, (has, needs) in sorted(mismatched.items())
        ],
    }
    return "; ".join(
        f"{kind} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for kind, names in kinds.items()
        if names
    )


@dataclass(frozen=True)
class WeightFit:
    """
    How the weights of a checkpoint fit a model.

    Args:
        model_name (`str`): Class of the model.
        head (`frozenset[str]`): Weights of its head, which are all weights outside the body.
        missing (`frozenset[str]`): Weights that the checkpoint does not have. They are newly initialized.
        unexpected (`frozenset[str]`): Weights in the checkpoint that the model does not have. They are ignored.
        mismatched (`dict[str, tuple]`): Shape in the checkpoint and shape in the model of each weight where they differ.
        body_prefix (`str`): Prefix of the names of the body's weights.
        known (`frozenset[str]`): All weights of the model.
    """

    model_name: str
    head: frozenset[str]
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: dict[str, tuple]
    body_prefix: str
    known: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel, info: dict[str, Any]) -> "WeightFit":
        """Create from the loading info that `from_pretrained(..., output_loading_info=True)` returns."""
        prefix = f"{model.base_model_prefix}."
        known = frozenset(model.state_dict())
        return cls(
            type(model).__name__,
            frozenset(name for name in known if not name.startswith(prefix)),
            frozenset(info["missing_keys"]),
            frozenset(info["unexpected_keys"]),
            {name: (tuple(found), tuple(expected)) for name, found, expected in info["mismatched_keys"]},
            prefix,
            known,
        )

    @property
    def random(self) -> frozenset[str]:
        """Weights that do not come from the checkpoint."""
        return self.missing | self.mismatched.keys()

    @property
    def other_heads(self) -> frozenset[str]:
        """Weights of other heads in the checkpoint, except the output embeddings of a language model."""
        return frozenset(name for name in self.unexpected if not name.startswith((self.body_prefix, *_LM_HEADS)))

    def refuse(self, name: str, step_format: StepFormat, remedy: str = "") -> None:
        """Raise `ValueError` if any weight does not fit. The message names the weights and what to do, then `remedy`."""
        if not (self.random or self.unexpected):
            return
        raise ValueError(
            f"{name}: the weights do not fit {self.model_name} with head {step_format.head!r}: "
            f"{list_misfits(self.missing, self.unexpected, self.mismatched)}. Weights that are not in the checkpoint would "
            f"be random, and so would the scores. {self._remedy(step_format)}{remedy}"
        )

    def refuse_policy(self, name: str) -> None:
        """
        Raise `ValueError` if a weight of a causal language model is missing or has another shape, or if the checkpoint has more
        layers than the model. Weights of other heads and of other modalities are ignored.
        """
        layers = {re.sub(r"\d+", "#", weight) for weight in self.missing | self.known}
        left_out = {weight for weight in self.unexpected if re.sub(r"\d+", "#", weight) in layers}
        if self.random or left_out:
            effect = (
                "Weights that are not in the checkpoint would be random, and so would the text."
                if self.random
                else "Without these layers, the text would be random."
            )
            raise ValueError(
                f"{name}: the weights do not fit {self.model_name}: {list_misfits(self.missing, left_out, self.mismatched)}. {effect} Files are missing or damaged, or "
                "config.json describes a different model. Download or save it again."
            )

    def _remedy(self, step_format: StepFormat) -> str:
        random = self.random & self.head
        own_head = {name for name in self.head if not name.startswith(_LM_HEADS)}
        known = _head_of(self.unexpected)
        if known not in (None, step_format.head) and (random or step_format.is_causal_lm):
            return f"Set `head` of the step format to {known!r}, the head of the checkpoint."
        if step_format.head in ("mlp", "value") and self.unexpected & {"score.weight", "classifier.weight"}:
            return 'Set `head` of the step format to "classification" if the head has 2 outputs, or "regression" if it has 1.'
        if step_format.is_causal_lm and self.other_heads:
            return (
                'It has a different head. If it is a token classifier, set `head` of the step format to "classification" or '
                '"regression". Other heads are not supported.'
            )
        if not step_format.is_causal_lm and self.mismatched.keys() & self.head:
            return (
                'Set `head` of the step format to the head it was trained with: "classification" has 2 outputs, '
                '"regression" has 1.'
            )
        if not step_format.is_causal_lm and (self.other_heads or own_head > random > frozenset()):
            return (
                "Its head is not supported. Supported heads are listed in the documentation of StepFormat. Pass a checkpoint "
                "saved by HRMRewardTrainer, or one listed in docs/model_zoo.md."
            )
        if not step_format.is_causal_lm and random:
            return (
                "It has no trained head: it is a base model or a causal language model. Pass a checkpoint saved by "
                'HRMRewardTrainer. If it predicts label tokens, set `head` of the step format to "lm".'
            )
        return "Files are missing or damaged, or config.json describes a different model. Download or save it again."


def _head_of(names: Collection[str]) -> str | None:
    """Return the head that only published models with these weights have, or `None`."""
    return "mlp" if "score.0.weight" in names else "value" if "v_head.summary.weight" in names else None


def read_step_format(path_or_repo: str, revision: str | None = None) -> StepFormat:
    """
    Return the step format of a checkpoint: its `step_format.json` or the format of a published model, which is recognised by
    the repository id, the folder name or the names of the head's weights.

    Raises:
        `FileNotFoundError`, `ValueError`: See [`~step_format.StepFormat.from_pretrained`].
    """
    try:
        return StepFormat.from_pretrained(path_or_repo, revision=revision)
    except FileNotFoundError:
        name = _FORMATS_OF_HEADS.get(_head_of(_tensor_shapes(path_or_repo, revision) or ()))
        if name is None:
            raise
    logger.warning(
        "%s has no step_format.json. The weights of its head are those of the published step format %s, which is used. If it was "
        "trained with a different one, pass `step_format`.",
        plain(path_or_repo),
        name,
    )
    return StepFormat.published(name)


def load_reward_model(
    path_or_repo: str,
    step_format: StepFormat,
    revision: str | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> "PreTrainedModel | PeftModel":
    """
    Load a trained step reward model, or a PEFT adapter with its base model.

    Args:
        path_or_repo (`str`):
            Path or Hub id of the model or the adapter.
        step_format ([`StepFormat`]):
            Format that it was trained with.
        revision (`str`, *optional*):
            Revision of the repository.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether to load an adapter for training.
        kwargs:
            Passed to `from_pretrained` of the model.

    Raises:
        `ValueError`: If weights are missing, unexpected or have a different shape. The message names them and says
        what to do.
    """
    if find_adapter_config_file(path_or_repo, revision=revision) is None:
        with _held_load_report():  # a misfit raises an error instead
            model, fit = _load(path_or_repo, step_format, revision=revision, **kwargs)
        fit.refuse(path_or_repo, step_format)
        refuse_nan(model, path_or_repo)
        return model

    from peft import PeftModel

    adapter, brought = _read_adapter(path_or_repo, revision)
    kwargs = {"revision": adapter.revision, **kwargs}  # `revision` of the base model
    with _held_load_report() as reports:
        model, fit = _load(adapter.base_model_name_or_path, step_format, **kwargs)
    _refuse_base(fit, adapter.base_model_name_or_path, path_or_repo, brought, step_format)
    if any(name.startswith(fit.body_prefix) for name in fit.unexpected):  # not only about the head
        _log_again(reports)
    try:
        model = PeftModel.from_pretrained(model, path_or_repo, revision=revision, is_trainable=is_trainable)
    except KeyError as error:  # a weight of `modules_to_save` is missing in the files
        _refuse_adapter(path_or_repo, error.args)
    except RuntimeError as error:
        raise ValueError(
            f"{path_or_repo}: the weights of the adapter do not fit its base model: {' '.join(str(error).split())} Set `head` "
            "of the step format to the head that it was trained with, and check its base model."
        ) from error
    check_adapter(model, path_or_repo, revision)
    refuse_nan(model, path_or_repo)
    return model


def load_reference_model(
    path_or_repo: str,
    step_format: StepFormat,
    revision: str | None = None,
    reference_model: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel | None:
    """
    Load the reference model of a checkpoint with the head `"implicit"`, and check that it is the one of its training.

    Args:
        path_or_repo (`str`):
            Path or Hub id of the checkpoint.
        step_format ([`StepFormat`]):
            Format that it was trained with.
        revision (`str`, *optional*):
            Revision of the repository of the checkpoint.
        reference_model (`str`, *optional*):
            Where the reference model is now. Defaults to `step_format.reference_model`.
        kwargs:
            Passed to `from_pretrained` of the reference model.

    Returns:
        [`~transformers.PreTrainedModel`]: The reference model. `None` for an adapter, whose reference is its base model.

    Raises:
        `FileNotFoundError`, `ValueError`: If the reference model is missing or damaged, or has other weights than in training.
    """
    name, ref_revision, is_checked = find_reference(path_or_repo, step_format, revision, reference_model)
    if find_adapter_config_file(path_or_repo, revision=revision) is not None:
        return None
    model = load_policy(name, revision=ref_revision, **kwargs)
    if not is_checked:
        _refuse_other_weights(path_or_repo, step_format, name, ref_revision)
    return model


_REFERENCE_REMEDY = "Pass `reference_model` with the path or Hub id of the reference model that it was trained with."
_BASE_REMEDY = "Set `base_model_name_or_path` in adapter_config.json to the base model that it was trained with."


def find_reference(
    path_or_repo: str, step_format: StepFormat, revision: str | None = None, reference_model: str | None = None
) -> tuple[str, str | None, bool]:
    """
    Check the files of the reference model of a checkpoint. See [`load_reference_model`].

    Returns:
        `tuple[str, str or None, bool]`: Its name, its revision, and whether its weights could be compared with the weights in
        training. `False` if they have not been downloaded yet.
    """
    adapter = find_adapter_config_file(path_or_repo, revision=revision)
    if adapter is None:
        name, ref_revision, remedy = step_format.reference_model, step_format.reference_revision, _REFERENCE_REMEDY
        if reference_model is not None:
            name, ref_revision = reference_model, None
    else:
        if reference_model is not None:
            raise ValueError(
                f"`reference_model` is {shown(reference_model)}, but {path_or_repo} is an adapter, whose reference is its base model. "
                f"Remove `reference_model`. If the base model was moved: {_BASE_REMEDY}"
            )
        config = _read_object(Path(adapter))
        name, ref_revision, remedy = config.get("base_model_name_or_path"), config.get("revision"), _BASE_REMEDY
    if not isinstance(name, str):
        raise ValueError(f"{path_or_repo}: found no name of the reference model. {remedy}")
    try:
        check_policy(name, ref_revision)
        return name, ref_revision, _refuse_other_weights(path_or_repo, step_format, name, ref_revision, remedy)
    except OSError as error:
        raise FileNotFoundError(
            f"{path_or_repo}: its reference model {name} cannot be loaded ({one_line(str(error), 300).rstrip('.')}). {remedy}"
        ) from error


def _refuse_other_weights(
    path_or_repo: str, step_format: StepFormat, name: str, revision: str | None, remedy: str = _REFERENCE_REMEDY
) -> bool:
    """Raise `ValueError` if a reference model has other weights than in training. Return whether they could be compared."""
    if step_format.reference_weights is None:
        return True
    found = digest_of_checkpoint_weights(name, revision)
    if found not in (None, step_format.reference_weights):
        raise ValueError(
            f"{path_or_repo}: its reference model {name} has weights with the digest {found}, but it was trained with "
            f"{step_format.reference_weights}. With another reference, all scores change. {remedy}"
        )
    return found is not None


def load_base_model(path_or_repo: str, step_format: StepFormat, **kwargs: Any) -> tuple[PreTrainedModel, bool]:
    """
    Load the model to start the training of a step reward model from.

    Args:
        path_or_repo (`str`):
            Path or Hub id of a base model, which gets a new head, or of a model with a trained head.
        step_format ([`StepFormat`]):
            Format that it will be trained with.
        kwargs:
            Passed to `from_pretrained` of the model.

    Returns:
        `tuple[PreTrainedModel, bool]`: The model, and whether its head is newly initialized.

    Raises:
        `ValueError`: If weights of the body are missing, or if the checkpoint has only part of the head or a different
        head.
    """
    with _held_load_report() as reports:
        model, fit = _load(path_or_repo, step_format, **kwargs)
    own_head = frozenset(name for name in fit.head if not name.startswith(_LM_HEADS))
    new_head = not step_format.is_causal_lm and fit.random == fit.missing == own_head
    if fit.other_heads or (fit.random and not new_head):
        remedy = ""
        if fit.random <= (frozenset() if step_format.is_causal_lm else own_head):
            auto_class = "AutoModelForCausalLM" if step_format.is_causal_lm else "AutoModelForTokenClassification"
            remedy = f" To train a new head on its body, load it with `{auto_class}.from_pretrained` and pass the model object."
        fit.refuse(path_or_repo, step_format, remedy)
    refuse_nan(model, path_or_repo)
    _log_again(reports)
    return model, new_head


def load_policy(path_or_repo: str, **kwargs: Any) -> PreTrainedModel:
    """
    Load a policy, which is a causal language model.

    Args:
        path_or_repo (`str`):
            Path or Hub id of the model.
        kwargs:
            Passed to `from_pretrained` of the model, with `dtype` as in TRL.

    Raises:
        `ValueError`: If a file is damaged, weights are missing or have a different shape, or a weight is NaN or infinite. The
        message names them and says what to do.
    """
    with _held_load_report():
        model, fit = _load(path_or_repo, None, **kwargs)
    fit.refuse_policy(path_or_repo)
    refuse_nan(model, path_or_repo)
    return model


def load_tokenizer(
    path_or_repo: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer.

    Raises:
        `ValueError`: If a file is damaged or missing. Without any file, transformers creates an empty tokenizer.
    """
    _local_folder(path_or_repo, revision)
    with _one_line_errors(path_or_repo, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(
            f"{path_or_repo}: `model_max_length` of the tokenizer is {shown(tokenizer.model_max_length)}. It must be a number. Correct "
            "tokenizer_config.json, or download or save the tokenizer again."
        )
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{path_or_repo}: the tokenizer has no tokens. Its files (such as tokenizer.json) are missing. Save the tokenizer to the "
            "same folder as the model, or download the model again."
        )
    return tokenizer


def refuse_nan(model: torch.nn.Module, name: str) -> None:
    """Raise `ValueError` if a weight is NaN or infinite, as after a training that diverged. All outputs would be NaN."""
    for weight_name, weight in model.named_parameters():
        if weight.dtype not in _FLOATS or weight.is_meta or not weight.numel():  # ZeRO-3 leaves empty weights
            continue
        lowest, highest = torch.aminmax(weight.detach())  # NaN if any weight is
        if not (lowest.isfinite() and highest.isfinite()):
            raise ValueError(
                f"{name}: weight `{weight_name}` contains NaN or infinite values. The training that saved it diverged. Use an earlier "
                "checkpoint, or train again with a lower learning rate."
            )


def check_checkpoint(
    path_or_repo: str,
    step_format: StepFormat,
    revision: str | None = None,
    trust_remote_code: bool = False,
    reference_model: str | None = None,
) -> bool:
    """
    Check that the weights of a checkpoint fit the head, without loading the model.

    The names and shapes of the weights are read from the headers of the safetensors files, in the folder, in the cache
    or on the Hub. For an adapter, its weights are checked together with the files of its base model.

    Args:
        path_or_repo (`str`):
            Path or Hub id of the model or the adapter.
        step_format ([`StepFormat`]):
            Format that it was trained with.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
            Passed to `from_pretrained` of its configuration.
        reference_model (`str`, *optional*):
            Where the reference model of the head `"implicit"` is now. It is checked too. See [`load_reference_model`].

    Returns:
        `bool`: Whether it was checked. `False` if no safetensors files can be read.

    Raises:
        `ValueError`: If weights are missing, unexpected or have a different shape. The message names them and says
        what to do.
    """
    if step_format.head == "implicit":
        find_reference(path_or_repo, step_format, revision, reference_model)
    if find_adapter_config_file(path_or_repo, revision=revision) is None:
        fit = _fit_of_files(path_or_repo, step_format, revision, trust_remote_code)
        if fit is not None:
            fit.refuse(path_or_repo, step_format)
        return fit is not None
    adapter, brought = _read_adapter(path_or_repo, revision)
    fit = _fit_of_files(adapter.base_model_name_or_path, step_format, adapter.revision, trust_remote_code)
    if fit is not None:
        _refuse_base(fit, adapter.base_model_name_or_path, path_or_repo, brought, step_format)
    return fit is not None


def check_policy(path_or_repo: str, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """
    Check the files of a policy without loading it, as [`check_checkpoint`] does for reward models.

    Returns:
        `bool`: Whether it was checked. `False` if no safetensors files can be read.

    Raises:
        `ValueError`: If a file is damaged, or weights are missing or have a different shape. The message names them and says what to
        do.
    """
    fit = _fit_of_files(path_or_repo, None, revision, trust_remote_code)
    if fit is not None:
        fit.refuse_policy(path_or_repo)
    return fit is not None


def _fit_of_files(
    path_or_repo: str, step_format: StepFormat | None, revision: str | None, trust_remote_code: bool
) -> WeightFit | None:
    """
    Match the safetensors files of a checkpoint with the model, a policy if `step_format` is `None`. Return `None` if no such files can
    be read.
    """
    shapes = _tensor_shapes(path_or_repo, revision)
    if shapes is None:
        return None
    with _one_line_errors(path_or_repo):
        config = AutoConfig.from_pretrained(path_or_repo, revision=revision, trust_remote_code=trust_remote_code)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized:
        del config.quantization_config  # using it requires the quantization library
    auto_class = AutoModelForCausalLM if step_format is None else model_class(step_format, config)
    if step_format is not None and not step_format.is_causal_lm:
        config.num_labels = step_format.num_labels
    with _one_line_errors(path_or_repo), without_zero3(), torch.device("meta"):
        if hasattr(auto_class, "from_config"):  # an auto class
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = auto_class(config)
    # Let transformers match the names: for some architectures they differ between the files and the model
    with _one_line_errors(path_or_repo), without_zero3(), _held_load_report():
        model, info = type(model).from_pretrained(
            None,
            config=config,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    fit = WeightFit.of(model, info)
    if not quantized:
        return fit
    return replace(  # quantized weights of the body have different names and shapes
        fit,
        missing=fit.missing & fit.head,
        unexpected=fit.other_heads,
        mismatched={name: shapes for name, shapes in fit.mismatched.items() if name in fit.head},
    )


def check_adapter(model: "PeftModel", path_or_repo: str, revision: str | None = None) -> None:
    """
    Check that the files of an adapter contain all weights of the adapter and no others.

    Args:
        model ([`~peft.PeftModel`]):
            Model with an adapter of the same configuration.
        path_or_repo (`str`):
            Path or Hub id of the adapter.
        revision (`str`, *optional*):
            Revision of the repository.

    Raises:
        `ValueError`: If weights are missing or unexpected. The message names them and says what to do.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    found = load_peft_weights(path_or_repo, device="cpu", revision=revision).keys()
    # The files of an adapter may also contain whole layers of the model, such as resized embeddings
    others = {name for name, _ in model.named_parameters()}
    _refuse_adapter(path_or_repo, expected - found, found - expected - others)


def check_adapted_head(model: "PeftModel") -> None:
    """
    Check that the head of a token classifier with an adapter is trained and saved with the adapter, or comes from the files of the base model.

    Raises:
        `ValueError`: If it is neither. It would stay random, and scores would depend on the process that creates it.
    """
    from peft.utils import ModulesToSaveWrapper

    heads = {name: layer for name, layer in model.get_base_model().named_modules() if name in _HEADS}
    if any(isinstance(layer, ModulesToSaveWrapper) for layer in heads.values()):
        return
    config = model.peft_config[model.active_adapter]
    base = config.base_model_name_or_path
    in_base = _tensor_shapes(base, config.revision, is_local=True) if base else {}
    if (
        heads
        and in_base is not None
        and not any(name.startswith(tuple(f"{head}." for head in heads)) for name in in_base)
    ):
        raise ValueError(
            f"The head of the model ({', '.join(heads)}) is not in the adapter, and not in the files of the base model{f' {base}' if base else ''}. It "
            'would be neither trained nor saved. Create the adapter with `task_type="TOKEN_CLS"` or with the head in `modules_to_save`, or '
            "pass the model without an adapter, and `peft_config`."
        )


def refuse_frozen_adapter(path_or_repo: str, revision: str | None = None) -> None:
    """
    Refuse an adapter as the name of a policy to train.

    Raises:
        `ValueError`: If it is an adapter. transformers would load it with all weights frozen, so that nothing is trained.
    """
    if find_adapter_config_file(path_or_repo, revision=revision) is not None:
        raise ValueError(
            f"{path_or_repo} is an adapter, which would be loaded with all weights frozen. To train it further, pass "
            f"`AutoPeftModelForCausalLM.from_pretrained({path_or_repo!r}, is_trainable=True)` as `model`. Or merge it into its base model "
            "with `merge_and_unload`, save the result, and train that."
        )


def _refuse_adapter(name: str, missing: Collection[str], unexpected: Collection[str] = ()) -> None:
    if missing or unexpected:
        raise ValueError(
            f"{name}: the weights of the adapter do not fit: {list_misfits(missing, unexpected)}. Weights that are not in the "
            "files would be random, and so would the scores. Set `head` of the step format to the head that it was trained "
            'with. An adapter of a token classifier must contain the head: set `task_type="TOKEN_CLS"` or `modules_to_save` '
            "in its PEFT configuration, as HRMRewardTrainer does."
        )


def _refuse_base(
    fit: WeightFit, base_name: str, adapter_name: str, brought: dict[str, torch.Tensor], step_format: StepFormat
) -> None:
    """Raise `ValueError` if weights are neither in the base model nor in the adapter."""
    if not fit.random <= fit.head:
        fit.refuse(base_name, step_format)
    _refuse_adapter(adapter_name, {_PEFT_PREFIX + name for name in fit.random} - brought.keys())


def _read_adapter(path_or_repo: str, revision: str | None) -> "tuple[PeftConfig, dict[str, torch.Tensor]]":
    """Return the configuration and the weights of an adapter."""
    from peft import PeftConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

    folder = Path(path_or_repo)  # PEFT would ask the Hub for missing weights
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise FileNotFoundError(f"{path_or_repo}: {SAFETENSORS_WEIGHTS_NAME} is missing. {_REMEDY}")
    with _one_line_errors(path_or_repo, "adapter"):
        adapter = PeftConfig.from_pretrained(path_or_repo, revision=revision)
        return adapter, load_peft_weights(path_or_repo, device="cpu", revision=revision)


def _load(path_or_repo: str, step_format: StepFormat | None, **kwargs: Any) -> tuple[PreTrainedModel, WeightFit]:
    """Load a reward model, or a policy if `step_format` is `None`."""
    folder = Path(path_or_repo)
    if folder.is_dir() and not any((folder / name).is_file() for name in (CONFIG_NAME, "adapter_config.json")):
        raise FileNotFoundError(f"{path_or_repo}: {CONFIG_NAME} is missing. {_REMEDY}")
    _tensor_shapes(
        path_or_repo, kwargs.get("revision"), is_local=True
    )  # a damaged file raises before the others are read
    auto_class = AutoModelForCausalLM
    if step_format is not None and not step_format.is_causal_lm:
        kwargs = {"num_labels": step_format.num_labels, **kwargs}
        with _one_line_errors(path_or_repo):
            config = AutoConfig.from_pretrained(
                path_or_repo, revision=kwargs.get("revision"), trust_remote_code=kwargs.get("trust_remote_code", False)
            )
        auto_class = model_class(step_format, config)
    # Ignore mismatched sizes here, so that they are reported together with missing and unexpected weights
    kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    with _one_line_errors(path_or_repo):
        try:
            model, info = create_model_from_path(path_or_repo, auto_class, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if f"unexpected keyword argument '{name}'" in str(error)]
            if not unknown:
                raise
            raise ValueError(
                f"{path_or_repo}: {auto_class.__name__} has no argument {shown(unknown[0])} for loading a model. Remove it, or correct its "
                "name."
            ) from error
    return model, WeightFit.of(model, info)


_DAMAGES = (
    OSError,
    ValueError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)


@contextmanager
def without_zero3() -> Iterator[None]:
    """
    Context manager in which models are created whole, even if training arguments have enabled ZeRO-3. Otherwise transformers would shard
    them like the trained model, which fails for a model on the meta device, and is not wanted for a reward model.
    """
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        config = reference and reference()
        if config is not None:
            deepspeed_integration.set_hf_deepspeed_config(config)


@contextmanager
def _one_line_errors(path_or_repo: str, what: str = "model") -> Iterator[None]:
    """
    Turn what transformers, PEFT and PyTorch raise for damaged files into a `ValueError` on one line that names the checkpoint. Some of
    their messages are paragraphs of general advice, others a bare `KeyError`.
    """
    try:
        yield
    except Exception as error:
        is_of_tokenizers = type(error) is Exception  # that package has no class for its errors
        if isinstance(error, torch.OutOfMemoryError) or not (is_of_tokenizers or isinstance(error, _DAMAGES)):
            raise
        is_clear = type(error) in (OSError, ValueError, FileNotFoundError) and str(path_or_repo) in str(error)
        if is_clear and "\n" not in str(error).strip():
            raise
        reason = one_line(str(error).strip().split("\n\n")[0], 300).rstrip(".")
        if not isinstance(error, SafetensorError | StrictDataclassError):
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        message = f"{path_or_repo}: the {what} cannot be loaded ({reason}). If a file is missing or damaged, download or save it again."
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error


@contextmanager
def _held_load_report() -> Iterator[list[logging.LogRecord]]:
    """Hold back the load report of transformers ("newly initialized" weights). [`_log_again`] logs it later."""
    reports: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            reports.append(record)
        return not is_report

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(hold)
    try:
        yield reports
    finally:
        source.removeFilter(hold)


def _log_again(reports: list[logging.LogRecord]) -> None:
    for record in reports:
        logging.getLogger(record.name).handle(record)


def _tensor_shapes(path_or_repo: str, revision: str | None, is_local: bool = False) -> dict[str, list[int]] | None:
    """
    Return the shape of each tensor in the safetensors files of a checkpoint, or `None` if no such files can be read. With `is_local`, the
    Hub is not asked for files that are not in the cache.

    Raises:
        `ValueError`: If one of the files, the configuration or the index is damaged.
    """
    folder = _local_folder(path_or_repo, revision)
    if folder is not None:
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            return _read_header(folder / SAFE_WEIGHTS_NAME)
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            return _read_headers(folder / SAFE_WEIGHTS_INDEX_NAME, is_complete=Path(path_or_repo).is_dir())
    if is_local or Path(path_or_repo).is_dir():
        return None
    try:
        metadata = get_safetensors_metadata(path_or_repo, revision=revision)
    except SafetensorsParsingError as error:
        raise ValueError(
            f"{path_or_repo}: a weights file is damaged ({one_line(str(error), 300)}). {_REMEDY}"
        ) from error
    except (NotASafetensorsRepoError, OSError, HTTPError):
        return None
    return {name: tensor.shape for file in metadata.files_metadata.values() for name, tensor in file.tensors.items()}


def _local_folder(path_or_repo: str, revision: str | None) -> Path | None:
    """
    Return the folder of a checkpoint, which is in the cache of the Hub for a repository, or `None` if it is not there.

    Raises:
        `FileNotFoundError`: If it is a folder that does not exist. See [`~step_format.check_repo_id`].
        `ValueError`: If one of its configuration files is damaged.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        check_repo_id(path_or_repo)
        try:
            file = cached_file(
                path_or_repo, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        except OSError:
            return None
        if file is None:
            return None
        folder = Path(file).parent
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        if (folder / name).is_file():
            _read_object(folder / name)
    return folder


def _read_headers(index: Path, is_complete: bool) -> dict[str, list[int]] | None:
    """Return the shapes in all files of an index. `None` if some are not in the cache yet, unless the folder must be complete."""
    files = _read_object(index).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in files.values()
    ):
        raise ValueError(
            f"{index}: found {shown(files)}, expected `weight_map` with the file of each weight. {_REMEDY}"
        )
    missing = sorted(name for name in set(files.values()) if not (index.parent / name).is_file())
    if missing and is_complete:
        raise FileNotFoundError(
            f"{index.parent}: {missing[0]} is missing{f', and {len(missing) - 1} other files' * (len(missing) > 1)}. {_REMEDY}"
        )
    shapes = {}
    for name in sorted(set(files.values()) - set(missing)):
        shapes |= _read_header(index.parent / name)
    return None if missing else shapes


def _read_header(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a safetensors file. A file that was cut off is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except SafetensorError as error:
        reason = str(error)
        with open(file, "rb") as content:
            if content.read(24).startswith(b"version https://git-lfs"):
                reason = "it is a pointer of Git LFS, not the file itself. Run `git lfs pull`"
        raise ValueError(f"{file}: the weights file is damaged ({reason}). {_REMEDY}") from error


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint. Unlike in our own files, `Infinity` is allowed."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({one_line(str(error), 200)}). {_REMEDY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: found {shown(value)}, expected a JSON object. {_REMEDY}")
    return value
