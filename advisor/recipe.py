"""The same recipe at every site: what a rule of thumb would do, as a plan to set beside a planned one.

    uniform(window, input="int8/none", grad_output="e5m2/none")

A keyword is a role, and its cast is given to exactly that role at every site that has it; other roles stay as
they are. So `input=` reaches linear and convolution sites and not the `lhs` of a matmul: name that too where
it is meant.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from advisor.assemble import Draft, assemble
from advisor.candidates import Row, by_slot
from advisor.castnames import KEEP, parse_cast, require_plannable
from advisor.cost import enters_gradient, shared_tensors
from advisor.errors import InvalidPlan
from advisor.hardware import Hardware, hardware_named
from advisor.plan import LossScaling, Plan, Stored
from advisor.product_casts import FOLLOWED
from advisor.reasons import uniform_reason
from advisor.scores import score
from advisor.storing import given
from advisor.watching import watched
from probes.casts import Cast
from probes.records import GRADIENT, Site
from probes.window import Window

Slot = tuple[str, str]


def uniform(
    window: Window,
    hardware: str | Hardware = "h100",
    *,
    storage: Sequence[Stored] = (),
    loss_scaling: LossScaling | None = None,
    **casts_by_role: str | Cast,
) -> Plan:
    """A plan with one cast a role, the same at every site; its cost is predicted from the window's scores.

    storage       tensors that are kept in another format, as the plan is to have them
    loss_scaling  the plan's; None: none

    Raises InvalidPlan for a role that no site of the window has, and for no role at all; UnknownFormat or
    InvalidCast for a cast that cannot be read; InvalidPlan for one with scales by column, and for scales by row or
    block where a site's products cannot be cast one by one; CastNotScored where the window tells nothing of such
    scales; UnknownHardware.
    """
    device = hardware_named(hardware)
    roles = sorted({role for site in window.sites for role in site.roles})
    if not casts_by_role:
        raise InvalidPlan(f"a uniform recipe needs a cast for at least one role; the window has {', '.join(roles)}")
    for role in casts_by_role:
        if role not in roles:
            near = difflib.get_close_matches(role, roles, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidPlan(f"no site of the window has the role {role!r}: {hint}Its roles: {', '.join(roles)}.")
    recipe = {role: Cast.parse(cast) if isinstance(cast, str) else cast for role, cast in casts_by_role.items()}
    require_plannable(recipe.values())
    _require_by_product(window.sites, recipe)
    keep = parse_cast(KEEP)
    casts = {(site.name, role): recipe.get(role, keep) for site in window.sites for role in site.roles}
    rows = _scored(window, casts)
    losses = [loss for loss in window.losses if math.isfinite(loss)]
    plan = assemble(
        Draft(
            kind="uniform",
            sites=window.sites,
            hardware=device,
            casts=casts,
            rows=rows,
            reasons={slot: uniform_reason(slot[1], cast, rows[slot]) for slot, cast in casts.items()},
            total_flops=window.total_flops,
            model_name=window.model_name,
            mean_loss=math.fsum(losses) / len(losses) if losses else None,
            damage=_sum(window.sites, rows, casts, "damage"),
            noise_ratio=_sum(window.sites, rows, casts, "noise_ratio"),
            records=window.parameter_records,
            shared=shared_tensors(window),
            storage=given(storage),
            notes=[*window.notes, "a recipe that was given: no limit on damage or lost batch was applied"],
        )
    )
    plan = watched(plan, [window])
    return plan if loss_scaling is None else plan.model_copy(update={"loss_scaling": loss_scaling})


def _require_by_product(sites: Sequence[Site], recipe: Mapping[str, Cast]) -> None:
    for site in sites:
        for role in site.roles:
            cast = recipe.get(role)
            if cast is not None and not cast.has_one_scale and site.op not in FOLLOWED:
                raise InvalidPlan(
                    f"{cast} for every {role} cannot be carried out at {site.name}: a scale for every "
                    f"{cast.granularity} runs along the inner dimension of each product, which {site.op!r} does not "
                    "show. Granularity 'none' and 'tensor' can be planned with there"
                )


def _scored(window: Window, casts: Mapping[Slot, Cast]) -> dict[Slot, Row | None]:
    """The score of every slot's cast; None for what stays as it is."""
    wanted = sorted({str(cast) for cast in casts.values()} - {KEEP})
    if not wanted:
        return dict.fromkeys(casts)
    scores = score(window, casts=[Cast.parse(text) for text in wanted], slots=window.product_slots)
    table = by_slot(window.sites, scores.rows)
    return {slot: table[slot].get(str(cast)) for slot, cast in casts.items()}


def _sum(sites: Sequence[Site], rows: Mapping[Slot, Row | None], casts: Mapping[Slot, Cast], what: str) -> float | None:
    """The total over the slots that are cast; None where one of them is unknown."""
    values = []
    for site in sites:
        for role in site.roles:
            slot = (site.name, role)
            counts = role != GRADIENT if what == "damage" else enters_gradient(site, role)
            if counts and str(casts[slot]) != KEEP:
                row = rows[slot]
                values.append(None if row is None else row.get(what))
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None
