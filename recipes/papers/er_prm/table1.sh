# ER-PRM paper (https://huggingface.co/papers/2412.11006), table 1: policies that are fine-tuned with RAFT. In each
# iteration, the policy samples 16 solutions per question, a reward model selects one of them, and the policy is trained on it.
#
#   bash recipes/papers/er_prm/table1.sh
#   bash recipes/papers/er_prm/table1.sh --learning_rates "1e-6"     # one iteration
#   bash recipes/papers/er_prm/table1.sh --dry_run --learning_rates "5e-7 3e-7"

declare -A LISTS=(
    [learning_rates]="5e-7 3.33e-7 1.67e-7" # code: one per iteration, 5e-7 times 3/3, 2/3 and 1/3
)
source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

DRY[select-raft]="$SCORER --num_candidates 2"

# 16 solutions per question
#   sample FOLDER POLICY SET PROBLEMS [OPTION ...]
sample() {
    local folder=$1 policy=$2 set=$3
    shift 3
    DRY[$folder-$set]="--num_solutions 2 --max_solution_tokens 40 --final_stops . ="
    # shellcheck disable=SC2086  # a list of words
    stage "$folder-$set" annotate --config $er/raft_samples.yaml ${POLICIES[$policy]} --exclude "${TESTS[@]}" \
        --output_dir "$RUNS/candidates/$folder-$set" --problems "$@"
    CANDIDATES+=("$RUNS/candidates/$folder-$set")
}

# The questions are the training questions, and 12,500 new ones for each of the two sets (paper, section 5.2)
#   sample_all FOLDER POLICY [OPTION ...]
sample_all() {
    local folder=$1 policy=$2 new=$DATA/openmathinstruct2/train.jsonl
    shift 2
    CANDIDATES=()
    for set in gsm8k math; do
        sample "$folder" "$policy" $set "$DATA/$set/train.jsonl" "$@"
        sample "$folder" "$policy" new-$set "$new" --where problem_source=augmented_$set --limit 12500 "$@"
    done
}

# Fine-tune a policy with a reward model of its own solutions
#   raft POLICY METHOD
raft() {
    local name=$1-raft-$2 iteration=0 folder=$1-raft last=() model=(--model_name_or_path "${HUB[$1]}")
    reward_model "$1-$2-8b" "$1" "$2" $er/reward_8b.yaml
    for rate in ${LISTS[learning_rates]}; do
        iteration=$((iteration + 1))
        # The candidates of the original policy serve all reward models
        sample_all "$folder-candidates-$iteration" "$1" "${last[@]}"
        stage "$name-data-$iteration" select-raft --config $er/select_raft.yaml --candidates "${CANDIDATES[@]}" \
            --reward_model "$RUNS/$1-$2-8b" --output_dir "$RUNS/data/$name-$iteration"
        # code: 32 sequences on each of 4 GPUs
        stage "$name-$iteration" kl-self --config recipes/raft.yaml "${model[@]}" --dataset_name "$RUNS/data/$name-$iteration" \
            --learning_rate "$rate" --output_dir "$RUNS/$name-$iteration" $(batch 128) "${ZERO2[@]}"
        folder=$name
        last=(--policy "$RUNS/$name-$iteration")
        model=(--model_name_or_path "$RUNS/$name-$iteration")
    done
    for dataset in gsm8k math500; do evaluate "$name" "$1" $dataset "${last[@]}"; done
}

for policy in mistral deepseek; do # paper
    search $policy gsm8k math
    for dataset in gsm8k math500; do evaluate $policy $policy $dataset; done
    for method in soft hard ours; do raft $policy $method; done
done
table $er/table1.yaml
