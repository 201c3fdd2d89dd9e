"""What a process without descriptors makes of what it cannot open: nothing is taken for damaged, missing, ours or theirs."""

import errno
import os
from pathlib import Path

import pytest
import trustme

from relaymta import memory
from relaymta.disk.big import BigBody
from relaymta.disk.segments import Segments
from relaymta.dns import DnsFailure, NoDescriptor, Resolver
from relaymta.errors import US, StoreError, is_scarce
from relaymta.hosts import Hosts
from relaymta.log import History
from relaymta.proto.envelope import Body
from relaymta.route.mx import NoRoute, mx_hosts
from relaymta.route.ourselves import Ourselves, is_local
from relaymta.send import trust
from relaymta.send.connect import Peer, _failure
from relaymta.send.trust import Files, TrustFailed, context_of
from tests.support.descriptors import no_descriptors


def big(segments: Segments, ident: int, path: Path, generation: int) -> Body:
    """A large body in a file."""
    file = BigBody(path, ident, 0, generation)
    file.write([b"x" * 100])
    return file.finish([])


def test_a_large_body_that_cannot_be_opened_is_neither_damaged_nor_missing(tmp_path):
    segments = Segments(tmp_path, 1 << 20)
    body = big(segments, 7, segments.next_path(7), 2)
    with no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            segments.is_next(7, body)  # else a sweep would remove the only copy
        for read in (segments.read, segments.open_big):
            with pytest.raises(StoreError, match="Too many open files") as failed:
                read(7, body)
            assert is_scarce(failed.value)
    assert segments.is_next(7, body) and segments.read(7, body) == b"x" * 100
    segments.next_path(7).unlink()
    assert not segments.is_next(7, body)
    with pytest.raises(StoreError) as failed:
        segments.read(7, body)
    assert not is_scarce(failed.value)
    segments.close()


def test_an_address_is_not_taken_for_ours():
    """Mail to a host that is this one bounces."""
    anywhere = Ourselves(set(), ["0.0.0.0:25"])
    assert is_local("127.0.0.1") and not is_local("192.0.2.1")
    with no_descriptors():
        for ask in (is_local, lambda address: anywhere.at(address, 25), lambda address: anywhere.is_exchange(address, 25)):
            with pytest.raises(OSError, match="Too many open files"):
                ask("192.0.2.1")
    assert not anywhere.at("192.0.2.1", 25)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_connection_without_a_descriptor_is_no_failure_of_the_peer(number):
    cause = OSError(number, os.strerror(number))
    wrapped = ConnectionError("error connecting")
    wrapped.__cause__ = cause
    for error in (cause, wrapped):
        found = _failure("connect", Peer("mx.example", "192.0.2.1", 25), error)
        assert found.scarce and (found.fault, found.category, found.said) == (US, "local", None)
        assert "192.0.2.1" not in found.public and "mx.example" not in found.public
    assert not _failure("connect", Peer("mx.example", "192.0.2.1", 25), ConnectionRefusedError()).scarce


async def test_a_name_that_could_not_be_asked_for_is_no_failure_of_its_domain():
    resolver = Resolver(["127.0.0.1:9"])
    with no_descriptors():
        with pytest.raises(NoDescriptor):
            await resolver.txt("d.example")
        with pytest.raises(NoRoute) as failed:
            await mx_hosts(resolver, "d.example", set())
    assert failed.value.scarce and not failed.value.permanent and failed.value.fault == US
    with pytest.raises(DnsFailure) as refused:  # not cached: it is asked, and nobody answers there
        await resolver.txt("d.example")
    assert not isinstance(refused.value, NoDescriptor)
    await resolver.close()


def test_how_much_memory_is_left_is_unknown(tmp_path):
    with no_descriptors():
        for ask in (memory.anonymous, lambda: memory.share(1 << 30, 1), lambda: memory.share(0, 1)):
            with pytest.raises(OSError, match="Too many open files"):
                ask()
    assert memory._of_cgroup(tmp_path / "none") == 0.0


def test_a_history_goes_on_in_its_file_until_the_next_can_be_opened(tmp_path):
    history = History(tmp_path, 0, 8 * 4096)
    history.write(b"x" * 4000 + b"\n")
    with no_descriptors():
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                history.write(b"lost\n" * 100)
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)  # gets the number of a file that is closed too early
    history.write(b"y" * 100 + b"\n")
    assert (tmp_path / "0.0.jsonl").read_bytes() == b"x" * 4000 + b"\n"
    assert (tmp_path / "0.1.jsonl").read_bytes() == b"y" * 100 + b"\n"
    assert (tmp_path / "other").read_bytes() == b""
    os.close(other)
    os.close(history._descriptor)


def test_the_hosts_file_is_not_taken_for_empty(tmp_path):
    (tmp_path / "hosts").write_text("192.0.2.7 smart.internal\n")
    hosts = Hosts(str(tmp_path / "hosts"), str(tmp_path / "resolv.conf"))
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        hosts.addresses("smart.internal", "64")
    assert hosts.addresses("smart.internal", "64") == ["192.0.2.7"]


def test_no_context_of_tls_that_trusts_nobody_is_kept(tmp_path, monkeypatch):
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    own = tmp_path / "ca.pem"
    own.write_bytes(bundle.read_bytes())
    for files in (Files(), Files(ca=str(own))):
        monkeypatch.setattr(trust, "_known", {})
        with no_descriptors(), pytest.raises(TrustFailed) as failed:
            context_of("verify", files)
        assert is_scarce(failed.value)
        assert context_of("verify", files).cert_store_stats()["x509_ca"] == 1
