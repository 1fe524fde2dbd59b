"""Publishing without a Hub: rejected builds, shards, and the card of several configurations."""

import json
import shutil
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, concatenate_datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from trl_hrm.data import sources
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.output import LOAD_FOLDER, digest_of
from trl_hrm.data.publish import push_dataset
from trl_hrm.data.publish_card import Config, check_others, merge_card, warn_of_licenses
from trl_hrm.data.publish_config import PushDatasetConfig
from trl_hrm.data.publish_shards import File, dataset_info, group_sizes, published_files, read_build
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.hub import PushError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a build of the prm view with several row groups per split."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    file = tmp_path / "rows.jsonl"
    with open(file, "w") as lines:
        for i in range(80):
            row = {"prompt": f"What is {i}?", "completions": [f"It is {i}."], "labels": [i % 2 == 0]}
            lines.write(json.dumps(row) + "\n")
    build_stepwise(
        BuildStepwiseConfig(
            inputs=[str(file)], output_dir=str(tmp_path / "built"), view="prm", test_size=0.25, num_proc=1
        )
    )
    return tmp_path / "built"


def edit_report(folder: Path, **changes) -> None:
    path = folder / "build_report.json"
    report = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in report.items() if value is not None}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            lambda folder: shutil.rmtree(folder),
            "built: build_report.json not found",
        ),
        (
            lambda folder: (folder / "README.md").unlink(),
            "README.md is missing",
        ),
        (
            lambda folder: (folder / "data" / "test-00000-of-00001.parquet").unlink(),
            "test-00000-of-00001.parquet is missing",
        ),
        (
            lambda folder: (folder / "data" / "train-00001-of-00002.parquet").write_bytes(b"more"),
            "the files in data were changed after the build",
        ),
        (
            lambda folder: (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1"),
            "the files in data were changed after the build",
        ),
        (
            lambda folder: edit_report(folder, rows={"train": 3, "test": 1}),
            r"train.*: found \d+ rows, but build_report.json has 3",
        ),
        (
            lambda folder: edit_report(folder, content=None),
            "build_report.json: `content` is missing. Build the dataset again",
        ),
        (lambda folder: edit_report(folder, picture={"file": "scores.png"}), "scores.png is missing"),
        (
            lambda folder: (folder / "build_report.json").write_text("{"),
            r"build_report.json: not valid JSON \(Expecting .*Build the dataset again",
        ),
    ],
)
def test_incomplete_build(folder, fault, words):
    """Rows lost before a push would be missing for every user. This test never contacts a Hub."""
    fault(folder)
    with pytest.raises(ValueError, match=words):
        push_dataset(PushDatasetConfig(inputs=folder, repo_id="me/x"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config_name": "a/b"}, "`config_name` is 'a/b'"),
        ({"config_name": ".."}, r"`config_name` is '\.\.'"),
        ({"config_name": ""}, "`config_name` is empty"),
        ({"config_name": "README.md"}, "`config_name` is 'README.md'"),
        ({"repo_id": "x"}, "`repo_id` is 'x'.*'me/x'"),
        ({"repo_id": "me/x/y"}, "Repo id must be in the form"),
        ({"max_shard_size": "many"}, "valid format"),
        ({"max_shard_size": -1}, "`max_shard_size` is -1"),
    ],
)
def test_options_that_cannot_work(folder, options, words):
    with pytest.raises(ValueError, match=words):
        push_dataset(PushDatasetConfig(inputs=folder, **({"repo_id": "me/x"} | options)))


def test_no_folder():
    """A glob without matches would create a repository with an empty card."""
    with pytest.raises(ValueError, match="`inputs` is empty"):
        push_dataset(PushDatasetConfig(inputs=[], repo_id="me/x"))


def test_offline(folder):
    """With HF_HUB_OFFLINE=1, as in all tests without a Hub, the error must not blame the token."""
    with pytest.raises(PushError, match="me/x.*HF_HUB_OFFLINE"):
        push_dataset(PushDatasetConfig(inputs=folder, repo_id="me/x"))


