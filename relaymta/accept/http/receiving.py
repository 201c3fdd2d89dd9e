"""The body of a request: JSON, or multipart/form-data with files beside it. Small ones are in memory, large ones in files without
a name, which end with the request; both are bounded before they are read.
"""

import asyncio
import contextlib
import mmap
import os
import warnings
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, TypeVar

from aiohttp import BodyPartReader, HttpVersion11, MultipartReader, StreamReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import BadContentDispositionHeader, BadContentDispositionParam

from relaymta.accept.admission import Admission
from relaymta.problems import Problem
from relaymta.proto.printable import printable
from relaymta.reservation import Reservation

__all__ = ["Body", "Received", "Receiver", "finished", "media_type", "too_large", "without_frames"]

IN_MEMORY = 65536  # octets of a body, or a part of one, that are kept in memory
ALL_IN_MEMORY = 64 << 20  # of all requests of a worker
PARTS_MOST = 100
BETWEEN_MOST = 8192  # octets of a form in front of a part, with its head, and behind the last
JSON_IN_FORM = 8 << 20  # octets of JSON beside files
MESSAGE_PART = "message"  # the part of a form that has the JSON
DIGEST = 16
_WARNED = (BadContentDispositionHeader, BadContentDispositionParam)
AS_AIOHTTP_TELLS_IT = (
    ValueError, AssertionError, RuntimeError, LookupError, web.HTTPException, HttpProcessingError, *_WARNED
)  # fmt: skip
for _kind in _WARNED:  # a warning would be kept, with the client's text, for as long as the worker runs
    warnings.simplefilter("error", _kind)
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def media_type(request: web.BaseRequest) -> str:
    """The type of a request's body, in lower case, without parameters."""
    return request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()


class _File:
    """The file of a request, without a name, in which its bodies lie one behind the other."""

    def __init__(self, folder: str) -> None:
        self.descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.end = 0

    def begin(self) -> int:
        """Where another body begins, so that it can be mapped."""
        self.end = -(-self.end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        return self.end

    def write(self, data: bytes) -> None:
        """Append octets. OSError."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.descriptor, view, self.end)
            self.end += written
            view = view[written:]


class Body:
    """Octets that are in memory or in a file. `size`: how many."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = blake2b(digest_size=DIGEST)
        self._pieces: list[bytes] = []
        self._file: _File | None = None
        self._at = 0
        self._map: mmap.mmap | None = None

    @property
    def digest(self) -> bytes:
        """That of its octets."""
        return self._digest.digest()

    @property
    def in_file(self) -> bool:
        """Whether it is, or begins, in a file."""
        return self._file is not None

    def add(self, piece: bytes) -> None:
        """More octets, in memory."""
        self.size += len(piece)
        self._digest.update(piece)
        self._pieces.append(piece)

    def spill(self, file: _File) -> None:
        """Write what is in memory to the file, in which nobody else writes before this body has ended. Blocks. OSError."""
        if self._file is None:
            self._file, self._at = file, file.begin()
        pieces, self._pieces = self._pieces, []
        file.write(b"".join(pieces))

    def read(self, at: int, most: int) -> bytes:
        """Octets from `at` on, `most` at most."""
        if self._file is not None:
            return os.pread(self._file.descriptor, min(most, self.size - at), self._at + at)
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0][at : at + most]

    @property
    def buffer(self) -> bytes | mmap.mmap:
        """All of it; of a file without being in memory. OSError: no descriptor is left to map it."""
        if self._file is None:
            return b"".join(self._pieces)
        if self._map is None:
            self._map = mmap.mmap(self._file.descriptor, self.size, prot=mmap.PROT_READ, offset=self._at)
        return self._map

    def close(self) -> None:
        """Give it up."""
        if self._map is not None:
            with contextlib.suppress(BufferError):  # something still refers to it, and closes it in its end
                self._map.close()
            self._map = None
        self._pieces = []


