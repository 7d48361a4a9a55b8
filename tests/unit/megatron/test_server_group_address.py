"""Where rank 0 waits for the servers."""

from __future__ import annotations

from opd_megatron.megatron.server_group import address_towards


def test_a_server_beside_the_learner_is_met_on_loopback() -> None:
    assert address_towards("127.0.0.1", 30000) == "127.0.0.1"
    assert address_towards("localhost", 30000) in ("127.0.0.1", "::1")
