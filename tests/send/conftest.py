"""What several tests of delivery share."""

import ssl

import pytest
import trustme


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, trustme.CA]:
    """(a server's context, the authority of its certificate)"""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "mx1.test", "mx2.test", "127.0.0.1", "127.0.0.2").configure_cert(server)
    return server, authority
