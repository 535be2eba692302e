"""A run: an identity, and numbered items in a folder.

The *identity* (settings, model, data) says which results belong together. The *items* (sentences, or prompts) are
numbered. A finished item is kept at once, in an archive of its own or of its batch, so that whatever stops a run costs
no more than the item or batch it was at: the same command resumes it.

    run = Run(folder, "script.py", files)
    with run.locked():
        if run.examine(identity, sources, goal) is not State.FINISHED:
            for number in set(numbers) - run.records(numbers).keys():
                run.append([Item(number, record, arrays)])
            run.finish(primary)                     # after the caller has merged `run.items()` into its primary files
        run.derive([name], made_from, make)

Three kinds of files stand in the folder:

    items/      run.json (identity, checksums), and the archives of the items until they are merged;
                anew/, the same of a run that measures all items again and replaces this one at its end
    primary     what was computed
    derived     what follows from the primary files: scores, statistics, pictures. They are made again whenever they are
                missing, damaged or made from something else, and are never a reason to compute anything again.

This module knows neither models nor pictures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
import hashlib
from itertools import chain
import json
import math
import os
from pathlib import Path
import warnings

from residual_fisher.common.archives import (
    ARCHIVE,
    RECORDS,
    DamagedArchiveError,
    Item,
    archives_in,
    merged_items,
    read_records,
    readable_records,
    record_lines,
    seconds_of,
    write_items,
)
from residual_fisher.common.files import (
    check_writable,
    json_text,
    remove_unfinished,
    sha256,
    write_json,
)
from residual_fisher.common.lock import LOCK, lock_directory, require_unlocked
from residual_fisher.common.program import UserError
from residual_fisher.common.sources import Source, files_of
from residual_fisher.common.text import duration, excerpt

ITEMS = "items"
ANEW = f"{ITEMS}/anew"  # the items of a run that measures all of them again
MANIFEST = "run.json"
FORMAT = "residual-fisher/2"
MAX_HASHED = 1 << 30  # bytes of a file: of a larger one only the size is compared
OTHERS = {  # by key
    "model": "another model",
    "hook_layer": "another layer",
    "dtype": "another dtype",
    "sentences": "other sentences",
    "text": "another text",
}
OTHER_VERSION = "a model whose fingerprint another version of this project took, in another way"


class State(Enum):
    """What a folder holds of the run that was asked for."""

    NEW = "nothing"
    STARTED = "a part of its items"
    FINISHED = "everything"


def checksum(path: Path) -> list | None:
    """Size and SHA-256 of a file (of a very large one the size alone); None if there is none."""
    if not os.path.isfile(path):  # a name may be too long for a path
        return None
    size = path.stat().st_size
    return [size, sha256(path) if size <= MAX_HASHED else None]


def stamps(model: str) -> list | None:
    """Names, sizes and times of the files of a local model's directory; None for a model from elsewhere."""
    if not os.path.isdir(model):
        return None
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def sources_of(data: Source, split: str, model: str) -> dict:
    """What shows, without loading them, that data and model are as they were."""
    files = [checksum(Path(path)) for path in files_of(data, split) or ()]
    return {"data": files if len(files) > 1 else files[0] if files else None, "model": stamps(model)}


def read_back(value):
    """`value` as it is read back from JSON that `json_text` has written."""
    return json.loads(json_text(value))


def read_manifest(folder: Path, items: str = ITEMS) -> dict | None:
    """What `items/run.json` says; None unless it is as it was written."""
    try:
        found = json.loads((folder / items / MANIFEST).read_text(encoding="utf-8"))
        known = found.pop("checksum")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None
    return found if found.get("format") == FORMAT and known == short_hash(found) else None


def finished_manifest(folder: Path, advice: str) -> dict:
    """What `read_manifest` says of a finished run whose primary files are intact.

    Raises:
        UserError: there is none, which `advice` follows; or a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest["complete"]:
        raise UserError(f"no finished run in {folder}: {advice}")
    for file, known in manifest["primary"].items():
        if checksum(folder / file) != known:
            raise UserError(f"{folder / file} is missing or damaged: the command that made it makes it again")
    return manifest


def short_hash(value) -> str:
    """16 hexadecimal digits, of a value of JSON's types."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def shown(value) -> str:
    return excerpt(repr(value), 60)


