"""What the branches of a transformer block add to its residual stream, shown by replacing it and not by names.

A module's output is what a branch adds if replacing it by R changes what leaves the block by R (times a constant) and
by nothing else. That rules out an MLP that a norm follows (Gemma 2): R would come out normalized. With the outputs of
both branches replaced by zeros the block must return what it was given. That rules out a module that adds the residual
itself (BLOOM), and a third branch. The block alone is run, on a few tokens, with the arguments that the model gave it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MLPS = (
    "mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "feedforward", "ffw", "mlp_block", "channel_mixer",
    "fc2",  # OPT's block is its own MLP
)  # fmt: skip
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
_PROJECTIONS = {
    "z": ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin", "proj", "o"),
    "mlp_post": ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "wo", "w2", "proj", "output_linear", "w_out"),
}
# The replaced output and the difference are rounded at most four times each, by half an eps of the largest term.
_ROUNDINGS = 8


def main_part(output: Any) -> Tensor | None:
    """The tensor of hidden states in what a module returns: it, or the first of a tuple or list."""
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def with_main_part(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


class Branches:
    """A block and one call of it on (B, T, d) hidden states."""

    def __init__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor, site: str
    ) -> None:
        self.block, self.args, self.kwargs, self.site = block, args, kwargs, site
        self.stream = stream.clone()  # a block may write to what it is given
        self.shape = stream.shape
        self.names = {name: module for name, module in block.named_modules() if name}
        self.outputs: dict[str, Tensor] = {}  # of modules that return hidden states once, in the order of returning
        self.inputs: dict[str, Tensor] = {}
        self.order: list[str] = []
        self._record()

    # ------------------------------------------------------------------------------------------ what is asked

    def mlp(self) -> tuple[str, float]:
        """The module whose output, times the factor, the MLP adds to the stream."""
        return self._branches()[:2]

    def attention(self, *, must_precede_mlp: bool) -> tuple[str, float]:
        """The same of attention."""
        mlp, _, mixer, scale = self._branches()
        root = self._root(_ATTENTIONS, "attention")
        if mixer is None or not self._is_of(mixer, root, {mlp: None}):
            raise self._refused(f"its {type(self.names[root]).__name__} adds nothing to the stream by itself")
        if must_precede_mlp:
            before, after = self._run({mixer: None}, mlp)[1], self._run({mixer: self._random(mixer)}, mlp)[1]
            if torch.equal(before, after):
                raise self._refused("attention and MLP stand beside each other, so that there is nothing between them")
        return mixer, scale

    def projection(self, site: str) -> tuple[str, int]:
        """The module that is given the site's activations, and their width."""
        if site == "mlp_in":
            root = self._root(_MLPS, "MLP")
            parent = root.rpartition(".")[0]
            name = f"{parent}.fc1".strip(".") if root.endswith("fc2") else root
            inside = self.inputs.get(name)
        else:
            root = self._root(*((_ATTENTIONS, "attention") if site == "z" else (_MLPS, "MLP")))
            found = [root] if root.endswith("fc2") else []
            found += [f"{root}.{name}" for name in _PROJECTIONS[site] if f"{root}.{name}" in self.outputs]
            whole = self.outputs.get(root)
            if not found:
                raise self._refused(
                    f"its {type(self.names[root]).__name__} has none of {', '.join(_PROJECTIONS[site])} that every "
                    "token passes through, as a mixture of experts has not"
                )
            name = found[0]
            inside = self.inputs.get(name)
            if whole is None or not torch.allclose(self.outputs[name], whole):
                self._make_sure_of(name, site)
        if inside is None or inside.shape[:-1] not in (self.shape[:-1], (self.shape[:-1].numel(),)):
            got = "nothing" if inside is None else f"hidden states of shape {tuple(inside.shape)}"
            raise self._refused(f"{name} is given {got} for {tuple(self.shape[:-1])} (batch, tokens)")
        return name, inside.shape[-1]

    def _make_sure_of(self, name: str, site: str) -> None:
        """A module that adds the residual returns more than its projection does: the projection is then the branch."""
        if name not in (self._branches()[0 if site == "mlp_post" else 2],):
            raise self._refused(f"what {name} returns is not yet what its branch adds")

    # ------------------------------------------------------------------------------------------ how it is found

    def _branches(self) -> tuple[str, float, str | None, float]:
        """MLP and factor, the other branch and its factor."""
        root = self._root(_MLPS, "MLP")
        inside = [name for name in self.order if name.startswith(f"{root}.")]
        begins = min((self.order.index(name) for name in inside), default=self.order.index(root))
        candidates = [name for name in self.order[begins:] if not root.startswith(f"{name}.")]
        linear = False
        for mlp in reversed(candidates):
            scale = self._factor(mlp, {})
            if scale is None or not self._is_of(mlp, root, {}):
                continue
            linear = True
            if self._is_stream({mlp: None}):  # a block that is an MLP alone
                return mlp, scale, None, 1.0
            for mixer in reversed(self.order):
                if mixer in (mlp, root) or mixer.startswith(f"{root}.") or root.startswith(f"{mixer}."):
                    continue
                if not self._is_stream({mlp: None, mixer: None}):
                    continue
                other = self._factor(mixer, {mlp: None})
                if other is not None:
                    return mlp, scale, mixer, other
        kind = type(self.names[root]).__name__
        if linear:
            raise self._refused(
                f"with what its {kind} and one other module return replaced by zeros it does not return what it was "
                "given: the stream is scaled or normalized, or more than two branches are added to it"
            )
        raise self._refused(f"nothing that its {kind} leads to is added to the stream as it is")

    def _root(self, names: tuple[str, ...], what: str) -> str:
        for name in names:
            if name in self.outputs:
                return name
        for name in self.outputs:  # as DBRX's norm_attn_norm.attn
            if name.rpartition(".")[2] in names:
                return name
        raise self._refused(f"there is no {what} among {names} that returns hidden states, once for each token")

    def _is_of(self, name: str, root: str, others: dict[str, Tensor | None]) -> bool:
        """Whether a branch that ends in ``name`` begins in ``root``, and has nothing of it pass by."""
        if name == root or name.startswith(f"{root}."):
            return True
        replaced = {**others, name: None}
        same = [self._run({**replaced, root: value})[0] for value in (None, self._random(root))]
        if not torch.equal(*same):
            return False
        before, after = (self._run({**others, root: value}, name)[1] for value in (None, self._random(root)))
        return not torch.equal(before, after)

    def _factor(self, name: str, others: dict[str, Tensor | None]) -> float | None:
        """c, where replacing the output by R changes what leaves the block by c R and by nothing else."""
        value = self._random(name)
        zero, moved = self._run({**others, name: None})[0], self._run({**others, name: value})[0]
        if not bool(moved.isfinite().all()):
            return None
        wide = torch.float64 if value.device.type != "mps" else torch.float32
        r, difference = value.reshape(self.shape).to(moved.device, wide), moved.to(wide) - zero.to(wide)
        c = float((difference * r).sum() / (r * r).sum())
        eps = torch.finfo(moved.dtype).eps
        if abs(c) < 1e-3:
            return None
        known = [1.0, *(v for v in vars(self.block).values() if isinstance(v, float))]
        c = next((v for v in known if abs(v - c) <= eps * abs(c)), c)
        bound = _ROUNDINGS * eps * (moved.abs() + zero.abs() + self.stream.abs().to(moved.device) + (c * r).abs())
        return c if bool(((difference - c * r).abs() <= bound).all()) else None

    def _is_stream(self, replaced: dict[str, Tensor | None]) -> bool:
        out = self._run(replaced)[0]
        stream = self.stream.to(out.device)
        return bool(((out - stream).abs() <= _ROUNDINGS * torch.finfo(out.dtype).eps * stream.abs()).all())

    # ------------------------------------------------------------------------------------------ running it

    def _record(self) -> None:
        calls: dict[str, int] = {}
        leading = (self.shape[:-1], (self.shape[:-1].numel(),))

        def after(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[name] = calls.get(name, 0) + 1
                given = args[0] if args else kwargs.get("hidden_states")
                if isinstance(given, Tensor):
                    self.inputs[name] = given.clone()
                hidden = main_part(output)
                if hidden is not None and hidden.shape[-1:] == self.shape[-1:] and hidden.shape[:-1] in leading:
                    self.outputs[name] = hidden.clone().reshape(self.shape)  # clone: it may be added to in place

            return hook

        handles = [m.register_forward_hook(after(n), with_kwargs=True) for n, m in self.names.items()]
        try:
            self._call()
        finally:
            for handle in handles:
                handle.remove()
        for name, count in calls.items():
            if count > 1:
                self.outputs.pop(name, None)
                self.inputs.pop(name, None)
        self.order = [name for name in calls if name in self.outputs]

    def _run(self, replaced: dict[str, Tensor | None], watched: str | None = None) -> tuple[Tensor, Tensor]:
        """What leaves the block, and what the module ``watched`` returns, with outputs replaced (None: by zeros)."""
        seen: list[Tensor] = []

        def put(value: Tensor | None) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                hidden = main_part(output)
                assert hidden is not None
                new = torch.zeros_like(hidden) if value is None else value.clone().reshape(hidden.shape).to(hidden)
                return with_main_part(output, new)

            return hook

        def watch(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = main_part(output)
            assert hidden is not None
            seen[:] = [hidden.clone()]

        handles = [self.names[name].register_forward_hook(put(value)) for name, value in replaced.items()]
        if watched is not None:
            handles.append(self.names[watched].register_forward_hook(watch))
        try:
            out = main_part(self._call())
        finally:
            for handle in handles:
                handle.remove()
        if out is None or out.shape != self.shape:
            raise self._refused("what it returns has not the shape of what it is given")
        return out, seen[0] if seen else out

    def _call(self) -> Any:
        if self.args:
            return self.block(self.stream.clone(), *self.args[1:], **self.kwargs)
        given = {n: self.stream.clone() if isinstance(v, Tensor) and v.shape == self.shape else v
                 for n, v in self.kwargs.items()}  # fmt: skip
        return self.block(**given)

    def _random(self, name: str) -> Tensor:
        """As large as the module's output or the stream; the tokens differ in size, which a norm would take away."""
        generator = torch.Generator("cpu").manual_seed(0)
        value = torch.randn(self.shape, generator=generator, device="cpu")
        value *= torch.tensor([1.0, 2.0, 0.5, 1.5, 0.75], device="cpu")[: self.shape[1]].view(1, -1, 1)
        there = self.outputs[name]
        size = max(float(there.float().square().mean().sqrt()), float(self.stream.float().abs().median()), 1e-3)
        return (value * size).to(there)

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"site {self.site!r} of a {type(self.block).__name__}: {reason}")
