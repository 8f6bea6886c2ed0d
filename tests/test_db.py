"""The store: one migration history, scopes that commit whole or not at all, numbers that survive."""

import json
import math
import sqlite3
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from db import migrate
from db.errors import NameTaken, NotFound, SchemaMismatch, StaleAttempt, StillRunning
from db.session import Database
from db.store import events, idempotency, jobs, models, plans, runs, windows
from db.store.windows import PackedSketch
from db.tables import Event, Job, Model, Sketch, Window
from db.types import now

LEASE = timedelta(seconds=60)


def add_model(database: Database, name: str = "m") -> str:
    with database.writing() as session:
        return models.add(session, name=name, kind="external", spec=None, parameters=None).id


def add_window_job(database: Database, model_id: str) -> str:
    with database.writing() as session:
        window = windows.add(session, model_id=model_id, request={"steps": 2})
        return jobs.add(session, kind="window", model_id=model_id, window_id=window.id).id


# Schema


def test_migrations_make_exactly_the_tables_of_the_classes(database: Database) -> None:
    assert migrate.current(database) == migrate.head()
    assert migrate.drift(database) == []


def test_a_column_that_no_migration_makes_is_drift(database: Database) -> None:
    with database.connection() as connection:
        connection.execute(text("ALTER TABLE models DROP COLUMN parameters"))
    assert any("parameters" in str(difference) for difference in migrate.drift(database))


def test_downgrade_of_the_whole_history_leaves_nothing(database: Database) -> None:
    from alembic import command

    with database.connection() as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with database.reading() as session:
        tables = set(session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")))
    assert tables <= {"alembic_version"}


def test_two_upgrades_at_once_make_one_schema(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'both.sqlite'}"
    failures: list[Exception] = []

    def upgrade() -> None:
        opened = Database(url)
        try:
            migrate.upgrade(opened)
        except Exception as error:
            failures.append(error)
        finally:
            opened.close()

    threads = [threading.Thread(target=upgrade) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_empty_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    opened = Database(f"sqlite:///{tmp_path / 'empty.sqlite'}")
    with pytest.raises(SchemaMismatch, match="advisor serve"):
        migrate.check(opened)
    opened.close()


def test_sqlite_is_in_wal_mode_with_foreign_keys(database: Database) -> None:
    with database.reading() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1
    with pytest.raises(IntegrityError), database.writing() as session:
        windows.add(session, model_id="mdl_none", request=None)


# Scopes


def test_a_scope_that_raises_leaves_nothing(database: Database) -> None:
    def two_of_one_name() -> None:
        with database.writing() as session:
            models.add(session, name="half", kind="external", spec=None, parameters=None)
            models.add(session, name="half", kind="external", spec=None, parameters=None)

    with pytest.raises(NameTaken):
        two_of_one_name()
    with database.reading() as session, pytest.raises(NotFound, match="half"):
        models.get(session, "half")


def test_what_a_reader_changes_is_thrown_away(database: Database) -> None:
    model_id = add_model(database)
    with database.reading() as session:
        models.get(session, model_id).name = "other"
        session.flush()
    with database.reading() as session:
        assert models.get(session, model_id).name == "m"


def test_a_second_writer_waits_for_the_first(database: Database) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with database.writing() as session:
            models.add(session, name="second", kind="external", spec=None, parameters=None)
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with database.writing() as session:
        models.add(session, name="first", kind="external", spec=None, parameters=None)
        inside.set()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# Numbers


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 0.1, -2.5, 5e-324, 1.7976931348623157e308])
def test_any_float_comes_back_bit_for_bit(database: Database, loss: float) -> None:
    job_id = add_window_job(database, add_model(database))
    with database.writing() as session:
        events.add_step(session, job_id, 1, phase="plan", step=1, loss=loss, data={"loss": loss, "n": [loss]})
    with database.reading() as session:
        (point,) = events.curve(session, job_id, "plan")
        newest = events.last_step(session, job_id)
    assert newest is not None
    for back in (point.loss, newest.data["loss"], newest.data["n"][0]):
        assert isinstance(back, float)
        assert repr(back) == repr(loss)


