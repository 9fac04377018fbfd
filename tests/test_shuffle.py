"""The staircase: each row once, mixed over W chunks, in bounded memory, and the same after any stop."""

import json
import random
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_engine.data.shuffle import Staircase, seed_of

KINDS = [(24, 3, 4), (24, 1, 4), (24, 3, 8), (12, 6, 2), (16, 4, 4)]  # chunk_rows, chunks, batch_rows


class Counting:
    """Rows that are their own numbers, for two sites, in reads of uneven sizes."""

    def __init__(self, most=7):
        self.position, self.most, self.reads = {"row": 0}, most, 0

    def seek(self, position):
        self.position = dict(position)

    def is_same(self, one, other):
        return one == other

    def read(self, count):
        first = self.position["row"]
        n = min(count, 1 + first * 5 % self.most)
        self.position, self.reads = {"row": first + n}, self.reads + n
        rows = torch.arange(first, first + n)
        return rows, rows.double()[:, None].expand(n, 3) / 2


def staircase(kind, reader=None, **options):
    chunk_rows, chunks, batch_rows = kind
    return Staircase(reader or Counting(), chunk_rows=chunk_rows, chunks=chunks, batch_rows=batch_rows,
                     **{"seed": 3, **options})  # fmt: skip


def batches(shuffled, count):
    found = [shuffled.next() for _ in range(count)]
    assert all(torch.equal(y, (x.double()[:, None] / 2).expand(len(x), 3)) for x, y in found)  # aligned
    return torch.stack([x for x, _ in found])


