"""A workdir on an object store: s3:// against a server that the test starts on this machine."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import signal
import tempfile
import threading
import time

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import boto3  # noqa: E402
from etils import epath  # noqa: E402
from moto.server import ThreadedMotoServer  # noqa: E402
from processes import RUN, Loop, Outcome, finish  # noqa: E402
from said import Said  # noqa: E402
from small_models import save_llama  # noqa: E402

from karploop import locks  # noqa: E402
from karploop.data.rows import read_rows  # noqa: E402
from karploop.errors import UserError  # noqa: E402
from karploop.files import read_whole  # noqa: E402
from karploop.manifest import MANIFEST, Corrupt  # noqa: E402
from karploop.roles import fetched  # noqa: E402
from karploop.roles.local import LocalModel  # noqa: E402
from karploop.store import Store  # noqa: E402

IDENTITY = dict(
    stage="train", key="0123abcd", version="v", config={}, inputs={}, rng={"seed": 0}
)  # fmt: skip


@pytest.fixture(scope="module")
def endpoint():
    """The address of an S3 server, given to this process and its children by the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        yield
    server.stop()


@pytest.fixture
def bucket(endpoint, request):
    """The address of an empty bucket."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A directory that stands for a machine's own disk."""
    return new_machine(tmp_path / "machine", monkeypatch)


def new_machine(folder: pathlib.Path, monkeypatch) -> pathlib.Path:
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def store(bucket, machine):
    store = Store(f"{bucket}/w", Said())
    store.open()
    return store


def commit(store: Store):
    with store.scratch() as scratch:
        directory = scratch / "files"
        (directory / "deep").mkdir(parents=True)
        (directory / "a.bin").write_bytes(b"first")
        (directory / "deep" / "b.bin").write_bytes(b"second")
        return store.commit(directory, **IDENTITY)


def reopened(store: Store) -> Store:
    return Store(str(store.root), store.say)