def test_null_stays_null_and_is_not_nan(database: Database) -> None:
    job_id = add_window_job(database, add_model(database))
    with database.writing() as session:
        events.add_step(session, job_id, 1, phase="plan", step=1, loss=None, data={"word": "NaN"})
    with database.reading() as session:
        assert events.curve(session, job_id, "plan") == []
        newest = events.last_step(session, job_id)
    assert newest is not None
    assert newest.data == {"word": "NaN"}


def test_json_in_the_file_is_strict(database: Database) -> None:
    job_id = add_window_job(database, add_model(database))
    with database.writing() as session:
        events.add_step(session, job_id, 1, phase="plan", step=1, loss=math.nan, data={"loss": math.nan})
    assert database.engine.url.database is not None
    with sqlite3.connect(database.engine.url.database) as plain:
        ((data, loss),) = plain.execute("SELECT data, loss FROM events WHERE kind = 'step'").fetchall()
    plain.close()
    assert loss == "NaN"

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(data, parse_constant=refuse) == {"loss": {"$float": "NaN"}}


def test_a_time_without_a_zone_is_refused(database: Database) -> None:
    with pytest.raises(Exception, match="no time zone"), database.writing() as session:
        session.add(Model(id="x", name="x", kind="external", created_at=datetime(2026, 1, 1)))


# Models, windows, sketches


def test_names_are_unique_and_say_what_to_do(database: Database) -> None:
    add_model(database, "m")
    with pytest.raises(NameTaken, match="choose another name"):
        add_model(database, "m")


def test_pages_hold_every_model_once(database: Database) -> None:
    names = [f"m{i}" for i in range(7)]
    for name in names:
        add_model(database, name)
    seen, after = [], None
    with database.reading() as session:
        while True:
            rows, after = models.listed(session, after, 3)
            seen += [row.name for row in rows]
            if after is None:
                break
    assert seen == names[::-1]


def test_a_window_is_recorded_whole_and_once(database: Database) -> None:
    model_id = add_model(database)
    with database.writing() as session:
        window_id = windows.add(session, model_id=model_id, request=None).id
    sketches = [PackedSketch("b", "input", b"123"), PackedSketch("a", "weight", b"4567")]
    with database.writing() as session:
        windows.record(session, window_id, summary={"steps": [0]}, header=b"{}", sketches=sketches, checkpoint=None)
    with database.reading() as session:
        assert windows.sketches(session, window_id) == sketches
        assert windows.sketch(session, window_id, "a", "weight") == b"4567"
        assert windows.sketch(session, window_id, "a", "input") is None
        assert windows.header(session, window_id) == b"{}"
        assert windows.stored(session, [window_id])[window_id].sketch_bytes == 7
        latest = windows.latest_recorded(session, model_id)
    assert latest is not None
    assert latest.id == window_id
    with pytest.raises(NotFound, match="waits to be recorded"), database.writing() as session:
        windows.record(session, window_id, summary={}, header=b"", sketches=[], checkpoint=None)


def test_one_slot_is_read_by_its_key(database: Database) -> None:
    with database.reading() as session:
        plan = session.execute(
            text("EXPLAIN QUERY PLAN SELECT payload FROM sketches WHERE window_id='w' AND site='s' AND role='r'")
        ).all()
    assert "USING INDEX" in str(plan)
    assert "SCAN" not in str(plan)


def test_deleting_a_model_deletes_all_it_owns(database: Database) -> None:
    model_id = add_model(database)
    job_id = add_window_job(database, model_id)
    with database.writing() as session:
        window_id = jobs.get(session, job_id).window_id
        assert window_id is not None
        windows.record(
            session, window_id, summary={}, header=b"", sketches=[PackedSketch("a", "x", b"")], checkpoint=None
        )
        plan = plans.add(session, model_id=model_id, windows=[window_id], request={}, plan={})
        run = runs.add(session, plan=plan, request={})
        run_job = jobs.add(session, kind="run", model_id=model_id, run_id=run.id)
        for job in (jobs.get(session, job_id), run_job):
            jobs.cancel(session, job)
    with database.writing() as session:
        models.delete(session, models.get(session, model_id))
    with database.reading() as session:
        for table in (Model, Window, Sketch, Job, Event):
            assert session.scalars(select(table)).all() == []


def test_a_model_with_an_open_job_stays(database: Database) -> None:
    model_id = add_model(database)
    job_id = add_window_job(database, model_id)
    with pytest.raises(StillRunning, match=job_id), database.writing() as session:
        models.delete(session, models.get(session, model_id))


