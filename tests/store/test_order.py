"""strace shows that a message is on disk before it is acknowledged: its body, the sync of that, then LMDB's commit."""

import re
import subprocess
import sys

from tests.support.programs import need
from tests.support.traced import BEGINS, CALLS, Syncs, moments


def test_both_syncs_come_before_the_acknowledgement(tmp_path):
    trace = tmp_path / "trace"
    subprocess.run(
        [need("strace"), "-f", "-y", "-s", "60", "-o", trace, "-e", f"trace={CALLS}", "--", sys.executable, "-m",
         "tests.store.order_driver", tmp_path / "mail"],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    store, said, named = Syncs("mail/shard-0"), [], []
    for when, call in moments(trace.read_text()):
        store.take(when, call)
        if store.state == "named" and (not named or named[-1] != len(said)):
            named.append(len(said))
        acknowledged = re.match(r'write\(1<[^>]*>, "(filed|expunged)', call)
        if acknowledged and when == BEGINS:
            expected = "committed" if acknowledged[1] == "filed" else ""  # an expunge writes no message data
            assert store.state == expected and store.committed, f"{call} in state {store.state}"
            said.append(acknowledged[1])
            store.clear()
    assert said == ["filed"] * 5 + ["expunged"]
    assert named == [0, 3], "the names of the first segment and of the large message's file were synced"
