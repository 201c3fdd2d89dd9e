"""THREAD (RFC 5256 3): messages as threads, by subject (ORDEREDSUBJECT) or by what they answer (REFERENCES), and the response.

Nothing here is recursive, and all of it takes n log n, whatever the messages refer to: whether a link would make a loop is told
by a link-cut tree (Sleator and Tarjan, 1983).
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import xxhash

from relaymta.proto.imap_sort import base_subject, in_order, sent, sortable

__all__ = ["Children", "Forest", "Threads", "shown"]

NONE: Final = -1
OPEN: Final = -2
CLOSE: Final = -3
PIECE: Final = 4096  # numbers and parentheses of a piece of the response


class Forest(NamedTuple):
    """Threads. `roots`: in their order; `children`: of each node that has any, in their order. A node below `messages` is a
    message, by its number among those that were added, from 0; others are dummies, which have two children at least."""

    messages: int
    roots: Sequence[int]
    children: "Children"


class Children:
    """Children of `nodes` nodes, and of others that are added. Most have one or none, which takes 4 octets and nothing that the
    garbage collector looks at, during which no other thread runs."""

    __slots__ = ("_only", "_several")

    def __init__(self, nodes: int) -> None:
        self._only = array("i", [NONE]) * nodes
        self._several: dict[int, list[int]] = {}

    def get(self, node: int) -> Sequence[int]:
        """The children of a node."""
        several = self._several.get(node)
        if several is not None:
            return several
        only = self._only[node] if node < len(self._only) else NONE
        return () if only == NONE else (only,)

    def add(self, node: int, child: int) -> None:
        """Another child, the last one."""
        several = self._several.get(node)
        if several is not None:
            several.append(child)
        elif self._only[node] == NONE:
            self._only[node] = child
        else:
            self._several[node] = [self._only[node], child]

    def put(self, node: int, children: list[int]) -> None:
        """These are the children."""
        self._several[node] = children

    def take(self, node: int) -> Sequence[int]:
        """The children of a node, which has none then."""
        found = self.get(node)
        self._several.pop(node, None)
        if node < len(self._only):
            self._only[node] = NONE
        return found

    def siblings(self) -> Iterable[tuple[int, list[int]]]:
        """Nodes with several children, and these."""
        return self._several.items()


class Threads:
    """The messages of a THREAD command, in the order of their numbers."""

    def __init__(self, by_references: bool) -> None:
        self.by_references = by_references
        self._dates = array("q")
        self._subjects = array("Q")  # keys of base subjects; 0: it is empty
        self._replies = bytearray()
        self._links = _Links()

    def add(self, envelope: bytes, arrival: int, keys: bytes) -> None:
        """A message. `arrival`: its internal date, ms; `keys`: as of mime_thread.thread_keys."""
        parts = sortable(envelope)
        time = sent(parts.date)
        subject, replies = base_subject(parts.subject)
        self._dates.append(arrival // 1000 if time is None else time)
        self._subjects.append((xxhash.xxh3_64_intdigest(subject.encode("utf-8", "replace")) or 1) if subject else 0)
        self._replies.append(replies)
        if self.by_references:
            self._links.add(memoryview(keys).cast("Q"))

    @property
    def nodes(self) -> int:
        """How many messages there are, with those that are missing and referred to: some 135 octets each."""
        return len(self._links) if self.by_references else len(self._dates)

    def forest(self) -> Forest:
        """The threads; asked for once, behind the last message."""
        return self._referred() if self.by_references else self._ordered()

    def _ordered(self) -> Forest:
        """ORDEREDSUBJECT."""
        dates, threads = self._dates, dict[int, list[int]]()
        for message in in_order(range(len(dates)), dates.__getitem__):
            threads.setdefault(self._subjects[message], []).append(message)
        children = Children(0)
        for thread in threads.values():
            if len(thread) > 1:
                children.put(thread[0], thread[1:])
        return Forest(len(dates), [thread[0] for thread in threads.values()], children)

    def _referred(self) -> Forest:
        """REFERENCES, steps 2 to 6."""
        count = len(self._dates)
        parents, self._links = self._links.parents(), _Links()  # the links are not needed any more
        roots, children = _pruned(parents, count)
        order = _Order(self._dates, children, count)
        for root in roots:
            if root >= count:
                children.put(root, in_order(children.get(root), order))
        roots = _Gathering(self, children, count, len(parents)).gathered(in_order(roots, order))
        for parent, siblings in children.siblings():
            children.put(parent, in_order(siblings, order))
        return Forest(count, in_order(roots, order), children)

    def subject(self, node: int, children: Children) -> int:
        """The subject of a thread."""
        return self._subjects[node if node < len(self._dates) else children.get(node)[0]]

    def is_reply(self, node: int) -> bool:
        """Whether a message's subject is one of a reply."""
        return node < len(self._dates) and bool(self._replies[node])


