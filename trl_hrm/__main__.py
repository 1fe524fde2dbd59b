"""`python -m trl_hrm` is the command `trl-hrm`."""

import sys

from .cli import main


sys.exit(main())
