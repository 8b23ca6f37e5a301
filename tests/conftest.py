"""Fixtures that several folders of tests share. Nothing here or in a test asks the network for anything."""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CACHE = tempfile.TemporaryDirectory(prefix="loramoe-tests-")
# before anything imports the hub libraries: they read these when they are imported
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=_CACHE.name, TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so; here Ctrl-C is under test
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
END, USER, ASSISTANT, PAD, BEGIN = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|begin|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] + '<|end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer: 3 + 4 = 7\n#### 7",
    "Does this sentence make sense? yes no. Is this sentence positive or negative?",
    'def add(a, b):\n    """Return the sum."""\n    return a + b\n',
    "The quick brown fox jumps over the lazy dog, again and again, and the dog sleeps.",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the long forms of tests")


# with the longest tests: one that begins last leaves the other processes idle
LONG_FILES = ("test_on_slurm.py", "test_readme.py", "test_end_to_end.py", "test_recipes.py", "test_compiled.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))
    if not config.getoption("--nightly"):
        for item in items:
            if "nightly" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long; runs with --nightly"))
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits depend on how sums are split among threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the real data: LORAMOE_SHARED, else `shared` beside the checkout; skips without it."""
    folder = Path(os.environ.get("LORAMOE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs the real data: set LORAMOE_SHARED to the folder that holds data/")
    return folder


def make_tokenizer(*, begin: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of about 400 tokens; with `begin` it puts a begin-of-sequence token before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, END, USER, ASSISTANT, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if begin:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, inner.token_to_id(BEGIN))]
        )
    special = {"eos_token": END, "pad_token": PAD} | ({"bos_token": BEGIN} if begin else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    return make_tokenizer(begin=True)


def make_llama(*, vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """A random two-layer Llama, hidden size 32, in float32 and eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=256, **{**shape, **changes}
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def make_falcon_mamba(*, vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """A random two-layer Falcon-Mamba, hidden size 32, in float32 and eval mode."""
    import torch
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 6, "conv_kernel": 3}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(seed)
    return FalconMambaForCausalLM(FalconMambaConfig(vocab_size=vocab_size, **{**shape, **ids, **changes})).eval()


def write_base(folder: Path, make: Callable[..., Any], **changes: Any) -> Path:
    """A folder with a random model (`make_llama`, `make_falcon_mamba`) that knows the embedded tokenizer's words."""
    from loramoe_train.paths import ASSETS

    tiny = ASSETS / "tiny" / "model"
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    make(vocab_size=vocabulary, **changes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a tiny random Llama and its tokenizer, as `from_pretrained` wants it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    make_llama(vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
