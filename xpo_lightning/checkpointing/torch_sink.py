"""A file object that lets torch's writer meet a full disk safely."""

from typing import IO, Any


class TorchSink:
    """Takes the bytes that torch writes, and keeps the first error for `flush`.

    An error raised through torch's C++ writer comes out as another one, and may end the process.

    Args:
        file: A file open for writing bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write bytes; after an error, discard them."""
        if self._error is None:
            try:
                self._file.write(data)
            except BaseException as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Raise the first error, if there was one; torch calls it from Python, after it has written a tensor."""
        if self._error is not None:
            raise self._error

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()

    def fileno(self) -> int:
        """Return the file descriptor, after handing all written bytes to the operating system."""
        self.flush()
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Leave the file open: the code that opened it closes it."""
