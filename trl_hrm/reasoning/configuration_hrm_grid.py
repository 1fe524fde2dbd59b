"""Configuration of the Hierarchical Reasoning Model for grids, and of its controls."""

from dataclasses import fields

from transformers import PreTrainedConfig

from .vocab import GridVocab, box_shape


class HrmGridConfig(PreTrainedConfig):
    r"""
    Configuration of [`HrmGridForSolving`]. The defaults are the Sudoku model of the paper (HRM, arXiv 2506.21734).

    Args:
        vocab (`dict` or `GridVocab`, *optional*):
            Symbols of the puzzle, as written by `GridVocab.to_dict`. Required by `solve`.
        height (`int`, *optional*, defaults to `9`):
            Number of rows of a board.
        width (`int`, *optional*, defaults to `9`):
            Number of columns of a board.
        box_height (`int`, *optional*):
            Number of rows of a Sudoku box. Derived from the size for a Sudoku vocabulary.
        box_width (`int`, *optional*):
            Number of columns of a Sudoku box. Derived from the size for a Sudoku vocabulary.
        vocab_size (`int`, *optional*):
            Number of symbols. Defaults to the size of `vocab`, or to 11 (Sudoku) without a vocabulary.
        hidden_size (`int`, *optional*, defaults to `512`):
            Width of the states, d.
        num_attention_heads (`int`, *optional*, defaults to `8`):
            Number of attention heads. Not used if `mixer="mlp"`.
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU layers. Defaults to 8d/3, rounded up to a multiple of 256.
        mixer_intermediate_size (`int`, *optional*):
            Width of the SwiGLU layers over positions if `mixer="mlp"`. Defaults to the same formula over the sequence length.
        H_layers (`int`, *optional*, defaults to `4`):
            Number of layers of the slow module.
        L_layers (`int`, *optional*, defaults to `4`):
            Number of layers of the fast module.
        H_cycles (`int`, *optional*, defaults to `2`):
            Calls of the slow module per segment.
        L_cycles (`int`, *optional*, defaults to `2`):
            Calls of the fast module per call of the slow module.
        halt_max_steps (`int`, *optional*, defaults to `16`):
            Maximum number of segments M.
        continue_head (`bool`, *optional*, defaults to `True`):
            Whether the second row of the Q head is trained (HRM). If `False`, a board halts when `q_halt > 0` (TRM, arXiv
            2510.04871).
        tie_modules (`bool`, *optional*, defaults to `False`):
            Whether one module plays both parts (TRM).
        grad_scope (`str`, *optional*, defaults to `"last_step"`):
            Calls that receive a gradient: `"last_step"` (the last call of each module, HRM), `"last_cycle"` (all calls of the
            last H cycle, TRM) or `"all"`.
        mixer (`str`, *optional*, defaults to `"attention"`):
            How cells exchange information: `"attention"`, or `"mlp"`, a SwiGLU layer over positions (TRM).
        position (`str`, *optional*):
            Positions: `"rope"` over the flat sequence including the prefix, `"learned"` (one vector per place), `"grid"` (learned
            vectors per row, column and box) or `"none"`. Defaults to `"rope"` for attention and to `"none"` for `mixer="mlp"`.
        num_prefix_tokens (`int`, *optional*, defaults to `1`):
            Number of tokens before the grid, which hold the puzzle embedding and zeros.
        num_puzzle_ids (`int`, *optional*, defaults to `1`):
            Number of rows of the puzzle embedding. With more than one, row 0 is the blank id.
        puzzle_emb_dim (`int`, *optional*):
            Width of the puzzle embedding. Defaults to d, or to 0 (no embedding) without prefix tokens.
        hierarchy (`bool`, *optional*, defaults to `True`):
            Whether there are two modules and states. If `False`, one block of `H_layers + L_layers` layers is called `H_cycles`
            times per segment (the loop control): `z_H <- block(z_H + x)`.
        rms_norm_eps (`float`, *optional*, defaults to `1e-5`):
            Epsilon of the norms.
        rope_theta (`float`, *optional*, defaults to `10000.0`):
            Base of the rotary positions.
        loss_type (`str`, *optional*, defaults to `"stablemax"`):
            Cross-entropy of the cells: `"stablemax"` or `"softmax"`.

    Example:

    ```python
    >>> from trl_hrm.reasoning import HrmGridConfig
    >>> from trl_hrm.reasoning.vocab import sudoku_vocab

    >>> config = HrmGridConfig.preset("trm", vocab=sudoku_vocab(6), height=6, width=6, hidden_size=64)
    >>> config.seq_len
    36
    ```
    """

    model_type = "hrm_grid"

    vocab: dict | GridVocab | None = None
    height: int = 9
    width: int = 9
    box_height: int | None = None
    box_width: int | None = None
    vocab_size: int | None = None
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    mixer_intermediate_size: int | None = None
    H_layers: int = 4
    L_layers: int = 4
    H_cycles: int = 2
    L_cycles: int = 2
    halt_max_steps: int = 16
    continue_head: bool = True
    tie_modules: bool = False
    grad_scope: str = "last_step"
    mixer: str = "attention"
    position: str | None = None
    num_prefix_tokens: int = 1
    num_puzzle_ids: int = 1
    puzzle_emb_dim: int | None = None
    hierarchy: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    loss_type: str = "stablemax"

    def __post_init__(self, **kwargs):
        if hasattr(self.vocab, "to_dict"):
            self.vocab = self.vocab.to_dict()
        vocab = None if self.vocab is None else GridVocab.from_dict(self.vocab)
        numbers = [
            field.name
            for field in fields(self)
            if field.name in type(self).__annotations__ and field.type in (int, int | None)
        ]
        for name in numbers:
            if getattr(self, name) is not None and type(getattr(self, name)) is not int:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. Expected an integer.")
        if self.vocab_size is None:
            self.vocab_size = len(vocab) if vocab is not None else 11
        elif vocab is not None and self.vocab_size != len(vocab):
            raise ValueError(
                f"`vocab_size` is {self.vocab_size}, but the vocabulary {vocab.name!r} has {len(vocab)} symbols. Remove `vocab_size`."
            )
        for name in ("intermediate_size", "mixer_intermediate_size", "box_height", "box_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least 1.")
        least = {
            "height": 1, "width": 1, "vocab_size": 2, "hidden_size": 1, "num_attention_heads": 1, "H_layers": 0, "L_layers": 0,
            "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 1, "num_prefix_tokens": 0, "num_puzzle_ids": 1,
        }  # fmt: skip
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least {minimum}.")
        if self.vocab_size > 256:
            raise ValueError(
                f"`vocab_size` is {self.vocab_size}. It must be at most 256, because boards are stored as bytes."
            )
        if vocab is not None and vocab.name == "sudoku":
            if not self.height == self.width == len(vocab) - 2:
                raise ValueError(
                    f"A Sudoku with the digits 1 to {len(vocab) - 2} has that many rows and columns, found `height={self.height}` "
                    f"and `width={self.width}`."
                )
            boxes = box_shape(self.height)
            if (self.box_height, self.box_width) not in ((None, None), boxes):
                raise ValueError(
                    f"Found boxes of {self.box_height} x {self.box_width} cells. The boxes of a Sudoku of size {self.height} have "
                    f"{boxes[0]} x {boxes[1]} cells. Remove `box_height` and `box_width`."
                )
            self.box_height, self.box_width = boxes
        if (self.box_height is None) != (self.box_width is None):
            raise ValueError("Only one of `box_height` and `box_width` is set. Set both, or neither.")
        if self.box_height is not None and (self.height % self.box_height or self.width % self.box_width):
            raise ValueError(
                f"Boxes of {self.box_height} x {self.box_width} cells do not fill a board of {self.height} x {self.width} cells."
            )
        choices = {
            "grad_scope": ("last_step", "last_cycle", "all"),
            "mixer": ("attention", "mlp"),
            "position": (None, "rope", "learned", "grid", "none"),
            "loss_type": ("stablemax", "softmax"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}. Expected one of {[value for value in values if value is not None]}."
                )
        if self.position is None:
            self.position = "rope" if self.mixer == "attention" else "none"
        if self.mixer == "attention":
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` ({self.num_attention_heads})."
                )
            if self.position == "rope" and self.hidden_size // self.num_attention_heads % 2:
                raise ValueError(
                    f"Heads of {self.hidden_size // self.num_attention_heads} dimensions do not support `position='rope'`, which "
                    "needs an even number. Change `num_attention_heads` or `hidden_size`."
                )
            if self.mixer_intermediate_size is not None:
                raise ValueError("`mixer_intermediate_size` is only used with `mixer='mlp'`. Remove it.")
        else:
            if self.position == "rope":
                raise ValueError(
                    "`position='rope'` rotates queries and keys, which `mixer='mlp'` does not have. Use 'none', 'learned' or 'grid'."
                )
            if self.mixer_intermediate_size is None:
                self.mixer_intermediate_size = _swiglu_size(self.num_prefix_tokens + self.seq_len)
        if self.intermediate_size is None:
            self.intermediate_size = _swiglu_size(self.hidden_size)
        if self.hierarchy and not (self.H_layers and self.L_layers):
            raise ValueError(
                f"`H_layers` is {self.H_layers} and `L_layers` is {self.L_layers}. Both modules need at least 1 layer."
            )
        if self.tie_modules and (self.H_layers != self.L_layers or not self.hierarchy):
            raise ValueError(
                "`tie_modules` uses one module twice, so it requires `hierarchy=True` and equal `H_layers` and `L_layers`. Found "
                f"`hierarchy={self.hierarchy}`, {self.H_layers} and {self.L_layers}."
            )
        if not self.hierarchy and (self.L_cycles != 1 or not self.H_layers + self.L_layers):
            raise ValueError(
                f"`hierarchy=False` has one block, called `H_cycles` times per segment. It requires `L_cycles=1` and at least 1 "
                f"layer. Found `L_cycles={self.L_cycles}` and {self.H_layers + self.L_layers} layers."
            )
        if self.puzzle_emb_dim is None:
            self.puzzle_emb_dim = self.hidden_size if self.num_prefix_tokens else 0
        if not 0 <= self.puzzle_emb_dim <= self.num_prefix_tokens * self.hidden_size:
            raise ValueError(
                f"`puzzle_emb_dim` is {self.puzzle_emb_dim}. It must be between 0 and num_prefix_tokens * hidden_size = "
                f"{self.num_prefix_tokens * self.hidden_size}."
            )
        if self.num_puzzle_ids > 1 and not self.puzzle_emb_dim:
            raise ValueError(
                f"`num_puzzle_ids` is {self.num_puzzle_ids}, but `puzzle_emb_dim` is 0, so the ids would be ignored. Set a width."
            )
        super().__post_init__(**kwargs)

    @property
    def seq_len(self) -> int:
        """Number of cells of a board."""
        return self.height * self.width

    @property
    def grid_vocab(self) -> GridVocab:
        """The vocabulary. Raises a `ValueError` if the configuration has none."""
        if self.vocab is None:
            raise ValueError("The configuration has no vocabulary. Set `vocab`, for example to `sudoku_vocab(9)`.")
        return GridVocab.from_dict(self.vocab)

    def to_diff_dict(self) -> dict:
        # The parent leaves out values that equal the default configuration. Derived values among them would be derived anew, for another width.
        own = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name in type(self).__annotations__
        }
        return {**super().to_diff_dict(), **own}

    @classmethod
    def preset(cls, name: str, **overrides) -> "HrmGridConfig":
        """
        Return the configuration of a published model or of a control.

        Args:
            name (`str`):
                `"hrm"` (HRM, arXiv 2506.21734), `"trm"` or `"trm_mlp"` (TRM, arXiv 2510.04871), `"loop"` (the same layers in one
                block, in the same loop over segments), `"one_pass"` (this block, applied once) or `"one_pass_deep"` (one pass
                with as many layers as one segment of HRM applies).
            overrides:
                Fields that differ from the preset. Pass the layers and cycles of the HRM to compare with to `"loop"`, `"one_pass"` and
                `"one_pass_deep"`: the number of layers is computed from them.

        Returns:
            [`HrmGridConfig`]: The configuration.
        """
        trm = dict(
            tie_modules=True, grad_scope="last_cycle", H_cycles=3, L_cycles=6, H_layers=2, L_layers=2, continue_head=False,
            num_prefix_tokens=16,
        )  # fmt: skip
        presets = {
            "hrm": {},
            "trm": trm,
            "trm_mlp": {**trm, "mixer": "mlp"},
            "loop": dict(hierarchy=False, continue_head=False),
            "one_pass": dict(hierarchy=False, continue_head=False, halt_max_steps=1),
            "one_pass_deep": dict(hierarchy=False, continue_head=False, halt_max_steps=1),
        }
        if name not in presets:
            raise ValueError(f"Unknown preset {name!r}. Expected one of {list(presets)}.")
        unknown = sorted(overrides.keys() - {field.name for field in fields(cls)} - {"attn_implementation"})
        if unknown:
            raise ValueError(
                f"`{unknown[0]}` is not a field of `HrmGridConfig`. Expected one of {', '.join(sorted(cls.__annotations__))}."
            )
        values = {**presets[name], **overrides}
        if name == "one_pass_deep":
            layers = {field.name: field.default for field in fields(cls)} | overrides
            values["H_layers"] = layers["H_cycles"] * (layers["L_cycles"] * layers["L_layers"] + layers["H_layers"])
            values["L_layers"] = 0
        if name in ("loop", "one_pass", "one_pass_deep"):
            # The controls call their block once per segment. The cycles of the HRM do not apply.
            values |= dict(H_cycles=1, L_cycles=1)
        return cls(**values)


def _swiglu_size(width: int) -> int:
    """Return the width of a SwiGLU layer: 4 * width * 2/3, rounded up to a multiple of 256."""
    return -(-round(4 * width * 2 / 3) // 256) * 256