# Jobs


def test_each_claim_is_a_new_attempt_and_fences_the_one_before(database: Database) -> None:
    job_id = add_window_job(database, add_model(database))
    with database.writing() as session:
        first = jobs.claim(session, "wrk_1", LEASE)
        assert first is not None
        assert (first.id, first.attempt) == (job_id, 1)
        assert jobs.claim(session, "wrk_2", LEASE) is None
    with database.writing() as session:
        jobs.give_back(session, jobs.get(session, job_id), "its worker died", crashed=True, most_crashes=3)
        second = jobs.claim(session, "wrk_2", LEASE)
        assert second is not None
        assert second.attempt == 2
    with pytest.raises(StaleAttempt, match="attempt 1"), database.writing() as session:
        jobs.fence(session, job_id, 1)
    with database.writing() as session:
        jobs.end(session, jobs.fence(session, job_id, 2), "succeeded")
    with pytest.raises(StaleAttempt), database.writing() as session:
        jobs.fence(session, job_id, 2)


def test_a_job_that_crashes_too_often_has_failed(database: Database) -> None:
    job_id = add_window_job(database, add_model(database))
    for crash in (1, 2, 3):
        with database.writing() as session:
            claimed = jobs.claim(session, "wrk_1", LEASE)
            assert claimed is not None
            jobs.give_back(session, claimed, "it was killed", crashed=True, most_crashes=3)
            assert claimed.state == ("failed" if crash == 3 else "queued")
    with database.reading() as session:
        job = jobs.get(session, job_id)
        assert job.error is not None
        assert "not tried again" in job.error["detail"]


def test_only_a_lease_that_ran_out_is_expired(database: Database) -> None:
    add_window_job(database, add_model(database))
    with database.writing() as session:
        job = jobs.claim(session, "wrk_1", LEASE)
        assert job is not None
        assert jobs.expired(session) == []
        job.lease_expires_at = now() - timedelta(milliseconds=1)
        session.flush()
        assert [row.id for row in jobs.expired(session)] == [job.id]


def test_cancel_ends_a_waiting_job_and_asks_a_running_one(database: Database) -> None:
    model_id = add_model(database)
    waiting, running = add_window_job(database, model_id), add_window_job(database, model_id)
    with database.writing() as session:
        assert jobs.cancel(session, jobs.get(session, waiting))
        assert jobs.get(session, waiting).state == "canceled"
        assert not jobs.cancel(session, jobs.get(session, waiting))
        claimed = jobs.claim(session, "wrk_1", LEASE)
        assert claimed is not None
        assert claimed.id == running
        assert jobs.cancel(session, claimed)
        assert claimed.state == "running"
        assert jobs.renew(session, running, 1, LEASE) is not None
        jobs.give_back(session, claimed, "killed", crashed=True, most_crashes=3)
        assert claimed.state == "canceled"


def test_a_step_enters_once_and_seq_rises_by_one(database: Database) -> None:
    job_id = add_window_job(database, add_model(database))
    with database.writing() as session:
        for attempt in (1, 2):
            for step in (1, 2, 3)[: attempt + 1]:
                events.add_step(session, job_id, attempt, phase="plan", step=step, loss=float(step), data={})
            events.add(session, job_id, attempt, "log", {"message": "hello"})
    with database.reading() as session:
        rows = events.after(session, job_id, 0, 100)
        curve = events.curve(session, job_id, "plan")
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    assert [(point.step, point.loss) for point in curve] == [(1, 1.0), (2, 2.0), (3, 3.0)]


# Idempotency


def test_a_key_is_reserved_answered_and_freed(database: Database) -> None:
    given = idempotency.Answer(201, {"Location": "/x"}, b"{}")
    with database.writing() as session:
        assert idempotency.reserve(session, "k", "one") == "reserved"
        assert idempotency.reserve(session, "k", "one") == "busy"
        assert idempotency.reserve(session, "k", "two") == "differs"
        idempotency.answer(session, "k", given)
        idempotency.free(session, "k")
        assert idempotency.reserve(session, "k", "one") == given
        idempotency.reserve(session, "other", "one")
        idempotency.free_abandoned(session)
        assert idempotency.reserve(session, "other", "two") == "reserved"
