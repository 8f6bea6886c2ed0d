"""The API's documentation is whole on a machine that is off the network."""

from __future__ import annotations

import re

from tests.service import Service


def test_the_docs_page_loads_nothing_from_elsewhere(service: Service) -> None:
    page = service.client.get("/docs")
    assert page.status_code == 200
    assert "Numerics Advisor" in page.text
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(assets) >= 2
    for asset in assets:
        assert asset.startswith("/"), asset
        assert service.client.get(asset).status_code == 200, asset