class Received:
    """What a request has brought. `body`: JSON, or a message as it is; `parts`: its files, by the names of their parts; `digest`:
    of all of it, whatever its boundary was."""

    def __init__(self, held: Callable[[int], None]) -> None:
        """`held(octets)`: told of the octets that it has more, or fewer, in memory."""
        self.body = Body()
        self.parts: dict[str, Body] = {}
        self._named: list[tuple[bytes, Body]] = []  # parts, and the body of a form, in their order
        self._file: _File | None = None
        self._places: list[Reservation] = []  # of the file among the descriptors, and of that by which it is mapped
        self._held, self._octets = held, 0

    def part(self, name: str) -> Body:
        """A new part. UnicodeEncodeError: its name is not UTF-8."""
        found = Body()
        self._named.append((name.encode(), found))
        if name == MESSAGE_PART:
            self.body = found
        else:
            self.parts[name] = found
        return found

    @property
    def digest(self) -> bytes:
        """See above."""
        if not self._named:
            return self.body.digest
        whole = blake2b(digest_size=DIGEST)
        for name, one in self._named:
            whole.update(b"%d:%b%b" % (len(name), name, one.digest))
        return whole.digest()

    def hold(self, octets: int) -> None:
        """So many octets more, or (negative) fewer, are in memory."""
        self._octets += octets
        self._held(octets)

    @property
    def size(self) -> int:
        """Octets of all of it."""
        return self.body.size + sum(one.size for one in self.parts.values())

    def close(self) -> None:
        """The request is over."""
        self.hold(-self._octets)
        for one in (self.body, *self.parts.values()):
            one.close()
        self.parts = {}
        if self._file is not None:
            os.close(self._file.descriptor)
            self._file = None
        for place in self._places:
            place.give_back()
        self._places = []

    def open(self, admission: Admission) -> None:
        """There is to be a file, which takes two descriptors where it is mapped. Problem: they are not left."""
        while len(self._places) < 2:
            place = admission.file()
            if place is None:
                raise Problem(503, "no file descriptor is left for the body; try again later", {"Retry-After": "10"})
            self._places.append(place)

    def spill(self, body: Body, folder: str) -> None:
        """Write what is in memory of a body to the file. Blocks. OSError."""
        if self._file is None:
            self._file = _File(folder)
        body.spill(self._file)


