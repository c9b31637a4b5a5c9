"""What the report says beside its charts: cards, tables and sentences, each from the record of a run."""

from __future__ import annotations

import shlex
from typing import Any

from lilliput.fitting.report import words
from lilliput.fitting.report.charts import short_names
from lilliput.fitting.report.drawing import Record
from lilliput.method import HARM, NO_HARM
from lilliput.metrics.latency import QUIET

LISTED_CLASSES = 10
RECOVERIES = {
    "distill.logits": "distillation from the original",
    "quantize.gptq": "GPTQ in the place of plain rounding",
}


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
        change = _paired(record["verify"].get("speedup") or {}, change)
    return {
        "title": words.title(key),
        "before": words.show(key, before),
        "after": words.show(key, after) if words.finite(after) else "",
        "change": change,
        "limit": words.show(key, limit) if limit is not None else "",
        "met": limit is None or words.met({key: limit}, {key: after}),
        "worse": change.endswith(("slower", "larger", "more")),
        "modelled": words.is_modelled(record, key),
        "before_width": _width(before, top),
        "after_width": _width(after, top),
        "limit_at": _width(limit, top) if limit is not None else None,
    }


def _paired(speedup: Record, change: str) -> str:
    """What became of the time, as far as the comparison side by side bears it out."""
    low, high = speedup.get("low"), speedup.get("high")
    if not (words.finite(low) and words.finite(high)):
        return change
    if low <= 1 <= high:
        return "no gain beyond the noise"
    return change if (low > 1) == change.endswith("faster") else f"but {'faster' if low > 1 else 'slower'} side by side"


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
        "change": "unchanged" if drop == 0 else change + (", may be chance" if _chance(verify) else ""),
        "limit": f"{words.share(limit)} worse" if limit is not None else "",
        "met": limit is None or words.met({"drop": limit}, {"drop": drop}),
        "worse": False,
        "modelled": False,
        "before_width": _width(before["value"], top),
        "after_width": _width(after["value"], top),
        "limit_at": None,
    }


def _chance(verify: Record) -> bool:
    """Whether the paired difference's interval includes zero."""
    d = verify.get("difference") or {}
    return words.finite(d.get("low")) and words.finite(d.get("high")) and d["low"] <= 0 <= d["high"]


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


def difference(record: Record) -> str:
    """The paired difference in words."""
    verify = record["verify"]
    d, score = verify.get("difference") or {}, verify["score_before"]
    if not all(words.finite(d.get(k)) for k in ("mean", "low", "high")):
        return ""
    if d["low"] == d["high"] == 0:
        return "Sample by sample, the fitted model scores the same as the original."
    unit = "nats per token" if score["name"] == "perplexity" else {"%": "points"}.get(score["unit"], score["unit"])
    better = words.higher_is_better(verify)
    verdict = "worse" if (d["mean"] > 0) is not better else "better"
    verdict = (
        f"{verdict} beyond the noise"
        if better is not None and not _chance(verify)
        else "a difference that may be chance"
    )
    figures = ", ".join(words.number(d[k], 3) for k in ("low", "high"))
    sign = "+" if d["mean"] > 0 else ""
    return (
        f"Sample by sample, over the same {score['n']} samples of the test data, the fitted model differs by "
        f"{sign}{words.number(d['mean'], 3)} {unit} [{figures}]: {verdict}."
    )


def damage(record: Record) -> list[dict[str, str]]:
    """Single figures of what changed in the answers: title, value, explanation."""
    found = _worse(record)
    for audit, name, text in TILES:
        change = next((c for c in _changes(record, audit) if c["name"] == name), None)
        if change is None:
            continue
        value = words.share(change["after"])
        if audit == "audit.calibration":
            value = f"{words.number(change['before'], 3)} → {words.number(change['after'], 3)}"
        found.append({"title": name, "value": value, "text": text})
    return found


TILES = (
    ("audit.language", "changed tokens", "of greedy next tokens on test text differ from the original's"),
    ("audit.exemplars", "changed answers", "of test samples get another answer than from the original"),
    ("audit.calibration", "calibration error", "mean gap between confidence and accuracy (15 bins)"),
)


def _changes(record: Record, audit: str) -> list[dict[str, Any]]:
    """The changes that an audit found; none when it was not made."""
    findings = record["verify"].get("audits", {}).get("findings", [])
    return next((f["changes"] for f in findings if f["audit"] == audit), [])