@pytest.mark.parametrize("private", [None, True, False])
def test_a_dry_run_opens_no_connection(folder, monkeypatch, private):
    """It lists files, sizes and card as for a new repository, and says what only the Hub can tell."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    push = push_dataset(
        PushDatasetConfig(
            inputs=folder, repo_id="me/x", private=private, revision="draft", max_shard_size=1, dry_run=True
        )
    )
    name = read_build(folder).name
    shards = [path for path in push.sent if path.endswith(".parquet")]
    assert push.dry_run and len(shards) > 2 and all(path.startswith(f"{name}/") for path in shards)
    assert {"README.md", f"{name}/build_report.json"} <= push.sent.keys()
    assert push.sent["README.md"] == len(push.card.encode())
    assert (push.commit, push.deleted, push.unchanged) == (None, [], {})
    printed = str(push)
    assert push.card in printed and "Dry run: nothing was uploaded, and the Hub was not contacted." in printed
    assert all(f"upload     {path}" in printed for path in push.sent) and "branch draft" in printed
    visible = {None: "have the default visibility of the Hub", True: "be private", False: "be public"}[private]
    assert f"A new repository would {visible}." in printed and "which old files to delete" in printed


def test_a_dry_run_needs_no_token(folder, monkeypatch):
    """A push rejects such a token. A dry run does not look for one."""
    monkeypatch.setenv("HF_TOKEN", "half a token")
    assert push_dataset(PushDatasetConfig(inputs=folder, repo_id="me/x", dry_run=True)).sent
    with pytest.raises(PushError, match="HF_TOKEN is empty"):
        push_dataset(PushDatasetConfig(inputs=folder, repo_id="me/x"))


def test_dry_run_fails_where_a_push_fails(folder):
    edit_report(folder, rows={"train": 1})
    with pytest.raises(ValueError, match="Build the dataset again"):
        push_dataset(PushDatasetConfig(inputs=folder, repo_id="me/x", dry_run=True))


def test_groups_by_hand():
    assert group_sizes([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert group_sizes([3, 3, 3, 9, 1, 1], 1) == [[0], [1], [2], [3], [4], [5]]
    assert group_sizes([3, 3], 100) == [[0, 1]]


def test_shards(folder, tmp_path):
    """Rows, order, types and bytes must be the same each time, so that a second push sends nothing."""
    source = folder / "data" / "train-00000-of-00001.parquet"
    build = read_build(folder)
    for max_bytes in (1, 2500, 10_000_000):
        files = published_files(build, max_bytes, tmp_path / f"first-{max_bytes}")
        again = published_files(build, max_bytes, tmp_path / f"second-{max_bytes}")
        assert [(file.path, file.size, file.sha256) for file in files] == [
            (file.path, file.size, file.sha256) for file in again
        ]
        shards = [file for file in files if file.path.startswith("prm/train")]
        total = len(shards)
        assert [file.path for file in shards] == [f"prm/train-{i:05d}-of-{total:05d}.parquet" for i in range(total)]
        parts = [Dataset.from_parquet(str(file.local), cache_dir=str(tmp_path / "cache")) for file in shards]
        joined = concatenate_datasets(parts)
        whole = Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
        assert joined.to_list() == whole.to_list() and joined.features == whole.features
        assert all(pq.read_schema(file.local).equals(pq.read_schema(source), check_metadata=True) for file in shards)
        if max_bytes == 1:
            assert total == pq.read_metadata(source).num_row_groups > 3
        elif max_bytes == 2500:
            assert 1 < total < pq.read_metadata(source).num_row_groups
        else:
            assert [file.local for file in shards] == [source]
        info = dataset_info(build, files)
        assert {name: split.num_examples for name, split in info.splits.items()} == build.report["rows"]
        assert info.download_size == sum(file.size for file in files if file.path.endswith(".parquet"))
        assert info.dataset_size > 0 and info.features == whole.features


def test_a_split_without_rows(folder, tmp_path):
    """Without a shard, the split would be missing on the Hub, although the card lists it."""
    path = folder / "data" / "test-00000-of-00001.parquet"
    pq.ParquetWriter(path, pq.read_schema(path)).close()
    report = json.loads((folder / "build_report.json").read_text())
    edit_report(folder, content=digest_of(folder / "data"), rows=report["rows"] | {"test": 0})
    build = read_build(folder)
    files = published_files(build, 1, tmp_path / "shards")
    assert [file.local for file in files if file.path.startswith("prm/test")] == [path]
    assert dataset_info(build, files).splits["test"].num_examples == 0


def test_file_hashes_equal_those_in_git(tmp_path):
    """If unchanged files looked different, every push would send them again."""
    (tmp_path / "x").write_bytes(b"what is up, doc?")
    file = File("x", tmp_path / "x")
    assert file.blob == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # the example of the book "Pro Git", chapter 10.2
    assert file.sha256 == "af4e812d13b4eae6da91024f15f7679dae49d40aee3fb4c7216b56d04193f46c"


CARD = """---
license: mit
pretty_name: Sums (prm)
tags:
- trl
- prm
configs:
- config_name: default
  data_files: x
