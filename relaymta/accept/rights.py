"""Who the client of a connection is, and what follows from it: its address (from the connection, a PROXY header or XCLIENT), and
the authenticated user.

Each of the two has one owner and one end:

    Rights    begins in `admit` with a place among the connections       ends with `end`: the connection's end
    Login     begins in `log_in` with a place among the account's       ends with `log_out`: XCLIENT, STARTTLS, another login,
                                                                        or the end of the rights

The dialogue with filters that follow the client begins with its first message, or, where they have something to look up, now;
it ends whenever one of the two is another one.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from relaymta.accept.admission import Admission
from relaymta.accept.lmtp import FiledTransaction
from relaymta.accept.origin import Client, Origin, spoken
from relaymta.accept.transaction import Flow, IncomingTransaction
from relaymta.auth.identity import Identity
from relaymta.config import Listener
from relaymta.filter.judgement import Mail, Text
from relaymta.proto import reply
from relaymta.proto.sasl import Keys
from relaymta.proto.session import Host, Session
from relaymta.proto.transaction import NOBODY, Transaction
from relaymta.reservation import Reservation

if TYPE_CHECKING:
    from relaymta.filter.dialogue import Dialogue

__all__ = ["Login", "Rights"]

OF_CLIENTS = frozenset({"CONNECT", "HELO", "AUTH"})  # what filters are asked about clients that send nothing yet


class Login:
    """An authenticated user of one connection, who holds a place among the connections of the account."""

    __slots__ = ("_place", "identity")

    def __init__(self, identity: Identity, place: Reservation | None) -> None:
        self.identity = identity
        self._place = place

    @classmethod
    def begin(cls, identity: Identity, admission: Admission) -> "Login | bytes":
        """A login; or the 454 when the account has too many connections."""
        place = None
        if identity.connections:
            limit = f"logged in as {identity.name}"
            if not admission.limits.take(limit, identity.connections):
                text = f"Too many connections of {identity.name} (limit connections {identity.connections}); try again later"
                return reply.format_reply(454, "4.7.0", text)
            place = Reservation(partial(admission.limits.give, limit))
        return cls(identity, place)

    def end(self) -> None:
        """Further calls do nothing."""
        if self._place is not None:
            self._place.give_back()


class Rights(Host):
    """The client of one connection. `client`: the rules for its address; `login`: its user. `limits`, `user` and `origin` follow
    from these two."""

    __slots__ = ("_admission", "_dialogue", "_flow", "_listener", "_place", "_proxy", "client", "login", "origin")

    def __init__(self, admission: Admission, listener: Listener, flow: Flow | None, client: Client, place: Reservation) -> None:
        super().__init__(client.limits)
        self._admission = admission
        self._flow = flow
        self._place = place
        self._proxy: Client | None = None  # that named `client` by XCLIENT
        self._listener = listener
        self._dialogue: Dialogue | None = None
        self.client = client
        self.login: Login | None = None
        self._settle()

    @classmethod
    def admit(
        cls, admission: Admission, listener: Listener, flow: Flow | None, client: Client, is_client: bool = True
    ) -> "Rights | bytes":
        """The rights of a new connection, which is counted from now on; or the reply that rejects it. `is_client`: see
        `Admission.enter`."""
        place = admission.enter(client, is_client)
        return place if isinstance(place, bytes) else cls(admission, listener, flow, client, place)

    @property
    def admitted(self) -> bool:
        """Whether the connection is counted: `end` was not called."""
        return self._place.held

    @property
    def useless(self) -> bool:
        """Whether the client can do nothing here: it may not deliver by LMTP, and nothing that it might say would change that."""
        offers, origin = self.offers, self.origin
        return offers.lmtp and not (origin.may_relay or offers.mechanisms or offers.xclient)

    def end(self) -> None:
        """The connection has ended: give back all places. Called wherever that may be noticed first; further calls do nothing."""
        self._place.give_back()
        self.log_out()
        self._end_dialogue()

    def _end_dialogue(self) -> None:
        dialogue, self._dialogue = self._dialogue, None
        if dialogue is not None:
            dialogue.end()

    def detach(self) -> None:
        """The connection is closed: no transaction begins any more. Connection and rights refer to each other until then; left to
        the garbage collector, each connection would cost it some time."""
        self._flow = None

    def _settle(self) -> None:
        """The client or the login has changed."""
        self._end_dialogue()
        identity = self.login.identity if self.login is not None else None
        self.limits = self.client.limits
        self.origin = Origin.of(self.client, identity, self._listener)
        self.user = self.origin.user
        chains = self._admission.endpoint.chains
        if chains is not None and not self._listener.filtered:
            chain = chains.chain_for(self._listener, self.client.address, self.origin.application, self.origin.may_relay)
            self.origin = self.origin._replace(chain=chain)
            if chain is not None and chain.begins and self.admitted and self._flow is not None:  # None: it sends no mail
                self._dialogue = chain.dialogue(self.client.address)
        self.domain = self.origin.domain
        chain = self.origin.chain
        self.asks_client = NOBODY if chain is None or self._dialogue is None else chain.asks & OF_CLIENTS

    async def asked(self, verb: str, session: Session) -> bytes | None:
        """What filters that follow the client say to CONNECT, HELO or AUTH: the refusal, or None. Cancelled: no filter is left in
        the middle of it."""
        dialogue, chain = self._dialogue, self.origin.chain
        if dialogue is None or chain is None:
            return None
        origin, exchange = self.origin, session.exchange
        mechanism = exchange.mechanism if exchange is not None else session.mechanism if self.user else ""
        mail = Mail(
            "", "", (), self.client.address, session.helo, self.user, session.tls, Text(b""), mechanism=mechanism,
            listener=origin.listener, protocol=spoken(origin, session), application=origin.application,
        )  # fmt: skip
        found = await dialogue.client(verb, mail)
        if found is None:
            return None
        answer = chain.reply(found)
        if verb == "CONNECT":  # RFC 5321 4.3.2: of a greeting there are no other codes
            answer = (b"554" if answer.startswith(b"5") else b"421") + answer[3:]
        self._admission.intake.client_not_wanted(verb, origin, session, answer)
        return answer

    # What the session asks

    def begin(self, session: Session, sender: str, size: int, smtputf8: bool) -> Transaction | bytes:
        intake, login, flow = self._admission.intake, self.login, self._flow
        assert flow is not None  # nothing is parsed once the connection is closed
        if self.origin.lmtp and not self.origin.may_relay:
            return reply.LMTP_DENIED
        if login is not None and login.identity.senders and sender and not login.identity.may_send_as(sender):
            identity = login.identity
            denied = reply.format_reply(550, "5.7.1", f"{identity.name} may not send as <{sender}> ({identity.said_by})")
            return reply.for_now(denied) if identity.unsure else denied
        refused = intake.accept_sender(self.origin, size)
        if refused is not None:
            return refused
        made = FiledTransaction if self.origin.lmtp else IncomingTransaction
        transaction = made(sender, smtputf8, self.origin, session, flow, self._admission)
        chain = self.origin.chain
        if chain is not None and chain.follows:
            self._dialogue = self._dialogue or chain.dialogue(self.client.address)
            transaction.dialogue, transaction.asks = self._dialogue, chain.asks
        return transaction

    def keys(self, user: str) -> Keys:
        return self._admission.endpoint.keys(user)

    def assume(self, attributes: dict[str, str]) -> bytes | None:
        """One whose address is unknown, now and before, has the rights of an unauthenticated client."""
        intake, before = self._admission.intake, self.client
        proxy = self._proxy or before
        address = attributes.get("ADDR", "")
        if address.upper().startswith("IPV6:"):
            address = address[5:]
        client = before
        try:
            if address:
                client = intake.client(address)
            elif "ADDR" in attributes or self._proxy is None:
                client = intake.unknown_client(proxy.address)
        except ValueError:
            return reply.BAD_ARGUMENT
        if client is not before:
            self._place.give_back()
            place = self._admission.enter(client)
            if isinstance(place, bytes):
                return place
            self._place, self.client = place, client
            self.offers = replace(self.offers, xforward=client.xforward)
            self._settle()
        self._proxy = proxy
        if client is before and not attributes.keys() & {"ADDR", "LOGIN"}:
            return None
        login = attributes.get("LOGIN", "")
        if login:
            return self.log_in(self._admission.endpoint.logins.with_account(Identity(login)))
        self.log_out()
        return None

    def log_in(self, identity: Identity) -> bytes | None:
        """The client is this user from now on. The 454 when the account has too many connections, which leaves it
        unauthenticated; or None."""
        self.log_out()
        login = Login.begin(identity, self._admission)
        if isinstance(login, bytes):
            return login
        self.login = login
        self._settle()
        return None

    def log_out(self) -> None:
        """Nobody is authenticated from now on."""
        login, self.login = self.login, None
        if login is not None:
            login.end()
            self._settle()
