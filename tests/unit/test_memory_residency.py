"""Pages and peaks, against blocks of memory whose size and use are known."""

from __future__ import annotations

import mmap
import textwrap

import pytest
import torch

from compresskit.device import resolve
from compresskit.measure.memory import residency
from compresskit.measure.memory.peaks import PeakMeter
from compresskit.measure.memory.residency import PAGE

# As Linux prints it (Documentation/filesystems/proc.rst), shortened: a library of two mappings
# whose data pages were written to, a model file, the heap with a hole, and anonymous memory.
SMAPS = textwrap.dedent("""\
    5581d0000000-5581d0400000 rw-p 00000000 00:00 0                          [heap]
    Size:               4096 kB
    Rss:                3000 kB
    Anonymous:          3000 kB
    VmFlags: rd wr mr mw me ac sd
    7f0000000000-7f0000800000 r--p 00000000 08:01 42 /srv/models/a b/model.safetensors
    Size:               8192 kB
    Rss:                5000 kB
    Pss:                5000 kB
    Anonymous:             0 kB
    7f1000000000-7f1000100000 r-xp 00000000 08:01 43                         /usr/lib/libx.so.1
    Size:               1024 kB
    Rss:                 700 kB
    Anonymous:             0 kB
    7f1000100000-7f1000110000 rw-p 00100000 08:01 43                         /usr/lib/libx.so.1
    Size:                 64 kB
    Rss:                  64 kB
    Anonymous:            24 kB
    7f2000000000-7f2000100000 rw-p 00000000 00:00 0
    Size:               1024 kB
    Rss:                 512 kB
    Anonymous:           512 kB
    """)


def test_pages_are_sorted_by_what_backs_them(tmp_path):
    path = tmp_path / "smaps"
    path.write_text(SMAPS)
    found = residency.resident(path)
    assert found == residency.Resident(
        anonymous=(3000 + 24 + 512) * 1024,
        libraries=(700 + 40) * 1024,
        files=5000 * 1024,
        heap_holes=1096 * 1024,
    )
    assert found.total == (3000 + 5000 + 700 + 64 + 512) * 1024


def test_a_system_without_proc_is_not_known_rather_than_empty(tmp_path):
    assert residency.resident(tmp_path / "nothing") is None
    assert residency.pages([(0, PAGE)], tmp_path / "nothing") is None


def readable():
    if residency.resident() is None or residency.pages([]) is None:
        pytest.skip("needs /proc/self/smaps and /proc/self/pagemap")


def test_only_pages_that_were_touched_are_resident():
    readable()
    # Straight from the system: malloc may hand out pages that an earlier test has touched.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    block = torch.frombuffer(mmap.mmap(-1, 64 * PAGE * 256, flags=private), dtype=torch.uint8)
    start = -(-block.data_ptr() // PAGE) * PAGE
    inside = block[start - block.data_ptr() :]
    everything = (start, 32 * PAGE * 256)
    assert residency.pages([everything]).resident == 0
    inside[: 16 * PAGE * 256] = 1
    assert residency.pages([everything]) == (16 * PAGE * 256, 0)
    # Half of it twice, and one page by its last byte only.
    halves = [(start, 8 * PAGE * 256), (start + 4 * PAGE * 256, 12 * PAGE * 256 - 1)]
    assert residency.pages(halves).resident == 16 * PAGE * 256


def test_a_mapped_file_is_told_from_memory_that_was_written(tmp_path):
    readable()
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 16 * 64)
    mapped = torch.from_file(str(path), shared=False, size=64 * 4096, dtype=torch.uint8)
    assert int(mapped.sum()) > 0
    assert residency.pages([(mapped.data_ptr(), mapped.nbytes)]) == (mapped.nbytes, mapped.nbytes)
    mapped[:PAGE] = 0  # a private copy of one page
    found = residency.pages([(mapped.data_ptr(), mapped.nbytes)])
    assert found == (mapped.nbytes, mapped.nbytes - PAGE)


def test_what_the_allocator_keeps_is_seen_and_goes_when_it_is_given_back():
    readable()
    from compresskit.hf.modules import release_freed

    release_freed()
    before = residency.freed_in_allocator(residency.resident())
    if before is None:
        pytest.skip("the C library has no mallinfo2")
    # Small blocks stay on the heap when they are freed; the last one keeps its top in place.
    blocks = [torch.ones(4096, dtype=torch.uint8) for _ in range(20_000)]
    last = torch.ones(4096, dtype=torch.uint8)
    del blocks
    kept = residency.freed_in_allocator(residency.resident())
    # 80 MB, less what found room in holes that earlier tests had left.
    assert kept - before > 40 << 20
    release_freed()
    assert residency.freed_in_allocator(residency.resident()) - before < 2 << 20
    assert int(last.sum()) == 4096


def test_peaks_are_reset_between_windows():
    meter = PeakMeter(resolve("cpu"))
    if not meter.resettable:
        pytest.skip("the high-water mark cannot be reset here")
    meter.start()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = meter.read()["rss"].value
    del block
    meter.start()
    low = meter.read()["rss"].value
    assert high - low > 48 << 20


def test_a_machine_that_cannot_reset_has_no_peak(monkeypatch):
    from compresskit.measure.memory import peaks

    monkeypatch.setattr(peaks, "_can_reset", lambda: False)
    meter = PeakMeter(resolve("cpu"))
    meter.start()
    assert meter.read()["rss"].kind == "unavailable"
