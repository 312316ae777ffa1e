"""A file that torch writes tensors to, on a disk that may be full."""

from typing import IO, Any


class TorchSink:
    """Takes the bytes that torch writes, and keeps the first error for `flush`.

    Raised through torch's C++ writer, an error comes out as another one, and may end the process.

    Args:
        file: A file that is open for bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write bytes, or leave it."""
        if self._error is None:
            try:
                self._file.write(data)
            except BaseException as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Raise what went wrong; torch calls it from Python, after it has written a tensor."""
        if self._error is not None:
            raise self._error

    def tell(self) -> int:
        """Return the place in the file."""
        return self._file.tell()

    def fileno(self) -> int:
        """Return the number of the file, all that was written handed to the system."""
        self.flush()
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        """Leave the file open: who has opened it closes it."""
