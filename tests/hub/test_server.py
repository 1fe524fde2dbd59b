"""Check the loopback Hub itself with the real client libraries. All tests in this folder rely on it."""

import os
import subprocess

import datasets
import httpx2 as httpx
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


pytestmark = pytest.mark.usefixtures("uses_xet")
api = HfApi()


def make_rows(count: int, first: int = 0) -> Dataset:
    rows = range(first, first + count)
    return Dataset.from_list(
        [{"prompt": f"q{i}", "completions": ["s", f"t{i}"], "labels": [1.0, i % 2]} for i in rows]
    )


def add(repo: str, path: str, content: bytes, token: str = "hf_alice", **options):
    operation = CommitOperationAdd(path, content)
    return HfApi(token=token).create_commit(repo, operations=[operation], commit_message="add", **options)


def git(hub, repo: str, *words: str) -> str:
    folder = hub.root / "repos" / "model" / f"{repo}.git"
    return subprocess.run(["git", "--git-dir", folder, *words], capture_output=True, text=True, check=True).stdout


def test_dataset_round_trip(hub, repo, tmp_path, uses_xet):
    """A Hub that mixes up files, or a run with the wrong protocol, would make every test here meaningless."""
    start = len(hub.log)
    pushed = DatasetDict(train=make_rows(200), test=make_rows(20, 1000))
    pushed.push_to_hub(repo, "math", private=True)
    assert api.dataset_info(repo).private
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):  # before alice's download is in the shared cache
        load_dataset(repo, "math", token="hf_bob", cache_dir=str(tmp_path / "bob"))
    loaded = load_dataset(repo, "math", cache_dir=str(tmp_path / "alice"))
    assert {split: loaded[split].to_list() for split in loaded} == {split: pushed[split].to_list() for split in pushed}
    streamed = load_dataset(repo, "math", split="test", streaming=True)
    assert [row["prompt"] for row in streamed] == [f"q{i}" for i in range(1000, 1020)]
    assert (hub.count("POST", "/cas/v1/shards", start) > 0) == uses_xet
    assert (hub.count("PUT", "/_put/", start) > 0) == (not uses_xet)


def test_large_and_compressible_files(hub, repo, tmp_path):
    """Xet cuts, packs and groups bytes by kind. A wrongly rebuilt file would be blamed on the code under test."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    contents = {
        "noise.bin": noise,
        "floats.bin": rng.normal(size=400_000).astype("f4").tobytes(),
        "zeros.bin": bytes(2_000_000),
        "overlap.bin": noise[1_000_000:] + bytes(10),
        "dir é/a b#c%41.txt": b"odd path",
        "empty.bin": b"",
    }
    api.create_repo(repo)
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    api.create_commit(repo, operations=operations, commit_message="many")
    for path, content in contents.items():
        with open(hf_hub_download(repo, path, cache_dir=tmp_path), "rb") as file:
            assert file.read() == content, path
    assert git(hub, repo, "fsck", "--strict") == ""


def test_answers_that_are_errors(hub, repo):
    """Clients choose their exception by status and headers. A wrong one would test messages that users never see."""
    with pytest.raises(RepositoryNotFoundError):
        add(repo, "a.txt", b"x")
    api.create_repo(repo)
    first = add(repo, "a.txt", b"x").oid
    for token, status in (("hf_bob", 403), ("hf_ro", 403), ("hf_nobody", 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            add(repo, "a.txt", b"y", token)
        assert caught.value.response.status_code == status
    with pytest.raises(RevisionNotFoundError):
        add(repo, "a.txt", b"y", revision="nowhere")
    add(repo, "a.txt", b"y", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        add(repo, "a.txt", b"z", parent_commit=first)
    assert caught.value.response.status_code == 412
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("bob/x")
    assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(repo)
    assert caught.value.response.status_code == 409 and api.create_repo(repo, exist_ok=True).repo_id == repo
    assert api.create_repo(repo.replace("alice/", "acme/")).repo_id.startswith("acme/")
    api.create_repo(repo + "-private", private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_bob").model_info(repo + "-private")


def test_commits_branches_tags_and_pages(hub, repo, tmp_path, monkeypatch):
    """Other tests read weights and shards from histories and paginated listings."""
    monkeypatch.setattr(hub, "page", 3)
    api.create_repo(repo)
    first = add(repo, "folder/a.txt", b"one").oid
    api.create_tag(repo, tag="v1", revision=first)
    api.create_branch(repo, branch="next")
    add(repo, "folder/b.txt", b"two", revision="next")
    pull = add(repo, "c.txt", b"three", create_pr=True)
    operations = [
        CommitOperationDelete("folder/", is_folder=True),
        *(CommitOperationAdd(f"{i}.txt", b"x") for i in range(7)),
    ]
    api.create_commit(repo, operations=operations, commit_message="replace")
    assert api.list_repo_files(repo) == [".gitattributes", *(f"{i}.txt" for i in range(7))]
    assert api.list_repo_files(repo, revision="v1") == [".gitattributes", "folder/a.txt"]
    assert "folder/b.txt" in api.list_repo_files(repo, revision="next")
    assert "c.txt" in api.list_repo_files(repo, revision=pull.pr_revision)
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["replace", "add", "initial commit"]
    references = api.list_repo_refs(repo, include_pull_requests=True)
    assert {reference.name for reference in references.branches} == {"main", "next"}
    assert [tag.name for tag in references.tags] == ["v1"] and len(references.pull_requests) == 1


def test_cards_are_checked(hub, repo):
    """A card with broken metadata must not pass here and fail on the Hub."""
    api.create_repo(repo, repo_type="dataset")
    DatasetCard("---\nlicense: mit\n---\n# Rows\n").push_to_hub(repo)
    assert DatasetCard.load(repo).data.to_dict() == {"license": "mit"}
    with pytest.raises(ValueError, match="Invalid metadata"):
        broken = b"---\nlicense: [mit\n---\n"
        api.upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id=repo, repo_type="dataset")


def test_token_never_reaches_the_storage(hub, repo):
    """The Hub and its storage have different host names. Sending the token to both would leak it."""
    api.create_repo(repo)
    start = len(hub.log)
    add(repo, "weights.bin", os.urandom(300_000))
    hf_hub_download(repo, "weights.bin")
    stored = [request for request in hub.log[start:] if request["path"].startswith("/_")]
    assert stored and not any(request["auth"] for request in stored)


def test_faults(hub, repo):
    """A fault that does the work when it should not, or the reverse, would invert every recovery test."""
    api.create_repo(repo)
    skipped = hub.fault("POST", "/commit/", 503, skip=1)
    add(repo, "a.txt", b"1")
    assert skipped.fired == 0
    with pytest.raises(HfHubHTTPError):
        add(repo, "b.txt", b"2")
    assert skipped.fired == 1 and "b.txt" not in api.list_repo_files(repo)
    hub.fault("POST", "/commit/", 504, after=True)
    with pytest.raises(HfHubHTTPError):
        add(repo, "c.txt", b"3")
    assert "c.txt" in api.list_repo_files(repo)
    hub.fault("POST", "/commit/", drop=True)
    with pytest.raises(httpx.TransportError):
        add(repo, "d.txt", b"4")
    assert "d.txt" not in api.list_repo_files(repo)
