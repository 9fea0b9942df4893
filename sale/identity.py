"""Identity: member tokens, operator tokens, and the key that both logs and PINs are kept with.

Member tokens are standard JWTs (HS256, ``kid``), issued with PyJWT. They are verified here by hand,
because in a rush most tokens are seen for the first time, where a cache does not help, and PyJWT
took 26 µs a token, half of all else that a purchase costs. The check is narrow on purpose: one
algorithm, one key. The signature is compared first, over the bytes as they came, so nothing that a
stranger wrote is ever parsed; ``alg`` is then only asked whether it agrees. PyJWT is the oracle of
its tests.

``iat`` is not compared with the clock: a token of ours from a host whose clock runs ahead is still
ours. A token carries the member's generation, which replacing or revoking the card raises: a token
below the generation that the process knows of is refused (``trust/generations.py`` keeps those that
were ever raised; all others are 0).
"""

import binascii
import hashlib
import hmac
import os
import secrets
import stat
from array import array
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, NamedTuple, NoReturn

import jwt
import msgspec

from sale.config import SIGNING_KEY_MIN_BYTES, Settings, SettingsError
from sale.domain.member import is_member_no
from sale.domain.problem import Problem, Refused
from sale.files import MissingFile, UnreadableFile, read_bytes, shown

ALGORITHM: Final = "HS256"
AUDIENCE: Final = "member"
TOKEN_TTL_S: Final = 30 * 86_400
TOKEN_MAX_CHARS: Final = 1_024
REMEMBERED_MAX: Final = 32_768
SEEN_PLACES: Final = 65_536
"""A power of two; 512 KB."""
SHA256_BLOCK: Final = 64
OPERATOR_TOKEN_PREFIX: Final = "sale_op_"  # noqa: S105 - a prefix, not a password
SIGNING_KEY_FILE: Final = "signing.key"


class SigningKey(msgspec.Struct, frozen=True):
    """The deployment's secret. ``kid`` tells keys apart and gives nothing of the secret away."""

    secret: bytes

    @property
    def kid(self) -> str:
        """Eight hex digits, derived from the secret."""
        return self.derive("kid").hex()[:8]

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose; two purposes' keys say nothing about each other."""
        return hmac.digest(self.secret, b"sale/" + purpose.encode(), "sha256")

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid})"


class Member(msgspec.Struct, frozen=True, gc=False):
    """The holder of a member token: number, union, and the generation of the token."""

    no: int
    union: str
    generation: int = 0


def load_or_create_signing_key(settings: Settings, *, create: bool = False) -> SigningKey:
    """Take the key from the settings, the key file, or ``<data_dir>/signing.key``.

    With ``create`` a missing file in the data directory is made, mode 0600; where two processes do
    so at once, both get the same key.

    Raises:
        SettingsError: missing, too short, or readable by others; the message says which file.

    """
    if settings.signing_key is not None:
        return _checked(settings.signing_key.encode(), "SALE_SIGNING_KEY")
    if settings.signing_key_file is not None:
        return _read_key(settings.signing_key_file)
    path = settings.data_dir / SIGNING_KEY_FILE
    if create:
        _create_key(path)
    return _read_key(path)


def issue_member_token(
    key: SigningKey, member: Member, *, now_s: int, ttl_s: int = TOKEN_TTL_S
) -> str:
    """A member's token: ``sub`` (member number), ``gen``, ``union``, ``iat``, ``exp``, ``aud``."""
    claims = {
        "sub": str(member.no),
        "gen": member.generation,
        "union": member.union,
        "iat": now_s,
        "exp": now_s + ttl_s,
        "aud": AUDIENCE,
    }
    return jwt.encode(claims, key.secret, algorithm=ALGORITHM, headers={"kid": key.kid})


