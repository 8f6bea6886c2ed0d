"""The window job: ordinary steps to warm up, then some steps under the probe.

The training's state at the window's first step is kept: runs can start from it, and an attempt that was cut
short inside the window records the whole window again from there. The sketches are stored in the transaction
that ends the job.
"""

import advisor
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from api import recording
from api.jobs.attempt import Attempt
from api.jobs.checkpoints import Checkpoints
from api.jobs.pace import Pace
from api.schemas import WindowRequest
from api.settings import Settings
from db.store import models, windows

START = "start.pt"


def record(attempt: Attempt, settings: Settings) -> None:
    """Carry out a window job."""
    job = attempt.job()
    assert job.window_id is not None
    window_id = job.window_id
    with attempt.database.reading() as session:
        spec = ArchitectureSpec.parse(models.get(session, job.model_id).spec or {})
        wanted = WindowRequest.model_validate(windows.get(session, window_id).request)
    pace = Pace({"warmup": wanted.warmup, "window": wanted.steps})
    start = settings.window_folder(window_id) / START
    trainer = Trainer(spec, seed=wanted.seed)
    if start.exists():
        trainer.load(start)
    else:
        checkpoints = Checkpoints(settings.job_folder(job.id), settings.checkpoint_s)
        _warm_up(trainer, wanted.warmup, attempt, checkpoints, pace)
        start.parent.mkdir(parents=True, exist_ok=True)
        trainer.save(start)
    with advisor.probe(
        trainer.model,
        trainer.optimizer,
        steps=wanted.steps,
        every=wanted.every,
        curvature_steps=wanted.curvature_steps,
        casts=wanted.casts,
        finer=wanted.finer,
        overhead=wanted.overhead,
    ) as window:
        for step in range(1, wanted.steps + 1):
            attempt.step("window", step, wanted.steps, trainer.step(), pace)
    recorded = recording.pack(window)
    checkpoint = str(start.relative_to(settings.data_dir))
    attempt.succeed(lambda session: recorded.store(session, window_id, checkpoint))


def _warm_up(trainer: Trainer, steps: int, attempt: Attempt, checkpoints: Checkpoints, pace: Pace) -> None:
    done, _ = checkpoints.resume(trainer, "warmup")
    for step in range(done + 1, steps + 1):
        attempt.step("warmup", step, steps, trainer.step(), pace)
        checkpoints.save_if_due(trainer, "warmup", step)
