"""Our adapter files: round trip, and one line for every way in which they can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loramoe_train.errors import ConfigError, DataError, MissingFileError
from loramoe_train.experts.adapters import (
    MANIFEST,
    WEIGHTS,
    adapter_tensors,
    find_adapter,
    load_weights,
    plan_of,
    read_manifest,
    read_weights,
    save_adapter,
)
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.inject import inject, trainable_groups
from loramoe_train.experts.plan import plan_experts, plan_imported
from loramoe_train.experts.sites import Site
from loramoe_train.files import sha256
from loramoe_train.routers.scores import LinearScore
from loramoe_train.routing.context import RoutingContext


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4)}) for _ in range(2))


SITES = [Site(f"layers.{n}.{k}", n, k, *((4, 6) if k == "a" else (6, 4)), True) for n in range(2) for k in "ab"]


def routed(counts=(1, 3), ranks=(2, 2)):
    plan = plan_experts(SITES, counts=counts, ranks=ranks, top_k=(1, 2), alpha=4.0, scale="alpha_over_rank")
    layers = inject(
        Net(),
        plan,
        make_bank=lambda s, d: ExpertBank(s.site.in_features, s.site.out_features, ranks=s.ranks, scales=s.scales),
        make_router=lambda s, d: LinearScore(s.site.in_features, s.num_experts, bias=True),
        context=RoutingContext(),
    )
    return layers, plan


@pytest.fixture
def saved(tmp_path):
    layers, plan = routed()
    for number, parameter in enumerate(p for group in trainable_groups(layers).values() for p in group.values()):
        nn.init.constant_(parameter, float(number + 1))  # distinguishable values: an exchanged tensor shows
    save_adapter(tmp_path, adapter_tensors(layers), plan, {"base": {"name": "x"}, "domains": ["d"]})
    return tmp_path, layers, plan


def test_round_trip(saved):
    folder, layers, plan = saved
    manifest = read_manifest(folder)
    assert plan_of(manifest) == plan and manifest["base"] == {"name": "x"}
    fresh, _ = routed()
    load_weights(adapter_tensors(fresh), read_weights(folder, manifest), "here")
    for kind, group in trainable_groups(fresh).items():
        for name, parameter in group.items():
            assert torch.equal(parameter, trainable_groups(layers)[kind][name]), name
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, WEIGHTS]


def test_the_plan_is_explicit_per_site(saved):
    sites = json.loads((saved[0] / MANIFEST).read_text())["sites"]
    assert [(s["site"]["name"], s["ranks"], s["top_k"]) for s in sites][::2] == [
        ("layers.0.a", [2], 1),
        ("layers.1.a", [2, 2, 2], 2),
    ]


def test_a_layer_without_experts_is_left_alone():
    layers, plan = routed(counts=(0, 2))
    assert set(plan) == set(layers) == {"layers.1.a", "layers.1.b"}


def test_imported_plan_leaves_out_uncovered_sites():
    plan = plan_imported(SITES, [{"layers.0.a": 3}, {"layers.0.a": 1, "layers.1.b": 2}], top_k=None)
    assert {name: spec.ranks for name, spec in plan.items()} == {"layers.0.a": (3, 1), "layers.1.b": (0, 2)}
    assert all(scale == 1.0 for spec in plan.values() for scale in spec.scales)


def test_another_layout_is_refused(saved):
    folder, _, _ = saved
    tensors = read_weights(folder, read_manifest(folder))
    with pytest.raises(ConfigError, match="shape .* the layouts differ"):
        load_weights(adapter_tensors(routed(counts=(1, 2))[0]), tensors, "init_from=x")
    with pytest.raises(ConfigError, match="4 missing|lacks|holds"):
        load_weights(adapter_tensors(routed(counts=(0, 3))[0]), tensors, "init_from=x")


def test_a_flipped_byte_is_noticed(saved):
    folder, _, _ = saved
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(DataError, match="checksum"):
        read_weights(folder, read_manifest(folder))


def test_a_value_that_is_not_finite_is_refused(saved):
    folder, layers, _ = saved
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.0.a.bank.up"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    manifest = read_manifest(folder) | {"weights_sha256": sha256(folder / WEIGHTS)}
    with pytest.raises(DataError, match="layers.0.a.bank.up .*not finite"):
        load_weights(adapter_tensors(layers), read_weights(folder, manifest), "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ('{"format": "other"}', "not an adapter manifest"),
     ('{"format": "loramoe_train.adapter", "version": 9}', "version 9")],
)  # fmt: skip
def test_damaged_manifests(tmp_path, content, message):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_missing_files(tmp_path, saved):
    with pytest.raises(MissingFileError, match="there is no"):
        find_adapter(tmp_path / "nowhere", "init_from")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MissingFileError, match="holds no adapter.json"):
        find_adapter(empty, "init_from")
    assert find_adapter(saved[0], "init_from") == saved[0]
    (saved[0] / WEIGHTS).unlink()
    with pytest.raises(MissingFileError, match="is missing"):
        read_weights(saved[0], read_manifest(saved[0]))


def test_injection_refuses_what_it_cannot_do():
    layers, plan = routed()
    with pytest.raises(ValueError, match="plan is empty"):
        inject(Net(), {}, make_bank=None, make_router=None, context=RoutingContext())
    net = Net()
    arguments = {
        "make_bank": lambda s, d: ExpertBank(s.site.in_features, s.site.out_features, ranks=s.ranks, scales=s.scales),
        "make_router": lambda s, d: None,
        "context": RoutingContext(),
    }
    inject(net, plan, **arguments)
    assert not any(p.requires_grad for n, p in net.named_parameters() if ".base." in n)
    with pytest.raises(ValueError, match="carries experts already"):
        inject(net, plan, **arguments)
