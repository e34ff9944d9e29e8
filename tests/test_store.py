"""The stage store on a local disk: commits, damage, locks, and places that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pyarrow as pa
import pytest
from said import Said

from karploop.errors import UserError
from karploop.files import write_atomic
from karploop.manifest import MANIFEST, Corrupt, Manifest, digest
from karploop.mesh import Begun
from karploop.reporting.progress import Progress
from karploop.rng import Rng
from karploop.stages import Stages, Stopped
from karploop.store import COLLECTED, Store

ROOT = pathlib.Path(__file__).parent.parent
IDENTITY = dict(
    stage="train",
    key="0123abcd",
    version="v",
    config={"steps": 3, "rate": 0.1, "sizes": [1, 2]},
    inputs={"params": {"stage": "warmup", "key": "k", "content": "c"}},
    rng={"seed": 0, "member": 0, "round": 1},
)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def store(tmp_path, said) -> Store:
    store = Store(str(tmp_path / "workdir"), said)
    store.open()
    return store


def commit(store: Store, files: dict[str, bytes] | None = None, **identity) -> Manifest:
    with store.scratch() as scratch:
        directory = scratch / "files"
        directory.mkdir()
        for name, data in (files or {"a.bin": b"first", "deep/b.bin": b"second"}).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
        return store.commit(directory, **IDENTITY | identity)


def entry(store: Store) -> pathlib.Path:
    return pathlib.Path(store.entry("train", "0123abcd"))


def reopened(store: Store) -> Store:
    """As another process sees it: with nothing verified yet."""
    return Store(str(store.root), store.say)


# -- commits -------------------------------------------------------------------------------------


def test_a_commit_is_found_whole(store, said):
    assert store.find("train", "0123abcd") is None
    manifest = commit(store)
    found = reopened(store).find("train", "0123abcd")
    assert found == manifest
    assert found.content == manifest.content
    assert store.fetch(found, "deep/b.bin").read_bytes() == b"second"
    assert not said
    assert list((entry(store)).rglob("*.tmp")) == []


def test_the_manifest_lists_every_file_with_its_hash(store):
    commit(store)
    text = (entry(store) / MANIFEST).read_text()
    assert json.loads(text)["files"] == {
        "a.bin": {
            "sha256": "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e",
            "bytes": 5,
        },
        "deep/b.bin": {
            "sha256": "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4",
            "bytes": 6,
        },
    }


def test_content_depends_on_names_and_bytes_alone(store):
    first = commit(store)
    same = commit(store, key="other", version="w", config={})
    renamed = commit(store, {"c.bin": b"first", "deep/b.bin": b"second"}, key="third")
    assert first.content == same.content != renamed.content


def test_a_twin_stays_in_place(store):
    commit(store)
    before = (entry(store) / "a.bin").stat().st_ino
    commit(store)
    assert (entry(store) / "a.bin").stat().st_ino == before


def test_everything_is_flushed_before_the_rename(store, monkeypatch):
    """A rename that reaches the disk before its files do would survive a power cut empty."""
    events = []

    def path_of(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(("fsync", path_of(descriptor)))
        real_fsync(descriptor)

    def rename(source, target):
        events.append(("rename", str(target)))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    commit(store)
    target = str(entry(store))
    at = events.index(("rename", target))
    flushed = {path for kind, path in events[:at] if kind == "fsync"}
    names = {re.sub(r".*/files/?", "", path) for path in flushed}
    assert names >= {"", "a.bin", "deep", "deep/b.bin", MANIFEST}
    assert ("fsync", str(entry(store).parent)) in events[at:]


def test_an_interrupted_commit_leaves_nothing(store, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "rename", refuse)
        commit(store)
    assert store.find("train", "0123abcd") is None
    assert not list((pathlib.Path(store.root) / "tmp").iterdir())
    commit(store)
    assert store.find("train", "0123abcd")


def test_an_atomic_write_gives_the_old_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", refuse)
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


# -- damage --------------------------------------------------------------------------------------


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def grow(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace_by_directory(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


DAMAGES = [flip, truncate, empty, grow, pathlib.Path.unlink, replace_by_directory, dangle]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["a.bin", "deep/b.bin", MANIFEST])
def test_damage_is_named_and_replaced(store, said, name, damage):
    manifest = commit(store)
    damage(entry(store) / name)
    assert reopened(store).find("train", "0123abcd") is None
    assert str(entry(store) / name) in said
    again = reopened(store)
    commit(again)
    assert again.find("train", "0123abcd") == manifest
    assert (entry(store) / "a.bin").read_bytes() == b"first"
    assert not list((pathlib.Path(store.root) / "tmp").iterdir())


def test_every_byte_of_a_manifest_counts(store):
    text = commit(store).text().encode()
    path = entry(store) / MANIFEST
    for position in range(len(text)):
        changed = bytearray(text)
        changed[position] ^= 0x20
        path.write_bytes(changed)
        with pytest.raises(Corrupt, match=re.escape(str(path))):
            store.manifest("train", "0123abcd")


def test_a_rewritten_manifest_is_not_believed(store):
    """One that is well-formed JSON, as an editor leaves it."""
    commit(store)
    path = entry(store) / MANIFEST
    fields = json.loads(path.read_text())
    fields["config"]["steps"] = 4
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    with pytest.raises(Corrupt, match="checksum"):
        store.manifest("train", "0123abcd")


def test_a_manifest_in_the_wrong_folder(store, said):
    commit(store)
    os.rename(entry(store), entry(store).with_name("elsewhere"))
    assert store.find("train", "elsewhere") is None
    assert "belongs to train/0123abcd" in said


def test_damage_after_the_first_look(store, said):
    """A file is hashed once a process, unless it changes meanwhile."""
    manifest = commit(store)
    store.find("train", "0123abcd")
    flip(entry(store) / "a.bin")
    with pytest.raises(Corrupt, match="a.bin"):
        store.fetch(manifest, "a.bin")


def test_damage_is_said_once(store, said):
    commit(store)
    flip(entry(store) / "a.bin")
    store.find("train", "0123abcd")
    store.find("train", "0123abcd")
    assert len(said) == 1


def test_a_disk_that_cannot_be_read(store, said, monkeypatch):
    commit(store)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("karploop.store.file_sha256", fail)
    assert store.find("train", "0123abcd") is None
    assert "a.bin: cannot be read" in said


def test_a_file_in_place_of_a_folder(store, said):
    folder = entry(store).parent
    folder.write_text("not a folder")
    assert store.find("train", "0123abcd") is None
    assert f"{folder}" in said
    with pytest.raises(UserError, match=re.escape(str(folder))):
        commit(store)


# -- what garbage collection removes ---------------------------------------------------------------


def collect(store: Store, name: str) -> None:
    (entry(store) / COLLECTED).write_text("{}")
    (entry(store) / name).unlink()


def test_a_collected_file_is_not_missed_but_the_entry_is_not_complete(store, said):
    manifest = commit(store)
    assert store.complete("train", "0123abcd") == manifest
    collect(store, "a.bin")
    assert store.find("train", "0123abcd") == manifest
    assert store.complete("train", "0123abcd") is None
    assert store.gone(manifest, "a.bin") and not store.gone(manifest, "deep/b.bin")
    assert not said


def test_what_is_left_of_a_collected_entry_is_verified(store, said):
    commit(store)
    collect(store, "a.bin")
    flip(entry(store) / "deep/b.bin")
    assert reopened(store).find("train", "0123abcd") is None
    assert "deep/b.bin" in said


def test_a_collected_file_is_put_back(store):
    manifest = commit(store)
    collect(store, "a.bin")
    commit(store)
    assert store.complete("train", "0123abcd") == manifest
    assert not store.collected("train", "0123abcd")


# -- stages --------------------------------------------------------------------------------------

calls: list[str] = []


def write_letters(context, letters: str = "abc"):
    calls.append("write_letters")
    (context.directory / "letters.txt").write_text(letters)


def read_letters(context):
    calls.append("read_letters")
    text = context.inputs["letters"].path("letters.txt").read_text()
    (context.directory / "count.txt").write_text(str(len(text)))


def write_parts(context, compute):
    tables = [context.chunk(range(i, i + 2), lambda i=i: compute(i)) for i in (0, 2, 4)]
    context.write_table("all.parquet", pa.concat_tables(tables))


@pytest.fixture
def stages(store):
    calls.clear()
    return Stages(store, Progress(quiet=True))


def run(stages, function, *, stage="letters", config=None, inputs=None, rng=None, **options):
    return stages.run(
        stage,
        function,
        config=config or {},
        inputs=inputs or {},
        rng=rng or Rng(0, 0, 0),
        **options,
    )


def test_a_stage_runs_once(stages, store):
    first = run(stages, write_letters)
    again = run(Stages(reopened(store), Progress(quiet=True)), write_letters)
    assert calls == ["write_letters"]
    assert first.manifest == again.manifest


def test_the_key_names_everything_that_the_result_depends_on(stages):
    letters = run(stages, functools.partial(write_letters, letters="abc"))
    others = run(stages, functools.partial(write_letters, letters="xy"), config={"letters": "xy"})
    base = dict(stage="count", config={"n": 1}, inputs={"letters": letters}, rng=Rng(0, 0, 0))
    variants = [
        base,
        base | {"stage": "count2"},
        base | {"config": {"n": 2}},
        base | {"inputs": {"letters": others}},
        base | {"inputs": {}},
        base | {"rng": Rng(1, 0, 0)},
        base | {"rng": Rng(0, 1, 0)},
        base | {"rng": Rng(0, 0, 1)},
        base | {"modules": ("karploop.data.tokenizer",)},
        base | {"keyed": False},
    ]
    keys = [run(stages, write_letters, **variant).manifest.key for variant in variants]
    assert len(set(keys)) == len(variants)
    unkeyed = run(stages, write_letters, **base | {"keyed": False, "rng": Rng(7, 7, 7)})
    assert unkeyed.manifest.key == keys[-1]


def test_an_input_enters_by_content_alone(stages):
    """Recomputed to the same bytes by changed code, it invalidates nothing."""
    first = run(stages, write_letters, config={"attempt": 1})
    second = run(stages, write_letters, config={"attempt": 2})
    assert first.manifest.key != second.manifest.key
    keys = {
        run(stages, read_letters, stage="count", inputs={"letters": letters}).manifest.key
        for letters in (first, second)
    }
    assert len(keys) == 1


def test_an_input_damaged_while_the_run_goes_on_is_made_again(stages, store, said):
    letters = run(stages, write_letters)
    path = letters.path("letters.txt")
    path.write_text("other")
    run(stages, read_letters, stage="count", inputs={"letters": letters})
    assert calls == ["write_letters", "read_letters", "write_letters"]
    assert str(path) in said
    assert path.read_text() == "abc"


def test_a_failing_stage_leaves_nothing_behind(stages, store):
    def fail(context):
        (context.directory / "half.txt").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run(stages, fail)
    workdir = pathlib.Path(store.root)
    assert not list((workdir / "tmp").iterdir())
    assert not list((workdir / "locks").iterdir())
    assert not list((workdir / "store").rglob("*.*"))


def test_what_a_kill_after_the_commit_left_is_tidied(stages, store):
    artifact = run(stages, write_letters)
    m = artifact.manifest
    left = pathlib.Path(store.make_partial(m.stage, m.key))
    (left / "chunk-000000000-000000002-00.arrow").write_bytes(b"")
    run(stages, write_letters)
    assert not left.exists() and not left.parent.exists()


def test_a_stage_under_way_elsewhere_is_not_tidied(stages, store):
    m = run(stages, write_letters).manifest
    left = pathlib.Path(store.make_partial(m.stage, m.key))
    with store.lock(f"{m.stage}-{m.key}", wait=False):
        run(stages, write_letters)
        assert left.exists()


# -- chunks --------------------------------------------------------------------------------------


def part(i: int) -> pa.Table:
    calls.append(f"part {i}")
    return pa.table({"x": [i, i + 1]})


def test_chunks_outlive_an_interruption(stages, store):
    def interrupted(i):
        if i == 4:
            raise KeyboardInterrupt
        return part(i)

    with pytest.raises(KeyboardInterrupt):
        run(stages, functools.partial(write_parts, compute=interrupted))
    artifact = run(stages, functools.partial(write_parts, compute=part))
    assert calls == ["part 0", "part 2", "part 4"]
    assert artifact.table("all.parquet")["x"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert not list((pathlib.Path(store.root) / "partial").iterdir())


@pytest.mark.parametrize("damage", [flip, truncate, empty], ids=lambda d: d.__name__)
def test_a_damaged_chunk_is_named_and_computed_again(stages, store, said, damage):
    def interrupted(i):
        if i == 4:
            raise KeyboardInterrupt
        return part(i)

    stages.progress.say = said
    with pytest.raises(KeyboardInterrupt):
        run(stages, functools.partial(write_parts, compute=interrupted))
    first, _ = sorted((pathlib.Path(store.root) / "partial").rglob("chunk-*"))
    damage(first)
    artifact = run(stages, functools.partial(write_parts, compute=part))
    assert calls == ["part 0", "part 2", "part 0", "part 4"]
    assert str(first) in said
    assert artifact.table("all.parquet")["x"].to_pylist() == [0, 1, 2, 3, 4, 5]


def test_a_request_to_stop_keeps_the_chunk(stages, store):
    asked = []

    def ask(i):
        asked.append(i)
        return part(i)

    stages.stop_requested = lambda: bool(asked)
    with pytest.raises(Stopped):
        run(stages, functools.partial(write_parts, compute=ask))
    assert calls == ["part 0"]
    assert len(list((pathlib.Path(store.root) / "partial").rglob("chunk-*"))) == 1


class Device:
    """Work that is waited for before its result is read, and what happened in which order."""

    def __init__(self, happens=lambda what: None):
        self.order, self._happens, self._busy = [], happens, False

    def begin(self, rows: range) -> Begun[pa.Table]:
        assert not self._busy, "two parts are on the devices at once"
        self._busy = True
        self._note("begin", rows)
        return Begun(rows, lambda: self._note("read", rows))

    def wait(self, rows: range) -> None:
        self._busy = False
        self._note("wait", rows)

    def stage(self, context) -> None:
        with mock.patch.object(Begun, "wait", lambda begun: self.wait(begun.found)):
            parts = [range(i, i + 2) for i in (0, 2, 4)]
            tables = list(context.chunks(parts, self.begin))
        context.write_table("all.parquet", pa.concat_tables(tables))

    def _note(self, what: str, rows: range) -> pa.Table:
        self._happens(f"{what} {rows.start}")
        self.order.append(f"{what} {rows.start}")
        return pa.table({"x": list(rows)})


def test_the_host_is_at_a_part_while_the_devices_are_at_the_next(stages):
    device = Device()
    artifact = run(stages, device.stage)
    assert artifact.table("all.parquet")["x"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert device.order == [
        *("begin 0", "wait 0", "begin 2", "read 0", "wait 2", "begin 4", "read 2", "read 4")
    ]


def test_parts_that_were_kept_are_not_begun_again(stages):
    def interrupt(what):
        if what == "read 4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stages, Device(interrupt).stage)
    device = Device()
    artifact = run(stages, device.stage)
    assert device.order == ["begin 4", "read 4"]
    assert artifact.table("all.parquet")["x"].to_pylist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("when, kept", [("begin 0", 1), ("wait 0", 1), ("read 0", 2)])
def test_a_request_to_stop_keeps_what_was_begun(stages, store, when, kept):
    device = Device()
    stages.stop_requested = lambda: when in device.order
    with pytest.raises(Stopped):
        run(stages, device.stage)
    assert device.order.count("read 0") == 1 and "begin 4" not in device.order
    assert len(list((pathlib.Path(store.root) / "partial").rglob("chunk-*"))) == kept


# -- locks ---------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from karploop.store import Store
store = Store(sys.argv[1])
with store.lock("run-r-0", wait=False), store.scratch() as scratch:
    (scratch / "half").write_text("written")
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(store: Store):
    """Another process that holds a lock and a scratch directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_held_lock_is_refused_with_its_holders_name(store):
    with holder(store) as process:
        assert store.held("run-r-0")
        with pytest.raises(UserError, match=f"process {process.pid} on .* since .*--run_name"):
            with store.lock("run-r-0", wait=False):
                pass
        with store.lock("run-other-0", wait=False):
            pass


