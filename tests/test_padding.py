"""Rows with padding equal the rows without it, whatever an architecture makes positions from."""

import pytest
import torch
from tiny_models import MODELS, SIZES, WIDE
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, MptConfig, MptForCausalLM

from sae_engine.data import read_activations, read_gradients, run_with_replacement
from sae_engine.data.padding import padding_of

FAMILIES = {  # learned positions, with and without an offset; rotations; ALiBi from the mask and from places; a state
    **MODELS,
    "bloom": lambda: BloomForCausalLM(BloomConfig(n_layer=3, n_head=4, hidden_size=32, vocab_size=300)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=3, vocab_size=300, max_seq_len=32)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**{k: WIDE[k] for k in SIZES if k != "num_attention_heads"})),
}
LENGTHS = (5, 9, 2)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # fp64, but some families make softmax, norms or positions in fp32


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().double().eval()


def padded(side, length=9):
    """Three rows of ids and their mask; padding holds -100, as labels do, and "both" puts two places in front."""
    length += 2 * (side == "both")
    ids, mask = torch.full((3, length), -100), torch.zeros(3, length, dtype=torch.int64)
    for row, count in enumerate(LENGTHS):
        first = {"left": length - count, "right": 0, "both": 2}[side]
        generator = torch.Generator().manual_seed(row)
        ids[row, first : first + count] = torch.randint(300, (count,), generator=generator)
        mask[row, first : first + count] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rows_with_padding_are_the_rows_without(model, side):
    ids, mask = padded(side)
    x = read_activations(model, ids, layer=2, attention_mask=mask)
    doubled = lambda hidden: 2 * hidden  # noqa: E731
    logits = run_with_replacement(model, ids, doubled, layer=1, site="resid_post", attention_mask=mask.bool())
    for row, here in enumerate(mask.bool()):
        alone = ids[row][here][None]
        torch.testing.assert_close(x[row][here], read_activations(model, alone, layer=2)[0], **CLOSE)
        expected = run_with_replacement(model, alone, doubled, layer=1, site="resid_post")[0]
        torch.testing.assert_close(logits[row][here], expected, **CLOSE)
        assert not x[row][~here].any() and not logits[row][~here].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_gradient_and_predicts_nothing(side):
    torch.manual_seed(0)
    model = MODELS["gpt2"]().double().eval()
    ids, mask = padded(side)
    x, gradient = read_gradients(model, ids, layer=1, attention_mask=mask)
    for row, here in enumerate(mask.bool()):
        expected_x, expected = read_gradients(model, ids[row][here][None], layer=1)
        torch.testing.assert_close(x[row][here], expected_x[0])
        torch.testing.assert_close(gradient[row][here], expected[0], rtol=1e-5, atol=1e-7)
        assert not gradient[row][~here].any()


def test_what_replace_does_to_padding_changes_nothing():
    model = MODELS["gpt2"]().eval()
    ids, mask = padded("left")
    seen = []

    def noise_at_padding(x):
        seen.append(x)
        return torch.where(mask[..., None].bool(), x, torch.inf)

    logits = run_with_replacement(model, ids, noise_at_padding, layer=1, attention_mask=mask)
    assert torch.equal(logits, run_with_replacement(model, ids, lambda x: x, layer=1, attention_mask=mask))
    assert seen[0].shape == (3, 9, 32) and not seen[0][mask == 0].any()


def test_a_mask_of_ones_is_no_mask():
    model, ids = MODELS["gpt2"]().eval(), torch.randint(300, (2, 9))
    assert padding_of(ids, torch.ones_like(ids)) is None
    x = read_activations(model, ids, layer=1, attention_mask=torch.ones_like(ids))
    assert torch.equal(x, read_activations(model, ids, layer=1))


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ([[1, 1, 1]], TypeError, "attention_mask.*list"),
        (torch.ones(2, 3), TypeError, "attention_mask.*float32"),
        (torch.ones(3, 2, dtype=torch.int64), ValueError, r"attention_mask.*\(2, 3\).*\(3, 2\)"),
        (torch.tensor([[1, 1, 2], [1, 1, 1]]), ValueError, "attention_mask.*0.*1"),
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), ValueError, "attention_mask: row 1 has padding between tokens"),
        (torch.tensor([[0, 0, 0], [1, 0, 1]]), ValueError, "attention_mask: row 0 has no token"),
    ],
)
def test_masks_that_are_none_are_refused(mask, error, match):
    model, ids = MODELS["gpt2"](), torch.zeros(2, 3, dtype=torch.int64)
    for call in (
        lambda: read_activations(model, ids, layer=1, attention_mask=mask),
        lambda: read_gradients(model, ids, layer=1, attention_mask=mask),
        lambda: run_with_replacement(model, ids, lambda x: x, layer=1, attention_mask=mask),
    ):
        with pytest.raises(error, match=match):
            call()
