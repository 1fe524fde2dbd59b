# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 2: reward models from Llama-3.2-1B-Instruct select
# solutions of Mistral-MetaMath-7b.
#
#   bash recipes/papers/er_prm/table2.sh
#   bash recipes/papers/er_prm/table2.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare mistral mistral 1b "ours soft hard" "gsm8k math500"

table $er/table2.yaml
