"""One per cent of the mail is deferred again and again while the rest flows: `python -m benchmarks.stragglers [--messages N]`.

Deferred messages keep segments alive among mail that is delivered at once. Reported: the most disk space of the segments beside
twice their live octets, and the CPU per message beside that of a fresh spool. At the end the stubborn host accepts everything.
"""

import argparse
import json
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.run import Load, Relaymta, Sink, cpu_seconds, measure
from relaymta.disk.segments import segment_size_for
from tests.support.daemon import wait_for

ROUND = 10_000  # messages, one in a hundred of them to the stubborn host
CONFIG = """
[[route]]
name = "stubborn"
recipient_domain = ["stubborn.example"]
hosts = ["127.0.0.1:{stubborn}"]

[[route]]
name = "others"
hosts = ["127.0.0.1:{sink}"]
"""


def run(messages: int) -> dict[str, object]:
    """Send, measure, and drain."""
    found: dict[str, object] = {"messages": messages}
    sink, stubborn = Sink(), Sink("-r", "rcpt")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "relay.toml"
        config.write_text(CONFIG.format(stubborn=stubborn.port, sink=sink.port))
        relay = Relaymta(folder, 0, flags=("--config", str(config)))
        size = segment_size_for(folder)
        fresh = measure(relay, Load("fresh", 20_000))["cpu_us"]
        over: list[float] = []
        watching = threading.Event()
        watcher = threading.Thread(target=watch, args=(relay, size, over, watching))
        watcher.start()
        spent, start = cpu_seconds(relay.root), relay.delivered()
        began = time.monotonic()
        for _ in range(messages // ROUND):
            stubborn_load = Load("stubborn", ROUND // 100, to="c@stubborn.example")
            other = subprocess.Popen(stubborn_load.command(relay.port))
            subprocess.run(Load("others", ROUND - ROUND // 100).command(relay.port), check=True)
            other.wait()
        wait_for(lambda: relay.delivered() - start >= messages * 99 // 100, 300, "the others")
        found["rate"] = messages / (time.monotonic() - began)
        found["cpu us"], found["cpu of a fresh spool, us"] = (cpu_seconds(relay.root) - spent) / messages * 1e6, fresh
        found["deferred"] = relay.counter("relaymta_queue_messages")
        stubborn.close()
        stubborn = Sink(port=stubborn.port)
        relay.cli("queue", "flush", "--all")
        wait_for(lambda: relay.counter("relaymta_queue_messages") == 0, 300, "the stubborn to drain")
        found["delivered"] = relay.delivered() - start
        found["cpu afterwards, us"] = measure(relay, Load("fresh", 20_000))["cpu_us"]
        watching.set()
        watcher.join()
        found["segment MB"] = size / 1e6
        found["most segments beyond twice the live octets (bound: 16)"] = max(over)
        relay.close()
    sink.close()
    stubborn.close()
    return found


def watch(relay: Relaymta, size: int, over: list[float], done: threading.Event) -> None:
    """Twice a second: segments beyond twice the live octets."""
    while not done.wait(0.5):
        octets, live = relay.counter("relaymta_segment_octets"), relay.counter("relaymta_segment_live_octets")
        over.append((octets - 2 * live) / size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=2_000_000)
    print(json.dumps(run(parser.parse_args().messages), indent=1))


if __name__ == "__main__":
    main()
