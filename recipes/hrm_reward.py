"""
Train a step reward model: hierarchical (HRM), process (PRM) or outcome (ORM), depending on the dataset and the options.

    accelerate launch --config_file accelerate_configs/cpu_2proc.yaml recipes/hrm_reward.py \
        --config recipes/tiny/hrm_reward.yaml --dataset_name data/prm800k-hrm

Command-line options override the YAML file, for example `--learning_rate 3e-4`.
"""

from trl_hrm.scripts.reward import main, make_parser
from trl_hrm.scripts.training import run_script


if __name__ == "__main__":
    run_script(main, make_parser())
