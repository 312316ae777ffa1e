"""How the environment says that a server is reached: proxies and certificates."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from reward_server import KEY_ENV, QUICK, Request, Serve, remote, scores

from xpo_lightning.cli.check.requirements import check_servers
from xpo_lightning.core.errors import InputError
from xpo_lightning.rewards.remote import RemoteReward

pytestmark = pytest.mark.usefixtures("own_environment")


def set_both(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name.upper(), value)
    monkeypatch.setenv(name, value)


def test_a_proxy_of_the_environment_is_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(Request.score)
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/score"))
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/score"))
    assert scores(RemoteReward("http://rewards.invalid/score", **QUICK)) == [0.0]
    assert proxy.seen[0].path == "http://rewards.invalid/score"


@pytest.mark.parametrize("direct", ["127.0.0.1", "other, 127.0.0.1", "127.0.0.0/8", "*", "127.0.0.1:{port}", ".0.0.1"])
def test_a_server_that_needs_no_proxy_is_reached_directly(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, direct: str
) -> None:
    server, proxy = serve(Request.score), serve(Request.score)
    set_both(monkeypatch, "http_proxy", proxy.url)
    set_both(monkeypatch, "no_proxy", direct.format(port=server.server_address[1]))
    scores(remote(server))
    assert (len(server.seen), len(proxy.seen)) == (1, 0)
    set_both(monkeypatch, "no_proxy", "128.0.0.0/8, ::1/128, h, 10.0.0.0/x")
    scores(remote(server))
    assert (len(server.seen), len(proxy.seen)) == (1, 1)


def test_all_proxy_counts_without_one_for_the_scheme_and_may_lack_its_own(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(Request.score)
    set_both(monkeypatch, "https_proxy", "http://127.0.0.1:9")
    set_both(monkeypatch, "all_proxy", proxy.url.removeprefix("http://"))
    assert scores(RemoteReward("http://rewards.invalid/score", **QUICK)) == [0.0]


def test_a_proxy_that_cannot_be_used_matters_only_where_it_is_needed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(Request.score)
    set_both(monkeypatch, "all_proxy", "gopher://me:hunter2@127.0.0.1:9")
    with pytest.raises(InputError, match=r"could not be reached, or broke off \(ValueError: .*gopher") as caught:
        scores(remote(server))
    assert "hunter2" not in str(caught.value)
    set_both(monkeypatch, "no_proxy", "127.0.0.1")
    assert scores(remote(server)) == [0.0]


def test_xpo_check_connects_unless_there_is_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RemoteReward("http://127.0.0.1:9/")
    with pytest.raises(InputError, match=r"nothing answers at http://127\.0\.0\.1:9 for RemoteReward"):
        check_servers(reward)
    set_both(monkeypatch, "http_proxy", "http://127.0.0.1:9")
    check_servers(reward)
    set_both(monkeypatch, "no_proxy", "127.0.0.0/8")
    with pytest.raises(InputError, match="nothing answers"):
        check_servers(reward)


def test_a_server_without_tls_is_one_line(serve: Serve) -> None:
    server = serve(Request.score)
    url = server.url.replace("http:", "https:")
    with pytest.raises(InputError, match=r"or broke off \(SSLError: \[SSL[^\n]*\), tried 3 times; check[^\n]*$"):
        scores(RemoteReward(url, **QUICK))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Make a key and a certificate for 127.0.0.1 that it signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    path = tmp_path / "server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", path, "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "cert.pem").read_text())
    return path


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_of_the_environment_are_trusted_and_no_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, certificate: Path, name: str
) -> None:
    server = serve(Request.score)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    reward = RemoteReward(server.url.replace("http:", "https:"), KEY_ENV, **QUICK)
    with pytest.raises(InputError, match=r"SSLCertVerificationError: [^\n]*self[ -]signed certificate[^\n]*$"):
        scores(reward)
    assert server.seen == [], "the key was sent to a server that nobody vouches for"
    monkeypatch.setenv(name, str(certificate))
    assert scores(reward) == [0.0]
    monkeypatch.setenv(name, str(certificate / "none"))
    with pytest.raises(InputError, match="could not be reached, or broke off"):
        scores(reward)
