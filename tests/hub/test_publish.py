"""Publish built datasets: users load what was built, and a push sends only what is missing."""

import json

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi

from trl_hrm.cli import main
from trl_hrm.hub import PushError

from .publishing import (
    VIEWS,
    build,
    build_row_groups,
    card_of,
    commits_of,
    features_of,
    files_of,
    local,
    published,
    push_folders,
    rows_of,
    writes,
)


DATA = ("test-00000-of-00001.parquet", "train-00000-of-00001.parquet")


def edit_card(repo: str, change) -> None:
    """Edit the card as a user would on the Hub's page."""
    card = change(card_of(repo)).encode()
    HfApi().create_commit(repo, [CommitOperationAdd("README.md", card)], commit_message="Edit", repo_type="dataset")


@pytest.mark.parametrize("view", VIEWS)
def test_round_trip(hub, repo, uses_xet, tmp_path, view):
    """A column with another type, or a split without one of its rows, would still train."""
    folder = build(tmp_path / view, view)
    expected = local(folder)
    start = len(hub.log)
    push_folders(folder, repo, private=True)
    # the rows must use the intended protocol, not only arrive
    assert (hub.count("POST", "^/cas/v1/shards", start) > 0) == uses_xet
    assert (hub.count("PUT", "^/_put/", start) > 0) == (not uses_xet)
    found = published(repo, view, tmp_path)
    assert set(found) == {"train", "test"}
    assert rows_of(found) == rows_of(expected)
    assert features_of(found) == features_of(expected)
    streamed = published(repo, view, tmp_path, streaming=True)
    assert rows_of(streamed) == rows_of(expected)
    assert features_of(streamed) == features_of(expected)
    assert HfApi().dataset_info(repo).private is True


def test_configurations_in_one_repository(hub, repo, tmp_path):
    """The push of the datasets library can wipe the metadata of another configuration."""
    folders = {view: build(tmp_path / view, view, word=view) for view in ("tree", "hrm", "raft")}
    push_folders([folders["tree"], folders["hrm"]], repo)
    push_folders(folders["raft"], repo)
    assert commits_of(repo) == ["Push raft with trl_hrm", "Push tree, hrm with trl_hrm", "initial commit"]
    assert datasets.get_dataset_config_names(repo) == ["hrm", "raft", "tree"]
    for view, folder in folders.items():
        assert rows_of(published(repo, view, tmp_path)) == rows_of(local(folder))
    assert files_of(repo) == [
        ".gitattributes",
        "README.md",
        *(
            f"{view}/{name}"
            for view in ("hrm", "raft", "tree")
            for name in ("build_report.json", *["scores.png"] * (view == "raft"), *DATA)
        ),
    ]
    card = card_of(repo)
    assert "![Scores of all scored candidates and of the selected ones](raft/scores.png)" in card
    for view in folders:
        assert f'dataset = load_dataset("{repo}", "{view}")' in card
        report = json.loads((folders[view] / "build_report.json").read_text())
        assert report["command"] in card
    info = DatasetCard(card).data.dataset_info
    assert [(config["config_name"], [split["num_examples"] for split in config["splits"]]) for config in info] == [
        ("hrm", [19, 5]),
        ("raft", [19, 5]),
        ("tree", [19, 5]),
    ]


@pytest.mark.usefixtures("uses_xet")
def test_pushing_again(hub, repo, tmp_path):
    """A second push that sends everything again, or makes an empty commit, would cost hours and hide what changed."""
    folder = build(tmp_path / "tree")
    first = push_folders(folder, repo)
    assert list(first.sent) == [f"tree/{DATA[1]}", f"tree/{DATA[0]}", "tree/build_report.json", "README.md"]
    start = len(hub.log)
    again = push_folders(folder, repo)
    assert (again.commit, again.sent, again.deleted) == (first.commit, {}, [])
    assert again.unchanged == first.sent
    assert writes(hub, start) == []
    assert str(again).endswith(f"tree on {repo} is already up to date. {hub.base}/datasets/{repo}/tree/main")
    # other rows in one configuration; the other configuration must not change
    push_folders(build(tmp_path / "prm", "prm"), repo)
    changed = push_folders(build(tmp_path / "tree", word="thus"), repo)
    assert list(changed.sent) == list(first.sent)
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(tmp_path / "tree"))
    assert rows_of(published(repo, "prm", tmp_path)) == rows_of(local(tmp_path / "prm"))


