"""How many different ones there are of what is seen one by one, within 2 % or so, in 4 KB: HyperLogLog (Flajolet and others,
2007), with linear counting where there are few."""

import math

__all__ = ["Sketch"]

_BITS = 12
REGISTERS = 1 << _BITS
_MASK = REGISTERS - 1
_HIGHEST = 64 - _BITS + 1
_ALPHA = 0.7213 / (1 + 1.079 / REGISTERS)
FEW = 600  # registers that are kept one by one: as many octets as there would be in all


class Sketch:
    """Of hashes of 64 bits. Two that have seen parts of the same are one that has seen all of it, in any order (`merge`)."""

    __slots__ = ("_few", "_registers")

    def __init__(self, octets: bytes = b"") -> None:
        """`octets`: what `dump` has returned; ValueError when they are not."""
        self._few: dict[int, int] = {}
        self._registers: bytearray | None = None  # once there are too many for `_few`
        if len(octets) == REGISTERS:
            self._registers = bytearray(octets)
        else:
            if len(octets) % 3 or len(octets) > 3 * FEW:
                raise ValueError(f"{len(octets)} octets are no sketch")
            for at in range(0, len(octets), 3):
                self._few[int.from_bytes(octets[at : at + 2], "big") & _MASK] = octets[at + 2]
        if max(self._registers or self._few.values(), default=0) > _HIGHEST:
            raise ValueError("no register has such a rank")

    def add(self, hashed: int) -> None:
        """One has been seen."""
        self._set(hashed & _MASK, _HIGHEST - (hashed >> _BITS).bit_length())

    def _set(self, register: int, rank: int) -> None:
        if self._registers is not None:
            if rank > self._registers[register]:
                self._registers[register] = rank
        elif rank > self._few.get(register, 0):
            self._few[register] = rank
            if len(self._few) > FEW:
                self._registers = bytearray(REGISTERS)
                for known, there in self._few.items():
                    self._registers[known] = there
                self._few = {}

    def merge(self, other: "Sketch") -> None:
        """It has seen what the other one has, too."""
        pairs = other._few.items() if other._registers is None else enumerate(other._registers)
        for register, rank in pairs:
            if rank:
                self._set(register, rank)

    def count(self) -> int:
        """How many it has seen."""
        if self._registers is None:
            zeros, total = REGISTERS - len(self._few), sum(2.0**-rank for rank in self._few.values())
        else:
            counts = [self._registers.count(rank) for rank in range(_HIGHEST + 1)]
            zeros, total = counts[0], sum(number * 2.0**-rank for rank, number in enumerate(counts) if rank)
        estimate = _ALPHA * REGISTERS * REGISTERS / (total + zeros)
        if estimate <= 2.5 * REGISTERS and zeros:
            estimate = REGISTERS * math.log(REGISTERS / zeros)
        return round(estimate)

    def dump(self) -> bytes:
        """All of it: 3 octets a register that is kept one by one, or REGISTERS."""
        if self._registers is not None:
            return bytes(self._registers)
        return b"".join(register.to_bytes(2, "big") + bytes([rank]) for register, rank in sorted(self._few.items()))
