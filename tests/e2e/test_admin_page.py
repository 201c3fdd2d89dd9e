"""The page of a running relay in a browser: by pointer and by keyboard alone, on a phone, with and without scripts. One relay."""

import re
from pathlib import Path

import pytest

from tests.support.browser import browser
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.programs import need

HOSTILE = 'Subject: <img src=x onerror=alert(1)><script>alert(2)</script>\r\nX-Evil: "><script>alert(3)</script>\r\n\r\nhello\r\n'
EVIL_SENDER = '"<script>alert(4)</script>"@b.example'


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    need("chromium")
    port = free_port()
    with Relay(tmp_path_factory.mktemp("page"), f"127.0.0.1:{free_port()}", f"admin.listen=127.0.0.1:{port}") as found:
        found.address = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
        found.token = found.cli("token", "create", "--name", "ann", "--scope", "all").stdout.strip()  # type: ignore[attr-defined]
        for number in range(5):
            found.send(HOSTILE, f"s{number}@b.example", "ann@d.example", "bob@e.example")
        found.send(HOSTILE, EVIL_SENDER, "cy@d.example")
        wait_for(lambda: sum(row["deferred"] for row in found.summary()), what="the first attempt")
        yield found


async def log_in(page, relay) -> None:
    """By the keyboard: the field has the focus."""
    await page.go(relay.address)
    await page.until("document.activeElement.matches('[name=token]')")
    await page.type(relay.token)
    await page.follows("Enter")


def held(relay) -> int:
    return sum(row["held"] for row in relay.summary())


async def test_log_in_find_and_hold_what_the_confirmation_has_counted(relay, tmp_path):
    async with browser(tmp_path) as page:
        await page.looks(1200)
        await page.go(relay.address)
        await page.until("location.pathname === '/login' && document.activeElement.matches('[name=token]')")
        await page.type("wrong")
        await page.follows("Enter")
        assert "no valid token" in await page.text()
        page.problems.clear()  # the browser tells of the 401
        await page.type(relay.token)
        await page.follows("Enter")
        assert "smarthost" in await page.text() and "Connection refused" in await page.text()
        assert await page.run("document.cookie") == "", "scripts do not see the cookie"
        first = await page.run("document.querySelector('#now svg').getAttribute('aria-label')")
        await page.run("document.querySelector('#now').dataset.seen = '1'; document.querySelector('#now svg').id = 'old'")
        await page.until("!document.querySelector('#old')")  # htmx has brought new figures
        assert first and await page.run("document.querySelector('#now').dataset.seen") == "1"
        await page.run("document.querySelector('[name=to]').value = 'bob@e.example'")
        await page.click(".search button")
        assert await page.run("document.querySelectorAll('input[name=ids]').length") == 5
        await page.run("[...document.querySelectorAll('input[name=ids]')].slice(0, 2).forEach(box => box.click())")
        await page.click("button[value=hold]")
        assert await page.run("document.querySelector('#count').innerText") == "2" and held(relay) == 0
        await page.click("form[action='/do'] button")
        assert "2 of 2 messages were changed" in await page.text() and held(relay) == 2
        # Hostile mail, in a list and by itself, with its header.
        await page.go(f"{relay.address}/messages?to=cy@d.example")
        assert "<script>alert(4)</script>" in await page.text()
        await page.click("#list .name a")
        shown = await page.text()
        assert "<img src=x onerror=alert(1)><script>alert(2)</script>" in shown and "Connection refused" in shown
        assert await page.run("document.images.length") == 0 and page.dialogs == 0
        await page.click("button[value=delete]")
        relay.cli("queue", "hold", "--from", EVIL_SENDER)
        await page.click("form[action='/do'] button")
        assert "1 of 1 message was changed" in await page.text()
        assert page.problems == [], "neither an error nor a violation of the policy"


async def test_what_has_changed_since_it_was_counted_is_not_changed(relay, tmp_path):
    async with browser(tmp_path) as page:
        await page.looks(1200)
        await log_in(page, relay)
        await page.click("td.do button[value=hold]")
        counted = int(await page.run("document.querySelector('#count').innerText"))
        relay.send(HOSTILE, "later@b.example", "ann@d.example")
        wait_for(lambda: sum(row["messages"] for row in relay.summary()) > counted)
        before = held(relay)
        await page.click("form[action='/do'] button")
        assert f"{counted + 1} match now, not {counted}" in await page.text() and held(relay) == before
        await page.click("form[action='/do'] button")
        assert held(relay) == counted + 1
        relay.cli("queue", "release", "--all")


async def test_by_keyboard_alone_and_on_a_phone_without_scripts(relay, tmp_path):
    async with browser(tmp_path) as page:
        await page.looks(1200)
        await log_in(page, relay)
        await page.press("Tab")
        assert await page.run("document.activeElement.matches('.skip')"), "the first stop leads past the header"
        await page.tab_to(".search [name=from]")
        await page.type("s1@b.example")
        await page.follows("Enter")
        await page.tab_to("input[name=ids]")
        await page.press("Space")
        assert await page.run("document.activeElement.checked")
        await page.go(f"{relay.address}/messages?from=s1@b.example")
        await page.tab_to("#list .name a")
        await page.follows("Enter")
        await page.tab_to("button[value=hold]")
        await page.follows("Enter")
        await page.until("document.activeElement.innerText == 'Hold 1'")  # the button gets the focus when it is drawn
        await page.follows("Enter")
        assert "1 of 1 message was changed" in await page.text() and held(relay) == 1
        await page.until("getComputedStyle(document.activeElement).outlineStyle != 'none'")  # the focus is seen
        assert page.problems == []
        ident = re.search(r"\w{13}", await page.run("document.querySelector('main a').href"))[0]  # type: ignore[index]
        # A phone, dark and light, without scripts.
        for dark in (False, True):
            await page.looks(360, 780, dark)
            for path in ("/", "/messages?to=ann@d.example", f"/messages/{ident}", "/sites/smarthost", "/quarantine"):
                await page.go(relay.address + path)
                assert await page.run("document.documentElement.scrollWidth") == 360, path
            light = await page.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", light)[:3])) < 200) == dark
        await page.scripts(False)
        await page.go(f"{relay.address}/messages/{ident}")
        await page.tab_to("button[value=release]")
        await page.follows("Enter")
        await page.until("document.activeElement.innerText == 'Release 1'")
        await page.follows("Enter")
        wait_for(lambda: held(relay) == 0)


def test_the_pictures_of_the_page_are_there_and_small():
    docs = Path(__file__).parents[2] / "docs"
    pictures = sorted(docs.glob("admin-page-*.png"))
    assert len(pictures) == 3 and all(path.stat().st_size < 150_000 for path in pictures)
    assert all(f"({path.name})" in (docs / "admin.md").read_text() for path in pictures)
