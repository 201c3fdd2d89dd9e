"""A relay MTA: takes mail by SMTP, makes it safe on disk before it says 250, delivers it over reused connections."""

__version__ = "0.1.0"
