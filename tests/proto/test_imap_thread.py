"""THREAD: the algorithms of RFC 5256 3 against a naive and recursive reading of them, and what is hostile."""

import random
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto.imap_sort import RUN, base_subject
from relaymta.proto.imap_thread import Children, Forest, Threads, shown
from relaymta.proto.mime_thread import REFERENCES_MOST, thread_keys
from tests.conftest import PROVE
from tests.support.prove import in_prove


def envelope(subject: str, second: int) -> bytes:
    date = f"Mon, 1 Jan 2024 {second // 3600:02}:{second // 60 % 60:02}:{second % 60:02} +0000"
    return f'("{date}" "{subject}" NIL NIL NIL NIL NIL NIL NIL NIL)'.encode()


def keys(*idents: int) -> bytes:
    return b"".join(ident.to_bytes(8, "little") for ident in idents)


def threaded(messages, by_references=True) -> str:
    """`messages`: subject, second, keys."""
    threads = Threads(by_references)
    for subject, second, ids in messages:
        threads.add(envelope(subject, second), 0, keys(*ids))
    return b"".join(shown(threads.forest(), lambda one: one + 1)).decode().removesuffix("\r\n").removeprefix("* THREAD").strip()


def family(children: dict[int, list[int]]) -> Children:
    found = Children(max(children, default=0) // 2)  # some nodes are added
    for node, below in children.items():
        found.put(node, below)
    return found


# The response


def test_examples_of_rfc_5256():
    """Section 4, sort of thread-data."""
    forest = Forest(100, [1, 2], family({2: [5], 5: [3, 43], 3: [22], 43: [6], 6: [95]}))
    assert b"".join(shown(forest, lambda one: one + 1)) == b"* THREAD (2)(3 6 (4 23)(44 7 96))\r\n"
    forest = Forest(6, [7], family({7: [2, 4]}))
    assert b"".join(shown(forest, lambda one: one + 1)) == b"* THREAD ((3)(5))\r\n"
    assert b"".join(shown(Forest(0, [], family({})), int)) == b"* THREAD\r\n"


# REFERENCES


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([], ""),
        ([("a", 1, [1]), ("b", 2, [2, 1]), ("c", 3, [3, 1, 2])], "(1 2 3)"),
        ([("a", 2, [1]), ("b", 1, [2])], "(2)(1)"),  # by date
        ([("a", 1, [1, 9]), ("b", 2, [2, 9])], "((1)(2))"),  # a dummy stays at the top with two children
        ([("a", 1, [1, 9])], "(1)"),
        ([("a", 1, [1]), ("b", 2, [2, 1, 9]), ("c", 3, [3, 1, 9])], "(1 (2)(3))"),  # a dummy below goes
        ([("x", 1, [1]), ("Re: x", 2, [2])], "(1 2)"),
        ([("Re: x", 1, [1]), ("x", 2, [2])], "(2 1)"),  # the original is the head
        ([("x", 1, [1]), ("x", 2, [2])], "((1)(2))"),
        ([("x", 1, [1]), ("x", 2, [2]), ("x", 3, [3]), ("re: x", 4, [4])], "((1)(2)(3)(4))"),
        ([("", 1, [1]), ("Re:", 2, [2])], "(1)(2)"),  # an empty base subject gathers nothing
        ([("x", 1, [1, 8]), ("y", 2, [2, 8]), ("x", 3, [3])], "((1)(2)(3))"),
        ([("a", 1, [1]), ("b", 2, [1]), ("c", 3, [3, 1])], "(1 3)(2)"),  # the first of a Message-ID has it
        ([("a", 1, [1, 2]), ("b", 2, [2, 1])], "(2 1)"),  # a loop
        ([("a", 1, [1, 1])], "(1)"),
        ([("a", 1, [0]), ("b", 2, [0])], "(1)(2)"),
        ([("a", 3, [3, 1, 2]), ("b", 1, [1]), ("c", 2, [2])], "(2)(3 1)"),  # a parent that is not confirmed is given up
        ([("a", 3, [3, 1, 2]), ("b", 1, [1]), ("c", 2, [2, 9, 1])], "(2 3 1)"),
    ],
)
def test_references(messages, expected):
    assert threaded(messages) == expected


