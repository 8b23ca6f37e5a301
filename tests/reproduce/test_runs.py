"""What a table would run, composed and not run: the same data order, budgets, rates, counts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from loramoe_train.data.sampling import SamplePlan
from loramoe_train.errors import ConfigError, DataError
from loramoe_train.planning import make_counts
from loramoe_train.reproduce import folder, tables
from loramoe_train.reproduce.folder import complete, find
from loramoe_train.reproduce.parameters import Counted, budgets_of, equal_budgets
from loramoe_train.reproduce.runs import Wanted, compose_run, same_run, wanted, with_learning_rates
from loramoe_train.schema.launcher import LauncherConfig
from loramoe_train.schema.run import RunConfig
from loramoe_train.training.stages import plan_stages
from tests.recipe_runs import changed
from tests.reproduce.made import finished, scores


@pytest.fixture(scope="module")
def runs() -> list[Wanted]:
    """LoRA, LoRA-Mixer and MoLA at the smallest scale."""
    table = tables.load("lora_mixer_table2")
    return wanted(table, "tiny", seeds=[0, 3], methods=["lora", "lora_mixer", "mola"], root="x")


def test_one_run_for_every_method_and_seed(runs: list[Wanted]) -> None:
    assert [run.folder for run in runs] == [
        f"tiny/{method}/all/{seed}" for method in ("lora", "lora_mixer", "mola") for seed in (0, 3)
    ]
    assert [run.config.seed for run in runs] == [0, 3] * 3
    assert {run.config.trainer.max_steps for run in runs} == {100}
    # one run scores the base, whatever rows and rates are chosen
    assert [run.folder for run in runs if run.config.eval.base] == ["tiny/lora/all/0"]
    assert len([run for run in with_learning_rates(runs) if run.config.eval.base]) == 1


def test_every_method_sees_the_same_examples_in_the_same_order(runs: list[Wanted]) -> None:
    sizes = {"a": 70, "b": 50}

    def order(run: Wanted) -> list[tuple[int, int]]:
        (first, *_) = plan_stages(
            run.config.trainer,
            dict.fromkeys(run.config.trainer.stages, 120),
            aux_losses=["routing_specialization", "load_balance"],
        )
        sampling = run.config.data.sampling
        return SamplePlan(sizes, sampling, seed=run.config.seed, stage=first.name, examples=first.examples).slice(
            0, 300
        )

    at = {(run.method, run.seed): order(run) for run in runs}
    for seed in (0, 3):
        assert at["lora", seed] == at["lora_mixer", seed] == at["mola", seed]
    assert at["lora", 0] != at["lora", 3]


def test_data_sets_of_their_own_and_rows_left_out(runs: list[Wanted]) -> None:
    found = wanted(tables.load("mola_table1"), "tiny", methods=["lora", "mola_2468", "mola_4444"])
    assert [run.folder for run in found] == [
        f"tiny/{method}/{train}/0" for method in ("lora", "mola_2468") for train in ("grammar", "facts")
    ]
    assert [run.config.data.tasks for run in found] == [["tiny_grammar"], ["tiny_facts"]] * 2


def test_figures_of_loads_run_no_benchmark_and_differ_in_the_loss_alone() -> None:
    table = tables.load("lora_mixer_figures3_4")
    found = {run.method: run.config for run in wanted(table, "paper", seeds=[0])}
    assert {method: list(config.aux_loss) for method, config in found.items()} == {
        "lora_mixer": ["routing_specialization"],
        "without_rsl": ["load_balance"],
        "none": [],
    }
    for config in found.values():
        assert not config.eval.enabled and config.data.validation_examples * len(config.data.tasks) == 1001
        assert [(s.train, s.routing) for s in config.trainer.stages.values()] == [
            (["experts"], "by_domain"),
            (["routers"], "learned"),
        ]


def test_what_is_typed_goes_to_every_run_and_is_checked() -> None:
    table = tables.load("lora_mixer_table2")
    (run,) = wanted(table, "tiny", typed=["trainer.max_steps=7"], methods=["lora"], seeds=[0])
    assert run.config.trainer.max_steps == 7
    with pytest.raises(ConfigError, match="lora on tiny: unknown key or group 'trainer.max_stpes'; did you mean"):
        wanted(table, "tiny", typed=["trainer.max_stpes=7"], methods=["lora"])


@pytest.mark.parametrize("budget", ["equal", "active"])
def test_ranks_for_the_same_budget(runs: list[Wanted], budget: str) -> None:
    table = tables.load("lora_mixer_table2").model_copy(update={"reference": "mola"})
    fitted, notes = equal_budgets(table, runs, budget)
    sizes = {}
    for run in fitted:
        counts = make_counts(run.config)[0]
        sizes.setdefault(run.method, counts.active if budget == "active" else counts.experts + counts.routers)
    assert len(notes) == 3 and sizes["mola"] == {"equal": 760_320, "active": 330_240}[budget]
    for method, before in (("lora", runs[0]), ("lora_mixer", runs[2])):
        after = next(run for run in fitted if run.method == method).config
        assert abs(sizes[method] / sizes["mola"] - 1) < 0.05
        ratio = before.config.experts.alpha / before.config.experts.rank
        assert after.experts.rank != before.config.experts.rank and after.experts.alpha / after.experts.rank == ratio
    assert [run.config.seed for run in fitted] == [run.config.seed for run in runs]
    stored = SimpleNamespace(config=lambda run: run.config)
    there = [SimpleNamespace(**vars(run), sweep=stored, status=SimpleNamespace(run=run)) for run in fitted]
    assert budgets_of(table, there, budget) == notes  # told from stored configs too


def test_a_budget_that_cannot_be_met_is_refused(runs: list[Wanted]) -> None:
    table = tables.load("lora_mixer_table2")
    small = runs[0].config.model_copy(update={"experts": runs[0].config.experts.model_copy(update={"rank": 1})})
    shrunk = [replace(run, config=small) if run.method == "lora" else run for run in runs]
    with pytest.raises(ConfigError, match="lora_mixer on tiny has .* at rank 1, its nearest to"):
        equal_budgets(table, shrunk, "equal")
    with pytest.raises(ConfigError, match="the reference lora is not among the methods"):
        equal_budgets(table, [run for run in runs if run.method != "lora"], "equal")


def test_the_recorded_overrides_make_the_same_run(runs: list[Wanted]) -> None:
    table = tables.load("lora_mixer_table2")
    fitted, _ = equal_budgets(table.model_copy(update={"reference": "mola"}), runs[::2], "equal")
    changed = with_learning_rates(fitted, (0.5,))
    for run in [*runs[1::2], *changed]:
        alone = compose_run(run.overrides, ())
        assert same_run(alone, run.config, ("run_dir", "launcher")) == [], run.overrides
        assert plan_names(alone) == plan_names(run.config)


def plan_names(config: RunConfig) -> list[str]:
    """Stages run in this order."""
    return list(config.trainer.stages)


def test_a_grid_of_learning_rates_for_every_method(runs: list[Wanted]) -> None:
    rated = with_learning_rates(runs, (0.5, 1.0, 2.0))
    assert len(rated) == 3 * len(runs) and len({run.folder for run in rated}) == len(rated)
    mixer = [run for run in rated if run.method == "lora_mixer" and run.seed == 0]
    own = next(run for run in runs if run.method == "lora_mixer").config.trainer
    assert [run.config.trainer.lr for run in mixer] == pytest.approx([0.5 * own.lr, own.lr, 2 * own.lr])
    assert (
        same_run(mixer[1].config, next(run for run in runs if run.folder == "tiny/lora_mixer/all/0").config, ()) == []
    )
    assert mixer[0].folder == f"tiny/lora_mixer/all/lr-{0.5 * own.lr:.3g}/0"


def test_rates_are_not_chosen_without_a_validation_loss(runs: list[Wanted]) -> None:
    data = runs[0].config.data.model_copy(update={"validation_examples": 0})
    with pytest.raises(ConfigError, match="data.validation_examples=0 leaves none"):
        with_learning_rates([replace(runs[0], config=runs[0].config.model_copy(update={"data": data}))])


def test_what_was_made_otherwise_is_not_taken_for_the_same(runs: list[Wanted], tmp_path: Path) -> None:
    finished(tmp_path, {"tiny/lora/all/0": scores(0.5)})  # 240 steps, where the table has 100
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="was made with .*, and now it would be .*another run_dir"):
        complete(tmp_path, runs[:1], wait=True, say=lambda line: None)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [run.id for run in find(tmp_path)] == ["sweep-1/tiny/lora/all/0"]


def test_other_scoring_alone_needs_no_other_training(runs: list[Wanted], tmp_path: Path) -> None:
    sweep = finished(tmp_path, {"tiny/lora/all/0": scores(0.5)})
    stored = find(tmp_path)[0].sweep.config(sweep.runs[0])
    now = replace(runs[0], config=changed(stored, "eval", limit=50))
    with pytest.raises(
        ConfigError, match=r"eval\.limit=None, and now it would be 50; .*; loramoe-eval .*/lora/all/0 with"
    ):
        complete(tmp_path, [now], wait=True, say=lambda line: None)
    other = replace(now, config=changed(now.config, "trainer", lr=0.5))
    with pytest.raises(ConfigError, match="give the old values, or another run_dir$"):
        complete(tmp_path, [other], wait=True, say=lambda line: None)


def test_damaged_results_are_not_made_again_unasked(tmp_path: Path) -> None:
    table = tables.load("lora_mixer_table2")
    (run,) = wanted(table, "tiny", seeds=[0], methods=["lora"], root=str(tmp_path / "sweep-1"))
    sweep = finished(tmp_path, {run.folder: '{"scores'})
    stored = yaml.safe_dump(run.config.plain())
    (sweep.root / ".sweep" / "configs" / "0.yaml").write_text(stored)
    with pytest.raises(DataError, match="is not a readable results file .*remove that file"):
        complete(tmp_path, [run], wait=True, say=lambda line: None)
    assert (sweep.root / run.folder / "results.json").read_text() == '{"scores'


@pytest.mark.parametrize(("name", "minutes"), [("local", 90), ("slurm", 60)])
def test_another_try_gets_the_launchers_keys_of_this_call(
    name: str, minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the sweep was started by another launcher, which is said."""
    table = tables.load("lora_mixer_table2")
    (run,) = wanted(table, "tiny", seeds=[0], methods=["lora"], root=str(tmp_path / "sweep-1"))
    sweep = finished(tmp_path, {run.folder: None})
    (sweep.root / ".sweep" / "configs" / "0.yaml").write_text(yaml.safe_dump(run.config.plain()))
    launcher = LauncherConfig.model_validate({"name": name, "timeout_min": 90})
    tries: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(
        folder, "again", lambda sweep, numbers, **_: tries.append((sweep.parameters["timeout_min"], numbers))
    )
    said: list[str] = []
    asked = replace(run, config=run.config.model_copy(update={"launcher": launcher}))
    assert complete(tmp_path, [asked], wait=True, say=said.append) is None
    assert tries == [(minutes, [0])] and said[0] == "1 run: 0 done, 1 failed, 0 to start"
    assert any("goes on with launcher=local" in line for line in said) == (name == "slurm")


