"""What `bench attention` found, in words: tables, how linear it is in the length, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measurement import aligned, figure
from .plot import Panel, plot_panels, short

PASSES = ("forward", "forward_backward")
OURS = {"window": "ours, window", "retained": "ours, window + retained", "pure": "ours, pure"}


def by_operator(result: dict[str, Any], shape: str, name: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Cells of a shape and pass, by operator and length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["shape"] == shape and cell["pass"] == name:
            found.setdefault(cell["operator"], {})[cell["length"]] = cell
    return found


def title(operator: str) -> str:
    """An operator's name in tables and pictures."""
    others = {"cudnn": "cuDNN attention", "flash": "flash attention", "default": "SDPA", "seed": "seed's operator"}
    others |= {"fla": "fla, bare kernel", "fla_maps": "fla, Hedgehog maps"}
    return {**OURS, **others}.get(operator, operator)


def scaled(result: dict[str, Any], cell: dict[str, Any] | None) -> float | None:
    """Milliseconds of a cell for `tokens` tokens, whatever number it was measured on; None where there is no figure."""
    if cell is None or "milliseconds" not in cell:
        return None
    return cell["milliseconds"] * result["tokens"] / (cell["batch"] * cell["length"])


def linearity(result: dict[str, Any]) -> dict[str, Any]:
    """Whether time and memory of our own forms grow as a single row does: 1 is linear.

    Returns
    -------
    dict
        By shape and operator, over the lengths of single rows: `forward` and `forward_backward`, time per token over
        that of the shortest one, by length; `peak`, the same for peak bytes (inputs, output, gradients, workspace);
        and `peak_ratio`, the largest constant of memory at any length.
    """
    found: dict[str, Any] = {}
    for shape in dict.fromkeys(cell["shape"] for cell in result["cells"]):
        for name in PASSES:
            for operator, cells in by_operator(result, shape, name).items():
                rows = {n: c for n, c in sorted(cells.items()) if "milliseconds" in c}
                if operator not in OURS or not rows:
                    continue
                entry = found.setdefault(shape, {}).setdefault(operator, {})
                alone = {n: c for n, c in rows.items() if c["batch"] == 1}
                entry[name] = _per_token({n: c["milliseconds"] for n, c in alone.items()})
                if any("peak_ratio" in c for c in rows.values()):
                    # Tensors grow as the length does, so that the ratio tells of the bytes per token.
                    ratios = {n: c["peak_ratio"] for n, c in rows.items() if "peak_ratio" in c}
                    entry["peak"] = _per_token({n: n * ratios[n] for n in alone if n in ratios})
                    entry["peak_ratio"] = max(ratios.values())
    return found


def _per_token(quantity: dict[int, float]) -> dict[int, float]:
    first = min(quantity, default=0)
    return {n: (x / n) / (quantity[first] / first) for n, x in quantity.items()}


def render(result: dict[str, Any]) -> str:
    """Tables in plain text: milliseconds with the share of the roofline, then the roofline and the memory in full."""
    parts = []
    for shape in dict.fromkeys(cell["shape"] for cell in result["cells"]):
        for name in PASSES:
            cells = by_operator(result, shape, name)
            lengths = sorted({n for x in cells.values() for n in x})
            rows = [["ms (share of roofline)", *map(short, lengths)]]
            rows += [[title(op), *(_time(x.get(n)) for n in lengths)] for op, x in cells.items()]
            parts.append(f"heads/kv heads, dimension {shape}: {name.replace('_', ' + ')}\n{aligned(rows, 1)}")
        rows = [["forward + backward", "L", "ms", "TFLOP", "GB", "bound", "share of roofline", "peak / tensors"]]
        for op, x in by_operator(result, shape, "forward_backward").items():
            rows += [[title(op), short(n), *_work(x[n])] for n in sorted(x) if "milliseconds" in x[n]]
        parts.append(f"heads/kv heads, dimension {shape}: roofline and memory\n{aligned(rows, 1)}")
    growth = [
        f"{title(operator)}, {shape}, {kind.replace('_', ' + ')}: "
        + (
            ", ".join(f"{short(int(n))} {ratio:.2f}" for n, ratio in kinds.items())
            if kind != "peak_ratio"
            else f"{kinds:.2f}"
        )
        for shape, operators in result["linear"].items()
        for operator, entry in operators.items()
        for kind, kinds in entry.items()
        if kinds
    ]
    if growth:
        parts.append("single rows, per token over the shortest; peak / tensors at most\n" + "\n".join(growth))
    warm = result["warm"]
    if warm["processes"]:
        parts.append(f"{warm['kernels']} kernels compiled by {warm['processes']} processes in {warm['seconds']:.0f} s")
    ceilings = result["ceilings"]
    parts.append(
        f"ceilings of this run: copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 products "
        f"{ceilings['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    remarks = {**result["notes"], **{f"compiling ahead, failure {i}": x for i, x in enumerate(warm["failed"], 1)}}
    for cell in result["cells"]:
        if "missing" in cell:
            remarks[f"{title(cell['operator'])}, {cell['shape']}, L={short(cell['length'])}"] = cell["missing"]
    parts.append("\n".join(f"{name}: {why}" for name, why in remarks.items()))
    return "\n\n".join(parts)


def _time(cell: dict[str, Any] | None) -> str:
    if cell is None or "milliseconds" not in cell:
        return "-"
    return figure(cell["milliseconds"]) + (f" ({100 * cell['share']:.0f}%)" if "share" in cell else "")


def _work(cell: dict[str, Any]) -> list[str]:
    counted = (
        [figure(cell["flops"] / 1e12), figure(cell["bytes"] / 1e9), cell["bound"], f"{100 * cell['share']:.0f} %"]
        if "share" in cell
        else ["", "", "", ""]
    )
    return [figure(cell["milliseconds"]), *counted, figure(cell.get("peak_ratio"))]


def plot_result(result: dict[str, Any], path: str | Path) -> None:
    """Forward and backward time against length, one panel a shape, both axes logarithmic."""
    panels = []
    for shape in dict.fromkeys(cell["shape"] for cell in result["cells"]):
        heads, _, dimension = shape.partition(",")
        label = f"forward + backward, ms for {result['tokens']:,} tokens"
        panel = Panel(f"{heads} heads, dimension {dimension}", label, ours=tuple(OURS.values()))
        for op, x in by_operator(result, shape, "forward_backward").items():
            # The same number of tokens everywhere, so that a line that rises costs more for each of them.
            points = [(float(n), scaled(result, c)) for n, c in x.items()]
            panel.lines[title(op)] = [(n, ms) for n, ms in points if ms is not None]
        panels.append(panel)
    plot_panels(panels, path, f"causal attention, {result['dtype']}, {result['environment']['device']}")
