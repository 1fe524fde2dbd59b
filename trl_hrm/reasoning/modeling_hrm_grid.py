"""The Hierarchical Reasoning Model for grids (HRM, arXiv 2506.21734), the Tiny Recursive Model (TRM, arXiv 2510.04871) and their controls."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, cached_file

from .configuration_hrm_grid import HrmGridConfig
from .grid_solving import GridSolution, read_boards, solve_boards
from .losses import act_loss


PUZZLE_IDS_FILE = "puzzle_ids.json"


@dataclass
class HrmGridOutput(ModelOutput):
    """
    Output of one segment of [`HrmGridForSolving`].

    Args:
        loss (`torch.Tensor`, *optional*):
            Sum of the loss of cells and half the loss of the halting logit, averaged over the rows with labels. The loss of the logit
            for continuing needs a further segment, so the trainer adds it.
        logits (`torch.Tensor`):
            Logits of the cells, of shape (B, L, V), in float32.
        q_halt_logits (`torch.Tensor`):
            Logits of "the answer is right", of shape (B,), in float32.
        q_continue_logits (`torch.Tensor`):
            Logits of continuing, of shape (B,), in float32. Not trained if `continue_head=False`.
        z_H (`torch.Tensor`):
            Slow state, of shape (B, prefix + L, d), without gradient: the input of the next segment.
        z_L (`torch.Tensor`):
            Fast state, of the same shape, or of shape (B, 0, d) if `hierarchy=False`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    q_halt_logits: torch.Tensor | None = None
    q_continue_logits: torch.Tensor | None = None
    z_H: torch.Tensor | None = None
    z_L: torch.Tensor | None = None