def oracle(messages) -> list:
    """RFC 5256 3, REFERENCES, step by step: threads as (number or None, children)."""
    nodes, parent, message = {}, {}, {}
    extra = 10**6
    for number, (_, _, ids) in enumerate(messages):
        own = ids[0]
        if not own or message.get(own) is not None:
            own, extra = extra, extra + 1
        nodes[own] = None
        message[own] = number

        def loops(child, above):
            while above is not None:
                if above == child:
                    return True
                above = parent.get(above)
            return False

        before = None
        for ident in ids[1:]:
            nodes.setdefault(ident)
            if before is not None and parent.get(ident) is None and not loops(ident, before):
                parent[ident] = before
            before = ident
        if parent.get(own) != before:
            parent[own] = None
            if before is not None and not loops(own, before):
                parent[own] = before

    def build(ident):
        return [message.get(ident), [build(one) for one in nodes if parent.get(one) == ident]]

    def prune(node, top):
        found = []
        for child in node[1]:
            prune(child, False)
            if child[0] is None and (not child[1] or not top or len(child[1]) == 1):
                found += child[1]
            else:
                found.append(child)
        node[1] = found

    def date(node):
        return min(map(date, node[1])) if node[0] is None else (messages[node[0]][1], node[0])

    def order(node):
        for child in node[1]:
            order(child)
        node[1].sort(key=date)

    def subject(node):
        return base_subject(messages[(node if node[0] is not None else node[1][0])[0]][0].encode())[0]

    def replies(node):
        return node[0] is not None and base_subject(messages[node[0]][0].encode())[1]

    root = [None, [build(one) for one in nodes if parent.get(one) is None]]
    prune(root, True)
    order(root)
    table = {}
    for one in root[1]:
        text, head = subject(one), table.get(subject(one))
        if text and (head is None or (head[0] is not None and (one[0] is None or (replies(head) and not replies(one))))):
            table[text] = one
    for one in list(root[1]):
        if not any(one is other for other in root[1]):
            continue
        head = table.get(subject(one), one)
        if head is one:
            continue
        root[1] = [other for other in root[1] if other is not one]
        if head[0] is None:
            head[1] += one[1] if one[0] is None else [one]
        elif replies(one) and not replies(head):
            head[1].append(one)
        else:
            text = subject(one)
            root[1] = [other for other in root[1] if other is not head]
            table[text] = [None, [head, one]]
            root[1].append(table[text])
    order(root)
    return root[1]


def text_of(node) -> str:
    number, below = node
    shown_ = [str(number + 1)] if number is not None else []
    if len(below) == 1:
        return " ".join([*shown_, text_of(below[0])])
    return " ".join([*shown_, *(["".join(f"({text_of(one)})" for one in below)] if below else [])])


_MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["", "x", "Re: x", "y", "re: y", "[z] y", "Fwd: x"]),
        st.integers(0, 5),
        st.tuples(st.integers(0, 8), st.lists(st.integers(1, 12), max_size=4)).map(lambda pair: [pair[0], *pair[1]]),
    ),
    max_size=14,
)


@settings(max_examples=1500 if PROVE else 400, deadline=None)
@given(_MESSAGES)
def test_as_the_naive_reading(messages):
    assert threaded(messages) == "".join(f"({text_of(one)})" for one in oracle(messages))


# ORDEREDSUBJECT


def test_orderedsubject():
    messages = [("b", 5, []), ("Re: a", 4, []), ("a", 3, []), ("re: b", 6, []), ("a", 9, []), ("c", 7, [])]
    assert threaded(messages, False) == "(3 (2)(5))(1 4)(6)"


# Hostile


@pytest.mark.parametrize("how", [*in_prove("forward", "backward"), "shuffled"])
def test_one_long_chain(how):
    many = 100_000
    order = list(range(1, many + 1))
    if how != "forward":
        order.reverse()
    if how == "shuffled":
        random.Random(1).shuffle(order)
    threads = Threads(True)
    place = {ident: at for at, ident in enumerate(order)}
    text = envelope("same", 0)
    for ident in order:
        threads.add(text, 0, keys(ident, ident - 1) if ident > 1 else keys(ident))
    forest = threads.forest()
    assert forest.roots == [place[1]] and all([*forest.children.get(place[one])] == [place[one + 1]] for one in range(1, many))
    assert len(b"".join(shown(forest, lambda one: 1))) == len("* THREAD ()\r\n") + 2 * many - 1


def test_all_have_one_subject():
    threads = Threads(True)
    text = envelope("same", 0)
    for ident in range(1, 100_001):
        threads.add(text, 0, keys(ident))
    forest = threads.forest()
    assert len(forest.roots) == 1 and len(forest.children.get(forest.roots[0])) == 100_000


