"""The catalogue: formats and hardware, straight from their tables."""

from fastapi import APIRouter

from advisor.hardware import HARDWARE
from api.schemas import FormatView, HardwareView, Page
from probes.format_names import ALIASES
from probes.formats import FORMATS, Format

router = APIRouter(tags=["catalogue"])


@router.get("/formats")
def formats() -> Page[FormatView]:
    """The element formats that casts are made of.

    A cast may also name any eXmY, with X from 2 to 8 exponent and Y from 0 to 23 mantissa bits: one that is not
    listed is laid out as IEEE 754 would. The aliases, other libraries' names, are accepted in a cast as well.
    """
    return Page(items=[_format_view(row) for row in FORMATS.values()])


@router.get("/hardware")
def hardware() -> Page[HardwareView]:
    """The hardware that plans can be made for: the pairs of formats that each multiplies, how fast, and whence."""
    return Page(
        items=[
            HardwareView(
                name=row.name,
                title=row.title,
                pairs=sorted(row.pairs),
                granularities=sorted(row.granularities),
                memory_bytes=row.memory_bytes,
                tflops=dict(row.tflops),
                bandwidth_bytes_s=row.bandwidth_bytes_s,
                launch_s=row.launch_s,
                product_start_s=row.product_start_s,
                tile_s=row.tile_s,
                achieved=row.achieved,
                achieved_8bit=row.achieved_8bit,
                achieved_bandwidth=row.achieved_bandwidth,
                units=row.units,
                inner_layout=row.inner_layout,
                source=row.source,
                sources=dict(row.sources),
                note=row.note,
            )
            for row in HARDWARE.values()
        ]
    )


def _format_view(row: Format) -> FormatView:
    return FormatView(
        name=row.name,
        bits=row.bits,
        stored_bits=row.stored_bits,
        exponent_bits=row.exponent_bits,
        mantissa_bits=row.mantissa_bits,
        bias=row.bias,
        signed=row.signed,
        code_points=row.code_points,
        nonfinite=row.nonfinite.value,
        largest=row.largest,
        lowest=row.lowest,
        smallest_normal=row.smallest_normal,
        smallest_subnormal=row.smallest_subnormal,
        epsilon=row.epsilon,
        aliases={library: list(names) for library, names in ALIASES[row.name].items() if names},
    )
