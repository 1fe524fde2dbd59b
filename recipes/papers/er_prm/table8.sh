# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 8 and figure 5: reward models with several
# values of eta. They are trained on MATH alone, and select solutions of Mistral-MetaMath-7b.
#
#   bash recipes/papers/er_prm/table8.sh
#   bash recipes/papers/er_prm/table8.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

DATASETS=math
search mistral math
evaluate mistral mistral math500
for eta in 0.1 1 2 5 8 10 15 20; do # paper
    reward_model mistral-math-ours-$eta-8b mistral ours-$eta $er/reward_8b.yaml
    best_of_n mistral mistral-math-ours-$eta-8b math500
done

table $er/table8.yaml
