# HRM paper (https://huggingface.co/papers/2503.13551), table 3: accuracy of Qwen2.5-Math-72B-Instruct on PRM800K for several N, with
# an ORM, a PRM and an HRM that are trained on the human labels of PRM800K, phase 1.
#
#   bash recipes/papers/hrm/table3.sh
#   bash recipes/papers/hrm/table3.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"

hrm=recipes/papers/hrm
policy=Qwen/Qwen2.5-Math-72B-Instruct                                # paper
test=("$DATA/prm800k/phase1_test.jsonl" --where label.finish_reason=solution)  # code: 90 problems

for view in orm prm hrm; do
    stage "prm800k-$view" build-prm800k "$DATA/prm800k/phase1_train.jsonl" --config $hrm/prm800k.yaml --view $view \
        --output_dir "$RUNS/data/prm800k-$view"
    stage "$view" reward --config recipes/qwen2.5-math-1.5b/${view}_reward.yaml --dataset_name "$RUNS/data/prm800k-$view" \
        --output_dir "$RUNS/$view" "${ZERO2[@]}"
done

# The policy needs all GPUs, so one process searches all problems
NUM_GPUS=1 stage table3-orm best-of-n --config $hrm/table3_best_of_n.yaml --problems "${test[@]}" --policy $policy \
    --reward_model "$RUNS/orm" --output_dir "$RUNS/table3-orm"
for view in prm hrm; do
    NUM_GPUS=1 stage table3-$view step-search --config $hrm/table3_step_search.yaml --problems "${test[@]}" --policy $policy \
        --reward_model "$RUNS/$view" --output_dir "$RUNS/table3-$view"
done

table $hrm/table3.yaml
