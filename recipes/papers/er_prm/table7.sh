# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 7 and figure 5: reward models with several
# values of eta. They are trained on GSM8K alone, and select solutions of Mistral-MetaMath-7b.
#
#   bash recipes/papers/er_prm/table7.sh
#   bash recipes/papers/er_prm/table7.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

DATASETS=gsm8k
search mistral gsm8k
evaluate mistral mistral gsm8k
for eta in 0.1 1 2 5 8 10 15 20; do # paper
    reward_model mistral-gsm8k-ours-$eta-8b mistral ours-$eta $er/reward_8b.yaml
    best_of_n mistral mistral-gsm8k-ours-$eta-8b gsm8k
done

table $er/table7.yaml