class _Order:
    """The key by which siblings are sorted: sent date, then number; of a dummy those of its first child. One number: a tuple
    takes twice the memory."""

    def __init__(self, dates: Sequence[int], children: Children, count: int) -> None:
        self._dates, self._children, self._count = dates, children, count

    def __call__(self, node: int) -> int:
        if node >= self._count:
            return min(self._dates[one] << 32 | one for one in self._children.get(node))
        return self._dates[node] << 32 | node


def _pruned(parents: Sequence[int], count: int) -> tuple[list[int], Children]:
    """Step 3: roots, and children by their parents, without dummies but those that keep several threads together."""
    below, children = Children(len(parents)), Children(len(parents))
    for node, parent in enumerate(parents):
        if parent != NONE:
            below.add(parent, node)
    roots: list[int] = []
    for top in (node for node, parent in enumerate(parents) if parent == NONE):
        todo = [(top, top)]  # nodes, and of which node their children are children
        while todo:
            node, holder = todo.pop()
            for child in below.get(node):
                if child < count:
                    children.add(holder, child)
                todo.append((child, child if child < count else holder))
        if top < count or len(children.get(top)) > 1:
            roots.append(top)
        else:
            roots += children.take(top)
    return roots, children


class _Gathering:
    """Step 5: threads with the same subject become one."""

    def __init__(self, threads: Threads, children: Children, count: int, free: int) -> None:
        """`free`: the first number of a node that is not in use."""
        self._threads, self._children, self._count, self._next = threads, children, count, free

    def gathered(self, roots: list[int]) -> list[int]:
        """The roots that are left."""
        table: dict[int, int] = {}
        subjects = array("Q", (self._threads.subject(root, self._children) for root in roots))
        for root, subject in zip(roots, subjects, strict=True):
            if subject and (subject not in table or self._better(root, table[subject])):
                table[subject] = root
        kept: dict[int, None] = {}
        below: set[int] = set()  # a dummy that was made for them
        for root, subject in zip(roots, subjects, strict=True):
            if root in below:
                continue
            head = table.get(subject, root)
            if head == root:
                kept[root] = None
                continue
            merged = self._merged(root, head)
            if merged != head:
                table[subject] = merged
                kept.pop(head, None)
                below.add(head)
            kept[merged] = None
        return list(kept)

    def _better(self, root: int, head: int) -> bool:
        """Whether a thread is rather the head of its subject than another one (5.B)."""
        if head >= self._count:
            return False
        return root >= self._count or (self._threads.is_reply(head) and not self._threads.is_reply(root))

    def _merged(self, root: int, head: int) -> int:
        """The head of a subject, when a thread has been merged with it (5.C)."""
        children, dummy = self._children, root >= self._count
        if head >= self._count:
            for one in children.take(root) if dummy else (root,):
                children.add(head, one)
            return head
        if self._threads.is_reply(root) and not self._threads.is_reply(head):
            children.add(head, root)
            return head
        new, self._next = self._next, self._next + 1
        children.put(new, [head, root])
        return new


