"""Whoever sets torch's default device means tensors of his own: ours name the device that they are for."""
import pytest
import torch

from sae_engine.data import collect_activations, evaluation_text, load_language_model, open_source, stream_activations
from sae_engine.data.contexts import contexts_of
from sae_engine.data.memory import TensorStream
from sae_engine.data.sites import Site
from sae_engine.data.stream import RowStream, StoreStream
from sae_engine.testing import assert_same

SITES = [Site.of("blocks.1.hook_resid_pre")]


@pytest.fixture(scope="module")
def lm():
    return load_language_model(device="cpu")


def streamed(lm, folder):
    return torch.cat(list(stream_activations(lm, evaluation_text()[:2], layer=1, max_tokens=300, first_token="bos")))


def of_tokens(lm, folder):
    ids = [[5, 6, 7, 8, 9], [10, 11, 12]]
    masks = [[1, 1, 1, 1, 0], [1, 1, 1]]
    records = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]
    contexts = contexts_of(lm, context_length=8, batch_size=2, packing=False)
    stream = RowStream(lm, open_source(records, column="input_ids"), SITES, contexts, chunk_rows=8, chunks=2,
                       batch_rows=4, seed=0, device=torch.device("cpu"))  # fmt: skip
    return torch.cat([stream.next()[0] for _ in range(4)])


def of_the_library(lm, folder):
    texts = [text for _, (_, text) in zip(range(3), open_source("stdlib").documents(), strict=False)]
    return torch.tensor([len(text) for text in texts], device="cpu")


def stored(lm, folder):
    options = {"layer": 1, "max_tokens": 300, "shard_tokens": 100, "progress": False}
    store = collect_activations(lm, evaluation_text()[:2], folder, **options)
    rows = [x for x, _ in store.batches(64, seed=1, start=70, with_tokens=True)]
    stream = StoreStream([store], batch_rows=16, seed=0, chunk_rows=32)
    return torch.cat([*rows, stream.next()[0], store.tensor()])


def in_memory(lm, folder):
    stream = TensorStream([torch.arange(40.0, device="cpu").view(10, 4)], batch_rows=4, seed=0)
    return torch.cat([stream.first_chunk()[0], *(stream.next()[0] for _ in range(4))])


@pytest.mark.parametrize("read", [streamed, of_tokens, of_the_library, stored, in_memory], ids=lambda f: f.__name__)
def test_rows_are_the_same_whatever_the_default_device_is(lm, tmp_path, read):
    expected = read(lm, tmp_path / "a")
    with torch.device("meta"):  # where whatever names no device is lost
        found = read(lm, tmp_path / "b")
    assert_same(found, expected)
