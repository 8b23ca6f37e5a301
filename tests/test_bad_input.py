"""What a user can get wrong besides the config: one clear line, the right exit code, and nothing half-written.

tests/test_cli_errors.py has the config's own mistakes.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramoe_train.paths import ASSETS
from tests.cli import NO_EVAL, SMALL, check_refused, half_written, run_cli, start_cli
from tests.forks import run_forked

RECIPE = "+recipe=lora_mixer"
TINY = ASSETS / "tiny" / "model"
MINE = (
    "data.tasks=[mine]",
    "data.definitions.mine.source.files={train: rows.jsonl}",
    "data.definitions.mine.prompt='{{question}}'",
    "data.definitions.mine.answer='{{answer}}'",
    "router.top_k=1",
    NO_EVAL,
)
ROW = '{"question": "1 + 1 =", "answer": " 2"}\n'
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def assert_refused(cwd: Path, code: int, *words: str, arguments: tuple[str, ...], command: str = "train") -> str:
    """Run, check the one line, and that no run folder was left half-written."""
    line = check_refused(run_forked(command, *arguments, cwd=cwd), code, *words)
    assert not half_written(cwd)
    return line


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 3, ["rows.jsonl is missing", "task mine", "data.root"]),
        ("", 2, ["rows.jsonl", "no rows"]),
        (ROW + '{"question": "1 + 1 =", "answer": \n', 2, ["rows.jsonl:2: not a JSON object"]),
        (ROW + '\n{"qestion": "1 + 1 =", "answer": " 2"}\n', 2, ["rows.jsonl:3", "'question'", "'qestion'"]),
        (ROW + '{"question": "1 + 1 =", "answer": ""}\n', 2, ["rows.jsonl:2", "nothing to learn"]),
    ],
    ids=["missing", "empty", "malformed", "wrong columns", "nothing to learn"],
)
def test_data_files(text, code, words, tmp_path):
    (tmp_path / "data").mkdir()
    if text is not None:
        (tmp_path / "data" / "rows.jsonl").write_text(text)
    # loramoe-data reads the same rows in the same way, and starts more quickly
    assert_refused(tmp_path, code, *words, command="data", arguments=(RECIPE, *MINE, f"data.root={tmp_path}/data"))


def test_training_refuses_bad_data_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW * 3 + "{\n")
    arguments = (RECIPE, *MINE, f"data.root={tmp_path}", "run_dir=run")
    assert_refused(tmp_path, 2, "rows.jsonl:4", arguments=arguments)
    assert not (tmp_path / "run").exists(), "the corrected command must find the folder free"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["data.tasks=[tiny_maths]"], 2, ["'tiny_maths'", "did you mean 'tiny_math'"]),
        (["data.max_length=513"], 2, ["data.max_length=513", "512"]),
        (["data.root=nowhere"], 3, ["nowhere/tiny_math", "data.root"]),
        (["data=lora_mixer_seven", "data.max_length=512", "offline=true"], 3, ["medqa", "data.root", "load_dataset"]),
        (["model=smollm2_135m", "offline=true"], 3, ["SmolLM2-135M", "hf download", "model.path"]),
        (["init_from=nowhere"], 3, ["init_from", "nowhere"]),
        (["+recipe=lora_mixer_plug_and_play", "experts.adapters=[nowhere]"], 3, ["nowhere", "does not exist"]),
        (["resume=nowhere"], 3, ["nowhere", "checkpoint"]),
        (["trainer.compile=true", "experts.form=grouped"], 2, ["trainer.compile", "grouped", "experts.form=auto"]),
        (["trainer.compile=true", "model=falcon_mamba_7b"], 2, ["trainer.compile=true", "state-space"]),
        (["trainer.compile=true", "model.quantization=nf4"], 2, ["trainer.compile=true", "nf4"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_before_anything_is_written(arguments, code, words, tmp_path):
    given = arguments if any("recipe" in a for a in arguments) else [RECIPE, *arguments]
    assert_refused(tmp_path, code, *words, arguments=(*given, "run_dir=run"))
    assert not list(tmp_path.iterdir())


def test_compiling_without_a_compiler(tmp_path):
    done = run_cli("train", RECIPE, "trainer.compile=true", "run_dir=run", cwd=tmp_path, CXX="no-such-compiler")
    check_refused(done, 2, "trainer.compile=true", "no-such-compiler", "CXX")
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_matches_no_module(tmp_path):
    words = ("experts.sites", "'q_porj'", "did you mean 'q_proj'")
    assert_refused(tmp_path, 2, *words, arguments=(RECIPE, "experts.sites=[q_porj]", *SMALL, "run_dir=run"))
    assert not (tmp_path / "run").exists(), "the corrected command must find the folder free"


# -- base model and adapters -------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:40] = b"\x00" * 32
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, pytest.param(scramble_header, marks=pytest.mark.slow)])
def test_a_corrupted_base(damage, tiny, tmp_path):
    damage(tiny / "model.safetensors")
    assert_refused(tmp_path, 2, "model.safetensors is damaged", arguments=(RECIPE, f"model.path={tiny}", "run_dir=run"))


def test_a_base_without_its_weights(tiny, tmp_path):
    (tiny / "model.safetensors").unlink()
    assert_refused(tmp_path, 3, "lacks model.safetensors", arguments=(RECIPE, f"model.path={tiny}", "run_dir=run"))
    assert not (tmp_path / "run").exists()


def write_adapter(folder: Path, *, base: str = "tiny", **config: object) -> Path:
    """A PEFT LoRA folder for one projection of the embedded model."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    hidden = json.loads((TINY / "config.json").read_text())["hidden_size"]
    tensors = {f"{PREFIX}.lora_A.weight": torch.ones(2, hidden), f"{PREFIX}.lora_B.weight": torch.ones(hidden, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "damage", "code", "words"),
    [
        ({"base": "meta-llama/Llama-2-7b-hf"}, None, 2, ["Llama-2-7b-hf", "'tiny'"]),
        ({"use_dora": True}, None, 2, ["use_dora", "DoRA"]),
        ({}, cut, 2, ["adapter_model.safetensors is damaged"]),
    ],
    ids=["another base", "DoRA", "corrupted"],
)
def test_peft_adapters(config, damage, code, words, tmp_path):
    folder = write_adapter(tmp_path / "adapter", **config)
    if damage:
        damage(folder / "adapter_model.safetensors")
    arguments = ("+recipe=lora_mixer_plug_and_play", f"experts.adapters=[{folder}]", "router.top_k=1")
    assert_refused(tmp_path, code, str(folder), *words, command="plan", arguments=arguments)