def test_molas_counts_are_the_papers() -> None:
    checked = Counted(tables.load("mola_table1")).check_figures()
    assert len(checked) == 13 and all(each.matches for each in checked)


def test_figures_of_other_papers() -> None:
    for name in ("flylora_mmlu", "comol_qwen3", "mixlora_single_task"):
        assert all(each.matches for each in Counted(tables.load(name)).check_figures()), name


def test_what_is_not_matched_is_said() -> None:
    table = tables.load("lora_mixer_table2")
    trained, routers, mixlora, ratio = Counted(table).check_figures()
    assert routers.matches and routers.ours == 3_145_728
    assert not trained.matches and trained.ours == 330_301_440 and "not matched: no usual rank" in trained.line(table)
    assert not mixlora.matches and not ratio.matches and ratio.of == mixlora.ours


def test_rows_without_a_figure_have_our_count_alone() -> None:
    """LoRA of rank 64, by arithmetic: q, k, v and o of Mistral-7B, in, x, dt and out of Falcon-Mamba-7B."""
    table = tables.load("lora_mixer_table2")
    only = {name: method for name, method in table.methods.items() if name in ("base", "lora")}
    lines = Counted(table.model_copy(update={"methods": only, "parameters": []})).without_a_figure()
    mistral = 32 * 64 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096))
    mamba = 64 * 64 * ((4096 + 16384) + (8192 + 256 + 2 * 16) + (256 + 8192) + (8192 + 4096))
    assert [line.partition("; ")[0] for line in lines] == [
        f"LoRA on Falcon-Mamba-7B: trained parameters here {mamba:,}, 2.799 % of the base",
        f"LoRA on Mistral-7B: trained parameters here {mistral:,}, 0.753 % of the base",
        f"LoRA on LLaMA3-8B: trained parameters here {mistral:,}, 0.679 % of the base",
    ]


def test_no_usual_rank_gives_the_share_that_the_paper_prints() -> None:
    """What the table says of 3.88 per cent, by arithmetic: q, k, v and o of LLaMA3-8B, 32 layers."""
    base, one, router = 8_030_261_248, 32 * (8192 + 5120 + 5120 + 8192), 32 * 4 * 4096
    shares = []
    for experts in range(1, 11):
        for rank in (4, 6, 8, 16, 32, 48, 64, 96, 128):
            for trained in (experts * rank * one, experts * (rank * one + router)):
                shares += [trained / base, trained / (base + trained)]
    assert not any(f"{100 * share:.2f}" == "3.88" for share in shares)
    assert 6 * (64 * one + router) == 330_301_440  # the recipe's, as counted on the model
