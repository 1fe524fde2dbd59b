"""
Train a policy on its best trajectories, held near a reference by a log-scaled KL divergence (KL self-training). With
`kl_coef: 0` it is supervised fine-tuning, the last step of RAFT.

    accelerate launch recipes/kl_self.py --config recipes/tiny/kl_self.yaml

Every setting of the YAML can be overridden on the command line, for example `--kl_coef 0.01`.
"""

from trl_hrm.scripts.kl_self import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
