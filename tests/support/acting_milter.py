"""A milter on libmilter (pymilter; run by Debian's python3): `acting_milter.py SOCKET LOG`. It writes what it is told into LOG, a
line of JSON each, and does what the message's X-Act fields and the words in addresses say."""

# mypy: ignore-errors

import json
import sys

import Milter

FLAGS = Milter.ADDHDRS | Milter.CHGHDRS | Milter.CHGBODY | Milter.ADDRCPT | Milter.DELRCPT | Milter.CHGFROM | Milter.QUARANTINE
LINE = "a line of a new body " * 40 + "\n"
MACROS = ("j", "_", "i", "v", "{auth_type}", "{auth_authen}", "{tls_version}", "{cipher}", "{rcpt_addr}", "{daemon_addr}")


class Acting(Milter.Base):
    def told(self, event, *what):
        known = {name: value for name in MACROS if (value := self.getsymval(name))}
        with open(sys.argv[2], "a") as log:
            log.write(json.dumps([id(self), event, *what, known]) + "\n")

    def said(self, text):
        """What an address or a name asks for."""
        for word, answer in (("accept", Milter.ACCEPT), ("discard", Milter.DISCARD), ("tempfail", Milter.TEMPFAIL)):
            if word in text:
                return answer
        if "reject" in text:
            if "own" in text:
                self.setreply("550", "5.1.1", f"100%% not {text.strip('<>')}")
            return Milter.REJECT
        return Milter.CONTINUE

    def connect(self, host, family, address):
        self.told("C", host, address)
        return Milter.CONTINUE

    def hello(self, name):
        self.told("H", name)
        return self.said(name)

    def envfrom(self, sender, *parameters):
        self.told("M", sender, *parameters)
        self.acts, self.header_of, self.octets = [], [], []
        return self.said(sender)

    def envrcpt(self, recipient, *parameters):
        self.told("R", recipient)
        return self.said(recipient)

    def data(self):
        self.told("T")
        return Milter.CONTINUE

    def header(self, name, value):
        self.header_of.append([name, value])
        if name == "X-Act":
            self.acts.append(value)
        return Milter.CONTINUE

    def eoh(self):
        self.told("N", self.header_of)
        return Milter.CONTINUE

    def body(self, piece):
        self.octets.append(len(piece))
        return Milter.CONTINUE

    def eom(self):
        self.told("E", sum(self.octets))
        answer = Milter.CONTINUE
        for act in self.acts:
            word, _, rest = act.partition(" ")
            if word == "add":
                self.addheader(*rest.split("=", 1))
            elif word == "insert":
                at, _, field = rest.partition(" ")
                self.addheader(*field.split("=", 1), int(at))
            elif word == "change":
                at, _, field = rest.partition(" ")
                name, _, value = field.partition("=")
                self.chgheader(name, int(at), value)
            elif word == "body":
                for _ in range(int(rest) // 65000 + 1):
                    self.replacebody(LINE * (min(int(rest), 65000) // len(LINE)))
            elif word == "to":
                self.addrcpt(rest)
            elif word == "not-to":
                self.delrcpt(rest)
            elif word == "from":
                self.chgfrom(rest)
            elif word == "quarantine":
                self.quarantine(rest)
            elif word == "progress":
                self.progress()
            elif word == "exit":
                import os

                os._exit(1)
            else:
                answer = self.said(act)
        return answer

    def abort(self):
        self.told("A")
        return Milter.CONTINUE

    def close(self):
        self.told("Q")
        return Milter.CONTINUE


Milter.factory = Acting
Milter.set_flags(FLAGS)
Milter.runmilter("acting", sys.argv[1], 300)