def test_a_killed_holder_holds_nothing_and_its_scratch_is_swept(store):
    tmp = pathlib.Path(store.root) / "tmp"
    with holder(store) as process:
        reopened(store).open()
        assert [path.name for path in tmp.glob("*/*")] == ["half"], "of a process that lives"
        assert store.abandoned() == []
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert store.abandoned() == list(tmp.iterdir())
    with store.lock("run-r-0", wait=False):
        assert store.held("run-r-0")
    assert not store.held("run-r-0")
    reopened(store).open()
    assert not list(tmp.iterdir())
    assert not list((pathlib.Path(store.root) / "locks").iterdir())


def test_who_waits_gets_the_lock_and_can_be_interrupted(store, said):
    with holder(store) as process:
        with pytest.raises(Stopped):

            def stop():
                raise Stopped

            with store.lock("run-r-0", wait=True, meanwhile=stop):
                pass
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        started = time.monotonic()
        with store.lock("run-r-0", wait=True):
            assert time.monotonic() - started >= 0.4
        killer.join()
    assert f"waiting for run-r-0, held by process {process.pid}" in said


def test_a_lock_file_removed_between_opening_and_locking_it(store, monkeypatch):
    """Its holder ends and the next one comes, under another file of the same name."""
    path, real, newcomer = pathlib.Path(store.root) / "locks/run-r-0", fcntl.flock, []

    def flock(file, operation):
        if not newcomer:
            path.unlink()
            newcomer.append(path.open("a+"))
            real(newcomer[0], fcntl.LOCK_EX)
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="in use"), store.lock("run-r-0", wait=False):
        pass
    newcomer[0].close()


