from relaymta._speedups.octets import Octets

class Addresses:
    def __init__(self, out: Octets) -> None: ...
