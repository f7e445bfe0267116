"""What benchmarks/gpu.py says of its measurements: the figures that the targets name, and what failed inside them."""

from __future__ import annotations

from typing import Any


def failures(result: Any, where: str = "") -> list[str]:
    """Every ``failed`` reason of a measurement, with its place."""
    if not isinstance(result, (dict, list)):
        return []
    found = [f"{where}: {result['failed']}"] if isinstance(result, dict) and "failed" in result else []
    for key, value in result.items() if isinstance(result, dict) else enumerate(result):
        found += failures(value, f"{where}/{key}" if where else str(key))
    return found


def table(results: dict[str, Any]) -> list[str]:
    """The figures that the targets name, one line each."""
    lines = []
    for name, result in results.items():
        try:
            lines += _figures(name, result)
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # of a step that was stopped half-way
            lines.append(f"{name:32s} incomplete ({error!r})")
    return lines


def _figures(name: str, result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if name.startswith("ntxent"):
        for case, found in result.items():
            ours = (found.get("peers") or {}).get("cellfast", {}) if isinstance(found, dict) else {}
            if "forward_backward" in ours:
                share = f", {100 * ours['of_mm']:.0f} % of torch.mm's rate" if "of_mm" in ours else ""
                share += f"; {ours['device_ms']:.3f} ms on the device" if "device_ms" in ours else ""
                lines.append(f"{name:32s} {case:28s} {ours['forward_backward']['median_ms']:.3f} ms{share}")
            elif ours or "failed" in found:
                lines.append(f"{name:32s} {case:28s} {(ours or found).get('failed', 'not measured')[:120]}")
    elif name.startswith("step-") and "constant" in result:
        parts = [f"constant {result['constant']['cells_per_second']:,.0f} cells/s"]
        for feed in ("resident", "stream"):
            if "cells_per_second" in result.get(feed, {}):
                parts.append(f"{feed} {result[feed]['cells_per_second']:,.0f} ({100 * result[feed]['fraction']:.1f} %)")
            elif feed in result:
                parts.append(f"{feed} {result[feed]['failed'][:120]}")
        if "augment_share" in result:
            parts.append(f"views {100 * result['augment_share']:.1f} % of the step")
        lines.append(f"{name:32s} {', '.join(parts)}")
    elif name.startswith("embed-") and "constant" in result:
        parts = [f"constant {result['constant']['cells_per_second']:,.0f} cells/s"]
        if "fraction" in result:
            parts.append(f"resident {result['resident']['cells_per_second']:,.0f} ({100 * result['fraction']:.1f} %)")
        lines.append(f"{name:32s} {', '.join(parts)}")
    elif name == "augment":
        lines += [f"augment {way:40s} {rate['median']:,.0f} cells/s" for way, rate in result.get("rates", {}).items()]
    elif name == "decode":
        for row in result.get("rows", []):
            found = (
                f"{row['decode_fields_per_second']:,.0f} fields/s" if "decode_fields_per_second" in row else row["failed"][:120]
            )
            lines.append(f"decode {row['compression']:8s} {row['decode']:6s} {row['threads']:3d} threads   {found}")
    return lines
