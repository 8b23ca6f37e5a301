"""Checkpoints that were broken on purpose."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramoe_train.errors import LoramoeError
from loramoe_train.training import checkpoint as module
from loramoe_train.training.checkpoint import fault, find_latest, read_checkpoint, rotate, write_checkpoint


def write(run_dir: Path, step: int, value: float = 0.0, **changes) -> Path:
    def save_adapter(folder: Path) -> None:
        save_file({"x.bank.up": torch.full((3, 2), value)}, folder / "adapter.safetensors")
        (folder / "adapter.json").write_text("{}")

    tensors = {"optimizer": {"x::exp_avg": torch.ones(3)}, "anchors": {}}
    settings = {"save_adapter": save_adapter, "tensors": tensors, "state": {"step": step}}
    return write_checkpoint(run_dir, step, **{**settings, **changes})


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step_000007" and fault(path) is None
    found = read_checkpoint(path)
    assert found.state == {"step": 7}
    assert torch.equal(found.tensors("optimizer")["x::exp_avg"], torch.ones(3)) and found.tensors("anchors") == {}
    listed = json.loads((path / "MANIFEST.json").read_text())["files"]
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert on_disk == set(listed) | {"MANIFEST.json"}
    assert find_latest(tmp_path) == path and find_latest(tmp_path / "nowhere") is None
    suffixes = {p.suffix for p in path.rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}  # no pickle


def cut(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(path: Path) -> None:
    file = path / "state" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit_manifest(change) -> None:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        change(manifest)
        (path / "MANIFEST.json").write_text(json.dumps(manifest))

    return damage


def link_out(path: Path) -> None:
    secret = path.parent.parent / "elsewhere.json"
    shutil.move(path / "adapter.json", secret)
    (path / "adapter.json").symlink_to(secret)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "MANIFEST.json").unlink(), "it has no MANIFEST.json"),
        (lambda path: (path / "MANIFEST.json").write_text("{ha"), "MANIFEST.json cannot be read (JSONDecodeError)"),
        (lambda path: (path / "MANIFEST.json").write_text("[]"), "MANIFEST.json cannot be read (TypeError)"),
        (lambda path: (path / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
        (cut, "adapter.safetensors has"),
        (flip, "state/optimizer.safetensors does not match its checksum"),
        (edit_manifest(lambda m: m.update(format=99)), "its format is 99, this program reads 1"),
        (edit_manifest(lambda m: m["files"].pop("state/trainer.json")), "state/trainer.json is not in its manifest"),
        (edit_manifest(lambda m: m["files"].update({"../x": {"bytes": 1}})), "names '../x', which is not a plain file"),
        (edit_manifest(lambda m: m["files"].update({"/etc/passwd": {}})), "names '/etc/passwd', which is not a plain"),
        (link_out, "names 'adapter.json', which is not a plain file inside it"),
    ],
)
def test_a_damaged_one_is_named_and_skipped(damage, reason: str, tmp_path: Path) -> None:
    older, newest, said = write(tmp_path, 3), write(tmp_path, 5), []
    damage(newest)
    assert find_latest(tmp_path, on_skip=said.append) == older
    assert len(said) == 1 and str(newest) in said[0] and reason in said[0]
    with pytest.raises(LoramoeError, match="cannot be used"):
        read_checkpoint(newest)


def raising(number: int):
    def save_adapter(folder: Path) -> None:
        (folder / "adapter.safetensors").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    return save_adapter


def test_a_full_disk_leaves_the_former_ones(tmp_path: Path) -> None:
    former = write(tmp_path, 3)
    with pytest.raises(LoramoeError, match=r"step_000005 could not be written \(No space left on device\); the former"):
        write(tmp_path, 5, save_adapter=raising(errno.ENOSPC))
    assert names(tmp_path) == {"step_000003"} and fault(former) is None
    with pytest.raises(LoramoeError):
        write(tmp_path, 3, 1.0, save_adapter=raising(errno.ENOSPC))  # in place of one that exists
    assert names(tmp_path) == {"step_000003"} and fault(former) is None


def test_a_real_limit_while_writing_tensors(tmp_path: Path) -> None:
    """safetensors reports a failed write in an error of its own."""
    former = write(tmp_path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(
            LoramoeError, match="step_000005 could not be written .File too large.; the former checkpoints are intact"
        ):
            write(tmp_path, 5, tensors={"optimizer": {"x": torch.ones(1 << 16)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == {"step_000003"} and find_latest(tmp_path) == former


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was flushed: files, the folders that name them, then the folder that is renamed in."""
    events, fsync, rename = [], os.fsync, os.rename

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        events.append(os.readlink(f"/proc/self/fd/{handle}"))

    def watched_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append((str(source), str(target)))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    path = write(tmp_path, 3)
    aside = path.with_name("step_000003.tmp")
    named = events.index((str(aside), str(path)))
    inside = [aside, *(aside / entry.relative_to(path) for entry in path.rglob("*"))]
    flushed = {event: index for index, event in enumerate(events[:named])}
    json_aside = {f"{file}.tmp" for file in inside if file.suffix == ".json"}  # flushed under the name of its writing
    assert {str(entry) for entry in inside if entry.name != "MANIFEST.json"} | json_aside - {
        f"{aside}/adapter.json.tmp"
    } <= flushed.keys()
    files = [flushed.get(str(entry), -1) for entry in inside if entry.suffix]
    assert flushed[str(aside)] > max(files[1:]) and events[named + 1 :] == [str(path.parent), str(tmp_path)]


