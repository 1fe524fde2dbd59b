"""Drop-in for `trl.experimental.prm`, which TRL removed after version 1.13. See `docs/migrating_from_trl_prm.md`."""

from .prm_config import PRMConfig
from .prm_trainer import PRMTrainer


__all__ = ["PRMConfig", "PRMTrainer"]
