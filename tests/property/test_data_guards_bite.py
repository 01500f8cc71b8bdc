"""Every guard of the data plane, seen biting: with it taken out of the source, the test that watches over it fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.property.test_guards_bite import Owner, take_out
from tests.support.homes import end_hands
from tests.unit import test_banks, test_counters, test_layer_buffer, test_mover, test_runtime, test_slabfile, test_slabs
from tests.unit.linux import test_direct_file
from vllm_moecxl.data import profiles, slabfile, slabs
from vllm_moecxl.data.banks import memory as memory_banks
from vllm_moecxl.data.banks.emulated import EmulatedBank
from vllm_moecxl.data.banks.file import FileBank
from vllm_moecxl.data.banks.memory import MemoryBank
from vllm_moecxl.data.carrier import Carrier
from vllm_moecxl.data.mover import Mover
from vllm_moecxl.data.slabfile import SlabFile
from vllm_moecxl.data.slabs import Home, HomeBuilder, Shard
from vllm_moecxl.data.slabwriter import SlabFileWriter
from vllm_moecxl.linux import direct_file
from vllm_moecxl.linux.direct_file import DirectFile
from vllm_moecxl.runtime.counters import Counters
from vllm_moecxl.runtime.layer_buffer import LayerBuffer
from vllm_moecxl.runtime.placing import Placer
from vllm_moecxl.runtime.runtime import OffloadRuntime

_BITES = (Exception, pytest.fail.Exception)  # a guard's absence may show as anything but a test that passes
#: Without its guard, a test of threads may wait for what never happens.
_PATIENCE_S = 1.0
_STRIPED = test_slabs.ROUTES["striped over three"]
_BOTH = test_slabs.FILE_ROUTES["both"]


def run(test: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> None:
    """Call a test of another file with the fixtures that it asks for."""
    originals = test_slabs.ragged_layer()
    made: list[test_mover.Setup] = []

    def setup(*what: Any, **options: Any) -> test_mover.Setup:
        made.append(test_mover.Setup(*what, **options))
        changed = made[-1].mover._changed
        wait = changed.wait

        def wait_no_longer(timeout_s: float | None = None) -> bool:
            is_short = timeout_s is not None and timeout_s < _PATIENCE_S
            assert wait(timeout_s if is_short else _PATIENCE_S) or is_short, "somebody waits for nothing"
            return True

        changed.wait = wait_no_longer  # type: ignore[method-assign]
        return made[-1]

    offered: dict[str, Callable[[], Any]] = {
        "tmp_path": lambda: tmp_path,
        "path": lambda: tmp_path / "model.slabs",
        "quick_path": lambda: tmp_path / "model.slabs",
        "monkeypatch": lambda: monkeypatch,
        "packed": lambda: (test_slabs.pack_ragged(tmp_path, originals), originals),
        "device": lambda: test_banks.make_device(tmp_path),
        "setup": lambda: setup,
    }
    parameters = inspect.signature(test).parameters.values()
    wanted = {one.name for one in parameters if one.default is inspect.Parameter.empty} - arguments.keys()
    if test.__module__ == test_mover.__name__:
        test_mover.make_chunks_small(monkeypatch)
        monkeypatch.setattr(test_mover, "TIMEOUT_S", _PATIENCE_S)
    test(**{name: offered[name]() for name in wanted}, **arguments)
    for one in made:
        end_hands(one.mover)


def _row(owner: Owner, name: str, guard: str, instead: str, test: Callable[..., None], **arguments: Any) -> Any:
    return pytest.param(owner, name, guard, instead, test, arguments, id=f"{name}: {guard:.60}")


CASES = [
    # What a bank holds, and who has it.
    _row(
        *(MemoryBank, "allocate", "self.used_bytes + byte_count > self.capacity_bytes", "False"),
        test_banks.test_a_full_bank_refuses_with_its_name_and_counts_only_what_it_gave,
    ),
    _row(
        *(MemoryBank, "allocate", "self.used_bytes += taken_bytes", "pass"),
        test_banks.test_a_dax_range_is_handed_out_in_whole_pages_to_its_last_byte,
    ),
    _row(
        *(memory_banks, "_lock_range", "F_OFD_SETLK", "F_GETFD"),
        test_banks.test_no_two_banks_have_one_range_and_a_rank_beside_another_is_none_of_its_business,
    ),
    _row(
        *(MemoryBank, "read", "memory.copy_safely if self.reads_safely else memory.copy", "memory.copy"),
        test_banks.test_a_read_of_memory_that_is_kept_safe_goes_through_the_kernel,
    ),
    _row(
        *(EmulatedBank, "read", "self._sleep(left_s)", "pass"),
        *(test_banks.test_an_emulated_read_takes_what_the_model_says_and_not_more,),
        row_count=3,
    ),
    # Where slabs lie.
    _row(
        *(Home, "read", "target[extent_id][start:stop]", "target[extent_id][: stop - start]"),
        *(test_slabs.check_routes,),
        routes=_STRIPED,
    ),
    _row(
        *(Shard, "copy_of", "span.start - self.cuts[span.extent_id][0]", "span.start"),
        *(test_slabs.check_routes,),
        routes=_STRIPED,
    ),
    _row(
        *(Home, "bytes_by_bank", "if byte_count := sum(stop - start for start, stop in shard.cuts):"),
        "if (byte_count := sum(stop - start for start, stop in shard.cuts)) >= 0:",
        test_slabs.test_a_bank_that_got_no_part_of_short_rows_has_no_part_in_their_fetch,
    ),
    _row(
        *(slabs, "_chunks", "if byte_count > room:", "if False:"),
        test_mover.test_chunks_are_no_larger_than_a_bank_wants_them_and_cover_a_slab_once,
    ),
    _row(
        *(slabs, "_chunks", "min(span_start + chunk_bytes, stop)", "span_start + chunk_bytes"),
        test_mover.test_chunks_are_no_larger_than_a_bank_wants_them_and_cover_a_slab_once,
    ),
    _row(
        *(MemoryBank, "read", "rows.address(row_id) + offset", "rows.address(row_id)"),
        test_mover.check_arrival,
    ),
    _row(
        *(FileBank, "read", "rows.start + row_id * rows.row_bytes + offset", "rows.start + row_id * rows.row_bytes"),
        test_mover.check_arrival_from_a_file,
    ),
    _row(
        *(Home, "__init__", " and shards[0].bank.reads_directly", ""),
        test_slabs.test_rows_are_copied_past_the_bank_only_where_it_allows_that,
    ),
    # What was stored is what is read.
    _row(
        *(Home, "check", "if digest_of(slab) != self._digests[expert_id]:", "if False:"),
        *(test_slabs.test_a_byte_that_flips_in_memory_is_noticed_by_verify_fetch_alone,),
        verify="fetch",
    ),
    _row(
        *(Home, "check", "if self._verifies_once:", "if True:"),
        *(test_slabfile.test_a_slab_that_changes_after_its_first_read_is_noticed_by_verify_fetch,),
        verify="fetch",
        is_noticed=True,
    ),
    _row(
        *(Home, "read", "self.check(expert_id, target)", "pass"),
        test_slabfile.test_one_bit_of_a_slab_is_noticed_when_it_is_read_unless_nobody_looks,
    ),
    _row(
        *(HomeBuilder, "store", 'if self._verify == "fetch" else None', "if False else None"),
        *(test_slabs.test_a_byte_that_flips_in_memory_is_noticed_by_verify_fetch_alone,),
        verify="fetch",
    ),
    _row(
        *(HomeBuilder, "adopt", 'in_file, "fetch", digests', 'in_file, "off", digests'),
        *(test_slabs.test_a_damaged_slab_is_not_taken_into_memory_unless_nobody_looks,),
        verify="load",
    ),
    _row(
        *(HomeBuilder, "adopt", "if group.is_filled:", "if True:"),
        *(test_slabs.test_a_packed_layer_is_adopted_into_the_file_and_into_memory,),
        verify="off",
        routes=_BOTH,
    ),
    # Nothing is told while something still writes.
    _row(
        *(Mover, "cancel", "fetch.transfer.in_flight_count or fetch.is_checking", "fetch.is_checking"),
        test_mover.check_giving_up,
    ),
    _row(
        *(Mover, "cancel", " or fetch.is_checking", ""),
        test_mover.check_giving_up_while_looking,
    ),
    _row(
        *(Mover, "cancel", "self._scheduler.cancel(fetch.transfer)", "pass"),
        test_mover.test_what_is_given_up_before_it_began_is_never_read,
    ),
    _row(
        *(Mover, "_carry", "self._fail(fetch, error, None if fetch.is_whole else link_id)", "pass"),
        test_mover.check_joining_a_failure,
    ),
    _row(
        *(Mover, "_carry", "self._scheduler.cancel(chunk.transfer)", "pass"),
        test_mover.check_joining_a_failure,
    ),
    _row(
        *(Mover, "promote", "if fetch.error is not None or", "if"),
        test_mover.check_joining_a_failure,
    ),
    _row(
        *(Mover, "_unlocked", "self._lock.release()\n", "self._lock.acquire()\n    self._lock.release()\n"),
        test_mover.test_two_banks_are_read_at_the_same_time,
    ),
    # A thread that is ended takes nothing with it.
    _row(
        *(Mover, "_carry", "self._scheduler.give_back(chunk, self._clock())", "pass"),
        test_mover.check_an_ended_hand,
    ),
    _row(
        *(Mover, "_carry", "self._links[link_id].work.notify_all()", "pass"),
        test_mover.check_taking_over,
    ),
    _row(
        *(Mover, "_serve", "self.failure = error", "pass"),
        test_mover.check_a_hand_that_cannot_begin,
    ),
    _row(
        *(Mover, "_land", "fetch.is_checking = False", "pass"),
        test_mover.check_an_ended_look,
    ),
    # Banks that are late, and those that have what they have.
    _row(
        *(Home, "pieces", "(places[index], *replicas)", "(places[index],)"),
        test_mover.check_replica,
    ),
    _row(
        *(Mover, "_report_slow_links", "link.is_reported_slow = True", "pass"),
        test_mover.check_slow_bank,
    ),
    # What the device does later.
    _row(
        *(Mover, "wait", "self._backend.wait(compute, event)", "pass"),
        test_mover.check_device,
    ),
    _row(
        *(Mover, "_is_readable", "not fetch.unissued_count", "True"),
        test_mover.check_device,
    ),
    _row(
        *(Carrier, "_copy_staged", "ring.release_after(cell, event)", "ring.release_after(cell, None)"),
        test_mover.check_device,
    ),
    _row(
        *(Carrier, "_copy_staged", "ring.release_after(cell, event)", "event and ring.release_after(cell, event)"),
        test_mover.check_failing_reads,
    ),
    _row(
        *(Carrier, "copy", "if fetch.after is not None:", "if False:"),
        test_mover.check_after,
    ),
    _row(
        *(LayerBuffer, "was_read", "self._read = self._backend.record(self._backend.compute_stream())", "pass"),
        test_layer_buffer.check_reading,
    ),
    _row(
        *(LayerBuffer, "bring", ", after=self._read", ""),
        test_layer_buffer.check_reading,
    ),
    _row(
        *(LayerBuffer, "abandon", "self._fetches.clear()", "pass"),
        test_layer_buffer.test_a_layer_finds_what_is_still_there_and_nothing_of_another,
    ),
    _row(
        *(LayerBuffer, "bring", "if self._mover.promote(fetch, cause, deadline):"),
        "if self._mover.promote(fetch, cause, deadline) is not None:",
        test_layer_buffer.test_an_error_that_nobody_waited_for_is_nobodys,
    ),
    _row(
        *(LayerBuffer, "take", "self._mover.cancel([self._fetches.pop(expert_id) for expert_id in brought])", "pass"),
        test_layer_buffer.test_rows_that_are_taken_from_slots_are_written_by_nothing_else,
    ),
    _row(
        *(Carrier, "copy_whole", "if fetch.after is not None:", "if False:"),
        *(test_mover.check_after,),
        verify="fetch",
    ),
    _row(
        *(Mover, "start", "fetch.is_whole = True", "pass"),
        *(test_mover.check_device,),
        verify="fetch",
    ),
    _row(
        *(Mover, "_copy", "if fetch.is_whole:", "if fetch.home.needs_check(fetch.expert_id):"),
        test_mover.check_asked_for_twice,
    ),
    _row(
        *(Mover, "_carry", "fetch.events.append(event)", "fetch.events[:] = [event]"),
        test_mover.check_late_note,
    ),
    _row(
        *(Mover, "close", "while any(link.in_flight for link in self._links)", "while False"),
        test_mover.test_closing_waits_for_the_device_which_reads_the_banks,
    ),
    _row(
        *(Counters, "add", "with self._lock:", "if True:"),
        test_counters.test_what_several_threads_count_is_all_counted,
    ),
    _row(
        *(DirectFile, "read_into"),
        "errors = [error for future in futures if (error := future.exception()) is not None]",
        "errors = [one for one in [futures[1].exception()] if one]",
        test_direct_file.test_a_device_that_fails_is_a_transfer_error_that_is_told_when_all_reads_have_ended,
    ),
    _row(
        *(direct_file, "_open_regular", "if not stat.S_ISREG(os.fstat(file).st_mode):", "if False:"),
        *(test_direct_file.test_only_regular_files_are_opened,),
        kind="folder",
    ),
    _row(
        *(DirectFile, "_fill", "if not count:", "if False:"),
        test_direct_file.check_a_file_that_ends_early,
    ),
    # A slab file is whole, unchanged, and of this model, or it is refused.
    _row(
        *(slabfile, "_check_seal", "_require(digest.digest() == file.read(seal.start, DIGEST_BYTES),"),
        "_require(True,",
        test_slabfile.test_one_bit_of_header_tail_or_seal_is_noticed,
    ),
    _row(
        *(slabfile, "_check_seal", "digest = blake3(header)", "digest = blake3()"),
        test_slabfile.test_one_bit_of_header_tail_or_seal_is_noticed,
    ),
    _row(
        *(slabfile, "_read", "_require(end == file.byte_count,", "_require(True,"),
        test_slabfile.test_a_file_that_is_cut_anywhere_is_refused,
    ),
    _row(
        *(SlabFile, "require_fingerprint", "if different:", "if False:"),
        test_slabfile.test_every_difference_between_fingerprints_is_named,
    ),
    _row(
        *(SlabFile, "__init__", "self.file.close()", "pass"),
        test_slabfile.test_opening_and_refusing_leaks_neither_descriptors_nor_threads,
    ),
    # Packing: one at a time, whole or not at all.
    _row(
        *(SlabFileWriter, "_open", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        test_slabfile.test_two_packers_of_one_process_are_refused_too,
    ),
    _row(
        *(SlabFileWriter, "_open"),
        "if not (self._aside.exists() and os.path.samestat(os.fstat(file), self._aside.stat())):",
        "if False:",
        test_slabfile.test_a_file_that_was_put_in_place_between_opening_and_locking_it_is_left_alone,
    ),
    _row(
        *(SlabFileWriter, "_require_room", "if data_bytes + self._header_bytes > free_bytes:", "if False:"),
        test_slabfile.test_a_file_system_without_room_is_refused_before_anything_is_written,
    ),
    _row(
        *(SlabFileWriter, "finish", "self._write_at(0, memoryview(header))", "os.pwrite(self._file, header, 0)"),
        *(test_slabfile.test_a_disk_that_fails_is_one_error,),
        failing="header",
    ),
    _row(
        *(SlabFileWriter, "add_layer", "self._pad()", "pass"),
        test_slabfile.test_it_is_a_safetensors_file_whose_tensors_start_aligned,
    ),
    _row(
        *(SlabFileWriter, "add_layer", "tensor.cpu().contiguous().clone()", "tensor.cpu().clone()"),
        test_slabfile.test_tensors_beside_the_slabs_need_not_be_contiguous,
    ),
    # Served from a file, and profiles.
    _row(
        *(Placer, "exact_needs", "packed is None or packed.expert_count != need.expert_count", "False"),
        test_runtime.test_a_slab_file_of_another_model_is_refused_before_anything_is_loaded,
    ),
    _row(
        *(OffloadRuntime, "__init__", 'bank.reads_safely = config.verify == "fetch"', "pass"),
        test_runtime.test_verify_fetch_looks_at_every_slab_of_every_bank,
    ),
    _row(
        *(profiles, "_profile"),
        "if not (0 <= latency_s < 1 and 0 < read_bytes_per_s < 1e15):",
        "if False:",
        *(test_banks.test_a_damaged_profile_is_no_reason_not_to_serve_and_is_replaced_by_the_next,),
        text='{"this": {"a": {"summary": {"latency_s": 0, "read_bytes_per_s": 0}}}}',
    ),
]


@pytest.mark.parametrize(("owner", "name", "guard", "instead", "test", "arguments"), CASES)
def test_a_test_notices_a_data_plane_without(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    owner: Owner,
    name: str,
    guard: str,
    instead: str,
    test: Callable[..., None],
    arguments: dict[str, Any],
) -> None:
    with monkeypatch.context() as untouched:
        (tmp_path / "with").mkdir()
        run(test, tmp_path / "with", untouched, **arguments)
    take_out(monkeypatch, owner, name, guard, instead)
    (tmp_path / "without").mkdir()
    with pytest.raises(_BITES):
        run(test, tmp_path / "without", monkeypatch, **arguments)
