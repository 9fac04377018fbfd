"""The model that ships: what its card says is true, and it has learned."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from sae_engine.data import EMBEDDED_FOLDER, evaluation_text, load_language_model, weights_sha256
from sae_engine.data.contexts import context_batches

ASSET_LIMIT = 12 * 10**6


@pytest.fixture(scope="module")
def lm():
    return load_language_model()


@pytest.fixture(scope="module")
def card():
    return (EMBEDDED_FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def contexts(lm):
    """The evaluation text as the model was measured on it: whole contexts only."""
    return [ids for ids in context_batches(lm, evaluation_text(), lm.max_length, 8) if ids.shape[1] == lm.max_length]


def number(pattern, card):
    return float(re.search(pattern, card).group(1).replace(",", ""))


def test_what_is_loaded_is_what_the_card_names(lm, card):
    assert lm.is_embedded
    assert lm.name == "embedded"
    assert lm.revision is None
    assert lm.sha256 == weights_sha256(EMBEDDED_FOLDER)
    assert f"`{lm.sha256}`" in card
    assert (lm.d_model, lm.num_layers, lm.max_length) == (256, 4, 256)
    assert type(lm.model).__name__ == "GPT2LMHeadModel"
    assert len(lm.tokenizer) == 4096
    assert lm.model.dtype == torch.float32
    assert number(r"parameters \| ([\d,]+)", card) == sum(p.numel() for p in lm.model.parameters())


def test_files_are_small():
    files = {file.name: file.stat().st_size for file in EMBEDDED_FOLDER.iterdir()}
    assert sum(files.values()) <= ASSET_LIMIT
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert {"README.md", "training_log.jsonl", "evaluation.txt"} <= set(files)


def test_tokenizer_gives_the_text_back(lm):
    text = evaluation_text()[0] + " naïve ∑ \t\r\n  x"
    assert lm.tokenizer.decode(lm.tokenizer(text, verbose=False)["input_ids"]) == text
    assert lm.tokenizer.eos_token == lm.tokenizer.bos_token == "<|endoftext|>"


def test_held_out_loss_is_the_cards_and_far_below_the_unigram_entropy(lm, card, contexts):
    total, targets = 0.0, []
    with torch.inference_mode():
        for ids in contexts:
            logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            targets.append(ids[:, 1:].flatten())
    tokens = torch.cat(targets)
    loss = total / len(tokens)
    share = torch.bincount(tokens) / len(tokens)
    entropy = -sum(p * math.log(p) for p in share.tolist() if p)
    # The card has three decimals; another CPU sums in another order.
    assert abs(loss - number(r"\*\*([\d.]+) nats/token\*\*", card)) < 2e-3
    assert abs(entropy - number(r"held-out tokens \| ([\d.]+) nats/token", card)) < 2e-2  # ours has no ragged end
    assert loss < entropy - 2.0


def test_log_ends_where_the_card_says(card):
    rows = [json.loads(line) for line in (EMBEDDED_FOLDER / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] == number(r"trained on \| ([\d,]+) tokens", card)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert rows[-1]["held_out_loss"] < rows[len(rows) // 2]["held_out_loss"] < rows[0]["held_out_loss"]