def audits(record: Record) -> list[dict[str, str]]:
    """Each audit with its verdict and what it says."""
    marks = {HARM: "bad", NO_HARM: "good"}
    return [
        {"name": f["audit"], "verdict": f["verdict"], "mark": marks.get(f["verdict"], ""), "text": f["summary"]}
        for f in record["verify"].get("audits", {}).get("findings", [])
    ]


def _worse(record: Record) -> list[dict[str, str]]:
    """The score and the costs that got worse."""
    verify, found = record["verify"], []
    before, after = verify["score_before"], verify["score_after"]
    if words.finite(verify["drop"]) and verify["drop"] > 0:
        values = [words.number(s["value"]) + s["unit"] for s in (before, after)]
        found.append(
            {"title": before["name"], "value": " → ".join(values), "text": words.share(verify["drop"]) + " worse"}
        )
    for card in cards(record):
        if card["worse"]:
            values = f"{card['before']} → {card['after']}"
            found.append({"title": card["title"], "value": values, "text": card["change"]})
    return found


def classes(record: Record) -> dict[str, Any] | None:
    """Accuracy per class and group, the worst change first; those beyond the first ten apart."""
    known = [c for c in _changes(record, "audit.groups") if words.finite(c["before"]) and words.finite(c["after"])]
    widest = max((abs(c["after"] - c["before"]) for c in known), default=0.0) or 1.0
    rows = [
        {
            "label": c["name"],
            "count": c["n"],
            "before": words.share(c["before"]),
            "after": words.share(c["after"]),
            "change": words.percent(c["after"] - c["before"]).removesuffix(" %"),
            "between": " … ".join(words.percent(c[end]).removesuffix(" %") for end in ("low", "high")),
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


def serving(record: Record) -> dict[str, Any] | None:
    """Every way to serve a plan that was tried, and what a cache policy adds to the loss; None when none was."""
    tried = record.get("serving") or {}
    rows = tried.get("rows") or []
    if len(rows) < 2:
        return None
    keys = [k for k in ("token_ms", "memory_bytes") if any(k in r.get("measured", {}) for r in rows)]
    chosen = record.get("chosen"), tried.get("chosen")
    return {
        "columns": [words.title(k) for k in keys],
        "rows": [_served(record, r, keys) | {"chosen": chosen == (r["candidate"], r["serving"])} for r in rows],
        "policy": _policy(record["verify"].get("policy")),
    }


def _served(record: Record, row: Record, keys: list[str]) -> dict[str, Any]:
    measured, speedup = row.get("measured") or {}, row.get("speedup")
    gain = f"{speedup['ratio']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]" if speedup else ""
    said = f"{row['same_text']} texts unchanged" if "same_text" in row else row.get("refused", "")
    return {
        "number": row["candidate"],
        "name": row["label"],
        "costs": [
            {
                "value": words.show(k, measured.get(k)),
                "over": k in record["limits"] and k in measured and not words.met({k: record["limits"][k]}, measured),
            }
            for k in keys
        ],
        "cache": words.show("memory_bytes", row.get("cache_bytes")),
        "damage": words.number(row.get("damage"), 3),
        "gain": gain,
        "note": said,
    }


def _policy(found: Record | None) -> str:
    """What the chosen policy costs on the test data, in words."""
    if not found:
        return ""
    error = f" ± {words.number(found['error'], 2)}" if words.finite(found["error"]) else ""
    return (
        f"The cache policy adds {words.number(found['nats'], 3)}{error} nats per token at the end of {found['texts']} "
        f"test texts of {found['tokens']} tokens; perplexity and drop count it."
    )


def recovered(record: Record) -> str:
    """How the model handed over was made better than the candidate that was chosen; empty when it was not."""
    chosen = next((c for c in record.get("candidates") or [] if c["number"] == record.get("chosen")), None)
    if chosen is None or chosen["plan"] == record["plan"]:
        return ""
    return " and ".join(how for name, how in RECOVERIES.items() if name in record["plan"])


def recovered_rivals(record: Record) -> str:
    """The damage of those that were given time to recover before one was chosen; empty where none competed."""
    given = [(c["name"], c["recovered"]) for c in record.get("candidates") or [] if c.get("recovered")]
    said = [f"{words.pretty(n)} {words.number(r['damage'], 3)} nats ({words.seconds(r['seconds'])})" for n, r in given]
    return ", ".join(said) if len(said) > 1 else ""


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
        ("context", f"{r['context']} tokens" if r.get("context") else None),
        ("served with", (record.get("serving") or {}).get("label")),
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
