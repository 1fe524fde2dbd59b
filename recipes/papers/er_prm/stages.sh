# Stages that the scripts of the ER-PRM paper share. Each is run once for all of them.

er=recipes/papers/er_prm

declare -A HUB=(
    [mistral]=meta-math/MetaMath-Mistral-7B            # paper: Mistral-7b fine-tuned on MetaMath
    [deepseek]=deepseek-ai/deepseek-math-7b-instruct   # paper
    [deepseek-rl]=deepseek-ai/deepseek-math-7b-rl      # paper
    [openmath2]=nvidia/OpenMath2-Llama3.1-8B           # paper
)
# Each policy with the prompt of its model card. The paper states no prompts
declare -A POLICIES=(
    [mistral]="--policy ${HUB[mistral]} --prompt $er/prompts/metamath.txt --prompt_style plain"
    [deepseek]="--policy ${HUB[deepseek]} --prompt $er/prompts/deepseek_math.txt"
    [deepseek-rl]="--policy ${HUB[deepseek-rl]} --prompt $er/prompts/deepseek_math.txt"
    [openmath2]="--policy ${HUB[openmath2]} --prompt $er/prompts/openmath2.txt"
)
declare -A ETA=([mistral]=2 [deepseek]=10) # paper, section 4
TESTS=("$DATA/gsm8k/test.jsonl" "$DATA/math500/test.jsonl")

# Options for SIZE sequences per optimizer step, whatever the number of GPUs. Each GPU has 4 at a time
#   batch SIZE
processes=$((NUM_GPUS > 1 ? NUM_GPUS : 1))
batch() { echo --per_device_train_batch_size 4 --gradient_accumulation_steps $(($1 / 4 / processes)); }
if [ $((16 % processes)) != 0 ]; then
    echo "$NUM_GPUS GPUs cannot share a batch of 64 sequences. Set --num_gpus to 1, 2, 4, 8 or 16." >&2
    exit 2
fi

# Options of a dry run. Its model is a chat model, and seldom ends a solution within 40 tokens, so a stop string ends it. `best-of-n`
# has no policy: it selects from the samples of `evaluate`
DRY[annotate]+=" --prompt_style chat"
DRY[evaluate]="$POLICY --prompt_style chat --n 1 2 4 --max_solution_tokens 40"
DRY[best-of-n]="$SCORER --n 2 4"
unset 'MODEL_OPTION[best-of-n]'

# 15 solutions per training problem, with 16 rollouts from each step
#   search POLICY DATASET ...
search() {
    local policy=$1
    shift
    for dataset in "$@"; do
        DRY[$policy-search-$dataset]="--num_solutions 3 --num_completions 2 --max_solution_tokens 40 --final_stops ="
        # shellcheck disable=SC2086  # lists of words, also below
        stage "$policy-search-$dataset" annotate --config $er/search.yaml ${POLICIES[$policy]} \
            --problems "$DATA/$dataset/train.jsonl" --exclude "${TESTS[@]}" --output_dir "$RUNS/search/$policy-$dataset"
    done
}

# A reward model, trained on the solutions of a policy
#   reward_model NAME POLICY METHOD CONFIG [OPTION ...]
# METHOD is ours (with the paper's value of eta), ours-ETA, soft, hard or orm. DATASETS has the training problems.
DATASETS="gsm8k math"
reward_model() {
    local name=$1 policy=$2 method=$3 config=$4 labels runs=() data=$2
    shift 4
    case $method in
        ours) labels="--labels entropy --eta ${ETA[$policy]}" ;;
        ours-*) labels="--labels entropy --eta ${method#ours-}" ;;
        soft) labels="--labels soft" ;;            # the share of rollouts with the correct answer
        hard) labels="--labels hard" ;;            # Math-Shepherd: whether a rollout has the correct answer
        orm) labels="--labels hard --view orm" ;;  # whether the solution has the correct answer
        *) echo "$method is not a method. Use ours, ours-ETA, soft, hard or orm." >&2; exit 2 ;;
    esac
    if [ "$DATASETS" != "gsm8k math" ]; then data+=-$DATASETS; fi
    for dataset in $DATASETS; do runs+=("$RUNS/search/$policy-$dataset"); done
    stage "$data-$method-labels" export "${runs[@]}" --config $er/labels.yaml $labels --output_dir "$RUNS/data/$data-$method"
    # paper: 64 sequences per optimizer step
    stage "$name" reward --config "$config" --dataset_name "$RUNS/data/$data-$method" --output_dir "$RUNS/$name" $(batch 64) \
        "${ZERO2[@]}" "$@"
}

# 64 samples and the greedy solution of each test problem
#   evaluate NAME POLICY DATASET [OPTION ...]
evaluate() {
    local name=$1 policy=$2 dataset=$3
    shift 3
    stage "$name-$dataset" evaluate --config $er/evaluate.yaml ${POLICIES[$policy]} --problems "$DATA/$dataset/test.jsonl" \
        --output_dir "$RUNS/$name-$dataset" "$@"
}

# The best of N samples of a policy by a reward model
#   best_of_n POLICY REWARD_MODEL DATASET
best_of_n() {
    stage "$1-$3-$2" best-of-n --config $er/best_of_n.yaml --candidates "$RUNS/$1-$3/samples" --reward_model "$RUNS/$2" \
        --output_dir "$RUNS/$1-$3-$2"
}

# Reward models of one size, trained on the solutions of one policy, select solutions of this policy or another policy
#   compare POLICY DATA_POLICY SIZE "METHOD ..." "DATASET ..."
compare() {
    search "$2" gsm8k math
    for dataset in $5; do evaluate "$1" "$1" "$dataset"; done
    for method in $4; do
        reward_model "$2-$method-$3" "$2" "$method" "$er/reward_$3.yaml"
        for dataset in $5; do best_of_n "$1" "$2-$method-$3" "$dataset"; done
    done
}