class _Counted:
    """The body of a form, as its reader reads it: parts by `read`, what is between them by `readline`. `between`: octets of that
    which may still come."""

    def __init__(self, content: StreamReader, most: int) -> None:
        self._content = content
        self._left = self._most = most
        self.between = BETWEEN_MOST

    async def read(self, size: int) -> bytes:
        """As of StreamReader. Problem: the body is too large."""
        data = await self._content.read(size)
        self._count(len(data))
        return data

    async def readline(self, *, max_line_length: int | None = None) -> bytes:
        """As of StreamReader. Problem: there is too much between parts."""
        line = await self._content.readline(max_line_length=max_line_length or BETWEEN_MOST)
        self._count(len(line))
        self._skip(len(line))
        return line

    def unread_data(self, data: bytes) -> None:
        """As of StreamReader."""
        self._count(-len(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._content.unread_data(data)

    def at_eof(self) -> bool:
        """As of StreamReader."""
        return self._content.at_eof()

    async def end(self) -> None:
        """Read what is behind the last part. Problem."""
        while data := await self._content.readany():
            self._count(len(data))
            self._skip(len(data))

    def _count(self, octets: int) -> None:
        self._left -= octets
        if self._left < 0:
            raise too_large(self._most)

    def _skip(self, octets: int) -> None:
        self.between -= octets
        if self.between < 0:
            raise Problem(
                400, f"the form has more than {BETWEEN_MOST} octets in front of a part, with its head, or behind the last"
            )


class Receiver:
    """Receives the bodies of a worker. `folder`: where files are made."""

    def __init__(self, admission: Admission, folder: str) -> None:
        self._admission = admission
        self._folder = folder
        self._octets = 0  # in memory

    async def receive(self, request: web.BaseRequest, most: int) -> Received:
        """The body of a request, `most` octets at most. Problem: it is too large, or not well-formed, or there is no room."""
        if request.content_length is not None and request.content_length > most:
            raise too_large(most)
        coding = request.headers.get(hdrs.TRANSFER_ENCODING, "chunked").strip().lower()
        encodings = request.headers.getall(hdrs.CONTENT_ENCODING, [])
        if any(one.strip().lower() != "identity" for one in encodings) or coding != "chunked":
            raise Problem(415, "Content-Encoding is not supported: send the body as it is")
        queue = self._admission.intake.queue
        if queue.full or (request.content_length or 0) > queue.room:
            raise Problem(503, "out of space; try again later", {"Retry-After": "60"})
        if self._octets > ALL_IN_MEMORY:
            raise Problem(503, "too many requests at the same time; try again in a moment", {"Retry-After": "2"})
        await _continue(request)
        received = Received(self._hold)
        try:
            if media_type(request) == "multipart/form-data":
                await self._form(request, received, most)
            else:
                await self._fill(received, received.body, request.content.readany, most)
        except BaseException:
            received.close()
            raise
        return received

    def _hold(self, octets: int) -> None:
        self._octets += octets

    async def _form(self, request: web.BaseRequest, received: Received, most: int) -> None:
        names: set[str] = set()
        try:
            content = _Counted(request.content, most)
            reader = MultipartReader(request.headers, content)  # type: ignore[arg-type] # it has what a reader calls
            while (part := await reader.next()) is not None:
                name = part.name if isinstance(part, BodyPartReader) else None
                if not isinstance(part, BodyPartReader) or not name:
                    raise Problem(400, "a part of the form has no name")
                if name in names or len(names) >= PARTS_MOST:
                    what = f"there are two parts {name!r}" if name in names else f"there are more than {PARTS_MOST} parts"
                    raise Problem(400, f"{what} in the form"[:200])
                names.add(name)
                if part.headers.get(hdrs.CONTENT_TRANSFER_ENCODING, "binary").lower() not in ("binary", "8bit", "7bit"):
                    raise Problem(
                        415, "Content-Transfer-Encoding is not supported: send parts as they are", argument=printable(name[:200])
                    )
                left = most - received.size
                limit = min(left, JSON_IN_FORM) if name == MESSAGE_PART else left
                await self._fill(received, received.part(name), part.read_chunk, limit)
                content.between = BETWEEN_MOST
            await content.end()
        except AS_AIOHTTP_TELLS_IT as error:
            raise Problem(400, f"the form is not well-formed: {printable(str(error)[:100])}") from None
        if MESSAGE_PART not in names:
            raise Problem(400, f"the form has no part {MESSAGE_PART!r} with the JSON of the message", argument=MESSAGE_PART)

    async def _fill(self, received: Received, body: Body, read: Callable[[], Any], most: int) -> None:
        """Read a body, or part, to its end."""
        held = 0
        try:
            while piece := await read():
                body.add(piece)
                held += len(piece)
                received.hold(len(piece))
                if body.size > most:
                    raise too_large(most)
                if held > IN_MEMORY:
                    await self._spill(received, body)
                    received.hold(-held)
                    held = 0
            if held and body.in_file:
                await self._spill(received, body)
                received.hold(-held)
        except (web.RequestPayloadError, web.PayloadAccessError) as error:
            raise Problem(400, f"the body is not well-formed: {printable(str(error)[:100])}") from None
        except ConnectionError:
            raise
        except OSError as error:
            raise Problem(503, f"the body could not be stored: {error.strerror}", {"Retry-After": "60"}) from None

    async def _spill(self, received: Received, body: Body) -> None:
        received.open(self._admission)
        await finished(self._admission.loop.run_in_executor(self._admission.threads, received.spill, body, self._folder))


async def finished(work: "asyncio.Future[T]") -> T:
    """The result of a thread's work. Who is cancelled meanwhile waits for it all the same: it has a file that would be closed."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def without_frames(error: E) -> E:
    """An error that was caught, and those before it, without the frames that it has passed. In these is the task that has failed
    by it, and in the task the error: all that they hold, such as a body and its file, would be there until a garbage
    collection."""
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
    return error


def too_large(most: int) -> Problem:
    """The problem of a body that has more than so many octets."""
    return Problem(413, f"the request is larger than {most} octets")


async def _continue(request: web.BaseRequest) -> None:
    """Tell a client that waits for it to send the body."""
    expects = request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue"
    if expects and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
