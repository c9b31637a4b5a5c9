"""Paged stores: what comes out is what went in, counts against a plain list, and files that are damaged or too big."""

import copy
import errno
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lilliput import _paged_file
from lilliput.errors import UserError
from lilliput.paged_store import ADVISED, DIRECT, Lru, PagedStore, StoreStats, write_store

RECORD_BYTES = 2 * 3 * 4 + 5 * 2 + 8  # of `record`


def record(i):
    generator = torch.Generator().manual_seed(i)
    return {
        "w": torch.randn(2, 3, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "number": torch.tensor(i),
    }


@pytest.fixture
def path(tmp_path):
    return write_store(tmp_path / "a.pages", (record(i) for i in range(40)), block_bytes=512)


def expected(keys, name="w"):
    return torch.stack([record(k)[name] for k in keys])


def overwrite(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("block_bytes", [512, 4096])
@pytest.mark.parametrize("records", [1, 7, 40, 1000])
def test_records_come_out_as_they_went_in(tmp_path, readers, block_bytes, records):
    path = write_store(tmp_path / "a.pages", (record(i) for i in range(40)), block_bytes)
    order = random.Random(0)
    with PagedStore(path, records * RECORD_BYTES, readers=readers) as store:
        assert len(store) == 40
        assert store.slots == min(records, 40)
        for count in (1, 3, 40, 5, 60):
            keys = [order.randrange(40) for _ in range(count)]
            found = store.fetch(keys)
            assert list(found) == ["w", "half", "number"]
            assert all(torch.equal(found[name], expected(keys, name)) for name in found)
            assert found["half"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor([True, False]), torch.tensor(1.5, dtype=torch.float16), torch.arange(6, dtype=torch.int8).view(2, 3),
     torch.randn(4, 3).T, torch.tensor([1 + 2j]), torch.zeros(3).requires_grad_()],
)  # fmt: skip
def test_any_kind_of_tensor_is_kept(tmp_path, tensor):
    empty = torch.zeros(0, 3)
    with PagedStore(write_store(tmp_path / "a", [{"x": tensor, "empty": empty}] * 2), 1000) as store:
        found = store.fetch(torch.tensor([1, 0]))
    assert torch.equal(found["x"], torch.stack([tensor.detach()] * 2))
    assert found["empty"].shape == (2, 0, 3)


def test_held_records_stand_at_their_places(path):
    with PagedStore(path, 4 * RECORD_BYTES) as store:
        store.fetch([1, 2, 3])
        places = store.hold([9, 2, 9])
        assert torch.equal(store.tensors["w"][places], expected([9, 2, 9]))
        assert 9 in store
        assert 30 not in store
        assert store.fetch([])["w"].shape == (0, 2, 3)


def test_a_record_larger_than_a_read_comes_whole(tmp_path):
    big = [{"x": torch.full((300_000,), float(i))} for i in range(3)]
    with PagedStore(write_store(tmp_path / "a", big), 2_400_000) as store:
        assert torch.equal(store.fetch([2, 0, 1])["x"][:, -1], torch.tensor([2.0, 0.0, 1.0]))


def test_a_store_opened_in_inference_mode_is_read_outside_of_it(path):
    with torch.inference_mode():
        store = PagedStore(path, 2 * RECORD_BYTES)
        store.fetch([1])
    assert torch.equal(store.fetch([1, 2])["w"], expected([1, 2]))
    store.close()


def test_threads_do_not_take_records_from_each_other(path):
    with PagedStore(path, 3 * RECORD_BYTES) as store, ThreadPoolExecutor(4) as pool:
        wanted = [[i % 40, (i * 7) % 40, (i * 11) % 40] for i in range(300)]
        for keys, found in zip(wanted, pool.map(store.fetch, wanted)):
            assert found["number"].tolist() == keys


def test_a_copy_starts_empty_and_reads_the_same(path):
    with PagedStore(path, 4 * RECORD_BYTES) as store:
        store.fetch([1, 2])
        other = copy.deepcopy(store)
        assert 1 not in other
        assert torch.equal(other.fetch([1])["w"], expected([1]))
        assert other.stats() == StoreStats(misses=1, reads=1, bytes_read=512)
        assert store.stats().misses == 2


# --- what is counted, and who leaves -----------------------------------------------------------------------------


def test_the_least_recently_used_leaves_and_everything_is_counted(path):
    """Against a list that moves what is used to its end."""
    order, known, hits, misses, evictions = random.Random(1), [], 0, 0, 0
    with PagedStore(path, 8 * RECORD_BYTES, Lru()) as store:
        for _ in range(200):
            keys = order.sample(range(40), order.randint(1, 8))
            store.fetch(keys)
            missing = [k for k in sorted(keys) if k not in known]
            hits, misses = hits + len(keys) - len(missing), misses + len(missing)
            used = [k for k in known if k in keys]
            idle = [k for k in known if k not in keys]
            gone = max(0, len(known) + len(missing) - 8)
            evictions += gone
            known = idle[gone:] + sorted(used) + missing
            assert {k for k in range(40) if k in store} == set(known)
    found = store.stats()
    assert (found.hits, found.misses, found.evictions) == (hits, misses, evictions)
    assert found.hit_rate == hits / (hits + misses)
    assert found.bytes_read == 512 * misses


@pytest.mark.parametrize("readers", [1, 4])
def test_records_side_by_side_come_in_one_read(path, readers):
    with PagedStore(path, 40 * RECORD_BYTES, readers=readers) as store:
        store.fetch([7, 5, 6, 20, 30, 31])
        assert store.stats() == StoreStats(misses=6, reads=3, bytes_read=6 * 512)
        store.fetch(range(4, 9))
        assert store.stats() == StoreStats(hits=3, misses=8, reads=5, bytes_read=8 * 512)
        store.reset_stats()
        store.fetch([7, 7])
        assert store.stats() == StoreStats(hits=1)


def test_counts_add_up():
    assert StoreStats(1, 2, 3, 4, 5) + StoreStats(1, 1, 1, 1, 1) == StoreStats(2, 3, 4, 5, 6)
    assert StoreStats().hit_rate == 0


class Largest:
    """The record with the largest number leaves."""

    def __init__(self):
        self.touched, self.choices = [], []

    def touch(self, key, step):
        self.touched.append((key, step))

    def victim(self, keys, step):
        self.choices.append((set(keys), step))
        return max(keys)


def test_a_policy_is_told_of_every_use_and_chooses_among_the_idle(path):
    policy = Largest()
    with PagedStore(path, 3 * RECORD_BYTES, policy) as store:
        store.fetch([1, 2, 3])
        store.fetch([3, 5], step=7)
        store.fetch([1])
        assert policy.touched == [(1, 1), (2, 1), (3, 1), (3, 7), (5, 7), (1, 8)]
        assert policy.choices == [({1, 2}, 7)]
        assert 2 not in store


def test_a_policy_that_names_a_stranger_is_refused(path):
    class Wrong(Largest):
        def victim(self, keys, step):
            return 39

    with PagedStore(path, RECORD_BYTES, Wrong()) as store:
        store.fetch([0])
        with pytest.raises(UserError, match="Wrong names 39"):
            store.fetch([1])
        assert torch.equal(store.fetch([0])["w"], expected([0]))


def test_what_was_dropped_is_read_again(path):
    with PagedStore(path, 3 * RECORD_BYTES) as store:
        store.fetch([1, 2])
        store.drop([2, 30])
        assert 2 not in store
        assert torch.equal(store.fetch([2, 1, 4])["w"], expected([2, 1, 4]))
        assert store.stats().misses == 4
        assert store.stats().evictions == 0


# --- past the page cache -----------------------------------------------------------------------------------------


def test_reads_reach_the_disk_every_time(path):
    def from_disk():
        return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])

    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not count reads")
    with PagedStore(path, 40 * RECORD_BYTES) as store:
        deltas = []
        for _ in range(2):
            before = from_disk()
            store.fetch(range(40))
            deltas.append(from_disk() - before)
            store.drop(range(40))
        if deltas[0] == 0:
            pytest.skip(f"this file system does not count its reads ({store.access})")
        assert deltas[1] >= 40 * 512


