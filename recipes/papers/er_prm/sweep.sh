# Search for eta and the learning rate, as in the ER-PRM paper (https://huggingface.co/papers/2412.11006), section 4: a reward model for each pair
# of values selects solutions of the policy that its training data are from. The results are collected into one table.
#
#   bash recipes/papers/er_prm/sweep.sh
#   bash recipes/papers/er_prm/sweep.sh --etas "0.1 2" --learning_rates "1e-6" --policies "mistral deepseek"
#   bash recipes/papers/er_prm/sweep.sh --dry_run --etas "1 2" --learning_rates "1e-6 5e-7"

declare -A LISTS=(
    [etas]="0.1 1 2 5 8 10 15"             # paper
    [learning_rates]="5e-6 2e-6 1e-6 5e-7" # paper
    [policies]="mistral"
)
source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

layout=$RUNS/sweep.yaml
$LIST || mkdir -p "$RUNS"
$LIST || cat > "$layout" << END
title: "ER-PRM: search for eta and the learning rate"
source: https://huggingface.co/papers/2412.11006
unit: percent
num_problems: {GSM8K: 1319, MATH500: 500}
points_in: rows
points: [4, 8, 16, 32, 64]
series:
END
for policy in ${LISTS[policies]}; do
    search "$policy" gsm8k math
    for dataset in gsm8k math500; do evaluate "$policy" "$policy" $dataset; done
    for eta in ${LISTS[etas]}; do
        for rate in ${LISTS[learning_rates]}; do
            model=$policy-ours-$eta-lr-$rate-8b
            reward_model "$model" "$policy" "ours-$eta" $er/reward_8b.yaml --learning_rate "$rate"
            for dataset in gsm8k math500; do
                best_of_n "$policy" "$model" $dataset
                $LIST || cat >> "$layout" << END
  - label: [${dataset^^}, $policy, "eta=$eta, learning rate $rate"]
    results: $policy-$dataset-$model
    curve: best_of_n/min
END
            done
        done
    done
done

table "$layout"
