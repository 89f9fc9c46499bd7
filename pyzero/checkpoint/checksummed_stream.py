"""The stream that torch writes a checkpoint's tensors to: it takes the CRC-32 of each, beside the write."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

_THREADED_CRC_BYTES = 2**16  # from this size on, a CRC-32 takes longer than handing it to another thread


class ChecksummedStream:
    """A binary stream that computes the CRC-32 of each item. An item is what is written between two tell() calls.

    Args:
        raw: The file to write to.
        crcs: The stream adds (length, CRC-32) for each item, by the item's offset in the file.
        progress: Called with the number of bytes after each write to the file.
    """

    def __init__(self, raw: BinaryIO, crcs: dict[int, tuple[int, int]], progress: Callable[[int], object]) -> None:
        self._raw = raw
        self._crcs = crcs
        self._progress = progress
        self._begin = self._crc = self._length = 0
        self._small = bytearray()  # buffered, because torch.save writes a tensor in 40 calls
        self.error: OSError | None = None  # of a write, which torch.save reports as one of its own archive
        self._crc_thread = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        """Write bytes, maybe only to the buffer. Return their number."""
        num_bytes = memoryview(data).nbytes
        self._length += num_bytes
        if num_bytes < _THREADED_CRC_BYTES:
            self._small += data
            return num_bytes
        self._put_small()
        crc = self._crc_of(data)  # the CRC-32 and the write both release the interpreter's lock
        self._put(data)
        self._crc = crc.result()
        self._progress(num_bytes)
        return num_bytes

    def _crc_of(self, data: Any) -> Future[int]:
        try:
            return self._crc_thread.submit(zlib.crc32, data, self._crc)
        except RuntimeError:  # the interpreter is ending, and waits for an asynchronous save
            done: Future[int] = Future()
            done.set_result(zlib.crc32(data, self._crc))
            return done

    def _put_small(self) -> None:
        self._crc = zlib.crc32(self._small, self._crc)
        self._put(self._small)
        self._progress(len(self._small))
        self._small.clear()

    def _put(self, data: Any) -> None:
        try:
            self._raw.write(data)
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        """End the present item, and begin the next. Return the next one's offset in the file."""
        self._put_small()
        if self._length:
            self._crcs[self._begin] = (self._length, self._crc)
        self._begin, self._crc, self._length = self._begin + self._length, 0, 0
        return self._begin

    def flush(self) -> None:
        """Do nothing. torch calls this after each item, and calls `fileno` once at the end, which flushes."""

    def fileno(self) -> int:
        """Flush, and return the file descriptor, for fsync."""
        self._put_small()
        self._raw.flush()
        return self._raw.fileno()

    def close(self) -> None:
        """End the thread. The file stays open: its owner closes it."""
        self._crc_thread.shutdown()
