"""A repository of the loopback Hub: a bare git repository, with pointers in place of large files, as on the Hub."""

import json
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
POINTER_PATTERN = re.compile(rb"version https://git-lfs[^\n]+\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar safetensors tar "
    "tflite tgz wasm xz zip zst"
)
LFS_PATTERNS = [f"*.{suffix}" for suffix in LFS_SUFFIXES.split()] + ["*tfevents*"]  # the Hub's default .gitattributes


def timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(int(seconds)))


class Repository:
    """A bare git repository below `root`. `hub.json` holds the Hub's facts about it."""

    def __init__(self, root: Path, kind: str, name: str):
        self.kind, self.name = kind, name
        self.path = root / "repos" / kind / f"{name}.git"
        self.xet_files = root / "files"

    @property
    def exists(self) -> bool:
        return (self.path / "hub.json").exists()

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.path / "hub.json").read_text())

    def create(self, user: str, private: bool) -> None:
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(self.path)], check=True)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.commit("refs/heads/main", None, user, "initial commit", [(".gitattributes", attributes.encode())])
        (self.path / "hub.json").write_text(json.dumps({"private": private, "created": timestamp(time.time())}))

    def git(self, *words: str, data: bytes | None = None, check: bool = True) -> bytes | None:
        """Return the output of a git command, or `None` if it fails and `check` is false."""
        done = subprocess.run(["git", "--git-dir", str(self.path), *words], input=data, capture_output=True)
        if done.returncode and check:
            raise RuntimeError(f"git {words[0]}: {done.stderr.decode(errors='replace')}")
        return None if done.returncode else done.stdout

    def commit_id(self, revision: str) -> str | None:
        """Return the commit of a branch, tag, full reference or commit id, or `None` if it does not exist."""
        candidates = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if re.fullmatch("[0-9a-f]{5,40}|refs/.+", revision):
            candidates.append(revision)
        for candidate in candidates:
            found = self.git("rev-parse", "-q", "--verify", candidate + "^{commit}", check=False)
            if found:
                return found.decode().strip()
        return None

    def entries(self, commit: str, folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
        """Return the files and folders of a commit, as the Hub's API describes them."""
        words = ["ls-tree", "-zl", "--full-tree", *(["-rt"] if recursive else []), commit]
        listing = self.git(*words, *([folder.rstrip("/") + "/"] if folder else []))
        rows = []
        for line in listing.split(b"\0")[:-1]:
            attributes, path = line.split(b"\t", 1)
            _, kind, oid, size = attributes.decode().split()
            rows.append((kind, oid, 0 if size == "-" else int(size), path.decode()))
        pointers = self._pointers([oid for kind, oid, size, _ in rows if kind == "blob" and size < 200])
        return [self._describe(kind, oid, size, path, pointers.get(oid)) for kind, oid, size, path in rows]

    def _describe(self, kind: str, oid: str, size: int, path: str, pointer: tuple[str, int] | None) -> dict[str, Any]:
        entry = {"type": "file" if kind == "blob" else "directory", "oid": oid, "size": size, "path": path}
        if pointer:
            sha256, real_size = pointer
            entry |= {"size": real_size, "lfs": {"oid": sha256, "size": real_size, "pointerSize": size}}
            xet_file = self.xet_files / f"{sha256}.xet"
            if xet_file.exists():
                entry["xetHash"] = xet_file.read_text()
        return entry

    def _pointers(self, oids: list[str]) -> dict[str, tuple[str, int]]:
        """Return the sha256 and size that small blobs point at. Other blobs are skipped."""
        found = {}
        raw = self.git("cat-file", "--batch", data="\n".join(oids).encode()) if oids else b""
        for oid in oids:  # "<oid> blob <size>\n<content>\n"
            head, _, raw = raw.partition(b"\n")
            size = int(head.split()[2])
            pointer = POINTER_PATTERN.fullmatch(raw[:size])
            raw = raw[size + 1 :]
            if pointer:
                found[oid] = (pointer[1].decode(), int(pointer[2]))
        return found

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def commit(
        self, reference: str, parent: str | None, user: str, message: str, changes: Iterable[tuple[str, bytes | None]]
    ) -> str:
        """
        Make one commit with a single stream to `git fast-import`, so that it is complete or absent.

        `changes` are pairs of path and content, `None` to delete a file or folder. Returns the commit's id.
        """
        text = message.encode()
        head = f"commit {reference}\nmark :1\ncommitter {user} <{user}@hub.test> {int(time.time())} +0000\n"
        stream = [head.encode(), b"data %d\n%s\n" % (len(text), text)]
        if parent:
            stream.append(b"from %s\n" % parent.encode())
        for path, content in changes:
            if content is None:
                stream.append(b"D %s\n" % path.encode())
            else:
                stream.append(b"M 100644 inline %s\ndata %d\n%s\n" % (path.encode(), len(content), content))
        stream.append(b"\nget-mark :1\ndone\n")
        return self.git("fast-import", "--quiet", "--done", data=b"".join(stream)).decode().strip()

    def references(self, prefix: str) -> list[dict[str, str]]:
        lines = self.git("for-each-ref", "--format=%(refname) %(objectname)", prefix).decode().splitlines()
        pairs = [line.split() for line in lines]
        return [{"name": name.removeprefix(prefix), "ref": name, "targetCommit": oid} for name, oid in pairs]

    def history(self, commit: str) -> list[dict[str, Any]]:
        """Return the commits up to this one, newest first."""
        log = self.git("log", "-z", "--format=%H%x01%an%x01%ct%x01%s%x01%b", commit).decode()
        rows = [row.split("\x01") for row in log.split("\0") if row]
        return [
            {
                "id": oid,
                "authors": [{"user": user}],
                "date": timestamp(int(seconds)),
                "title": title,
                "message": body.strip(),
            }
            for oid, user, seconds, title, body in rows
        ]
