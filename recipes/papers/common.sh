# Shared code of the scripts in hrm/ and er_prm/. A script sources this file with its own arguments and then calls `stage` for
# each command. Run a script with --help for its options.

set -euo pipefail

PAPER=$(basename "$(dirname "$0")")

# Options of a script with lists of values, which it declares before this file is sourced: LISTS[NAME]=DEFAULT
declare -p LISTS &> /dev/null || declare -A LISTS=()

usage() {
    cat << END
usage: bash $0 [--dry_run] [--list] [--data DIR] [--runs DIR] [--num_gpus N]

  --dry_run     run every stage on CPU, with a small model and a few easy problems. The numbers mean nothing
  --list        print the commands of the stages without running them
  --data DIR    folder of the raw files (default: data/papers; with --dry_run, they are made in the folder of the outputs)
  --runs DIR    folder of all outputs (default: runs/papers/$PAPER or runs/papers-dry-run/$PAPER). Scripts of a paper share it
  --num_gpus N  number of GPUs (default: all)
$(for name in "${!LISTS[@]}"; do printf '  --%s "VALUE ..." (default: "%s")\n' "$name" "${LISTS[$name]}"; done)

A finished stage is not run again, and a stopped stage is resumed. The variable MODEL sets the model of a dry run (default:
HuggingFaceTB/SmolLM2-135M-Instruct).
END
}

DRY_RUN=false LIST=false DATA= RUNS= NUM_GPUS= ZERO2=() ZERO3=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry_run) DRY_RUN=true ;;
        --list) LIST=true ;;
        --data | --runs | --num_gpus)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            case $1 in --data) DATA=$2 ;; --runs) RUNS=$2 ;; --num_gpus) NUM_GPUS=$2 ;; esac
            shift
            ;;
        -h | --help) usage; exit ;;
        *)
            if [[ $1 != --?* ]] || [ -z "${LISTS[${1#--}]+found}" ]; then
                echo "$1 is not an option. bash $0 --help lists all options." >&2
                exit 2
            fi
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            LISTS[${1#--}]=$2
            shift
            ;;
    esac
    shift
done

PAPERS=$(dirname "${BASH_SOURCE[0]}")
[ -d recipes/papers ] || { echo "recipes/papers is not in $PWD. Run this script in the root of the repository." >&2; exit 2; }
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
if $DRY_RUN; then
    RUNS=${RUNS:-runs/papers-dry-run/$PAPER}
    DATA=${DATA:-$RUNS/data}
    NUM_GPUS=0
    if ! $LIST && [ ! -e "$DATA" ]; then
        python "$PAPERS/make_dry_run_data.py" --output_dir "$DATA"
    fi
else
    RUNS=${RUNS:-runs/papers/$PAPER}
    DATA=${DATA:-data/papers}
    if $LIST; then NUM_GPUS=${NUM_GPUS:-8}; fi
    NUM_GPUS=${NUM_GPUS:-$({ nvidia-smi --list-gpus 2> /dev/null || true; } | wc -l)}
    [ "$NUM_GPUS" -gt 0 ] || { echo "No GPU found. Use --dry_run to run on CPU, or set --num_gpus." >&2; exit 2; }
    # How models are trained, as options of the stages `reward` (ZERO2) and `kl-self` (ZERO3)
    ZERO2=(--accelerate_config accelerate_configs/zero2.yaml --num_processes "$NUM_GPUS")
    ZERO3=(--accelerate_config accelerate_configs/zero3.yaml --num_processes "$NUM_GPUS")
fi

# Options of each command in a dry run, after those of the stage, which they override: a small model on CPU, and few problems, samples
# and steps. The small model writes no headers of steps, so sentences are steps. A script adds the options of one stage as DRY[NAME].
POLICY="--engine transformers --engine_args {} --policy_dtype float32 --temperature 1.0 --limit 4"
SCORER="--reward_model_dtype float32"
TRAIN="--attn_implementation sdpa --dtype float32 --bf16 false --use_cpu true --gradient_checkpointing false --max_steps 2
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --save_strategy no --eval_strategy no
    --load_best_model_at_end false --logging_steps 1 --report_to none"
declare -A DRY=(
    [annotate]=$POLICY
    [evaluate]="$POLICY --n 1 2 --max_solution_tokens 40"
    [best-of-n]="$POLICY $SCORER --n 2 4 --max_solution_tokens 40"
    [step-search]="$POLICY $SCORER --limit 2 --n 2 4 --max_depth 3 --max_step_tokens 40 --segmentation sentence"
    [select-raft]="$SCORER --num_candidates 2"
    [reward]=$TRAIN
    [kl-self]="$TRAIN --max_steps 3" # the KL is 0 in the first two steps
)
# The option with the model that a command samples from or trains
declare -A MODEL_OPTION=(
    [annotate]=--policy [evaluate]=--policy [best-of-n]=--policy [step-search]=--policy
    [reward]=--model_name_or_path [kl-self]=--model_name_or_path
)

# Run one command of trl-hrm, unless it has finished before. `NUM_GPUS=1 stage ...` runs it as one process.
#   stage NAME COMMAND [OPTION ...]
stage() {
    local name=$1 command=$2 line=(trl-hrm "$2") done=$RUNS/done/$1
    shift 2
    if [ "$NUM_GPUS" -gt 1 ] && [[ $command =~ ^(annotate|evaluate|best-of-n|step-search)$ ]]; then
        # each process searches a part of the problems on its own GPU
        line=(accelerate launch --num_processes "$NUM_GPUS" --module trl_hrm.cli "$command")
    fi
    line+=("$@")
    if $DRY_RUN; then
        # shellcheck disable=SC2206  # lists of words
        line+=(${DRY[$command]:-} ${DRY[$name]:-})
        local option=${MODEL_OPTION[$command]:-}
        # a model that an earlier stage has trained is used
        if [ -n "$option" ] && [[ " $* " != *" $option $RUNS/"* ]]; then line+=("$option" "$MODEL"); fi
    fi
    if $LIST; then
        printf '%s\t%s\n' "$name" "${line[*]@Q}"
        return
    fi
    if [ -e "$done" ]; then
        if [ "$(cat "$done")" = "${line[*]@Q}" ]; then
            echo "== $name: done before"
            return
        fi
        echo "$done: stage $name has finished with other options: $(cat "$done"). Use another --runs, or delete this file and the output of the stage." >&2
        exit 1
    fi
    if [[ $command =~ ^(reward|kl-self)$ ]] && compgen -G "$(output_of "$@")/checkpoint-*" > /dev/null; then
        set -- --resume_from_checkpoint true
    else
        set --
    fi
    echo "== $name: ${line[*]@Q} $*"
    "${line[@]}" "$@"
    mkdir -p "$RUNS/done"
    printf '%s\n' "${line[*]@Q}" > "$done"
}

# Print the value of --output_dir.
output_of() {
    while [ "$1" != --output_dir ]; do shift; done
    echo "$2"
}

# Print a table of the results, beside the numbers of the paper.
#   table LAYOUT
table() {
    local name
    name=$(basename "$1" .yaml)
    local line=(trl-hrm table "$1" --runs "$RUNS" --output "$RUNS/$name.md")
    if $LIST; then
        printf '%s\t%s\n' "$name" "${line[*]@Q}"
        return
    fi
    "${line[@]}"
    if $DRY_RUN; then echo "This was a dry run. The numbers mean nothing."; fi
}
