"""Conversion of checkpoints of the code of HRM (arXiv 2506.21734) and TRM (arXiv 2510.04871)."""

import os
import pickle
import re
from collections.abc import Sequence

import torch

from .configuration_hrm_grid import HrmGridConfig
from .modeling_hrm_grid import HrmGridForSolving, check_puzzle_index


NAMES = {
    "H_init": "z_H_init",
    "L_init": "z_L_init",
    "embed_tokens.embedding_weight": "embed_tokens.weight",
    "embed_pos.embedding_weight": "embed_positions.weight",
    "puzzle_emb.weights": "puzzle_emb.weight",
}


def convert_original(
    path: str | os.PathLike, config: HrmGridConfig, puzzle_ids: dict[str, int] | Sequence[str] | None = None
) -> HrmGridForSolving:
    """
    Return a model with the weights of a checkpoint of the original code of HRM or TRM, in float32.

    The checkpoint holds neither the configuration nor the names of the puzzles, so both are arguments. The file is read without pickled
    objects (`weights_only=True`).

    Args:
        path (`str` or `os.PathLike`):
            File written by the original code, for example `step_26040`.
        config ([`HrmGridConfig`]):
            Configuration of the model, for example `HrmGridConfig.preset("hrm", vocab=sudoku_vocab(9))`.
        puzzle_ids (`dict[str, int]` or `Sequence[str]`, *optional*):
            Row of the puzzle embedding of each puzzle id, or the ids in the order of the rows, starting with the blank id of row 0
            (`identifiers.json` of the original dataset).

    Returns:
        [`HrmGridForSolving`]: The model.

    Raises:
        `ValueError`: If the file is not such a checkpoint, or if its tensors do not fit the configuration.

    Example:

    ```python
    >>> from trl_hrm.reasoning import HrmGridConfig, sudoku_vocab
    >>> from trl_hrm.reasoning.convert import convert_original

    >>> model = convert_original("step_26040", HrmGridConfig.preset("hrm", vocab=sudoku_vocab(9)))
    >>> model.save_pretrained("sudoku-extreme-hrm")
    ```
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not a PyTorch checkpoint that only holds tensors. Expected the `state_dict` that the code of HRM or TRM "
            "saves. Save it again with `torch.save(model.state_dict(), path)`."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{path} holds {type(tensors).__name__} with other values than tensors. Expected the `state_dict` that the code of HRM "
            "or TRM saves."
        )
    model = HrmGridForSolving(config)
    expected = model.state_dict()
    weights = {}
    for name, tensor in tensors.items():
        ours = re.sub(r"^(_orig_mod\.|module\.|model\.|inner\.)+", "", str(name))
        ours = NAMES.get(ours, ours)
        ours = re.sub(r"^([HL])_level\.", r"\1_module.", ours).replace(".mlp_t.", ".mixer.")
        weights[ours] = tensor.float()
    for problem, names in [
        ("lacks the tensors", sorted(expected.keys() - weights.keys())),
        ("has the unknown tensors", sorted(weights.keys() - expected.keys())),
    ]:
        if names:
            raise ValueError(
                f"{path} {problem} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}, for the given configuration. Check "
                "`H_layers`, `L_layers`, `tie_modules`, `mixer`, `position` and `puzzle_emb_dim`, and that the checkpoint is one of "
                "HRM or TRM."
            )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but the configuration gives {tuple(expected[name].shape)}. Check "
                "`vocab_size`, `hidden_size`, `intermediate_size`, `num_puzzle_ids`, `height` and `width`."
            )
    model.load_state_dict(weights)
    if puzzle_ids is not None:
        if not isinstance(puzzle_ids, dict):
            puzzle_ids = {name: row for row, name in enumerate(puzzle_ids) if row}
        model.puzzle_index = check_puzzle_index(puzzle_ids, config, "`puzzle_ids`")
    return model.eval()
