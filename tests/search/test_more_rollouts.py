"""More rollouts for a finished run: how they are distributed over its labels, and what the continued trees contain."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from trl_hrm import ExportConfig
from trl_hrm.data.step_labels import label_steps
from trl_hrm.io import write_json
from trl_hrm.search.log import EventLog
from trl_hrm.search.more_rollouts import FinishedRun, MoreRollouts, allocate, label_variance, open_labels
from trl_hrm.search.nodes import read_totals
from trl_hrm.search.run_folder import MANIFEST, finish_shard, node_files, shard_name
from trl_hrm.search.tree import ROOT
from trl_hrm.search.values import LeafCounts, leaf_counts, mc_scores

from .scripted import FINAL, PROMPT, RULE, SEARCHES, make_problems, read_trees, run_scripted


def write_coins(prefix, rng):
    """Write three steps, each good or bad at random, and the answer, which is right if all are good."""
    written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
    number = written.count("# Step ")
    text, written = ("\n", written) if number else ("# Step 1\n", "")
    for k in range(max(number, 1), 4):
        text += f"{rng.choice(('good', 'bad'))}\n\n" + (f"# Step {k + 1}\n" if k < 3 else "")
    return text + f"# Answer\n\n{8 if 'bad' in written + text else 7}\n# END!"


def make_run(folder, search=SEARCHES["rollouts"], problems=None, **options):
    """Write a finished run of one shard."""
    run_scripted(folder, search, problems, **options)
    finish(folder, search)
    return FinishedRun(folder)


def finish(folder, search, num_shards=1):
    """Write the manifest and the nodes of a run, as the command does."""
    manifest = {"search": search.describe(), "engine": {}, "prompt": vars(PROMPT), "steps": vars(RULE)}
    write_json(folder / MANIFEST, manifest | {"extractors": ["marker"], "grader": {}, "num_shards": num_shards})
    for shard in range(num_shards):
        finish_shard(folder, shard, num_shards)


def more(run, folder, num_samples, unit=3, where="uncertain", shard=(0, 1), is_last=True, **options):
    """Continue a finished run with the scripted policy."""
    rounds = run.rounds(run.plan(num_samples, unit, where, seed=42), unit)
    search = MoreRollouts(run.manifest["search"], FINAL, 200, unit, rounds)
    folder.mkdir(exist_ok=True)
    log, kept = folder / shard_name("log", *shard, "jsonl"), run.problems(*shard)
    if not log.exists():
        run.copy(log, kept, rounds)
    chosen = [(place, problem) for place, problem in kept if problem.problem_id in rounds]
    progress = run_scripted(folder, search, chosen, shard=shard, **options)
    if is_last:
        finish(folder, search, shard[1])
    return search, progress


def new_rollouts(before, after):
    """Return the nodes of trees that other trees do not have."""
    known = {node.node_id for tree in before.values() for node in tree.nodes}
    return [node for tree in after.values() for node in tree.nodes if node.node_id not in known]


def mean_tokens(tree, index):
    """Return the mean number of tokens after a node: of its children, and after them."""
    below = [i for i, node in enumerate(tree.nodes) if node.parent == index]
    return sum(len(tree.nodes[i].token_ids) + mean_tokens(tree, i) for i in below) / len(below) if below else 0.0


# The distribution


def test_variance_by_hand():
    """Beta(1 + c, 1 + w), and the mean over all outcomes of the variance after more rollouts."""
    assert label_variance(LeafCounts(0, 0, 0)) == pytest.approx(1 / 12)
    assert label_variance(LeafCounts(3, 4, 0)) == pytest.approx(4 * 2 / (36 * 7))
    for (correct, answered), number in itertools.product(((0, 0), (0, 4), (3, 4), (7, 9)), (1, 2, 5)):
        a, b, mean = 1 + correct, 1 + answered - correct, Fraction(0)
        for right in range(number + 1):
            p = Fraction(1)  # of `right` right outcomes, by Pólya's urn
            for k in range(number):
                p *= Fraction(a + k, 1) if k < right else Fraction(b + k - right, 1)
                p /= a + b + k
            ways = len(list(itertools.combinations(range(number), right)))
            x, y = a + right, b + number - right
            mean += ways * p * Fraction(x * y, (x + y) ** 2 * (x + y + 1))
        assert label_variance(LeafCounts(correct, answered, 0), number) == pytest.approx(float(mean))
    # 3 of 4 leaves had no answer: 8 rollouts are expected to give 8 * 2 / 5 outcomes
    assert label_variance(LeafCounts(0, 1, 3), 8) == pytest.approx(1 * 2 / (3 * 4 * (3 + 8 * 2 / 5)))


def random_counts(rng, number):
    found = []
    for _ in range(number):
        answered = rng.choice((0, 1, 4, 16))
        found.append(LeafCounts(rng.randint(0, answered), answered, rng.choice((0, 0, 0, 3))))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_no_other_distribution_has_less_variance(seed):
    """All distributions of up to 6 units over 4 labels."""
    rng = random.Random(seed)
    counts, unit, num_units = random_counts(rng, 4), rng.choice((1, 4, 16)), rng.randint(1, 6)

    def variance(units):
        return sum(label_variance(one, number * unit) for one, number in zip(counts, units, strict=True))

    found = allocate(counts, list("abcd"), num_units, unit)
    possible = [units for units in itertools.product(range(num_units + 1), repeat=4) if sum(units) == num_units]
    assert tuple(found) in possible
    assert variance(found) == pytest.approx(min(map(variance, possible)), abs=1e-12)


@pytest.mark.parametrize("where", ["uncertain", "uniform"])
def test_distribution_against_a_slow_reference(where):
    """Find the best label for every unit by comparing all of them. The order of the labels must not matter."""
    rng = random.Random(0)
    for _ in range(30):
        counts = random_counts(rng, rng.randint(1, 12))
        keys, unit = [f"{rng.random()}" for _ in counts], rng.choice((1, 8))
        expected = [0] * len(counts)
        for _ in range(rng.randint(0, 40)):
            if where == "uniform":
                gains = [-given for given in expected]
            else:
                gains = [
                    label_variance(one, given * unit) - label_variance(one, (given + 1) * unit)
                    for one, given in zip(counts, expected, strict=True)
                ]
            best = [i for i, gain in enumerate(gains) if gain == max(gains)]
            expected[min(best, key=keys.__getitem__)] += 1
        assert allocate(counts, keys, sum(expected), unit, where) == expected
        order = rng.sample(range(len(counts)), len(counts))
        shuffled = [[values[i] for i in order] for values in (counts, keys)]
        assert allocate(*shuffled, sum(expected), unit, where) == [expected[i] for i in order]


def test_certain_labels_get_less():
    counts = [LeafCounts(0, 16, 0), LeafCounts(8, 16, 0), LeafCounts(16, 16, 0), LeafCounts(0, 0, 900)]
    assert allocate(counts, list("abcd"), 4, 16) == [1, 2, 1, 0]
    assert allocate(counts, list("abcd"), 6, 16, "uniform") == [2, 2, 1, 1]


# The labels of a run


def test_labels_of_rollouts(tmp_path):
    """Every step except the last of a solution has a label, and equal steps have one label with all outcomes."""
    run = make_run(tmp_path, SEARCHES["rollouts"], make_problems(20), script=write_coins)
    trees = read_trees(tmp_path)
    found = {step.node_id for label in run.labels for step in label.steps}
    united = 0
    for tree in trees.values():
        counts, children = leaf_counts(tree), tree.children()
        for i, node in enumerate(tree.nodes):
            is_inner = node.role == "segment" and any(tree.nodes[k].role == "segment" for k in children[i])
            assert (node.node_id in found) == is_inner
    for label in run.labels:
        tree = trees[label.problem_id]
        index = {node.node_id: i for i, node in enumerate(tree.nodes)}
        texts = {tuple(tree.step_text(k) for k in tree.path(index[step.node_id])) for step in label.steps}
        assert len(texts) == 1
        counts = leaf_counts(tree)
        [path] = texts
        same = [
            i
            for i, node in enumerate(tree.nodes)
            if node.role == "segment" and tuple(tree.step_text(k) for k in tree.path(i)) == path
        ]
        assert label.counts == tuple(sum(counts[i][k] for i in same) for k in range(3))
        after = [mean_tokens(tree, i) for i in same if tree.children()[i]]
        assert label.tokens == pytest.approx(sum(after) / len(after))
        assert all(step.round == 1 for step in label.steps)
        united += len(same) > 1
    assert united > 20


@pytest.mark.parametrize("name", ["full_tree", "narrow"])
def test_labels_of_full_trees(tmp_path, name):
    """A step that was dropped at random is represented by its siblings, whose weights would count it twice."""
    run = make_run(tmp_path, SEARCHES[name], make_problems(20))
    found = {step.node_id for label in run.labels for step in label.steps}
    dropped = cut_by_depth = 0
    for tree in read_trees(tmp_path).values():
        children = tree.children()
        for i, node in enumerate(tree.nodes):
            is_open = node.finish == "stop" and not node.is_final
            is_thinned = any(tree.nodes[k].weight > 1 for k in children[node.parent])
            is_dropped = is_open and is_thinned and not children[i] and node.weight == 1
            assert (node.node_id in found) == (is_open and not is_dropped)
            dropped += is_dropped
            cut_by_depth += is_open and not is_dropped and not children[i]
    assert cut_by_depth > 5 and (dropped > 5) == (name == "narrow")


def test_problems_that_were_filtered_get_nothing(tmp_path):
    run = make_run(tmp_path, SEARCHES["filtered"], make_problems(20))
    statuses = {name: tree.status for name, tree in read_trees(tmp_path).items()}
    assert set(statuses.values()) > {"done"}
    found = {label.problem_id for label in run.labels}
    assert len(found) > 3 and {statuses[name] for name in found} == {"done"}


def test_solutions_without_completions_get_labels(tmp_path):
    run = make_run(tmp_path / "a", replace(SEARCHES["rollouts"], num_completions=0))
    assert all(label.counts == (0, 0, 0) and label.steps[0].round == 0 for label in run.labels)
    number = len(run.labels)
    more(run, tmp_path / "b", 3 * number, where="uniform")
    for label in FinishedRun(tmp_path / "b").labels:
        assert label.counts.answered + label.counts.unresolved == 3


# Continued runs


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("where", ["uncertain", "uniform"])
def test_a_continued_run(tmp_path, name, where):
    """The old trees stay, and each planned rollout is below its step, in a new round, with a new seed."""
    problems = make_problems(8)
    run = make_run(tmp_path / "a", SEARCHES[name], problems)
    logged = (tmp_path / "a" / "log-00000-of-00001.jsonl").read_bytes()
    search, progress = more(run, tmp_path / "b", 200, where=where)
    before, after = read_trees(tmp_path / "a"), read_trees(tmp_path / "b")
    assert list(after) == list(before) and progress.num_sequences == 198
    found = new_rollouts(before, after)
    planned = sum(len(rounds) for one in search.rounds.values() for rounds in one.values())
    assert len(found) == 3 * planned == 198 and {node.role for node in found} == {"rollout"}
    seeds = [node.seed for tree in after.values() for node in tree.nodes if node.role in ("step", "rollout")]
    assert len(set(seeds)) == len(seeds)
    for problem_id, tree in after.items():
        old = before[problem_id]
        kept = {node.node_id: node for node in tree.nodes}
        for node in old.nodes:
            same = kept[node.node_id]
            names = ("text", "token_ids", "weight", "correct", "round", "seed", "role")
            assert all(getattr(same, name) == getattr(node, name) for name in names)
        assert tree.status == old.status
    assert (tmp_path / "a" / "log-00000-of-00001.jsonl").read_bytes() == logged
    totals = [read_totals(node_files(tmp_path / folder)) for folder in "ab"]
    assert totals[1]["num_nodes"] - totals[0]["num_nodes"] == 198
    for estimator in ("child_mean", "leaf_share"):
        for tree in after.values():
            counts, children = leaf_counts(tree), tree.children()
            for i, score in enumerate(mc_scores(tree, estimator)[:-1]):
                sampled = [tree.nodes[k] for k in children[i] if tree.nodes[k].is_sample]
                if sampled and all(one.role == "rollout" for one in sampled):
                    graded = [one.correct for one in sampled if one.correct is not None]
                    assert score == (sum(graded) / len(graded) if graded else None)
                    assert counts[i].answered == len(graded)


def test_twice_continued(tmp_path):
    """The second run must not repeat the samples of the first one, and counts them."""
    make_run(tmp_path / "a", problems=make_problems(3))
    for source, target in ("ab", "bc"):
        more(FinishedRun(tmp_path / source), tmp_path / target, 600)
    trees = [read_trees(tmp_path / folder) for folder in "abc"]
    assert [len(new_rollouts(trees[i], trees[i + 1])) for i in (0, 1)] == [600, 600]
    seeds = [node.seed for tree in trees[2].values() for node in tree.nodes if node.role == "rollout"]
    assert len(set(seeds)) == len(seeds)
    rounds = Counter(node.round for node in new_rollouts(trees[1], trees[2]))
    assert max(rounds) > 2 and 0 not in rounds
    # both the first and the second plan give the certain labels least
    variances = [[label_variance(label.counts) for label in FinishedRun(tmp_path / folder).labels] for folder in "abc"]
    assert max(variances[0]) > max(variances[1]) > max(variances[2])


def test_another_seed_samples_other_rollouts(tmp_path):
    run = make_run(tmp_path / "a")
    for folder, seed in (("b", 42), ("c", 7)):
        more(run, tmp_path / folder, 90, seed=seed)
    trees = [read_trees(tmp_path / folder) for folder in "abc"]
    one, other = ({node.node_id: node.seed for node in new_rollouts(trees[0], tree)} for tree in trees[1:])
    assert one.keys() == other.keys() and not set(one.values()) & set(other.values())


def test_shards_get_the_same_rollouts(tmp_path):
    """The distribution is over all problems, so it is the same for any number of shards."""
    run = make_run(tmp_path / "a", problems=make_problems(12))
    more(run, tmp_path / "one", 240)
    for shard in range(3):
        more(run, tmp_path / "three", 240, shard=(shard, 3), is_last=shard == 2)
    assert read_trees(tmp_path / "three") == read_trees(tmp_path / "one")
    again = FinishedRun(tmp_path / "three")
    assert again.identity | {"digest": None} == FinishedRun(tmp_path / "one").identity | {"digest": None}
    more(again, tmp_path / "four", 120)
    more(FinishedRun(tmp_path / "one"), tmp_path / "five", 120)
    assert read_trees(tmp_path / "four") == read_trees(tmp_path / "five")


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_killed_run_is_resumed(tmp_path, cut):
    """A kill leaves the copied log with some of the new events."""
    run = make_run(tmp_path / "a", problems=make_problems(5))
    more(run, tmp_path / "whole", 150)
    copied = (tmp_path / "a" / "log-00000-of-00001.jsonl").stat().st_size
    log = (tmp_path / "whole" / "log-00000-of-00001.jsonl").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "log-00000-of-00001.jsonl").write_bytes(log[: copied + int(cut * (len(log) - copied))])
    _, progress = more(run, tmp_path / "cut", 150)
    assert 0 < progress.num_sequences < 150
    name = "nodes-00000-of-00001.parquet"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    _, progress = more(run, tmp_path / "cut", 150)
    assert progress.num_sequences == 0


def test_equal_steps_share_a_label(tmp_path):
    """A label that is the mean over several nodes gets its rollouts where there are fewest outcomes."""
    run = make_run(tmp_path / "a", SEARCHES["rollouts"], make_problems(3), script=same_first)
    label = max(run.labels, key=lambda label: len(label.steps))
    assert len(label.steps) == 4 and label.counts.answered == 12
    [units] = [[5 * (one is label) for one in run.labels]]
    rounds = run.rounds(units, 3)[label.problem_id]
    assert sorted(map(len, rounds.values())) == [1, 1, 1, 2]


def same_first(prefix, rng):
    """Write the same first step in all solutions, then a random one."""
    written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
    number = written.count("# Step ")
    text = "" if number else "# Step 1\nBegin.\n\n# Step 2\n"
    return text + ("\n" if number else "") + f"Go {rng.randrange(1000)}.\n\n# Answer\n\n{rng.choice((7, 8))}\n# END!"


def test_full_context_gets_no_rollouts(tmp_path):
    """A request without samples would be repeated in each continued run."""
    run = make_run(tmp_path / "a")
    [label] = run.labels[:1]
    log = EventLog(tmp_path / "a" / "log-00000-of-00001.jsonl")
    opened = log.read(label.problem_id)
    for step in label.steps:
        opened.brought[step.node_id, step.round] = []
    assert (
        label not in open_labels(opened)
        and len(open_labels(log.read(label.problem_id))) == len(open_labels(opened)) + 1
    )


# What is refused


def test_unfinished_runs_are_refused(tmp_path):
    make_run(tmp_path)
    log = tmp_path / "log-00000-of-00001.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="shards 0 have not finished"):
        FinishedRun(tmp_path)
    finish_shard(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="shards 0 have not finished"):
        FinishedRun(tmp_path)


def test_step_searches_are_refused(tmp_path):
    search = SEARCHES["rollouts"]
    run_scripted(tmp_path, search)
    finish(tmp_path, search)
    manifest = {"search": {"search": "beam_search"}, "engine": {}, "prompt": vars(PROMPT), "steps": vars(RULE)}
    write_json(tmp_path / MANIFEST, manifest | {"extractors": [], "grader": {}, "num_shards": 1})
    with pytest.raises(ValueError, match="guided by a reward model"):
        FinishedRun(tmp_path)


def test_a_run_without_open_steps_is_refused(tmp_path):
    def at_once(prefix, rng):
        return "# Step 1\ngo\n\n# Answer\n\n7\n# END!"

    with pytest.raises(ValueError, match="no step can get more rollouts"):
        make_run(tmp_path, script=at_once)


def test_failed_problems_are_left_out(tmp_path):
    """They have no labels, and the continued run would sample their missing steps with another search."""
    run = make_run(tmp_path / "a", problems=make_problems(4))
    lines = (tmp_path / "a" / "log-00000-of-00001.jsonl").read_text().splitlines()
    changed = [line.replace('"status": "done"', '"status": "error"') if '"p001"' in line and '"close"' in line else line for line in lines]  # fmt: skip
    (tmp_path / "a" / "log-00000-of-00001.jsonl").write_text("".join(f"{line}\n" for line in changed))
    finish_shard(tmp_path / "a", 0, 1)
    run = FinishedRun(tmp_path / "a")
    assert run.num_failed == 1 and "p001" not in {label.problem_id for label in run.labels}
    more(run, tmp_path / "b", 60)
    assert sorted(read_trees(tmp_path / "b")) == ["p000", "p002", "p003"]


@pytest.mark.slow
def test_accurate_where_it_matters(tmp_path):
    """In a world of coins, the value of a step is known. The mean squared error of labels falls more with `uncertain`."""
    search = replace(SEARCHES["rollouts"], num_solutions=6, num_completions=4)
    run = make_run(tmp_path / "a", search, make_problems(60), script=write_coins)

    def error(folder):
        errors = []
        for tree in read_trees(folder).values():
            labels = label_steps(tree, ExportConfig(inputs=["run"], output_dir="data"), Counter())[0]
            for i, label in enumerate(labels.labels):
                texts = [labels.completions[k] for k in labels.path(i)]
                if not any("Answer" in text for text in texts):  # one toss for each step after it, and one more
                    value = 0.0 if any("bad" in text for text in texts) else 0.5 ** (4 - len(texts))
                    errors.append((label - value) ** 2)
        return sum(errors) / len(errors)

    errors = {"before": error(tmp_path / "a")}
    for where in ("uncertain", "uniform"):
        more(run, tmp_path / where, 2000, unit=4, where=where, script=write_coins)
        errors[where] = error(tmp_path / where)
    assert errors["uncertain"] < 0.9 * errors["uniform"] < 0.6 * errors["before"]
    assert all(
        node.parent != ROOT for node in new_rollouts(read_trees(tmp_path / "a"), read_trees(tmp_path / "uniform"))
    )
