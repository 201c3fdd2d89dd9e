"""`python -m tests.support.admin_pictures`: write the pictures in docs/admin.md (admin-page-*.png), of a relay with some mail."""

import asyncio
import random
import smtplib
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.browser import browser
from tests.support.daemon import Relay, free_port

DOCS = Path(__file__).parents[2] / "docs"
SENDERS = ("shop@example.com", "billing@example.com", "news@example.com", "alerts@example.com")
DOMAINS = ("example.org", "mail.example", "customers.example", "partner.example")


async def _pictures(folder: Path) -> None:
    port, down, taken = free_port(), free_port(), free_port()
    sink = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "relaymta", "sink", "--listen", f"127.0.0.1:{taken}"], stdout=subprocess.DEVNULL
    )
    try:
        routes = (
            f'route=[{{name="partner", hosts=["127.0.0.1:{down}"], recipient_domain=["partner.example"]}},'
            f'{{name="out", hosts=["127.0.0.1:{taken}"], tls="off"}}]'
        )
        with Relay(folder, None, f"admin.listen=127.0.0.1:{port}", routes, "hostname=relay.example.org") as relay:
            token = relay.cli("token", "create", "--name", "ann", "--scope", "all").stdout.strip()
            await asyncio.to_thread(
                relay.cli, "policy", "hold", "--domain", "customers.example", "--reason", "until the invoices are right"
            )
            async with browser(folder) as page:
                await page.looks(1180, 800)
                await page.go(f"http://127.0.0.1:{port}/")
                await page.until("document.activeElement.matches('[name=token]')")
                await page.type(token)
                await page.follows("Enter")
                for _ in range(14):
                    await asyncio.to_thread(_send, relay.port, random.randint(20, 120))
                    await asyncio.sleep(3)
                await page.go(f"http://127.0.0.1:{port}/")
                await page.picture(DOCS / "admin-page-light.png")
                await page.looks(1180, 800, dark=True)
                found = await page.run("document.querySelector('td.name a').href")
                await page.go(found)
                await page.click("#list .name a")
                await page.picture(DOCS / "admin-page-dark.png")
                await page.looks(360, 780)
                await page.go(f"http://127.0.0.1:{port}/")
                await page.picture(DOCS / "admin-page-phone.png")
    finally:
        sink.kill()
        sink.wait()


def _send(port: int, count: int) -> None:
    with smtplib.SMTP("127.0.0.1", port) as client:
        for _ in range(count):
            to = f"{random.choice(('ann', 'bob', 'cy', 'dee'))}@{random.choices(DOMAINS, (60, 30, 1, 1))[0]}"
            client.sendmail(random.choice(SENDERS), [to], "Subject: Your order\r\n\r\nThank you.\r\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_pictures(Path(name)))
