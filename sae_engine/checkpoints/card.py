"""SourceCard: where an autoencoder comes from, and what its input has to be. A wrong one looks like a bad SAE."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

RAW, CENTRED, UNKNOWN = "raw", "mean-centred", "unknown"
RESIDUALS = (RAW, CENTRED, UNKNOWN)
_MEANING = {
    "none": "none",
    "layer_norm": "layer_norm: each token minus its mean, over its standard deviation; undone after decoding",
    "center": "center: each token minus its mean; added back after decoding",
    RAW: "raw: the hidden state as the model has it",
    CENTRED: "mean-centred: trained on hidden states minus their mean over d (TransformerLens); takes raw ones too",
    UNKNOWN: "unknown: the file does not say; for a mean-centred one load with residual='mean-centred'",
}
# Models with LayerNorm, whose residual stream TransformerLens centres when it centres the weights that write to it.
# Those with RMSNorm (Gemma, Llama, Qwen, Mistral) it leaves alone.
_LAYER_NORM_MODELS = ("gpt2", "distilgpt2", "gpt-neo", "gpt-j", "pythia", "opt-", "gelu-", "solu-")
_WRITING_HOOKS = ("resid", "attn_out", "mlp_out", "embed")


@dataclass(frozen=True)
class SourceCard:
    """What a checkpoint says of itself, in words. It is printed and saved along; nothing is computed from it.

    Attributes:
        format: the format it was first read from, a key of :data:`sae_engine.checkpoints.formats.READ`.
        architecture: that library's own name for the rule, such as ``"BatchTopKSAE"``.
        source: hub name, commit and sub-folder; None for local files.
        model_name: the language model.
        hook_name: where in it the activations are taken.
        normalization: what happens to an input; ``"none"``, ``"layer_norm"``, ``"center"`` or a sentence.
        residual: ``"raw"``, ``"mean-centred"`` or ``"unknown"``.
        notes: what else a user should know, one sentence each.

    Example:
        >>> card = SourceCard(format="sparsify", architecture="topk", model_name="gpt2")
        >>> SourceCard.from_dict(card.to_dict()) == card
        True
    """

    format: str
    architecture: str
    source: str | None = None
    model_name: str | None = None
    hook_name: str | None = None
    normalization: str = "none"
    residual: str = UNKNOWN
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f", {self.source}" if self.source else ""
        lines = [
            ("from", f"{self.format} ({self.architecture}){where}"),
            ("model", self.model_name or "not said"),
            ("hook", self.hook_name or "not said"),
            ("normalization", _MEANING.get(self.normalization, self.normalization)),
            ("residual", _MEANING.get(self.residual, self.residual)),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<14} {text}" for name, text in lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types alone."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, value: object) -> SourceCard | None:
        """The card that :meth:`to_dict` gave; None for anything else, since files may hold what they like."""
        if not isinstance(value, dict) or value.keys() - cls.__dataclass_fields__.keys():
            return None
        notes = value.get("notes", [])
        texts = {name: text for name, text in value.items() if name != "notes"}
        optional = {"source", "model_name", "hook_name"}
        if not all(isinstance(t, str) or (t is None and n in optional) for n, t in texts.items()):
            return None
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            return None
        if not {"format", "architecture"} <= texts.keys():
            return None
        return cls(**texts, notes=tuple(notes))


def residual_of(model_name: str | None, hook_name: str | None, centred_writing: bool | None) -> str:
    """What the activations were, given whether TransformerLens centred the weights that write to the residual stream.

    Such a model's residual stream, attention and MLP outputs have mean 0 over d; inside a block nothing changes.
    """
    if hook_name is not None and not any(part in hook_name for part in _WRITING_HOOKS):
        return RAW
    if centred_writing is None:
        return UNKNOWN
    if not centred_writing:
        return RAW
    model = None if model_name is None else model_name.rpartition("/")[2].lower()
    return CENTRED if model is None or model.startswith(_LAYER_NORM_MODELS) else RAW