class HrmGridAttention(nn.Module):
    """Self-attention between all positions, without causal mask and without biases."""

    def __init__(self, config: HrmGridConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv_proj(hidden).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if rope is None:
            query, key, value = qkv.unbind(0)
        else:
            cos, sin = rope
            first, second = qkv[:2].chunk(2, dim=-1)
            rotated = qkv[:2] * cos + torch.cat((-second, first), dim=-1) * sin
            (query, key), value = rotated.to(qkv.dtype).unbind(0), qkv[2]
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = attend(
            self, query, key, value, attention_mask=None, dropout=0.0, scaling=self.head_dim**-0.5, is_causal=False
        )
        return self.o_proj(output.reshape(batch, length, width))


def eager_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch, for `attn_implementation="eager"`. Returns the output of shape (B, L, heads, d) and the weights."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class HrmGridMLP(nn.Module):
    """SwiGLU layer without biases. Gate and up projection are one matrix."""

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class HrmGridLayer(nn.Module):
    """
    One layer: attention or a SwiGLU layer over positions, then a SwiGLU layer, each followed by a norm without weights:
    `h <- rms(h + f(h))`. The norm of the layer over positions runs over positions (TRM, arXiv 2510.04871).
    """

    def __init__(self, config: HrmGridConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.over_positions = config.mixer == "mlp"
        if self.over_positions:
            self.mixer = HrmGridMLP(config.num_prefix_tokens + config.seq_len, config.mixer_intermediate_size)
        else:
            self.self_attn = HrmGridAttention(config)
        self.mlp = HrmGridMLP(config.hidden_size, config.intermediate_size)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        # In float32 for bf16 weights and under autocast.
        return F.rms_norm(hidden.float(), hidden.shape[-1:], eps=self.eps).to(hidden.dtype)

    def forward(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        if self.over_positions:
            hidden = hidden.transpose(1, 2)
            hidden = self.norm(hidden + self.mixer(hidden)).transpose(1, 2)
        else:
            hidden = self.norm(hidden + self.self_attn(hidden, rope))
        return self.norm(hidden + self.mlp(hidden))


class HrmGridModule(nn.Module):
    """A module of the recurrence: its layers, applied to the sum of the state and what is injected."""

    def __init__(self, config: HrmGridConfig, num_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(HrmGridLayer(config) for _ in range(num_layers))

    def forward(
        self, state: torch.Tensor, injection: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        state = state + injection
        for layer in self.layers:
            state = layer(state, rope)
        return state


class HrmGridForSolving(PreTrainedModel):
    """
    Recurrent network that solves grid puzzles: a slow module H and a fast module L (HRM, arXiv 2506.21734), one module that plays both
    parts (TRM, arXiv 2510.04871), or one block in the same loop (control).

    `forward` computes one segment. The states go in and come out, as with `past_key_values`, so the model itself has no state.

    Args:
        config ([`HrmGridConfig`]):
            Configuration of the model.

    Attributes:
        puzzle_index (`dict[str, int]`):
            Row of the puzzle embedding of each puzzle id, saved in `puzzle_ids.json` next to the weights. Row 0 is the blank id.
    """

    config_class = HrmGridConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["HrmGridLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: HrmGridConfig):
        super().__init__(config)
        self.puzzle_index: dict[str, int] = {}
        width, length = config.hidden_size, config.num_prefix_tokens + config.seq_len
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.puzzle_emb_dim:
            self.puzzle_emb = nn.Embedding(config.num_puzzle_ids, config.puzzle_emb_dim)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(length, width)
        elif config.position == "grid":
            self.embed_rows = nn.Embedding(config.height, width)
            self.embed_columns = nn.Embedding(config.width, width)
            if config.box_height is not None:
                self.embed_boxes = nn.Embedding(config.seq_len // (config.box_height * config.box_width), width)
        elif config.position == "rope":
            self.register_buffer("rope", torch.empty(2, length, width // config.num_attention_heads), persistent=False)
        if not config.hierarchy:
            self.H_module = HrmGridModule(config, config.H_layers + config.L_layers)
        else:
            if not config.tie_modules:
                self.H_module = HrmGridModule(config, config.H_layers)
            self.L_module = HrmGridModule(config, config.L_layers)
            self.register_buffer("z_L_init", torch.empty(width))
        self.register_buffer("z_H_init", torch.empty(width))
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.q_head = nn.Linear(width, 2)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        def fill(tensor: torch.Tensor, std: float):
            # A normal distribution cut at two sigmas has 0.8796 of the standard deviation, so sigma is enlarged.
            sigma = std / 0.87962566103423978
            init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma)

        if module is self:
            # The buffers of the root are not part of any module below. Without this, loading from the meta device leaves them empty.
            fill(self.z_H_init, 1.0)
            if self.config.hierarchy:
                fill(self.z_L_init, 1.0)
            if self.config.position == "rope":
                size = self.rope.shape[-1]
                frequencies = self.config.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
                angles = torch.outer(torch.arange(self.rope.shape[1], dtype=torch.float32), frequencies).repeat(1, 2)
                init.copy_(self.rope, torch.stack((angles.cos(), angles.sin())))
        elif module is self.q_head:
            # Almost zero probability of halting at first: training starts with all segments.
            init.zeros_(module.weight)
            init.constant_(module.bias, -5.0)
        elif module is getattr(self, "puzzle_emb", None):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            fill(module.weight, self.config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):
            fill(module.weight, module.in_features**-0.5)

    def initial_state(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the states of new boards: one fixed random vector per state, at all positions.

        Args:
            batch_size (`int`):
                Number of boards B.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: z_H of shape (B, prefix + L, d), and z_L of the same shape, or of shape (B, 0, d) if
            `hierarchy=False`.
        """
        length = self.config.num_prefix_tokens + self.config.seq_len
        z_H = self.z_H_init.repeat(batch_size, length, 1)
        return z_H, self.z_L_init.repeat(batch_size, length, 1) if self.config.hierarchy else z_H[:, :0]

    def embed(self, input_ids: torch.Tensor, puzzle_ids: torch.Tensor | None) -> torch.Tensor:
        """Return the input x of shape (B, prefix + L, d): the prefix and the cells with their positions, times √d."""
        config = self.config
        cells = self.embed_tokens(input_ids)
        if config.position == "grid":
            rows, columns = self.embed_rows.weight[:, None], self.embed_columns.weight[None]
            position = (rows + columns).flatten(0, 1)
            summands = 3
            if config.box_height is not None:
                index = torch.arange(config.seq_len, device=input_ids.device)
                boxes_per_row = config.width // config.box_width
                row, column = index // config.width, index % config.width
                box = row // config.box_height * boxes_per_row + column // config.box_width
                position = position + self.embed_boxes(box)
                summands = 4
            cells = (cells + position) * summands**-0.5
        if config.num_prefix_tokens:
            if config.puzzle_emb_dim:
                if puzzle_ids is None:
                    if config.num_puzzle_ids > 1:
                        raise ValueError(
                            f"The model has {config.num_puzzle_ids} puzzle ids, but `puzzle_ids` is missing. Pass an id per board; 0 is "
                            "the blank id."
                        )
                    puzzle_ids = input_ids.new_zeros(len(input_ids))
                prefix = self.puzzle_emb(puzzle_ids)
            else:
                prefix = cells.new_zeros(len(input_ids), 0)
            prefix = F.pad(prefix, (0, config.num_prefix_tokens * config.hidden_size - prefix.shape[-1]))
            cells = torch.cat((prefix.view(-1, config.num_prefix_tokens, config.hidden_size), cells), dim=1)
        if config.position == "learned":
            cells = (cells + self.embed_positions.weight) * 0.5**0.5
        return cells * math.sqrt(config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        puzzle_ids: torch.Tensor | None = None,
        z_H: torch.Tensor | None = None,
        z_L: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> HrmGridOutput:
        """
        Compute one segment: `z_L <- L(z_L; z_H + x)`, `L_cycles` times, then `z_H <- H(z_H; z_L)`, repeated `H_cycles` times
        (HRM, arXiv 2506.21734). Only the calls in `grad_scope` receive a gradient.

        Args:
            input_ids (`torch.Tensor`):
                Ids of the puzzle, of shape (B, L).
            puzzle_ids (`torch.Tensor`, *optional*):
                Rows of the puzzle embedding, of shape (B,). Required if `num_puzzle_ids` is greater than 1.
            z_H (`torch.Tensor`, *optional*):
                Slow state of shape (B, prefix + L, d). Defaults to the initial state.
            z_L (`torch.Tensor`, *optional*):
                Fast state. Defaults to the initial state.
            labels (`torch.Tensor`, *optional*):
                Ids of the solution, of shape (B, L). Cells with label -100 are ignored.

        Returns:
            [`HrmGridOutput`]: Loss, logits and the new states without gradient.

        Raises:
            `ValueError`: If the board has another number of cells, or if `puzzle_ids` is missing.
        """
        config = self.config
        if input_ids.shape[-1] != config.seq_len:
            raise ValueError(
                f"The boards have {input_ids.shape[-1]} cells. The model expects {config.height} x {config.width} = {config.seq_len}."
            )
        if z_H is None or (z_L is None and config.hierarchy):
            initial_H, initial_L = self.initial_state(len(input_ids))
            z_H, z_L = initial_H if z_H is None else z_H, initial_L if z_L is None else z_L
        elif z_L is None:
            z_L = z_H[:, :0]
        x = self.embed(input_ids, puzzle_ids)
        rope = self.rope if config.position == "rope" else None
        H_module = self.L_module if config.tie_modules else self.H_module
        enabled = recorded = torch.is_grad_enabled()

        def call(module: nn.Module, state: torch.Tensor, injection: torch.Tensor, record: bool) -> torch.Tensor:
            nonlocal recorded
            if record and not recorded and not torch.compiler.is_compiling():
                # Autocast keeps the weights that it has cast. Older versions of torch, such as 2.7, would reuse casts without a graph
                # here, so the weights would get no gradient.
                torch.clear_autocast_cache()
            recorded = record
            with torch.set_grad_enabled(record):
                return module(state, injection, rope)

        for cycle in range(config.H_cycles):
            # "last_cycle" records the whole last cycle, "last_step" only its last calls.
            in_scope = enabled and (config.grad_scope == "all" or cycle == config.H_cycles - 1)
            if config.hierarchy:
                for step in range(config.L_cycles):
                    last = config.grad_scope != "last_step" or step == config.L_cycles - 1
                    z_L = call(self.L_module, z_L, z_H + x, in_scope and last)
            z_H = call(H_module, z_H, z_L if config.hierarchy else x, in_scope)
        logits = self.lm_head(z_H[:, config.num_prefix_tokens :]).float()
        with torch.autocast(z_H.device.type, enabled=False):
            q = F.linear(z_H[:, 0].float(), self.q_head.weight.float(), self.q_head.bias.float())
        loss = None
        if labels is not None:
            losses = act_loss(logits, labels, q[:, 0], loss_type=config.loss_type)
            loss = losses.loss.sum() / (losses.labelled_cells > 0).sum().clamp(min=1)
        return HrmGridOutput(loss, logits, q[:, 0], q[:, 1], z_H.detach(), z_L.detach())

    def solve(
        self,
        puzzle: str | Sequence,
        segments: int | None = None,
        halting: str = "fixed",
        noise: float = 0.0,
        votes: int = 1,
        seed: int = 0,
        puzzle_id: str | Sequence[str] | None = None,
        allow_blank_id: bool = False,
        batch_size: int = 64,
    ) -> GridSolution | list[GridSolution]:
        """
        Solve a puzzle, or a list of puzzles.

        Args:
            puzzle (`str` or `Sequence`):
                Puzzle as text with one line per row, as rows, or as lists of symbols. A square board can be one line. A list of
                puzzles returns a list of solutions. ARC grids can be smaller than the board of the model.
            segments (`int`, *optional*):
                Number of segments. Defaults to `halt_max_steps`.
            halting (`str`, *optional*, defaults to `"fixed"`):
                Segment of the answer: `"fixed"` (the last one), `"q"` (the first one with a halting logit above 0, that is, an answer
                that is more probably right than wrong according to the model) or `"choose"` (the one with the highest halting logit).
                With `"q"`, the segments after it are not part of the solution.
            noise (`float`, *optional*, defaults to `0.0`):
                Standard deviation of Gaussian noise on the initial states.
            votes (`int`, *optional*, defaults to `1`):
                Number of copies of the puzzle. The most frequent answer wins, ties are decided by the mean halting logit. The
                copies differ by their noise, or without noise by symmetries: relabelled digits (and transposition, if boxes are square) for
                Sudoku, rotations and reflections for mazes.
            seed (`int`, *optional*, defaults to `0`):
                Seed of the noise and of the symmetries.
            puzzle_id (`str` or `Sequence[str]`, *optional*):
                Id of the puzzle, or one id per puzzle, for models with a puzzle embedding. Such a model only knows the ids of its training.
            allow_blank_id (`bool`, *optional*, defaults to `False`):
                Whether puzzles with an unknown or missing id use the blank id. Accuracy is then near 0 for models that were trained
                with ids.
            batch_size (`int`, *optional*, defaults to `64`):
                Number of boards per batch.

        Returns:
            [`GridSolution`] or `list[GridSolution]`: The answer, the answers of all segments and checks.

        Raises:
            `ValueError`: If a board, an id or an option is not valid.

        Example:

        ```python
        >>> solution = model.solve("1..4 ..1. .3.. 4..1".replace(" ", "\n"))
        >>> print("\n".join(solution.answer))
        ```
        """
        config = self.config
        segments = config.halt_max_steps if segments is None else segments
        for name, value in [("segments", segments), ("votes", votes), ("batch_size", batch_size)]:
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")
        if halting not in ("fixed", "q", "choose"):
            raise ValueError(f"`halting` is {halting!r}. Expected 'fixed', 'q' or 'choose'.")
        if not 0 <= noise < math.inf:
            raise ValueError(f"`noise` is {noise}. It must be a finite number of at least 0.")
        boards, several = read_boards(puzzle, config)
        names = [puzzle_id] * len(boards) if puzzle_id is None or isinstance(puzzle_id, str) else list(puzzle_id)
        if len(names) != len(boards):
            raise ValueError(
                f"Found {len(names)} puzzle ids for {len(boards)} puzzles. Pass one id, or one per puzzle."
            )
        if config.num_puzzle_ids == 1 and (any(names) or allow_blank_id):
            found = f"puzzle_id={puzzle_id!r}" if any(names) else "allow_blank_id=True"
            raise ValueError(f"The model has no puzzle ids, found `{found}`. Remove it.")
        unknown = [name for name in names if config.num_puzzle_ids > 1 and name not in self.puzzle_index]
        if unknown and not allow_blank_id:
            raise ValueError(
                f"Found the puzzle id {unknown[0]!r}. The model only knows the {len(self.puzzle_index)} ids of its training, for "
                f"example {list(self.puzzle_index)[:3]}. Pass one of them, or set `allow_blank_id=True`."
            )
        rows = [self.puzzle_index.get(name, 0) for name in names]
        solutions = solve_boards(self, boards, rows, segments, halting, noise, votes, seed, batch_size)
        return solutions if several else solutions[0]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs,
    ):
        """Save the model as `PreTrainedModel.save_pretrained` does, and the index of puzzle ids in `puzzle_ids.json`."""
        # The parent's push only uploads files that the parent writes, so the push is a step of its own.
        hub = {
            name: kwargs.pop(name) for name in ("commit_message", "private", "revision", "create_pr") if name in kwargs
        }
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and self.config.num_puzzle_ids > 1:
            with open(os.path.join(save_directory, PUZZLE_IDS_FILE), "w", encoding="utf-8") as file:
                json.dump(self.puzzle_index, file, indent=0, ensure_ascii=False)
        if push_to_hub:
            if kwargs.get("token") is not None:
                hub["token"] = kwargs["token"]
            self.push_to_hub(repo_id or os.path.basename(os.path.normpath(save_directory)), **hub)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub = {name: kwargs[name] for name in hub if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.num_puzzle_ids > 1:
            path = cached_file(pretrained_model_name_or_path, PUZZLE_IDS_FILE, **hub)
            with open(path, encoding="utf-8") as file:
                text = file.read()
            try:
                index = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is not valid JSON: {error}. Copy the file from the original model again."
                ) from error
            model.puzzle_index = check_puzzle_index(index, model.config, path)
        return loaded


def check_puzzle_index(index: dict[str, int], config: HrmGridConfig, where: str) -> dict[str, int]:
    """
    Return the index of puzzle ids if it fits the configuration.

    Raises:
        `ValueError`: If it does not map texts to different rows of the puzzle embedding. Row 0 is the blank id.
    """
    rows = list(index.values()) if isinstance(index, dict) else [None]
    if not all(type(row) is int and 0 < row < config.num_puzzle_ids for row in rows) or len(set(rows)) != len(rows):
        raise ValueError(
            f"{where} does not map each puzzle id to its own row of the puzzle embedding. Expected different numbers from 1 to "
            f"{config.num_puzzle_ids - 1}."
        )
    return index
