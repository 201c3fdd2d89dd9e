"""What `relaymta doctor` checks of the configuration itself: its mistakes, open relays, and whether filters answer."""

import ipaddress

from relaymta.cli.doctor_names import default_addresses
from relaymta.cli.doctor_scene import Row, Scene, first_of
from relaymta.config import parse_hostport
from relaymta.config.checks import open_to_all
from relaymta.config.values import is_loopback

__all__ = ["configuration", "filters", "open_relay"]

MOST = 8.0  # seconds for a filter


def configuration(scene: Scene) -> list[Row]:
    """The mistakes in the configuration file, as `relaymta config check` finds them without a look at anything else."""
    more = f"relaymta config check{scene.options}"
    if scene.problems:
        found = first_of(list(scene.problems), more)
        cure = ": write it, or name another one (-c FILE)" if found.endswith(": No such file or directory") else ""
        return [("configuration", "wrong", found + cure)]
    if not scene.given:
        cure = "name one (-c FILE), or write /etc/relaymta/relaymta.toml"
        return [("configuration", "warning", f"there is none, so that only this machine is checked: {cure}")]
    if scene.notes:
        return [("configuration", "warning", first_of(list(scene.notes), more))]
    return [("configuration", "ok", "valid")]


def open_relay(scene: Scene) -> list[Row]:
    """Whether anybody may send to any domain. Without relay.open_relay no such configuration is valid."""
    config = scene.config
    if not config.relay.open_relay:
        return [("open relay", "ok", f"only {len(config.relay.networks)} networks, and who logs in, may send to any domain")]
    found = [what for _, what in open_to_all(config)]
    if not found:
        return [("open relay", "warning", "relay.open_relay = true, and the networks do not need it: remove the key")]
    open_ones = [one for one in config.listener if one.auth != "require" and not one.reads_mail]
    hosts = [parse_hostport(one.address)[0] for one in open_ones]
    reached = [host for host in hosts if not is_loopback(host)]
    own = [*default_addresses(), *(host for host in reached if host not in ("0.0.0.0", "::"))]
    public = any(_is_global(address) for address in own)
    cure = "give your own networks in relay.networks, and remove relay.open_relay"
    if not reached or not public:
        why = "which listens on loopback addresses only" if not reached else "whose addresses are private"
        return [("open relay", "warning", f"{found[0]}, on this machine, {why}: {cure}, before others can reach it")]
    return [("open relay", "wrong", f"{found[0]}: {cure}")]


def _is_global(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def filters(scene: Scene) -> list[Row]:
    """Whether the filters answer."""
    from relaymta.cli.filter import silent

    own = scene.config.filter
    shorter = [one.model_copy(update={"timeout": min(one.timeout, MOST)}) for one in own]
    found = silent(scene.config.model_copy(update={"filter": shorter}))
    if found:
        cure = f"see whether they run, and `relaymta filter check{scene.options}`"
        return [("filters", "warning", f"{first_of(scene.config.located(found), 'relaymta config check')}: {cure}")]
    return [("filters", "ok", f"{', '.join(one.name for one in own)}: all answer")]
