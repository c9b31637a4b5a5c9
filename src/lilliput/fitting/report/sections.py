"""What the report says beside its charts: cards, tables and sentences, each from the record of a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from lilliput.fitting.report import words
from lilliput.fitting.report.charts import short_names
from lilliput.metrics.latency import QUIET

Record = Mapping[str, Any]
LISTED_CLASSES = 10
GONE = {"text": words.MISSING, "strength": 0.0, "kind": "parts", "dark": False}


def cards(record: Record) -> list[dict[str, Any]]:
    """One for each quantity that was measured or limited, the limited ones first, quality last."""
    before, after, limits = record["original"]["values"], record["verify"]["measured"], record["limits"]
    keys = [k for k in words.COSTS if words.finite(before.get(k)) or k in limits]
    keys.sort(key=lambda k: k not in limits)
    found = [_cost_card(record, k, before.get(k), after.get(k), limits.get(k)) for k in keys]
    return [*found, _quality_card(record)]


def _cost_card(record: Record, key: str, before: Any, after: Any, limit: float | None) -> dict[str, Any]:
    top = max((v for v in (before, after, limit) if words.finite(v)), default=1.0) or 1.0
    change = words.change(key, before, after)
    if key in words.TIMES and key not in record.get("modelled", ()):
        gain = record["verify"].get("speedup", {}).get("gain", True)
        change = "no gain beyond the noise" if "faster" in change and not gain else change
    return {
        "title": words.title(key),
        "before": words.show(key, before),
        "after": words.show(key, after) if words.finite(after) else "",
        "change": change,
        "limit": words.show(key, limit) if limit is not None else "",
        "met": limit is None or words.met({key: limit}, {key: after}),
        "worse": words.finite(before) and words.finite(after) and after > 1.02 * before,
        "modelled": words.is_modelled(record, key),
        "before_width": _width(before, top),
        "after_width": _width(after, top),
        "limit_at": _width(limit, top) if limit is not None else None,
    }


def _quality_card(record: Record) -> dict[str, Any]:
    verify, limit = record["verify"], record["limits"].get("drop")
    before, after = verify["score_before"], verify["score_after"]
    top = max((s["value"] for s in (before, after) if words.finite(s["value"])), default=1.0) or 1.0
    drop = verify["drop"]
    change = "" if not words.finite(drop) else f"{words.share(abs(drop))} {'worse' if drop > 0 else 'better'}"
    return {
        "title": before["name"],
        "before": words.number(before["value"]) + before["unit"],
        "after": words.number(after["value"]) + after["unit"],
        "change": "unchanged" if drop == 0 else change,
        "limit": f"{words.share(limit)} worse" if limit is not None else "",
        "met": limit is None or words.met({"drop": limit}, {"drop": drop}),
        "worse": False,
        "modelled": False,
        "before_width": _width(before["value"], top),
        "after_width": _width(after["value"], top),
        "limit_at": None,
    }


def _width(value: Any, top: float) -> float:
    """Percent of the bar's length."""
    return round(100 * max(0.0, min(1.0, value / top)), 1) if words.finite(value) else 0.0


def speed(record: Record) -> str:
    """The comparison side by side in words."""
    s = record["verify"].get("speedup") or {}
    if not all(words.finite(s.get(k)) for k in ("ratio", "low", "high")):
        return ""
    interval = f"{s['ratio']:.2f} times [{s['low']:.2f}, {s['high']:.2f}]"
    if s["low"] > 1:
        verdict = "the fitted model is faster"
    else:
        verdict = "the fitted model is slower" if s["high"] < 1 else "no gain, the interval includes 1"
    where = "on this machine, " if record.get("modelled") else ""
    return f"Run in turn with the original {where}in one process, its speed is {interval} the original's: {verdict}."


def warnings(record: Record) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    busy = record["verify"].get("busy_cores", 0.0)
    if words.finite(busy) and busy > QUIET:
        found.append(f"Other processes kept {busy:.1f} cores busy during the verification: its times are unreliable.")
    if record.get("modelled"):
        known = {*record["original"]["values"], *record["verify"]["measured"]}
        names = ", ".join(words.title(k) for k in record["modelled"] if k in known)
        device = record["request"].get("device", "the device")
        found.append(f"The device was not at hand: {names} are modelled for {device}, not measured.")
    return found


