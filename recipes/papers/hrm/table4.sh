# HRM paper (https://huggingface.co/papers/2503.13551), table 4: accuracy of three policies on PRM800K for several N, with a PRM and an
# HRM that are trained on labels from tree search.
#
#   bash recipes/papers/hrm/table4.sh
#   bash recipes/papers/hrm/table4.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

mc_reward_models
# The paper does not state which DeepSeek-Math-7B. The instruct model follows the prompt
step_searches deepseek-math-7b deepseek-ai/deepseek-math-7b-instruct "${PRM800K_TEST[@]}"
NUM_GPUS=1 step_searches qwen2.5-math-72b Qwen/Qwen2.5-Math-72B-Instruct "${PRM800K_TEST[@]}" \
    --engine_args '{"tensor_parallel_size": 8, "gpu_memory_utilization": 0.85}'
step_searches qwen2.5-math-7b Qwen/Qwen2.5-Math-7B-Instruct "${PRM800K_TEST[@]}"

table $hrm/table4.yaml
