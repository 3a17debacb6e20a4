"""Options of access to the server: API keys, TLS, other origins, root path and unix socket."""

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.sampling.params import option
from server.api_keys import ApiKeys, parse_key, read_keys

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#@]+")
_ROOT_PATH = re.compile(r"|(/[\w.~-]+)+", re.ASCII)


@dataclass(frozen=True)
class AccessOptions:
    """API keys, TLS, CORS and listening options.

    Raises:
        ConfigError: a field is malformed.
    """

    api_key_file: str | None = option(
        None,
        "KEY [NAME] [admin] [patches=PATCH:PATCH] per line; also read: MEMPLUS_API_KEYS,"
        " comma-separated (default: no key is needed)",
        group=("access", "--api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem"),
        metavar="FILE",
    )
    api_key: tuple[str, ...] = option(
        (), "keys; any user of this machine can see them in ps (default: none)", metavar="KEY"
    )
    tls_cert: str | None = option(
        None, "certificate chain in PEM format (default: no TLS)", metavar="FILE"
    )
    tls_key: str | None = option(
        None, "private key in PEM format (default: in --tls-cert)", metavar="FILE"
    )
    cors_origin: tuple[str, ...] = option(
        (), "web pages that may call the server; *: all (default: none)", metavar="ORIGIN"
    )
    root_path: str | None = option(
        None, "path before all others, behind a proxy (default: none)", metavar="PATH"
    )
    uds: str | None = option(
        None, "listen on this unix socket (default: on --host and --port)", metavar="PATH"
    )

    def __post_init__(self) -> None:
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors_origin: must be * or scheme://host, not {origin!r}")
        if not _ROOT_PATH.fullmatch(self.root_path or ""):
            raise ConfigError(f"root_path: must be like /a/b, not {self.root_path!r}")
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("tls_key: needs --tls-cert")

    def keys(self, environment: str) -> ApiKeys:
        """The keys of the options and of the value of MEMPLUS_API_KEYS.

        Raises:
            ConfigError: a key is malformed or given twice, or the file cannot be read.
        """
        found = [parse_key(text, "api_key") for text in self.api_key]
        parts = [part for part in re.split(r"[,\n]", environment) if part.strip()]
        found += [parse_key(part, "MEMPLUS_API_KEYS") for part in parts]
        if self.api_key_file is not None:
            found += read_keys(Path(self.api_key_file))
        return ApiKeys(found)

    def check_tls(self) -> None:
        """Raise ConfigError if the certificate or its private key cannot be used."""
        if self.tls_cert is None:
            return
        for name, file in (("tls_cert", self.tls_cert), ("tls_key", self.tls_key)):
            try:
                if file is not None:
                    Path(file).read_bytes()
            except OSError as error:
                raise ConfigError(f"{name}: {file}: {error.strerror}") from None
        key = self.tls_key or self.tls_cert
        try:
            # an encrypted key would make OpenSSL ask for a password on the terminal
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, key, password="")
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error)
            raise ConfigError(
                f"tls_cert: {self.tls_cert} with the private key in {key}: cannot be used: {reason}"
            ) from None
