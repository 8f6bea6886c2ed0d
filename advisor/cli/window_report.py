"""What `advisor show` prints of a window file: what was seen, what to look at, how steady it is, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from advisor.cli.numbers_text import decibels, loss, share, short_cast
from advisor.cli.tables import plain_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from advisor.alerting import Alert
    from advisor.diagnosis import Finding
    from advisor.drifting import Drift
    from advisor.execution import Stepwise
    from probes.product_errors import ProductError
    from probes.records import Slot
    from probes.window import Window

ALERTS_A_RULE = 8  # how many of one rule are printed
FINDINGS_A_CAUSE = 4  # and of one cause
PRODUCT_COLUMN, ERROR_COLUMN = 34, 17  # columns that a product's name and a cast's errors take
WIDE = 140  # columns from which on a tensor's line also has its 16-bit casts
NARROW_CASTS, MORE_CASTS = ("e4m3fn", "e5m2", "int8"), ("bf16", "fp16")


class WindowReport:
    """All that is told of one window; worked out once, printed or given as JSON."""

    def __init__(self, window: Window) -> None:
        from advisor.alerting import found_in
        from advisor.diagnosis import diagnose
        from advisor.drifting import drift_within
        from advisor.execution import Stepwise
        from advisor.scores import DEFAULT_CASTS, score

        steps = Stepwise(window, DEFAULT_CASTS)
        self.window: Window = window
        self.steps: Stepwise = steps
        self.alerts: tuple[Alert, ...] = found_in(steps)
        self.drift: Drift | None = drift_within(steps) if len(window.steps) >= 2 else None
        self.rows = score(window).rows
        self.findings: tuple[Finding, ...] = diagnose(window)

    def to_json(self) -> dict[str, Any]:
        """The window file's header, and beside it alerts, findings, drift, scores, and statistics by slot and step."""
        from probes.step_table import step_table

        return {
            **self.window.header(),
            "alerts": [{**vars(alert), "threshold": alert.threshold} for alert in self.alerts],
            "findings": [finding.to_dict() for finding in self.findings],
            "drift": None if self.drift is None else {**vars(self.drift), "sentences": self.drift.sentences},
            "scores": self.rows,
            "statistics": step_table(self.window),
        }

    def print_on(self, console: Console, name: str) -> None:
        """Everything, in sections."""
        for line in self._head(name):
            console.print(line)
        _section(console, "Alerts", _alert_lines(self.alerts))
        _section(console, "What would fail, and why", _finding_lines(self.findings))
        _section(console, "How steady it is", self._steadiness())
        products, parameters = self._slots(products=True), self._slots(products=False)
        if products:
            console.print("\nTensors of the matrix products: underflow and SQNR, dB, in each cast")
            console.print(self._products_table(products, console.width >= WIDE))
        if parameters:
            console.print("\nTensors of the parameters")
            console.print(self._parameters_table(parameters))
        if self.window.backward_errors:
            console.print("\nBackward error of the products")
            console.print(_backward_errors_table(self.window.backward_errors, console.width))
        _section(console, "Notes", [*self.window.sampled, *self.window.notes])

    def _head(self, name: str) -> Iterator[str]:
        window = self.window
        yield f"{name}: {window.model_name}, {len(window.steps)} steps, {len(window.slots)} tensors"
        known = [value for value in window.losses if not math.isnan(value)]
        if known:
            yield f"loss: {loss(known[0])} at the first step, {loss(known[-1])} at the last; {window.optimizer_name}"
            if not math.isnan(window.loss_noise):
                yield f"loss noise from step to step: {window.loss_noise:.2g}"
        scales = sorted(set(window.loss_scales))
        if scales != [1.0]:
            yield f"loss scale: {', '.join(f'{scale:g}' for scale in scales)} (taken out below)"
        if window.world_size > 1:
            yield f"recorded by {window.world_size} processes together"
        yield f"matrix FLOPs seen: {share(window.coverage.share)}"
        for unseen in window.coverage.unseen:
            yield f"not seen: {', '.join(f'{key} {value}' for key, value in unseen.items())}"

    def _steadiness(self) -> list[str]:
        told = [] if self.drift is None else list(self.drift.sentences)
        known = [row for row in self.rows if row["confidence"] is not None and self.window.is_product(_slot_of(row))]
        if not known:
            return [*told, "too few steps for a confidence: record four or more"]
        doubtful = [row for row in known if row["confidence"] < 0.5]
        told.append(
            f"confidence of the scores (that the next window gives them within a factor of two): "
            f"{_middle(row['confidence'] for row in known):.0%} in the middle, below 50% for {len(doubtful)} of "
            f"{len(known)}"
        )
        return told

    def _slots(self, products: bool) -> list[Slot]:
        """Slots of products or of parameters, those of a site together, sites in the order first met."""
        chosen = [slot for slot in self.window.slots if self.window.is_product(slot) == products]
        place = {site: at for at, site in enumerate(dict.fromkeys(slot.site for slot in chosen))}
        return sorted(chosen, key=lambda slot: place[slot.site])

    def _by_slot(self) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
        found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["site"], row["role"]), {})[short_cast(row["cast"])] = row
        return found

    def _products_table(self, slots: Sequence[Slot], wide: bool) -> Table:
        casts = (*NARROW_CASTS, *(MORE_CASTS if wide else ()))
        table = plain_table("tensor", "largest", "bits", *casts, "costs", "sure", right=4 + len(casts))
        table.columns[0].overflow = "fold"
        rows, total, last = self._by_slot(), sum(site.flops for site in self.window.sites) or 1.0, None
        for slot in slots:
            site = self.window.site(slot.site)
            if slot.site != last:
                table.add_row(f"{slot.site}  {share(site.flops / total)}")
                last = slot.site
            shape = "×".join(map(str, site.shapes.get(slot.role, ())))
            of_slot = rows[slot]
            first = of_slot[casts[0]]
            table.add_row(
                f"  {slot.role} {shape}",
                _number(first["amax"]),
                _whole(first["dynamic_range_bits"]),
                *(_cell(of_slot[cast]) for cast in casts),
                _cost(first),
                _sure(first),
            )
        table.caption = (
            "beside a product's name: its share of the FLOPs. bits: log2 of the largest over the smallest. "
            f"costs: predicted rise of the loss, of gradients the batch lost, in {casts[0]}. "
            "sure: the chance that the next window says so, within a factor of two"
        )
        table.caption_justify = "left"
        return table

    def _parameters_table(self, slots: Sequence[Slot]) -> Table:
        table = plain_table("tensor", "largest", "bits", *MORE_CASTS, "lost in bf16", "sure", right=6)
        rows, last = self._by_slot(), None
        for slot in slots:
            if slot.site != last:
                table.add_row(f"{slot.site}  {self._signal(slot.site)}".rstrip())
                last = slot.site
            of_slot = rows[slot]
            first = of_slot[MORE_CASTS[0]]
            table.add_row(
                f"  {slot.role}",
                _number(first["amax"]),
                _whole(first["dynamic_range_bits"]),
                *(_cell(of_slot[cast]) for cast in MORE_CASTS),
                share(first.get("lost_updates")),
                _sure(first),
            )
        table.caption = (
            "lost in bf16: share of the updates that a bf16 weight does not take. s/n: energy of the mean gradient "
            "over that of the minibatch's noise in it"
        )
        table.caption_justify = "left"
        return table

    def _signal(self, parameter: str) -> str:
        record = self.window.parameter_record(parameter)
        known = None if record is None else record.signal_to_noise
        return "" if known is None else f"s/n\N{NO-BREAK SPACE}{known:.2g}"