@pytest.mark.slow
def test_training_refuses_the_adapter_too(tmp_path):
    folder = write_adapter(tmp_path / "adapter", use_dora=True)
    arguments = ("+recipe=lora_mixer_plug_and_play", f"experts.adapters=[{folder}]", "router.top_k=1", *SMALL)
    assert_refused(tmp_path, 2, "DoRA", arguments=(*arguments, "run_dir=run"))


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps without scores. Read it only."""
    folder = tmp_path_factory.mktemp("short")
    done = run_forked("train", RECIPE, *SMALL, NO_EVAL, "trainer.max_steps=2", "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def copied(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run, tmp_path / "copy"))


def other_base(folder: Path) -> None:
    """The same shapes, other weights."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.slow
def test_an_adapter_for_another_base(short_run, tiny, tmp_path):
    other_base(tiny)
    arguments = (RECIPE, f"model.path={tiny}", f"init_from={short_run}", *SMALL, "run_dir=run")
    assert_refused(tmp_path, 2, "init_from=", "made for the base 'tiny'", arguments=arguments)
    before = {path: path.stat().st_mtime_ns for path in short_run.rglob("*")}
    assert_refused(
        tmp_path,
        2,
        "made for the base 'tiny'",
        "weights",
        command="eval",
        arguments=(str(short_run), f"model.path={tiny}"),
    )
    assert before == {path: path.stat().st_mtime_ns for path in short_run.rglob("*")}


