"""Which mesh suits an autoencoder, a batch and an interconnect: bytes, milliseconds and memory, by arithmetic.

Nothing here is measured while it runs. A step's time is the sum of its parts, as if nothing overlapped, and each part
is its work over one rate of :class:`Hardware`.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from .. import _checks as check

SCOPES = ("row", "batch")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The rates that an estimate divides by; the defaults are an H200's in machines of eight.

    Products and memory were measured on such a card (``benchmarks/results/nvidia-h200``, rows of kind "roof"). The
    others are assumptions: whoever has the machines should replace them by what they measure.

    Args:
        flops_16_bit, flops_32_bit: of products a second, bf16 or fp16 and fp32.
        memory_bytes_per_second: of one device's memory.
        cache_bytes_per_second: at which rows of the decoder are gathered.
        link_bytes_per_second: that a rank sends to others of its node.
        ring_bytes_per_second: that a rank sends in a gather over nodes, whose rings use all adapters of a node.
        network_bytes_per_second: that a rank sends to another node by itself.
        call_seconds: of one collective, whatever its size.
        memory_bytes: of one device.
        devices_per_node: that the faster link connects.

    Raises:
        TypeError: a rate is no number.
        ValueError: a rate is not above 0.

    Example:
        >>> Hardware(devices_per_node=64).devices_per_node
        64
    """

    flops_16_bit: float = 790e12
    flops_32_bit: float = 51e12
    memory_bytes_per_second: float = 4.3e12
    cache_bytes_per_second: float = 5.5e12
    link_bytes_per_second: float = 450e9
    ring_bytes_per_second: float = 360e9
    network_bytes_per_second: float = 50e9
    call_seconds: float = 30e-6
    memory_bytes: float = 141e9
    devices_per_node: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            check.positive(field.name, getattr(self, field.name))
        check.integer_k(self.devices_per_node, name="devices_per_node")


class MeshEstimate(NamedTuple):
    """One mesh, and what a training step on it is estimated to take.

    Attributes:
        latent, node, data: sizes of the mesh's dimensions: ranks of a node that share the latents, nodes that do, and
            such groups, each with tokens of its own.
        milliseconds: by part of a step.
        sent_bytes: that a rank sends in a step, by part.
        memory_bytes: that a rank holds, by part.
        tokens_per_second: of all ranks together.
        efficiency: that rate, over as many devices' as there are if one held all latents and all else were free.
        fits: whether the memory is a device's.
    """

    latent: int
    node: int
    data: int
    milliseconds: dict[str, float]
    sent_bytes: dict[str, float]
    memory_bytes: dict[str, float]
    tokens_per_second: float
    efficiency: float
    fits: bool

    @property
    def step_milliseconds(self) -> float:
        return sum(self.milliseconds.values())

    @property
    def communication(self) -> float:
        """The share of a step's time in which ranks send."""
        return sum(ms for part, ms in self.milliseconds.items() if part.startswith("send")) / self.step_milliseconds

    def __str__(self) -> str:
        """The arithmetic: a line for each part."""
        held, sent = sum(self.memory_bytes.values()), sum(self.sent_bytes.values())
        parts = [
            (f"step {self.step_milliseconds:.1f} ms, {self.tokens_per_second:,.0f} tokens/s, "
             f"{self.efficiency:.0%} of linear", {name: f"{ms:.2f} ms" for name, ms in self.milliseconds.items()}),
            (f"sent by a rank: {sent / 1e6:,.0f} MB",
             {name: f"{n / 1e6:,.1f} MB" for name, n in self.sent_bytes.items()}),
            (f"held by a rank: {held / 1e9:.1f} GB" + ", more than a device has" * (not self.fits),
             {name: f"{n / 1e9:.2f} GB" for name, n in self.memory_bytes.items()}),
        ]  # fmt: skip
        lines = [f"from_env(latent={self.latent}, node={self.node}, data={self.data})"]
        for title, named in parts:
            lines += ["", title, *(f"  {name:24} {value:>12}" for name, value in named.items())]
        return "\n".join(lines)


