"""The catalogue: formats and hardware, straight from their tables."""

from fastapi import APIRouter

from advisor.hardware import HARDWARE
from api.schemas import FormatView, HardwareView, Page
from probes.formats import FORMATS

router = APIRouter(tags=["catalogue"])


@router.get("/formats")
def formats() -> Page[FormatView]:
    """The element formats that casts are made of."""
    return Page(
        items=[
            FormatView(
                name=name,
                bits=row.bits,
                exponent_bits=row.exponent_bits,
                mantissa_bits=row.mantissa_bits,
                largest=row.largest,
                smallest_normal=row.smallest_normal,
                smallest_subnormal=row.smallest_subnormal,
                epsilon=row.epsilon,
            )
            for name, row in FORMATS.items()
        ]
    )


@router.get("/hardware")
def hardware() -> Page[HardwareView]:
    """The hardware that plans can be made for, and the pairs of formats that each multiplies."""
    return Page(
        items=[
            HardwareView(
                name=row.name,
                title=row.title,
                pairs=sorted(row.pairs),
                memory_bytes=row.memory_bytes,
                source=row.source,
                note=row.note,
            )
            for row in HARDWARE.values()
        ]
    )
