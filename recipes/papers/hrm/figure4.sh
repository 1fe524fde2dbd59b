# HRM paper (https://huggingface.co/papers/2503.13551), figure 4: KL loss and LM loss during self-training for three values of λ.
#
#   bash recipes/papers/hrm/figure4.sh
#   bash recipes/papers/hrm/figure4.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

search_trees
sft_data hrm
# The paper does not state the training set. λ = 0.5 on the HRM's set is also the policy of table 5
self_train policy-hrm hrm                               # paper: 0.5, in kl_self.yaml
self_train policy-hrm-0.001 hrm --kl_coef 0.001         # paper
self_train policy-hrm-10.0 hrm --kl_coef 10.0           # paper

table $hrm/figure4.yaml
