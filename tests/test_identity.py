"""Tokens and keys. PyJWT is the oracle of our own verifier."""

import base64
import concurrent.futures
import json
import random
import string
from pathlib import Path
from typing import Any
from unittest import mock

import jwt
import pytest

from sale.config import Settings, SettingsError
from sale.domain.problem import Problem, Refused
from sale.identity import (
    Member,
    MemberTokens,
    SigningKey,
    issue_member_token,
    load_or_create_signing_key,
    new_operator_token,
    operator_token_hash,
    pin_mac,
)

KEY = SigningKey(b"0123456789abcdef0123456789abcdef-a")
OTHER = SigningKey(b"0123456789abcdef0123456789abcdef-b")
VERIFIER = MemberTokens(KEY)
NOW = 1_430_442_000
CARD = "6221000000001234"
MEMBER = Member(182_850, "dongsi", 2)
BASE64URL = string.ascii_letters + string.digits + "-_"


def segment(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims(**changes: object) -> dict[str, Any]:
    values = {
        "sub": "182850",
        "gen": 2,
        "union": "dongsi",
        "iat": NOW,
        "exp": NOW + 60,
        "aud": "member",
    }
    return {name: value for name, value in (values | changes).items() if value is not ...}


def signed(header: object, payload: object, key: SigningKey = KEY, algorithm: str = "HS256") -> str:
    """A token with any header and payload and a right signature of that algorithm."""
    body = f"{segment(header)}.{segment(payload)}"
    signer = jwt.get_algorithm_by_name(algorithm)
    return f"{body}.{segment(signer.sign(body.encode(), signer.prepare_key(key.secret)))}"


def header(**changes: object) -> dict[str, Any]:
    values = {"alg": "HS256", "kid": KEY.kid, "typ": "JWT"}
    return {name: value for name, value in (values | changes).items() if value is not ...}


def oracle(token: str, now_s: float) -> Member | None:
    """The verdict of PyJWT, with the key ID and the types of the claims asked for on top."""
    try:
        decoded = jwt.decode_complete(
            token,
            KEY.secret,
            algorithms=["HS256"],
            audience="member",
            options={
                "require": ["sub", "gen", "union", "iat", "exp"],
                "verify_exp": False,  # by the clock given, below
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
    except (jwt.PyJWTError, UnicodeError):
        return None
    body = decoded["payload"]
    if decoded["header"].get("kid") != KEY.kid or body["exp"] <= now_s:
        return None
    return Member(int(body["sub"]), body["union"], body["gen"])


def verdict(token: str, now_s: float = NOW) -> Member | None:
    try:
        return VERIFIER.verify(token, now_s)
    except Refused as refused:
        return None if refused.problem is Problem.UNAUTHENTICATED else pytest.fail(str(refused))


def test_token_speaks_for_its_member_until_it_expires() -> None:
    token = issue_member_token(KEY, MEMBER, now_s=NOW, ttl_s=60)
    assert verdict(token) == MEMBER
    assert verdict(token, NOW + 59.999) == MEMBER
    assert verdict(token, NOW + 60) is None
    assert len(token) < 260


def test_token_is_remembered_from_its_second_time() -> None:
    tokens, token = MemberTokens(KEY), issue_member_token(KEY, MEMBER, now_s=NOW)
    with mock.patch.object(tokens, "_read", wraps=tokens._read) as read:
        assert [tokens.verify(token, NOW) for _ in range(5)] == [MEMBER] * 5
    assert read.call_count == 2


def test_token_below_the_generation_is_refused_at_once() -> None:
    raised: dict[int, int] = {}
    verifier = MemberTokens(KEY, raised)
    tokens = {
        generation: issue_member_token(KEY, Member(7, "dongsi", generation), now_s=NOW)
        for generation in (0, 1, 2)
    }
    of_another = issue_member_token(KEY, Member(8, "dongsi"), now_s=NOW)
    assert [verifier.verify(token, NOW).no for token in tokens.values()] == [7, 7, 7]

    raised[7] = 1

    with pytest.raises(Refused, match="replaced or revoked") as refused:
        verifier.verify(tokens[0], NOW)
    assert refused.value.problem is Problem.UNAUTHENTICATED
    assert verifier.verify(tokens[1], NOW).generation == 1
    assert verifier.verify(tokens[2], NOW).generation == 2  # issued before this process heard
    assert verifier.verify(of_another, NOW).no == 8


def mutations(token: str, rng: random.Random) -> list[str]:
    """Tokens that are nearly right."""
    head, body, signature = token.split(".")
    place = rng.randrange(len(token))
    return [
        token[:place],
        token[place:],
        token[:place] + rng.choice(BASE64URL + ".=+/ \n\u00e9") + token[place + 1 :],
        token[:place] + token[place + 1 :],
        token[:place] + rng.choice(BASE64URL + ".") + token[place:],
        token[:-1] + rng.choice(BASE64URL),
        f"{token}.",
        f".{token}",
        f"{token}.{signature}",
        f"{head}..{signature}",
        f"{head}.{body}.",
        f"{head}.{body}",
        f"{body}.{head}.{signature}",
        token.swapcase(),
        f" {token}",
        f"{token}\n",
    ]


def test_thousands_of_tokens_are_judged_as_by_pyjwt(rng: random.Random) -> None:
    accepted = 0
    for _ in range(400):
        member = Member(rng.randint(1, 10**8), "dongsi", rng.randint(0, 9))
        issued_s = NOW - rng.randint(0, 200)
        key = rng.choice([KEY, KEY, KEY, OTHER])
        good = issue_member_token(key, member, now_s=issued_s, ttl_s=rng.randint(1, 300))
        for token in [good, *mutations(good, rng)]:
            expected = oracle(token, NOW)
            assert verdict(token) == expected, token
            accepted += expected is not None
    assert accepted > 50


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("none", f"{segment(header(alg='none'))}.{segment(claims())}."),
        ("none signed", signed(header(alg="none"), claims())),
        ("None", f"{segment(header(alg='None'))}.{segment(claims())}."),
        ("HS512", signed(header(alg="HS512"), claims(), algorithm="HS512")),
        ("HS512 said, HS256 done", signed(header(alg="HS512"), claims())),
        ("HS256 said, HS512 done", signed(header(), claims(), algorithm="HS512")),
        ("RS256", signed(header(alg="RS256"), claims())),
        ("hs256", signed(header(alg="hs256"), claims())),
        ("no alg", signed(header(alg=...), claims())),
        ("alg is a list", signed(header(alg=["HS256"]), claims())),
        ("kid of another key", signed(header(kid=OTHER.kid), claims())),
        ("no kid", signed(header(kid=...), claims())),
        ("kid is a number", signed(header(kid=1), claims())),
        ("another key", signed(header(), claims(), OTHER)),
        ("another key and its kid", signed(header(kid=OTHER.kid), claims(), OTHER)),
        ("crit", signed(header(crit=["x"]), claims())),
        ("b64 false", signed(header(b64=False, crit=["b64"]), claims())),
        ("header is a list", signed([], claims())),
        ("header is not JSON", signed(b"{", claims())),
        ("header nests deeply", signed(b"[" * 600, claims())),
        ("expired", signed(header(), claims(exp=NOW))),
        ("no exp", signed(header(), claims(exp=...))),
        ("no sub", signed(header(), claims(sub=...))),
        ("no gen", signed(header(), claims(gen=...))),
        ("no union", signed(header(), claims(union=...))),
        ("no iat", signed(header(), claims(iat=...))),
        ("no aud", signed(header(), claims(aud=...))),
        ("aud of another", signed(header(), claims(aud="station"))),
        ("payload is a list", signed(header(), [])),
        ("payload is not JSON", signed(header(), b"{")),
        ("empty", ""),
        ("dots", "..."),
        ("words", "not a token"),
        ("not ASCII", "é.é.é"),
        ("surrogate", "\udce9.a.b"),
    ],
)
def test_forged_token_is_refused_as_by_pyjwt(name: str, token: str) -> None:
    assert oracle(token, NOW) is None, name
    assert verdict(token) is None, name


@pytest.mark.parametrize(
    "token",
    [
        signed(header(exp=NOW + 0.5), claims(exp="9999999999")),
        signed(header(), claims(sub=182850)),
        signed(header(), claims(sub="0 or 1=1")),
        signed(header(), claims(sub="0")),
        signed(header(), claims(sub="-7")),
        signed(header(), claims(sub=CARD)),
        signed(header(), claims(sub="100000001")),
        signed(header(), claims(sub="1999999999")),
        signed(header(), claims(sub="2100000000")),
        signed(header(), claims(sub="9" * 500)),
        signed(header(), claims(gen="2")),
        signed(header(), claims(sub="١٨٢٨٥٠")),
        signed(header(), claims(nbf=NOW + 1)),
        signed(header(), claims()) + "=",
        issue_member_token(KEY, Member(1, "x" * 2_000), now_s=NOW),
    ],
)
def test_malformed_claims_are_refused(token: str) -> None:
    assert verdict(token) is None


@pytest.mark.parametrize(
    "token",
    [
        signed({"typ": "JWT", "kid": KEY.kid, "alg": "HS256"}, claims()),
        signed({"alg": "HS256", "kid": KEY.kid}, claims()),
        signed(json.dumps(header(), indent=2).encode(), claims()),
        signed(header(more="x"), claims(more={"x": [1]})),
        signed(header(), claims(nbf=NOW)),
    ],
)
def test_other_spelling_of_the_header_is_accepted(token: str) -> None:
    assert verdict(token) == oracle(token, NOW) == MEMBER


def test_pin_mac_depends_on_the_card_and_the_key_is_not_shown() -> None:
    assert pin_mac(KEY.derive("pin"), CARD, "123456") != pin_mac(
        KEY.derive("pin"), "1" * 16, "123456"
    )
    assert KEY.secret.decode() not in repr(KEY)
    assert KEY.kid != OTHER.kid


def test_operator_tokens_are_random_and_stored_as_hashes() -> None:
    first, second = new_operator_token(), new_operator_token()
    assert first.token != second.token
    assert first.token.startswith("sale_op_")
    assert len(first.token) >= len("sale_op_") + 43
    assert first.token_hash == operator_token_hash(first.token)
    assert len(first.token_hash) == 32


def test_missing_key_file_is_created_once_and_private(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    with pytest.raises(SettingsError, match=r"no signing key at .*signing\.key"):
        load_or_create_signing_key(settings)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        made = list(
            threads.map(lambda _: load_or_create_signing_key(settings, create=True), range(16))
        )
    assert len(set(made)) == 1
    assert load_or_create_signing_key(settings) == made[0]
    file = tmp_path / "data" / "signing.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["signing.key"]


def test_readable_or_short_key_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    settings = Settings(signing_key_file=file)
    with pytest.raises(SettingsError, match="no signing key at"):
        load_or_create_signing_key(settings, create=True)
    file.write_text("x" * 40)
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="others may read"):
        load_or_create_signing_key(settings)
    file.chmod(0o600)
    assert load_or_create_signing_key(settings).secret == b"x" * 40
    file.write_text("short")
    with pytest.raises(SettingsError, match="shorter than 32 bytes"):
        load_or_create_signing_key(settings)


def test_key_in_the_settings_is_used() -> None:
    settings = Settings(signing_key="s" * 32)
    assert load_or_create_signing_key(settings).secret == b"s" * 32
