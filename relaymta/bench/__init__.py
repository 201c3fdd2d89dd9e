"""`relaymta bench`: a load for a relay, a sink behind it that misbehaves as other servers do, and a ledger of every message.

messages.py what is sent, load.py how it is asked for; generator.py the SMTP client; profile.py faults of the sink, sink.py the
sink itself; ledger.py what was sent beside what has arrived; processes.py CPU and memory; peers.py relays that are started here;
trial.py one run; report.py its figures, html.py its plots.
"""
