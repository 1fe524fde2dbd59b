"""Train a Hierarchical Reasoning Model, TRM or one of their controls on grid puzzles."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from ..terminal import printable
from .training import USAGE, TrainingScriptArguments, check_inputs, end_together, finish, load_splits, run_script


if TYPE_CHECKING:
    from datasets import Dataset

    from ..reasoning import HrmGridConfig

CONFIG = "HRMReasoningConfig"


@dataclass
class ScriptArguments(TrainingScriptArguments):
    """
    Arguments of this script, next to [`HRMReasoningConfig`]: the dataset, and the model as a preset with changed fields, or a model to
    train further. The size of the boards and the vocabulary come from the dataset. [`~reasoning.HrmGridConfig`] describes the fields.

    Args:
        dataset_test_split (`str`, *optional*, defaults to `"validation"`): Split to evaluate on, if `eval_strategy` is set. Keep the test
            split for the end.
        plan (`bool`, *optional*, defaults to `False`): Whether to print the number of optimizer steps and the size of the model, and exit.
        system (`str`, *optional*): Preset: `"hrm"`, `"trm"`, `"trm_mlp"`, `"loop"`, `"one_pass"` or `"one_pass_deep"`. Defaults to
            `"hrm"`.
        model_name_or_path (`str`, *optional*): Path or Hub id of a model to train further, instead of `system`.
        hidden_size, num_attention_heads, intermediate_size, mixer_intermediate_size, H_layers, L_layers, H_cycles, L_cycles,
            halt_max_steps, continue_head, tie_modules, grad_scope, mixer, position, num_prefix_tokens, puzzle_emb_dim, loss_type
            (*optional*): Fields that differ from the preset.
    """

    dataset_test_split: str = field(
        default="validation",
        metadata={"help": "Split to evaluate on, if `eval_strategy` is set. Keep the test split for the end."},
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Print the number of optimizer steps and the size of the model, and exit."},
    )
    system: Literal["hrm", "trm", "trm_mlp", "loop", "one_pass", "one_pass_deep"] | None = field(
        default=None, metadata={"help": "Preset of the model. Defaults to hrm."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or Hub id of a model to train further, instead of `system`."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the states."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Number of attention heads, with `--mixer attention`."}
    )
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the SwiGLU layers."})
    mixer_intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the SwiGLU layers over positions, with `--mixer mlp`."}
    )
    H_layers: int | None = field(default=None, metadata={"help": "Number of layers of the slow module."})
    L_layers: int | None = field(default=None, metadata={"help": "Number of layers of the fast module."})
    H_cycles: int | None = field(default=None, metadata={"help": "Calls of the slow module per segment."})
    L_cycles: int | None = field(
        default=None, metadata={"help": "Calls of the fast module per call of the slow module."}
    )
    halt_max_steps: int | None = field(default=None, metadata={"help": "Maximum number of segments."})
    continue_head: bool | None = field(
        default=None, metadata={"help": "Whether the logit for continuing is trained (HRM), or not (TRM)."}
    )
    tie_modules: bool | None = field(default=None, metadata={"help": "Whether one module plays both parts (TRM)."})
    grad_scope: Literal["last_step", "last_cycle", "all"] | None = field(
        default=None, metadata={"help": "Calls of the modules that receive a gradient."}
    )
    mixer: Literal["attention", "mlp"] | None = field(
        default=None, metadata={"help": "How cells exchange information."}
    )
    position: Literal["rope", "learned", "grid", "none"] | None = field(
        default=None, metadata={"help": "Positions of the cells."}
    )
    num_prefix_tokens: int | None = field(default=None, metadata={"help": "Number of tokens before the grid."})
    puzzle_emb_dim: int | None = field(default=None, metadata={"help": "Width of the puzzle embedding. 0 for none."})
    loss_type: Literal["stablemax", "softmax"] | None = field(
        default=None, metadata={"help": "Cross-entropy of the cells."}
    )

    def make_config(self, rows: "Dataset") -> "HrmGridConfig | None":
        """
        Return the config of a new model for the boards of a dataset, or `None` if a model is trained further.

        Raises:
            `ValueError`: If a model is trained further and its config would change, the dataset has no boards, or the config is
            invalid.
        """
        from ..reasoning import ARC_VOCAB, MAZE_VOCAB, HrmGridConfig, sudoku_vocab

        names = {one.name for one in fields(self)} - {one.name for one in fields(TrainingScriptArguments)}
        changed = {name: getattr(self, name) for name in sorted(names) if getattr(self, name) is not None}
        if changed.pop("model_name_or_path", None) is not None:
            if changed:
                raise ValueError(
                    f"`model_name_or_path` is set, so the model has its own config, and `{next(iter(changed))}` would have no effect. Remove "
                    "one of them."
                )
            return None
        if not len(rows) or not {"family", "height", "width"} <= {*rows.column_names}:
            raise ValueError(
                f"The training split has {len(rows):,} rows with the columns {', '.join(rows.column_names)}. Expected puzzles with `family`, "
                "`height` and `width`. Build them with `trl-hrm build-grid`."
            )
        first = rows[0]
        if first["family"] not in ("sudoku", "maze", "arc"):
            raise ValueError(f"The family of the puzzles is {first['family']!r}. Expected sudoku, maze or arc.")
        system = changed.pop("system", "hrm")
        # The cycles of `one_pass_deep` are those of the HRM that it has as many layers as
        once = {
            "loop": ("H_cycles", "L_cycles"),
            "one_pass": ("H_cycles", "L_cycles", "halt_max_steps"),
            "one_pass_deep": ("halt_max_steps",),
        }
        for name in once.get(system, ()):
            if changed.get(name, 1) != 1:
                raise ValueError(
                    f"`{name}` is {changed[name]}, but the system {system} is a control with `{name}=1`. Pass `--{name} 1`, or use another system."
                )
        vocab = {"maze": MAZE_VOCAB, "arc": ARC_VOCAB}.get(first["family"]) or sudoku_vocab(first["height"])
        config = HrmGridConfig.preset(system, vocab=vocab, height=first["height"], width=first["width"], **changed)
        if config.mixer == "mlp" and "num_attention_heads" in changed:
            raise ValueError("`num_attention_heads` has no effect with `mixer=mlp`. Remove it.")
        return config


def main(script_args, training_args):
    from trl_hrm.reasoning import HRMReasoningTrainer

    check_inputs(script_args, training_args, script_args)
    train_dataset, eval_dataset = load_splits(script_args, training_args)
    config = script_args.make_config(train_dataset)
    trainer = HRMReasoningTrainer(
        script_args.model_name_or_path if config is None else config,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.dataset_name = script_args.dataset_name  # for the model card
    trainer.accelerator.print(printable(trainer.plan()))
    if script_args.plan:
        return end_together(trainer.args, trainer)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer)


def make_parser(prog: str | None = None):
    from trl import TrlParser

    from trl_hrm.reasoning import HRMReasoningConfig

    return TrlParser((ScriptArguments, HRMReasoningConfig), prog=prog, usage=USAGE)


if __name__ == "__main__":
    # `launch` has checked that unknown keys of the YAML file are options of `accelerate launch`
    run_script(main, make_parser(), fail_with_unknown_args=False)