---

# Sums, `prm` view

What they are. ## is no heading here.

## Load

```python
from datasets import load_dataset

dataset = LOAD_FOLDER
dataset["train"][0]
```

Mind the step: what people write below it stays.

### Rebuild
======

```one``` is no fence.

## More

````bash
# how
```
## still code
````

  ```
# an indented fence
  ```

![scores](scores.png)
""".replace("LOAD_FOLDER", LOAD_FOLDER)


@pytest.fixture
def config(folder) -> Config:
    (folder / "README.md").write_text(CARD)
    (folder / "scores.png").write_bytes(b"")
    edit_report(folder, picture={"file": "scores.png", "shows": "scores"})
    build = read_build(folder)
    return Config(build, dataset_info(build, []))


def test_the_card_of_a_new_repository(config):
    card = merge_card(None, "me/sums", [config])
    text = card.partition("\n---\n")[2]
    assert (
        text
        == """
# sums

<!-- trl_hrm: config prm begins. The next push of this configuration replaces everything up to its end. -->

## Sums, `prm` view

What they are. ## is no heading here.

### Load

```python
from datasets import load_dataset

dataset = load_dataset("me/sums", "prm")
dataset["train"][0]
```

Mind the step: what people write below it stays.

#### Rebuild
======

```one``` is no fence.

### More

````bash
# how
```
## still code
````

  ```
# an indented fence
  ```

![scores](prm/scores.png)

