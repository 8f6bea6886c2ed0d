"""Alembic's entry: runs the revisions on the connection that db.migrate hands over."""

from typing import Any, Literal

from alembic import context
from sqlalchemy.types import TypeDecorator

from db.tables import Table


def render_item(kind: str, item: Any, _autogen_context: Any) -> str | Literal[False]:
    """Write a column type of ours as the plain type below it: a revision stays as it is when ours change."""
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{type(item.impl_instance).__name__}()"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_item=render_item,
    transactional_ddl=True,
)
context.run_migrations()
