"""Plans against closed forms and the papers' own counts, without a weight; and what the command prints."""

import pytest

from loramoe_train.planning import make_counts
from tests.composing import composed
from tests.forks import run_forked


def counts(*overrides):
    return make_counts(composed(*overrides))[0]


def test_mixlora_count_on_llama2():
    """Eight copies of rank 16 on gate, up and down, one pair on q, k, v and o, a router of 8 * 4096 per layer."""
    found = counts("+recipe=mixlora", "model=llama2_7b")
    copy, attention = 16 * 32 * 3 * (4096 + 11008), 16 * 32 * 4 * 2 * 4096
    assert found.experts == 8 * copy + attention and found.routers == 32 * 8 * 4096
    assert found.trained == 203_423_744 and found.active == 2 * copy + attention + found.routers


@pytest.mark.parametrize("model", ["llama3_8b", "mistral_7b"])
def test_lora_mixer_on_grouped_heads(model):
    """One q+k+v+o expert of rank 64 is 64 * 32 * (8192 + 5120 + 5120 + 8192); a router is 6 * 4096 per site."""
    found = counts("+recipe=lora_mixer", f"model={model}", "data=lora_mixer_seven")
    expert = 64 * 32 * (8192 + 5120 + 5120 + 8192)
    assert found.experts == 6 * expert == 327_155_712
    assert found.routers == 32 * 4 * 4096 * 6 == 3_145_728
    assert found.trained == found.experts + found.routers
    assert found.active == 3 * expert + found.routers


def test_lora_mixer_on_falcon_mamba():
    """in (4096 -> 16384), x (8192 -> 256 + 2 * 16), dt (256 -> 8192), out (8192 -> 4096), 64 layers."""
    found = counts("+recipe=lora_mixer", "model=falcon_mamba_7b", "data=lora_mixer_seven")
    shapes = [(4096, 16384), (8192, 288), (256, 8192), (8192, 4096)]
    assert found.experts == 6 * 64 * 64 * sum(d + o for d, o in shapes)
    assert found.routers == 6 * 64 * sum(d for d, _ in shapes)
    assert found.base == 7_272_665_088


def test_rank_and_top_k_per_layer():
    found = counts("+recipe=lora_mixer", "experts.layout=[1,2,3,4]", "experts.rank=[2,4,6,8]", "router.top_k=[1,2,2,2]")
    _, plan, _, _ = make_counts(
        composed("+recipe=lora_mixer", "experts.layout=[1,2,3,4]", "experts.rank=[2,4,6,8]", "router.top_k=[1,2,2,2]")
    )
    for spec in plan.values():
        layer = spec.site.layer
        assert spec.ranks == (2 * (layer + 1),) * (layer + 1) and spec.top_k == min(layer + 1, 2)
    assert found.experts == sum(sum(s.ranks) * (s.site.in_features + s.site.out_features) for s in plan.values())


def test_what_no_stage_trains_is_not_counted_as_trained():
    both = counts("+recipe=lora_mixer")
    assert both.trained == both.experts + both.routers
    only = counts("+recipe=lora_mixer", "trainer.stages={routers: {train: [routers]}}")
    assert only.trained == only.routers == both.routers


def test_the_command_prints_every_part(tmp_path):
    done = run_forked("plan", "+recipe=lora_mixer", "+plan.batch=4", "+plan.sequence=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    parts = ["16 sites", "self_attn.q_proj", "trainable", "active per token", "saved activations", "4 x 64 tokens"]
    parts += ["experts: ", "routers: ", "tiny_math", "passes", "tokens", "here ", "benchmark tiny_facts"]
    assert [words for words in parts if words not in done.stdout] == []
    assert "not measurable" not in done.stdout and "MISSING" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_command_needs_no_hub(tmp_path):
    done = run_forked(
        "plan", "+recipe=lora_mixer", "model=llama3_8b", "+plan.batch=1", "+plan.sequence=32", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "8,030,261,248" in done.stdout and "MISSING" in done.stdout


def test_an_unknown_plan_key_is_named(tmp_path):
    done = run_forked("plan", "+plan.bach=1", cwd=tmp_path)
    assert done.returncode == 2 and "plan.bach" in done.stderr and "batch" in done.stderr
