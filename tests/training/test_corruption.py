"""Checkpoints damaged at random: skipped by name for the one before, refused in one line when asked for by name."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramoe_train.errors import LoramoeError
from loramoe_train.training.checkpoint import MANIFEST, find_latest, read_checkpoint
from tests.training.harness import make_parts, make_trainer, train

OLDER, NEWEST = "step_000001", "step_000002"
Damage = Callable[[random.Random, Path, Path], Path | None]  # (dice, newest, older) -> where the newest is now


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def junk(dice: random.Random) -> Any:
    """A JSON value that has no business in a manifest."""
    deep: Any = "x"
    for _ in range(dice.randrange(5)):
        deep = dice.choice([[deep], {"files": deep}])
    names = ["", ".", "..", "../x", "/etc/passwd", "state", "a\nb", "\x00", "\x1b[2J", "x" * 5000, "ё"]
    return dice.choice([None, True, -1, 2.5, 10**30, float("nan"), [], {}, deep, dice.choice(names)])


def flip(dice: random.Random, newest: Path, older: Path) -> None:
    file = dice.choice(files(newest))
    content = bytearray(file.read_bytes())
    for _ in range(dice.choice([1, 1, 1, 8])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def flip_in_manifest(dice: random.Random, newest: Path, older: Path) -> None:
    content = bytearray((newest / MANIFEST).read_bytes())
    content[dice.randrange(len(content))] = dice.randrange(256)
    (newest / MANIFEST).write_bytes(content)


def truncate(dice: random.Random, newest: Path, older: Path) -> None:
    file = dice.choice(files(newest))
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])


def grow(dice: random.Random, newest: Path, older: Path) -> None:
    with dice.choice(files(newest)).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 600)))


def lose_a_sector(dice: random.Random, newest: Path, older: Path) -> None:
    """Zeros in place of 512 bytes, as after a power cut."""
    file = dice.choice(files(newest))
    content = bytearray(file.read_bytes())
    start = 512 * dice.randrange((len(content) + 511) // 512)
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    file.write_bytes(content)


def empty(dice: random.Random, newest: Path, older: Path) -> None:
    dice.choice(files(newest)).write_bytes(b"")


def delete(dice: random.Random, newest: Path, older: Path) -> None:
    dice.choice(files(newest)).unlink()


def delete_a_folder(dice: random.Random, newest: Path, older: Path) -> None:
    shutil.rmtree(newest / "state")


def swap_inside(dice: random.Random, newest: Path, older: Path) -> None:
    a, b = dice.sample(files(newest), 2)
    a.rename(newest / "swap"), b.rename(a), (newest / "swap").rename(b)


def swap_with_older(dice: random.Random, newest: Path, older: Path) -> None:
    file = dice.choice(files(newest))
    shutil.copy(older / file.relative_to(newest), file)


def take_all_of_older(dice: random.Random, newest: Path, older: Path) -> None:
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


def folder_for_file(dice: random.Random, newest: Path, older: Path) -> None:
    file = dice.choice(files(newest))
    file.unlink()
    file.mkdir()


def file_for_folder(dice: random.Random, newest: Path, older: Path) -> None:
    shutil.rmtree(newest)
    newest.write_bytes(dice.randbytes(dice.randrange(50)))


def link(dice: random.Random, newest: Path, older: Path) -> None:
    file = dice.choice([file for file in files(newest) if file.name != MANIFEST])
    place = newest.parent / "elsewhere"
    file.rename(place)
    file.symlink_to(dice.choice([place, Path("/dev/null"), Path("/nowhere"), file]))


def rename_to_a_later_step(dice: random.Random, newest: Path, older: Path) -> Path:
    return newest.rename(newest.with_name(f"step_{dice.randrange(3, 10**6):06d}"))


def garbage(dice: random.Random, newest: Path, older: Path) -> None:
    texts = [dice.randbytes(200), b"[" * 10**5, b"1" * 5000, b"{}", b"null", b'"files"', b"\xef\xbb\xbf{}"]
    (newest / MANIFEST).write_bytes(dice.choice(texts))


def garble_manifest(dice: random.Random, newest: Path, older: Path) -> None:
    """Still JSON, and one of its values or keys is something else."""
    manifest = json.loads((newest / MANIFEST).read_text())
    place = manifest
    while isinstance(place, dict) and dice.random() < 0.7:
        inner = [value for value in place.values() if isinstance(value, dict)]
        place = dice.choice(inner) if inner else place
    key = dice.choice(list(place))
    value = place.pop(key)
    what = dice.randrange(3)
    if what == 0:
        place[key] = junk(dice)
    elif what == 1:
        place[str(junk(dice))] = value
    (newest / MANIFEST).write_text(json.dumps(manifest))


def leave_a_file_out_of_the_manifest(dice: random.Random, newest: Path, older: Path) -> None:
    manifest = json.loads((newest / MANIFEST).read_text())
    name = dice.choice([name for name in manifest["files"] if not name.endswith("adapter.json")])
    del manifest["files"][name]
    flip_one = bytearray((newest / name).read_bytes())
    flip_one[-1] ^= 1
    (newest / name).write_bytes(flip_one)
    (newest / MANIFEST).write_text(json.dumps(manifest))


DAMAGES: tuple[Damage, ...] = (
    flip, flip_in_manifest, truncate, grow, lose_a_sector, empty, delete, delete_a_folder, swap_inside, swap_with_older,
    take_all_of_older, folder_for_file, file_for_folder, link, rename_to_a_later_step, garbage, garble_manifest,
    leave_a_file_out_of_the_manifest,
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(stages={"only": {"steps": 2}}, checkpoint_every=1, keep=10)
    train(make_parts(validation=False), trainer, folder)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files(folder) if file.name != MANIFEST}


def listed(folder: Path) -> Any:
    """What the manifest says, or None."""
    try:
        return json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def check(seed: int, run_dir: Path, scratch: Path) -> tuple[str, bool]:
    """Damage a copy of the run; (how, whether it was harmless: another spelling of the same manifest)."""
    dice = random.Random(seed)
    damage = DAMAGES[seed % len(DAMAGES)]
    shutil.copytree(run_dir / "checkpoints", scratch / "checkpoints")
    older, newest = scratch / "checkpoints" / OLDER, scratch / "checkpoints" / NEWEST
    before, manifest = held(newest), listed(newest)
    newest = damage(dice, newest, older) or newest
    said: list[str] = []
    found = find_latest(scratch, on_skip=said.append)
    if found == newest:
        assert newest.name == NEWEST and held(newest) == before and listed(newest) == manifest and said == []
        read_checkpoint(newest)
    else:
        assert found == older and len(said) == 1 and said[0].startswith(f"checkpoint {newest} is skipped: "), said
        with pytest.raises(LoramoeError) as refused:
            read_checkpoint(newest)
        for text in (said[0], str(refused.value)):
            assert text.isprintable() and len(text) < 600, text
    shutil.rmtree(scratch / "checkpoints")
    return damage.__name__, found == newest


@pytest.mark.parametrize("count", [360, pytest.param(5_000, marks=pytest.mark.nightly)])
def test_no_damage_goes_unnoticed(count: int, run_dir: Path, tmp_path: Path) -> None:
    tried, harmless = Counter(), Counter()
    for seed in range(count):
        try:
            how, same = check(seed, run_dir, tmp_path)
        except BaseException as error:
            error.add_note(f"seed {seed}: {DAMAGES[seed % len(DAMAGES)].__name__}")
            raise
        tried[how] += 1
        harmless[how] += same
    print(f"\n{count} damages of {len(tried)} kinds; {harmless.total()} changed only the spelling of the manifest")
    assert len(tried) == len(DAMAGES)
    for how, number in harmless.items():
        # white space; of `garble_manifest` and `swap_with_older` those that put back what was there
        assert number == 0 or how in ("flip", "flip_in_manifest", "garble_manifest", "swap_with_older"), how
        assert number < tried[how] / 2, how


def test_json_that_has_the_right_checksum(run_dir: Path, tmp_path: Path) -> None:
    """A crafted checkpoint: nothing but our own error, in one line."""
    from loramoe_train.files import sha256

    folder = Path(shutil.copytree(run_dir / "checkpoints" / NEWEST, tmp_path / NEWEST))
    file = folder / "state" / "trainer.json"
    for content in (b"", b"\xff", b"[1]", b"[" * 10**5, b"1" * 5000, b'{"a": '):
        file.write_bytes(content)
        manifest = listed(folder)
        manifest["files"]["state/trainer.json"] = {"bytes": len(content), "sha256": sha256(file)}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(LoramoeError) as refused:
            read_checkpoint(folder)
        assert str(file) in str(refused.value) and str(refused.value).isprintable()
