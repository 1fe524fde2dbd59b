"""`python -m tests.fuzz`: see `fuzzer.py`."""

from .fuzzer import run


run()