def test_one_at_a_time(store):
    """Many threads, each with a lock file of its own making and removing."""
    inside, most = [], []

    def work():
        for _ in range(20):
            with store.lock("counter", wait=True):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 80


# -- places that cannot be written -----------------------------------------------------------------


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="'.*/file.*--workdir"):
        Store(str(tmp_path / "file")).open()


@pytest.mark.parametrize("name", ["store", "partial", "provenance", "runs", "tmp", "locks"])
def test_a_file_where_a_folder_should_be(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=re.escape(f"'{tmp_path / name}'")):
        Store(str(tmp_path)).open()


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="wants /proc")
def test_a_workdir_that_cannot_be_made():
    with pytest.raises(UserError, match="/proc/x"):
        Store("/proc/x").open()


UNPRIVILEGED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from karploop.errors import UserError
from karploop.store import Store
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
store = Store(sys.argv[1])
try:
    store.open()
    print("opened")
except UserError as error:
    print(f"refused: {error}")
"""


@pytest.mark.parametrize("where", ["store", "store/train", "runs", "tmp"])
def test_a_read_only_workdir(tmp_path_factory, where):
    """As a user other than root, whom permissions do not bind."""
    workdir = tmp_path_factory.mktemp("readonly") / "workdir"
    store = Store(str(workdir))
    store.open()
    commit(store)
    for parent in workdir.parents:
        if parent.stat().st_uid == os.getuid() and parent != pathlib.Path("/"):
            with contextlib.suppress(PermissionError):
                parent.chmod(parent.stat().st_mode | 0o055)
    folders = [workdir, *(p for p in workdir.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o777)
    (workdir / where).chmod(0o555)
    line = [sys.executable, "-c", UNPRIVILEGED, str(workdir), str(ROOT)]
    output = subprocess.run(line, capture_output=True, text=True).stdout
    for folder in folders:
        folder.chmod(0o777)
    assert output.startswith("refused: cannot write to the workdir")
    assert str(workdir / where) in output and "ermission denied" in output


def test_the_unprivileged_user_is_refused_for_that_reason_alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("writable") / "workdir"
    Store(str(workdir)).open()
    for folder in [workdir.parent, workdir, *workdir.iterdir()]:
        folder.chmod(0o777)
    line = [sys.executable, "-c", UNPRIVILEGED, str(workdir), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout == "opened\n", done.stderr


def test_unknown_schemes_are_refused():
    with pytest.raises(UserError, match="s3://"):
        Store("ftp://host/path")


def test_digest_is_of_the_value_not_of_its_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
