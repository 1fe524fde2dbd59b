"""Faults during publishing. Readers always load the complete old dataset or the complete new one."""

import logging
import traceback
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from trl_hrm import hub as trl_hrm_hub
from trl_hrm.data import publish
from trl_hrm.hub import PushError, retry

from .publishing import build, build_row_groups, commits_of, files_of, local, published, push_folders, rows_of


RATE_LIMIT = {"ratelimit": '"api";r=0;t=77', "ratelimit-policy": '"fixed window";"api";q=1000;w=300'}
STALE = {"error": "A commit has happened since. Please refresh and try again."}


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Record the pauses between tries instead of waiting."""
    pauses = []
    monkeypatch.setattr(publish, "retry", partial(retry, sleep=pauses.append))
    return pauses


@pytest.fixture
def upload(uses_xet) -> tuple[str, str]:
    """Return the request that carries rows."""
    return ("POST", "^/cas/v1/xorbs") if uses_xet else ("PUT", "^/_put/")


# the fault, and the pauses that it causes
PASSING = {
    "rate limit": (("POST", "/commit/", 429, {"headers": RATE_LIMIT}), [78]),
    "rate limit of long ago": (("POST", "/commit/", 429, {"headers": {"Retry-After": "5"}}), [5]),
    "commit of another": (("POST", "/commit/", 412, {"body": STALE, "times": 2}), [1, 2]),
    "conflict": (("POST", "/commit/", 409, {}), [1]),
    "trouble": (("POST", "/commit/", 500, {"times": 4}), [1, 2, 4, 8]),
    "answer lost": (("POST", "/commit/", 504, {"after": True}), [1]),
    "cut on commit": (("POST", "/commit/", 0, {"drop": True}), [1]),
    "cut after commit": (("POST", "/commit/", 0, {"drop": True, "after": True}), [1]),
    "card not checked": (("POST", "/validate-yaml", 503, {}), [1]),
    "no look": (("GET", "/api/datasets/alice/[^/]*$", 503, {}), [1]),
    "no tree": (("GET", "/tree/", 0, {"drop": True}), []),  # the client itself retries this
    "no look back": (("GET", "/tree/", 502, {"skip": 2}), []),
}


@pytest.mark.parametrize("what", PASSING)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over-old"])
def test_transient_faults(hub, repo, pauses, tmp_path, what, overwrite):
    """The clients retry none of these on a commit. A second commit after a successful one would hide what changed."""
    fault, expected = PASSING[what]
    if overwrite:
        push_folders(build(tmp_path / "old", word="old"), repo)
    folder = build(tmp_path / "new")
    *request, options = fault
    hub.fault(*request, **options)
    push = push_folders(folder, repo)
    assert pauses == expected
    assert commits_of(repo) == ["Push tree with trl_hrm"] * (1 + overwrite) + ["initial commit"]
    assert list(push.sent) and not push.unchanged
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(folder))


def test_socket_cut_while_rows_are_sent(hub, repo, pauses, upload, tmp_path):
    """The clients retry this themselves. Readers must not see a partial push."""
    folder = build(tmp_path / "new", word=repo)  # rows that another test has sent would not be sent
    hub.fault(*upload, 0, drop=True)
    push_folders(folder, repo)
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(tmp_path / "new"))


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over-old"])
def test_sixty_shards_with_a_fault_in_the_middle(hub, repo, pauses, upload, tmp_path, monkeypatch, overwrite):
    """After a failed push of the datasets library, 50 of 60 shards can be loaded, and no error says so."""
    if overwrite:
        push_folders(build_row_groups(tmp_path / "old", monkeypatch, f"old {repo}", 6), repo, max_shard_size=1)
    folder = build_row_groups(tmp_path / "new", monkeypatch, repo)  # rows that another test has sent would not be sent
    before = files_of(repo) if overwrite else [".gitattributes"]
    monkeypatch.setattr(publish, "BATCH", 1)  # with Xet, 60 small shards would be one request
    monkeypatch.setattr(publish, "retry", partial(retry, sleep=pauses.append))
    hub.fault(*upload, 403, skip=30, times=99)  # the clients do not retry it
    with pytest.raises(PushError, match="403") as error:
        push_folders(folder, repo, max_shard_size=1)
    assert error.value.status == 403 and pauses == []
    assert files_of(repo) == before
    if overwrite:
        assert rows_of(published(repo, "prm", tmp_path)) == rows_of(local(tmp_path / "old"))
    hub.faults.clear()
    start = len(hub.log)
    push = push_folders(folder, repo, max_shard_size=1)
    shards = [path for path in push.sent if path.endswith(".parquet")]
    assert len(shards) > 60
    assert hub.count(*upload, start) == len(shards) - 30  # uploaded shards are not sent again
    assert commits_of(repo) == ["Push prm with trl_hrm"] * (1 + overwrite) + ["initial commit"]
    assert rows_of(published(repo, "prm", tmp_path)) == rows_of(local(folder))


@pytest.mark.usefixtures("uses_xet")
@pytest.mark.parametrize("after", [False, True], ids=["lost", "landed"])
def test_lasting_fault_on_commit(hub, repo, pauses, tmp_path, after):
    """Whether or not the commit succeeds, the dataset must be complete, and the error must suggest to push again."""
    push_folders(build(tmp_path / "old", word="old"), repo)
    hub.fault("POST", "/commit/", 504, times=99, after=after)
    folder = build(tmp_path / "new")
    if after:
        push_folders(folder, repo)  # the second try finds the commit
    else:
        with pytest.raises(PushError, match="504 Gateway.*Push again") as error:
            push_folders(folder, repo)
        assert error.value.status == 504
        assert pauses == [1, 2, 4, 8, 16, 30, 30]
    expected = folder if after else tmp_path / "old"
    assert rows_of(published(repo, "tree", tmp_path)) == rows_of(local(expected))


def test_rate_limit_of_an_hour(hub, repo, pauses, tmp_path):
    """An hour without output looks like a hang."""
    hub.fault("POST", "/commit/", 429, headers={"Retry-After": "3600"})
    with pytest.raises(PushError, match="Push again in 3600 s") as error:
        push_folders(build(tmp_path / "tree"), repo)
    assert (error.value.status, pauses) == (429, [])


@pytest.mark.usefixtures("uses_xet")
def test_read_only_token(hub, repo, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_ro")
    words = r"403.*HF_TOKEN, of alice, is read-only"
    with pytest.raises(PushError, match=words):
        push_folders(build(tmp_path / "tree"), repo)
    push_folders(tmp_path / "tree", repo, token="hf_alice")
    words = "`token`, of alice, is read-only"
    with pytest.raises(PushError, match=words):
        push_folders(build(tmp_path / "tree", word="thus"), repo, token="hf_ro")


@pytest.mark.usefixtures("uses_xet")
@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_nope", "HF_TOKEN is not valid"),
        (None, "No token was found.*`hf auth login`"),
    ],
)
def test_unknown_or_missing_token(hub, repo, monkeypatch, tmp_path, token, words):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match=words) as error:
        push_folders(build(tmp_path / "tree"), repo)
    assert error.value.status == 401


def test_a_repository_of_someone_else(hub, repo, upload, tmp_path):
    name = repo.replace("alice/", "bob/")
    folder = build(tmp_path / "tree")
    words = f"{name}.*403.*alice, acme"
    with pytest.raises(PushError, match=words):
        push_folders(folder, name)  # it does not exist yet
    HfApi(token="hf_bob").create_repo(name, repo_type="dataset")
    start = len(hub.log)
    with pytest.raises(PushError, match=words):
        push_folders(folder, name)
    assert hub.count(*upload, start) == 0
    HfApi(token="hf_bob").create_repo(f"{name}-hidden", repo_type="dataset", private=True)
    with pytest.raises(PushError, match=f"name {name}-hidden"):
        push_folders(folder, f"{name}-hidden")


def test_private_on_a_public_repository(hub, repo, monkeypatch, tmp_path):
    """The Hub ignores `private` for an existing repository, so the rows would be public."""
    folder = build(tmp_path / "tree")
    HfApi().create_repo(repo, repo_type="dataset")
    start = len(hub.log)
    push_folders(folder, repo, private=True, dry_run=True)
    assert len(hub.log) == start  # a dry run does not ask the Hub, and says so
    with pytest.raises(ValueError, match=f"{repo} is public.*Nothing was uploaded"):
        push_folders(folder, repo, private=True)
    assert hub.count("POST", "", start) == hub.count("PUT", "", start) == 0
    # another user creates it just before we do
    other = f"{repo}-race"
    create = HfApi.create_repo
    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda self, name, private, **options: (
            create(self, name, **options),
            create(self, name, private=private, **options),
        ),
    )
    with pytest.raises(ValueError, match=f"{other} is public"):
        push_folders(folder, other, private=True)
    assert files_of(other) == [".gitattributes"]
    monkeypatch.undo()
    HfApi().create_repo(f"{repo}-private", repo_type="dataset", private=True)
    with pytest.raises(ValueError, match="is private"):
        push_folders(folder, f"{repo}-private", private=False)
    push_folders(folder, f"{repo}-private")
    assert HfApi().dataset_info(f"{repo}-private").private is True


def test_made_public_during_the_push(hub, repo, tmp_path):
    """A user who asked for a private dataset must not be told that the push succeeded."""
    facts = hub.root / "repos" / "dataset" / f"{repo}.git" / "hub.json"
    hub.fault("POST", "/commit/", 0, delay=lambda: facts.write_text(facts.read_text().replace("true", "false")))
    with pytest.raises(PushError, match=f"{repo} became public"):
        push_folders(build(tmp_path / "tree"), repo, private=True)


def test_a_commit_that_holds_something_else(hub, repo, pauses, monkeypatch, tmp_path):
    """A push that trusts the Hub's 200 would report success whatever the commit holds."""
    create = HfApi.create_commit

    def without_one(self, repo_id, operations, **options):
        return create(self, repo_id, [op for op in operations if "test-" not in op.path_in_repo], **options)

    file = "tree/test-00000-of-00001.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", without_one)
        with pytest.raises(PushError, match=rf"different files: \['{file}'\].*Push again"):
            push_folders(build(tmp_path / "tree"), repo)
    assert list(push_folders(tmp_path / "tree", repo).sent) == [file]
    build(tmp_path / "tree", test_size=0)
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", without_one)
        with pytest.raises(PushError, match=rf"not deleted: \['{file}'\]"):
            push_folders(tmp_path / "tree", repo)
    assert push_folders(tmp_path / "tree", repo).deleted == [file]


