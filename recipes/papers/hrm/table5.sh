# HRM paper (https://huggingface.co/papers/2503.13551), table 5: self-training of Qwen2.5-Math-7B-Instruct on the good steps of the PRM's
# and of the HRM's training set. Both policies and the original one are searched with both reward models of table 4.
#
#   bash recipes/papers/hrm/table5.sh
#   bash recipes/papers/hrm/table5.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

mc_reward_models
for method in prm hrm; do
    sft_data $method
    self_train policy-$method $method
done

step_searches qwen2.5-math-7b Qwen/Qwen2.5-Math-7B-Instruct "${PRM800K_TEST[@]}" # also in table 4
for method in prm hrm; do
    step_searches qwen-7b-$method "$RUNS/policy-$method" "${PRM800K_TEST[@]}"
done
table $hrm/table5.yaml

DRY[evaluate]+=" --prompt question --prompt_style chat --extractors last_number" # as for the search trees
# ours: the policies without a reward model, before and after self-training
evaluate_policy() {
    stage "$1" evaluate --config $hrm/evaluate.yaml --policy "$2" --problems "${PRM800K_TEST[@]}" --output_dir "$RUNS/$1"
}
evaluate_policy evaluate-qwen2.5-math-7b Qwen/Qwen2.5-Math-7B-Instruct
evaluate_policy evaluate-qwen-7b-prm "$RUNS/policy-prm"
evaluate_policy evaluate-qwen-7b-hrm "$RUNS/policy-hrm"
table $hrm/table5_policies.yaml