def test_without_direct_reads_the_pages_are_given_back(path, monkeypatch):
    usual, advice = os.open, []

    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return usual(name, flags, *rest)

    monkeypatch.setattr(_paged_file.os, "open", refuse)
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: advice.append(call[1:]))
    with PagedStore(path, 40 * RECORD_BYTES, readers=1) as store:
        assert store.access == ADVISED
        advice.clear()
        assert torch.equal(store.fetch([3, 4])["w"], expected([3, 4]))
        assert advice == [(store.layout.offset(3), 1024, os.POSIX_FADV_DONTNEED)]


def test_a_disk_of_larger_blocks_is_noticed(path, monkeypatch):
    def refuse(*call):
        raise OSError(errno.EINVAL, "unaligned")

    monkeypatch.setattr(_paged_file.os, "preadv", refuse)
    store = PagedStore(path, RECORD_BYTES)
    assert store.access != DIRECT
    store.close()


# --- damage ------------------------------------------------------------------------------------------------------


def test_a_store_that_is_cut_short_is_refused(path):
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(UserError, match=f"{size - 1} bytes instead of {size}"):
        PagedStore(path, RECORD_BYTES)
    os.truncate(path, 10)
    with pytest.raises(UserError, match=r"header|not a store"):
        PagedStore(path, RECORD_BYTES)


