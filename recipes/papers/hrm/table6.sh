# HRM paper (https://huggingface.co/papers/2503.13551), table 6: accuracy on GSM8K and MATH500 for several N, with the reward models of
# table 4.
#
#   bash recipes/papers/hrm/table6.sh
#   bash recipes/papers/hrm/table6.sh --dry_run

source "$(dirname "$0")/../common.sh" "$@"
source "$(dirname "$0")/stages.sh"

mc_reward_models
# The paper does not state the policy. Qwen2.5-Math-7B-Instruct has sampled the training data
for dataset in gsm8k math500; do
    step_searches $dataset Qwen/Qwen2.5-Math-7B-Instruct "$DATA/$dataset/test.jsonl"
done

table $hrm/table6.yaml