@pytest.mark.usefixtures("uses_xet")
def test_no_token_in_anything_written(hub, repo, pauses, monkeypatch, caplog, capfd, tmp_path):
    """Robots find a token in a log or a card within minutes."""
    secret = "hf_" + "PLANTEDplanted" * 2
    hub.tokens[secret] = ("alice", "write")
    hub.tokens[f"{secret}READ"] = ("alice", "read")
    monkeypatch.setenv("HF_TOKEN", secret)
    folder = build(tmp_path / "tree")
    caplog.set_level(logging.DEBUG)
    said = []

    def push(**options) -> None:
        try:
            said.append(repr(push_folders(folder, repo, **options)))
        except (PushError, ValueError) as error:
            said.extend(traceback.format_exception(error))

    hub.fault("POST", "/commit/", 403, times=1, body={"error": f"no rights for {secret}"})
    push()
    hub.fault("POST", "/commit/", 500, times=1, body={"error": f"{secret} broke it"})
    push()
    assert pauses == [1]
    push(token=f"{secret}UNKNOWN")
    push(token=f"{secret}READ")
    push(token=f"{secret}\n")  # the HTTP library quotes a header that it cannot send
    push(dry_run=True)
    assert any("<token> broke it" in record.getMessage() for record in caplog.records)
    assert any("no rights for <token>" in words for words in said)
    written = [*said, *(record.getMessage() for record in caplog.records), *capfd.readouterr()]
    assert len("".join(written)) > 5000
    assert not [text for text in written if "PLANTED" in text]
    home = Path(trl_hrm_hub.constants.HF_HOME)
    paths = [*tmp_path.rglob("*"), *home.rglob("*"), *(Path(path) for path in snapshot(repo))]
    assert any(path.name == "README.md" for path in paths)
    assert not [path for path in paths if path.is_file() and b"PLANTED" in path.read_bytes()]


def snapshot(repo: str) -> list[Path]:
    return [path for path in Path(HfApi().snapshot_download(repo, repo_type="dataset")).rglob("*") if path.is_file()]