class Estimate(NamedTuple):
    """Every mesh of so many devices, the fastest that fits first.

    Attributes:
        meshes: those that fit by their time, then those that do not.
    """

    meshes: tuple[MeshEstimate, ...]

    @property
    def best(self) -> MeshEstimate | None:
        """The fastest that fits; None where none does."""
        return self.meshes[0] if self.meshes[0].fits else None

    def __str__(self) -> str:
        """A table of all meshes."""
        lines = ["latent  node  data       ms  sending     tokens/s  of linear  GB held"]
        for one in self.meshes:
            held = sum(one.memory_bytes.values()) / 1e9
            lines.append(
                f"{one.latent:6}{one.node:6}{one.data:6}{one.step_milliseconds:9.1f}{one.communication:9.0%}"
                f"{one.tokens_per_second:13,.0f}{one.efficiency:11.0%}{held:9.0f}"
                + "  too large" * (not one.fits)
            )
        return "\n".join(lines)


class _Sizes(NamedTuple):
    """Of a step: ``tokens`` of one group, ``itemsize`` bytes of the compute dtype, ``outputs`` reconstructions.

    ``widths`` of what each source reads and writes, of which it has ``d_sae`` latents and keeps ``k`` a token.
    """

    tokens: float
    d_in: int
    d_out: int
    d_sae: int
    k: float
    aux_k: int
    itemsize: int
    scope: str
    memory_budget: float
    widths: tuple[tuple[int, int], ...]
    blocks: int | None
    centred: bool  # whether the input is, by b_dec

    @property
    def outputs(self) -> int:
        return 2 if self.aux_k else 1

    @property
    def sources(self) -> int:
        return len(self.widths)

    @property
    def width(self) -> int:
        """Weights of a latent of each source, together."""
        return sum(map(sum, self.widths))

    @property
    def entries(self) -> float:
        """Of the codes of one group."""
        return self.tokens * (self.k + self.aux_k) * self.sources


def estimate(
    d_in: int, d_sae: int, k: float, tokens: int, devices: int, *, d_out: int | None = None, scope: str = "row",
    aux_k: int = 0, compute_dtype: torch.dtype | str = "bfloat16", memory_budget: float = 4e9,
    sources: Sequence[tuple[int, int]] | None = None, blocks: int | None = None, hardware: Hardware = Hardware(),
) -> Estimate:  # fmt: skip
    """Which mesh trains an autoencoder fastest, by arithmetic: latents over the ranks of a node, over nodes, or tokens.

    Args:
        d_in, d_sae, d_out: sizes of the autoencoder; ``d_out`` is ``d_in`` by default.
        k: latents a token.
        tokens: of a batch, of all ranks together.
        devices: of all nodes together.
        scope: ``"row"`` for rules that choose in each token, ``"batch"`` for those that choose in a batch.
        aux_k: dead latents a token that AuxK trains, 0 without it.
        compute_dtype: of products and codes; parameters, moments and sums are fp32.
        memory_budget: bytes of pre-activations at a time.
        sources: of a :class:`~sae_engine.Crosscoder`, widths that each source reads and writes; ``d_in`` and ``d_out``
            are then those of all sites side by side, ``d_sae``, ``k`` and ``aux_k`` those of each source.
        blocks: of the step; only meshes that it can be on are then listed. Products of blocks are taken to be as fast.
        hardware: rates and sizes to divide by.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range; names it.

    Example:
        >>> found = estimate(4096, 2**20, 64, tokens=2**15, devices=8)
        >>> found.best[:3], round(found.best.step_milliseconds, 1)
        ((8, 1, 1), 56.5)
        >>> estimate(4096, 2**17, 64, tokens=2**18, devices=64).best[:3]  # a small dictionary: tokens over nodes
        (8, 2, 4)

    Source: a step's parts and volumes are those of :class:`sae_engine.training.TrainStep` on a mesh.
    """
    d_in, d_sae = check.integer_k(d_in, name="d_in"), check.integer_k(d_sae, name="d_sae")
    d_out = d_in if d_out is None else check.integer_k(d_out, name="d_out")
    k = check.number_k(k, d_sae)
    tokens, devices = check.integer_k(tokens, name="tokens"), check.integer_k(devices, name="devices")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if aux_k != 0:
        aux_k = check.integer_k(aux_k, d_sae, name="aux_k")
    widths = ((d_in, d_out),) if sources is None else tuple(check.pairs_of_widths("sources", sources))
    if blocks is not None:
        blocks = check.integer_k(blocks, name="blocks")
        if blocks & (blocks - 1) or d_sae % blocks or tokens % blocks or sources is not None:
            raise ValueError(f"blocks must be a power of two that divides d_sae = {d_sae} and tokens = {tokens}, of no "
                             f"crosscoder, got {blocks}")  # fmt: skip
    itemsize = check.dtype_in("compute_dtype", compute_dtype).itemsize
    memory_budget = check.positive("memory_budget", memory_budget)
    if not isinstance(hardware, Hardware):
        raise TypeError(f"hardware must be a Hardware, got {hardware!r}")
    found = []
    for latent, node, data in _meshes(devices, hardware.devices_per_node):
        if latent * node <= d_sae and (blocks is None or blocks % devices == 0):
            sizes = _Sizes(
                tokens / data, d_in, d_out, d_sae, k, aux_k, itemsize, scope, memory_budget, widths, blocks,
                centred=sources is None,
            )  # fmt: skip
            found.append(_estimated(sizes, latent, node, data, hardware))
    if not found:
        raise ValueError(f"devices must be as many as can share d_sae = {d_sae} latents, and divide blocks = {blocks}, "
                         f"got {devices}")  # fmt: skip
    return Estimate(tuple(sorted(found, key=lambda one: (not one.fits, one.step_milliseconds))))


