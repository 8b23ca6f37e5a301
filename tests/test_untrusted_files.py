"""Adapters and models of a stranger: only read, only as data, only what they really hold.

A size that a file claims and does not hold is far beyond this machine's memory here: whoever makes it fails.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramoe_train.build import attach
from loramoe_train.errors import ConfigError, DataError, LoramoeError, MissingFileError
from loramoe_train.experts.adapters import MANIFEST, WEIGHTS, check_stored, plan_of, read_manifest, save_adapter
from loramoe_train.experts.peft_folder import read_peft_folder
from loramoe_train.export import export
from loramoe_train.files import read_json, sha256, write_json
from loramoe_train.models import base_identity, load_model, load_tokenizer, meta_model
from loramoe_train.models.files import safetensors_header, weight_files
from loramoe_train.paths import ASSETS
from loramoe_train.reuse import config_of
from loramoe_train.run import rebuild
from loramoe_train.schema.model import ModelConfig
from loramoe_train.site_plan import plan_sites
from tests.composing import composed

HUGE = 1 << 45
DEEP = "[" * 100_000
TINY = ASSETS / "tiny" / "model"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- our adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder as a run leaves it. Read it only."""
    config = composed("+recipe=lora_mixer", "experts.rank=2", "model.path=" + str(TINY))
    model, domains = load_model(config.model), sorted({d.domain or t for t, d in config.data.definitions.items()})
    routed = attach(config, model, plan_sites(config, model, domains, ()), num_domains=len(domains))
    facts = {"base": base_identity(config.model), "tasks": config.data.tasks, "domains": domains}
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, routed.tensors(), routed.plan, facts | {"config": config.plain()})
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def rebuilt(folder: Path):
    config, folder, manifest = config_of(folder, [])
    return rebuild(config, folder, manifest, device="cpu")


def test_the_adapter_is_one(adapter):
    assert len(rebuilt(adapter).layers) == len(plan_of(read_manifest(adapter))) > 0


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_json(folder / MANIFEST, manifest)


def first(manifest: dict) -> dict:
    return manifest["sites"][0]


