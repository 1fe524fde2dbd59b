"""
Read JSON and YAML, claim outputs before any work is done, write files atomically, append to JSON Lines files that survive a killed
process, and compare settings.
"""

import json
import math
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 100_000  # of a file with all its aliases expanded
PROBE = 1 << 16  # bytes that a claim writes, so that a full disk is noticed


def shown(value: Any, limit: int = 80) -> str:
    """
    Return a value for an error message: its `repr`, which is on one line and has no control characters, shortened to `limit`
    characters.
    """
    if isinstance(value, str | bytes):
        value = value[: limit + 1]  # a `repr` of a gigabyte would be slow
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def check_regular(path: str | Path) -> None:
    """
    Check that a file is neither a pipe nor a device, which can be read only once or never end.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the path is a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path}: found a pipe or a device, expected a file. Write the content to a file first.")


def shell_word(text: str) -> str:
    r"""
    Quote a word for a command line that someone may copy. A word with line breaks or other control characters is written as
    `$'...'`, in which Bash and Zsh read `\n` and `\u202e`.
    """
    if text.isprintable():
        return shlex.quote(text)

    def visible(character: str) -> str:
        if character.isprintable():
            return f"\\{character}" if character in "\\'" else character
        return ascii(character)[1:-1] if character.isascii() else f"\\U{ord(character):08x}"

    return f"$'{''.join(map(visible, text))}'"


def parse_json(text: str | bytes, where: str) -> Any:
    """
    Parse JSON that this package wrote. Unlike `json.loads`, it refuses duplicate keys, numbers that are not finite, and text that is
    not valid Unicode.

    Args:
        text (`str` or `bytes`):
            Text to parse, in UTF-8 if it is `bytes`.
        where (`str`):
            File, or file and line, for the error message.

    Raises:
        `ValueError`: If the text is not valid JSON, or is nested too deeply. The message starts with `where`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # raises if an escape is half of a character
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start}).") from None
    except ValueError as error:  # JSONDecodeError, an integer of thousands of digits, or one of the two refusals
        raise ValueError(f"{where}: not valid JSON ({error}).") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested too deeply).") from None


class DuplicateKeyError(ValueError):
    """A JSON object has the same key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    `object_pairs_hook` for `json` that refuses duplicate keys, of which `json` would keep the last one.

    Raises:
        `DuplicateKeyError`: If a key occurs twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DuplicateKeyError(f"the key {shown(key)} occurs twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{shown(name)} is not a finite number")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_refuse_constant)


def read_text(path: str | Path) -> str:
    """
    Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the file is not valid UTF-8. The message names the file.
    """
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start}).") from None


def read_json(path: str | Path, remedy: str = "") -> dict[str, Any]:
    """
    Read a file with one JSON object.

    Args:
        path (`str` or `Path`):
            File to read.
        remedy (`str`, *optional*):
            What to do about a damaged file, for the error message.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If the file is not a JSON object. The message names the file.
    """
    check_regular(path)
    return _parse_object(Path(path).read_bytes(), str(path), remedy)


def read_json_lines(path: str | Path, remedy: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield `(where, record)` for each line of a file with one JSON object per line. `where` is the file and the line number.

    Args:
        path (`str` or `Path`):
            File to read.
        remedy (`str`, *optional*):
            What to do about a damaged file, for the error message.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If a line is not a JSON object. The message names file and line.
    """
    check_regular(path)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            yield where, _parse_object(line, where, remedy)


def _parse_object(content: bytes, where: str, remedy: str) -> dict[str, Any]:
    """Parse a JSON object. See [`parse_json`]. Error messages end with the remedy."""
    try:
        value = parse_json(content, where)
    except ValueError as error:
        raise ValueError(f"{error} {remedy}".rstrip()) from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {shown(value)}, expected a JSON object. {remedy}".rstrip())
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    Read the settings in a YAML file.

    Raises:
        `OSError`: If the file does not exist, or is a folder.
        `ValueError`: If the file is not valid UTF-8, or not a mapping from names to values. See also [`parse_yaml`].
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: file not found. Expected a YAML file of settings.")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder. Expected a YAML file of settings.")
    check_regular(path)
    if os.path.getsize(path) > MAX_YAML_BYTES:
        raise ValueError(f"{path}: the file has more than {MAX_YAML_BYTES >> 20} MB, expected a file of settings.")
    try:  # YAML may also be UTF-16, which TRL does not read
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not valid UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} contains no options. Write one per line, such as `seed: 42`.")
    return values


