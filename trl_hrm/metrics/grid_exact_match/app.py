"""App of the Space that shows this metric on the Hub."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("grid_exact_match.py"))))