def test_our_own_adapter_corrupted(copied, tmp_path):
    cut(copied / "adapter.safetensors")
    arguments = (str(copied), "eval.limit=2")
    assert_refused(tmp_path, 2, "adapter.safetensors is damaged", command="eval", arguments=arguments)


def test_eval_of_what_is_no_run(tmp_path):
    assert_refused(tmp_path, 3, "nowhere", command="eval", arguments=("nowhere",))
    assert_refused(tmp_path, 2, "folder first", command="eval", arguments=("eval.limit=2",))
    assert_refused(tmp_path, 3, "holds no adapter.json", command="eval", arguments=(str(tmp_path), "eval.limit=2"))


@pytest.mark.slow
def test_eval_of_a_broken_override(short_run, tmp_path):
    assert_refused(tmp_path, 2, "eval.tasks=[tiny", command="eval", arguments=(str(short_run), "eval.tasks=[tiny"))
    assert_refused(tmp_path, 2, "eval.limt", "'limit'", command="eval", arguments=(str(short_run), "eval.limt=2"))


# -- output folder -----------------------------------------------------------------------------------------------------


def test_an_output_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(tmp_path, 2, "run_dir=file/run", "cannot be written", arguments=(RECIPE, "run_dir=file/run"))
    assert_refused(tmp_path, 2, "run_dir=file", "cannot be written", arguments=(RECIPE, "run_dir=file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_without_permission(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert_refused(tmp_path, 2, "locked/run", "cannot be written", arguments=(RECIPE, f"run_dir={folder}/run"))


@pytest.mark.slow
def test_a_file_system_that_takes_no_folder(tmp_path):
    """Even the super-user cannot write into /proc."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    assert_refused(tmp_path, 2, "run_dir=/proc/run", "cannot be written", arguments=(RECIPE, "run_dir=/proc/run"))


def test_an_output_folder_of_another_run(short_run, tmp_path):
    assert_refused(tmp_path, 2, "holds another run", "resume=auto", arguments=(RECIPE, f"run_dir={short_run}"))


# -- while running -----------------------------------------------------------------------------------------------------


def test_a_diverged_run_stops_and_keeps_its_checkpoint(tmp_path):
    settings = ("trainer.max_steps=20", "trainer.checkpoint_every=1", "trainer.lr=1e30", "trainer.clip_norm=null")
    arguments = (RECIPE, *SMALL, NO_EVAL, *settings, "trainer.warmup_fraction=0", "run_dir=run")
    assert_refused(tmp_path, 4, "stage experts, step", "tiny_", "checkpoint is kept", arguments=arguments)
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "diverged.json").read_text())["tasks"]
    kept = sorted((run_dir / "checkpoints").iterdir())[-1]
    tensors = load_file(kept / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (run_dir / "adapter.safetensors").exists() and not (run_dir / "results.json").exists()


def limited(gigabytes: float) -> Callable[[], None]:
    size = int(gigabytes * 2**30)
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_out_of_memory_says_what_to_lower(tmp_path):
    """A micro-batch whose logits alone exceed what the process may take."""
    sizes = ("trainer.batch_size=100000", "trainer.micro_batch_size=100000", "trainer.max_steps=2")
    arguments = (
        RECIPE,
        *sizes,
        NO_EVAL,
        "data.validation_examples=0",
        "data.tasks=[tiny_facts]",
        "router.top_k=1",
        "run_dir=run",
    )
    running = start_cli("train", *arguments, cwd=tmp_path, setup=limited(6))
    _, stderr = running.communicate(timeout=300)
    done = subprocess.CompletedProcess([], running.returncode, "", stderr)
    check_refused(done, 5, "out of memory", "lower trainer.micro_batch_size")
    assert not half_written(tmp_path)
