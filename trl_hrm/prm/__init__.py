"""Drop-in replacement for `trl.experimental.prm`, which was removed in TRL 1.14. See `docs/migrating_from_trl_prm.md`."""

from .prm_config import PRMConfig
from .prm_trainer import PRMTrainer


__all__ = ["PRMConfig", "PRMTrainer"]
