# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 3: reward models from Llama-3.2-3B-Instruct select
# solutions of Mistral-MetaMath-7b.
#
#   bash recipes/papers/er_prm/table3.sh
#   bash recipes/papers/er_prm/table3.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare mistral mistral 3b "ours soft hard" "gsm8k math500"

table $er/table3.yaml
