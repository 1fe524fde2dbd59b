# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 9 and figure 6: reward models with a regression
# head select solutions of Mistral-MetaMath-7b.
#
#   bash recipes/papers/er_prm/table9.sh
#   bash recipes/papers/er_prm/table9.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare mistral mistral 8b_regression "ours soft hard" "gsm8k math500"

table $er/table9.yaml
