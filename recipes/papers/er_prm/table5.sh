# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 5 and figure 2: reward models select
# solutions of Mistral-MetaMath-7b.
#
#   bash recipes/papers/er_prm/table5.sh
#   bash recipes/papers/er_prm/table5.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare mistral mistral 8b "ours soft hard orm" "gsm8k math500"

table $er/table5.yaml
