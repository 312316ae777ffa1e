"""Reads from the environment how a server is reached: through which proxy, and with which certificates."""

import os
import ssl
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2


def proxy_of(url: str) -> str | None:
    """Return the URL of the proxy for a URL, by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; None if it has none.

    httpx2 alone would also set up proxies that the URL does not use, and fail if it cannot.
    """
    parts, proxies = urlsplit(url), getproxies()
    host = parts.hostname or ""
    direct = [entry.strip() for entry in proxies.get("no", "").split(",")]
    if proxy_bypass(host) or proxy_bypass(f"{host}:{parts.port}") or any(_is_in(host, entry) for entry in direct):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def tls_context(url: str) -> ssl.SSLContext:
    """Load the certificates of REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE, SSL_CERT_DIR or the system.

    Args:
        url: URL of the server or proxy to connect to.

    Returns:
        A context with these certificates, or without any if the URL is not https.

    Raises:
        OSError: A named file or folder cannot be read.
    """
    if not url.startswith("https://"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle:
        return httpx2.create_ssl_context()
    folder, file = (bundle, None) if os.path.isdir(bundle) else (None, bundle)
    return ssl.create_default_context(capath=folder, cafile=file)


def _is_in(host: str, network: str) -> bool:
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:  # a name
        return False