def test_a_store_cut_short_while_it_is_open_is_said_so(path):
    with PagedStore(path, 4 * RECORD_BYTES) as store:
        store.fetch([0])
        os.truncate(path, store.layout.offset(20))
        with pytest.raises(UserError, match="cut short"):
            store.fetch([1, 30])
        assert torch.equal(store.fetch([0, 2])["w"], expected([0, 2]))


@pytest.mark.parametrize("readers", [1, 4])
def test_a_changed_record_is_refused_and_the_others_come(path, readers):
    with PagedStore(path, 4 * RECORD_BYTES, readers=readers) as store:
        overwrite(path, store.layout.offset(5) + 3, b"\xff\xff")
        for _ in range(3):
            with pytest.raises(UserError, match=r"record 5 of .* is damaged"):
                store.fetch([4, 5, 9])
        assert 5 not in store
        for keys in ([4, 6], [9, 10, 11, 12], [0, 1, 2, 3]):
            assert torch.equal(store.fetch(keys)["w"], expected(keys))


def test_damage_of_what_describes_the_records_is_noticed(path):
    layout = _paged_file.read_layout(path)
    overwrite(path, layout.table_start + 4, b"\0\0\0\0")
    with pytest.raises(UserError, match="checksums"):
        PagedStore(path, RECORD_BYTES)
    overwrite(path, 30, b"#")
    with pytest.raises(UserError, match="header"):
        PagedStore(path, RECORD_BYTES)
    overwrite(path, 8, b"\x09")
    with pytest.raises(UserError, match="version 9"):
        PagedStore(path, RECORD_BYTES)
    overwrite(path, 0, b"NOTASTORE")
    with pytest.raises(UserError, match="not a store"):
        PagedStore(path, RECORD_BYTES)
    with pytest.raises(UserError, match="cannot open"):
        PagedStore(path.parent / "nothing", RECORD_BYTES)


# --- writing -----------------------------------------------------------------------------------------------------


def unbroken(path):
    """The store is as it was, and nothing lies beside it."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with PagedStore(path, RECORD_BYTES) as store:
        return torch.equal(store.fetch([7])["w"], expected([7]))


def test_a_full_disk_leaves_the_old_store(path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_paged_file.os, "fsync", full)
    with pytest.raises(UserError, match=r"no room for .*bytes left"):
        write_store(path, [record(0)])
    assert unbroken(path)


def test_unequal_records_leave_the_old_store(path):
    for wrong in ({"w": torch.zeros(2)}, record(1) | {"w": torch.zeros(2, 3).double()}, {}):
        with pytest.raises(UserError, match="record 1 holds"):
            write_store(path, [record(0), wrong])
    for nothing in ([], [{}], [{"x": torch.zeros(0)}]):
        with pytest.raises(UserError, match=r"at least one|cannot be stored"):
            write_store(path, nothing)
    assert unbroken(path)


def test_a_break_in_the_middle_leaves_the_old_store(path):
    def broken():
        yield record(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(path, broken())
    assert unbroken(path)


def test_a_folder_that_cannot_be_written_is_said_so(path):
    with pytest.raises(UserError, match="cannot write"):
        write_store(path / "below" / "a.pages", [record(0)])


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_a_closed_store_is_said_so(path):
    with PagedStore(path, RECORD_BYTES) as store:
        store.fetch([0])
    store.close()
    for call in (store.fetch, store.hold):
        with pytest.raises(UserError, match="is closed"):
            call([0])


def test_wrong_sizes_and_keys_are_refused(path):
    with pytest.raises(UserError, match=f"capacity_bytes is {RECORD_BYTES - 1}.*takes {RECORD_BYTES}"):
        PagedStore(path, RECORD_BYTES - 1)
    with pytest.raises(UserError, match="readers is 0"):
        PagedStore(path, RECORD_BYTES, readers=0)
    with pytest.raises(UserError, match="block_bytes is 1000"):
        write_store(path, [record(0)], block_bytes=1000)
    with PagedStore(path, 2 * RECORD_BYTES) as store:
        for key in (-1, 40):
            with pytest.raises(UserError, match=f"no record {key}; it has 0 to 39"):
                store.fetch([key])
        with pytest.raises(UserError, match="3 records at once, the cache holds 2"):
            store.hold([1, 2, 3])
        with pytest.raises(TypeError):
            store.fetch([1.5])
