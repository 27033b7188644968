"""Shared fixtures. Set before anything imports torch or the Hub client: one thread, no network, a cache of its own."""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

_HF_HOME = tempfile.mkdtemp(prefix="ppow-tests-")
os.environ["HF_HOME"] = _HF_HOME
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A target verifies what the drafter has drafted.",
    "user asks a question and assistant answers it; system sets the tone.",
    "def add(a, b):\n    return a + b\n",
    "One and two make three, three and four make seven.",
]


def pytest_unconfigure(config):
    shutil.rmtree(_HF_HOME, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def anywhere(monkeypatch):
    """Take the fast path on the CPU too, without the graphs themselves, which test_gpu.py records."""
    from ppow import fast_path_ppow

    monkeypatch.setattr(fast_path_ppow, "place_obstacle", lambda *args: None)
    monkeypatch.setattr(fast_path_ppow, "shortage", lambda *args: None)


@pytest.fixture(scope="module")
def benchmark(request):
    """The module of ``benchmarks/`` that the test module names in ``BENCHMARK``."""
    root = str(Path(__file__).parents[1])
    sys.path.insert(0, root)
    try:
        yield importlib.import_module(f"benchmarks.{request.module.BENCHMARK}")
    finally:
        sys.path.remove(root)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE of at most 400 tokens with a ChatML template that marks the answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """A Llama of four small layers that speaks with that tokenizer."""
    return LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=512,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=None,
    )


@pytest.fixture(scope="session")
def save_target(tiny_config, tiny_tokenizer):
    """Puts a tiny target and its tokenizer into a folder, always the same: -> the target."""

    def save(folder):
        torch.manual_seed(0)
        target = LlamaForCausalLM(tiny_config)
        target.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return target

    return save
