"""A cluster on this machine: its ports."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster import local
from cluster.local import LocalCluster, local_cluster


def test_no_port_is_one_that_a_connection_may_get_or_that_has_a_server_on_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not come up where one of its ports is taken."""
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(ephemeral.read_text().split()[0]) if ephemeral.exists() else 49_152
    ports = local.free_ports(8)
    assert len({*ports}) == 8 and all(19_999 < port < first for port in ports)

    monkeypatch.setattr(local, "_SERVERS", sorted(ports))
    with ExitStack() as held:
        for port, address in zip(ports[:2], ("127.0.0.1", "0.0.0.0"), strict=True):
            held.enter_context(socket.create_server((address, port)))
        assert {*local.free_ports(6)} == {*ports[2:]}
        with pytest.raises(OSError, match=r"7 ports from \d+ to \d+ are not free"):
            local.free_ports(7)


def test_a_cluster_that_meets_a_port_of_somebody_else_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports are free when they are chosen, and not yet taken; who comes between has Ray wait for ever."""
    free_ports, chosen = local.free_ports, list[list[int]]()
    with ExitStack() as held:

        def one_is_taken_at_first(number: int) -> list[int]:
            ports = free_ports(number)
            if not chosen:
                held.enter_context(socket.create_server(("127.0.0.1", ports[0])))
            elif len(chosen) == 2:
                monkeypatch.setattr(local, "_START_SECONDS", 120)  # the second attempt may be a slow one
            chosen.append(ports)
            return ports

        monkeypatch.setattr(local, "free_ports", one_is_taken_at_first)
        monkeypatch.setattr(local, "_START_SECONDS", 5)
        with local_cluster(LocalCluster(nodes=0)) as cluster:
            assert cluster.living() == 1
            assert cluster.port != chosen[0][0] and cluster.environment["RAY_ADDRESS"].endswith(f":{cluster.port}")
    assert not cluster.folder.exists() and not cluster.processes
