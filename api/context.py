"""What the routes share: settings, database, decoded windows, and whether the server is stopping."""

import threading
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from api.settings import Settings
from api.windowcache import WindowCache
from db.session import Database


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    windows: WindowCache
    stopping: threading.Event = field(default_factory=threading.Event)


def services(request: Request) -> Services:
    """The app's services."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


ServicesDep = Annotated[Services, Depends(services)]
