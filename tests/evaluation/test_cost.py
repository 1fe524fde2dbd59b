"""The cost reported in a result."""

from collections import Counter

from trl_hrm.evaluation.best_of_n import SampleCost, total_cost
from trl_hrm.search.run_folder import Shard
from trl_hrm.search.scheduler import Progress


def test_the_cost_of_a_killed_start_is_unknown(tmp_path):
    """Its seconds were never written, so a sum without them would be too small."""
    shard, log = Shard(0, 1), tmp_path / "log-00000-of-00001.jsonl"
    log.write_text("a" * 10)
    cost = SampleCost(tmp_path, Shard(1, 2))
    assert cost.is_known  # of another shard
    progress = Progress(num_problems=1, num_requests=2, num_sequences=8, generated_tokens=100)
    log.unlink()
    cost = SampleCost(tmp_path, shard)
    log.write_text("a" * 10)
    cost.end(progress)
    again = SampleCost(tmp_path, shard)
    assert again.is_known and again.costs["num_tokens"] == 100
    log.write_text("a" * 30)
    killed = SampleCost(tmp_path, shard)
    assert not killed.is_known
    killed.end(progress)
    assert not SampleCost(tmp_path, shard).is_known
    counts = Counter(policy_tokens=7, num_candidates=3)
    found = total_cost(tmp_path, counts)["policy"]
    assert found == {"seconds": None, "num_tokens": 7, "num_requests": None, "num_sequences": 3}


def test_the_cost_of_several_shards_is_their_sum(tmp_path):
    for index in range(3):
        cost = SampleCost(tmp_path, Shard(index, 3))
        cost.end(Progress(num_problems=1, num_requests=2, num_sequences=8, generated_tokens=10**index))
    found = total_cost(tmp_path, Counter())["policy"]
    assert (found["num_tokens"], found["num_requests"], found["num_sequences"]) == (111, 6, 24) and found[
        "seconds"
    ] > 0
