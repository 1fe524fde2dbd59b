"""Model card of a reasoning model: task, sizes, protocol, metrics, what is known to fail, and code to solve puzzles with it."""

from typing import TYPE_CHECKING

from ..training.model_card import save_card


if TYPE_CHECKING:
    from .reasoning_trainer import HRMReasoningTrainer

# Architecture, for the table of the card
SIZES = (
    *("hidden_size", "H_layers", "L_layers", "H_cycles", "L_cycles", "halt_max_steps", "continue_head", "tie_modules"),
    *("hierarchy", "grad_scope", "mixer", "position", "num_prefix_tokens", "loss_type"),
)


def save_grid_model_card(
    trainer: "HRMReasoningTrainer",
    model_name: str,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
) -> None:
    """Write the model card of a model for grid puzzles. See [`HRMReasoningTrainer.create_model_card`]."""
    model, config = trainer.model, trainer.model.config
    table = 0 if trainer._table is None else trainer._table.numel()
    puzzle = None
    if config.vocab is not None and config.grid_vocab.name != "arc":  # 30 x 30 cells are too many for an example
        puzzle = "\n".join(config.grid_vocab.decode(trainer.rows.puzzles[0].tolist(), config.height, config.width))
    save_card(
        trainer,
        "grid_model_card.md.jinja",
        model_name,
        dataset_name,
        tags,
        license,
        task="other",
        config=config,
        family=None if config.vocab is None else config.grid_vocab.name,
        puzzle=puzzle,
        puzzle_id=next(iter(getattr(model, "puzzle_index", None) or {}), None) if config.num_puzzle_ids > 1 else None,
        sizes={name: getattr(config, name) for name in SIZES},
        num_parameters=f"{sum(p.numel() for p in model.parameters()) - table:,}",
        num_in_table=f"{table:,}",
        num_rows=f"{len(trainer.rows.puzzles):,}",
        augmented=trainer.args.augment,
        easier_share=trainer.args.easier_share,
        num_slots=f"{trainer.num_slots:,}",
        segments=trainer.args.eval_segments or config.halt_max_steps,
        ema=trainer.args.ema,
    )
