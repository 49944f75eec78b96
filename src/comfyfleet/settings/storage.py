"""Where outputs go: S3 by the documents' `S3_*` names, and links to local files.

`S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY, S3_BUCKET_NAME, S3_ENDPOINT_URL, S3_REGION, S3_CONNECT_TIMEOUT (s),
S3_CONNECT_ATTEMPTS`; `OUTPUT_BASE64_MAX_BYTES`; ours: `COMFYFLEET_URL_EXPIRES_S`, `COMFYFLEET_FILES_URL`,
`COMFYFLEET_FILES_KEY_FILE` or, in hex, `COMFYFLEET_FILES_KEY`. An empty value means "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What says where outputs go; the rest of `S3_*` says how.
PLACE_OF_S3 = ("S3_BUCKET_NAME", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "S3_ENDPOINT_URL")
WEEK_S = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """A bucket and the keys to it; what is empty here, each request has to bring. `endpoint_url` empty: AWS itself."""

    bucket: str = ""
    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)
    endpoint_url: str = ""
    region: str = ""
    connect_timeout_s: float = 60.0
    attempts: int = 3

    @property
    def has_keys(self) -> bool:
        return bool(self.access_key_id and self.secret_access_key)

    @property
    def missing(self) -> tuple[str, ...]:
        """The variables without which outputs stay on the worker unless a request brings them."""
        needed = {
            "S3_BUCKET_NAME": self.bucket,
            "S3_ACCESS_KEY_ID": self.access_key_id,
            "S3_SECRET_ACCESS_KEY": self.secret_access_key,
        }
        return tuple(name for name, value in needed.items() if not value)


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """`s3` is None when the environment names none of it; links then go to local files under `files_url`.

    So they do while something of it is missing, which `notice` says.
    """

    s3: S3Settings | None = None
    files_url: str = ""
    files_key_file: str = ""
    files_key: str = field(default="", repr=False)  # the key itself, in hex, where no folder is shared
    url_expires_s: float = WEEK_S
    base64_max_bytes: int = 32 * 1024 * 1024

    @property
    def notice(self) -> str:
        """What the operator probably did not mean, or ""."""
        if self.s3 is None or not self.s3.missing:
            return ""
        return f"outputs are kept here and not in S3; not set: {', '.join(self.s3.missing)}"

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> StorageSettings:
        """Raises ValueError naming the variable that is no number."""
        return cls(
            s3=s3_of_environment(env),
            files_url=env.get("COMFYFLEET_FILES_URL", "").strip(),
            files_key_file=env.get("COMFYFLEET_FILES_KEY_FILE", "").strip(),
            files_key=_hex("COMFYFLEET_FILES_KEY", env.get("COMFYFLEET_FILES_KEY", "").strip()),
            url_expires_s=number(env, "COMFYFLEET_URL_EXPIRES_S", WEEK_S),
            base64_max_bytes=int(number(env, "OUTPUT_BASE64_MAX_BYTES", 32 * 1024 * 1024)),
        )


def s3_of_environment(env: Mapping[str, str]) -> S3Settings | None:
    """None where the environment says nothing of S3. Raises ValueError naming the variable that is no number."""
    if not any(env.get(name, "").strip() for name in PLACE_OF_S3):
        return None
    return S3Settings(
        bucket=env.get("S3_BUCKET_NAME", "").strip(),
        access_key_id=env.get("S3_ACCESS_KEY_ID", "").strip(),
        secret_access_key=env.get("S3_SECRET_ACCESS_KEY", "").strip(),
        endpoint_url=env.get("S3_ENDPOINT_URL", "").strip(),
        region=env.get("S3_REGION", "").strip(),
        connect_timeout_s=number(env, "S3_CONNECT_TIMEOUT", 60.0),
        attempts=max(1, int(number(env, "S3_CONNECT_ATTEMPTS", 3))),
    )


def _hex(name: str, text: str) -> str:
    try:
        bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{name} must be hexadecimal") from None
    return text


def number(env: Mapping[str, str], name: str, default: float) -> float:
    """A non-negative number from the environment; empty or absent is the default."""
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, not {text!r}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must not be negative")
    return value