def test_a_deletion_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint that rotation began to delete nothing is left that looks complete."""
    newest = [write(tmp_path, step) for step in (1, 2)][-1]
    monkeypatch.setattr(module.shutil, "rmtree", lambda *given, **named: None)
    rotate(tmp_path, step=2, keep=1, protected=set())
    assert fault(tmp_path / "checkpoints" / "step_000001") == "it has no MANIFEST.json"
    assert find_latest(tmp_path) == newest


def test_killed_while_writing(tmp_path: Path) -> None:
    """What a crash leaves behind is no checkpoint, and is cleared away."""
    former = write(tmp_path, 3)
    shutil.copytree(former, former.with_name("step_000005.tmp"))
    assert find_latest(tmp_path) == former
    write(tmp_path, 4)
    assert names(tmp_path) == {"step_000003", "step_000004"}


def test_killed_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames of a replacement only the former is there, under another name."""
    former = write(tmp_path, 3, 1.0)

    class KilledError(BaseException):
        pass

    rename, calls = os.rename, []

    def dying_rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KilledError
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", dying_rename)
    with pytest.raises(KilledError):
        write(tmp_path, 3, 2.0)
    monkeypatch.undo()
    assert names(tmp_path) == {"step_000003.old", "step_000003.tmp"}
    found = find_latest(tmp_path)
    assert found.name == "step_000003.old" and read_checkpoint(found).state == {"step": 3}
    write(tmp_path, 4)
    assert names(tmp_path) == {"step_000003", "step_000004"} and fault(former) is None
    write(tmp_path, 3, 2.0)
    assert names(tmp_path) == {"step_000003", "step_000004"} and fault(former) is None


def test_rotation(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 9):
        write(tmp_path, step)
    rotate(tmp_path, step=5, keep=2, protected={"step_000001"})
    # 1 is protected, 4 and 5 are the newest, 9 is of another time
    assert names(tmp_path) == {"step_000001", "step_000004", "step_000005", "step_000009"}
    rotate(tmp_path, step=5, keep=1, protected=set())
    assert names(tmp_path) == {"step_000005", "step_000009"}


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "mine").mkdir()
    write(tmp_path, 2)
    rotate(tmp_path, step=2, keep=1, protected=set())
    assert names(tmp_path) == {"mine", "step_000002"} and find_latest(tmp_path).name == "step_000002"