def test_text_of_users_stays(hub, repo, tmp_path):
    """Regenerating the card at each push would delete what users wrote into it, and go unnoticed."""
    push_folders(build(tmp_path / "tree"), repo)

    def edit(card: str) -> str:
        card = card.replace(
            "pretty_name: Step trees", "pretty_name: Ours\nlicense: cc-by-4.0\nsize_categories:\n- n<1K"
        )
        card = card.replace("tags:\n- trl\n", "tags:\n- ours\n")
        head, begin, rest = card.partition("<!-- trl_hrm: config tree begins")
        return head + "Words above.\n\n## Thanks\n\nTo all.\n\n" + begin + rest + "\n## Below\n\nMore words.\n"

    edit_card(repo, edit)
    before = card_of(repo)
    push_folders(build(tmp_path / "tree", word="thus", rows=30), repo)
    after = card_of(repo)
    assert before.partition("\n---\n")[2].replace("| 24 |", "| 30 |") != before  # the generated part had to change
    head, tail = (
        "Words above.\n\n## Thanks\n\nTo all.\n\n<!-- trl_hrm: config tree begins",
        "\n## Below\n\nMore words.\n",
    )
    assert head in after and after.endswith(tail)
    assert "thus 1." in after and "so 1." in before and "so 1." not in after
    data = DatasetCard(after).data
    assert (data.pretty_name, data.license, data.size_categories) == ("Ours", "cc-by-4.0", ["n<1K"])
    assert data.tags == ["ours", "trl_hrm", "stepwise-supervision", "tree"]
    assert [split["num_examples"] for split in data.dataset_info["splits"]] == [24, 6]
    push_folders(build(tmp_path / "prm", "prm"), repo)
    both = card_of(repo)
    assert head in both and tail in both
    assert DatasetCard(both).data.tags == ["ours", "trl_hrm", "stepwise-supervision", "tree", "trl", "prm"]


def test_broken_markers(hub, repo, tmp_path):
    """With one of the two marker comments missing, the text below would be removed as if generated."""
    push_folders(build(tmp_path / "tree"), repo)
    edit_card(repo, lambda card: card.replace("<!-- trl_hrm: config tree ends. -->", ""))
    start = len(hub.log)
    with pytest.raises(ValueError, match="found 1 comments .* and 0"):
        push_folders(build(tmp_path / "tree", word="thus"), repo)
    assert writes(hub, start) == []


def test_metadata_that_is_not_yaml(hub, repo, tmp_path):
    """A card whose metadata cannot be read would be replaced by one with only our metadata."""
    HfApi().create_repo(repo, repo_type="dataset")
    card = b"---\nconfigs: 3\n---\n# Mine\n"
    HfApi().create_commit(repo, [CommitOperationAdd("README.md", card)], commit_message="Card", repo_type="dataset")
    with pytest.raises(ValueError, match=f"README.md of {repo}: invalid metadata"):
        push_folders(build(tmp_path / "tree"), repo)


def test_dry_run(hub, repo, tmp_path):
    """A dry run must send no request, whether or not the repository exists, and list what the first push sends."""
    folder = build(tmp_path / "tree")
    start = len(hub.log)
    push = push_folders(folder, repo, private=True, dry_run=True)
    assert len(hub.log) == start and push.commit is None
    sizes = {f"tree/{name}": (folder / "data" / name).stat().st_size for name in DATA}
    assert sizes.items() <= push.sent.items()
    pushed = push_folders(folder, repo)
    assert push.sent == pushed.sent
    assert card_of(repo) == push.card
    start = len(hub.log)
    again = push_folders(folder, repo, private=True, dry_run=True)  # all files, even those already pushed
    assert len(hub.log) == start and again == push
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(folder))


@pytest.mark.usefixtures("uses_xet")
def test_shards(hub, repo, tmp_path, monkeypatch):
    """Shards left from an earlier push would be read with the new ones, and duplicate their rows."""
    folder = build_row_groups(tmp_path / "prm", monkeypatch, num_groups=4)
    push = push_folders(folder, repo, max_shard_size=1)
    total = pq.read_metadata(folder / "data" / "train-00000-of-00001.parquet").num_row_groups
    shards = [f"prm/train-{i:05d}-of-{total:05d}.parquet" for i in range(total)]
    assert [path for path in push.sent if path.startswith("prm/train")] == shards
    expected = rows_of(local(folder))
    assert rows_of(published(repo, "prm", tmp_path)) == expected
    again = push_folders(folder, repo, max_shard_size=1)  # the same bytes, so nothing to send
    assert again.sent == {}
    whole = push_folders(folder, repo)
    assert set(shards) <= set(whole.deleted)
    assert files_of(repo) == [
        ".gitattributes",
        "README.md",
        "prm/build_report.json",
        *(f"prm/{name}" for name in DATA),
    ]
    assert rows_of(published(repo, "prm", tmp_path)) == expected


