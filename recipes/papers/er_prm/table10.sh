# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 10 and figure 4: reward models of Mistral data
# select solutions of deepseek-math-7b-rl, a stronger policy.
#
#   bash recipes/papers/er_prm/table10.sh
#   bash recipes/papers/er_prm/table10.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare deepseek-rl mistral 8b "ours soft hard orm" "gsm8k math500"

table $er/table10.yaml