class MemberTokens:
    """Verifies member tokens of one key, without I/O.

    A good token is remembered, whole, when it comes for the second time: a member who tries again
    may try often. In a rush most tokens come once, and remembering those cost 0.8 µs each, a
    quarter of their check, and memory that the CPU's caches lack elsewhere. Two generations of at
    most ``REMEMBERED_MAX`` bound what that holds. Time is looked at each time, and so is
    ``raised``, the members' generations that are not 0.
    """

    def __init__(self, key: SigningKey, raised: Mapping[int, int] | None = None) -> None:
        self._raised = {} if raised is None else raised
        # HMAC of RFC 2104 by its two hashes: copying two states and finishing them takes half of
        # what copying a keyed hmac object does (0.8 against 1.7 µs, OpenSSL 3, Python 3.11).
        block = key.secret if len(key.secret) <= SHA256_BLOCK else sha256(key.secret).digest()
        block = block.ljust(SHA256_BLOCK, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in block))
        self._kid = key.kid
        # The header as we write it; any other spelling takes the slow way.
        self._header = issue_member_token(key, Member(0, ""), now_s=0).split(".")[0].encode()
        self._good: dict[str, _Good] = {}
        self._good_before: dict[str, _Good] = {}
        self._seen = array("q", bytes(8 * SEEN_PLACES))
        """Hashes of good tokens that came, each at the place that its last bits name."""

    def verify(self, token: str, now_s: float) -> Member:
        """Whom ``token`` speaks for at ``now_s`` (Unix seconds).

        Raises:
            Refused: UNAUTHENTICATED, for anything but a valid token of this key.

        """
        good = self._good.get(token)
        if good is None:
            good = self._good_before.get(token)
            good = self._first_seen(token) if good is None else self._remember(token, good)
        exp, nbf, member = good
        if exp <= now_s:
            _refuse("the token has expired")
        if nbf > now_s:
            _refuse(_NOT_VALID)
        if self._raised and member.generation < self._raised.get(member.no, 0):
            _refuse("the token has ended: the card was replaced or revoked, sign in again")
        return member

    def _first_seen(self, token: str) -> "_Good":
        """Check a token that is not remembered; remember it if it came before. Raises Refused."""
        good = self._read(token)
        mark = hash(token)
        place = mark & (SEEN_PLACES - 1)
        if self._seen[place] == mark:
            return self._remember(token, good)
        self._seen[place] = mark
        return good

    def _remember(self, token: str, good: "_Good") -> "_Good":
        if len(self._good) >= REMEMBERED_MAX:
            self._good_before, self._good = self._good, {}
        self._good[token] = good
        return good

    def _read(self, token: str) -> "_Good":
        """Check all of a token but the time. Raises Refused."""
        if len(token) > TOKEN_MAX_CHARS or not token.isascii():
            _refuse(_NOT_VALID)
        signed, _, signature = token.encode().rpartition(b".")
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(signed)
        outer.update(inner.digest())
        expected = binascii.b2a_base64(outer.digest(), newline=False).translate(_TO_URL)[:43]
        if not hmac.compare_digest(signature, expected):
            _refuse(_NOT_VALID)
        header, _, payload = signed.partition(b".")
        if header != self._header:
            self._check_header(header)
        try:
            claims = _CLAIMS.decode(_decode_segment(payload))
        except (ValueError, RecursionError):
            _refuse(_NOT_VALID)
        number = int(claims.sub) if claims.sub.isascii() and claims.sub.isdecimal() else 0
        if not is_member_no(number):
            _refuse(_NOT_VALID)
        return claims.exp, claims.nbf, Member(number, claims.union, claims.gen)

    def _check_header(self, segment: bytes) -> None:
        """Accept another spelling of our header. Extensions that must be understood are not."""
        try:
            header = _HEADER.decode(_decode_segment(segment))
        except (ValueError, RecursionError):
            _refuse(_NOT_VALID)
        if header.kid != self._kid:
            _refuse(_NOT_VALID)


class OperatorToken(NamedTuple):
    """A new bearer token of the admin API, shown once, and the hash that is stored."""

    token: str
    token_hash: bytes


def new_operator_token() -> OperatorToken:
    """Make a token of 256 random bits."""
    token = OPERATOR_TOKEN_PREFIX + secrets.token_urlsafe(32)
    return OperatorToken(token, operator_token_hash(token))


def operator_token_hash(token: str) -> bytes:
    """Hash an operator's token for the database: 32 bytes.

    A plain hash suffices, because the token is random and not a password that can be guessed.
    """
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def pin_mac(pin_key: bytes, card_no: str, pin: str) -> bytes:
    """Hash a PIN for the roster; ``pin_key`` is ``key.derive("pin")``.

    The card number is in it, so that equal PINs do not look equal.
    """
    return hmac.digest(pin_key, f"{card_no}:{pin}".encode(), "sha256")


_Good = tuple[int, int, Member]
"""A good token: until when and from when (Unix seconds), and whose it is."""


class _Claims(msgspec.Struct, gc=False):
    sub: str
    gen: int
    union: str
    iat: int
    exp: int
    aud: Literal["member"]
    nbf: int = 0


class _Header(msgspec.Struct):
    alg: Literal["HS256"]
    kid: str
    crit: msgspec.UnsetType = msgspec.UNSET
    b64: Literal[True] = True


def _refuse(detail: str) -> NoReturn:
    raise Refused(Problem.UNAUTHENTICATED, detail)


def _decode_segment(segment: bytes) -> bytes:
    """Strict base64url without padding. Raises ValueError (binascii.Error)."""
    padded = segment.translate(_FROM_URL) + b"=" * (-len(segment) % 4)
    return binascii.a2b_base64(padded, strict_mode=True)


def _checked(secret: bytes, source: str) -> SigningKey:
    if len(secret) < SIGNING_KEY_MIN_BYTES:
        raise SettingsError(
            f"{source}: the signing key is shorter than {SIGNING_KEY_MIN_BYTES} bytes"
        )
    return SigningKey(secret)


def _read_key(path: Path) -> SigningKey:
    try:
        secret = read_bytes(path).strip()
        mode = path.stat().st_mode
    except MissingFile:
        raise SettingsError(
            f"no signing key at {shown(path)}: `sale up` makes one, or set SALE_SIGNING_KEY_FILE"
        ) from None
    except UnreadableFile as error:
        raise SettingsError(f"signing key {error}") from None
    except OSError as error:
        raise SettingsError(f"signing key {shown(path)}: {error.strerror}") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise SettingsError(
            f"signing key {path}: others may read or write it ({stat.filemode(mode)}): chmod 600"
        )
    return _checked(secret, str(path))


def _create_key(path: Path) -> None:
    """Write a new key unless there is one. The name appears with the whole key or not at all."""
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(draft)
        except FileExistsError:
            pass  # another process was first; its key is read
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(f"signing key {path} cannot be made: {error.strerror}") from None


_NOT_VALID: Final = "the token is not valid"
_CLAIMS: Final = msgspec.json.Decoder(_Claims)
_HEADER: Final = msgspec.json.Decoder(_Header)
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
# The plain alphabet's own two signs become invalid, so that each token has one spelling only.
_FROM_URL: Final = bytes.maketrans(b"-_+/", b"+/!!")