def print_comparison(console: Console, comparison: Any) -> None:
    """Where two windows differ, and a line for each tensor that does, those that differ first before the others."""
    for sentence in comparison.sentences:
        console.print(sentence)
    differing = [slot for slot in comparison.slots if slot.first_step is not None]
    if not differing:
        return
    columns = ("tensor", "from step", "beyond noise", "moved", "noise", "middle, octaves", "largest, octaves")
    table = plain_table(*columns, right=6)
    for slot in sorted(differing, key=lambda slot: slot.first_step):
        table.add_row(
            f"{slot.site} {slot.role}",
            str(slot.first_step),
            "-" if slot.first_beyond_noise is None else str(slot.first_beyond_noise),
            share(slot.distance),
            share(slot.noise),
            _signed(slot.middle_octaves),
            _signed(slot.amax_octaves),
        )
    table.caption = (
        "moved: share of the elements in other bins, at the step where it is most; beyond noise: from which step"
    )
    table.caption_justify = "left"
    console.print(table)


def comparison_json(comparison: Any) -> dict[str, Any]:
    """The comparison as JSON holds it."""
    told = {**vars(comparison), "first": comparison.first, "first_beyond_noise": comparison.first_beyond_noise}
    told |= {f"only_in_{which}": [slot._asdict() for slot in told[f"only_in_{which}"]] for which in ("one", "other")}
    return {**told, "sentences": comparison.sentences}


