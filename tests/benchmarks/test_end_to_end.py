"""The comparison with the peer on a tiny model: both sides see the same, and the figures are what they say."""

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import check, ratios
from benchmarks.end_to_end_runs import OURS, Meter, Settings, run_ours, run_trl
from tests.data.helpers import write_lines


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_model_dir):
    root = tmp_path_factory.mktemp("rows")
    choices = {"text": ["the dog", "the quick brown fox", "a lazy dog"], "label": ["A", "B", "C"]}
    arc = [{"question": f"Who jumps {n} times?", "choices": choices, "answerKey": "ABC"[n % 3]} for n in range(12)]
    sums = [{"question": f"Tom has {n} apples and buys 4 more." * 2, "answer": f"{n} + 4 = {n + 4}"} for n in range(12)]
    films = [{"sentence": f"again and again {n}", "label": n % 2} for n in range(12)]
    for task, rows in (("gsm8k", sums), ("arc_easy", arc), ("arc_challenge", arc), ("sst2", films)):
        write_lines(root / task / "train.jsonl", rows)
    return Settings(str(root), str(tiny_model_dir), batch_size=8, max_length=96, steps=3, warmup=1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", ["ours", "ours_packed"])
def test_our_side(settings, name):
    found = run_ours(settings, name)
    assert found["steps"] == 2 and 0.7 < found["examples_per_s"] * found["seconds"] / (2 * 8) < 1.4
    assert 0 < found["useful_share"] <= 1 and found["passes_per_step"] >= 1 and found["peak_rss_mib"] > 0


def test_the_peer_sees_the_same(settings, monkeypatch):
    pytest.importorskip("trl")

    def here(name, given):
        return (run_ours if name in OURS else run_trl)(given, name)

    monkeypatch.setattr(end_to_end, "child", here)
    found = check(["ours", "ours_packed", "trl_padded", "trl_flat", "trl_packed"], settings)
    assert len({result["supervised"] for result in found.values()}) == 1 and found["ours"]["supervised"] > 20
    timed = run_trl(settings, "trl_packed")
    # full rows: the counts of the whole run are right, though a step's are not those of a padded one
    assert timed["examples_per_s"] > 0 and timed["useful_share"] <= 1


def test_a_peer_that_sees_something_else_is_not_timed(settings, monkeypatch):
    losses = {"ours": {"loss": 2.0, "supervised": 9}, "trl_padded": {"loss": 2.1, "supervised": 9}}
    monkeypatch.setattr(end_to_end, "child", lambda name, given: losses[name])
    with pytest.raises(SystemExit, match="trl_padded does not train on the same"):
        check(["ours", "trl_padded"], settings)
    losses["trl_padded"] = {"loss": 2.0, "supervised": 8}
    with pytest.raises(SystemExit, match="trl_padded does not train on the same"):
        check(["ours", "trl_padded"], settings)


def test_what_a_meter_counts():
    meter = Meter()
    meter.epoch, meter.begins = 100.0, [0.0, 5.0, 7.0, 10.0]
    meter.passes = [(5, 45, 70, 99), (2, 10, 30, 40), (2, 20, 30, 40), (1, 5, 20, 20)]
    result = meter.result(Settings("", "", warmup=1, started=90.0), [1, 2, 1])
    assert result["startup_s"] == 10.0 and result["first_step_s"] == 5.0
    assert result["steps"] == 2 and result["seconds"] == 5.0
    # 80 of the run's 150 tokens in 5 seconds; the run has 10 examples and 80 supervised tokens
    assert result["examples_per_s"] == pytest.approx(16 * 10 / 150)
    assert result["supervised_tokens_per_s"] == pytest.approx(16 * 80 / 150)
    assert result["useful_share"] == 0.8 and result["passes_per_step"] == pytest.approx(4 / 3)


def test_ratios_are_between_the_best_of_each_side():
    def run(speed, memory):
        return {"examples_per_s": speed, "supervised_tokens_per_s": 2 * speed, "peak_rss_mib": memory, "startup_s": 10}

    medians = {"ours": run(3, 30), "ours_packed": run(4, 20), "trl_padded": run(1, 70), "trl_single": run(2, 40)}
    found = ratios(medians)
    assert (found["ours"], found["peer"]) == ("ours_packed", "trl_single")
    assert found["examples_per_s"] == 2 and found["peak_rss_mib"] == 0.5 and found["startup_s"] == 1
