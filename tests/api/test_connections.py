"""How many connections there are at a time, also those that say nothing in a handshake of TLS."""

import asyncio
import socket
import ssl

import trustme

from relaymta.api.connections import Door

MOST = 5


def test_connections_in_a_handshake_are_counted():
    """Of many that begin no handshake all but a few are closed at once; one that ends makes room."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(_crowd())


async def _crowd():
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    door = Door(socket.create_server(("127.0.0.1", 0)), MOST)
    server = await asyncio.get_running_loop().create_server(_Echo, sock=door, ssl=context, ssl_handshake_timeout=30)
    port = door.getsockname()[1]
    crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4 * MOST)]
    refused = 0
    async with asyncio.timeout(20):
        while refused < 3 * MOST:
            await asyncio.sleep(0.01)
            ended = [one for one in crowd if one[0].at_eof()]
            refused += len(ended)
            crowd = [one for one in crowd if one not in ended]
            for _, writer in ended:
                writer.close()
    assert len(crowd) == MOST == len(door.out)
    for _, writer in crowd:
        writer.transport.abort()
    async with asyncio.timeout(20):
        while door.out:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        writer.close()
        await writer.wait_closed()
        while door.out:
            await asyncio.sleep(0.01)
    server.close()


class _Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)