def heat(record: Record) -> dict[str, Any] | None:
    """The settings as a grid of cells (rows: blocks or layers, columns: parts) and those outside it."""
    units = record.get("heat") or []
    if not units:
        return None
    blocks = any(u["block"] is not None for u in units)
    inside = [u for u in units if u["block"] is not None] if blocks else units
    outside = [u for u in units if u["block"] is None] if blocks else []
    columns = list(dict.fromkeys(u["part"] for u in inside))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for u in inside:
        rows.setdefault(_row_name(u, blocks), {})[u["part"]] = _cell(u)
    order = [r["name"] for r in record.get("layers") or []]
    listed = sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else -1)
    for cells in rows.values():
        if any(cell["text"] == "drop" for cell in cells.values()):  # nothing else matters of a block that is gone
            cells.update({part: GONE for part, cell in cells.items() if cell["text"] != "drop"})
    return {
        "axis": "block" if blocks else "layer",
        "columns": columns,
        "rows": [(name, [cells.get(c) for c in columns]) for name, cells in listed],
        "outside": [(_row_name(u, False), _cell(u)) for u in outside],
        "kinds": sorted({cell["kind"] for cell in map(_cell, units) if cell["strength"]}),
    }


def _row_name(unit: Record, blocks: bool) -> str:
    if blocks:
        return str(unit["block"])
    return str(unit.get("unit", unit["part"])).removesuffix(" " + unit["part"]) or unit["part"]


def _cell(unit: Record) -> dict[str, Any]:
    value = strength(unit)
    text = words.pretty(unit["setting"])
    return {"text": text, "strength": round(value, 3), "kind": kind(unit["setting"]), "dark": value > 0.78}


def kind(setting: str) -> str:
    """Whether a setting takes bits, ranks, or whole parts away."""
    if re.match(r"(int|float|fp|bf)\d", setting):
        return "bits"
    return "rank" if "rank" in setting else "parts"


def strength(unit: Record) -> float:
    """How much a setting takes away, from 0 (nothing) to 1, read from its label; else its place among the options."""
    if not unit["option"]:
        return 0.0
    label = unit["setting"]
    if bits := re.match(r"int(\d+)", label):
        return {8: 0.3, 4: 0.6, 3: 0.8, 2: 1.0}.get(int(bits[1]), 0.5)
    if share := re.match(r"-(\d+(?:\.\d+)?)%", label):
        return min(1.0, 0.15 + float(share[1]) / 60)
    if rank := re.match(r"rank (\d+(?:\.\d+)?)%", label):
        return min(1.0, 0.15 + (100 - float(rank[1])) / 80)
    return unit["option"] / max(1, unit.get("options", unit["option"] + 1) - 1)


def difference(record: Record) -> str:
    """The paired difference in words."""
    verify = record["verify"]
    d, score = verify.get("difference") or {}, verify["score_before"]
    if not all(words.finite(d.get(k)) for k in ("mean", "low", "high")):
        return ""
    if d["low"] == d["high"] == 0:
        return "Sample by sample, the fitted model scores the same as the original."
    unit = "nats per token" if score["name"] == "perplexity" else {"%": "points"}.get(score["unit"], score["unit"])
    clear = d["low"] > 0 or d["high"] < 0
    better = words.higher_is_better(verify)
    verdict = "worse" if (d["mean"] > 0) is not better else "better"
    verdict = f"{verdict} beyond the noise" if clear and better is not None else "a difference that may be chance"
    figures = ", ".join(words.number(d[k], 3) for k in ("low", "high"))
    sign = "+" if d["mean"] > 0 else ""
    return (
        f"Sample by sample, over the same {score['n']} samples of the test data, the fitted model differs by "
        f"{sign}{words.number(d['mean'], 3)} {unit} [{figures}]: {verdict}."
    )


def damage(record: Record) -> list[dict[str, str]]:
    """Single figures of what changed in the answers: title, value, explanation."""
    verify, found = record["verify"], _worse(record)
    if "changed_tokens" in verify:
        text = "of greedy next tokens on test text differ from the original's"
        found.append({"title": "changed tokens", "value": words.share(verify["changed_tokens"]), "text": text})
    if "flipped" in verify:
        text = "of test samples get another answer than from the original"
        found.append({"title": "flipped answers", "value": words.share(verify["flipped"]), "text": text})
    if verify.get("calibration"):
        before, after = verify["calibration"]
        value = f"{words.number(before, 3)} → {words.number(after, 3)}"
        text = "mean gap between confidence and accuracy (15 bins)"
        found.append({"title": "calibration error", "value": value, "text": text})
    return found


def _worse(record: Record) -> list[dict[str, str]]:
    """The score and the costs that got worse."""
    verify, found = record["verify"], []
    before, after = verify["score_before"], verify["score_after"]
    if words.finite(verify["drop"]) and verify["drop"] > 0:
        values = [words.number(s["value"]) + s["unit"] for s in (before, after)]
        found.append({"title": before["name"], "value": " → ".join(values), "text": words.share(verify["drop"]) + " worse"})
    for key in words.COSTS:
        old, new = record["original"]["values"].get(key), verify["measured"].get(key)
        if words.finite(old) and words.finite(new) and new > 1.02 * old:
            values = f"{words.show(key, old)} → {words.show(key, new)}"
            found.append({"title": words.title(key), "value": values, "text": words.change(key, old, new)})
    return found


