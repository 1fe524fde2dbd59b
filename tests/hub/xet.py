"""
The Xet half of the loopback Hub: tokens and the content-addressed store, so that hf_xet runs its real HTTP protocol.

Xorbs are stored as uploaded. Every file that a shard describes is rebuilt from them and compared with the sha256 that
the client declared. Wire format: https://huggingface.co/docs/xet.
"""

import hashlib
import json
import struct
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .api import API, NAME, OID, REVISION
from .server import Hub, HubError, Request, route


ENTRY = 48  # bytes of a shard's entries and of its header
LAST = b"\xff" * 32  # the hash that closes the list of files


@dataclass(frozen=True)
class Chunk:
    """A chunk in a xorb: bytes `begin` to `end`, which start with a header of 8 bytes, and its unpacked size."""

    begin: int
    end: int
    compression: int
    size: int


def read_chunks(xorb: bytes) -> list[Chunk]:
    """Return the chunks of a xorb. A footer that starts with a letter may follow."""
    chunks, begin = [], 0
    while begin + 8 <= len(xorb) and xorb[begin] == 0:
        packed = int.from_bytes(xorb[begin + 1 : begin + 4], "little")
        size = int.from_bytes(xorb[begin + 5 : begin + 8], "little")
        chunks.append(Chunk(begin, begin + 8 + packed, xorb[begin + 4], size))
        begin = chunks[-1].end
    return chunks


def unpack(data: bytes, compression: int, size: int) -> bytes:
    """Compression 0 is none, 1 lz4, 2 lz4 of bytes 0, 4, 8, ..., then 1, 5, 9, ..., then 2, ..., then 3, ..."""
    if compression == 0:
        return data
    raw = pa.decompress(data, size, codec="lz4", asbytes=True)
    if compression == 1:
        return raw
    grouped, whole, taken = np.frombuffer(raw, "u1"), np.empty(size, "u1"), 0
    for first in range(4):
        count = len(whole[first::4])
        whole[first::4] = grouped[taken : taken + count]
        taken += count
    return whole.tobytes()


def hex_hash(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def add_shard(hub: Hub, shard: bytes) -> None:
    """Rebuild the files that a shard describes, check them, and keep them with their recipes."""
    at = ENTRY
    while shard[at : at + 32] != LAST:
        file_hash = hex_hash(shard[at : at + 32])
        flags, count = struct.unpack("<II", shard[at + 32 : at + 40])
        entries = [shard[i : i + ENTRY] for i in range(at + ENTRY, at + ENTRY * (count + 1), ENTRY)]
        terms = [(hex_hash(entry[:32]), *struct.unpack("<III", entry[36:48])) for entry in entries]
        at += ENTRY * (1 + count * (2 if flags >> 31 else 1))  # a flag says that as many entries verify them
        declared = None
        if flags >> 30 & 1:
            declared = hex_hash(shard[at : at + 32])
            at += ENTRY
        keep_file(hub, file_hash, terms, declared)


def keep_file(hub: Hub, file_hash: str, terms: list[tuple[str, int, int, int]], declared: str | None) -> None:
    data = bytearray()
    for xorb, _, first, last in terms:
        stored = hub.root / "xorbs" / xorb
        if not stored.exists():
            raise HubError(400, f"shard refers to unknown xorb {xorb}")
        raw = stored.read_bytes()
        for chunk in read_chunks(raw)[first:last]:
            data += unpack(raw[chunk.begin + 8 : chunk.end], chunk.compression, chunk.size)
    sha256 = hashlib.sha256(data).hexdigest()
    if declared and declared != sha256:
        raise HubError(400, f"file {file_hash} rebuilds to sha256 {sha256}, the shard says {declared}")
    (hub.root / "files" / file_hash).write_text(json.dumps({"size": len(data), "terms": terms}))
    (hub.root / "files" / f"{sha256}.xet").write_text(file_hash)
    hub.lfs(sha256).write_bytes(data)


@route("GET", API + NAME + f"/xet-(?P<what>read|write)-token{REVISION}", "read")
def xet_token(request: Request, what: str, revision: str) -> int:
    url, token, expires = f"{request.hub.base}/cas", f"xet-{request.hub.signature}", int(time.time()) + 3600
    body = {"casUrl": url, "accessToken": token, "exp": expires}  # hf_xet reads the body, huggingface_hub the headers
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": expires}
    return request.reply(200, body, headers)


@route("POST|GET", r"/cas/v1/(?P<what>xorbs/default|shards|reconstructions)(/" + OID + ")?")
def store(request: Request, what: str, oid: str | None = None) -> int:
    """Serve the routes of version 1. hf_xet tries version 2 and others first, and then uses these."""
    hub = request.hub
    if request.headers.get("Authorization") != f"Bearer xet-{hub.signature}":
        raise HubError(401, "CAS: bad token")
    if what == "xorbs/default":
        (hub.root / "xorbs" / oid).write_bytes(request.body)
        return request.reply(200, {"was_inserted": True})
    if what == "shards":
        add_shard(hub, request.body)
        return request.reply(200, {"result": 1})
    recipe = hub.root / "files" / oid
    if not recipe.exists():
        raise HubError(404, "unknown file")
    return request.reply(200, reconstruction(request, **json.loads(recipe.read_text())))


def reconstruction(request: Request, size: int, terms: list[tuple[str, int, int, int]]) -> dict:
    """Return the terms of the requested range of a file, and where their xorbs are."""
    hub, at, offset, used = request.hub, 0, 0, []
    begin, end = request.span(size) or (0, size)
    for xorb, length, first, last in terms:
        if at < end and at + length > begin:
            if not used:
                offset = max(begin - at, 0)
            used.append({"hash": xorb, "unpacked_length": length, "range": {"start": first, "end": last}})
        at += length
    fetch = {}
    for xorb in {term["hash"] for term in used}:
        chunks = read_chunks((hub.root / "xorbs" / xorb).read_bytes())
        url = f"{hub.storage}/_xorb/{xorb}?sig={hub.signature}"
        url_range = {"start": 0, "end": chunks[-1].end - 1}
        fetch[xorb] = [{"range": {"start": 0, "end": len(chunks)}, "url": url, "url_range": url_range}]
    return {"offset_into_first_range": offset, "terms": used, "fetch_info": fetch}


@route("GET", "/_xorb/" + OID)
def xorb(request: Request, oid: str) -> int:
    return request.content((request.hub.root / "xorbs" / oid).read_bytes(), {})