class _Links:
    """Step 1: which message is whose parent."""

    def __init__(self) -> None:
        self._nodes: dict[int, int] = {}  # by key: below 0 where no message of it has come yet, -1 - its place among the missing
        self._parent = array("i")  # by place; places are given to messages and to those that are missing as they come
        self._message: array[int] = array("i")  # by place: its number; NONE: it is missing
        self._has_child = bytearray()
        self._count = 0
        self._trees = _Trees()

    def __len__(self) -> int:
        return len(self._parent)

    def add(self, keys: Sequence[int]) -> None:
        """A message: its key (0: none), and those of the messages that it refers to."""
        own = keys[0] if len(keys) else 0
        place = self._nodes.get(own, NONE) if own else NONE
        if place == NONE or self._message[place] != NONE:
            place = self._new(own if own and place == NONE else 0)
        self._message[place] = self._count
        self._count += 1
        before = NONE
        for key in keys[1:]:
            found = self._nodes.get(key, NONE)
            if found == NONE:
                found = self._new(key)
            if before != NONE and self._parent[found] == NONE:
                self._link(found, before)
            before = found
        if self._parent[place] != before:
            if self._parent[place] != NONE:
                self._trees.cut(place)
                self._parent[place] = NONE
            if before != NONE:
                self._link(place, before)

    def _new(self, key: int) -> int:
        place = len(self._parent)
        if key:
            self._nodes[key] = place
        self._parent.append(NONE)
        self._message.append(NONE)
        self._has_child.append(0)
        self._trees.add()
        return place

    def _link(self, child: int, parent: int) -> None:
        """Make a node that has no parent the child of another, unless that is below it."""
        if child == parent or (self._has_child[child] and self._trees.root(parent) == child):
            return
        self._trees.link(child, parent)
        self._parent[child] = parent
        self._has_child[parent] = 1

    def parents(self) -> Sequence[int]:
        """By node, its parent, or NONE: messages first, by their numbers, then those that are missing."""
        nodes, missing = array("i"), self._count
        for message in self._message:
            nodes.append(message if message != NONE else missing)
            missing += message == NONE
        found = array("i", [NONE]) * len(nodes)
        for place, parent in enumerate(self._parent):
            found[nodes[place]] = nodes[parent] if parent != NONE else NONE
        return found


class _Trees:
    """Trees that are linked and cut, whose roots are found in log n, amortized: paths are splay trees, ordered by depth."""

    def __init__(self) -> None:
        self._up = array("i")  # in the splay tree; of its root: the parent of the path
        self._left = array("i")
        self._right = array("i")

    def add(self) -> None:
        """Another node."""
        for one in (self._up, self._left, self._right):
            one.append(NONE)

    def link(self, child: int, parent: int) -> None:
        """Put a root below a node of another tree."""
        self._access(child)
        self._up[child] = parent

    def cut(self, node: int) -> None:
        """Make a root of a node that is none."""
        self._access(node)
        above = self._left[node]
        self._up[above] = NONE
        self._left[node] = NONE

    def root(self, node: int) -> int:
        """The root of a node's tree."""
        self._access(node)
        while self._left[node] != NONE:
            node = self._left[node]
        self._splay(node)
        return node

    def _access(self, node: int) -> None:
        """Make the path from the root to a node one splay tree, with the node at its top and nothing below it."""
        below, at = NONE, node
        while at != NONE:
            self._splay(at)
            self._right[at] = below
            below, at = at, self._up[at]
        self._splay(node)

    def _is_top(self, node: int) -> bool:
        up = self._up[node]
        return up == NONE or (self._left[up] != node and self._right[up] != node)

    def _splay(self, node: int) -> None:
        while not self._is_top(node):
            up = self._up[node]
            if not self._is_top(up):
                above = self._up[up]
                straight = (self._left[up] == node) == (self._left[above] == up)
                self._rotate(up if straight else node)
            self._rotate(node)

    def _rotate(self, node: int) -> None:
        up = self._up[node]
        above = self._up[up]
        if not self._is_top(up):
            side = self._left if self._left[above] == up else self._right
            side[above] = node
        one, other = (self._left, self._right) if self._left[up] == node else (self._right, self._left)
        moved = other[node]
        one[up] = moved
        if moved != NONE:
            self._up[moved] = up
        other[node] = up
        self._up[up] = node
        self._up[node] = above


def shown(forest: Forest, number: Callable[[int], int]) -> Iterator[bytes]:
    """The THREAD response, in pieces. `number`: what a message is called in it, by its number among those added."""
    yield b"* THREAD "[: None if forest.roots else -1]
    out: list[bytes] = []
    todo: list[int] = []  # nodes and parentheses to be told, the next one last
    for root in forest.roots:
        todo += [CLOSE, root, OPEN]
        while todo:
            node = todo.pop()
            if node < 0:
                out.append(b"(" if node == OPEN else b")")
                continue
            below = forest.children.get(node)
            if node < forest.messages:
                out.append(b"%d " % number(node) if below else b"%d" % number(node))
            if len(below) == 1:
                todo.append(below[0])
            else:
                for child in reversed(below):
                    todo += [CLOSE, child, OPEN]
            if len(out) >= PIECE:
                yield b"".join(out)
                out = []
    yield b"".join(out) + b"\r\n"