def test_other_files_stay(hub, repo, tmp_path):
    """A push must replace only the rows of its own configuration."""
    push_folders(build(tmp_path / "tree"), repo)
    others = ["tree/notes.md", "tree/more/train-00000-of-00001.parquet", "tree2/train-00000-of-00001.parquet"]
    operations = [CommitOperationAdd(path, b"x") for path in others]
    HfApi().create_commit(repo, operations, commit_message="More", repo_type="dataset")
    push_folders(build(tmp_path / "tree", word="thus"), repo)
    assert set(others) <= set(files_of(repo))


def test_push_that_would_break_loading(hub, repo, tmp_path):
    """`load_dataset` reads all configurations in one file format, so one of the two would become garbage."""
    HfApi().create_repo(repo, repo_type="dataset")
    rows = CommitOperationAdd("mine.jsonl", b'{"a": 1}\n')
    HfApi().create_commit(repo, [rows], commit_message="Mine", repo_type="dataset")
    folder = build(tmp_path / "tree")
    card = b"---\nconfigs:\n- config_name: mine\n  data_files:\n  - split: train\n    path: mine.*\n---\n# Mine\n"
    for words in (
        "has data that is in no configuration of its card, such as mine.jsonl",
        "a configuration mine with files such as mine.jsonl",
    ):
        start = len(hub.log)
        with pytest.raises(ValueError, match=f"{repo} .*{words}"):
            push_folders(folder, repo)
        assert writes(hub, start) == []
        assert rows_of(published(repo, None, tmp_path)) == {"train": [{"a": 1}]}
        edit = CommitOperationAdd("README.md", card)
        HfApi().create_commit(repo, [edit], commit_message="Name it", repo_type="dataset")


def test_next_to_a_dataset_pushed_by_datasets(hub, repo, tmp_path):
    """Its metadata has other forms: a pattern without a file ending, and a `dataset_info` that is not a list."""
    mine = datasets.DatasetDict(train=datasets.Dataset.from_list([{"a": 1}]))
    mine.push_to_hub(repo, "mine")
    mine.push_to_hub(repo)
    push_folders(build(tmp_path / "tree"), repo)
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(tmp_path / "tree"))
    for name in ("mine", None):
        assert rows_of(published(repo, name, tmp_path)) == rows_of(mine)


def test_names_and_branches(hub, repo, tmp_path):
    folder = build(tmp_path / "tree")
    push_folders(folder, repo, config_name="math-500", revision="draft")
    assert files_of(repo) == [".gitattributes"]
    found = published(repo, "math-500", tmp_path, revision="draft")
    assert rows_of(found) == rows_of(local(folder))
    with pytest.raises(ValueError, match="tree.*`config_name`"):
        push_folders([folder, build(tmp_path / "other", word="thus")], repo)
    with pytest.raises(ValueError, match="`config_name` is 'x'"):
        push_folders([folder, build(tmp_path / "prm", "prm")], repo, config_name="x")


@pytest.mark.usefixtures("uses_xet")
def test_command(hub, repo, tmp_path, capfd):
    """Run the README's command and load the result. Its progress bar must show the remaining time."""
    folder = build(tmp_path / "prm800k-hrm", "hrm")
    capfd.readouterr()
    assert main(["push-dataset", str(folder), "--repo_id", repo, "--private", "--dry_run"]) == 0
    output = capfd.readouterr().out
    assert (
        "Dry run: nothing was uploaded, and the Hub was not contacted." in output
        and f"A push of hrm to {repo}, branch main" in output
    )
    assert main(["push-dataset", str(folder), "--repo_id", repo, "--private"]) == 0
    output = capfd.readouterr()
    assert f"Pushed hrm to {repo}: 4 files, " in output.out
    assert (
        f"{repo}: 4 files: 100%" in output.err and "[00:00<00:00, " in output.err
    )  # huggingface_hub's bars do not show the remaining time
    assert rows_of(published(repo, "hrm", tmp_path)) == rows_of(local(folder))
    assert main(["push-dataset", str(tmp_path), "--repo_id", repo]) == 1
    assert "error: " in capfd.readouterr().err