def parse_yaml(text: str | bytes, where: str) -> Any:
    """
    Parse YAML.

    Args:
        text (`str` or `bytes`):
            Text to parse.
        where (`str`):
            File, for the error message.

    Raises:
        `ValueError`: If the text is not valid YAML, if a name occurs twice, or if its aliases expand to more than 100,000 values. The
            message starts with `where` and, where there is one, the line.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = f"{where}:{key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"{line}: found {shown(key.value)}, expected the name of an option.")
            if key.value in seen:
                raise ValueError(f"{line}: found {shown(key.value)} twice. Give it once.")
            seen.add(key.value)
        if _num_nodes(node, {}) > MAX_YAML_NODES:
            raise ValueError(
                f"{where}: its aliases expand to more than {MAX_YAML_NODES:,} values. Write the values out."
            )
        try:
            return loader.construct_document(node)
        except ValueError as error:  # a date such as 2024-13-45, or an integer of thousands of digits
            raise ValueError(f"{where}: a value is invalid ({error}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or " ".join(str(error).split())
        raise ValueError(f"{place}: not valid YAML ({problem}).") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid YAML (nested too deeply).") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start}).") from None


def _num_nodes(node: Any, known: dict[int, int]) -> int:
    """Return the number of YAML nodes with all aliases expanded, without expanding them. An alias of itself counts as too many."""
    if id(node) not in known:
        known[id(node)] = MAX_YAML_NODES + 1  # while it is being counted
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_num_nodes(part, known) for part in parts)
    return known[id(node)]


@contextmanager
def claimed_file(path: str | Path, option: str, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """
    Context manager that claims an output file before any work is done.

    It checks that the file can be written, creates its folder, and locks its name until the end of the block. Folders that are then
    empty are removed again. Partial files of killed processes are removed.

    Args:
        path (`str` or `Path`):
            File that the block creates or replaces, with [`replacing`]. A symbolic link is followed.
        option (`str`):
            Option that holds the path, for error messages.
        inputs (`Iterable[str | Path]`, *optional*):
            Files that must not be replaced.

    Returns:
        `Path`: File to write, with symbolic links resolved.

    Raises:
        `OSError`: If the file cannot be written. The message names the option.
        `BlockingIOError`: If another process is writing to the file.
    """
    target = resolved_output(path, option)
    is_folder = os.path.isdir(target) or os.fspath(path).endswith("/")
    if is_folder or (os.path.exists(target) and not target.is_file()):
        kind = "a folder" if is_folder else "not a regular file"
        raise OSError(f"{path} is {kind}. Choose a file as `{option}`.")
    for name in inputs:
        if os.path.exists(target) and os.path.exists(name) and os.path.samefile(target, name):
            raise OSError(f"{path} is an input, which would be replaced. Choose another `{option}`.")
    with claimed_name(target, path, option):
        remove_partial(target)
        yield target


@contextmanager
def claimed_folder(path: str | Path, option: str, files: Iterable[str] = (), lock: str = ".lock") -> Iterator[Path]:
    """
    Context manager that claims a folder in which a command writes several files.

    It is as [`claimed_file`], but the lock is in the folder.

    Args:
        path (`str` or `Path`):
            Folder, which is created if it does not exist. A symbolic link is followed.
        option (`str`):
            Option that holds the path, for error messages.
        files (`Iterable[str]`, *optional*):
            Names of the files that the block writes with [`replacing`]. Their partial files are removed.
        lock (`str`, *optional*, defaults to `".lock"`):
            Name of the lock file. Processes that share the folder have locks with different names.
    """
    target = resolved_output(path, option)
    if os.path.exists(target) and not target.is_dir():
        raise NotADirectoryError(f"{path} is a file. Choose a folder as `{option}`.")
    with _claimed(target / lock, path, option):
        for name in files:
            remove_partial(target / name)
        yield target


def claimed_name(target: Path, path: str | Path, option: str) -> Any:
    """
    Return a context manager that creates the parent folder of an output, tries to write there, and locks the name of the output.

    Args:
        target (`Path`):
            Output, from [`resolved_output`].
        path (`str` or `Path`), option (`str`):
            Output as given, and its option, for error messages.
    """
    return _claimed(lock_file(target), path, option)


@contextmanager
def _claimed(lock: Path, path: str | Path, option: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(lock.parent))
            with tempfile.TemporaryFile(dir=lock.parent) as probe:
                probe.write(bytes(PROBE))
                probe.flush()
                os.fsync(probe.fileno())
            stack.enter_context(_locked(lock, f"{path}: another process is writing to this output."))
        except BlockingIOError as error:
            raise BlockingIOError(f"{error} Wait for it or stop it, or choose another `{option}`.") from None
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            raise OSError(
                f"{path}: this output cannot be written ({error.strerror}{place}). Choose another `{option}`."
            ) from error
        yield


def resolved_output(path: str | Path, option: str) -> Path:
    """
    Return an output as an absolute path without symbolic links.

    Raises:
        `OSError`: If it is a symbolic link to nothing, is below a file, may not be written to, or starts with `~/`.
    """
    if Path(path).parts[:1] == ("~",):  # as in YAML and in `--output_dir=~/x`
        raise OSError(f"{path}: the shell did not replace `~`. Write the home folder out in `{option}`.")
    given = Path(path).absolute()
    nearest = next(place for place in (given, *given.parents) if os.path.lexists(place))
    if not os.path.exists(nearest):
        raise OSError(
            f"{path}: {nearest} is a symbolic link to {os.readlink(nearest)}, which does not exist. Remove the link, or choose another "
            f"`{option}`."
        )
    if nearest != given and not nearest.is_dir():
        raise NotADirectoryError(f"{path}: {nearest} is a file, not a folder. Choose another `{option}`.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{path}: {nearest} may not be written to. Choose another `{option}`.")
    return Path(os.path.realpath(given))


def lock_file(path: Path) -> Path:
    """Return the lock file of a path: a hidden file next to it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create a folder and its parents. Those that are empty at the end are removed."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder is not empty
            for place in made:
                place.rmdir()


