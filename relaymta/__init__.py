"""A relay MTA: accepts mail by SMTP, makes it safe on disk before it replies 250, and delivers it over reused connections."""

__version__ = "0.1.0"