def _section(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(f"\n{title}")
        for line in lines:
            _print_hanging(console, line)


def _print_hanging(console: Console, line: str) -> None:
    import textwrap

    for piece in textwrap.wrap(line, console.width, initial_indent="  ", subsequent_indent="    "):
        console.print(piece)


def _alert_lines(alerts: Sequence[Alert]) -> list[str]:
    """Each rule's worst; how many more there are."""
    lines = []
    for rule in dict.fromkeys(alert.rule for alert in alerts):
        of_rule = [alert for alert in alerts if alert.rule == rule]
        lines += [alert.sentence for alert in of_rule[:ALERTS_A_RULE]]
        if len(of_rule) > ALERTS_A_RULE:
            lines.append(f"and {len(of_rule) - ALERTS_A_RULE} more of the rule {rule} (--json has them all)")
    return lines or ["none"]


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Each cause's worst; those that bite under a usual recipe first, and of the others one a cause."""
    lines = []
    for cause in dict.fromkeys(finding.cause for finding in findings if finding.severe):
        severe = [finding for finding in findings if finding.cause == cause and finding.severe]
        lines += [str(finding) for finding in severe[:FINDINGS_A_CAUSE]]
        if len(severe) > FINDINGS_A_CAUSE:
            lines.append(f"and {len(severe) - FINDINGS_A_CAUSE} more of the cause {cause} (--json has them all)")
    for cause in dict.fromkeys(finding.cause for finding in findings if not finding.severe):
        mild = [finding for finding in findings if finding.cause == cause and not finding.severe]
        more = f" (and {len(mild) - 1} more such)" if len(mild) > 1 else ""
        lines.append(f"under a recipe with {short_cast(mild[0].cast)}, or at little cost: {mild[0]}{more}")
    return lines or ["nothing under the usual recipes"]


def _backward_errors_table(errors: Sequence[ProductError], width: int) -> Table:
    """A line a product, a column a cast, as many as fit: the median and the error that one in a hundred exceeds."""
    casts = list(dict.fromkeys(error.cast for error in errors))
    fit = casts[: max(1, (width - PRODUCT_COLUMN) // ERROR_COLUMN)]
    by_product: dict[str, dict[str, ProductError]] = {}
    for error in errors:
        by_product.setdefault(f"{error.site} {error.product}", {})[error.cast] = error
    table = plain_table("product", *(short_cast(cast) for cast in fit), right=len(fit))
    for product, of_product in by_product.items():
        table.add_row(product, *(_errors(of_product.get(cast)) for cast in fit))
    left_out = (
        f"; {len(casts) - len(fit)} more casts in a wider terminal, or with --json" if len(fit) < len(casts) else ""
    )
    table.caption, table.caption_justify = f"median and the error that 1% exceed{left_out}", "left"
    return table


def _errors(error: ProductError | None) -> str:
    if error is None:
        return "-"
    return f"{_number(error.errors.quantile(0.5))} {_number(error.errors.quantile(0.99))}"


def _slot_of(row: dict[str, Any]) -> Slot:
    from probes.records import Slot

    return Slot(row["site"], row["role"])


def _middle(values: Iterable[float]) -> float:
    from statistics import median

    return median(values)


def _cell(row: dict[str, Any]) -> str:
    return f"{share(row['underflow'])} {decibels(row['sqnr_db']):>3}"


def _cost(row: dict[str, Any]) -> str:
    if row["damage"] is not None:
        return f"{row['damage']:+.1e}"
    return share(row["lost_batch_share"])


def _sure(row: dict[str, Any]) -> str:
    return "-" if row["confidence"] is None else f"{row['confidence']:.0%}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"