@contextmanager
def _locked(file: Path, message: str) -> Iterator[None]:
    lock = _acquire(file, message)
    try:
        yield
    finally:
        _release(lock)


def _acquire(file: Path, message: str) -> FileLock:
    """
    Lock a file, which is created. The system releases the lock of a killed process, and its file stays.

    On file systems without locks, current versions of `filelock` write the host and the process into the file instead.

    Raises:
        `BlockingIOError`: With this message, if another process has locked the file.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(message) from None
    return lock


def _release(lock: FileLock) -> None:
    with suppress(OSError):  # Windows cannot remove a file that is open
        os.unlink(lock.lock_file)
    lock.release()


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """
    Context manager that writes a file atomically. The file replaces `path` at the end of the block, and is discarded
    after an error.

    Args:
        path (`str` or `Path`):
            File to create or replace, in an existing folder.
        mode (`str`, *optional*, defaults to `"w"`):
            `"w"` for text in UTF-8, `"wb"` for bytes.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove the partial files that [`replacing`] left when its process was killed. The caller must have claimed `path`."""
    if path.parent.is_dir():
        pattern = re.compile(re.escape(f".{path.name}.") + r"\d+")
        for partial in [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]:
            partial.unlink()


def write_or_keep(folder: Path, texts: Mapping[str, str]) -> None:
    """
    Write results that took long to compute. If a file cannot be written, for example because the disk is full, all files are saved in
    the system's temporary folder.

    Args:
        folder (`Path`):
            Folder of the files, which exists.
        texts (`Mapping[str, str]`):
            Content of each file. Each file is written atomically, in this order.

    Raises:
        `OSError`: If a file could not be written. The message says where the results are.
    """
    try:
        for name, text in texts.items():
            with replacing(folder / name) as file:
                file.write(text)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(prefix="trl_hrm-"))
        for name, text in texts.items():
            (kept / name).write_text(text, encoding="utf-8")
        raise OSError(
            f"{folder / name} could not be written ({error.strerror}). The results are in {kept}: {', '.join(texts)}. Move them to "
            f"{folder}."
        ) from error


def dump_json(value: Any, where: str | Path, indent: int | None = None) -> str:
    """
    Return a value as JSON.

    Args:
        value (`Any`):
            Value to write.
        where (`str` or `Path`):
            File that it is written to, for the error message.
        indent (`int`, *optional*):
            Number of spaces per level. By default, everything is on one line.

    Raises:
        `ValueError`: If a number is NaN or infinite, which no other program could read.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{where}: a value cannot be written as JSON ({error}).") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON. The file is written atomically. See [`dump_json`]."""
    text = dump_json(value, path, indent=2)
    with replacing(path) as file:
        file.write(text + "\n")


class AppendedLines:
    """
    A JSON Lines file opened for appending, by one process at a time.

    Lines are written without a buffer, so a killed process loses at most the line that it was writing. An incomplete
    last line is removed when the file is opened again.

    The lock is a hidden file next to it, which [`AppendedLines.close`] removes. A killed process leaves the lock file
    behind, but unlocked.

    Args:
        path (`str` or `Path`):
            File to open. It is created if it does not exist.

    Attributes:
        size (`int`):
            Size of the file in bytes. The file always ends with a complete line.
        torn (`int`):
            Number of bytes that were removed when the file was opened.

    Raises:
        `BlockingIOError`: If another process has opened the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = _acquire(
            lock_file(self.path),
            f"{self.path}: another process is writing to this file. Wait for it or stop it, or use another shard or another "
            "--output_dir.",
        )
        self._file = open(self.path, "ab", buffering=0)
        self.size = _end_of_last_line(self.path)
        self.torn = os.path.getsize(self.path) - self.size
        if self.torn:
            self._file.truncate(self.size)

    def append(self, value: Any) -> bytes:
        """
        Append a value as one line, and return the line.

        Raises:
            `OSError`: If the line cannot be written, for example because the disk is full. Nothing of the line is
            kept.
            `ValueError`: If a number is NaN or infinite.
        """
        line = dump_json(value, self.path).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self.size)
            raise OSError(
                error.errno,
                f"{self.path}: a line could not be written ({error.strerror}). All earlier lines are complete. Free some disk "
                "space and run the same command again to resume",
            ) from error
        self.size += len(line)
        return line

    def clear(self) -> None:
        """Remove all lines."""
        self._file.truncate(0)
        self.size = 0

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file.closed:
            return
        self._file.close()
        _release(self._lock)

    def __enter__(self) -> "AppendedLines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end_of_last_line(path: Path, block: int = 1 << 16) -> int:
    """Return the number of bytes up to the last line break, searching backwards."""
    with open(path, "rb") as file:
        start, found = file.seek(0, os.SEEK_END), -1
        while start and found < 0:
            end, start = start, max(0, start - block)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
        return start + found + 1