def classes(record: Record) -> dict[str, Any] | None:
    """Accuracy per class, the worst change first; those beyond the first ten apart."""
    every = record["verify"].get("classes") or []
    known = [c for c in every if words.finite(c["before"]) and words.finite(c["after"])]
    widest = max((abs(c["after"] - c["before"]) for c in known), default=0.0) or 1.0
    rows = [
        {
            "label": c["label"],
            "count": c["count"],
            "before": words.share(c["before"]),
            "after": words.share(c["after"]),
            "change": f"{100 * (c['after'] - c['before']):+.3g}".replace("-", "−").replace("+0", "0", 1),
            "loss": _width(c["before"] - c["after"], widest),
            "gain": _width(c["after"] - c["before"], widest),
        }
        for c in known
    ]
    return {"first": rows[:LISTED_CLASSES], "rest": rows[LISTED_CLASSES:]} if rows else None


def candidates(record: Record) -> dict[str, Any]:
    """All built candidates: predicted and measured costs, score, and whether the budget holds."""
    built = record.get("candidates") or []
    keys = [k for k in words.COSTS if k in record["limits"]]
    time_key = next((k for k in words.TIMES if any(k in c["measured"] for c in built)), None)
    keys += [k for k in (time_key,) if k and k not in keys]
    return {
        "columns": [(words.title(k), words.is_modelled(record, k)) for k in keys],
        "metric": record["verify"]["score_before"]["name"],
        "rows": [_candidate(record, c, keys) for c in built],
    }


def _candidate(record: Record, c: Record, keys: list[str]) -> dict[str, Any]:
    guess, score = c.get("predicted") or {}, c["score"]
    return {
        "number": c["number"],
        "name": words.pretty(c["name"]),
        "costs": [
            {
                "predicted": words.show(k, guess.get(k)),
                "measured": words.show(k, c["measured"].get(k)),
                "over": k in record["limits"] and not words.met({k: record["limits"][k]}, c["measured"]),
            }
            for k in keys
        ],
        "damage": (words.number(guess.get("damage"), 3), words.number(c["damage"], 3)),
        "score": words.number(score["value"]) + score["unit"],
        "interval": f"[{words.number(score['low'])}, {words.number(score['high'])}]",
        "drop": words.percent(c["measured"].get("drop")),
        "drop_over": "drop" in record["limits"] and not words.met({"drop": record["limits"]["drop"]}, c["measured"]),
        "met": words.met(record["limits"], c["measured"]),
        "chosen": c["number"] == record.get("chosen"),
    }


def recovered(record: Record) -> bool:
    """Whether the model handed over is another one than the candidate that was chosen."""
    chosen = next((c for c in record.get("candidates") or [] if c["number"] == record.get("chosen")), None)
    return chosen is not None and chosen["plan"] != record["plan"]


def steps(record: Record) -> list[dict[str, Any]]:
    """Seconds of each step and its share of all."""
    spent = {k: v for k, v in (record.get("seconds") or {}).items() if words.finite(v) and v >= 0}
    total = sum(spent.values()) or 1.0
    return [{"name": k, "time": words.seconds(v), "width": round(100 * v / total, 2)} for k, v in spent.items()]


def facts(record: Record) -> list[tuple[str, str]]:
    """The circumstances of the run."""
    r = record["request"]
    device = "this machine" if r.get("device") == "here" else r.get("device")
    pairs = [
        ("budget", str(r.get("budget", "")).replace("<=", " ≤ ")),
        ("device", device),
        ("runtime", record.get("runtime")),
        ("threads", record.get("threads")),
        ("families", ", ".join(r.get("families") or [])),
        ("sampler", r.get("sampler")),
        ("time limit", f"{r['minutes']:g} min" if words.finite(r.get("minutes")) else None),
        ("seed", r.get("seed")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def commands(record: Record) -> str:
    """The lines that make this result again."""
    command, name = record["request"].get("command", ""), record["request"]["workload"]
    if not command.startswith("lilliput "):
        return (
            "import lilliput as lp\n\n"
            f"# work: the Workload {name!r} of this run\n"
            f"fitted = lp.fit(work, {record['request'].get('budget', '')!r}, seed={record['request'].get('seed', 0)})\n"
            'model = lp.Plan.load("plan.yaml").apply(work)  # the same model without the search'
        )
    return (
        f"{command}\n"
        f"lilliput apply plan.yaml {shlex.quote(name)} --out fitted   # the same model without the search\n"
        "lilliput measure fitted"
    )


def layer_axis(record: Record) -> str:
    """What the bars stand for: "block" or "layer"."""
    return short_names([r["name"] for r in record.get("layers") or []])[1]
