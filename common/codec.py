"""Messages as bytes: the header frame of a message, and back.

Invariant: what is decoded is a message of `common.messages` whole and valid, or `MalformedMessage` with the reason;
nothing is allocated for what a frame claims and does not have, and no pickle is read.
"""

from __future__ import annotations

import functools
from numbers import Integral, Real
from typing import Any, TypeVar

import msgspec

from common.messages import MalformedMessage, Message, Part

PROTOCOL = 1
MAX_HEADER_BYTES = 16 << 20

P = TypeVar("P", bound=Part)


def _plain(value: Any) -> Any:
    """Numbers of other libraries (NumPy's), as those of Python."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"a message cannot carry a {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
# The body is left as it is until its kind is known. Skipping over it proves that it is whole, so that no count
# in it is larger than its bytes and nothing is allocated for what is not there.
_outer = msgspec.msgpack.Decoder(tuple[int, str, int, msgspec.Raw])


@functools.cache
def _decoder(model: type[Part]) -> msgspec.msgpack.Decoder:
    return msgspec.msgpack.Decoder(model)


def encode(message: Message, request: int) -> bytes:
    """The header frame of a message; `request` pairs a reply with its request."""
    return _encoder.encode((PROTOCOL, message.kind, request, message))


def encode_plain(kind: str, request: int, body: Any) -> bytes:
    """The same for a body of plain values and `msgspec.Raw` pieces that were validated when they came in."""
    return _encoder.encode((PROTOCOL, kind, request, body))


def decode(frame: bytes | memoryview) -> tuple[Message, int]:
    """The message in a header frame and its request number.

    Raises:
        MalformedMessage: not msgpack, another protocol, an unknown kind, or a body that breaks its schema.
    """
    kind, request, body = open_frame(frame)
    model = Message.kinds.get(kind)
    if model is None:
        raise MalformedMessage(f"unknown kind {kind[:40]!r}")
    return decode_part(model, body, kind), request


def open_frame(frame: bytes | memoryview) -> tuple[str, int, msgspec.Raw]:
    """Kind, request number and undecoded body of a header frame; raises `MalformedMessage`."""
    if len(frame) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    try:
        protocol, kind, request, body = _outer.decode(frame)
    except msgspec.ValidationError as error:
        raise MalformedMessage(f"not a message of Slipstream: {_defect(error)}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise MalformedMessage("not msgpack") from None
    if protocol != PROTOCOL:
        raise MalformedMessage(f"protocol {protocol!r}; this software speaks {PROTOCOL}")
    if not 0 <= request < 2**63:
        raise MalformedMessage("request number out of range")
    return kind, request, body


def request_number(frame: bytes) -> int:
    """The request number of a message that is otherwise malformed, so that its sender learns why; else 0."""
    try:
        number = _outer.decode(frame)[2]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0
    return number if 0 <= number < 2**63 else 0


def decode_part(model: type[P], body: bytes | msgspec.Raw, what: str) -> P:
    """A body or a piece of one, checked against its schema; raises `MalformedMessage`, which names `what`."""
    try:
        return _decoder(model).decode(body)
    except RecursionError:
        raise MalformedMessage(f"{what}: nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"{what}: {_defect(error)}") from None


def _defect(error: Exception) -> str:
    """msgspec's sentence with the place first: "header.lease: expected `int`"."""
    what, _, place = str(error).partition(" - at `$")
    what = what[:1].lower() + what[1:]
    where = place.rstrip("`").lstrip(".")
    return f"{where}: {what}" if where else what