CLAIMS = {
    "rank": (lambda m: first(m).update(ranks=[HUGE, *first(m)["ranks"][1:]]), "claims ranks of"),
    "ranks": (lambda m: first(m).update(ranks=[4] * 60_000, scales=[1.0] * 60_000), "claims ranks of"),
    "experts": (lambda m: first(m).update(ranks=[0] * 70_000, scales=[1.0] * 70_000), "70000 ranks"),
    "inputs": (lambda m: first(m)["site"].update(in_features=HUGE), "is said to be"),
    "outputs": (lambda m: first(m)["site"].update(out_features=HUGE), "claims ranks of"),
    "no outputs": (lambda m: first(m)["site"].update(out_features=0), "sizes must be whole numbers above 0"),
    "top_k": (lambda m: first(m).update(top_k="all"), "damaged list of sites"),
    "negative rank": (lambda m: first(m).update(ranks=[-1] * len(first(m)["ranks"])), "whole numbers"),
    "rank in words": (lambda m: first(m).update(ranks="two"), "whole numbers"),
    "no scales": (lambda m: first(m).update(scales=[]), "one each for every expert"),
    "a module above": (lambda m: first(m)["site"].update(name="model"), "claims ranks"),
    "no such module": (
        lambda m: (first(m).update(ranks=[0], scales=[1.0]), first(m)["site"].update(name="../x")),
        "no linear layer ../x",
    ),
    "another field": (lambda m: first(m)["site"].update(__class__="os.system"), "damaged list of sites"),
    "sites that are none": (lambda m: m.update(sites=[1]), "damaged list of sites"),
    "sites as text": (lambda m: m.update(sites="all"), "sites is damaged"),
    "tasks": (lambda m: m.update(tasks=[["x"]]), "tasks is damaged"),
    "domains": (lambda m: m.update(domains={"x": 1}), "domains is damaged"),
    "base": (lambda m: m.update(base="tiny"), "base is damaged"),
    "another base": (lambda m: m.update(base={"name": "../../etc", "weights_sha256": "x"}), "was made for the base"),
    "no checksum": (lambda m: m.pop("weights_sha256"), "weights_sha256 is damaged"),
    "no config": (lambda m: m.pop("config"), "stores no config"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_manifest_that_claims_something_else(case, copied):
    change, words = CLAIMS[case]
    edit(copied, change)
    before = tree(copied)
    with pytest.raises(LoramoeError, match=words) as caught:
        rebuilt(copied)
    assert str(caught.value).isprintable() and tree(copied) == before


def header(folder: Path, name: str, content: dict | str, size: int = 0) -> Path:
    """A safetensors file of that header and so many zeros."""
    text = (content if isinstance(content, str) else json.dumps(content)).encode()
    path = folder / name
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


FACTS = {"dtype": "F32", "shape": [HUGE, 4], "data_offsets": [0, HUGE * 16]}
HEADERS = {
    "more than there is": {"x": FACTS},
    "overflow": {"x": FACTS | {"shape": [1 << 62, 8], "data_offsets": [0, 16]}},
    "overlap": {
        "x": FACTS | {"shape": [4], "data_offsets": [0, 16]},
        "y": FACTS | {"shape": [4], "data_offsets": [8, 24]},
    },
    "negative": {"x": FACTS | {"shape": [-1, 4], "data_offsets": [0, 16]}},
    "nested": '{"x": ' + DEEP,
    "list": "[]",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_header_that_lies(case, copied):
    header(copied, WEIGHTS, HEADERS[case], 24)
    edit(copied, lambda m: m.update(weights_sha256=sha256(copied / WEIGHTS)))
    with pytest.raises(DataError, match=f"{WEIGHTS}.* is damaged"):
        check_stored(copied, plan_of(read_manifest(copied)))
    with pytest.raises(DataError, match=f"{WEIGHTS}.* is damaged"):
        export([str(copied), str(copied / "out"), "route=uniform"])
    if case != "overlap":  # our own look at the header is about sizes; the library looks at the rest
        with pytest.raises(DataError, match="is damaged"):
            safetensors_header(copied / WEIGHTS)


@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 50_000, '{"format": ' + "1" * 5000 + "}", '{"a": "\udcff"}'])
def test_json_that_cannot_be_read(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="x.json"):
        read_json(tmp_path / "x.json")


def test_an_adapter_folder_with_a_link_is_not_written_to(copied, tmp_path):
    from loramoe_train.reuse import evaluate_folder

    (tmp_path / "private").mkdir()
    (copied / "samples").symlink_to(tmp_path / "private")
    with pytest.raises(ConfigError, match="samples is a link that leads out of the folder"):
        evaluate_folder(copied, [])
    assert not list((tmp_path / "private").iterdir())


# -- PEFT adapters -----------------------------------------------------------------------------------------------------

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def peft(folder: Path, **changes) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 2} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pair = {KEY.format("A"): torch.ones(2, 8), KEY.format("B"): torch.ones(8, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "changes", [{"r": HUGE}, {"rank_pattern": {"q_proj": HUGE}}, {"lora_alpha": 10**400}, {"r": [2]}]
)
def test_a_peft_config_that_claims_another_size(changes, tmp_path):
    with pytest.raises(DataError, match="rank|alpha"):
        read_peft_folder(peft(tmp_path / "adapter", **changes))


@pytest.mark.parametrize("case", HEADERS)
def test_peft_weights_that_lie(case, tmp_path):
    folder = peft(tmp_path / "adapter")
    header(folder, "adapter_model.safetensors", HEADERS[case], 24)
    with pytest.raises(DataError, match="adapter_model.safetensors is damaged"):
        read_peft_folder(folder)


def test_a_pickle_file_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = peft(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(MissingFileError, match="a pickle file, which is never opened"):
        read_peft_folder(folder)
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    torch.save({"x": Bomb()}, model / "pytorch_model.bin")
    assert load_model(ModelConfig(name="x", path=str(model))).num_parameters() > 0  # safetensors wins
    (model / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="pytorch_model.bin, a pickle file, which is never opened"):
        load_model(ModelConfig(name="x", path=str(model)))
    assert not (tmp_path / "executed").exists()


# -- base models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_beside_a_model_is_not_run(model, tmp_path):
    evil = f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass Evil: pass\n"
    for name in ("evil", "configuration_evil", "modeling_evil", "tokenization_evil"):
        (model / f"{name}.py").write_text(evil)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    edit_json(model / "config.json", auto_map={kind: "evil.Evil" for kind in kinds})
    mapped = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit_json(model / "tokenizer_config.json", **mapped)
    config = ModelConfig(name="x", path=str(model))
    meta_model(config)
    load_tokenizer(config)
    load_model(config)
    edit_json(model / "config.json", model_type="evil")
    edit_json(model / "tokenizer_config.json", **mapped, tokenizer_class="Evil")
    with pytest.raises(ConfigError, match="model_type 'evil' is unknown"):
        load_model(config)
    with pytest.raises(LoramoeError):
        load_tokenizer(config)
    assert not (tmp_path / "executed").exists()


def test_an_adapter_in_the_folder_of_a_base(model, tmp_path):
    """transformers would load it, or the base that it names."""
    elsewhere = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")}
    (model / "adapter_config.json").write_text(json.dumps(elsewhere))
    with pytest.raises(ConfigError, match="holds adapter_config.json.*experts.adapters"):
        load_model(ModelConfig(name="x", path=str(model)))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 3, ["x"], ""])
def test_an_index_that_names_other_files(name, model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DataError, match="weight_map"):
        weight_files(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 1 << 40}, "describes"),
        ({"vocab_size": 1 << 40}, "describes"),
        ({"vocab_size": 1 << 62, "hidden_size": 1 << 40}, "cannot be built"),
        ({"num_hidden_layers": 64, "intermediate_size": 1 << 30}, "describes"),
    ],
)
def test_a_config_that_claims_another_size(changes, words, model):
    edit_json(model / "config.json", **changes)
    with pytest.raises(LoramoeError, match=words):
        load_model(ModelConfig(name="x", path=str(model)))


def test_a_config_that_claims_very_many_layers(model):
    from loramoe_train.models import num_layers, read_architecture

    edit_json(model / "config.json", num_hidden_layers=HUGE)
    with pytest.raises(ConfigError, match="no model has more than 10,000"):
        num_layers(read_architecture(ModelConfig(name="x", path=str(model))))
