"""The benchmarks on a tiny model: they run, what they check they check, and their figures are what they say."""

import json

import pytest
import torch

from benchmarks import checkpoint, generation, measure, memory, scaling, site, training_step
from benchmarks.candidates import build
from benchmarks.measure import CountOps, interleave, ratio, saved_mib, times
from benchmarks.shapes import Mixture, make_base, make_tokens
from benchmarks.twin import check, errors, twin_result

SMALL = Mixture(experts=4, rank=4, top_k=2)
MIXTURES = ("loop", "dense_loop", "ours", "ours_concatenated", "ours_grouped")


@pytest.fixture(scope="module")
def base():
    return make_base("tiny", torch.float32)


def test_every_mixture_computes_what_the_twin_computes(base):
    ids = make_tokens("tiny", 2, 40)
    twin = twin_result(base, SMALL, ids)
    for name in MIXTURES:
        found = errors(build(name, base, SMALL), ids, twin)
        assert max(found.values()) < 1e-4 and set(found) == {"loss", "down", "up", "router"}


def test_a_candidate_that_computes_something_else_is_not_timed(base):
    wrong = build("ours", base, SMALL)
    with torch.no_grad():
        wrong.trained[0].mul_(1.5)
    with pytest.raises(SystemExit, match="ours does not compute what the twin computes"):
        check([wrong], base, SMALL, make_tokens("tiny", 2, 8))


def test_candidates_share_the_base_and_train_nothing_of_it(base):
    for name in ("base", "lora_active", "lora_total", "lora_all", *MIXTURES):
        candidate = build(name, base, SMALL)
        own = {p.data_ptr() for p in candidate.model.parameters()}
        assert {p.data_ptr() for p in base.parameters()} <= own
        assert {id(p) for p in candidate.model.parameters() if p.requires_grad} == {id(p) for p in candidate.trained}
    assert build("lora_active", base, SMALL).trained[0].shape[0] == 8


def test_training_step(tmp_path):
    file = tmp_path / "out" / "step.json"
    training_step.main(["--model", "tiny", "--dtype", "float32", "--quick", "--rounds", "2", "--json", str(file)])
    report = json.loads(file.read_text())
    assert {"time", "saved_memory"} == set(report["ratio_to_peft_lora"]) and report["machine"]["torch"]
    (result,) = report["results"]
    assert list(result["candidates"]) == ["base", "lora_active", "loop", "ours", "ours_64"]
    ours, loop = result["candidates"]["ours"], result["candidates"]["loop"]
    assert loop["waits"] > ours["waits"] and loop["saved_mib"] > ours["saved_mib"] > 0
    assert set(result["ratios"]) >= {"time_to_peft_lora", "loop_time_to_ours", "64_experts_time_to_8"}


def test_site(monkeypatch):
    monkeypatch.setattr(site, "settings", lambda options: [(64, torch.float32, SMALL)])
    report = site.main(["--rounds", "2", "--tokens", "80"])
    assert list(report["results"][0]["candidates"]) == ["base", "lora", "loop", "dense_loop", "concatenated", "grouped"]
    assert max(report["results"][0]["twin_errors"].values()) < 1e-5
    assert report["crossing"]["64 float32 E=4 r=4"]["(E-k)r/k"] == 4.0


def test_generation():
    report = generation.main(["--model", "tiny", "--dtype", "float32", "--rounds", "1", "--new", "3"])
    assert set(report["batch_8"]) == set(generation.NAMES)
    assert max(error for found in report["errors"].values() for error in found.values()) < 1e-3


def test_scaling(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "QUICK", {"tokens": (16, 32), "layers": (1, 2), "experts": (8, 16)})
    monkeypatch.setattr(scaling, "USUAL", {"tokens": 16, "layers": 1, "experts": 8})
    file = tmp_path / "plot.png"
    report = scaling.main(["--model", "tiny", "--quick", "--rounds", "1", "--plot", str(file)])
    assert file.read_bytes()[:4] == b"\x89PNG" and report["growth"]["ours"]["8 experts"] == 1.0


def test_checkpoint():
    report = checkpoint.main(["--model", "tiny", "--rounds", "2"])["models"]["tiny"]
    rows, weights = report["rows"], report["weights"]
    assert list(rows) == ["held_up", "ours", "save_state", "save_state_flushed"]
    assert all(row["seconds"] > 0 for row in rows.values()) and rows["held_up"]["mib"] == 0
    # float32: what was trained and its two moments; the base besides
    least = 3 * 4 * weights["trained"] / measure.MIB
    assert least < rows["ours"]["mib"] < least + 0.3
    assert rows["save_state"]["mib"] > rows["ours"]["mib"] + 4 * weights["base"] / measure.MIB - 0.3


def test_the_exponent_of_a_power_law():
    assert scaling.exponent([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert scaling.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_saved_memory_grows_with_tokens(monkeypatch):
    rows = memory.saved("tiny", torch.float32, ("base", "ours"), (16, 32), (4, 8))
    assert set(rows) == {"base", "ours_4", "ours_8"}
    assert all(row["32 tokens"] > row["16 tokens"] > 0 for row in rows.values())


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own():
    found = memory.peak("tiny", "float32", "ours", 32, "cpu")
    assert found["before_mib"] > 50 and found["peak_growth_mib"] > 0


def test_saved_memory_counts_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(8, 8)
    x = torch.ones(2**17, 8, requires_grad=True)  # 4 MiB
    assert saved_mib(lambda: layer(x).sum() + layer(x).sum(), layer) == pytest.approx(4.0)


def test_counting_operations():
    with CountOps() as counted:
        torch.ones(3).add(1).nonzero()
    assert counted.ops >= 3 and counted.data_dependent == 1


def test_ratios_are_medians_of_pairs():
    samples = {"a": [1.0, 10.0, 3.0], "b": [2.0, 5.0, 1.0]}
    assert ratio(samples, "a", "b") == 2.0 and times(samples, ("b",))["a"]["to_b"] == 2.0
    order = []
    interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b", "a", "b", "b", "a"]


def test_a_dtype_that_would_be_emulated_is_left_out_and_said(monkeypatch, capsys):
    options = measure.arguments("x", None, [], dtype=measure.DTYPE)
    for native, found in ((True, ("float32", "bfloat16")), (False, ("float32",))):
        monkeypatch.setattr(measure, "multiplies_natively", lambda dtype, device, native=native: native)
        assert measure.dtypes(options) == found
        assert ("bfloat16 is left out" in capsys.readouterr().out) == (not native)
    asked = measure.arguments("x", None, ["--dtype", "bfloat16"], dtype=measure.DTYPE)
    assert measure.dtypes(asked) == ("bfloat16",)