def objects(root: epath.Path) -> dict[str, bytes]:
    """What there is under `root`, by relative name; what goes meanwhile is left out."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in root.iterdir():
            if path.is_dir():
                found |= {f"{path.name}/{name}": data for name, data in objects(path).items()}
            else:
                with contextlib.suppress(FileNotFoundError):
                    found[path.name] = read_whole(path)
    return found


# -- entries -------------------------------------------------------------------------------------


def test_a_commit_is_found_whole_and_fetched(store):
    manifest = commit(store)
    again = reopened(store)
    assert again.complete("train", "0123abcd") == manifest
    assert again.fetch(manifest, "deep/b.bin").read_bytes() == b"second"
    assert sorted(objects(store.root / "store")) == [
        "train/0123abcd/a.bin", "train/0123abcd/deep/b.bin", "train/0123abcd/manifest.json",
    ]  # fmt: skip
    assert store.say == []


def test_the_manifest_comes_last(store, monkeypatch):
    """A commit that is cut off anywhere is no entry, and the next one makes it whole."""
    real = type(store.root).open
    for upload in range(1, 4):
        count = []

        def cut_off(path, mode="r", *args, upload=upload, count=count, **kwargs):
            if "w" in mode and str(path).startswith("s3://"):
                count.append(path)
                if len(count) == upload:
                    raise ConnectionError("cut off")
            return real(path, mode, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(ConnectionError):
            patch.setattr(type(store.root), "open", cut_off)
            commit(store)
        uploaded = [name.rpartition("/")[2] for name in objects(store.root / "store")]
        assert len(uploaded) == upload - 1 and MANIFEST not in uploaded
        assert reopened(store).find("train", "0123abcd") is None
    assert store.say == [], "a torn upload is not damage"
    commit(store)
    assert reopened(store).find("train", "0123abcd")


@pytest.mark.parametrize("name", ["a.bin", "deep/b.bin", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_corrupted_object_is_named_and_replaced(store, name, damage):
    manifest = commit(store)
    path = store.entry("train", "0123abcd") / name
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:] if damage == "flip" else data[:-1])
    again = reopened(store)
    assert again.find("train", "0123abcd") is None
    assert path in store.say
    if name != MANIFEST:
        with pytest.raises(Corrupt, match=re.escape(str(path))):
            reopened(store).fetch(manifest, name)
    commit(again)
    assert reopened(store).complete("train", "0123abcd") == manifest
    assert path.read_bytes() == data


def test_a_missing_object_is_named(store):
    commit(store)
    path = store.entry("train", "0123abcd") / "a.bin"
    path.unlink()
    assert reopened(store).find("train", "0123abcd") is None
    assert f"{path}: missing" in store.say


def test_another_machine_is_seen_at_once(store):
    """No listing is remembered, neither of what is there nor of what is not."""
    commit(store)
    partial = store.make_partial("train", "x")
    (partial / "chunk-1").write_bytes(b"1")
    assert [path.name for path in partial.glob("chunk-*")] == ["chunk-1"]
    assert store.find("train", "0123abcd") and list(store.entry("train", "0123abcd").iterdir())
    elsewhere, name = boto3.client("s3"), store.root.parts[2]
    elsewhere.put_object(Bucket=name, Key="w/partial/train/x/chunk-2", Body=b"2")
    elsewhere.delete_object(Bucket=name, Key="w/partial/train/x/chunk-1")
    elsewhere.put_object(Bucket=name, Key="w/store/train/0123abcd/collected.json", Body=b"{}")
    elsewhere.delete_object(Bucket=name, Key="w/store/train/0123abcd/a.bin")
    assert [path.name for path in partial.glob("chunk-*")] == ["chunk-2"]
    assert store.gone(store.find("train", "0123abcd"), "a.bin")
    assert store.complete("train", "0123abcd") is None


def test_prompts_are_read_from_a_bucket(bucket):
    path = epath.Path(f"{bucket}/prompts.jsonl")
    path.write_text('{"prompt": "a"}\n')
    assert read_rows(str(path)) == read_rows(path) == [{"prompt": "a"}]
    with pytest.raises(UserError, match=r"cannot read prompts from 's3://.*/other.jsonl'"):
        read_rows(f"{bucket}/other.jsonl")


def test_a_bucket_that_is_not_there(endpoint, machine):
    with pytest.raises(UserError, match="s3://no-such-bucket/w.*bucket exists"):
        Store("s3://no-such-bucket/w").open()


# -- leases --------------------------------------------------------------------------------------


def lease_of(store: Store) -> epath.Path:
    return store.root / "locks" / "run-r-0.json"


def read_lease(store: Store) -> dict:
    return json.loads(read_whole(lease_of(store)))


def test_a_run_is_refused_while_its_holder_lives(store, tmp_path, monkeypatch):
    with store.lock("run-r-0", wait=False):
        with pytest.raises(UserError, match="in use by process"):
            with reopened(store).lock("run-r-0", wait=False):
                pass
        new_machine(tmp_path / "other", monkeypatch)
        elsewhere = reopened(store)
        elsewhere.open()
        assert elsewhere.held("run-r-0")
        with pytest.raises(UserError, match="in use by process .*claim ends in"):
            with elsewhere.lock("run-r-0", wait=False):
                pass
        with elsewhere.lock("run-other-0", wait=False):
            pass
    assert not lease_of(store).exists()
    with elsewhere.lock("run-r-0", wait=False):
        pass


def test_the_holder_gives_signs_of_life(store, monkeypatch):
    """And is seen to be there by whoever looks, also while it is just giving one."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.0)
    with store.lock("run-r-0", wait=False):
        beats = set()
        deadline = time.monotonic() + 30
        while len(beats) < 30:
            assert locks.lease_held(lease_of(store))
            beats.add(read_lease(store)["beat"])
            assert time.monotonic() < deadline


