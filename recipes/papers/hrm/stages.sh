# Stages that tables 4 to 6 and figure 4 share. Each is run once for all of them.

hrm=recipes/papers/hrm
HNC=(--hnc --hnc_rule per_child)                                     # code: a coin for each child until one is moved
PRM800K_TEST=("$DATA/prm800k/phase1_test.jsonl" --where label.finish_reason=solution)  # code: 90 problems

# The small model solves some of the sums if it is only asked the question
DRY[mcts]="--prompt question --prompt_style chat --segmentation sentence --extractors last_number --temperature 0.7 --num_children 4
    --max_depth 3 --max_step_tokens 40 --max_sequences 24"
DRY[sft-prm]="--min_mc_score 0.5"
DRY[sft-hrm]="--min_mc_score 0.5"

# Search trees on the questions of PRM800K, with Qwen2.5-Math-7B-Instruct
search_trees() {
    stage mcts annotate --config $hrm/mcts.yaml --problems "$DATA/prm800k/phase1_train.jsonl" --output_dir "$RUNS/mcts"
}

# A PRM trained on the trees, and an HRM trained on the trees and their node compression
mc_reward_models() {
    search_trees
    stage mcts-prm export "$RUNS/mcts" --config $hrm/mcts_steps.yaml --output_dir "$RUNS/data/mcts-prm"
    stage mcts-hrm export "$RUNS/mcts" --config $hrm/mcts_steps.yaml "${HNC[@]}" --output_dir "$RUNS/data/mcts-hrm"
    for method in prm hrm; do
        stage mc-$method reward --config recipes/qwen2.5-math-1.5b/${method}_mc_reward.yaml --dataset_name "$RUNS/data/mcts-$method" \
            --output_dir "$RUNS/mc-$method" "${ZERO2[@]}"
    done
}

# The best of N next steps of a policy with each of the two reward models
#   step_searches NAME POLICY PROBLEMS [OPTION ...]
step_searches() {
    local name=$1 policy=$2
    shift 2
    for method in prm hrm; do
        stage "$name-$method" step-search --config $hrm/step_search.yaml --policy "$policy" --reward_model "$RUNS/mc-$method" \
            --output_dir "$RUNS/$name-$method" --problems "$@"
    done
}

# The good steps of the PRM's training set, or of the HRM's
#   sft_data METHOD
sft_data() {
    local options=()
    if [ "$1" = hrm ]; then options=("${HNC[@]}"); fi
    stage "sft-$1" export "$RUNS/mcts" --config $hrm/mcts_sft.yaml "${options[@]}" --output_dir "$RUNS/data/sft-$1"
}

# Qwen2.5-Math-7B-Instruct, trained on these steps
#   self_train NAME METHOD [OPTION ...]
self_train() {
    local name=$1 method=$2
    shift 2
    stage "$name" kl-self --config recipes/qwen2.5-math-7b/kl_self.yaml --dataset_name "$RUNS/data/sft-$method" \
        --output_dir "$RUNS/$name" "${ZERO3[@]}" "$@"
}
