# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 6 and figure 3: reward models select
# solutions of deepseek-math-7b-instruct.
#
#   bash recipes/papers/er_prm/table6.sh
#   bash recipes/papers/er_prm/table6.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare deepseek deepseek 8b "ours soft hard orm" "gsm8k math500"

table $er/table6.yaml
