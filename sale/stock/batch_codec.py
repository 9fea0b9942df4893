"""The request of a batch to ``purchase.lua``: one packed argument, column by column.

MessagePack of five lists (members, unions, showing numbers, quantities, key hashes), which the
script reads by ``cmsgpack``. The header of ``purchase.lua`` says what was tried instead.
"""

from typing import Final, TypeAlias

import msgspec

Columns: TypeAlias = tuple[list[str], list[str], list[int], list[int], list[str]]
"""Members (numbers as text), unions, showing numbers, quantities, key hashes; equally long."""

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Columns)

pack_batch = _ENCODER.encode
"""Pack ``Columns``."""

unpack_batch = _DECODER.decode
"""The reverse of ``pack_batch``."""
