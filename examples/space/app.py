"""
A Hugging Face Space that shows the scores of the steps of solutions, for the reward models in the variable `REWARD_MODEL`.

Set the variable in the settings of the Space: one or several Hub ids, separated by spaces. `SPANS` is for models that were trained on
merged steps, such as `1 2`.
"""

import os

from trl_hrm import AppConfig, app


app(
    AppConfig(
        reward_model=os.environ.get("REWARD_MODEL", "Qwen/Qwen2.5-Math-PRM-7B").split(),
        reward_model_dtype="bfloat16",
        spans=[int(word) for word in os.environ.get("SPANS", "1").split()],
        host="0.0.0.0",
    )
)
