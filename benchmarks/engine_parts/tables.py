"""The results of `engine.py` as headers and rows."""

from collections.abc import Callable
from typing import Any

Table = tuple[list[str], list[list[str]]]


def _reached(value: float, target: float) -> str:
    return f"<= {target:g}: " + ("reached" if value <= target else "not reached")


def _size(number: float) -> str:
    return f"{number:.0e}".replace("e+0", "e").replace("e+", "e") if number >= 10_000 else f"{number:g}"


def products(rows: list[dict[str, Any]]) -> Table:
    """What a product costs in gradients."""
    header = ["network", "parameters", "micro-batches", "gradient, ms", "product / gradient", "target"]
    table = []
    for row in rows:
        ratio = f"{row['ratio']:.2f}"
        if abs(row["ratio"] - row["ratio_to_own_gradient"]) > 1e-9:
            ratio += f" (own: {row['ratio_to_own_gradient']:.2f})"
        table.append(
            [
                row["case"],
                f"{row['parameters']:,}",
                str(row["micro_batches"]),
                f"{1e3 * row['gradient_seconds']:.1f}",
                ratio,
                _reached(row["ratio"], row["target"]),
            ]
        )
    return header, table


def spectrum(found: dict[str, Any]) -> Table:
    """Both ends of the large spectrum."""
    header = ["asked for", "basis", "tolerance", "products", "cost in gradients", "largest right", "their worst error"]
    header += ["smallest: error", f"target {found['target']}"]
    return header, [
        [
            f"{row['asked']} largest" + (", 1 smallest" if row["smallest_asked"] else ""),
            str(row["basis"]),
            "one basis" if row["tolerance"] is None else f"{row['tolerance']:g}",
            str(row["products"]),
            f"{row['gradients']:.0f}",
            f"{row['right']} of {row['asked']}",
            f"{row['worst_error']:.0e}",
            f"{row['smallest_error']:.0e}" if row["smallest_asked"] else "",
            _spectrum_verdict(row, found["target"]),
        ]
        for row in found["rows"]
    ]


def _spectrum_verdict(row: dict[str, Any], target: float) -> str:
    if row["right"] < row["asked"] or (row["smallest_asked"] and not row["smallest_right"]):
        return "not all right"
    return "reached" if row["gradients"] <= target else "not reached"


def basis(found: dict[str, Any]) -> Table:
    """Orthogonality, time and waits."""
    straight = found["orthogonality"]
    rows = [
        [
            f"largest entry of VV' - 1, {straight['basis']} vectors of {straight['parameters']:,} numbers",
            f"{straight['deviation']:.1e}",
            _reached(straight["deviation"], straight["target"]),
        ]
    ]
    rows += [
        [
            f"{row['basis']} vectors of 2.8M, {row['cases']} images: all / products",
            f"{row['ratio']:.2f}",
            _reached(row["ratio"], row["target"]),
        ]
        for row in found["time"]
    ]
    rows += [[f"waits for the device, {row['basis']} vectors", str(row["waits"]), ""] for row in found["waits"]]
    return ["what", "measured", "target"], rows


def memory(rows: list[dict[str, Any]]) -> Table:
    """Kept graphs beside their budget."""
    header = ["network, 10 micro-batches", "budget, MB", "graphs kept", "bytes held, MB", "peak above the basis, MB"]
    return header, [
        [
            row["case"],
            f"{row['budget_bytes'] / 1e6:.1f}",
            f"{row['kept_graphs']} of {row['graphs']}",
            f"{row['held_bytes'] / 1e6:.1f}",
            f"{row['peak_above_basis_bytes'] / 1e6:.1f}",
        ]
        for row in rows
    ]


def steps(rows: list[dict[str, Any]]) -> Table:
    """Shares of a Newton step."""
    parts = list(rows[0]["shares"])
    header = ["run by", "coordinates", "steps", *parts, "targets"]
    return header, [
        [row["where"], row["coordinates"], str(row["steps"])]
        + [f"{row['shares'][part]:.1%}" for part in parts]
        + ["; ".join(f"{part} < {bound:.0%}: {_below(row, part, bound)}" for part, bound in row["targets"].items())]
        for row in rows
    ]


def _below(row: dict[str, Any], part: str, bound: float) -> str:
    return "reached" if row["shares"][part] < bound else "not reached"


def growth(rows: list[dict[str, Any]]) -> Table:
    """Exponents beside those of the operations."""
    header = ["what", "over", "from", "to", "exponent of the operations", "measured", "upper half of the range"]
    return header, [
        [
            row["what"],
            row["over"],
            _size(row["from"]),
            _size(row["to"]),
            str(row["theory"]),
            f"{row['exponent']:.2f}",
            f"{row['exponent_of_upper_half']:.2f}",
        ]
        for row in rows
    ]


TABLES: dict[str, Callable[[Any], Table]] = {
    "products": products,
    "spectrum": spectrum,
    "basis": basis,
    "memory": memory,
    "steps": steps,
    "growth": growth,
}