<!-- trl_hrm: config prm ends. -->
"""
    )
    data = DatasetCard(card).data
    assert (data.license, data.pretty_name, data.tags) == ("mit", "Sums", ["trl", "prm"])
    assert MetadataConfigs.from_dataset_card_data(data) == {
        "prm": {
            "data_files": [
                {"split": "train", "path": "prm/train-*.parquet"},
                {"split": "test", "path": "prm/test-*.parquet"},
            ]
        }
    }
    info = DatasetInfosDict.from_dataset_card_data(data)["prm"]
    assert info.features == config.info.features
    assert [split.num_examples for split in info.splits.values()] == list(config.build.report["rows"].values())


def test_merging_again_changes_nothing(config):
    """A card that grows by a blank line at each push would make a commit at each push."""
    once = merge_card(None, "me/sums", [config])
    assert merge_card(once, "me/sums", [config]) == once
    assert merge_card(once.replace("\n", "\r\n"), "me/sums", [config]) == once  # edited on Windows
    other = Config(read_build(config.build.folder, "other"), config.info)
    both = merge_card(once, "me/sums", [other])
    assert both == merge_card(None, "me/sums", [config, other])
    assert merge_card(both, "me/sums", [config]) == merge_card(both, "me/sums", [other, config]) == both
    # parts keep the order of the pushes, and a replaced part stays in place
    assert both.index("config prm begins") < both.index("config prm ends") < both.index("config other begins")


def test_a_card_without_metadata(config):
    card = merge_card("Only words.", "me/sums", [config])
    assert card.partition("\n---\n")[2].startswith("Only words.\n\n<!-- trl_hrm: config prm begins.")
    assert MetadataConfigs.from_dataset_card_data(DatasetCard(card).data).keys() == {"prm"}


def test_paths_that_a_push_makes_public(folder, tmp_path, monkeypatch, caplog):
    config = PushDatasetConfig(inputs=[str(folder)], repo_id="me/set", dry_run=True)
    push_dataset(config)
    [message] = caplog.messages
    assert (
        f"which everyone who can read the repository will see: {tmp_path}/rows.jsonl, {tmp_path}/built. To leave"
        in message
    )
    caplog.clear()
    words = "trl-hrm x 'C:/Users/my name/a.jsonl' --a='/home/my name/b' file:///srv/c/d -s /n --step_regex /^Step/ https://a.org/b/c"
    edit_report(folder, command=words, inputs=[r"\\server\share\e", "data/f"])
    push_dataset(config)
    [message] = caplog.messages
    found = [r"\\server\share\e", "C:/Users/my name/a.jsonl", "/home/my name/b", "/srv/c/d"]
    assert f"will see: {', '.join(found)}. To leave" in message
    caplog.clear()
    monkeypatch.chdir(tmp_path)
    build_stepwise(BuildStepwiseConfig(inputs=["rows.jsonl"], output_dir="built", overwrite=True, num_proc=1))
    push_dataset(config)
    assert caplog.messages == []


def test_another_license(config, caplog):
    """A card's license applies to all configurations, so a difference must be reported, not resolved."""
    card = merge_card("---\nlicense: cc-by-nc-4.0\n---\n# Mine\n", "me/sums", [config])
    assert DatasetCard(card).data.license == "cc-by-nc-4.0"
    warn_of_licenses(card, "me/sums", [config])
    warn_of_licenses(merge_card(None, "me/sums", [config]), "me/sums", [config])
    assert [message.partition(" The card")[0] for message in caplog.messages] == [
        "the card of me/sums has the license cc-by-nc-4.0, but the source of prm has the license mit."
    ]


def test_metadata_written_by_users(config):
    """Metadata of the folder's README goes to the Hub. Metadata of the card on the Hub stays, including `default`."""
    readme = config.build.folder / "README.md"
    words = "license: other\nlicense_name: ours\nlicense_link: https://me.org\ntask_categories:\n- other\n"
    readme.write_text(CARD.replace("license: mit\n", words).replace("pretty_name: Sums (prm)", "pretty_name: 2024"))
    data = DatasetCard(merge_card(None, "me/sums", [config])).data
    assert (data.license, data.license_name, data.license_link) == ("other", "ours", "https://me.org")
    assert (data.task_categories, data.pretty_name) == (["other"], "2024")
    there = "---\nlicense: mit\ntags: math\nconfigs:\n- config_name: prm2\n  data_files: prm2/*.parquet\n---\n"
    card = merge_card(there, "me/sums", [config])
    data = DatasetCard(card).data
    assert (data.license, data.get("license_name"), data.tags) == ("mit", None, ["math", "trl", "prm"])
    card = card.replace("- config_name: prm\n", "- config_name: prm\n  default: true\n")
    assert merge_card(card, "me/sums", [config]) == card


@pytest.mark.parametrize("which", ["begins", "ends"])
def test_marks_in_the_readme_of_the_folder(config, which):
    """A README copied from the Hub would nest the marker comments, and no later push could separate them."""
    card = merge_card(None, "me/sums", [config])
    line = next(line for line in card.splitlines() if f"config prm {which}" in line)
    (config.build.folder / "README.md").write_text(f"{CARD}\n{line}\n")
    with pytest.raises(ValueError, match=f"built/README.md: .*config prm {which}.*Remove"):
        merge_card(None, "me/sums", [config])


