"""Names of the places in a language model that activations are read from, as several libraries spell them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from .._checks import integer_in

# In the order in which a block computes them.
SITES = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_in", "mlp_post", "mlp_out", "resid_post")

_CANONICAL = {"z": "attn.hook_z", "mlp_in": "mlp.hook_in", "mlp_post": "mlp.hook_post"}  # the others: hook_<name>
# TransformerLens' names inside a block. Its hook_mlp_in is the stream before the norm, not what the MLP is given.
_HOOKS = {
    **{_CANONICAL.get(name, f"hook_{name}"): name for name in SITES},
    "hook_z": "z",  # as it is called without its module
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "hook_mlp_in": "resid_mid",
    "attn.hook_out": "attn_out",
}
_REFUSED_HOOKS = {
    "mlp.hook_out": "before or after a norm that follows the MLP, depending on the version: say mlp_out for what is "
    "added to the stream, or give the module's name",
    "ln1.hook_normalized": "its weights are folded into the next layer there: give the norm's module name",
    "ln2.hook_normalized": "its weights are folded into the MLP there: say mlp_in for what the MLP is given",
}
# The stack of blocks in transformers: GPT-2, BLOOM, Falcon; GPT-NeoX, Pythia; Llama, Gemma; OPT; BERT; XLNet, ...
_STACK = re.compile(
    r"(?:(?:(?:language_)?model\.|transformer\.|gpt_neox\.|decoder\.|backbone\.|base_model\.|rwkv\.|"
    r"bert\.|roberta\.|electra\.|encoder\.|text_model\.)*(?:layers|layer|h|blocks)|blocks)\.(\d+)(?:\.(.+))?"
)
_BY_LAYER = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)_layer_?(\d+)")  # dictionary_learning
_HIDDEN_STATES = re.compile(r"hidden_states(?:\.(\d+)|\[(\d+)\])")
_MODEL = re.compile(r"(.+)@(\d+)")
_MODULE = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class Site:
    """A place in a language model: a block's number and what is read there.

    ``name`` is one of :data:`SITES`, or the name of a module, whose output is meant (its input if ``is_input``): inside
    block ``layer``, or in the whole model where ``layer`` is None. ``str(site)`` is one spelling for all of them, which
    :meth:`of` reads back.

    ==============  ==================================================================================================
    ``resid_pre``   what enters the block
    ``z``           what the attention's output projection is given, all heads beside each other
    ``attn_out``    what attention adds to the residual stream
    ``resid_mid``   the stream between attention and MLP, where they follow each other
    ``mlp_in``      what the MLP is given, behind its norm
    ``mlp_post``    what the MLP's output projection is given: its neurons (of a gated MLP, times the gate)
    ``mlp_out``     what the MLP adds to the residual stream
    ``resid_post``  what leaves the block; for the last block this is before the final norm
    ==============  ==================================================================================================

    ``model`` is which of several language models that are read together (:func:`~sae_engine.data.together`), as
    ``blocks.3.hook_resid_post@1`` spells the second.

    What is *added* is the last tensor before the sum: behind a norm that follows the MLP (Gemma 2), times a multiplier
    (Granite), without the residual that a module adds itself (BLOOM). ``pre + attn_out + mlp_out = post``.

    Example:
        >>> str(Site.of("resid_post", 3))
        'blocks.3.hook_resid_post'
        >>> Site.of("model.layers.3") == Site.of("blocks.3.hook_resid_post") == Site.of("resid_post", 3)
        True
        >>> Site.of("model.layers.3.self_attn.o_proj:input")
        Site(name='self_attn.o_proj', layer=3, is_input=True)
    """

    name: str
    layer: int | None = None
    is_input: bool = False
    model: int = field(default=0, repr=False)

    def __str__(self) -> str:
        named = self.name in SITES
        inside = f"{_CANONICAL.get(self.name, f'hook_{self.name}')}{self._of_model}" if named else self.place
        return inside if self.layer is None else f"blocks.{self.layer}.{inside}"

    @property
    def _of_model(self) -> str:
        return f"@{self.model}" if self.model else ""

    @property
    def place(self) -> str:
        """The site without its layer: what a manifest has as ``site`` beside ``layer``."""
        return f"{self.name}{':input' if self.is_input else ''}{self._of_model}"

    @classmethod
    def of(cls, site: str | Site, layer: int | None = None) -> Site:
        """The site that ``site`` spells, in block ``layer`` where the spelling has no number.

        Args:
            site: a name of :data:`SITES`; TransformerLens' (``blocks.3.hook_resid_post``, ``blocks.3.attn.hook_z``),
                transformers' (``model.layers.3``, ``transformer.h.3``, ``hidden_states.3``) or dictionary_learning's
                (``resid_post_layer_3``); or the name of any module, ``:input`` behind it for what the module is given.
            layer: the block; None where ``site`` says it, or names a module outside all blocks.

        Raises:
            TypeError: ``site`` is no string, ``layer`` no integer.
            ValueError: there is no such spelling, ``layer`` is missing, negative, or another than the spelling's.

        Example:
            >>> Site.of("attn_out_layer_3")
            Site(name='attn_out', layer=3, is_input=False)
        """
        number = None if layer is None else integer_in(layer)
        if layer is not None and number is None:
            raise TypeError(f"layer must be an int, got {layer!r}")
        if isinstance(site, cls):
            found = site
        elif isinstance(site, str):
            found = _parse(site, layer is not None)
        else:
            raise TypeError(f"site must be a string or a Site, got {site!r}")
        if number is not None:
            if number < 0:
                raise ValueError(f"layer must be at least 0, got {layer}")
            if found.layer not in (None, number):
                raise ValueError(f"layer: {layer} was given, and site {site!r} lies in block {found.layer}")
            return replace(found, layer=number)
        if found.layer is None and found.name in SITES:
            raise ValueError(f"layer must be given: site {site!r} says no block (as 'blocks.3.hook_{found.name}' does)")
        return found


def _parse(text: str, has_layer: bool) -> Site:
    if (found := _MODEL.fullmatch(text.strip())) is not None:
        return replace(_parse(found[1], has_layer), model=int(found[2]))
    path, colon, side = text.strip().partition(":")
    if colon and side not in ("input", "output"):
        raise _no_site(text)
    is_input = side == "input"
    if found := (_BY_LAYER.fullmatch(path) if not colon else None):
        return Site(found[1], int(found[2]))
    if found := (_HIDDEN_STATES.fullmatch(path) if not colon else None):
        return Site("resid_pre", int(found[1] or found[2]))
    if found := _STACK.fullmatch(path):
        layer, inside = int(found[1]), found[2]
        if inside is None:  # a block itself
            return Site("resid_pre" if is_input else "resid_post", layer)
    else:
        layer, inside = None, path
    name = inside if inside in SITES else _HOOKS.get(inside)
    if name is not None and not colon:
        return Site(name, layer)
    if "hook_" in inside or not _MODULE.fullmatch(inside) or name is not None:
        raise _no_site(text, _REFUSED_HOOKS.get(inside))
    if layer is None and not has_layer and "." not in inside and inside not in ("lm_head", "embed_out"):
        raise _no_site(text)
    return Site(inside, layer, is_input)


def _no_site(text: str, why: str | None = None) -> ValueError:
    reason = f" ({why})" if why else ""
    return ValueError(
        f"site must be one of {', '.join(SITES)}, or such a name with its block as 'blocks.3.hook_resid_post', or the "
        f"name of a module as 'model.layers.3.self_attn.o_proj' (':input' behind it for what it is given), got "
        f"{text!r}{reason}"
    )