@pytest.mark.parametrize("by_references", [True, False])
@pytest.mark.parametrize("shape", ["many threads", "one thread", "one subject"])
def test_no_sort_keeps_other_threads_waiting(monkeypatch, by_references, shape):
    """No more than RUN at once are given to what does not let go of the interpreter until it is done."""
    sizes, many = [], 2 * RUN + 5
    monkeypatch.setattr(
        "relaymta.proto.imap_sort.sorted", lambda items, **how: (sizes.append(len(items)), sorted(items, **how))[1], raising=False
    )
    threads = Threads(by_references)
    for ident in range(1, many + 1):
        refers = [many + 1] if shape == "one thread" else []
        threads.add(envelope("same" if shape == "one subject" else "", many - ident), 0, keys(ident, *refers))
    forest = threads.forest()
    assert max(sizes) == RUN and sum(size for size in sizes if size > 1) == (2 * many if by_references else many)
    told = b"".join(shown(forest, lambda one: one)).decode()
    assert [int(one) for one in re.findall("[0-9]+", told)] == list(reversed(range(many)))


def test_links_to_the_end_of_a_long_chain():
    """Each link has to look whether it makes a loop."""
    threads, text, many = Threads(True), envelope("", 0), 30_000
    for ident in range(1, many + 1):
        threads.add(text, 0, keys(ident, ident - 1) if ident > 1 else keys(ident))
    for one in range(many):  # one that has a child goes below the end of the chain
        threads.add(text, 0, keys(0, 10 * many + one))
        threads.add(text, 0, keys(10 * many + one, many))
    forest = threads.forest()
    assert len(forest.roots) == 1 and len(forest.children.get(many - 1)) == many


def test_threads_take_little_memory():
    """Each message answers one that is not there, and begins a thread of its own."""
    many = 5000
    messages = [(envelope(f"subject {ident}", ident), keys(ident, many + ident)) for ident in range(1, many + 1)]
    tracemalloc.start()
    try:
        threads = Threads(True)
        for text, some in messages:
            threads.add(text, 0, some)
        assert len(threads.forest().roots) == many
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most / many < 400  # octets; twice as many, where what is not needed any more is kept


# Keys


def test_keys_of_a_header():
    def made(text: str) -> list[bytes]:
        found = thread_keys(text.encode())
        return [found[at : at + 8] for at in range(0, len(found), 8)]

    (one,) = made("Message-ID: <a@b>\r\n")
    assert one != bytes(8) and made("message-id:\r\n <a@b>\r\n\r\n") == [one]
    assert made('Message-Id: <"a"@b>\r\n') == made('Message-Id: <"\\a"@b>\r\n') == [one]
    assert made("Subject: x\r\n") == made("Message-ID: a@b\r\n") == made("Message-ID: <ab>\r\n") == [bytes(8)]
    two, three = made("Message-ID: <c@d>\r\n") + made("Message-ID: <e@f>\r\n")
    assert made("References: <a@b> <c@d>\r\n <e@f>\r\nMessage-ID: <a@b>\r\nIn-Reply-To: <x@y>\r\n") == [one, one, two, three]
    assert made("Message-ID: <a@b>\r\nIn-Reply-To: your mail <c@d> of <e@f>\r\n") == [one, two]
    assert made("Message-ID: <a@b>\r\nReferences: none\r\nIn-Reply-To: <c@d>\r\n") == [one, two]
    many = made("References: " + " ".join(f"<{number}@x>" for number in range(10_000)) + "\r\n")
    assert len(many) == REFERENCES_MOST + 1 and many[-1] == made("Message-ID: <9999@x>\r\n")[0]
    assert len(made("References: " + "<" * 1_000_000 + "\r\n")) == 1
    assert made("Message-ID: <a@b>\r\nReferences: <c@d>" + " <x>" * 999 + "\r\n") == [one, two]
    assert made("Message-ID: <a@b>\r\nReferences: <c@d>" + " <x>" * 1000 + "\r\n") == [one]  # so many are looked at
    assert made(f"Message-ID: <{'a' * 4095}@b>\r\n") == [bytes(8)] != made(f"Message-ID: <{'a' * 4094}@b>\r\n")


def test_fields_are_where_lines_begin_in_the_header():
    own = thread_keys(b"Message-ID: <a@b>\r\n")
    assert thread_keys(b"Subject: x\r\n Message-ID: <c@d>\r\nMESSAGE-ID \t: <a@b>\r\n") == own
    assert thread_keys(b"XMessage-ID: <c@d>\r\nMessage-IDs: <c@d>\r\nMessage-ID: <a@b>\nMessage-ID: <c@d>\n") == own
    assert thread_keys(b"Message-ID: <a@b>\r\n\r\nReferences: <c@d>\r\n") == own
    assert thread_keys(b"\r\nMessage-ID: <a@b>\r\n") == bytes(8)


@given(st.binary(max_size=300))
def test_keys_of_anything(header):
    assert len(thread_keys(header)) % 8 == 0 and len(thread_keys(b"References: " + header)) >= 8
