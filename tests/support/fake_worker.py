"""A worker for tests of the supervisor: it speaks the channel's protocol, and does nothing else.

Arguments: the descriptor of the channel, a folder. Each request is appended to `requests.SLOT` there. The file `start.SLOT` there
says how it starts: seconds to wait, or "refuse".
"""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from relaymta.control import Channel
from relaymta.errors import RelayError


async def run(descriptor: int, folder: Path) -> None:
    stopping = asyncio.Event()
    slot = -1

    async def handle(op: str, args: dict[str, Any], descriptors: list[int]) -> None:
        nonlocal slot
        for given in descriptors:
            os.close(given)
        if op == "start":
            slot = args["slot"]
        if op != "alive":
            with (folder / f"requests.{slot}").open("a") as file:
                file.write(f"{op} {args.get('slot', '')} {args.get('probed', '')}\n")
        if op == "start":
            how = folder / f"start.{slot}"
            text = how.read_text() if how.exists() else "0"
            if text == "refuse":
                asyncio.get_running_loop().call_later(0.1, stopping.set)
                raise RelayError("the spool is in use")
            await asyncio.sleep(float(text))
        if op == "stop":
            stopping.set()

    Channel(socket.socket(fileno=descriptor), handle, stopping.set)
    await stopping.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(run(int(sys.argv[1]), Path(sys.argv[2])))
