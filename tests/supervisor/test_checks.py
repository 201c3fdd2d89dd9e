"""What a start finds out before it begins, and `config check` before a start."""

import pytest

from relaymta.config import load
from relaymta.errors import ConfigError
from relaymta.supervisor import checks

LISTENER = '[[listener]]\naddress = "127.0.0.1:25"\n'


def loaded(folder, text):
    path = folder / "r.toml"
    path.write_text(text)
    return path, load(path, {})


def test_a_route_map_that_the_relays_user_may_not_read_is_a_problem(tmp_path, monkeypatch):
    """A worker would not start; root has read it before."""
    path, config = loaded(tmp_path, f'route_map = "{tmp_path}/map"\n{LISTENER}')
    (tmp_path / "map").write_text("")
    checks.check_files(config)

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks, "open", refused, raising=False)
    with pytest.raises(ConfigError) as found:
        checks.check_files(config)
    assert found.value.problems == [f"{path}:1: route_map: {tmp_path}/map: Permission denied"]


def test_what_mail_is_sent_from_and_to_is_looked_at(tmp_path):
    (tmp_path / "there").touch()
    path, config = loaded(
        tmp_path,
        f'{LISTENER}[[source]]\nname = "a"\naddress = "192.0.2.77"\n[[source]]\nname = "b"\naddress = "127.0.0.1"\n'
        f'[[route]]\nprotocol = "lmtp"\nhosts = ["unix:{tmp_path}/there", "unix:{tmp_path}/gone"]\n',
    )
    assert checks.absent_places(config) == [
        f"{path}:5: source.0.address: 192.0.2.77 is not an address of this machine: it is used once it is",
        f"{path}:11: route.0.hosts: {tmp_path}/gone: No such file or directory",
    ]