def what_differs(key: str, then: str, now: str) -> str:
    """What two runs differ in, whose identities differ at a key. Each way to take a fingerprint has its own length."""
    return OTHER_VERSION if key == "model" and len(then) != len(now) else OTHERS[key]


def _number(goal: int | str | list[str]) -> float:
    if isinstance(goal, list):
        return len(goal)
    return math.inf if goal == "all" else goal


# --- the run -------------------------------------------------------------------------------------


class Run:
    """The run of a program in a folder."""

    def __init__(
        self,
        folder: Path,
        program: str,
        files: Sequence[str],
        overwrite: bool = False,
        read_only: bool = False,
        unit: str = "items",
    ):
        """
        Args:
            files: names of all primary and derived files that the program may write.
            overwrite: replace an earlier run.
            read_only: write nothing, also where something is damaged.
            unit: what messages call the items.
        """
        self.folder, self.program, self.files = folder, program, tuple(files)
        self.overwrite, self.read_only, self.unit = overwrite, read_only, unit
        self.items_folder = folder / ITEMS
        self.manifest: dict | None = None  # of the run in the folder, or of this one once it has begun
        self._asked: dict = {}  # identity, sources and goal of this run, from `examine` on
        self._split: Callable[[], Iterable[Item]] = tuple
        self._state, self._begun = State.NEW, False

    @property
    def anew(self) -> bool:
        """Whether it measures all items again, beside the run that the folder holds: see `measure_anew`."""
        return self.items_folder != self.folder / ITEMS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the folder (a run that is read only: makes sure that there is none).

        Raises:
            UserError: another process works there, it cannot be written to, or it holds something else.
        """
        if self.read_only:
            require_unlocked(self.folder)
            self.open()
            yield
            return
        with lock_directory(self.folder):
            self.open()
            remove_unfinished(self.folder, self.files)
            for items in (ITEMS, ANEW):
                remove_unfinished(self.folder / items, ["[0-9]*-[0-9]*.npz", MANIFEST, RECORDS])
            if self.manifest and self._is_merged():  # a kill at the end may have left some
                self._remove_archives()
                if (anew := read_manifest(self.folder, ANEW)) and anew["identity"] == self.manifest["identity"]:
                    self._remove_anew()
            yield

    def open(self) -> None:
        """Looks at what the folder holds.

        Raises:
            UserError: files that this program did not write; or its own without a manifest, unless it may overwrite
                them.
        """
        self.manifest = read_manifest(self.folder)
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        names = {name for name in names if name != LOCK and not self._is_unfinished(name)}
        own = names & {*self.files, ITEMS}
        archives = [path for *_, path in archives_in(self.items_folder)]
        for path in (*(self.folder / name for name in {*own, *self.files, f"{ITEMS}/{MANIFEST}"}), *archives):
            if path.is_dir() != (path == self.items_folder):
                kind = "a directory" if path.is_dir() else "a file, or a link that leads nowhere,"
                raise UserError(f"cannot write {path}: {kind} has its place (choose another --output-dir)")
        foreign = sorted(names - own)
        if self.manifest is None and foreign:
            raise UserError(
                f"{self.folder} holds files that {self.program} did not write ({excerpt(foreign[0], 40)}): "
                "choose another --output-dir"
            )
        if self.manifest and self.manifest["program"] != self.program:
            raise UserError(f"{self.folder} holds a run of {self.manifest['program']}: choose another --output-dir")
        if self.manifest is None and (own - {ITEMS} or archives) and not self.overwrite:
            raise UserError(
                f"{self.folder} holds results without a readable {ITEMS}/{MANIFEST}: --overwrite replaces them"
            )

    def _is_unfinished(self, name: str) -> bool:
        """Whether it is what a killed process was writing."""
        return any(name.startswith(f".{own}-") for own in self.files)

    # --- is it this run, and how far has it come? ---

    def is_begun(self) -> bool:
        """Whether the folder holds a run, or results."""
        return self.manifest is not None or any((self.folder / name).exists() for name in self.files)

    def has_results(self) -> bool:
        return self.manifest is not None and (self.manifest["complete"] or bool(archives_in(self.items_folder)))

    def is_finished(self, settings: dict, sources: dict, goal: int | str | list[str]) -> bool:
        """Whether it is plain, before anything slow, that everything asked for has been computed.

        Args:
            settings: the options that count.
            sources: what shows that model and data are as they were ("data", "model"), without loading them.
            goal: how many items are wanted, or "all", or the texts that they are of, in order.
        Raises:
            UserError: the folder cannot be written to, holds a run with other settings, or its data have changed.
        """
        check_writable(self.folder)
        if self.overwrite or not self.has_results():
            return False
        self._require_same({"settings": settings}, goal)
        if not self.manifest["complete"] or not self._covers(goal):
            return False
        then = self.manifest["sources"]
        if then["data"] != read_back(sources["data"]):
            what = f"the data have changed since the run in {self.folder} ended"
            raise UserError(f"{what}: --overwrite starts anew, without {self.kept()}")
        return then["model"] == read_back(sources["model"]) and self._damaged() is None

    def examine(
        self,
        identity: dict,
        sources: dict,
        goal: int | str | list[str],
        split: Callable[[], Iterable[Item]] = tuple,
        notes: dict | None = None,
    ) -> State:
        """How far the run with this identity has come. Writes nothing.

        Args:
            identity: "settings" and whatever else two runs have to share to be one, in JSON's types.
            sources, goal: see `is_finished`.
            split: the items that the primary files of a finished run were merged from, ascending, for it to be
                extended.
            notes: what else is to be kept with the run.
        Raises:
            UserError: the folder holds a run with another identity, and may not be overwritten.
        """
        about = {"identity": identity, "sources": sources, "goal": goal, "notes": notes or {}}
        self._asked, self._split = read_back(about), split
        self._state = State.NEW
        if not self.overwrite and self.has_results():
            self._require_same(self._asked["identity"], goal)
            if not self.manifest["complete"]:
                self._state = State.STARTED
            elif damaged := self._damaged():
                warnings.warn(f"{self.folder / damaged} is missing or damaged: computing it again", stacklevel=2)
                if not self._is_merged():  # the other archives are kept
                    self._state = State.STARTED
            else:
                self._state = State.FINISHED if self._covers(goal) else State.STARTED
        return self._state

    def _require_same(self, identity: dict, goal: int | str | list[str]) -> None:
        known = self.manifest["identity"]
        then, now = known["settings"], read_back(identity["settings"])
        if differing := [key for key in {**then, **now} if then.get(key) != now.get(key)]:
            # options that depend on one that is off are in one of the two alone
            named = [key for key in differing if key in then and key in now] or differing
            changes = ", ".join(
                f"{key.rstrip('_')} was {shown(then.get(key))} and is {shown(now.get(key))}" for key in named
            )
            raise UserError(f"{self.folder} holds a run with other settings ({changes}): {self._replacing()}")
        for key, value in identity.items():
            if known.get(key) != value and key != "settings":
                change = f"{shown(known.get(key))} was its {key}, and is {shown(value)}"
                what = what_differs(key, str(known.get(key)), str(value))
                raise UserError(f"{self.folder} holds a run of {what} ({change}): {self._replacing()}")
        if isinstance(goal, list):
            self._require_same_texts(self.manifest["goal"], read_back(goal))

    def _require_same_texts(self, then: list[str], now: list[str]) -> None:
        for number, (old, new) in enumerate(zip(then, now, strict=False), 1):
            if old != new:
                change = f"number {number} was {shown(old)}, and is {shown(new)}"
                raise UserError(f"{self.folder} holds a run of other texts ({change}): {self._replacing()}")
        if len(now) < len(then) and not self.manifest["complete"]:
            missing = f"the next was {shown(then[len(now)])}"
            raise UserError(f"{self.folder} holds an unfinished run of more texts ({missing}): {self._replacing()}")

    def is_of(self, identity: dict) -> bool:
        """Whether the run in the folder has this identity."""
        return self.manifest is not None and self.manifest["identity"] == read_back(identity)

    def _replacing(self) -> str:
        return f"--overwrite replaces it, with {self.kept()}"

    def kept(self) -> str:
        """What it has, in words: how many items, and how long they took where that is known."""
        items, seconds = self.spent()
        return f"its {items} finished {self.unit}" + (f" (about {duration(seconds)})" if seconds else "")

    def spent(self) -> tuple[int, float | None]:
        """How many items are finished, and the seconds that they took where that is known."""
        if self.manifest["complete"]:
            return self.manifest["items"], self.manifest["notes"].get("seconds")
        found = readable_records(self.items_folder)
        return len(found), sum(map(seconds_of, found.values()))

    def _covers(self, goal: int | str | list[str]) -> bool:
        """Whether a finished run has tried to reach as many items as are wanted."""
        then, now = map(_number, (self.manifest["goal"], goal))
        return now <= max(then, self.manifest["items"])

    def _damaged(self) -> str | None:
        """The first primary file of a finished run that is missing, was missing when it was sealed, or has changed."""
        return next((n for n, known in self.manifest["primary"].items() if not self._is_intact(n, known)), None)

    def _is_intact(self, name: str, known: list | None) -> bool:
        return known is not None and checksum(self.folder / name) == known

    # --- items ---

    def measure_anew(self, identity: dict, goal: int | str | list[str]) -> None:
        """From now on it is a run that measures all items again, beside the one in the folder, as they differ with the
        settings. The files there stay until `finish`. Items that were measured with this identity before count.

        Raises:
            UserError: `identity` differs in more than its settings, or the goal is of other texts.
        """
        self._require_same({**identity, "settings": self.manifest["identity"]["settings"]}, goal)
        self.items_folder, self.manifest = self.folder / ANEW, read_manifest(self.folder, ANEW)
        self.overwrite = not self.is_of(identity)

    def begin(self) -> None:
        """Makes the folder ready for items of this run. An earlier run that may be replaced is removed.

        Killed at any point, the folder holds the earlier run, unfinished, or this one.

        Raises:
            UserError: the folder cannot be written to.
        """
        if self._state is State.NEW:
            if self.manifest:
                self._write_manifest(complete=False, primary={}, derived={})
            self._remove_archives()
            if not self.anew:
                if self.overwrite or not self.is_of(self._asked["identity"]):
                    self._remove_anew()
                for name in self.files:
                    (self.folder / name).unlink(missing_ok=True)
        elif self._is_merged():  # to be extended
            self._remove_archives()
            write_items(self._archive(0, self.manifest["last"]), self._split())
        self.manifest = {"format": FORMAT, "program": self.program}
        self._write_manifest(**self._asked, complete=False, items=0, primary={}, derived={})
        self._begun = True

    def join(self) -> None:
        """Works on a run that another process has begun."""
        self.manifest, self._state, self._begun = read_manifest(self.folder), State.STARTED, True

    def records(self, numbers: range) -> dict[int, dict]:
        """The records of those items among `numbers` that are finished and intact; damaged archives are removed."""
        if not self._begun and self._state is State.NEW:
            return {}
        if not self._begun and self._is_merged():
            return {number: record for number, record, _ in self._split() if number in numbers}
        found = {}
        for first, last, path in archives_in(self.items_folder):
            if first >= numbers.stop or last < numbers.start:
                continue
            try:
                found |= read_records(path)
            except DamagedArchiveError:
                warnings.warn(f"{path} is damaged: computing it again", stacklevel=2)
                if not self.read_only:
                    path.unlink(missing_ok=True)
        return {number: found[number] for number in numbers if number in found}

    def append(self, items: Sequence[Item]) -> None:
        """Keeps finished items, as one archive.

        Raises:
            UserError: it cannot be written.
        """
        if not self._begun:
            self.begin()
        numbers = [item.number for item in items]
        write_items(self._archive(min(numbers), max(numbers)), items)

    def pack(self, numbers: range) -> None:
        """Makes one archive of those that hold nothing but items among `numbers`: millions of files are slow."""
        inside = [
            (first, last, path)
            for first, last, path in archives_in(self.items_folder)
            if first in numbers and last in numbers
        ]
        if len(inside) < 2:
            return
        packed = self._archive(inside[0][0], max(last for _, last, _ in inside))
        write_items(packed, merged_items([path for *_, path in inside]))
        for *_, path in inside:
            if path != packed:
                path.unlink()

    def items(self) -> Iterator[Item]:
        """All finished items, by ascending number, one in memory at a time."""
        if not self._begun and self._state is State.NEW:
            return
        if not self._begun and self._is_merged():
            yield from self._split()
            return
        for cluster in self._overlapping():
            yield from merged_items([path for *_, path in cluster])

    def all_records(self) -> Iterator[tuple[int, dict]]:
        """Number and record of all items that `items` has, without their arrays."""
        for cluster in self._overlapping():
            yield from sorted(dict(chain.from_iterable(record_lines(path) for *_, path in cluster)).items())

    def last(self) -> int:
        """How far the numbers of the finished items reach: one less than none."""
        return max((last for _, last, _ in archives_in(self.items_folder)), default=-1)

    def _overlapping(self) -> Iterator[list[tuple[int, int, Path]]]:
        """The archives in groups whose numbers overlap, as those of a window's batches do."""
        group, end = [], -1
        for archive in archives_in(self.items_folder):
            if group and archive[0] > end:
                yield group
                group = []
            group.append(archive)
            end = max(end, archive[1])
        if group:
            yield group

    def _archive(self, first: int, last: int) -> Path:
        return self.items_folder / f"{first:08d}-{last:08d}.npz"

    def _is_merged(self) -> bool:
        """Whether the run is finished, and its items are in other primary files than the archives."""
        return self.manifest["complete"] and not any(ARCHIVE.fullmatch(Path(n).name) for n in self.manifest["primary"])

    def _remove_archives(self) -> None:
        for *_, path in archives_in(self.items_folder):
            path.unlink()

    def _remove_anew(self) -> None:
        for *_, path in archives_in(self.folder / ANEW):
            path.unlink()
        with suppress(OSError):  # there is none, or somebody's own file in it
            (self.folder / ANEW / MANIFEST).unlink()  # last: it says that they may be removed
            (self.folder / ANEW).rmdir()

    # --- the end ---

    def finish(self, items: int, primary: Sequence[str] | None = None, **notes) -> None:
        """Completes a run whose items are all computed: keeps checksums of its primary files.

        Args:
            items: how many there are.
            primary: the files that the caller has merged them into; None: the archives stay, as primary files (not if
                they were measured anew).
            notes: see `examine`.
        """
        last = self.last()
        if primary is None:
            for cluster in list(self._overlapping()):
                self.pack(range(cluster[0][0], max(end for _, end, _ in cluster) + 1))
            primary = [f"{ITEMS}/{path.name}" for *_, path in archives_in(self.items_folder)]
        known = {name: checksum(self.folder / name) for name in primary}
        notes = {**self.manifest["notes"], **notes}
        anew, self.items_folder = self.anew, self.folder / ITEMS
        self._write_manifest(complete=True, items=items, last=last, primary=known, notes=notes)
        if self._is_merged():
            self._remove_archives()
        if anew:
            self._remove_anew()

    def derive(self, names: Sequence[str], made_from: object, make: Callable[[], None]) -> bool:
        """Has `make` write derived files, unless they are intact and made from the same; returns whether it did.

        Args:
            made_from: in JSON's types, what the files follow from, such as checksums of other files.
        Raises:
            UserError: a file cannot be written.
        """
        if self.is_derived(names, made_from):
            return False
        make()
        made = {name: {"checksum": checksum(self.folder / name), "made_from": made_from} for name in names}
        self._write_manifest(derived={**self.manifest["derived"], **made})
        return True

    def is_derived(self, names: Sequence[str], made_from: object) -> bool:
        known, made_from = self.manifest["derived"], read_back(made_from)
        return all(
            name in known and known[name]["made_from"] == made_from and self._is_intact(name, known[name]["checksum"])
            for name in names
        )

    def _write_manifest(self, **changes) -> None:
        self.manifest = read_back({**self.manifest, **changes})
        write_json(self.items_folder / MANIFEST, {**self.manifest, "checksum": short_hash(self.manifest)})
