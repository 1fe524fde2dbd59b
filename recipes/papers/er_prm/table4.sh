# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 4: reward models of deepseek data select
# solutions of OpenMath2-Llama3.1-8B, a stronger policy.
#
#   bash recipes/papers/er_prm/table4.sh
#   bash recipes/papers/er_prm/table4.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

compare openmath2 deepseek 8b "ours soft hard" math500

table $er/table4.yaml
