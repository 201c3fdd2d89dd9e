"""What upkeep looks at after a start: page by page, however many users there are."""

import pytest

from relaymta.store.directory import Directory, User
from relaymta.supervisor import upkeep
from relaymta.supervisor.upkeep import Upkeep


@pytest.mark.parametrize("page", [1, 2, 3, 10])
async def test_users_whom_nobody_knows_are_removed(tmp_path, monkeypatch, page):
    monkeypatch.setattr(upkeep, "PAGE", page)
    directory, purged = Directory(tmp_path / "directory", writable=True), []
    shards = {0: [1, 2, 3, 5, 8, 9], 1: [4, 6, 7]}  # users whose mail is there
    for ident in range(1, 9):
        directory.next_ident()
        if ident not in (2, 3, 6):
            directory.add(User(ident, f"u{ident}@local.example", 0))

    async def owner(op, seconds=30.0, *, shard, user=0, after=0, most=0):
        if op == "mail_users":
            return [ident for ident in shards[shard] if ident > after][:most]
        assert op == "mail_purge"
        shards[shard].remove(user)
        return purged.append(user)

    steady = Upkeep(directory, owner, tmp_path, 2)
    directory.next_ident()  # 9: given by this process, so its creation is under way
    await steady._sweep()
    assert purged == [2, 3, 6]
    directory.close()
