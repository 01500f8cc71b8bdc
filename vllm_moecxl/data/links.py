"""Reading from several banks at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vllm_moecxl.data.banks.base import Bank, RowCopy
from vllm_moecxl.linux.affinity import use_all_cpus


class Links:
    """A reader thread for each bank but one; the caller's own thread reads from that.

    Args:
        bank_count: banks that a slab may lie in.
    """

    def __init__(self, bank_count: int) -> None:
        self._threads = (
            ThreadPoolExecutor(bank_count - 1, thread_name_prefix="moecxl-link", initializer=use_all_cpus)
            if bank_count > 1
            else None
        )

    def read(self, copies: Sequence[tuple[Bank, Sequence[RowCopy]]]) -> None:
        """Do all copies, those of different banks at the same time; returns when all are done.

        Raises:
            TransferError: a bank cannot be read. All copies have ended by then.
        """
        if not copies:
            return
        (first_bank, first_copies), *others = copies
        futures: list[Future[None]] = []
        try:
            for bank, of_bank in others:
                assert self._threads is not None
                futures.append(self._threads.submit(bank.read, of_bank))
            first_bank.read(first_copies)
        finally:
            errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()