def test_a_lapsed_lease_is_taken_over_and_its_holder_stops(store, tmp_path, monkeypatch):
    """As when a machine was suspended and wakes up after another one has taken over."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 3.0)
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        with store.lock("run-r-0", wait=False):
            lapsed = read_lease(store)
            lapsed["beat"] -= 10 * locks.LAPSE_SECONDS
            lease_of(store).write_text(json.dumps(lapsed))
            new_machine(tmp_path / "other", monkeypatch)
            elsewhere = reopened(store)
            elsewhere.open()
            with elsewhere.lock("run-r-0", wait=False):
                assert stopped.wait(30)
                assert "taken over" in store.say
        assert not lease_of(store).exists()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_later_of_two_writers_has_the_lease(store, monkeypatch):
    """Both found none and wrote one: who is overwritten gives way."""
    real = time.sleep

    def overtaken(seconds):
        real(0)
        mine = read_lease(store)
        lease_of(store).write_text(json.dumps(mine | {"owner": "another"}))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="at the same time"):
        patch.setattr(locks.time, "sleep", overtaken)
        with store.lock("run-r-0", wait=False):
            pass
    assert read_lease(store)["owner"] == "another"


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_on_the_store_is_copied_once_and_again_when_it_changed(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = pathlib.Path(save_llama(tmp_path / "model"))
    there = epath.Path(f"{bucket}/models/small")

    def upload():
        for path in folder.iterdir():
            (there / path.name).write_bytes(path.read_bytes())

    upload()
    (there / "optimizer.bin").write_bytes(b"not a part of it")
    model = LocalModel.describe(str(there))
    assert model.files() == LocalModel.describe(str(folder)).files()
    assert model.tokenizer.identity == LocalModel.describe(str(folder)).tokenizer.identity
    assert not (model.path / "optimizer.bin").exists() and len(list(folder.iterdir())) > 2
    with monkeypatch.context() as patch:
        patch.setattr(fetched, "copy", None)
        assert LocalModel.describe(f"{there}/").files() == model.files()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    upload()
    assert LocalModel.describe(str(there)).files() == LocalModel.describe(str(folder)).files()
    assert not list(model.path.parent.rglob("*.tmp"))


@pytest.mark.parametrize(
    "address, message",
    [("s3://nowhere-at-all/model", "that this machine may read"), ("ftpx://a/b", "no model at")],
)
def test_a_checkpoint_that_is_not_there_is_refused(endpoint, address, message):
    with pytest.raises(UserError, match=message):
        LocalModel.describe(address)


# -- whole runs ----------------------------------------------------------------------------------

# Many chunks and checkpoints, so that who watches from outside can kill a process in time.
MANY = (
    "--config.warmup.steps=30",
    "--config.warmup.checkpoint_every=1",
    "--config.generate.batch=4",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Outcome:
    """The same run on a local disk."""
    workdir = tmp_path_factory.mktemp("reference") / "workdir"
    finish(workdir, *MANY)
    return Outcome.of(workdir)


def outcome(root: epath.Path, folder: pathlib.Path) -> Outcome:
    """Of the objects under `root`, by way of a local copy."""
    for name, data in objects(root).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Outcome.of(folder)


@pytest.mark.slow
def test_a_run_killed_in_training_and_in_sampling_moves_to_other_machines(
    bucket, reference, tmp_path
):
    """Equals one on a local disk. After each kill nothing is left of the machine but its bucket."""
    root = epath.Path(f"{bucket}/x")

    def machine(name: str) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        return {"logs": tmp_path, "env": {"TMPDIR": str(folder)}}

    def kill_when(loop: Loop, pattern: str) -> None:
        loop.wait_until(lambda: re.search(pattern, " ".join(objects(root / "partial"))))
        loop.process.kill()
        assert loop.wait() == -signal.SIGKILL

    first = Loop(root, *MANY, **machine("first"))
    kill_when(first, r"warmup/\S+/checkpoint-0000000(0[4-9]|1)")
    shutil.rmtree(tmp_path / "first")

    # The dead machine's claim has not ended, and this one cannot know that it is dead.
    refused = Loop(root, *MANY, **machine("second"))
    assert refused.wait() == 2
    assert "claim ends in" in refused.stderr and "Traceback" not in refused.stderr
    lease = root / "locks" / f"run-{RUN}-0.json"
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"beat": 0.0}))

    *_, newest = kept = sorted(n for n in objects(root / "partial") if "checkpoint-" in n)
    assert 2 <= len(kept) <= 3, "the last two checkpoints are kept"
    archive = root / "partial" / newest
    archive.write_bytes(archive.read_bytes()[:-1024] + bytes(1023) + b"x")
    third = Loop(root, *MANY, **machine("third"))
    kill_when(third, r"generate/\S+/chunk-000000008")
    assert str(archive) in third.stderr, "a damaged checkpoint is named"
    kept = [name for name in objects(root / "partial") if "chunk-" in name]
    assert kept and not [name for name in objects(root / "partial") if "checkpoint-" in name]

    # On the machine where it was killed it resumes at once.
    chunk = root / "partial" / kept[0]
    chunk.write_bytes(chunk.read_bytes()[:-1])
    last = Loop(root, *MANY, logs=tmp_path, env={"TMPDIR": str(tmp_path / "third")})
    assert last.wait() == 0, last.stderr
    assert str(chunk) in last.stderr
    reference.check(outcome(root, tmp_path / "copy"))
    left = objects(root)
    assert [name for name in left if name.startswith(("partial/", "locks/", "tmp/"))] == []
    assert len([name for name in left if "tfevents" in name]) == 1
    assert {"accuracy.png", "summary.json", "metrics.jsonl"} <= {
        name.rpartition("/")[2] for name in left if name.startswith(f"runs/{RUN}/")
    }
    scratch = (tmp_path / "third").rglob("*")
    assert [p for p in scratch if p.is_file() and "karploop" in str(p)] == []