def periods(kind, count):
    """How many batches so many periods have."""
    chunk_rows, chunks, batch_rows = kind
    return sum(min(p + 1, chunks) * chunk_rows // chunks for p in range(count)) // batch_rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_comes_once_within_the_periods_of_its_chunk(kind):
    chunk_rows, chunks, _ = kind
    count = 3 * chunks + 2
    rows = batches(staircase(kind), periods(kind, count)).flatten()
    assert len(rows.unique()) == len(rows)
    assert set(range((count - chunks + 1) * chunk_rows)) <= set(rows.tolist())  # all of a chunk whose parts were served
    first = 0
    for period in range(count):
        size = min(period + 1, chunks) * chunk_rows // chunks
        of_chunks = rows[first : first + size] // chunk_rows
        there = {c: int((of_chunks == c).sum()) for c in range(max(0, period - chunks + 1), period + 1)}
        assert there == dict.fromkeys(there, chunk_rows // chunks)
        first += size


def test_rows_are_mixed():
    """Of a long chunk, neighbours in a batch are no neighbours in the text, and no part is a stretch of its chunk."""
    kind = (1024, 4, 32)
    rows = batches(staircase(kind, Counting(most=90)), periods(kind, 5)).flatten()
    last = rows[-1024:].double()  # period 4, of four chunks
    assert abs(float(torch.corrcoef(torch.stack([last[1:], last[:-1]]))[0, 1])) < 5 / 32
    within = rows[:256].double()  # part 0 of chunk 0
    assert abs(float(within.mean()) - 511.5) < 5 * 296 / 16
    assert not torch.equal(within.sort().values, torch.arange(256).double())


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_at_any_batch_changes_nothing(kind, prefetch):
    count = periods(kind, kind[1] + 3)
    whole = batches(staircase(kind), count)
    running = staircase(kind, prefetch=prefetch)
    states = []
    for n in range(count):
        states.append(json.dumps(running.state_dict()))  # as a checkpoint has it
        assert torch.equal(batches(running, 1)[0], whole[n])
    for n in random.Random(0).sample(range(count), min(count, 12)):
        reader = Counting(most=11)  # other reads of the same rows: a language model's batch may be cut elsewhere
        resumed = staircase(kind, reader, prefetch=prefetch)
        resumed.load_state_dict(json.loads(states[n]))
        assert json.dumps(resumed.state_dict()) == states[n]
        again = batches(resumed, min(2 * kind[0] // kind[2], count - n))
        assert torch.equal(again, whole[n : n + len(again)])
        resumed.settle()
    running.settle()


def test_resuming_reads_no_more_than_the_chunks_that_are_served():
    kind = (24, 3, 4)
    first = staircase(kind)
    batches(first, periods(kind, 7) + 1)
    resumed = staircase(kind, reader := Counting())
    resumed.load_state_dict(first.state_dict())
    resumed.next()
    assert reader.reads == 3 * 24


def test_what_is_known_of_the_text_follows_what_is_served_not_what_was_read_ahead():
    kind = (24, 3, 4)
    plain, ahead = staircase(kind), staircase(kind, prefetch=True)
    for _ in range(periods(kind, 5)):
        assert plain.position == ahead.position
        plain.next(), ahead.next()
        ahead.settle()
    assert plain.state_dict() == ahead.state_dict()


def test_the_first_chunk_is_asked_for_without_taking_it():
    kind = (24, 3, 4)
    whole = batches(staircase(kind), 20)
    asked = staircase(kind)
    before = asked.state_dict()
    first, second = asked.first_chunk()
    assert sorted(first.tolist()) == list(range(24)) and second.shape == (24, 3)
    assert asked.state_dict() == before and asked.position == {"row": 0}
    assert torch.equal(asked.first_chunk()[0], first)
    assert torch.equal(batches(asked, 20), whole)
    with pytest.raises(RuntimeError, match="first_chunk: rows of it were served already"):
        asked.first_chunk()


class Live(TorchDispatchMode):
    """The most elements that tensors with a last dimension of ``width`` held at once."""

    def __init__(self, width):
        super().__init__()
        self.width, self.now, self.most, self._seen = width, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[-1] == self.width:
                self._count(t.untyped_storage(), t.element_size())
        return found

    def _count(self, storage, size):
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.now += storage.nbytes() // size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes() // size)

    def _gone(self, key, elements):
        self._seen.discard(key)
        self.now -= elements


@pytest.mark.parametrize("chunks", [1, 4])
def test_memory_is_bounded(chunks):
    """(W + 3) / 2 chunks: what is still to be served of W, the period's block, and one that is read ahead."""
    C, d, most = 64 * chunks, 5, 4

    class Wide(Counting):
        def read(self, count):
            rows, _ = super().read(count)
            return (rows.double()[:, None].expand(len(rows), d).clone(),)

    with Live(d) as live:
        shuffled = staircase((C, chunks, 16), Wide(most), prefetch=False)
        for _ in range((chunks + 2) * C // 16):
            shuffled.next()
            assert shuffled.rows_held <= (chunks + 1) / 2 * C
    assert (chunks + 1) / 2 * C * d <= live.most <= ((chunks + 3) / 2 * C + 3 * most) * d


def test_a_reader_that_fails_is_asked_for_the_same_rows_again():
    class Failing(Counting):
        fails = False

        def read(self, count):
            if self.fails and self.position["row"] > 30:
                raise OSError("the network is away")
            return super().read(count)

    kind = (24, 3, 4)
    whole = batches(staircase(kind), 20)
    for prefetch in (False, True):
        shuffled = staircase(kind, reader := Failing(), prefetch=prefetch)
        reader.fails = True
        assert torch.equal(batches(shuffled, 2), whole[:2])
        with pytest.raises(OSError, match="the network is away"):
            shuffled.next()
        shuffled.settle()
        reader.fails = False
        assert torch.equal(batches(shuffled, 18), whole[2:])


def test_other_rows_under_the_same_state_are_refused():
    class Other(Counting):
        def read(self, count):
            found = super().read(count)
            self.position["row"] += self.position["row"] == 72  # a text that has one more row there
            return found

    kind = (24, 3, 4)
    first = staircase(kind)
    batches(first, periods(kind, 4) + 1)
    resumed = staircase(kind, Other())
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"not what it was when the state was saved: chunk 2 ended at \{'row': 72\}"):
        resumed.next()


def test_unfit_settings_and_states_are_named():
    for kind, said in [((25, 3, 4), r"chunk_rows must be a multiple of chunks \* batch_rows = 3 \* 4 = 12, got 25"),
                       ((24, 0, 4), "chunks must be at least 1"), ((24, 3, 0), "batch_rows must be at least 1")]:
        with pytest.raises(ValueError, match=said):
            staircase(kind)
    with pytest.raises(TypeError, match="seed must be an int"):
        staircase((24, 3, 4), seed="a")
    shuffled = staircase((24, 3, 4))
    shuffled.next()
    state = shuffled.state_dict()
    for change, said in [({"seed": 4}, "state: seed was 4 when it was saved, and is 3 now"),
                         ({"chunk_rows": 48}, "chunk_rows was 48"), ({"offset": 3}, "state is damaged: period 0, of"),
                         ({"offset": 8}, "damaged"), ({"positions": []}, "damaged"), ({"period": None}, "damaged")]:
        with pytest.raises(ValueError, match=said):
            shuffled.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="state is none of a stream"):
        shuffled.load_state_dict({})


def test_seeds_are_those_of_their_words():
    seeds = {seed_of(*parts) for parts in [(0, "chunk", 1), (1, "chunk", 0), (0, "period", 1), (0, "chunk", 10)]}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "chunk", 1) == 7792907790278145993


def test_on_a_cuda_device_what_a_thread_wrote_is_waited_for_and_kept(monkeypatch):
    """The calls that order the two streams, on rows of the CPU: each chunk's event before its first part is read."""
    said, here = [], threading.local()

    class Stream:
        def __init__(self, device=None):
            self.name = "side"

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            assert self is main
            said.append(event.name)

    main = Stream()
    main.name = "main"

    class Event:
        def record(self, stream):
            self.name = f"written on {stream.name}"

    @contextmanager
    def entered(stream):
        here.stream = stream
        yield
        del here.stream

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: getattr(here, "stream", main))
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: kept.append((len(t), stream.name)))
    kind, streams = (24, 3, 4), set()

    class Watched(Counting):
        def read(self, count):
            streams.add(torch.cuda.current_stream(None).name)
            return super().read(count)

    plain = staircase(kind)
    ahead = staircase(kind, Watched(), prefetch=True, device=torch.device("cuda", 0))
    assert sorted(ahead.first_chunk()[0].tolist()) == list(range(24))
    assert said == ["side waits for main"] + ["written on side"] * 3  # for each part
    assert kept == [(8, "main")] * 2 * 3
    del said[:], kept[:]
    assert torch.equal(batches(ahead, periods(kind, 4)), batches(plain, periods(kind, 4)))
    ahead.settle()
    # What the thread's reader keeps for the next chunk is written and read on its stream alone.
    assert said == ["written on side"] * (4 + 1 + 2 + 3 + 3)
    assert [most for most, _ in kept if most > 8] == [16, 24, 24]  # the orders, of which the first is of 8 rows
    assert len(kept) == 4 + 2 * (1 + 2 + 3 + 3) and {stream for _, stream in kept} == {"main"}
    assert streams == {"side"}