def test_marks_with_space_after_them(config):
    """Editors may add spaces. If a marker were not found, the part would be inserted a second time."""
    card = merge_card(None, "me/sums", [config])
    assert merge_card(card.replace(" -->\n", " --> \n"), "me/sums", [config]) == card


@pytest.mark.parametrize(
    ("data_files", "paths", "words"),
    [
        (
            "mine.*",
            ["mine.jsonl"],
            "a configuration mine with files such as mine.jsonl",
        ),
        ("'**/*.jsonl'", ["mine.jsonl"], "a configuration mine with files such as mine.jsonl"),
        ("'**/*.jsonl'", ["a/mine.jsonl"], "a configuration mine with files such as a/mine.jsonl"),
        ("mine/*", ["other.jsonl", "mine/x.parquet"], None),
    ],
)
def test_configurations_of_other_files(data_files, paths, words):
    """`load_dataset` would read these files, or ours, as files of another format."""
    card = f"---\nconfigs:\n- config_name: mine\n  data_files: {data_files}\n---\n"
    if words is None:
        check_others(card, "me/sums", paths, ["prm"])
        return
    with pytest.raises(ValueError, match=words):
        check_others(card, "me/sums", paths, ["prm"])


def test_a_configuration_of_that_name_elsewhere():
    """Its files would stay, but no configuration would list them."""
    card = "---\nconfigs:\n- config_name: prm\n  data_files: data/*.parquet\n---\n"
    words = "data/a.parquet.*--config_name"
    with pytest.raises(ValueError, match=words):
        check_others(card, "me/sums", ["data/a.parquet"], ["prm"])


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [mit\n---\n",
        "---\n- a\n---\n",
        "---\nconfigs:\n- a: 1\n---\n",
        "---\nconfigs:\n- config_name: 2024\n---\n",
        "---\ndataset_info:\n- features: []\n---\n",
    ],
)
def test_a_card_that_cannot_be_read(config, card):
    with pytest.raises(ValueError, match=r"README.md of me/sums: invalid metadata"):
        merge_card(card, "me/sums", [config])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": []}, r"`rows` is \[\]"),
        ({"rows": {}}, r"found \[\], expected the names of splits"),
        ({"rows": {"train": -1}}, "`rows.train` is -1"),
        ({"rows": {"train": 1.5}}, "`rows.train` is 1.5"),
        ({"rows": {"../../secret": 1}}, r"found \['../../secret'\], expected the names of splits"),
        ({"view": 3}, "`view` is 3"),
        ({"content": ["a"]}, r"`content` is \['a'\]"),
        ({"picture": "scores.png"}, "`picture` is 'scores.png'"),
        ({"picture": {"file": "../../secret.png"}}, r"'../../secret.png'\], expected the names of splits and of a picture"),
        ({"picture": {"file": "/etc/passwd"}}, "/etc/passwd"),
    ],
)  # fmt: skip
def test_a_damaged_report(folder, changes, words):
    """A file outside of the folder would be published, and a wrong type would be a traceback."""
    edit_report(folder, **changes)
    with pytest.raises(ValueError, match=f"^{folder / 'build_report.json'}: .*{words}.* Build the dataset again"):
        read_build(folder)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("license: mit\n\ttags: [a]\n", r"README.md:3: not valid YAML \(found character '\\t'"),
        ("license: [mit\n", "README.md:2: not valid YAML"),
        ("license: mit\nlicense: apache-2.0\n", "README.md:3: found 'license' twice"),
        ("tags: " + "[" * 5000 + "]" * 5000 + "\n", "README.md: not valid YAML .nested too deeply"),
        (BOMB, "its aliases expand to more than 100,000 values"),
        ("date: 2024-13-45\n", "README.md: a value is invalid"),
    ],
)
def test_a_header_that_cannot_be_read(config, header, words):
    """The bomb of 500 bytes would take gigabytes when it is written again."""
    with pytest.raises(ValueError, match=f"^README.md of me/sums: invalid metadata .*{words}.*Correct it"):
        merge_card(f"---\n{header}---\n\n# Sums\n", "me/sums", [config])