@pytest.mark.parametrize(("rule", "ignored"), [("*.parquet", "tree/train-"), ("*.json", "tree/build_report.json")])
def test_a_gitignore_in_the_repository(hub, repo, tmp_path, rule, ignored):
    """The Hub silently drops ignored files from a commit, so the card would list rows that do not exist."""
    folder = build(tmp_path / "tree")
    HfApi().create_repo(repo, repo_type="dataset")
    rules = CommitOperationAdd(".gitignore", f"{rule}\n".encode())
    HfApi().create_commit(repo, [rules], commit_message="Ignore", repo_type="dataset")
    with pytest.raises(ValueError, match=f"{repo}: its .gitignore matches {ignored}"):
        push_folders(folder, repo)
    assert commits_of(repo) == ["Ignore", "initial commit"]


def test_a_card_that_the_hub_refuses(hub, repo, tmp_path):
    """After hours of upload, an error in JSON without the file's name would help no user."""
    hub.fault("POST", "/validate-yaml", 400, body={"errors": [{"message": '"license" must be one of ...'}]})
    start = len(hub.log)
    with pytest.raises(ValueError, match=f"README.md.*{repo}.*license"):
        push_folders(build(tmp_path / "tree"), repo)
    assert hub.count("POST", "/preupload/|/commit/", start) == 0


def test_a_card_edited_between_plan_and_commit(hub, repo, tmp_path):
    """Otherwise the commit would overwrite the edit with the older card."""
    push_folders(build(tmp_path / "tree"), repo)
    hub.fault("POST", "/commit/", 0, delay=lambda: edit_card(repo, lambda card: card + "\nWords of a person.\n"))
    push_folders(build(tmp_path / "tree", word="thus"), repo)
    assert commits_of(repo) == ["Push tree with trl_hrm", "Edit", "Push tree with trl_hrm", "initial commit"]
    assert card_of(repo).endswith("\nWords of a person.\n")
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(tmp_path / "tree"))


def test_a_card_that_lost_its_configurations(hub, repo, tmp_path):
    """`DatasetCard.push_to_hub` of a new card drops them. A push must restore them and recognise its own files."""
    push_folders(build(tmp_path / "tree"), repo)
    DatasetCard("---\nlicense: mit\n---\n# Mine\n").push_to_hub(repo)
    assert datasets.get_dataset_config_names(repo) != ["tree"]
    push = push_folders(tmp_path / "tree", repo)
    assert list(push.sent) == ["README.md"]
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(tmp_path / "tree"))
    assert "# Mine" in card_of(repo)
    push_folders(build(tmp_path / "prm", "prm"), repo)
    DatasetCard("---\nlicense: mit\n---\n# Mine\n").push_to_hub(repo)
    with pytest.raises(ValueError, match="prm/.*in one call"):
        push_folders(tmp_path / "tree", repo)
    push_folders([tmp_path / "tree", tmp_path / "prm"], repo)
    assert rows_of(published(repo, "prm", tmp_path)) == rows_of(local(tmp_path / "prm"))


def test_a_card_with_a_byte_order_mark(hub, repo, tmp_path):
    """The metadata would be read as text, and added a second time."""
    HfApi().create_repo(repo, repo_type="dataset")
    card = CommitOperationAdd("README.md", b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mine\n")
    HfApi().create_commit(repo, [card], commit_message="Card", repo_type="dataset")
    push_folders(build(tmp_path / "tree"), repo)
    assert DatasetCard(card_of(repo)).data.license == "mit" and card_of(repo).count("license: mit") == 1


def test_fewer_splits(hub, repo, tmp_path):
    """A stale split would be used for evaluation, although its rows are now in the training split."""
    push_folders(build(tmp_path / "tree"), repo)
    push = push_folders(build(tmp_path / "tree", test_size=0), repo)
    assert push.deleted == [f"tree/{DATA[0]}"]
    found = published(repo, "tree", tmp_path)
    assert set(found) == {"train"} and rows_of(found) == rows_of(local(tmp_path / "tree"))


def test_names_that_are_not_ascii(hub, repo, tmp_path):
    """Names of local folders are private and must not be published. Configuration names become paths and YAML."""
    folder = build(tmp_path / "données ö" / "数学", "prm", word="é 数")
    push_folders(folder, repo, config_name="été-数学")
    assert rows_of(published(repo, "été-数学", tmp_path)) == rows_of(local(folder))
    renamed = folder.rename(tmp_path / "moved")
    assert push_folders(renamed, repo, config_name="été-数学").sent == {}
    push_folders(renamed, repo)
    assert datasets.get_dataset_config_names(repo) == ["prm", "été-数学"]


def test_revision_that_is_not_a_branch(hub, repo, tmp_path):
    push_folders(build(tmp_path / "tree"), repo)
    HfApi().create_tag(repo, tag="v1", repo_type="dataset")
    with pytest.raises(PushError, match="v1 is not a branch"):
        push_folders(build(tmp_path / "tree", word="thus"), repo, revision="v1")