def _meshes(devices: int, per_node: int) -> Iterator[tuple[int, int, int]]:
    """(latent, node, data) with that product: latents go over nodes where they fill each."""
    for shards in range(1, devices + 1):
        if devices % shards:
            continue
        if shards <= per_node:
            yield shards, 1, devices // shards
        elif shards % per_node == 0:
            yield per_node, shards // per_node, devices // shards


def _estimated(sizes: _Sizes, latent: int, node: int, data: int, rates: Hardware) -> MeshEstimate:
    sent = sent_bytes(sizes, latent, node, data)
    milliseconds = _milliseconds(sizes, sent, latent, node, data, rates)
    alone = _Sizes(sizes.tokens * data, *sizes[1:])
    linear = sum(_milliseconds(alone, sent_bytes(alone, 1, 1, 1), 1, 1, 1, rates).values()) / (latent * node * data)
    held = held_bytes(sizes, latent * node, data)
    step = sum(milliseconds.values())
    return MeshEstimate(
        latent, node, data, milliseconds, sent, held, sizes.tokens * data / step * 1e3, linear / step,
        sum(held.values()) <= rates.memory_bytes,
    )  # fmt: skip


def sent_bytes(sizes: _Sizes, latent: int, node: int, data: int) -> dict[str, float]:
    """That a rank sends in a step, by part."""
    tokens, d_in, d_out, s = sizes.tokens, sizes.d_in, sizes.d_out, sizes.itemsize
    shards = latent * node
    ranks, latents = shards * data, sizes.d_sae / shards
    share, across = (shards - 1) / shards, (data - 1) / data
    aux = sizes.aux_k * sizes.sources
    if sizes.scope == "row":  # of each source, which chooses by itself
        selection = {"candidates": share * sizes.entries * s,
                     "counts": share * tokens * 4 * sizes.outputs * sizes.sources}  # fmt: skip
    else:  # relu's keys have 15 bits in 16-bit types, 31 in fp32: one histogram or two; then each row's ties
        bins = (1 << 15) + 1 + (1 << 16) * (s // 2 - 1)
        selection = {"histograms": 2 * (ranks - 1) / ranks * 8 * bins, "candidates": share * tokens * aux * s,
                     "ties": (shards - 1) * tokens * 4 * sizes.sources}  # fmt: skip
        if data > 1:  # how many each group has of each source
            selection["ties"] += (2 * share + data - 1) * 8 * sizes.sources
    # Parts of x̂ are added in a node first, and each rank sends on what it has added.
    inside = (latent - 1) / latent + (node - 1) / node / latent
    weights = latents * (sizes.width + sizes.sources)
    return {
        "rows, calls, status": 24.0 * (ranks - 1),
        "x": share * tokens * d_in * s,
        **selection,
        "parts of the output": inside * tokens * d_out * 4 * sizes.outputs,
        "gradient of the output": share * tokens * d_out * s * sizes.outputs,
        "sums": _sums_bytes(sizes, shards, data),
        "gradients over data": across * weights * 4,
        "parameters over data": across * weights * 4,
        "fired over data": 2 * across * latents * sizes.sources * 4,
    }


def _sums_bytes(sizes: _Sizes, shards: int, data: int) -> float:
    """Of what each rank gathers of all: in fp64 the target's mean and spread and six numbers of the step; in fp32 the
    sum of squared gradients and those of b_dec; and the number of dead latents, which the ranks of a group add.
    """
    ranks, blocks = shards * data, sizes.blocks
    if blocks is None:  # between groups b_dec's gradient through the encoder is in the other one already
        centre = sizes.d_in if sizes.centred and data == 1 else 0
        each = 8.0 * (sizes.d_out + 1 + 6) + 4 * (sizes.d_out + 1 + centre)
    else:
        each = blocks / ranks * (8 * (sizes.d_out + 1) + 4 * (sizes.d_in + 1)) + blocks / data * 8 * 6 + 4 * sizes.d_out
    return (ranks - 1) * each + 2 * (shards - 1) / shards * 8


def held_bytes(sizes: _Sizes, shards: int, data: int) -> dict[str, float]:
    """That a rank holds, by part: parameters and counters, both moments, copies, rows, codes. A CPU's update takes
    gradients of as many latents as its cache holds besides, up to 7 MB (``training.peak_bytes``). Over ``data``
    gradients are stored, those of one weight beside what others have sent for them; with ``blocks`` there are those of
    one block, for each group and for each level of the tree in which blocks of tokens are added, and one part of the
    output for each block of the rank's latents. Tests hold it as a bound to what steps of TopK take without AuxK; with
    AuxK, and with batch rules, it is an estimate.
    """
    tokens, d_in, d_out, s = sizes.tokens, sizes.d_in, sizes.d_out, sizes.itemsize
    latents = sizes.d_sae / shards
    weights, widest = latents * sizes.width, max(map(max, sizes.widths))
    pre = min(sizes.memory_budget, tokens * latents * s)  # of one source at a time
    gradients = 4 * weights + 4 * latents * widest if data > 1 else 0.0
    parts = 0.0
    if sizes.blocks is not None:
        of_block, levels = sizes.d_sae / sizes.blocks, (sizes.blocks // data).bit_length()
        gradients = 4 * of_block * (sizes.width + 1) * (data + levels) + 8 * of_block * widest * data * (data > 1)
        pieces = sizes.blocks // shards
        parts = tokens * d_out * 4 * (pieces + pieces // 2) * (pieces > 1)
        whole = tokens * latents * s <= sizes.memory_budget
        pre = tokens * (latents if whole else of_block) * s + tokens * data / sizes.blocks * of_block * s
    return {
        "parameters": 4 * weights + 20 * latents * sizes.sources,
        "moments": 8 * weights / data,
        "copies": s * weights if s < 4 else 0.0,
        "gradients": gradients,
        "rows": tokens * ((d_in + d_out) / 2 * (2 * s + 8) + (sizes.outputs - 1) * d_out * (s + 8)) + parts,
        "pre-activations": pre,
        "codes": 72 * sizes.entries,  # 12 words of each entry, 6 of each that is a rank's candidate
        "update": 32 * latents * sizes.sources,
    }


def _milliseconds(
    sizes: _Sizes, sent: dict[str, float], latent: int, node: int, data: int, rates: Hardware
) -> dict[str, float]:
    tokens, s = sizes.tokens, sizes.itemsize
    shards = latent * node
    latents, reads = sizes.d_sae / shards, sum(read for read, _ in sizes.widths)
    flops = rates.flops_16_bit if s < 4 else rates.flops_32_bit * 4 / s
    parts = sent["parts of the output"]
    across = parts * ((node - 1) / node / latent) / ((latent - 1) / latent + (node - 1) / node / latent or 1.0)
    chosen = sum(sent.get(name, 0.0) for name in ("candidates", "counts", "histograms", "ties"))
    gathered = sent["x"] + sent["gradient of the output"]
    of_node = rates.link_bytes_per_second if node == 1 else rates.ring_bytes_per_second
    beyond = chosen * (node - 1) / node * shards / (shards - 1) if node > 1 else 0.0
    sending = (
        gathered / of_node
        + (parts - across + chosen - beyond) / rates.link_bytes_per_second
        + (across + beyond) / rates.network_bytes_per_second
        + 7 * rates.call_seconds
    ) * (shards > 1)
    between = rates.network_bytes_per_second if shards * data > rates.devices_per_node else rates.link_bytes_per_second
    return {
        "encoder": 2e3 * tokens * reads * latents / flops,
        "selection": 1e3 * sizes.outputs * tokens * latents * sizes.sources * s / rates.memory_bytes_per_second,
        "decode and backward": 1e3 * 3 * sizes.entries / shards * sizes.width / sizes.sources / 2 * s
        / rates.cache_bytes_per_second,
        "Adam": 1e3 * (24 + (s if s < 4 else 0)) * sizes.width * latents / data / rates.memory_bytes_per_second,
        "sending over latents": 1e3 * sending,
        "sending over data": 1e3 * sum(n for part, n in sent.items() if part.endswith("over data")) / between,
    }  # fmt: skip
